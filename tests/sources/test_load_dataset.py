"""``load_dataset("ogbench:NAME")`` in a script that knows TorchRL only, against OGBench's own loader."""

import json

import numpy as np
import pytest
import torch
from torchrl.data.datasets import load_dataset

ogbench = pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl import OGBenchExperienceReplay, register  # noqa: E402
from tests.support.generation import generation_in_process  # noqa: E402

EPISODES = {"train": 2, "val": 1}
register()


@pytest.fixture(
    scope="module", params=["cube-double-play-v0", "scene-noisy-v0", "puzzle-3x3-play-v0", "pointmaze-medium-stitch-v0"]
)
def published(request, tmp_path_factory, short_episodes):
    """(name of the task, folder, what OGBench reads by split) of a small set."""
    from deflow_torchrl.data import generate_ogbench_dataset

    folder = tmp_path_factory.mktemp("published")
    with generation_in_process():
        generate_ogbench_dataset(
            request.param, folder, episodes=EPISODES["train"], val_episodes=EPISODES["val"], seed=4
        )
    task = request.param.replace("-v0", "-singletask-task1-v0")
    env, *splits = ogbench.make_env_and_datasets(task, dataset_dir=str(folder))
    env.close()
    return task, folder, dict(zip(EPISODES, splits, strict=True))


def assert_rows_equal(transitions, theirs, rows):
    np.testing.assert_array_equal(transitions["observation"], theirs["observations"][rows])
    np.testing.assert_array_equal(transitions["next", "observation"], theirs["next_observations"][rows])
    np.testing.assert_array_equal(transitions["action"], np.clip(theirs["actions"][rows], -1 + 1e-5, 1 - 1e-5))
    np.testing.assert_array_equal(transitions["next", "reward"][:, 0], theirs["rewards"][rows])
    np.testing.assert_array_equal(transitions["next", "terminated"][:, 0], theirs["masks"][rows] == 0)
    ends = (theirs["terminals"][rows] != 0) | (theirs["masks"][rows] == 0)
    np.testing.assert_array_equal(transitions["next", "done"][:, 0], ends)
    types = {key: value.dtype for key, value in transitions["next"].items()}
    flags = dict.fromkeys(("done", "terminated", "truncated"), torch.bool)
    assert types == {"observation": torch.float32, "reward": torch.float32, **flags}
    assert transitions["observation"].dtype == transitions["action"].dtype == torch.float32


@pytest.mark.parametrize(("split", "storage"), [("train", "memory"), ("val", "memory"), ("train", "mapped")])
def test_load_dataset_gives_ogbenchs_values_whole_and_sampled(published, split, storage, short_episodes, tmp_path):
    task, folder, theirs = published
    where = {"memmap_dir": tmp_path} if storage == "mapped" else {}
    buffer = load_dataset(f"ogbench:{task}", root=folder, split=split, batch_size=64, download=False, **where)
    assert isinstance(buffer, OGBenchExperienceReplay)
    assert len(buffer) == (short_episodes - 1) * EPISODES[split] == len(theirs[split]["actions"])
    assert_rows_equal(buffer[:], theirs[split], slice(None))
    for _ in range(3):
        sample = buffer.sample()
        assert_rows_equal(sample, theirs[split], sample["index"].numpy())


def test_a_mapped_set_is_found_again_and_made_anew_when_its_file_changes(published, tmp_path):
    task, folder, theirs = published
    made = []
    for _ in range(3):
        buffer = load_dataset(f"ogbench:{task}", root=folder, memmap_dir=tmp_path, download=False)
        assert_rows_equal(buffer[:], theirs["train"], slice(None))
        made.append((buffer.dataset.folder / "observation.bin").stat().st_ino)
        about = json.loads((buffer.dataset.folder / "dataset.json").read_text())["about"]
        if len(made) == 2:
            file = next(folder.glob("*-v0.npz"))
            file.touch()
    assert made[0] == made[1] != made[2]
    assert about["fingerprint"]["task"] == task
    assert [path.name for path in tmp_path.iterdir()] == [f"{task}-train"]
