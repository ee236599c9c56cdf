import numpy as np
import pytest
import torch

from deflow_torchrl.data import transitions_from_arrays
from deflow_torchrl.data.schema import ACTION_LIMIT, validate_transitions
from deflow_torchrl.errors import InputError


def arrays(length=6, **changes):
    rng = np.random.default_rng(0)
    base = {
        "observations": rng.normal(size=(length, 3)),
        "actions": rng.uniform(-1, 1, size=(length, 2)),
        "next_observations": rng.normal(size=(length, 3)),
        "rewards": -np.ones(length),
        "masks": np.array([1, 1, 0, 1, 1, 1.0][:length]),
        "trajectory_ends": np.array([0, 0, 1, 0, 0, 1.0][:length]),
    }
    return {**base, **changes}


def test_transitions_are_ted_float32_with_every_value_in_its_place():
    given = arrays()
    td = transitions_from_arrays(**given, source="x")
    assert td.batch_size == (6,)
    for key, name in (
        ("observation", "observations"),
        ("action", "actions"),
        (("next", "observation"), "next_observations"),
    ):
        assert td[key].dtype == torch.float32
        np.testing.assert_allclose(td[key].numpy(), given[name], rtol=1e-6)
    assert td["next", "reward"].shape == (6, 1)


def test_a_cut_bootstrap_is_terminated_and_another_trajectory_end_is_truncated():
    td = transitions_from_arrays(**arrays(), source="x")
    assert td["next", "terminated"].flatten().tolist() == [False, False, True, False, False, False]
    assert td["next", "truncated"].flatten().tolist() == [False, False, False, False, False, True]
    assert td["next", "done"].flatten().tolist() == [False, False, True, False, False, True]


def test_actions_are_clipped_just_inside_their_bounds():
    actions = np.zeros((6, 2))
    actions[0] = (1.0, -1.0)
    td = transitions_from_arrays(**arrays(actions=actions), source="x")
    torch.testing.assert_close(td["action"][0], torch.tensor([ACTION_LIMIT, -ACTION_LIMIT]))


@pytest.mark.parametrize("name", ["observations", "actions", "next_observations", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_row(name, value):
    bad = arrays()
    bad[name][4] = value
    with pytest.raises(InputError, match=r"x: .*row 4"):
        transitions_from_arrays(**bad, source="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.full((6, 2), 2.0)}, r"6 actions leave \[-1, 1\]"),
        ({"actions": np.zeros((6, 2), np.int64)}, "actions have type int64"),
        ({"actions": np.zeros(6)}, "action has shape"),
        ({"observations": np.zeros((6, 3, 2))}, "observation has shape"),
        ({"next_observations": np.zeros((6, 4))}, "differ in shape"),
        ({"rewards": np.zeros(5)}, "rewards has 5 rows"),
        ({"rewards": np.zeros((6, 2))}, "one number a row"),
        ({"observations": np.array([["a"] * 3] * 6)}, "expected numbers"),
        ({"observations": np.array([[None] * 3] * 6)}, "expected numbers"),
    ],
)
def test_wrong_shapes_types_and_bounds_are_refused(changes, message):
    with pytest.raises(InputError, match=message) as error:
        transitions_from_arrays(**arrays(**changes), source="x")
    assert "\n" not in str(error.value)


def test_an_empty_set_is_refused():
    with pytest.raises(InputError, match="holds no transition"):
        transitions_from_arrays(**{name: value[:0] for name, value in arrays().items()}, source="x")


def test_a_missing_entry_is_named():
    td = transitions_from_arrays(**arrays(), source="x")
    with pytest.raises(InputError, match=r"next.reward is missing"):
        validate_transitions(td.exclude(("next", "reward")), source="x")
