"""The action that follows a transition in its trajectory, from every kind of buffer."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from deflow_torchrl.data import OfflineOnlineReplayBuffer, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.errors import InputError

LENGTHS = (3, 1, 4)
FOLLOWING = [1, 2, 2, 3, 5, 6, 7, 7]  # the row itself at the end of an episode


def numbered(folder=None):
    """Transition i has action i / 100."""
    frames = [row + episode * 0.5 for episode, row in ((0, 0), (0, 1), (0, 2), (1, 3), (2, 4), (2, 5), (2, 6), (2, 7))]
    ends = np.cumsum(LENGTHS) - 1
    return TransitionDataset.from_arrays(
        observations=np.array(frames)[:, None],
        next_observations=np.array(frames)[:, None] + 1,
        actions=np.arange(8.0)[:, None] / 100,
        rewards=np.zeros(8),
        terminals=np.zeros(8),
        timeouts=np.isin(np.arange(8), ends).astype(float),
        folder=folder,
    )


@pytest.fixture(params=["memory", "memmap"])
def dataset(request, tmp_path):
    if request.param == "memory":
        return numbered()
    return TransitionDataset.load(numbered().save(tmp_path / "set"))


def check(batch, following=FOLLOWING):
    own = (batch["action"] * 100).round().long().flatten()
    given = (batch["next", "action"] * 100).round().long().flatten()
    assert given.tolist() == torch.tensor(following)[own].tolist()


def test_an_offline_transition_is_followed_by_the_next_row_of_its_episode(dataset):
    buffer = TransitionReplayBuffer(dataset, batch_size=64, next_action=True)
    check(buffer[:])
    check(buffer.sample())
    assert buffer[3]["next", "action"].shape == (1,)
    check(dataset.draw(64, next_action=True))
    stacked = dataset.draw(2, 64, next_action=True)
    assert stacked["next", "action"].shape == (2, 64, 1)
    check(stacked.reshape(-1))
    for plain in (TransitionReplayBuffer(dataset, batch_size=4).sample(), dataset.draw(4), dataset[:]):
        assert ("next", "action") not in plain.keys(True), "only where it is asked for"


def online(numbers, dones=()):
    """Transitions of a trajectory that goes on from number to number."""
    count = len(numbers)
    state = torch.tensor([[100.0 + number] for number in numbers])
    done = torch.tensor([[number in dones] for number in numbers])
    return TensorDict(
        observation=state,
        action=torch.tensor([[number / 100] for number in numbers]),
        next=TensorDict(
            observation=state + 1, reward=torch.zeros(count, 1), terminated=torch.zeros_like(done), truncated=done,
            done=done, batch_size=[count],
        ),
        batch_size=[count],
    )  # fmt: skip


def next_of(buffer):
    held = buffer[:]
    pairs = (held["action"] * 100).round().long().flatten(), (held["next", "action"] * 100).round().long().flatten()
    return dict(zip(*(values.tolist() for values in pairs), strict=True))


@pytest.mark.parametrize("kind", ["frames", "rows"])
@pytest.mark.parametrize("host_waits", [True, False])
def test_online_transitions_are_followed_by_the_one_added_next_if_it_is_of_their_trajectory(dataset, kind, host_waits):
    offline = dataset if kind == "frames" else dataset[:]
    buffer = OfflineOnlineReplayBuffer(offline, online_capacity=6, batch_size=256, next_action=True)
    buffer._storage._host_waits = host_waits  # the accelerator's branch of reading
    before = dict(enumerate(FOLLOWING))
    assert next_of(buffer) == before
    buffer.extend(online([20, 21, 22], dones=[22]))
    buffer.extend(online([30]))
    # 22 ends its trajectory; 30 is the newest: what follows it is not known yet.
    assert next_of(buffer) == {**before, 20: 21, 21: 22, 22: 22, 30: 30}
    buffer.extend(online([31]))
    assert next_of(buffer) == {**before, 20: 21, 21: 22, 22: 22, 30: 31, 31: 31}
    buffer.extend(online([32, 33]))  # 20 is overwritten
    assert next_of(buffer) == {**before, 21: 22, 22: 22, 30: 31, 31: 32, 32: 33, 33: 33}
    batch = buffer.sample()
    expected = next_of(buffer)
    own, given = ((batch[key] * 100).round().long().flatten().tolist() for key in ("action", ("next", "action")))
    assert given == [expected[number] for number in own]
    assert len(set(own)) == len(expected)


def test_where_offline_rows_are_overwritten_the_others_are_still_followed_by_the_datas(dataset):
    buffer = OfflineOnlineReplayBuffer(dataset, online_capacity=2, overwrite="fifo", batch_size=8, next_action=True)
    buffer.extend(online([20, 21, 22]))  # takes rows 8, 9 and 0
    assert next_of(buffer) == {22: 22, **dict(enumerate(FOLLOWING[1:], 1)), 20: 21, 21: 22}


def test_trajectories_added_in_turn_are_followed_over_their_number_unless_one_was_torn(dataset):
    buffer = OfflineOnlineReplayBuffer(dataset, online_capacity=9, batch_size=8, next_action=True, online_stride=2)
    for numbers in ([20, 50], [21, 51], [22]):  # 52's episode was dropped: what follows stands elsewhere
        buffer.extend(online(numbers))
    buffer.extend(online([23]))
    found = next_of(buffer)
    assert {number: found[number] for number in (20, 50, 21, 51, 22, 23)} == {
        20: 21, 50: 51, 21: 22, 51: 51, 22: 22, 23: 23,
    }  # fmt: skip
    with pytest.raises(InputError, match="online_stride=0"):
        OfflineOnlineReplayBuffer(dataset, online_capacity=9, online_stride=0)


def test_an_offline_row_is_not_followed_by_another_trajectory_whose_end_is_not_marked():
    offline = torch.cat([online([20, 21]), online([30, 31])])
    buffer = OfflineOnlineReplayBuffer(offline, online_capacity=4, batch_size=8, next_action=True)
    assert next_of(buffer) == {20: 21, 21: 21, 30: 31, 31: 31}


def test_an_ended_trajectory_is_not_followed_by_one_that_starts_where_it_ended(dataset):
    buffer = OfflineOnlineReplayBuffer(dataset, online_capacity=4, batch_size=8, next_action=True)
    buffer.extend(online([20, 21, 22], dones=[21]))
    found = next_of(buffer)
    assert [found[number] for number in (20, 21, 22)] == [21, 21, 22]


def test_a_restored_buffer_delivers_the_same(dataset):
    one, other = (OfflineOnlineReplayBuffer(dataset, online_capacity=4, batch_size=8, next_action=True) for _ in "ab")
    one.extend(online([20, 21, 22]))
    one.extend(online([23, 24]))
    other.load_state_dict(one.state_dict())
    assert next_of(other) == next_of(one)
