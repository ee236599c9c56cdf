import dataclasses
import json
import sys

import pytest
import yaml

from deflow_torchrl import cli
from deflow_torchrl.algorithms import register_algorithm
from deflow_torchrl.algorithms.deflow import DeFlowConfig
from deflow_torchrl.algorithms.registry import ALGORITHMS
from deflow_torchrl.algorithms.settings import Algorithm, CriticConfig
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.overrides import apply_overrides, compose_config
from deflow_torchrl.runs.settings import TrainConfig, config_from_dict, config_to_dict, with_task_defaults
from deflow_torchrl.tasks import paper_settings, paper_task, paper_tasks
from deflow_torchrl.tasks.paper import SETTINGS
from deflow_torchrl.tasks.tables import read_table

CUBE = "cube-single-play-singletask-task2-v0"
PUZZLE = "puzzle-3x3-play-singletask-task4-v0"
NOISY = "cube-single-noisy-singletask-v0"


@dataclasses.dataclass
class TableConfig(CriticConfig):
    name: str = "table"
    alpha: float | None = None
    num_samples: int | None = None
    spare: float | None = None


@pytest.fixture
def method():
    """A method with a row in the table, by the rules of any that the table knows."""
    table = read_table("paper.json")
    rows = {
        "offline": {CUBE.replace("task2", "task{1,2,3,4,5}"): {"alpha": 300, "num_samples": 32}},
        "offline_to_online": {"humanoidmaze-medium-navigate-singletask-v0": {"alpha": 100}},
    }
    rows["offline"]["humanoidmaze-medium-navigate-singletask-task{1,2,3,4,5}-v0"] = {"alpha": 30, "num_samples": 64}
    changed = []
    for setting, values in rows.items():
        for row in table[setting]:
            key = row["tasks"] if isinstance(row["tasks"], str) else row["tasks"][0]
            if key in values:
                row["hyperparameters"]["table"] = values[key]
                changed.append(row)
    assert len(changed) == 3
    _forget()
    register_algorithm(Algorithm(name="table", config=TableConfig, build=lambda config, problem: None))
    yield "table"
    del ALGORITHMS._loaded["table"]  # a process that ends forgets it; this one goes on
    for row in changed:
        del row["hyperparameters"]["table"]
    _forget()


def _forget():
    from deflow_torchrl.tasks import paper

    paper._tasks.cache_clear()
    paper._by_task.cache_clear()


def test_what_is_not_given_is_the_tasks_and_what_is_given_stays():
    config = compose_config([f"task={CUBE}"])
    assert (config.offline_steps, config.eval_interval, config.eval_episodes) == (1_000_000, 100_000, 50)
    assert (config.hidden_dims, config.overwrite) == ([512] * 4, "online")
    algo = config.algo
    assert (algo.gamma, algo.q_aggregation, algo.target_divergence) == (0.99, "mean", 0.001)
    assert (algo.divergence_reduction, algo.square_fixed_alpha) == ("mean", False)
    assert compose_config(["task=door-human-v1"]).offline_steps == 500_000
    given = compose_config(
        [f"task={CUBE}", "offline_steps=7", "eval_interval=0", "hidden_dims=[8]", "algo.gamma=0.5", "overwrite=fifo",
         "algo.divergence_reduction=sum"]
    )  # fmt: skip
    assert (given.offline_steps, given.eval_interval, given.hidden_dims, given.overwrite) == (7, 0, [8], "fifo")
    assert (given.algo.gamma, given.algo.divergence_reduction) == (0.5, "sum")
    assert with_task_defaults(given) == given


def test_tasks_outside_the_paper_have_the_usual_protocol():
    for task in ("file:x", "minari:mine/arm-v0", NOISY):
        config = compose_config([f"task={task}"])
        assert (config.offline_steps, config.eval_interval, config.eval_episodes) == (1_000_000, 100_000, 50)
        assert config.hidden_dims == [512] * 4
        assert config.algo.target_divergence == 0.001


def test_a_config_made_in_python_is_filled_as_a_composed_one():
    config = with_task_defaults(TrainConfig(task=PUZZLE, algo=DeFlowConfig(lr=0.1)))
    assert config_to_dict(config) == config_to_dict(compose_config([f"task={PUZZLE}", "algo.lr=0.1"]))


@pytest.mark.parametrize(
    ("preset", "delta", "overwrite", "reduction", "squared"),
    [
        (None, 0.0005, "online", "mean", False),
        ("paper", 0.0005, "online", "sum", False),
        ("released", 0.005, "fifo", "mean", True),
    ],
)
def test_a_preset_decides_where_paper_and_code_disagree(preset, delta, overwrite, reduction, squared):
    overrides = [] if preset is None else [f"preset={preset}"]
    config = compose_config([f"task={PUZZLE}", *overrides])
    assert (config.preset, config.overwrite) == (preset, overwrite)
    algo = config.algo
    assert (algo.target_divergence, algo.divergence_reduction, algo.square_fixed_alpha) == (delta, reduction, squared)
    assert compose_config([f"task={PUZZLE}", *overrides, "algo.target_divergence=0.3"]).algo.target_divergence == 0.3
    online = compose_config(["task=pen-cloned-v1", "online_steps=5", *overrides])
    assert online.offline_steps == (500_000 if preset == "released" else 1_000_000)


def test_the_released_fixed_multiplier_multiplies_twice():
    import torch

    from deflow_torchrl.algorithms import get_algorithm
    from deflow_torchrl.algorithms.base import ProblemSpec

    problem = ProblemSpec(
        observation_dim=3, action_dim=2, hidden_dims=[4], gamma=0.9, q_aggregation="mean", target_divergence=0.1,
        device=torch.device("cpu"),
    )  # fmt: skip
    alphas = {}
    for preset in ("paper", "released"):
        config = compose_config([f"task={CUBE}", f"preset={preset}", "algo.fixed_alpha=0.3"])
        alphas[preset] = float(get_algorithm("deflow").build(config.algo, problem).loss.alpha)
    assert alphas == pytest.approx({"paper": 0.3, "released": 0.09})


def test_a_methods_settings_are_the_tables_by_their_names(method):
    algo = compose_config([f"task={CUBE}", f"algo={method}"]).algo
    assert (algo.alpha, algo.num_samples, algo.spare, algo.gamma) == (300.0, 32, None, 0.99)
    assert (type(algo.alpha), type(algo.num_samples)) == (float, int)
    humanoid = "task=humanoidmaze-medium-navigate-singletask-v0"
    assert compose_config([humanoid, f"algo={method}"]).algo.alpha == 30
    online = compose_config([humanoid, f"algo={method}", "online_steps=5"]).algo
    assert (online.alpha, online.num_samples, online.gamma) == (100, 64, 0.995), "the rest is as offline"
    assert compose_config([f"task={CUBE}", f"algo={method}", "algo.alpha=3"]).algo.alpha == 3


def test_a_setting_that_neither_task_nor_user_gives_is_asked_for(method):
    with pytest.raises(InputError, match=r"algo\.alpha has no value"):
        compose_config([f"task={NOISY}", f"algo={method}"])
    given = compose_config([f"task={NOISY}", f"algo={method}", "algo.alpha=3", "algo.num_samples=2"]).algo
    assert (given.alpha, given.num_samples, given.spare) == (3, 2, None)


def test_a_methods_own_widths_are_the_tables(method):
    row = next(row for row in read_table("paper.json")["offline"] if row["family"] == "cube-single")
    row["hidden_dims"]["table"] = [256, 128]
    try:
        _forget()
        assert compose_config([f"task={CUBE}", f"algo={method}"]).hidden_dims == [256, 128]
        assert compose_config([f"task={CUBE}"]).hidden_dims == [512] * 4
    finally:
        del row["hidden_dims"]["table"]


def test_settings_of_a_run_folder_of_before_are_read_as_they_are():
    old = config_to_dict(compose_config([f"task={PUZZLE}"]))
    del old["preset"], old["algo"]["square_fixed_alpha"]
    old["algo"] |= {"gamma": None, "target_divergence": None}
    config = config_from_dict(old)
    assert config_to_dict(config) | {"algo": None} == old | {"algo": None, "preset": None}
    assert (config.algo.gamma, config.algo.target_divergence) == (None, None)
    assert apply_overrides(config, ["eval_episodes=3"]).algo == config.algo
    assert apply_overrides(config, ["offline_steps=null"]).offline_steps == 1_000_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=x"], "unknown task 'x'"),
        (["task=cube-single-play-singletask-task2"], "did you mean cube-single-play-singletask-task2-v0"),
        ([f"task={CUBE}", "preset=papers"], "preset=papers is out of range; expected one of paper, released"),
    ],
)
def test_wrong_tasks_and_presets_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        compose_config(overrides)


def test_the_preset_of_a_run_is_settled():
    config = compose_config([f"task={CUBE}"])
    with pytest.raises(InputError, match="a preset is for a new run"):
        apply_overrides(config, ["preset=released"])


def deflow(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["deflow", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.app(prog_name="deflow")
    return left.value.code or 0, capsys.readouterr()


def test_the_command_line_lists_the_tasks(capsys, monkeypatch):
    code, printed = deflow(capsys, monkeypatch, "tasks", "--json")
    assert code == 0
    lines = printed.out.splitlines()
    listed = json.loads(lines[-1])
    assert [len(listed[name]) for name in ("offline", "offline_to_online")] == [73, 15]
    assert "Offline: 73 tasks" in lines
    assert "Offline to online: 15 tasks" in lines
    assert max(map(len, lines[:-1])) <= 100
    assert any(
        line.split() == ["puzzle-3x3-play-singletask-task{1..5}-v0", "500", "0.99", "mean", "0.0005*"] for line in lines
    )
    first = listed["offline"][0]
    assert first["hyperparameters"]["rebrac"] == {"actor_bc_coef": 0.003, "critic_bc_coef": 0.01}
    code, printed = deflow(
        capsys, monkeypatch, "tasks", "--family", "adroit", "--setting", "offline_to_online", "--json"
    )
    names = [task["name"] for task in json.loads(printed.out.splitlines()[-1])["offline_to_online"]]
    assert names == ["pen-cloned-v1", "door-cloned-v1", "hammer-cloned-v1", "relocate-cloned-v1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks", "--family", "cub"], "unknown family 'cub'; did you mean cube?"),
        (["tasks", "--setting", "onlin"], "unknown setting 'onlin'; did you mean offline?"),
        (["train", f"task={CUBE}", "--preset", "papr"], "expected one of paper, released"),
        (["train", f"task={CUBE}", "--preset", "paper", "preset=paper"], "not both"),
        (["train", "task=visual-scene-play-singletask-task1-v0", "p_aug=2"], "p_aug=2.0 is out of range"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch):
    code, printed = deflow(capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_a_run_folder_holds_every_value_and_resumes_with_them(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
    from tests.support.pendulum import record_pendulum
    from tests.support.runs import undrawn

    undrawn(monkeypatch)
    task, out = record_pendulum(tmp_path, episodes=2), tmp_path / "run"
    small = ["offline_steps=2", "hidden_dims=[8]", "batch_size=4", "save_interval=1"]
    code, printed = deflow(capsys, monkeypatch, "train", f"task={task}", *small, f"out={out}", "--preset", "released")
    assert code == 0, printed.err
    kept = yaml.safe_load((out / "config.yaml").read_text())["config"]
    assert (kept["preset"], kept["overwrite"], kept["eval_interval"]) == ("released", "fifo", 100_000)
    algo = {"gamma": 0.99, "q_aggregation": "mean", "target_divergence": 0.001, "square_fixed_alpha": True}
    assert algo.items() <= kept["algo"].items()
    assert algo.items() <= json.loads((out / "record.json").read_text())["config"]["algo"].items()
    code, printed = deflow(capsys, monkeypatch, "resume", str(out), "--step", "1")
    assert code == 0, printed.err


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_method_is_complete_on_each_task_that_the_paper_has_values_for(name):
    ran, method = 0, ALGORITHMS[name]
    for setting in SETTINGS:
        for task in paper_tasks(setting) if method.trains_offline else paper_tasks("offline_to_online"):
            algo = method.config()
            config = TrainConfig(task=task.name, online_steps=task.online_steps, algo=algo)
            values = paper_task(task.name).hyperparameters.get(name, {}) | task.hyperparameters.get(name, {})
            alternatives = set(algo.alternatives)
            lacks_all = bool(alternatives) and not alternatives & set(values)
            if lacks_all or not set(paper_settings(name)) - alternatives <= set(values):
                with pytest.raises(InputError, match=r"has no value|names none"):
                    with_task_defaults(config)
                continue
            filled = with_task_defaults(config)
            assert {key: getattr(filled.algo, key) for key in values} == values
            assert filled.offline_steps == (task.offline_steps if method.trains_offline else 0)
            assert config_from_dict(config_to_dict(filled)) == filled, "the table's values are in range"
            ran += 1
    assert ran >= {"rlpd": 30, "calql": 5}.get(name, 50)
