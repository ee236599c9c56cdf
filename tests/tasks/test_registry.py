import csv
import os
from pathlib import Path

import pytest

from deflow_torchrl.errors import InputError
from deflow_torchrl.tasks import d4rl_task_names, get_task, ogbench_dataset_name, ogbench_task_names


def test_settings_the_task_decides():
    cube = get_task("cube-single-play-singletask-task2-v0")
    assert (cube.gamma, cube.q_aggregation, cube.target_divergence, cube.in_paper) == (0.99, "mean", 0.001, True)
    maze = get_task("antmaze-giant-navigate-singletask-v0")
    assert (maze.gamma, maze.q_aggregation, maze.target_divergence, maze.number) == (0.995, "min", 0.01, 1)
    assert get_task("puzzle-3x3-play-singletask-v0").number == 4
    assert not get_task("cube-single-noisy-singletask-v0").in_paper


def test_of_the_visual_tasks_only_the_first_of_a_play_set_is_the_papers():
    names = [f"visual-cube-single-{data}-singletask{task}-v0" for data in ("play", "noisy") for task in ("", "-task1")]
    assert [get_task(name).in_paper for name in names] == [False, True, False, False]
    assert [get_task(name).number for name in names] == [2, 1, 2, 1]
    assert get_task("visual-puzzle-4x4-play-singletask-task1-v0").target_divergence == 0.0005


def test_every_name_is_an_environment_of_the_ogbench_package():
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    import gymnasium

    from deflow_torchrl.envs.factory import import_ogbench
    from deflow_torchrl.envs.names import parse_ogbench_name

    import_ogbench()
    missing = {parse_ogbench_name(name).environment_id for name in ogbench_task_names()} - set(gymnasium.registry)
    assert not missing


def test_a_task_of_each_source_knows_its_data_and_environment():
    prefixed = get_task("ogbench:cube-single-play-singletask-task2-v0")
    assert (prefixed.source, prefixed.dataset) == ("ogbench", "cube-single-play-singletask-task2-v0")
    door = get_task("door-human-v1")
    assert (door.source, door.dataset, door.metric) == ("minari", "D4RL/door/human-v2", "score")
    assert get_task("minari:D4RL/door/human-v2").target_divergence == door.target_divergence == 0.001
    assert get_task("antmaze-umaze-v2").metric == "success"
    other = get_task("minari:mine/arm-v0")
    assert (other.dataset, other.environment, other.metric) == ("mine/arm-v0", "minari:mine/arm-v0", "return")
    arm = get_task("file:data/arm", environment="Pendulum-v1")
    assert (arm.source, arm.dataset, arm.environment, arm.metric) == ("file", "data/arm", "gym:Pendulum-v1", "return")
    assert get_task("file:data/arm").environment is None
    cube = get_task("file:x", environment="cube-single-play-singletask-task2-v0")
    assert (cube.environment, cube.metric) == ("cube-single-play-singletask-task2-v0", "success")
    assert len(d4rl_task_names()) == 18
    assert get_task("minari:mine/arm-v0", environment="none").environment is None
    assert get_task("minari:mine/arm-v0", environment="Pendulum-v1").environment == "gym:Pendulum-v1"
    with pytest.raises(InputError, match="has an environment of its own"):
        get_task("door-human-v1", environment="Pendulum-v1")


def test_an_unknown_task_gets_the_nearest_names():
    with pytest.raises(InputError, match="did you mean cube-single-play-singletask-task2-v0"):
        get_task("cube-single-play-singletask-task2")


@pytest.mark.parametrize(
    "name",
    ["cube-single-play", "cube-single-play-v0", "cube-single-play-singletask", "cube-single-play-singletask-task2-v0"],
)
def test_data_sets_are_known_by_their_own_and_their_tasks_names(name):
    assert ogbench_dataset_name(name) == "cube-single-play-v0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cube-sinle-play", "did you mean cube-single-play-v0"),
        ("cube-single-play-singletask-task9-v0", "did you mean cube-single-play-singletask-task"),
        ("nonsense", "names look like cube-single-play-v0"),
        ("", "names look like"),
    ],
)
def test_an_unknown_data_set_gets_the_nearest_names(name, message):
    with pytest.raises(InputError, match=message):
        ogbench_dataset_name(name)


def test_values_are_those_of_the_papers_table_6():
    table = os.environ.get("DEFLOW_TEST_DATA")
    path = Path(table or "").parent / "spec" / "tables" / "table6_hyperparameters.csv"
    if not table or not path.is_file():
        pytest.skip("DEFLOW_TEST_DATA does not lie beside the paper's tables")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50 + 5 + 18, "states, images and D4RL"
    for row in rows:
        task = get_task(row["task"])
        assert task.in_paper
        assert task.gamma == float(row["discount"])
        assert task.q_aggregation == row["q_agg"]
        assert task.target_divergence == float(row["deflow_delta_paper"])


def test_every_family_of_the_package_with_a_published_set_has_its_names():
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    import gymnasium

    from deflow_torchrl.envs.factory import import_ogbench
    from deflow_torchrl.envs.names import parse_ogbench_name

    import_ogbench()
    registered = {name for name in gymnasium.registry if "-singletask-" in name}
    missing = registered - {parse_ogbench_name(name).environment_id for name in ogbench_task_names()}
    families = {name.partition("-singletask")[0] for name in missing}
    assert families == {"humanoidmaze-teleport", "visual-humanoidmaze-teleport"}, "no data were published for these"
