import json

import numpy as np
import pytest
import torch

from deflow_torchrl.data import card_markdown, data_card, import_files
from deflow_torchrl.data.dataset import TransitionDataset, make_folder
from deflow_torchrl.errors import InputError
from tests.data.test_assembly import arrays, with_successors

pa = pytest.importorskip("pyarrow", reason="needs the extra files")
h5py = pytest.importorskip("h5py", reason="needs the extra files")


def write(path, given):
    """The arrays in any of the formats; CSV and Parquet have a column a number."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **given)
    elif path.suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            for name, value in given.items():
                file[f"data/{name}"] = value
    else:
        from pyarrow import csv, parquet

        flat = {}
        for name, value in given.items():
            columns = value.reshape(len(value), -1).T
            flat |= {name: value} if value.ndim == 1 else {f"{name}_{i}": column for i, column in enumerate(columns)}
        table = pa.table(flat)
        csv.write_csv(table, path) if path.suffix == ".csv" else parquet.write_table(table, path)
    return path


MAPPING = {
    ".npz": {},
    ".hdf5": {name: f"data/{name}" for name in with_successors()},
    ".csv": {name: f"{name}_*" for name in ("observations", "actions", "next_observations")},
    ".parquet": {name: f"{name}_*" for name in ("observations", "actions", "next_observations")},
}


@pytest.mark.parametrize("ending", MAPPING)
def test_every_format_gives_the_arrays_that_were_written(ending, tmp_path):
    given = with_successors()
    read = import_files([write(tmp_path / f"x{ending}", given)], columns=MAPPING[ending])
    torch.testing.assert_close(read[:].to_dict(), TransitionDataset.from_arrays(**given)[:].to_dict())
    assert read.about["provenance"] == "own"
    assert len(read.about["files"][str(tmp_path / f"x{ending}")]) == 64


def test_vectors_of_a_table_are_in_the_order_of_their_numbers_or_of_the_list(tmp_path):
    from pyarrow import parquet

    rows = np.arange(24.0).reshape(2, 12) / 100
    table = {f"q_{i}": rows[:, i] for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 11)}
    table |= {"u": [0.0, 0.0], "r": [1.0, 1.0], "end": [0, 1], "wide": list(rows)}
    parquet.write_table(pa.table(table), tmp_path / "x.parquet")

    def read(observations):
        columns = {"observations": observations, "actions": "u", "rewards": "r", "terminals": "end"}
        with pytest.raises(InputError, match="actions has shape"):  # one number a row is no vector of actions
            import_files([tmp_path / "x.parquet"], columns=columns)
        return import_files([tmp_path / "x.parquet"], columns={**columns, "actions": "u,u"})[0]["observation"]

    torch.testing.assert_close(read("q_*"), torch.tensor(rows[0], dtype=torch.float32))
    torch.testing.assert_close(read("wide"), torch.tensor(rows[0], dtype=torch.float32))
    torch.testing.assert_close(read("q_3,q_1"), torch.tensor(rows[0][[3, 1]], dtype=torch.float32))


@pytest.mark.parametrize("ends", ["file", "column:episode", "6"])
def test_several_files_follow_one_another(ends, tmp_path):
    given = with_successors()
    for half, part in enumerate((slice(0, 6), slice(6, 12))):
        columns = {name: value[part] for name, value in given.items() if name != "timeouts"}
        write(tmp_path / f"{half}.npz", {**columns, "episode": np.full(6, 3)})
    read = import_files([tmp_path / "0.npz", tmp_path / "1.npz"], ends=ends)
    torch.testing.assert_close(read[:].to_dict(), TransitionDataset.from_arrays(**given)[:].to_dict())


def test_actions_of_other_bounds_are_mapped(tmp_path):
    given = arrays()
    path = write(tmp_path / "x.npz", {**given, "actions": given["actions"] * 3 + 1})
    with pytest.raises(InputError, match=r"leave \[-1, 1\]"):
        import_files([path])
    read = import_files([path], action_bounds=(-2, 4))[:]
    expected = TransitionDataset.from_arrays(**given)[:]
    torch.testing.assert_close(read["action"], expected["action"])


def test_a_task_without_terminal_states_says_so(tmp_path):
    given = arrays(terminal=())
    del given["terminals"]
    path = write(tmp_path / "x.npz", given)
    with pytest.raises(InputError, match=r"has no terminals; .*--never-terminates"):
        import_files([path])
    assert not import_files([path], never_terminates=True)[:]["next", "terminated"].any()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"rewards": None}, {}, "has no rewards; name the column with rewards=NAME"),
        ({}, {"columns": {"rewards": "r"}}, "has no column 'r' for rewards; there are observations, actions"),
        ({}, {"columns": {"reward": "r"}}, "unknown field 'reward'"),
        ({}, {"ends": "somehow"}, "ends='somehow' is unknown"),
        ({}, {"ends": "column:episode"}, "no column 'episode'"),
        ({}, {"action_bounds": (1, 1)}, "the first must be the smaller"),
        ({"actions": np.array([[None]] * 12)}, {}, "never loaded"),
        ({"observations": np.array([["a"]] * 12)}, {}, "expected real numbers"),
    ],
)
def test_what_cannot_be_mapped_is_one_line(changes, options, message, tmp_path):
    given = {name: value for name, value in {**arrays(), **changes}.items() if value is not None}
    path = tmp_path / "x.npz"
    np.savez(path, **given)
    with pytest.raises(InputError, match=message) as error:
        import_files([path], **options)
    assert "\n" not in str(error.value)
    assert "x.npz" in str(error.value) or "columns" in options or "ends" in options or "action_bounds" in options


@pytest.mark.parametrize("ending", MAPPING)
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_files_are_one_line(ending, damage, tmp_path):
    path = write(tmp_path / f"x{ending}", with_successors())
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "foreign": b"\x00\xff,\n1\n", "empty": b""}[damage])
    with pytest.raises(InputError) as error:
        import_files([path], columns=MAPPING[ending])
    assert "\n" not in str(error.value)
    assert f"x{ending}" in str(error.value)


def test_unknown_endings_and_missing_files_are_refused(tmp_path):
    (tmp_path / "x.pkl").touch()
    with pytest.raises(InputError, match=r"files end in \.npz"):
        import_files([tmp_path / "x.pkl"])
    with pytest.raises(InputError, match="no data file"):
        import_files([tmp_path / "nowhere.npz"])


def test_files_of_different_layouts_are_refused(tmp_path):
    write(tmp_path / "0.npz", arrays())
    write(tmp_path / "1.npz", arrays(observations=np.zeros((12, 5))))
    write(tmp_path / "2.npz", with_successors())
    with pytest.raises(InputError, match=r"1\.npz: observations has rows of shape \(5,\)"):
        import_files([tmp_path / "0.npz", tmp_path / "1.npz"])
    with pytest.raises(InputError, match="some files have next_observations"):
        import_files([tmp_path / "0.npz", tmp_path / "2.npz"])


def test_a_refused_import_leaves_nothing(tmp_path):
    path = write(tmp_path / "x.npz", arrays(rewards=np.full(12, np.nan)))
    with pytest.raises(InputError, match="NaN"):
        make_folder(tmp_path / "set", lambda folder: import_files([path], folder=folder))
    assert [item.name for item in tmp_path.iterdir()] == ["x.npz"]


def test_the_card_counts_what_is_in_the_set():
    given = with_successors()
    given["rewards"] = np.array([0, -1] * 6)
    dataset = TransitionDataset.from_arrays(**given, source="here")
    card = data_card(dataset, name="mine", reward_meaning="none")
    assert json.loads(json.dumps(card)) == card
    assert (card["transitions"], card["episodes"]) == (12, 2)
    assert card["episode_length"] == {"min": 6, "median": 6.0, "mean": 6.0, "max": 6}
    assert card["reward"]["values"] == {"-1": 6, "0": 6}
    assert card["terminated"] == {"transitions": 1, "episodes": 1}
    np.testing.assert_allclose(card["action"]["mean"], given["actions"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(card["action"]["std"], given["actions"].std(0), rtol=1e-5)
    np.testing.assert_allclose(card["action"]["max"], given["actions"].max(0), rtol=1e-5)
    page = card_markdown(card)
    assert "| transitions | 12 |" in page
    assert "-1 (6), 0 (6)" in page
    assert page.count("\n| 1 |") == 1
