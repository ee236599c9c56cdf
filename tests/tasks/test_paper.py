import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deflow_torchrl.errors import InputError
from deflow_torchrl.tasks import families, get_task, paper_task, paper_tasks
from deflow_torchrl.tasks.paper import SETTINGS, families_of

# Columns of the paper's tables -> method and setting here.
HYPERPARAMETERS = {
    "iql_alpha": ("iql", "temperature"),
    "rebrac_alpha1_actor": ("rebrac", "actor_bc_coef"),
    "rebrac_alpha2_critic": ("rebrac", "critic_bc_coef"),
    "idql_N": ("idql", "num_samples"),
    "srpo_beta": ("srpo", "beta"),
    "cac_eta": ("cac", "eta"),
    "fawac_alpha": ("fawac", "temperature"),
    "fbrac_alpha": ("fbrac", "alpha"),
    "calql_alpha": ("calql", "alpha"),
    "calql_target_gap_beta": ("calql", "target_gap"),
    "ifql_N": ("ifql", "num_samples"),
    "fql_alpha": ("fql", "alpha"),
    "fql_alpha_o2o": ("fql", "alpha"),
    "deflow_delta_paper": ("deflow", "target_divergence"),
    "deflow_delta": ("deflow", "target_divergence"),
}
FAMILIES = {
    "antmaze-large-navigate": "antmaze-large", "antmaze-giant-navigate": "antmaze-giant",
    "humanoidmaze-medium-navigate": "humanoidmaze-medium", "humanoidmaze-large-navigate": "humanoidmaze-large",
    "antsoccer-arena-navigate": "antsoccer", "cube-single-play": "cube-single", "cube-double-play": "cube-double",
    "scene-play": "scene", "puzzle-3x3-play": "puzzle-3x3", "puzzle-4x4-play": "puzzle-4x4",
    "d4rl-antmaze": "d4rl-antmaze", "d4rl-adroit": "adroit", "visual-manipulation": "visual",
}  # fmt: skip
BENCHMARKS = {"d4rl-antmaze": "d4rl", "d4rl-adroit": "d4rl"}
CHECKPOINTS = {
    "mean of 800K,900K,1M": (800_000, 900_000, 1_000_000),
    "mean of 300K,400K,500K": (300_000, 400_000, 500_000),
    "last (500K)": (500_000,),
}
METRICS = {
    "success x100": "success",
    "success x100 (= normalized score)": "success",
    "D4RL normalized score": "score",
}


def read_table(name):
    data = os.environ.get("DEFLOW_TEST_DATA")
    path = Path(data or "").parent / "spec" / "tables" / name
    if not data or not path.is_file():
        pytest.skip("DEFLOW_TEST_DATA does not lie beside the paper's tables")
    with path.open() as file:
        return list(csv.DictReader(file))


def table_hyperparameters(row):
    found = {}
    for column, (method, setting) in HYPERPARAMETERS.items():
        if row.get(column, "") != "":
            found.setdefault(method, {})[setting] = float(row[column])
    return found


def test_every_cell_of_table_6_is_ours():
    rows, tasks = read_table("table6_hyperparameters.csv"), paper_tasks("offline")
    assert [row["task"] for row in rows] == [task.name for task in tasks]
    # Those that hold no number of a task: where the README says it, and what is the same in all rows.
    read = set(HYPERPARAMETERS) | {
        "task", "benchmark", "family", "is_default_task", "deflow_delta_readme", "fql_alpha_readme", "q_agg", "discount",
        "offline_steps", "encoder", "p_aug", "frame_stack", "eval_interval", "eval_episodes", "eval_checkpoints", "n_seeds",
        "metric",
    }  # fmt: skip
    assert set(rows[0]) - read == {"deflow_readme_source", "deflow_normalize_q"}
    assert {row["deflow_normalize_q"] for row in rows} == {"True"}
    for row, task in zip(rows, tasks, strict=True):
        assert task.hyperparameters == table_hyperparameters(row), task.name
        assert task.family == FAMILIES[row["family"]]
        assert task.benchmark == BENCHMARKS.get(row["benchmark"], row["benchmark"])
        assert task.default_task == {"1": True, "0": False, "": None}[row["is_default_task"]]
        assert task.target_divergence == float(row["deflow_delta_paper"])
        assert task.released.get("target_divergence", task.target_divergence) == float(row["deflow_delta_readme"])
        assert task.hyperparameters["fql"]["alpha"] == float(row["fql_alpha_readme"])
        assert (task.q_aggregation, task.discount) == (row["q_agg"], float(row["discount"]))
        assert task.offline_steps == task.eval_checkpoints[-1] == int(row["offline_steps"])
        assert task.online_steps == 0
        pixels = task.pixels or {"encoder": "", "crop_probability": "", "frame_stack": ""}
        assert [str(value) for value in pixels.values()] == [row["encoder"], row["p_aug"], row["frame_stack"]]
        assert (task.eval_interval, task.eval_episodes) == (int(row["eval_interval"]), int(row["eval_episodes"]))
        assert task.eval_checkpoints == CHECKPOINTS[row["eval_checkpoints"]]
        assert (task.seeds, task.metric) == (int(row["n_seeds"]), METRICS[row["metric"]])


def test_every_cell_of_the_offline_to_online_table_is_ours():
    rows, tasks = read_table("o2o_hyperparameters.csv"), paper_tasks("offline_to_online")
    assert [row["task"] for row in rows] == [task.name for task in tasks]
    read = set(HYPERPARAMETERS) | {
        "task", "q_agg", "discount", "fql_alpha_offline", "deflow_delta_readme", "offline_steps_fql_readme", "online_steps",
    }  # fmt: skip
    assert not set(rows[0]) - read
    for row, task in zip(rows, tasks, strict=True):
        assert task.hyperparameters == table_hyperparameters(row), task.name
        offline = paper_task(task.name)
        assert offline is not None
        assert offline.hyperparameters["fql"]["alpha"] == float(row["fql_alpha_offline"])
        assert task.target_divergence == offline.target_divergence == float(row["deflow_delta"])
        assert task.released.get("target_divergence", task.target_divergence) == float(row["deflow_delta_readme"])
        assert (task.q_aggregation, task.discount) == (row["q_agg"], float(row["discount"]))
        assert (task.offline_steps, task.online_steps) == (
            int(row["offline_steps_fql_readme"]),
            int(row["online_steps"]),
        )
        assert task.eval_checkpoints == (task.offline_steps, task.offline_steps + task.online_steps)
        assert ("offline_steps" in task.released) == (task.benchmark == "d4rl")


def test_the_tasks_are_those_of_the_papers_result_tables():
    for table, setting in (("table7_offline.csv", "offline"), ("table2_o2o.csv", "offline_to_online")):
        assert [row["task"] for row in read_table(table)] == [task.name for task in paper_tasks(setting)]


def test_counts_families_and_protocol_without_any_other_file():
    assert [len(paper_tasks(setting)) for setting in SETTINGS] == [73, 15]
    assert len(families()) == 13
    assert [len(paper_tasks("offline", family)) for family in families()] == [5] * 10 + [6, 12, 5]
    assert all(get_task(task.name).in_paper for setting in SETTINGS for task in paper_tasks(setting))
    assert all(task.trainable for task in paper_tasks("offline"))
    assert families_of("cube") == ["cube-single", "cube-double"]
    cube = paper_task("cube-single-play-singletask-v0")
    assert cube is not None
    assert (cube.name, cube.default_task) == ("cube-single-play-singletask-task2-v0", True)
    assert (cube.hidden_dims["iql"], cube.default_hidden_dims) == ((256,) * 4, (512,) * 4)
    assert paper_task("minari:D4RL/door/human-v2") == paper_task("door-human-v1")
    assert paper_task("cube-single-noisy-singletask-v0") is None
    assert paper_task("file:x") is None
    assert paper_task("cube-single-play-singletask-v0", "offline_to_online") is None
    puzzle = paper_tasks("offline_to_online", "puzzle")[0]
    assert (puzzle.target_divergence, puzzle.released) == (0.0005, {"target_divergence": 0.005})


def test_horizons_are_those_of_the_environments():
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    import gymnasium

    from deflow_torchrl.envs.factory import import_ogbench
    from deflow_torchrl.envs.names import parse_ogbench_name

    import_ogbench()
    for task in paper_tasks("offline"):
        if task.benchmark != "d4rl":
            spec = gymnasium.spec(parse_ogbench_name(task.environment).environment_id)
            assert spec.max_episode_steps == task.horizon, task.name


@pytest.mark.parametrize(
    ("setting", "family", "message"),
    [
        ("online", None, "unknown setting 'online'; did you mean offline"),
        ("offline", "cub", "unknown family 'cub'; did you mean cube"),
        ("offline", "kitchen", "there are antmaze-large"),
    ],
)
def test_an_unknown_family_or_setting_gets_the_nearest_names(setting, family, message):
    with pytest.raises(InputError, match=message):
        paper_tasks(setting, family)


def test_the_registry_does_not_import_torch():
    code = "import sys; from deflow_torchrl.tasks import paper_tasks; print(len(paper_tasks('offline')), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["73", "False"]
