import numpy as np
import pytest
import torch

from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.errors import InputError
from tests.support.arrays import arrays, walk, with_successors


def build(given, **kwargs):
    return TransitionDataset.from_arrays(**given, source="x", **kwargs)


def test_without_next_observations_a_row_follows_the_other_and_the_last_of_a_cut_episode_is_left_out():
    given = arrays()
    td = build(given)[:]
    kept = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]  # row 11 is a timeout: nothing follows it
    np.testing.assert_array_equal(td["observation"], np.float32(given["observations"][kept]))
    np.testing.assert_array_equal(td["action"], np.float32(given["actions"][kept]))
    following = given["observations"][[1, 2, 3, 4, 5, 5, 7, 8, 9, 10, 11]]  # s stands in behind a terminal row
    np.testing.assert_array_equal(td["next", "observation"], np.float32(following))
    assert td["next", "terminated"].flatten().nonzero().flatten().tolist() == [5]
    assert td["next", "truncated"].flatten().nonzero().flatten().tolist() == [10]
    assert build(given).about["rows_without_successor_left_out"] == 1


def test_with_next_observations_every_row_is_a_transition_and_final_observations_are_kept():
    given = with_successors()
    td = build(given)[:]
    assert len(td) == 12
    np.testing.assert_array_equal(td["next", "observation"], np.float32(given["next_observations"]))
    assert td["next", "done"].flatten().nonzero().flatten().tolist() == [5, 11]
    assert td["next", "terminated"].flatten().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("maker", [arrays, with_successors])
def test_the_size_of_a_chunk_changes_nothing(rows, maker, monkeypatch):
    given = maker()
    whole = build(given)[:]
    monkeypatch.setattr("deflow_torchrl.data.assembly.rows_a_chunk", lambda column: rows)
    monkeypatch.setattr("deflow_torchrl.data.columns.rows_a_chunk", lambda column: rows)
    torch.testing.assert_close(build(given)[:].to_dict(), whole.to_dict())


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_ends_are_inferred_in_each_way_one_can_tell(rows, monkeypatch):
    monkeypatch.setattr("deflow_torchrl.data.assembly.rows_a_chunk", lambda column: rows)
    expected = build(with_successors())[:]
    unmarked = {**with_successors(), "timeouts": None}
    for told in ("discontinuity", 6, np.repeat([3, 9], 6)):
        torch.testing.assert_close(build(unmarked, episode_ends=told)[:].to_dict(), expected.to_dict())
    with pytest.raises(InputError, match="the last row ends no episode"):
        build(unmarked)


def test_a_terminal_row_inside_a_told_episode_only_cuts_the_bootstrap():
    given = arrays(terminal=(), ends=(11,))
    given["terminals"][3] = 1
    td = build({**given, "timeouts": None}, episode_ends=12)[:]
    assert td["next", "terminated"].flatten().nonzero().flatten().tolist() == [3]
    np.testing.assert_array_equal(td["next", "observation"][3], np.float32(given["observations"][4]))


@pytest.mark.parametrize("name", ["observations", "actions", "next_observations", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_row(name, value):
    bad = with_successors()
    row = 11 if name == "next_observations" and np.isnan(value) else 5  # row 5 is terminal: nobody looks behind it
    bad[name][row] = value
    with pytest.raises(
        InputError, match=rf"x: {name if np.isnan(value) else '.*'} has a NaN or infinite value in row {row}"
    ):
        build(bad)


@pytest.mark.parametrize("value", [np.nan, np.array([7.0, np.nan, 9])])
def test_nan_behind_a_terminal_row_stands_for_nothing(value):
    given = with_successors()
    given["next_observations"][5] = value
    td = build(given)[:]
    np.testing.assert_array_equal(td["next", "observation"][5], np.float32(given["observations"][5]))
    assert td["next", "observation"].isfinite().all()
    given["next_observations"][3] = np.nan  # inside an episode
    with pytest.raises(
        InputError, match="next_observations has a NaN or infinite value in row 3, which is not terminal"
    ):
        build(given)


def in_big_endian(value):
    return value.astype(value.dtype.newbyteorder(">"))


FORMS = {
    "bfloat16": lambda value: torch.as_tensor(value).bfloat16(),
    "list of bfloat16": lambda value: list(torch.as_tensor(value).bfloat16()),
    "float16": lambda value: value.astype(np.float16),
    "longdouble": lambda value: value.astype(np.longdouble),
    "big-endian": in_big_endian,
    "big-endian float16": lambda value: in_big_endian(value.astype(np.float16)),
    "Fortran": np.asfortranarray,
    "backwards": lambda value: value[::-1].copy()[::-1],
    "every second": lambda value: np.repeat(value, 2, axis=0)[::2],
    "read-only": lambda value: np.lib.stride_tricks.as_strided(value, writeable=False),
    "with gradient": lambda value: torch.as_tensor(value).requires_grad_(),
    "sparse": lambda value: torch.as_tensor(value).to_sparse(),
}


@pytest.mark.parametrize("only", ["all", *with_successors()])
@pytest.mark.parametrize("form", FORMS)
def test_arrays_may_come_in_any_form(form, only):
    given = with_successors()
    changed = {name: FORMS[form](value) if only in ("all", name) else value for name, value in given.items()}
    exact = not {"bfloat16", "float16"} & set(form.split())
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(build(changed)[:].to_dict(), build(given)[:].to_dict(), **tolerance)


def test_flags_may_be_bool_and_vectors_integers():
    given = with_successors()
    for name in ("observations", "next_observations"):
        given[name] = np.round(given[name] * 10)
    whole = {name: value.astype(np.int16) if name.endswith("observations") else value for name, value in given.items()}
    whole |= {name: given[name] != 0 for name in ("terminals", "timeouts")}
    torch.testing.assert_close(build(whole)[:].to_dict(), build(given)[:].to_dict())


@pytest.mark.parametrize(
    "value", ["text", {"a": 1}, object(), [[1], [1, 2]], torch.zeros(12, 2, dtype=torch.complex64)]
)
@pytest.mark.parametrize("name", with_successors())
def test_what_is_no_array_of_numbers_is_one_line(name, value):
    with pytest.raises(InputError) as error:
        build({**with_successors(), name: value})
    assert "\n" not in str(error.value)
    assert name.removeprefix("next_") in str(error.value)  # dictionaries are compared with one another


def test_episodes_of_one_row_need_their_successors():
    given = {**arrays(terminal=()), "timeouts": np.ones(12)}
    with pytest.raises(InputError, match=r"12 episodes has a single row, .*give next_observations"):
        build(given)
    assert build({**given, "next_observations": given["observations"] + 1}).num_episodes == 12


def test_padded_arrays_are_refused_with_advice():
    given = {name: value.reshape(2, 6, *value.shape[1:]) for name, value in arrays().items()}
    with pytest.raises(InputError, match=r"padded \[episodes, steps, ...\] .*--padded"):
        build(given)


def test_rewards_that_are_missing_can_stand_for_success_at_the_end_or_for_nothing():
    given = arrays(terminal=())
    none = {**given, "terminals": None}
    td = build({**none, "rewards": "success-at-end"})[:]
    assert td["next", "reward"].flatten().nonzero().flatten().tolist() == [5, 11]
    assert td["next", "terminated"].flatten().nonzero().flatten().tolist() == [5, 11]
    td = build({**none, "rewards": "success-at-end"}, final_observation_rows=True)[:]
    assert td["next", "reward"].flatten().nonzero().flatten().tolist() == [4, 9]
    assert td["next", "terminated"].flatten().nonzero().flatten().tolist() == [4, 9]
    assert not build({**none, "rewards": "zero"})[:]["next", "reward"].any()
    with pytest.raises(InputError, match="there are an array, success-at-end and zero"):
        build({**none, "rewards": "one"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.full((12, 2), 2.0)}, r"11 of 11 actions leave \[-1, 1\] \(largest 2\), first in row 0"),
        ({"actions": np.zeros((12, 2), np.int64)}, "actions has type int64"),
        ({"actions": np.zeros(12)}, "actions has shape"),
        ({"actions": np.zeros((12, 0))}, "actions has shape"),
        ({"observations": np.zeros((12, 3, 2))}, "observations has shape"),
        ({"observations": np.zeros((12, 3, 2, 1))}, "images must be uint8"),
        ({"next_observations": np.zeros((12, 4))}, "differ in shape"),
        ({"rewards": np.zeros(5)}, "rewards has shape"),
        ({"rewards": np.zeros((12, 2))}, "one number for each of 12 rows"),
        ({"terminals": np.full(12, 2)}, "expected 0 or 1"),
        ({"timeouts": np.zeros(7)}, "timeouts has shape"),
        ({"timeouts": np.zeros(12)}, "the last row ends no episode"),
        ({"timeouts": np.eye(12)[5] + np.eye(12)[11]}, "row 5 is flagged both as terminal and as timeout"),
        ({"observations": np.array([["a"] * 3] * 12)}, "expected real numbers"),
        ({"observations": np.array([[None] * 3] * 12)}, "expected real numbers"),
        ({"rewards": np.array([None] * 12)}, "expected real numbers"),
        ({"episode_ends": 5}, "not whole episodes of 5"),
        ({"episode_ends": 4, "timeouts": np.eye(12)[6]}, "row 6 is a timeout, but its episode goes on"),
        ({"episode_ends": "discontinuity"}, "only where next_observations"),
        ({"episode_ends": "sometimes"}, "unknown"),
        ({"episode_ends": np.zeros(3)}, "numbers for 3 rows"),
    ],
)
def test_wrong_shapes_types_and_flags_are_refused(changes, message):
    with pytest.raises(InputError, match=message) as error:
        build({**arrays(), **changes})
    assert "\n" not in str(error.value)


def test_the_user_may_say_what_a_row_with_both_flags_is():
    given = arrays()
    given["timeouts"][5] = 1
    assert build(given, both="terminal")[5]["next", "terminated"].item()
    cut = build(given, both="timeout")
    assert not cut[:]["next", "terminated"].any()
    assert len(cut) == 10


@pytest.mark.parametrize("length", [0, 1])
def test_an_empty_set_and_a_single_transition_are_refused(length):
    given = {name: value[:length] for name, value in arrays(terminal=(0,)).items()}
    with pytest.raises(InputError, match=r"holds no transition|holds 1 transition"):
        build(given)


def test_a_jump_inside_an_episode_is_refused_when_the_successors_show_it():
    given = with_successors()
    given["next_observations"][8] += 0.5
    with pytest.raises(InputError, match="next_observations of row 8 is not the observation of row 9"):
        build(given)


def test_two_trajectories_joined_without_an_end_are_refused_unless_jumps_are_allowed():
    first, second = walk(400), walk(400, seed=7) + 5
    ends = np.zeros(800)
    ends[799] = 1
    given = {
        "observations": np.concatenate([first, second]), "actions": np.zeros((800, 1)), "rewards": np.zeros(800),
        "terminals": np.zeros(800), "timeouts": ends,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"jumps inside episode 0, after its step 399 \(row 399\)"):
        build(given)
    assert build(given, allow_jumps=True).report.jump.transition == 399
    given["timeouts"][399] = 1
    assert build(given).report.jump is None


def test_columns_may_be_hdf5_data_sets(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    given = with_successors()
    with h5py.File(tmp_path / "set.hdf5", "w") as file:
        for name, value in given.items():
            file[name] = value
    with h5py.File(tmp_path / "set.hdf5") as file:
        read = build({name: file[name] for name in given})
    torch.testing.assert_close(read[:].to_dict(), build(given)[:].to_dict())


def test_a_final_observation_row_ends_its_episode_with_the_transition_into_it():
    given = arrays()
    given["rewards"][[5, 11]] = np.nan  # nothing was earned there
    dataset = build(given, final_observation_rows=True)
    td = dataset[:]
    assert len(td) == 10
    assert td["next", "terminated"].flatten().nonzero().flatten().tolist() == [4]
    assert td["next", "truncated"].flatten().nonzero().flatten().tolist() == [9]
    np.testing.assert_array_equal(td["next", "observation"][4], np.float32(given["observations"][5]))


def test_tensors_and_lists_are_arrays_too():
    given = arrays()
    expected = build(given)[:].to_dict()
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in given.items()}
    torch.testing.assert_close(TransitionDataset.from_arrays(**tensors)[:].to_dict(), expected)
    torch.testing.assert_close(
        TransitionDataset.from_arrays(*(value.tolist() for value in given.values()))[:].to_dict(), expected
    )
    tensors["actions"] = tensors["actions"].bfloat16()
    assert len(TransitionDataset.from_arrays(**tensors)) == 11
    with pytest.raises(InputError, match="terminals are missing"):
        build({**given, "terminals": None})
    with pytest.raises(InputError, match="masked array"):
        build({**given, "rewards": np.ma.masked_array(given["rewards"])})


def test_flags_are_not_taken_for_numbers_of_episodes():
    ends = np.isin(np.arange(12), (5, 11))
    for told in (ends, ends.astype(int), np.eye(12)[5] + np.eye(12)[9]):
        with pytest.raises(InputError, match="look like flags of ends"):
            build({**arrays(), "timeouts": None}, episode_ends=told)


def test_jumps_are_accepted_up_to_a_ratio():
    joined = np.concatenate([walk(400), walk(400, seed=7) + 5])
    given = {
        "observations": joined, "actions": np.zeros((800, 1)), "rewards": np.zeros(800), "terminals": np.zeros(800),
        "timeouts": np.eye(800)[799],
    }  # fmt: skip
    ratio = build(given, allow_jumps=True).report.jump.ratio
    assert build(given, allow_jumps=ratio + 1).report.jump.ratio == ratio
    with pytest.raises(InputError, match="--allow-jumps"):
        build(given, allow_jumps=ratio - 1)


def test_a_last_successor_of_a_wider_type_keeps_its_digits():
    dataset = TransitionDataset.from_arrays(
        observations=np.array([[1], [2], [3]]),
        next_observations=np.array([[2.0], [3.0], [8.75]]),
        actions=np.zeros((3, 1)),
        rewards=np.zeros(3),
        terminals=[0, 0, 0],
        timeouts=[0, 0, 1],
        allow_jumps=True,
    )
    assert dataset[2]["next", "observation"].tolist() == [8.75]


def as_dictionary(given, *, single=np.float32):
    """The walk beside a picture that shows its row."""
    pictures = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1) + np.zeros((12, 4, 4, 3), np.uint8)
    following = np.roll(pictures, -1, axis=0)
    following[[5, 11]] = 99
    return {
        **given,
        "observations": {"camera": pictures, "place": given["observations"].astype(single)},
        "next_observations": {"camera": following, "place": given["next_observations"].astype(np.float32)},
    }


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("how", ["one ulp", "float16", "signed zero"])
def test_several_observations_follow_one_another_up_to_rounding(how, rows, monkeypatch):
    monkeypatch.setattr("deflow_torchrl.data.assembly.rows_a_chunk", lambda column: rows)
    given = with_successors()
    if how == "signed zero":
        given["observations"][:, 0] = 0.0
        given["next_observations"][:, 0] = -0.0
    given = as_dictionary(given, single=np.float16 if how == "float16" else np.float32)
    if how == "one ulp":
        places = given["next_observations"]["place"]
        given["next_observations"]["place"] = np.nextafter(places, np.float32(100))
    for ends in ({}, {"timeouts": None, "episode_ends": "discontinuity"}):
        dataset = build({**given, **ends}, allow_jumps=True)
        assert (len(dataset), dataset.num_episodes) == (12, 2)
        np.testing.assert_array_equal(dataset[:]["observation", "place"], np.float32(given["observations"]["place"]))
        assert dataset[:]["next", "observation", "camera"][[5, 11]].unique().tolist() == [99]


@pytest.mark.parametrize("entry", ["camera", "place"])
def test_a_jump_of_one_of_several_observations_ends_an_episode_or_is_refused(entry):
    given = as_dictionary(with_successors())
    given["next_observations"][entry] = given["next_observations"][entry].copy()
    given["next_observations"][entry][2] += 1
    with pytest.raises(InputError, match="jumps inside an episode: next_observations of row 2"):
        build(given)
    assert build({**given, "timeouts": None}, episode_ends="discontinuity").num_episodes == 3


def test_nan_behind_a_terminal_row_of_several_observations_stands_for_nothing():
    given = as_dictionary(with_successors())
    given["next_observations"]["place"][5, 1] = np.nan  # terminal
    row = build(given)[5]
    assert torch.equal(row["next", "observation", "place"], row["observation", "place"])
    assert row["next", "observation", "camera"].unique().tolist() == [99]
    given["next_observations"]["place"][7, 1] = np.nan
    with pytest.raises(InputError, match=r"next_observations 'place' has a NaN .* in row 7, which is not terminal"):
        build(given)
    given["observations"]["place"][3, 0] = np.inf
    with pytest.raises(InputError, match="observations 'place' has a NaN or infinite value in row 3; repair"):
        build(given)
