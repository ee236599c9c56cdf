"""The protocols: what they fix, what they leave to the task, and that the settings they name exist."""

import dataclasses
import subprocess
import sys

import pytest

from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.settings import TrainConfig, untuned_settings
from deflow_torchrl.sources.oracles import GENERATED_DATASETS
from deflow_torchrl.sweep.plan import parse_sweep
from deflow_torchrl.tasks import get_task, paper_task, protocols, published_settings
from deflow_torchrl.tasks.protocols import TaskSettings, get_protocol, protocol_names

FAMILIES = {"antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle", "d4rl-antmaze", "adroit"}


def test_the_papers_protocol_leaves_everything_to_the_tasks():
    paper = get_protocol("paper")
    assert paper.settings == {}
    assert (paper.tasks, paper.generated) == (None, None)
    assert paper.seeds == tuple(range(8))
    assert paper.settings_of(["lr", "tau"], online=True) == {"online_steps": 1_000_000}
    assert paper.comparable


def test_the_small_protocol_fixes_data_networks_steps_and_seeds():
    small = get_protocol("small")
    assert not small.comparable
    assert small.seeds == (0, 1, 2)
    assert {"offline_steps", "hidden_dims", "batch_size", "eval_interval", "eval_episodes"} < small.settings.keys()
    assert small.settings["offline_steps"] >= small.averaged * small.settings["eval_interval"]
    assert set(small.tasks) == {*FAMILIES, "pointmaze"}
    assert sum(task in small.task_settings for tasks in small.tasks.values() for task in tasks) == 4


def test_the_protocol_of_version_0_1_stays_as_it_was():
    lite = get_protocol("lite")
    assert set(lite.generated.datasets.values()) == {100}
    assert (lite.settings["offline_steps"], lite.settings["hidden_dims"], lite.averaged) == (10_000, [128] * 3, None)
    assert set(lite.tasks) == FAMILIES


@pytest.mark.parametrize("name", protocol_names())
def test_every_setting_of_a_protocol_is_one_of_deflow_train(name):
    protocol = get_protocol(name)
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    for online in (False, True):
        settings = protocol.settings_of(["lr", "tau"], online=online)
        assert {key for key in settings if not key.startswith("algo.")} <= fields
        pairs = [f"{key}={str(value).replace(' ', '')}" for key, value in settings.items()]
        config = compose_config(["task=cube-single-play-singletask-task2-v0", "algo=deflow", *pairs])
        for key, value in settings.items():
            where, _, setting = key.rpartition(".")
            assert getattr(config.algo if where else config, setting) == value


def test_a_method_gets_the_settings_it_has_alone():
    small = get_protocol("small")
    both, one = small.settings_of(["lr", "tau"]), small.settings_of(["lr"])
    assert both.keys() - one.keys() == {"algo.tau"}
    assert small.settings_of([], online=True).keys() - small.settings_of([]).keys() == {"online_steps"}


@pytest.mark.parametrize("name", protocol_names())
def test_every_task_of_a_protocol_is_one_and_its_generated_data_can_be_made(name):
    protocol = get_protocol(name)
    for by_family in (protocol.tasks, {"ablation": protocol.fixed_alpha.tasks}):
        for tasks in (by_family or {}).values():
            assert tasks
            for task in tasks:
                own = protocol.task_settings.get(task)
                assert get_task(task).in_paper if own is None else all(get_task(like).in_paper for like in own.like)
    assert protocol.task_settings.keys() <= {task for tasks in (protocol.tasks or {}).values() for task in tasks}
    if protocol.generated is not None:
        assert protocol.generated.datasets.keys() <= GENERATED_DATASETS.keys()
        used = {
            parse_ogbench_name(task).dataset
            for tasks in protocol.tasks.values()
            for task in tasks
            if get_task(task).source == "ogbench"
        }
        assert protocol.generated.datasets.keys() == used & GENERATED_DATASETS.keys()


def test_an_unknown_protocol_is_refused_by_name():
    with pytest.raises(InputError, match=r"unknown protocol 'papr'; did you mean paper\?"):
        get_protocol("papr")
    with pytest.raises(InputError, match=r"unknown protocol 'xyz'; there are paper, small"):
        get_protocol("xyz")


def test_protocols_do_not_need_torch():
    code = "import sys, deflow_torchrl.tasks.protocols as it; it.get_protocol('small'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["small", "lite"])
def test_the_protocols_methods_have_values_on_its_tasks(name):
    protocol = get_protocol(name)
    for family, tasks in protocol.tasks.items():
        for task in tasks:
            own = protocol.task_settings.get(task)
            rows = [paper_task(like) for like in ([task] if own is None else own.like)]
            known = {"flow_bc"} | {method for row in rows for method in row.hyperparameters}
            known |= {method for method in protocol.methods for row in rows if published_settings(method, row)}
            assert set(protocol.methods_of(family)) <= known
            assert set(protocol.methods) & known == set(protocol.methods_of(family)), (
                "and none is left out without need"
            )
    assert protocol.methods_of("cube") == protocol.methods


def test_a_task_outside_the_paper_takes_the_values_of_its_like_and_the_record_calls_them_untuned(monkeypatch):
    like, other = "cube-single-play-singletask-task2-v0", "cube-double-play-singletask-v0"
    task = "cube-single-noisy-singletask-task3-v0"
    protocol = dataclasses.replace(
        get_protocol("small"),
        task_settings={task: TaskSettings((like, other), {"algo.gamma": 0.75, "hidden_dims": [8]})},
        scaled={"fql": {"alpha": 0.5}},
    )
    monkeypatch.setattr(protocols, "_protocols", lambda: {"small": protocol})
    plans = [
        parse_sweep([f"tasks={name}", f"algos={algos}", "protocol=small", "out=x"])
        for name, algos in ((task, "fql,fedit,deflow,flow_bc"), (like, "fql"))
    ]
    cells = {(cell.task, cell.variant.method): cell.settled for plan in plans for cell in plan.cells}
    fql, fedit, deflow, cloning, published = (
        cells[key] for key in [*((task, name) for name in ("fql", "fedit", "deflow", "flow_bc")), (like, "fql")]
    )
    assert (fql.algo.alpha, fql.algo.gamma, fql.hidden_dims, fql.protocol) == (150.0, 0.75, [8], "small")
    assert fedit.algo.edit_scale == 0.2, "which cube-single has not, and cube-double has"
    assert deflow.algo.target_divergence == paper_task(like).target_divergence
    assert [untuned_settings(each) for each in (fql, fedit, deflow, cloning, published)] == [
        ["alpha"], ["edit_scale"], ["target_divergence"], [], [],
    ]  # fmt: skip
    assert published.algo.alpha == 300.0, "its own value is not scaled"
