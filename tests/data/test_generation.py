import dataclasses
import fcntl
import json

import numpy as np
import pytest

pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.data import generation
from deflow_torchrl.data.generation import GENERATED_DATASETS, generate_episode, generate_ogbench_dataset
from deflow_torchrl.errors import InputError


@pytest.mark.parametrize("dataset", list(GENERATED_DATASETS))
def test_an_episode_depends_on_seed_split_and_number_alone(dataset, short_episodes):
    def run(**changes):
        return generate_episode(dataset, **{"seed": 0, "split": "train", "episode": 1, **changes})

    first = run()
    others = [run(episode=2), run(split="val"), run(seed=1)]
    again = run()
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert not any(np.array_equal(first["actions"], other["actions"]) for other in others)


@pytest.mark.parametrize("dataset", list(GENERATED_DATASETS))
def test_an_episode_is_what_ogbench_publishes(dataset, short_episodes):
    episode = generate_episode(dataset, seed=0, split="train", episode=0)
    assert {name: array.dtype for name, array in episode.items()} == {
        "observations": np.float32, "actions": np.float32, "terminals": bool, "qpos": np.float32, "qvel": np.float32,
    }  # fmt: skip
    assert episode["observations"].shape == (short_episodes, 28)
    assert episode["actions"].shape == (short_episodes, 5)
    assert np.abs(episode["actions"]).max() <= 1
    assert episode["terminals"].tolist() == [False] * (short_episodes - 1) + [True]
    # qpos belongs to the same instant as the observation: the cube's position, scaled and centred.
    np.testing.assert_allclose(
        episode["observations"][:, 19:22], (episode["qpos"][:, 14:17] - (0.425, 0, 0)) * 10, atol=1e-4
    )


def test_the_oracle_handles_the_cube(monkeypatch):
    # A full-length episode of the real oracle moves the cube: this is what the demo's success rests on.
    settings = dataclasses.replace(GENERATED_DATASETS["cube-single-play-v0"], episode_steps=1001)
    monkeypatch.setitem(GENERATED_DATASETS, "cube-single-play-v0", settings)
    monkeypatch.setattr(generation, "_ENVIRONMENTS", {})
    episode = generate_episode("cube-single-play-v0", seed=0, split="train", episode=0)
    assert len(episode["actions"]) == 1001
    cube = episode["qpos"][:, 14:17]
    assert cube[:, 2].max() > 0.06, "lifted"
    assert np.linalg.norm(cube[-1, :2] - cube[0, :2]) > 0.05, "and put down elsewhere"


def test_two_processes_and_one_make_equal_files_which_ogbench_loads(tmp_path, monkeypatch):
    import ogbench

    # Full episodes, here as in the processes, which import the real settings.
    settings = dataclasses.replace(GENERATED_DATASETS["cube-single-play-v0"], episode_steps=1001)
    monkeypatch.setitem(GENERATED_DATASETS, "cube-single-play-v0", settings)
    files = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        generate_ogbench_dataset("cube-single-play-v0", folder, episodes=2, val_episodes=1, seed=3, workers=workers)
        files[workers] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files[1] == files[2]
    assert set(files[1]) == {"cube-single-play-v0.npz", "cube-single-play-v0-val.npz", "cube-single-play-v0.json"}
    about = json.loads(files[1]["cube-single-play-v0.json"])
    assert about["transitions"] == {"train": 2000, "val": 1000}
    assert "regenerated" in about["provenance"]
    _, train, val = ogbench.make_env_and_datasets("cube-single-play-v0", dataset_dir=str(tmp_path / "1"))
    assert train["observations"].shape == (2000, 28)
    assert val["actions"].shape == (1000, 5)


def test_finished_episodes_survive_an_interruption(tmp_path, short_episodes, monkeypatch):
    made = []
    real = generation.generate_episode

    def count(dataset, **kwargs):
        made.append((kwargs["split"], kwargs["episode"]))
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(dataset, **kwargs)

    def in_process(dataset, seed, jobs, parts, workers):
        for split, episode in jobs:
            generation._write_episode(dataset, seed, split, episode, parts)
            yield

    monkeypatch.setattr(generation, "generate_episode", count)
    monkeypatch.setattr(generation, "_run_jobs", in_process)
    arguments = {"episodes": 3, "val_episodes": 1, "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        generate_ogbench_dataset("cube-single-play-v0", tmp_path, **arguments)
    assert not list(tmp_path.glob("*.npz")), "no half-written set"
    generate_ogbench_dataset("cube-single-play-v0", tmp_path, **arguments)
    assert made == [("train", 0), ("train", 1), ("train", 2), ("train", 2), ("val", 0)]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_two_processes_cannot_generate_the_same_set(tmp_path, short_episodes):
    with (tmp_path / ".cube-single-play-v0.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is generating"):
            generate_ogbench_dataset("cube-single-play-v0", tmp_path, episodes=1, val_episodes=1)


def test_episodes_of_other_settings_are_not_taken_over(tmp_path, short_episodes):
    parts = generation._parts_folder(tmp_path / ".parts", {"seed": 0})
    (parts / "train-000000.npz").write_bytes(b"old")
    assert (generation._parts_folder(parts, {"seed": 0}) / "train-000000.npz").exists()
    assert not (generation._parts_folder(parts, {"seed": 1}) / "train-000000.npz").exists()


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
