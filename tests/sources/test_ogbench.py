import shutil

import numpy as np
import pytest
import torch

ogbench = pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.data import OGBenchExperienceReplay, load_ogbench_dataset  # noqa: E402
from deflow_torchrl.errors import InputError  # noqa: E402
from deflow_torchrl.sources.ogbench import load_ogbench_file  # noqa: E402
from tests.support.generation import DATASET, TASK  # noqa: E402


def tamper(generated, tmp_path, **changes):
    """A copy of the data folder in which arrays of the training file are changed (None drops one)."""
    folder = tmp_path / "data"
    shutil.copytree(generated, folder)
    path = folder / f"{DATASET}.npz"
    with np.load(path) as file:
        content = {name: file[name].copy() for name in file.files}
    for name, change in changes.items():
        if change is None:
            del content[name]
        else:
            content[name] = change(content[name])
    np.savez(path, **content)
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_value_equals_what_the_ogbench_package_loads(generated, split):
    _, *sets = ogbench.make_env_and_datasets(TASK, dataset_dir=str(generated))
    expected = sets[("train", "val").index(split)]
    td = OGBenchExperienceReplay(TASK, root=generated, split=split)[:]
    assert len(td) == len(expected["actions"]) == (180 if split == "train" else 60)
    np.testing.assert_array_equal(td["observation"], expected["observations"])
    np.testing.assert_array_equal(td["next", "observation"], expected["next_observations"])
    np.testing.assert_array_equal(td["action"], np.clip(expected["actions"], -1 + 1e-5, 1 - 1e-5))
    np.testing.assert_array_equal(td["next", "reward"].squeeze(-1), expected["rewards"])
    np.testing.assert_array_equal(td["next", "terminated"].squeeze(-1), expected["masks"] == 0)


def test_trajectory_ends_are_truncated_unless_terminated(generated):
    td = OGBenchExperienceReplay(TASK, root=generated)[:]
    ends = torch.arange(len(td)) % 60 == 59
    assert torch.equal(td["next", "done"].squeeze(-1), ends | td["next", "terminated"].squeeze(-1))
    assert not (td["next", "terminated"] & td["next", "truncated"]).any()
    # Within a trajectory s' is the next row's s; across a trajectory's end it is not.
    same = (td["next", "observation"][:-1] == td["observation"][1:]).all(-1)
    assert torch.equal(same, ~ends[:-1])


def test_sampling_gives_batches_of_the_whole_set(generated):
    rb = OGBenchExperienceReplay(TASK, root=generated, batch_size=512)
    batch = rb.sample()
    assert batch["action"].shape == (512, 5)
    assert batch["index"].unique().numel() > 150
    assert torch.equal(batch["observation"], rb[:]["observation"][batch["index"]])


def test_memory_mapped_storage_holds_the_same(generated, tmp_path):
    plain = OGBenchExperienceReplay(TASK, root=generated)
    mapped = OGBenchExperienceReplay(TASK, root=generated, memmap_dir=tmp_path / "map")
    assert mapped.dataset.folder == tmp_path / "map" / f"{TASK}-train"
    torch.testing.assert_close(mapped[:].to_dict(), plain[:].to_dict())
    with pytest.raises(InputError, match="not both"):
        OGBenchExperienceReplay(TASK, root=generated, memmap_dir=tmp_path / "map", device="meta")


def test_the_buffer_cannot_be_written(generated):
    rb = OGBenchExperienceReplay(TASK, root=generated)
    with pytest.raises(RuntimeError):
        rb.extend(rb[:2])


def test_another_task_of_the_same_data_gets_its_own_rewards(generated, tmp_path):
    # The cube is put where task 1 wants it: solved for task 1, not for task 2.
    def at_goal(qpos):
        qpos[:, 14:17] = (0.425, -0.1, 0.02)
        return qpos

    folder = tamper(generated, tmp_path, qpos=at_goal)
    first = load_ogbench_dataset("cube-single-play-singletask-task1-v0", root=folder)[:]
    second = load_ogbench_dataset("cube-single-play-singletask-task2-v0", root=folder)[:]
    assert (first["next", "reward"] == 0).all()
    assert first["next", "terminated"].all()
    assert (second["next", "reward"] == -1).all()
    assert not second["next", "terminated"].any()
    default = load_ogbench_dataset("cube-single-play-singletask-v0", root=folder)[:]
    torch.testing.assert_close(default.to_dict(), second.to_dict())


def one_bad(value, row=7):
    def change(array):
        array[row] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": one_bad(np.nan)}, "NaN or infinite value in row"),
        ({"actions": one_bad(np.inf)}, "NaN or infinite value in row"),
        ({"actions": one_bad(2.0)}, r"leave \[-1, 1\]"),
        ({"actions": lambda a: (a * 100).astype(np.int64)}, "type int64"),
        ({"actions": lambda a: a[:, 0]}, "dimensions"),
        ({"actions": lambda a: a[:, :3]}, "belong to another environment"),
        ({"observations": lambda o: o[:, :3]}, "belong to another environment"),
        ({"observations": lambda o: o.astype("U8")}, "expected real numbers"),
        ({"observations": lambda o: o.astype(complex)}, "expected real numbers"),
        ({"actions": lambda a: a[:50]}, "has 50 rows"),
        ({"qpos": one_bad(np.nan)}, "qpos has a NaN"),
        ({"qpos": lambda q: q[:, :9]}, "qpos has 9 columns"),
        ({"terminals": np.ones_like}, "every row ends a trajectory"),
        ({"terminals": None}, "no array terminals"),
        ({"terminals": np.zeros_like}, "last row does not end"),
        ({"qpos": None}, "does not fit"),
        (
            {name: (lambda a: a[:0]) for name in ("observations", "actions", "terminals", "qpos", "qvel")},
            "no transition",
        ),
        ({"observations": lambda o: o.astype(object)}, "cannot be read"),
    ],
)
def test_damaged_data_is_refused_in_one_line_naming_the_file(generated, tmp_path, changes, message):
    folder = tamper(generated, tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        load_ogbench_dataset(TASK, root=folder)
    assert "\n" not in str(error.value)
    assert f"{DATASET}.npz" in str(error.value)


def test_arrays_the_package_does_not_know_are_ignored(generated, tmp_path):
    folder = tamper(generated, tmp_path)
    with np.load(folder / f"{DATASET}.npz") as file:
        np.savez(folder / f"{DATASET}.npz", version=np.array(1), **{name: file[name] for name in file.files})
    assert len(load_ogbench_dataset(TASK, root=folder)) == 180


def test_torchrls_load_dataset_finds_the_sets(generated):
    from torchrl.data.datasets import load_dataset

    from deflow_torchrl import register

    register()
    rb = load_dataset(f"ogbench:{TASK}", root=generated, batch_size=4)
    assert isinstance(rb, OGBenchExperienceReplay)
    assert rb.sample().batch_size == (4,)


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_empty_foreign_and_truncated_files_are_refused(generated, tmp_path, content):
    folder = tamper(generated, tmp_path)
    path = folder / f"{DATASET}.npz"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(InputError, match="cannot be read"):
        load_ogbench_dataset(TASK, root=folder)


def test_a_missing_validation_file_is_named(generated, tmp_path):
    folder = tamper(generated, tmp_path)
    (folder / f"{DATASET}-val.npz").unlink()
    load_ogbench_dataset(TASK, root=folder, download=False)
    with pytest.raises(InputError, match=f"{DATASET}-val.npz"):
        load_ogbench_dataset(TASK, root=folder, split="val", download=False)


def test_without_network_the_error_names_the_other_ways_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("ogbench.utils.DATASET_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("DEFLOW_MIRRORS", raising=False)
    with pytest.raises(InputError, match=r"no data file.*Connection refused.*deflow data generate.*--from-file"):
        load_ogbench_dataset(TASK, root=tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_unknown_names_are_refused(generated):
    for name in ("cube-single-play-v0", "nonsense", "cube-septuple-play-singletask-task1-v0"):
        with pytest.raises(InputError):
            load_ogbench_dataset(name, root=generated, download=False)


def test_states_and_actions_of_a_file_are_the_rows_the_ogbench_package_keeps(generated):
    rows = load_ogbench_file(generated / f"{DATASET}.npz")[:]
    observations, actions = rows["observation"], rows["action"]
    td = load_ogbench_dataset(TASK, root=generated)[:]
    assert torch.equal(observations, td["observation"])
    torch.testing.assert_close(actions, td["action"], rtol=0, atol=1.1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": lambda a: a * 3}, r"leave \[-1, 1\] .*; rescale"),
        ({"actions": lambda a: a.astype(np.int64)}, "actions has type int64"),
        ({"observations": lambda s: s.reshape(len(s), 1, 1, -1)}, "images must be uint8"),
        ({"observations": lambda s: s * np.nan}, "NaN or infinite"),
        ({"terminals": np.ones_like}, "every row ends a trajectory"),
        ({"terminals": None}, "no array terminals"),
        ({"observations": lambda s: s.astype(object)}, "cannot be read"),
    ],
)
def test_a_file_without_usable_states_and_actions_is_refused(generated, tmp_path, changes, message):
    path = tamper(generated, tmp_path, **changes) / f"{DATASET}.npz"
    with pytest.raises(InputError, match=message) as error:
        load_ogbench_file(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no data file"):
        load_ogbench_file(tmp_path / "nowhere.npz")
