import contextlib
import json
import os

import numpy as np
import pytest
import torch

from deflow_torchrl.data import card_markdown, data_card, import_files
from deflow_torchrl.data.dataset import TransitionDataset, make_folder
from deflow_torchrl.errors import InputError
from tests.support.arrays import arrays, walk, with_successors, write
from tests.support.command_line import assert_one_line, deflow

pa = pytest.importorskip("pyarrow", reason="needs the extra files")
h5py = pytest.importorskip("h5py", reason="needs the extra files")


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
        first = import_files([tmp_path / "x.parquet"], columns=columns)[0]
        assert first["action"].shape == (1,)
        return first["observation"]

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


def halves(tmp_path, given, cut=5, ending=".npz"):
    """The rows in two files."""
    return [
        write(tmp_path / f"{number}{ending}", {name: value[part] for name, value in given.items()})
        for number, part in enumerate((slice(0, cut), slice(cut, None)))
    ]


def test_no_episode_goes_on_in_the_next_file(tmp_path):
    files = halves(tmp_path, with_successors())
    with pytest.raises(InputError, match=r"0\.npz: its last row ends no episode .*timeouts.*--ends file"):
        import_files(files)
    with pytest.raises(InputError, match=r"0\.npz: 5 rows are not whole episodes of 6 rows \(--ends 6\)"):
        import_files(files, ends="6")
    found = import_files(files, ends="discontinuity")[:]["next", "done"].flatten().nonzero().flatten()
    assert found.tolist() == [4, 5, 11]
    files = halves(tmp_path, arrays(ends=(5,)), cut=6)
    with pytest.raises(InputError, match=r"1\.npz: its last row ends no episode"):
        import_files(files)


def test_one_path_is_a_file(tmp_path):
    path = write(tmp_path / "x.npz", arrays())
    assert len(import_files(str(path))) == len(import_files(path)) == 11


@pytest.mark.parametrize("first", [0, 1])
def test_integer_actions_are_refused_in_every_file(first, tmp_path):
    files = [write(tmp_path / "0.npz", arrays()), write(tmp_path / "1.npz", arrays(actions=np.ones((12, 2), np.int64)))]
    for options in ({}, {"action_bounds": (0, 5)}):
        with pytest.raises(InputError, match=r"1\.npz: actions has type int64"):
            import_files([files[first], files[1 - first]], **options)


def test_pixels_and_fractions_are_not_mixed(tmp_path):
    images = np.zeros((12, 2, 2, 3))
    files = [
        write(tmp_path / "0.npz", arrays(observations=images.astype(np.uint8))),
        write(tmp_path / "1.npz", arrays(observations=images)),
    ]
    with pytest.raises(InputError, match=r"1\.npz: observations has type float64, in .*0\.npz uint8"):
        import_files(files)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bounds", [(20.3, 20.9), (-0.1, 0.1), (-1e6, 1e6 + 0.3)])
def test_actions_at_bounds_that_are_no_binary_numbers_are_inside(dtype, bounds, tmp_path):
    if dtype == np.float16 and bounds[1] > 1e4:
        pytest.skip("beyond float16")
    actions = np.array([bounds] * 12, np.float32).astype(dtype)
    path = write(tmp_path / "x.npz", arrays(actions=actions))
    read = import_files([path], action_bounds=bounds)[:]["action"]
    nearby = 1e-3 if dtype == np.float16 else 2e-5
    torch.testing.assert_close(read, torch.tensor([-1.0, 1]).expand(11, 2), rtol=0, atol=nearby)
    step = 4 * np.spacing(np.float16(bounds[1]) if dtype == np.float16 else np.float32(bounds[1]))
    beyond = actions.copy()
    beyond[3, 1] += max(step, (bounds[1] - bounds[0]) * 1e-3)
    path = write(tmp_path / "x.npz", arrays(actions=beyond))
    with pytest.raises(InputError, match=r"1 of 11 actions leave \[-1, 1\]"):
        import_files([path], action_bounds=bounds)


@pytest.mark.parametrize("ending", [".npz", ".hdf5", ".csv", ".parquet"])
def test_many_files_are_not_open_at_once(ending, tmp_path):
    resource = pytest.importorskip("resource", reason="needs a limit of open files")
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs the number of open files")
    given = with_successors()
    files = [write(tmp_path / f"{number:03d}{ending}", given) for number in range(40)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 15, limits[1]))
    try:
        for ends in ("flags", "discontinuity"):
            read = import_files(files, columns=MAPPING[ending], ends=ends)
            assert (len(read), read.num_episodes) == (480, 80)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    one = import_files(files[0], columns=MAPPING[ending])[:]
    torch.testing.assert_close(read[468:].to_dict(), one.to_dict())


ROW = np.array([0.4321]).tobytes()


def flip_rows(path):
    """Damage what only reading the rows finds."""
    content = bytearray(path.read_bytes())
    content[content.find(ROW * 4) + 40] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("number", [0, 1])
def test_damage_in_rows_names_the_file_it_is_in(number, tmp_path):
    actions = np.frombuffer(ROW * 2000)
    given = {
        "observations": np.zeros((2000, 1)), "actions": actions, "rewards": np.zeros(2000), "terminals": np.zeros(2000),
    }  # fmt: skip
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    for path in files:
        np.savez(path, **given)
    flip_rows(files[number])
    with pytest.raises(InputError, match=rf"{number}\.npz cannot be read") as error:
        import_files(files, ends="file")
    assert "delete" not in str(error.value)


@pytest.mark.parametrize("number", [0, 1])
def test_a_broken_chunk_names_the_file_it_is_in(number, tmp_path):
    files = [tmp_path / "0.h5", tmp_path / "1.h5"]
    for path in files:
        with h5py.File(path, "w") as file:
            for name, value in arrays().items():
                file.create_dataset(name, data=value, chunks=value.shape, fletcher32=True)
            place = file["actions"].id.get_chunk_info(0).byte_offset
        content = bytearray(path.read_bytes())
        if path == files[number]:
            content[place + 5] ^= 255
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{number}\.h5 cannot be read"):
        import_files(files)


def test_a_single_value_and_other_lengths_are_one_line(tmp_path):
    path = write(tmp_path / "x.npz", arrays(actions=np.array(0.5)))
    with pytest.raises(InputError, match=r"x\.npz: actions is a single value"):
        import_files([path])
    files = [write(tmp_path / "0.npz", arrays()), write(tmp_path / "1.npz", arrays(rewards=np.zeros(11)))]
    with pytest.raises(InputError, match=r"1\.npz: rewards has 11 rows, actions 12"):
        import_files(files)


@pytest.mark.parametrize("ending", MAPPING)
def test_flipped_bytes_anywhere_are_one_line_or_harmless(ending, tmp_path):
    path = write(tmp_path / f"x{ending}", with_successors())
    content = path.read_bytes()
    for place in np.linspace(0, len(content) - 1, 80).astype(int):
        changed = bytearray(content)
        changed[place] ^= 255
        path.write_bytes(changed)
        with contextlib.suppress(InputError):
            import_files([path], columns=MAPPING[ending])


def write_csv(path, header, rows):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


SMALL = {"observations": "x", "actions": "u", "rewards": "r", "terminals": "end"}


def test_a_column_s_name_is_itself_before_it_is_a_pattern(tmp_path):
    path = write_csv(tmp_path / "x.csv", "pos[0],pos[1],v_0,v_1,u,r,end", ["1.5,2.5,3,4,0,0,0", "1.5,2.5,3,4,0,0,1"])
    for observations, expected in (("pos[0],pos[1]", [1.5, 2.5]), ("pos[1],v_*", [2.5, 3, 4]), ("pos[0]", [1.5])):
        read = import_files([path], columns={**SMALL, "observations": observations})
        assert read[0]["observation"].tolist() == expected
        assert read.about["columns"]["observations"] == observations.replace("v_*", "v_0,v_1")


def test_columns_that_nobody_asked_for_are_not_read(tmp_path):
    from pyarrow import parquet

    table = {"state.x": [0.1, 0.2], "u": [0.0, 0.5], "r": [1, 2], "end": [False, True], "log": [[1], [1, 2]]}
    parquet.write_table(pa.table(table), tmp_path / "x.parquet")
    columns = {**SMALL, "observations": "state.x"}
    assert len(import_files([tmp_path / "x.parquet"], columns=columns)) == 2
    with pytest.raises(InputError, match=r"x\.parquet cannot be read \(column log holds lists of different lengths\)"):
        import_files([tmp_path / "x.parquet"], columns={**columns, "observations": "log"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["1,0,1,0", "1,0,1,", "1,0,1,1"], r"terminals \(column end\) has a missing value in row 1, which is NaN"),
        (["1,0,1,false", "1,0,1,true", "1,0,1,"], r"terminals \(column end\) has a missing value in row 2"),
        (["1,,1,0", "1,,1,1"], r"actions \(column u\) has a missing value in row 0"),
        (["1,0,x,0", "1,0,y,1"], r"rewards has text or objects \(r\), expected real numbers"),
        ([], r"x\.csv holds no transition"),
    ],
)
def test_what_a_table_lacks_is_said(rows, message, tmp_path):
    path = write_csv(tmp_path / "x.csv", "x,u,r,end", rows)
    with pytest.raises(InputError, match=message):
        import_files([path], columns=SMALL)


def test_a_list_that_lacks_a_number_is_named_by_its_row(tmp_path):
    from pyarrow import parquet

    for number, lists in enumerate(([[1.0, 2], [3.0, None]], [[1.0, 2], None])):
        table = {"x": lists, "u": [0.0, 0.5], "r": [1, 2], "end": [0, 1]}
        parquet.write_table(pa.table(table), tmp_path / f"{number}.parquet")
        with pytest.raises(InputError, match=r"observations \(column x\) has a missing value in row 1"):
            import_files([tmp_path / f"{number}.parquet"], columns=SMALL)


def test_in_text_a_number_without_a_fraction_is_a_number_and_in_binary_formats_an_integer(tmp_path):
    from pyarrow import parquet

    path = write_csv(tmp_path / "x.csv", "x,u,r,end", ["1,0,1,0", "2,1,1,1"])
    assert import_files([path], columns=SMALL)[:]["action"].flatten().tolist() == pytest.approx([0, 1], abs=2e-5)
    other = write_csv(tmp_path / "y.csv", "x,u,r,end", ["1.5,0.5,1.5,true", "2,1,1,true"])
    assert len(import_files([path, other], columns=SMALL)) == 4
    parquet.write_table(pa.table({"x": [1, 2], "u": [0, 1], "r": [1, 1], "end": [0, 1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="actions has type int64"):
        import_files([tmp_path / "x.parquet"], columns=SMALL)


def test_what_was_taken_for_each_field_is_recorded(tmp_path):
    given = arrays()
    observations = given.pop("observations")
    files = [write(tmp_path / "0.npz", {**given, "state": walk(), "obs": observations})]
    assert import_files(files).about["columns"] == {
        "observations": "obs", "actions": "actions", "rewards": "rewards", "terminals": "terminals", "timeouts": "timeouts",
    }  # fmt: skip
    files.append(write(tmp_path / "1.npz", {**given, "state": walk()}))
    with pytest.raises(
        InputError, match=r"1\.npz: observations would be state, in .*0\.npz obs; .*--column observations"
    ):
        import_files(files)
    assert import_files(files, columns={"observations": "state"}).num_episodes == 4


def bounded(path, rows=8, low=(-0.1, 0.0), high=(0.3, 255.0), **more):
    """A file with two actions of these bounds."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(low, high, (rows, 2))
    np.savez(
        path, observations=rng.normal(size=(rows, 3)), actions=actions, rewards=np.ones(rows),
        terminals=np.arange(rows) == rows - 1, **more,
    )  # fmt: skip
    return actions


def test_bounds_that_a_file_states_for_each_dimension_are_taken(tmp_path):
    path, low, high = tmp_path / "arm.npz", np.array([-0.1, 0.0]), np.array([0.3, 255.0])
    actions = bounded(path, action_low=low, action_high=high)
    for read in (import_files(path), import_files(path, action_bounds=(low, high))):
        np.testing.assert_allclose(read.action, 2 * (actions - low) / (high - low) - 1, atol=2e-5)
        assert read.about["action_bounds"] == [low.tolist(), high.tolist()]
    for one in (np.array(-0.5), -0.5 * np.ones(2)):  # a number bounds every dimension
        actions = bounded(tmp_path / "one.npz", action_low=one, action_high=np.array(300.0))
        read = import_files(tmp_path / "one.npz")
        np.testing.assert_allclose(read.action, 2 * (actions + 0.5) / 300.5 - 1, atol=2e-5)
    bounded(tmp_path / "other.npz", action_low=low, action_high=high + 1)
    bounded(tmp_path / "none.npz")
    for other in ("other.npz", "none.npz"):
        with pytest.raises(InputError, match=f"{other} does not state the bounds of actions that .*arm.npz states"):
            import_files([path, tmp_path / other])
    with pytest.raises(InputError, match="action bounds of 3 dimensions for actions of shape"):
        import_files(path, action_bounds=([-1, -1, -1], [1, 1, 300]))
    bounded(path, action_low=high, action_high=low)
    with pytest.raises(InputError, match=r"action_low and action_high of .*: both must be finite, and the first"):
        import_files(path)


def test_bounds_of_an_environment_are_taken_by_its_name(tmp_path):
    pytest.importorskip("gymnasium", reason="needs the extra ogbench or minari")
    path, out = tmp_path / "torque.npz", tmp_path / "torque"
    rng = np.random.default_rng(0)
    torque = rng.uniform(-2, 2, (8, 1))
    np.savez(
        path, observations=rng.normal(size=(8, 3)), actions=torque, rewards=np.ones(8), terminals=np.arange(8) == 7
    )
    done = deflow("data", "import", str(path), "--out", str(out), "--action-bounds-of", "Pendulum-v1")
    assert done.returncode == 0, done.stderr
    read = TransitionDataset.load(out)
    np.testing.assert_allclose(read.action, torque / 2, atol=2e-5)
    assert read.about["action_bounds"] == [[-2.0], [2.0]]
    again = deflow(
        "data", "import", str(path), "--out", str(tmp_path / "other"), "--action-bounds-of", "Pendulum-v1",
        "--action-bounds", "-2", "2",
    )  # fmt: skip
    assert_one_line(again, "name the same bounds")
