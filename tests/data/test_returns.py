"""Returns to go of data sets and of experience."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from deflow_torchrl.data import OfflineOnlineReplayBuffer, TransitionDataset
from deflow_torchrl.data.returns import UNKNOWN_RETURN, ReturnsToGo, with_returns
from deflow_torchrl.errors import InputError

GAMMA = 0.5


def make_dataset(rewards=(1, 2, 3, -1, -1, 4), terminals=(0, 0, 1, 0, 0, 0), timeouts=(0, 0, 0, 0, 1, 1)):
    rng, number = np.random.default_rng(0), len(rewards)
    ends = np.asarray(terminals, bool) | np.asarray(timeouts, bool)
    observations = rng.standard_normal((number + 1, 2)).astype(np.float32)
    following = observations[1:].copy()
    following[ends] = rng.standard_normal((ends.sum(), 2))
    return TransitionDataset.from_arrays(
        observations=observations[:-1],
        next_observations=following,
        actions=np.zeros((number, 1), np.float32),
        rewards=np.asarray(rewards, np.float32),
        terminals=np.asarray(terminals),
        timeouts=np.asarray(timeouts),
        allow_jumps=True,
    )


def test_a_return_stops_at_a_terminal_row_and_goes_on_with_the_last_reward_behind_a_cut():
    returns = ReturnsToGo(make_dataset(), gamma=GAMMA)[:]["mc_return"].flatten().tolist()
    assert returns == [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3, -2, -2, 8]


def test_the_authors_rule_cuts_but_a_trajectory_of_the_smallest_reward_alone_has_failed():
    returns = ReturnsToGo(make_dataset(), gamma=GAMMA, tail="cut")[:]["mc_return"].flatten().tolist()
    assert returns == [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3, -2, -2, 4]


@pytest.mark.parametrize("tail", ["last_reward", "cut"])
def test_one_trajectory_by_itself_has_the_returns_of_the_set(tail):
    rng = np.random.default_rng(2)
    ends = np.cumsum(rng.integers(1, 9, 12)) - 1
    number = ends[-1] + 1
    rewards = rng.integers(-1, 1, number).astype(np.float32)
    last = np.zeros(number, bool)
    last[ends] = True
    terminal = last & (rng.random(number) < 0.5)
    dataset = make_dataset(rewards, terminal, last & ~terminal)
    whole = ReturnsToGo(dataset, gamma=0.9, tail=tail)
    begin = 0
    for end in ends:
        rows = torch.arange(begin, end + 1)
        own = whole.of_trajectory(dataset.reward[rows], dataset.terminated[rows].bool())
        torch.testing.assert_close(whole.returns[rows], own)
        begin = end + 1


def test_chunks_and_other_tails_are_refused():
    with pytest.raises(InputError, match="chunk=1"):
        with_returns(make_dataset().chunked(2, gamma=GAMMA), gamma=GAMMA, tail="cut")
    with pytest.raises(InputError, match="last_reward, cut"):
        ReturnsToGo(make_dataset(), gamma=GAMMA, tail="nonsense")


@pytest.mark.parametrize("tail", ["last_reward", "cut"])
def test_a_trajectory_of_one_observation_has_no_return(tail):
    rows = np.arange(6.0)[:, None]
    ends = {"terminals": np.zeros(6), "timeouts": np.array([0, 0, 1, 1, 0, 1])}  # row 3 is followed by nothing
    dataset = TransitionDataset.from_arrays(rows, np.zeros((6, 1)), rows[:, 0], **ends)
    assert (dataset.num_episodes, dataset.start_rows.tolist()) == (3, [0, 2])
    returns = ReturnsToGo(dataset, gamma=GAMMA, tail=tail).returns.tolist()
    assert returns == ([1, 2, 8] if tail == "last_reward" else [0.5, 1, 4])


def online(reward, *, state=0.0, following=0.0, terminated=False, truncated=False):
    """By default a trajectory stays at its state."""
    flags = {"terminated": terminated, "truncated": truncated, "done": terminated or truncated}
    flags = {name: torch.tensor([[value]]) for name, value in flags.items()}
    reward = torch.tensor([[float(reward)]])
    return TensorDict(
        observation=torch.full((1, 2), state), action=torch.zeros(1, 1),
        next=TensorDict(observation=torch.full((1, 2), following), reward=reward, **flags, batch_size=[1]),
        batch_size=[1],
    )  # fmt: skip


def make_buffer(**options):
    return OfflineOnlineReplayBuffer(
        ReturnsToGo(make_dataset(), gamma=GAMMA), online_capacity=6, batch_size=64, **options
    )


def known(buffer):
    return buffer[:]["mc_return"].flatten()[buffer.num_offline :].tolist()


def test_experience_gets_its_return_when_its_trajectory_ends():
    buffer = make_buffer()
    buffer.extend(online(1))
    buffer.extend(online(2))
    assert known(buffer) == [UNKNOWN_RETURN] * 2
    buffer.extend(online(4, terminated=True))
    assert known(buffer) == [3, 4, 4]
    buffer.extend(online(-1))
    buffer.extend(online(-1, truncated=True))
    assert known(buffer) == [3, 4, 4, -2, -2]
    assert set(buffer.sample()["mc_return"].flatten().tolist()) <= {3, 4, -2, 2.75, 3.5, 8}


def test_trajectories_that_are_added_in_turn_are_told_apart():
    buffer = make_buffer(online_stride=2)
    for reward, other in ((1, 8), (2, 16)):
        buffer.extend(torch.cat([online(reward), online(other)]))
    buffer.extend(torch.cat([online(4, terminated=True), online(32)]))
    assert known(buffer) == [3, UNKNOWN_RETURN, 4, UNKNOWN_RETURN, 4, UNKNOWN_RETURN]


def test_a_trajectory_that_was_torn_is_not_joined_with_another():
    """One of two workers leaves out a transition (its simulator failed): the other's rows change their places."""
    buffer = make_buffer(online_stride=2)
    for reward, state in ((1, 0.0), (8, 50.0), (2, 1.0), (4, 2.0)):  # the last would be 51.0's place
        last = reward == 4
        buffer.extend(online(reward, state=state, following=state + 1, terminated=last))
    assert known(buffer) == [UNKNOWN_RETURN, UNKNOWN_RETURN, UNKNOWN_RETURN, 4]


def test_a_discarded_trajectory_is_no_part_of_the_next_one_in_a_resumed_buffer_too():
    buffer, other = (
        OfflineOnlineReplayBuffer(ReturnsToGo(make_dataset(), gamma=GAMMA, tail="cut"), online_capacity=6) for _ in "ab"
    )
    buffer.discard(buffer.extend(online(0)))
    for last in (False, True):
        buffer.extend(online(-1, truncated=last))
    other.load_state_dict(buffer.state_dict())
    for one in (buffer, other):
        assert known(one) == [UNKNOWN_RETURN, -2, -2], "every reward is the smallest: it has failed"


def test_a_full_zone_and_a_resumed_buffer_keep_the_returns():
    buffer = make_buffer()
    for number in range(8):  # the first two are overwritten
        buffer.extend(online(number, terminated=number in (3, 7)))
    expected = known(buffer)
    assert expected[:2] == [6 + 0.5 * 7, 7]
    assert UNKNOWN_RETURN not in expected
    other = make_buffer()
    other.load_state_dict(buffer.state_dict())
    assert known(other) == expected
