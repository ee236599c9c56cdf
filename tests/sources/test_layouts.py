"""Files as robomimic, LeRobot, d3rlpy and D4RL write them, imported without a mapping of columns."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deflow_torchrl.data import TransitionDataset, import_files
from deflow_torchrl.errors import InputError
from tests.support.arrays import arrays, walk, with_successors
from tests.support.command_line import deflow
from tests.support.layouts import d3rlpy, d3rlpy_1, d4rl, episodes_of, lerobot, robomimic

pytest.importorskip("pyarrow", reason="needs the extra files")
pytest.importorskip("h5py", reason="needs the extra files")


def same(read, given, **options):
    torch.testing.assert_close(read[:].to_dict(), TransitionDataset.from_arrays(**given, **options)[:].to_dict())


def test_robomimic_demos_are_episodes_and_their_dones_terminal(tmp_path):
    given = with_successors()
    read = import_files(robomimic(tmp_path / "x.hdf5", given))
    expected = {**given, "terminals": given["terminals"] + given["timeouts"]}
    same(read, {**expected, "timeouts": None})
    assert read.about["layout"] == "robomimic"
    assert "--never-terminates" in read.about["notes"][0]
    cut = import_files(tmp_path / "x.hdf5", never_terminates=True)
    assert not cut[:]["next", "terminated"].any()
    assert cut.num_episodes == 2
    assert "notes" not in cut.about


def test_robomimic_demos_are_in_the_order_of_their_numbers(tmp_path):
    given = arrays(length=24, ends=tuple(range(1, 24, 2)), terminal=())
    read = import_files(robomimic(tmp_path / "x.hdf5", given))
    np.testing.assert_array_equal(read[:]["observation"], np.float32(given["observations"]))


def test_observations_are_vectors_in_order_of_their_names_or_those_one_asks_for(tmp_path):
    given = arrays()
    pictures = np.zeros((12, 2, 2, 3), np.uint8)
    more = {"a_pos": given["observations"] * 2, "grip": given["rewards"], "camera": pictures}
    path = robomimic(tmp_path / "x.hdf5", given, more=more)
    read = import_files(path)
    expected = np.concatenate([more["a_pos"], more["grip"][:, None], given["observations"]], axis=1)
    np.testing.assert_array_equal(read[:]["observation"], np.float32(expected[:12]))
    assert "left out: camera (pictures)" in read.about["notes"]
    assert read.about["columns"]["observations"] == "obs/a_pos,obs/grip,obs/state"
    chosen = import_files(path, observation_keys=["state", "a_pos"])[0]["observation"]
    np.testing.assert_array_equal(chosen, np.float32([*given["observations"][0], *more["a_pos"][0]]))
    assert import_files(path, observation_keys=["camera"]).observation.dtype == torch.uint8
    for keys, message in ((["stat"], "did you mean state"), (["camera", "grip"], "cannot stand beside")):
        with pytest.raises(InputError, match=message):
            import_files(path, observation_keys=keys)


def test_demos_of_pictures_alone_need_the_name_of_a_camera(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = robomimic(tmp_path / "x.hdf5", arrays(), more={"camera": np.zeros((12, 2, 2, 3), np.uint8)})
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            del demo["obs/state"], demo["next_obs/state"]
    with pytest.raises(InputError, match="pictures for observations only; choose one with --obs-keys: camera"):
        import_files(path)
    assert import_files(path, observation_keys=["camera"]).observation.shape[1:] == (2, 2, 3)


def test_a_split_is_a_list_of_demos(tmp_path):
    given = with_successors()
    path = robomimic(tmp_path / "x.hdf5", given, masks={"train": [b"demo_1"], "none": [], "gone": [b"demo_7"]})
    read = import_files(path, split="train")
    assert (len(read), read.about["split"]) == (6, "train")
    np.testing.assert_array_equal(read[:]["observation"], np.float32(given["observations"][6:]))
    for split, message in (
        ("trian", "did you mean train"),
        ("none", "lists no demo"),
        ("gone", "demo_7, which the file"),
    ):
        with pytest.raises(InputError, match=message):
            import_files(path, split=split)


def test_the_command_line_takes_splits_observations_and_padding(tmp_path, monkeypatch):
    pytest.importorskip("typer", reason="needs the extra cli")
    monkeypatch.chdir(tmp_path)
    robomimic(tmp_path / "x.hdf5", with_successors(), more={"other": walk(seed=5)}, masks={"train": [b"demo_1"]})
    chosen = ["--split", "train", "--obs-keys", "other,state", "--never-terminates"]
    result = deflow("data", "import", "x.hdf5", "--out", "x", *chosen)
    assert result.returncode == 0, result.stderr
    assert "6 transitions, 1 episodes" in result.stdout
    assert "observations=obs/other,obs/state" in result.stdout
    assert "(robomimic's layout)" in result.stdout
    np.savez("y.npz", **{name: value.reshape(2, 6, *value.shape[1:]) for name, value in arrays().items()})
    result = deflow("data", "import", "y.npz", "--out", "y", "--padded")
    assert "11 transitions, 2 episodes" in result.stdout


def test_demos_of_different_fields_lengths_and_shapes_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    given = with_successors()

    def broken(change):
        path = robomimic(tmp_path / "x.hdf5", given)
        with h5py.File(path, "a") as file:
            change(file["data"])
        with pytest.raises(InputError) as error:
            import_files(path)
        return str(error.value)

    def replace(data, name, value):
        del data[name]
        data[name] = value

    assert "demo_1 has no rewards, demo_0 has" in broken(lambda data: data.__delitem__("demo_1/rewards"))
    assert "demo_0 has no rewards, demo_1 has" in broken(lambda data: data.__delitem__("demo_0/rewards"))
    assert "demo_1 has no obs/state" in broken(lambda data: data.__delitem__("demo_1/obs/state"))
    assert "demo_0 has no actions" in broken(lambda data: data.__delitem__("demo_0/actions"))
    assert "rewards of demo_1 has shape (5,), its actions 6 rows" in broken(
        lambda data: replace(data, "demo_1/rewards", np.zeros(5))
    )
    assert "actions of demo_1 has rows of shape (3,), those of demo_0 (2,)" in broken(
        lambda data: replace(data, "demo_1/actions", np.zeros((6, 3)))
    )
    assert "dataset_states_to_obs" in broken(
        lambda data: [data.__delitem__(f"demo_{i}/{key}") for i in (0, 1) for key in ("obs", "next_obs")]
    )


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
@pytest.mark.parametrize("lists", ["fixed", "plain"])
def test_a_lerobot_folder_is_read_with_its_metadata(version, lists, tmp_path):
    given = arrays(length=60, ends=tuple(range(4, 60, 5)), terminal=(4, 9))
    folder = lerobot(tmp_path / "set", given, version=version, lists=lists)
    read = import_files(folder)
    done = given["terminals"] + given["timeouts"]
    same(read, {**given, "terminals": done, "timeouts": None})
    assert list(read.about["files"]) == [str(folder)]
    assert "left out: images.top (pictures)" in read.about["notes"]
    first = import_files(folder, split="first")
    assert first.num_episodes == 3
    torch.testing.assert_close(first[:].to_dict(), read[:15].to_dict())
    with pytest.raises(InputError, match="did you mean first"):
        import_files(folder, split="frist")


def test_a_lerobot_folder_without_rewards_needs_a_word_about_them(tmp_path):
    given = arrays(terminal=())
    folder = lerobot(tmp_path / "set", given, rewards=False)
    with pytest.raises(InputError, match=r"has no rewards; .*--reward success-at-end, --reward zero"):
        import_files(folder)
    read = import_files(folder, reward="success-at-end")
    same(read, {**given, "rewards": "success-at-end", "terminals": None})
    assert read.about["reward"].startswith("success-at-end")
    nothing = import_files(folder, reward="zero")
    assert not nothing[:]["next", "reward"].any()
    assert "none in the files" in nothing.about["rewards"]
    with pytest.raises(InputError, match="reward='one' is unknown"):
        import_files(folder, reward="one")
    whole = lerobot(tmp_path / "whole", given)
    with pytest.raises(InputError, match=r"has rewards .*--reward is for files without"):
        import_files(whole, reward="zero")


def test_a_lerobot_folder_that_is_not_whole_is_refused(tmp_path):
    given = arrays()
    folder = lerobot(tmp_path / "set", given, version="v2.1")
    info = folder / "meta" / "info.json"
    content = json.loads(info.read_text())
    next((folder / "data").rglob("episode_000001.parquet")).unlink()
    with pytest.raises(InputError, match=r"holds 6 rows, meta/info\.json says 12"):
        import_files(folder)
    info.write_text(json.dumps({**content, "codebase_version": "v1.6"}))
    with pytest.raises(InputError, match=r"format v1\.6; v2\.x and v3\.x can be imported"):
        import_files(folder)
    info.write_text("{")
    with pytest.raises(InputError, match=r"info\.json cannot be read"):
        import_files(folder)
    for splits in ({"train": "all"}, {"train": [0, 1]}, ["0:1"], "0:1", 5):
        info.write_text(json.dumps({**content, "splits": splits}))
        with pytest.raises(InputError, match=r"in meta/info.json, expected .*FIRST:END"):
            import_files(folder, split="train")
    for file in (folder / "data").rglob("*.parquet"):
        file.unlink()
    info.write_text(json.dumps(content))
    with pytest.raises(InputError, match="videos are not needed"):
        import_files(folder)
    info.unlink()
    with pytest.raises(InputError, match=r"without meta/info\.json"):
        import_files(folder)


def test_d3rlpy_episodes_of_both_versions_are_read(tmp_path):
    given = arrays()
    same(import_files(d3rlpy(tmp_path / "2.h5", given)), given)
    same(import_files(d3rlpy_1(tmp_path / "1.h5", given)), given)
    many = arrays(length=24, ends=tuple(range(1, 24, 2)), terminal=(1, 3))
    same(import_files(d3rlpy(tmp_path / "many.h5", many)), many)
    path = d3rlpy(tmp_path / "tuple.h5", given, second=given["observations"][:, :1] * 3)
    expected = np.concatenate([given["observations"], given["observations"][:, :1] * 3], axis=1)
    same(import_files(path), {**given, "observations": expected})


@pytest.mark.parametrize("place", [0, 1, 2])
def test_d3rlpy_episodes_without_rows_are_left_out(place, tmp_path):
    h5py = pytest.importorskip("h5py")
    given = arrays()
    path = d3rlpy(tmp_path / "x.h5", given)
    with h5py.File(path, "r+") as file:
        for name in ("observations", "actions", "rewards", "terminated"):
            for number in reversed(range(place, 2)):
                file.move(f"{name}_{number}", f"{name}_{number + 1}")
        file[f"observations_{place}"], file[f"actions_{place}"] = np.zeros((0, 3)), np.zeros((0, 2))
        file[f"rewards_{place}"], file[f"terminated_{place}"] = np.zeros((0, 1)), False
    same(import_files(path), given)
    with h5py.File(path, "r+") as file:
        for name in list(file):
            if name.rpartition("_")[2].isdecimal() and not name.endswith(f"_{place}"):
                del file[name]
            elif name.endswith(f"_{place}") and place:
                file.move(name, f"{name.rpartition('_')[0]}_0")
    with pytest.raises(InputError, match="holds no transition"):
        import_files(path)


def test_d4rl_s_last_row_counts_as_cut(tmp_path):
    given = arrays()
    read = import_files(d4rl(tmp_path / "x.hdf5", {**given, "timeouts": np.zeros(12)}))
    same(read, given)
    assert read.about["layout"] == "D4RL"
    assert "last row is not marked" in read.about["notes"][0]
    assert "notes" not in import_files(d4rl(tmp_path / "y.hdf5", given)).about


def test_layouts_are_not_mixed(tmp_path):
    files = [robomimic(tmp_path / "0.hdf5", arrays()), d4rl(tmp_path / "1.hdf5", arrays())]
    with pytest.raises(InputError, match=r"1\.hdf5 is D4RL, .*0\.hdf5 is robomimic; .*one layout at a time"):
        import_files(files)
    with pytest.raises(InputError, match="has no splits"):
        import_files(files[1], split="train")
    with pytest.raises(InputError, match="has no keys of observations"):
        import_files(files[1], observation_keys=["x"])
    with pytest.raises(InputError, match="given twice"):
        import_files([files[0], files[0]])


def test_what_the_user_names_goes_before_the_layout(tmp_path):
    path = robomimic(tmp_path / "x.hdf5", with_successors(), more={"other": walk(seed=5)})
    read = import_files(path, columns={"observations": "obs/other", "next_observations": "next_obs/other"}, ends="6")
    np.testing.assert_array_equal(read[:]["observation"], np.float32(walk(seed=5)))


@pytest.mark.parametrize("marked", ["flags", "mask", "mask behind"])
def test_padded_arrays_lose_their_padding(marked, tmp_path):
    given = arrays()
    parts = [{name: value[rows] for name, value in given.items()} for rows in (slice(0, 6), slice(6, 9), slice(9, 12))]
    behind = marked == "mask behind"  # valid rows stand at the end
    padded = {}
    for name in given:
        padded[name] = np.stack([pad(part[name], 8, before=behind, last=name in ("terminals",)) for part in parts])
    padded["timeouts"][:, :] = 0
    for episode, length in enumerate((6, 3, 3)):
        padded["timeouts"][episode, -1 if behind else length - 1] = episode > 0
    mask = np.stack([pad(np.ones(len(part["rewards"])), 8, before=behind) for part in parts])
    expected = {**given, "timeouts": np.eye(12)[8] + np.eye(12)[11]}
    if marked == "flags":
        padded["rewards"][:, 7] = np.nan  # in the padding
    np.savez(tmp_path / "x.npz", **padded, **({} if marked == "flags" else {"mask": mask}))
    same(import_files(tmp_path / "x.npz", padded=marked == "flags"), expected)


def pad(rows, length, *, before=False, last=False):
    empty = np.full((length - len(rows), *rows.shape[1:]), rows[-1] if last else 0.0)
    return np.concatenate(
        [empty, rows] if before and not last else [rows * 0, empty, rows][1:] if before else [rows, empty]
    )


def test_bad_padding_is_one_line(tmp_path):
    given = {name: value.reshape(2, 6, *value.shape[1:]) for name, value in arrays().items()}
    for changes, message in (
        ({"mask": np.ones((2, 5))}, r"mask has shape \(2, 5\), actions \(2, 6, 2\)"),
        ({"mask": np.array([[1, 0, 1, 1, 1, 1], [1] * 6])}, "the mask of episode 0 has a gap"),
        ({"mask": np.zeros((2, 6))}, "holds no transition"),
        ({"rewards": np.zeros(12)}, r"rewards has 12 rows, actions 2"),
    ):
        np.savez(tmp_path / "x.npz", **{**given, **changes})
        with pytest.raises(InputError, match=message):
            import_files(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", **arrays())
    with pytest.raises(InputError, match=r"padded arrays are \[episodes, steps, A\]"):
        import_files(tmp_path / "x.npz", padded=True)


@pytest.mark.parametrize("point", [".", ","])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_spreadsheet_s_numbers_are_read(delimiter, point, tmp_path):
    if delimiter == point:
        pytest.skip("a comma cannot be both")
    given = arrays()
    names = [*(f"obs_{i}" for i in range(3)), "act_0", "act_1", "reward", "terminated", "truncated"]
    table = np.column_stack(list(given.values()))
    lines = [
        delimiter.join(names),
        *(delimiter.join(f"{value:.9g}".replace(".", point) for value in row) for row in table),
    ]
    expected = TransitionDataset.from_arrays(**given)[:].to_dict()
    (tmp_path / "x.csv").write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    torch.testing.assert_close(import_files(tmp_path / "x.csv")[:].to_dict(), expected)
    for text in ('"left, then right; fast"', '"1,5"'):  # a text, also one that looks like a decimal comma
        noted = [lines[0] + delimiter + '"note; a, b"', *(line + delimiter + text for line in lines[1:])]
        (tmp_path / "x.csv").write_text("\n".join(noted))
        torch.testing.assert_close(import_files(tmp_path / "x.csv")[:].to_dict(), expected)
    (tmp_path / "x.csv").write_text(
        "\n".join([lines[0] + delimiter + "note", *(line + delimiter + "a" + delimiter for line in lines[1:])])
    )
    with pytest.raises(InputError, match=r"Expected 9 columns, got 10.*holds the delimiter .* must be quoted"):
        import_files(tmp_path / "x.csv")


FORMATS = Path(os.environ.get("DEFLOW_TEST_DATA", "")) / "formats"


@pytest.mark.skipif(
    "DEFLOW_TEST_DATA" not in os.environ or not FORMATS.is_dir(), reason="needs $DEFLOW_TEST_DATA/formats"
)
@pytest.mark.parametrize(
    ("name", "options", "transitions"),
    [
        ("robomimic.hdf5", {}, 400),
        ("lerobot_columns.parquet", {}, 400),
        ("lerobot_list.parquet", {}, 398),
        ("d4rl_raw.hdf5", {}, 398),
        ("semicolon.csv", {}, 398),
        ("decimal_comma.csv", {}, 398),
        ("padded.npz", {"padded": True}, 398),
    ],
)
def test_files_of_other_packages_need_no_mapping(name, options, transitions):
    read = import_files(FORMATS / name, **options)
    assert (len(read), read.num_episodes) == (transitions, 2)
    assert read.observation.shape[1:] == (3,)
    # All are of one recording.
    reference = import_files(FORMATS / "robomimic.hdf5")
    rows = [*range(199), *range(200, 399)]
    own = rows if transitions == 400 else slice(None)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        torch.testing.assert_close(read[own][key], reference[rows][key], rtol=1e-5, atol=1e-5)


def test_episodes_of_counts_like_the_files():
    assert [len(part["rewards"]) for part in episodes_of(arrays())] == [6, 6]
