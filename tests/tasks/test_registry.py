import csv
import os
from pathlib import Path

import pytest

from deflow_torchrl.errors import InputError
from deflow_torchrl.tasks import ogbench_task, ogbench_task_names


def test_settings_the_task_decides():
    cube = ogbench_task("cube-single-play-singletask-task2-v0")
    assert (cube.gamma, cube.q_aggregation, cube.target_divergence, cube.in_paper) == (0.99, "mean", 0.001, True)
    maze = ogbench_task("antmaze-giant-navigate-singletask-v0")
    assert (maze.gamma, maze.q_aggregation, maze.target_divergence, maze.number) == (0.995, "min", 0.01, 1)
    assert ogbench_task("puzzle-3x3-play-singletask-v0").number == 4
    assert not ogbench_task("cube-single-noisy-singletask-v0").in_paper


def test_of_the_visual_tasks_only_the_first_of_a_play_set_is_the_papers():
    names = [f"visual-cube-single-{data}-singletask{task}-v0" for data in ("play", "noisy") for task in ("", "-task1")]
    assert [ogbench_task(name).in_paper for name in names] == [False, True, False, False]
    assert [ogbench_task(name).number for name in names] == [2, 1, 2, 1]
    assert ogbench_task("visual-puzzle-4x4-play-singletask-task1-v0").target_divergence == 0.0005


def test_every_name_is_an_environment_of_the_ogbench_package():
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    import gymnasium

    from deflow_torchrl.envs.factory import import_ogbench
    from deflow_torchrl.envs.names import parse_ogbench_name

    import_ogbench()
    missing = {parse_ogbench_name(name).environment_id for name in ogbench_task_names()} - set(gymnasium.registry)
    assert not missing


def test_an_unknown_task_gets_the_nearest_names():
    with pytest.raises(InputError, match="did you mean cube-single-play-singletask-task2-v0"):
        ogbench_task("cube-single-play-singletask-task2")


def test_values_are_those_of_the_papers_table_6():
    table = os.environ.get("DEFLOW_TEST_DATA")
    path = Path(table or "").parent / "spec" / "tables" / "table6_hyperparameters.csv"
    if not table or not path.is_file():
        pytest.skip("DEFLOW_TEST_DATA does not lie beside the paper's tables")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"].startswith("ogbench-")]
    assert len(rows) == 50 + 5, "states and images"
    for row in rows:
        task = ogbench_task(row["task"])
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
