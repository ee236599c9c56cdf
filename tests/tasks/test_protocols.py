"""The protocols: what they fix, what they leave to the task, and that the settings they name exist."""

import dataclasses
import subprocess
import sys

import pytest

from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.settings import TrainConfig
from deflow_torchrl.sources.oracles import GENERATED_DATASETS
from deflow_torchrl.tasks import get_task, paper_task
from deflow_torchrl.tasks.protocols import get_protocol, protocol_names

LITE_FAMILIES = ["antmaze", "humanoidmaze", "antsoccer", "cube", "scene", "puzzle", "d4rl-antmaze", "adroit"]


def test_the_papers_protocol_leaves_everything_to_the_tasks():
    paper = get_protocol("paper")
    assert paper.settings == {}
    assert (paper.tasks, paper.generated) == (None, None)
    assert paper.seeds == tuple(range(8))
    assert paper.settings_of(["lr", "tau"], online=True) == {"online_steps": 1_000_000}
    assert paper.comparable


def test_the_small_protocol_fixes_data_networks_steps_and_seeds():
    lite = get_protocol("lite")
    assert not lite.comparable
    assert lite.seeds == (0, 1, 2)
    assert lite.generated.episodes * 1000 == 100_000
    assert {"offline_steps", "hidden_dims", "batch_size", "eval_interval", "eval_episodes"} < lite.settings.keys()
    assert list(lite.tasks) == LITE_FAMILIES


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
    lite = get_protocol("lite")
    both, one = lite.settings_of(["lr", "tau"]), lite.settings_of(["lr"])
    assert both.keys() - one.keys() == {"algo.tau"}
    assert lite.settings_of([], online=True).keys() - lite.settings_of([]).keys() == {"online_steps"}


@pytest.mark.parametrize("name", protocol_names())
def test_every_task_of_a_protocol_is_one_and_its_generated_data_can_be_made(name):
    protocol = get_protocol(name)
    for by_family in (protocol.tasks, {"ablation": protocol.fixed_alpha.tasks}):
        for tasks in (by_family or {}).values():
            assert tasks
            for task in tasks:
                assert get_task(task).in_paper
    if protocol.generated is not None:
        assert set(protocol.generated.datasets) <= GENERATED_DATASETS.keys()
        used = {
            parse_ogbench_name(task).dataset
            for tasks in protocol.tasks.values()
            for task in tasks
            if get_task(task).source == "ogbench"
        }
        assert set(protocol.generated.datasets) == used & GENERATED_DATASETS.keys()


def test_an_unknown_protocol_is_refused_by_name():
    with pytest.raises(InputError, match=r"unknown protocol 'papr'; did you mean paper\?"):
        get_protocol("papr")
    with pytest.raises(InputError, match=r"unknown protocol 'xyz'; there are paper, lite"):
        get_protocol("xyz")


def test_protocols_do_not_need_torch():
    code = "import sys, deflow_torchrl.tasks.protocols as it; it.get_protocol('lite'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_small_protocols_methods_have_values_on_its_tasks():
    lite = get_protocol("lite")
    without_values = {"flow_bc"}
    for family, tasks in lite.tasks.items():
        for task in tasks:
            known = paper_task(task).hyperparameters.keys() | without_values
            assert set(lite.methods_of(family)) <= known
            assert set(lite.methods) & known == set(lite.methods_of(family)), "and none is left out without need"
    assert lite.methods_of("cube") == lite.methods
