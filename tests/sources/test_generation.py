import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.errors import InputError
from deflow_torchrl.sources import generation
from deflow_torchrl.sources.generation import GENERATED_DATASETS, generate_episode, generate_ogbench_dataset
from deflow_torchrl.sources.oracles import VisibleCube
from tests.support.command_line import heed_ctrl_c

# Widths of observations, actions and button states in the published files.
WIDTHS = {
    "cube-single": (28, 5, None),
    "cube-double": (37, 5, None),
    "cube-triple": (46, 5, None),
    "scene": (40, 5, 2),
    "puzzle-3x3": (55, 5, 9),
    "puzzle-4x4": (83, 5, 16),
    "pointmaze-medium": (2, 2, None),
    "pointmaze-large": (2, 2, None),
}


def full_length(dataset, **kwargs):
    settings = generation.GENERATED_DATASETS[dataset]
    steps = 201 if dataset.endswith("stitch-v0") else 1001
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GENERATED_DATASETS, dataset, dataclasses.replace(settings, episode_steps=steps))
        patch.setattr(generation, "_COLLECTORS", {})
        episode = generate_episode(dataset, **kwargs)
        (_, collector), *_ = generation._COLLECTORS.values()
    assert len(episode["actions"]) == steps
    return episode, collector


def test_every_manipulation_set_of_the_paper_and_the_point_mazes_can_be_generated():
    assert set(GENERATED_DATASETS) == {
        *(f"{env}-{data}-v0" for env in list(WIDTHS)[:6] for data in ("play", "noisy")),
        *(f"{env}-{data}-v0" for env in list(WIDTHS)[6:] for data in ("navigate", "stitch")),
    }


# Sets that differ from a tested one in numbers of the table only; their simulators take seconds to compile.
ALIKE = {"cube-double-noisy-v0", "cube-triple-noisy-v0", "puzzle-4x4-noisy-v0"}


@pytest.mark.parametrize(
    "dataset", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in GENERATED_DATASETS]
)
def test_an_episode_is_what_ogbench_publishes_and_depends_on_seed_split_and_number_alone(dataset, short_episodes):
    def run(**changes):
        return generate_episode(dataset, **{"seed": 0, "split": "train", "episode": 1, **changes})

    first = run()
    observation, action, buttons = WIDTHS[dataset.rsplit("-", 2)[0]]
    types = {name: array.dtype for name, array in first.items()}
    assert types == {
        "observations": np.float32, "actions": np.float32, "terminals": bool, "qpos": np.float32, "qvel": np.float32,
        **({} if buttons is None else {"button_states": np.int64}),
    }  # fmt: skip
    assert first["observations"].shape == (short_episodes, observation)
    assert first["actions"].shape == (short_episodes, action)
    assert buttons is None or first["button_states"].shape == (short_episodes, buttons)
    assert np.abs(first["actions"]).max() <= 1
    assert first["terminals"].tolist() == [False] * (short_episodes - 1) + [True]
    # qpos belongs to the same instant as the observation: the arm's joints, or the point's position.
    shared = 6 if action == 5 else 2
    np.testing.assert_array_equal(first["observations"][:, :shared], first["qpos"][:, :shared])
    others = [run(episode=2), run(split="val"), run(seed=1)]
    again = run()
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert not any(np.array_equal(first["actions"], other["actions"]) for other in others)


def test_the_oracle_handles_the_cube():
    # A full-length episode of the real oracle moves the cube: this is what the demo's success rests on.
    episode, _ = full_length("cube-single-play-v0", seed=0, split="train", episode=0)
    cube = episode["qpos"][:, 14:17]
    assert cube[:, 2].max() > 0.06, "lifted"
    assert np.linalg.norm(cube[-1, :2] - cube[0, :2]) > 0.05, "and put down elsewhere"


def test_the_oracles_handle_the_scene():
    episode, _ = full_length("scene-play-v0", seed=0, split="train", episode=0)
    assert (np.diff(episode["button_states"], axis=0) != 0).any(), "a button was pressed"
    drawer, window = episode["qpos"][:, 23], episode["qpos"][:, 24]
    assert max(np.ptp(drawer), np.ptp(window)) > 0.1, "the drawer or the window was moved"
    assert VisibleCube().holds(episode["qpos"][:, 14:17])


def cells(collector, positions):
    return [collector.maze.xy_to_ij(position) for position in positions]


def test_the_point_navigates_from_goal_to_goal_through_free_cells():
    episode, collector = full_length("pointmaze-large-navigate-v0", seed=0, split="train", episode=0)
    visited = cells(collector, episode["qpos"])
    assert set(visited) <= set(collector.free_cells)
    assert len(set(visited)) > 15
    assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) <= 1 for a, b in itertools.pairwise(visited))
    assert np.isfinite(collector.maze.model.geom("target").pos).all()
    # Of the 46 free cells of this maze, those where the way only leads straight on are no goals.
    assert (1, 1) in collector.goal_cells
    assert (1, 2) not in collector.goal_cells
    assert (2, 1) not in collector.goal_cells


def test_a_stitch_episode_goes_to_a_cell_four_steps_away_and_stays_there():
    episode, collector = full_length("pointmaze-medium-stitch-v0", seed=0, split="train", episode=1)
    start, *_ = cells(collector, episode["qpos"])
    distances = {cell: distance for distance in range(30) for cell in collector.cells_at(start, distance)}
    assert distances[start] == 0
    assert all(
        any(distances.get((i + a, j + b)) == distance - 1 for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0)))
        for (i, j), distance in distances.items()
        if distance
    )
    goal = collector.maze.xy_to_ij(collector.maze.cur_goal_xy)
    assert distances[goal] == 4
    reached = np.linalg.norm(episode["qpos"] - collector.maze.cur_goal_xy, axis=1) < 3
    assert reached[-20:].all()
    assert not reached[:10].any()


@pytest.mark.parametrize(
    ("position", "healthy"),
    [((0.4, 0.1, 0.02), True), ((0.4, 0.29, 0.02), False), ((0.33, -0.356, 0.066), True), ((0.33, -0.356, 0.02), False),
     ((0.33, -0.356, 0.09), False), ((0.4, -0.2, 0.3), True)],
)  # fmt: skip
def test_the_cube_may_be_hidden_in_the_drawer_only(position, healthy):
    assert VisibleCube().holds(np.array([(0.4, 0.0, 0.02), position])) is healthy


def test_an_unhealthy_scene_episode_is_made_anew_from_a_stream_of_its_own(short_episodes, monkeypatch):
    def run(*verdicts):
        remaining = list(verdicts)
        monkeypatch.setattr(VisibleCube, "holds", lambda self, cube: remaining.pop(0))
        episode = generate_episode("scene-noisy-v0", seed=0, split="train", episode=1)
        assert not remaining
        return episode["actions"]

    attempts = [run(True), run(False, True), run(False, False, True)]
    np.testing.assert_array_equal(attempts[1], run(False, True))
    np.testing.assert_array_equal(attempts[0], run(True))
    for one, other in itertools.combinations(attempts, 2):
        assert not np.array_equal(one, other)


def test_two_processes_and_one_make_equal_files_which_ogbench_loads(tmp_path, short_episodes):
    import ogbench

    files = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        generate_ogbench_dataset("cube-single-play-v0", folder, episodes=3, val_episodes=1, seed=3, workers=workers)
        files[workers] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files[1] == files[2]
    assert set(files[1]) == {"cube-single-play-v0.npz", "cube-single-play-v0-val.npz", "cube-single-play-v0.json"}
    about = json.loads(files[1]["cube-single-play-v0.json"])
    assert about["transitions"] == {"train": 180, "val": 60}
    assert about["settings"]["episode_steps"] == short_episodes
    assert "regenerated" in about["provenance"]
    _, train, val = ogbench.make_env_and_datasets("cube-single-play-v0", dataset_dir=str(tmp_path / "1"))
    assert train["observations"].shape == (180, 28)
    assert val["actions"].shape == (60, 5)
    third = generate_episode("cube-single-play-v0", seed=3, split="train", episode=2)
    np.testing.assert_array_equal(train["actions"][120:], third["actions"][:-1])


def test_finished_episodes_survive_an_interruption(tmp_path, short_episodes, in_process, monkeypatch):
    made = []
    real = generation.generate_episode

    def count(dataset, **kwargs):
        made.append((kwargs["split"], kwargs["episode"]))
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(dataset, **kwargs)

    monkeypatch.setattr(generation, "generate_episode", count)
    arguments = {"episodes": 3, "val_episodes": 1, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        generate_ogbench_dataset("cube-single-play-v0", tmp_path, **arguments)
    assert not list(tmp_path.glob("*.npz")), "no half-written set"
    generate_ogbench_dataset("cube-single-play-v0", tmp_path, **arguments)
    assert made == [("train", 0), ("train", 1), ("train", 2), ("train", 2), ("val", 0)]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    generate_ogbench_dataset("cube-single-play-v0", tmp_path, **arguments)
    assert len(made) == 5, "a set that stands is left as it is"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"made with other seed \(0 there\)"),
        ({"episodes": 2}, r'made with other episodes \(\{"train": 1, "val": 1\} there\)'),
    ],
)
def test_a_set_made_otherwise_is_never_overwritten(changes, message, tmp_path, short_episodes, in_process):
    arguments = {"episodes": 1, "val_episodes": 1, "seed": 0}
    path = generate_ogbench_dataset("pointmaze-medium-stitch-v0", tmp_path, **arguments)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        generate_ogbench_dataset("pointmaze-medium-stitch-v0", tmp_path, **{**arguments, **changes})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match="was not generated here"):
        generate_ogbench_dataset("pointmaze-medium-stitch-v0", tmp_path, **arguments)
    assert path.read_bytes() == before[path.name]


def test_a_full_disk_is_one_line_and_leaves_no_set(tmp_path, short_episodes, in_process, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(generation, "_join_parts", full)
    with pytest.raises(InputError, match=r"No space left on device.*finished episodes are kept"):
        generate_ogbench_dataset("pointmaze-medium-stitch", tmp_path, episodes=1, val_episodes=1)
    assert not list(tmp_path.glob("*.npz"))


def test_two_processes_cannot_generate_the_same_set(tmp_path, short_episodes):
    with (tmp_path / ".cube-single-play-v0.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is preparing"):
            generate_ogbench_dataset("cube-single-play-v0", tmp_path, episodes=1, val_episodes=1)


def test_an_interrupted_seed_neither_enters_the_next_ones_set_nor_outlives_it(
    tmp_path, short_episodes, in_process, monkeypatch
):
    def run(seed, join=generation._join_parts):
        monkeypatch.setattr(generation, "_join_parts", join)
        arguments = {"episodes": 2, "val_episodes": 1, "seed": seed}
        return generate_ogbench_dataset("pointmaze-medium-stitch", tmp_path, **arguments)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(3, interrupt)
    (left,) = tmp_path.glob(".*.parts")
    with pytest.raises(KeyboardInterrupt):
        run(4, interrupt)
    assert len(list(left.iterdir())) == 3, "going back to the first seed loses nothing"
    both = list(tmp_path.glob(".*.parts"))
    assert len(both) == 2, "a process that is still at work for other settings could write into this set"
    with np.load(run(4)) as made:
        first = generate_episode("pointmaze-medium-stitch-v0", seed=4, split="train", episode=0)
        np.testing.assert_array_equal(made["actions"][:short_episodes], first["actions"])
    assert not list(tmp_path.glob(".*.parts"))


# The workers import this file too: from the third episode on they are at work for a minute.
SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from deflow_torchrl.sources import generation

def generate_episode(dataset, *, seed, split, episode):
    if episode >= 2:
        Path(sys.argv[1], f"busy-{episode}").touch()
        time.sleep(60)
    return {"terminals": np.ones(1, bool)}

generation.generate_episode = generate_episode
if __name__ == "__main__":
    try:
        generation.generate_ogbench_dataset("pointmaze-medium-stitch", sys.argv[1], episodes=9, val_episodes=1, workers=2)
    except KeyboardInterrupt:
        raise SystemExit(130)
"""


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGINT], [signal.SIGINT, signal.SIGINT]])
def test_an_interruption_ends_the_workers_at_once_and_keeps_what_is_finished(signals, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    child = subprocess.Popen(
        [sys.executable, tmp_path / "slow.py", tmp_path],
        stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("busy-*"))) < 2:
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for number in signals:
            if number == signal.SIGINT:
                os.killpg(child.pid, number)  # as a terminal does: to the workers too
            else:
                child.send_signal(number)
            time.sleep(0.1)
        errors = child.communicate(timeout=10)[1]  # reads to the end, which comes when the last worker is gone
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert signals[0] == signal.SIGKILL or len(signals) == 2 or child.returncode == 130, errors
    finished = {path.name for path in tmp_path.glob(".*.parts/[tv]*.npz")}
    assert {"train-000000.npz", "train-000001.npz"} <= finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "cube-single-dance-v0"}, "no generator"),
        ({"episodes": 0}, "at least 1"),
        ({"val_episodes": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, changes, message):
    arguments = {"dataset": "cube-single-play-v0", "episodes": 1, "val_episodes": 1, "seed": 0, **changes}
    with pytest.raises(InputError, match=message):
        generate_ogbench_dataset(arguments.pop("dataset"), tmp_path, **arguments)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write in"):
        generate_ogbench_dataset("cube-single-play-v0", tmp_path / "file" / "data", episodes=1, val_episodes=1)
