"""Sets of pictures: the episodes of the sets of states, drawn. A few frames each: without a GPU one takes half a second."""

import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.sources.generation import generate_episode
from deflow_torchrl.sources.oracles import GENERATED_DATASETS, VISUAL_DATASETS, episode_settings
from deflow_torchrl.tasks import get_task, paper_tasks
from tests.support.command_line import assert_one_line, deflow
from tests.support.rendering import needs_renderer

CUBE = "visual-cube-single-play-v0"


def test_the_papers_sets_of_pictures_can_be_generated():
    assert set(VISUAL_DATASETS) == {get_task(task.name).published for task in paper_tasks("offline", "visual")}
    for name, states in VISUAL_DATASETS.items():
        drawn = episode_settings(name)
        assert drawn.environment_id == f"visual-{GENERATED_DATASETS[states].environment_id}"
        assert drawn.episode_steps == GENERATED_DATASETS[states].episode_steps


def short_episodes(dataset):
    """The same episode, drawn and as states; in a process of its own, where mujoco is imported with the renderer chosen."""
    for states in VISUAL_DATASETS.values():
        GENERATED_DATASETS[states] = replace(GENERATED_DATASETS[states], episode_steps=4)
    which = {"seed": 3, "split": "train", "episode": 1}
    return [generate_episode(name, **which) for name in (dataset, VISUAL_DATASETS[dataset])]


@pytest.mark.parametrize("dataset", [CUBE, pytest.param("visual-scene-play-v0", marks=pytest.mark.slow)])
@needs_renderer
def test_states_and_pictures_come_from_the_same_episode(dataset):
    with multiprocessing.get_context("spawn").Pool(1) as process:
        drawn, states = process.apply(short_episodes, (dataset,))
    assert drawn["observations"].shape == (4, 64, 64, 3)
    assert drawn["observations"].dtype == np.uint8
    assert not np.array_equal(drawn["observations"][0], drawn["observations"][-1]), "something moves"
    for name in states.keys() - {"observations"}:
        np.testing.assert_array_equal(drawn[name], states[name])


@needs_renderer
def test_the_command_says_how_long_it_takes_and_makes_a_set_that_ogbench_loads(tmp_path):
    import ogbench

    arguments = ("visual-cube-single-play", "--episodes", "1", "--max-steps", "4", "--out", str(tmp_path), "--json",
                 "--workers", "1")  # fmt: skip
    result = deflow("data", "generate", *arguments)
    assert result.returncode == 0, result.stderr
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("8 frames take about 0:"), first
    assert "the same command goes on" in first
    assert "8/8" in result.stderr, "the bar counts frames"
    assert json.loads(last)["transitions"] == {"train": 3, "val": 3}
    sets = ogbench.make_env_and_datasets(CUBE, dataset_dir=str(tmp_path), dataset_only=True, cur_env=object())
    for split in sets:
        assert split["observations"].shape == split["next_observations"].shape == (3, 64, 64, 3)
        assert split["observations"].dtype == np.uint8
        np.testing.assert_array_equal(split["observations"][1:], split["next_observations"][:-1])
    whole = np.load(tmp_path / f"{CUBE}.npz", allow_pickle=False)
    assert whole["observations"].shape == (4, 64, 64, 3)
    again = deflow("data", "generate", *arguments)
    assert "frames take" not in again.stdout, "a set that stands is left as it is"
    assert_one_line(
        deflow("data", "generate", *arguments[:4], "5", *arguments[5:]), "made with other settings", "delete it"
    )


@pytest.mark.parametrize(("backend", "driver"), [("osmesa", "libosmesa6"), ("nonsense", "MUJOCO_GL=egl")])
def test_a_missing_driver_is_one_line_that_names_the_variable_and_the_packages(backend, driver, tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setenv("PYOPENGL_OSMESA_LIB_PATH", "/nowhere")
    result = deflow("data", "generate", "visual-cube-single-play", "--episodes", "1", "--out", str(tmp_path))
    assert_one_line(result, f"MUJOCO_GL={backend}" if backend == "osmesa" else "MUJOCO_GL", driver)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_renderer
def test_a_whole_episode_is_drawn(tmp_path):
    result = deflow("data", "generate", CUBE, "--episodes", "1", "--max-steps", "1001", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / f"{CUBE}.npz", allow_pickle=False) as file:
        assert file["observations"].shape == (1001, 64, 64, 3)
        assert file["terminals"].sum() == 1
