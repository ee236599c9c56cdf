"""Chunks of actions as transitions: rewards, ends, validity and the exponent of gamma, against hand computations."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives.value import TD0Estimator

from deflow_torchrl.data import OfflineOnlineReplayBuffer, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.data.chunks import chunk_of
from deflow_torchrl.errors import InputError
from tests.support.episodes import build, episodes

GAMMA = 0.9
LENGTHS = (4, 1, 7)


def dataset(folder=None, *, terminated=()):
    """Transition i has action (i, -i) / 100 and reward 10^-i-like powers of two; the second episode terminates."""
    parts, row = [], 0
    for number, length in enumerate(LENGTHS):
        rows = np.arange(row, row + length)
        observations = np.arange(row + number, row + number + length + 1)[:, None] + np.array([[0.0, 0.5]])
        flags = np.isin(rows, terminated)
        flags[-1] |= number == 1
        parts.append((observations, np.stack([rows, -rows], 1) / 100, 2.0**rows, flags))
        row += length
    return build(parts, folder)


def reference(single, start, length):
    """The chunk from ``start`` on by Q-chunking's sampling, from the single transitions ``[N]``, step by step."""
    reward, mask, valid, ended = 0.0, 1.0, [], False
    ends = single["next", "done"].flatten() & torch.isin(torch.arange(12), torch.tensor([3, 4, 11]))
    for k in range(length):
        valid.append(0.0 if ended else 1.0)
        reward += GAMMA**k * float(single["next", "reward"][start + k])
        mask = min(mask, 1.0 - float(single["next", "terminated"][start + k]))
        ended = ended or bool(ends[start + k])
    last = start + length - 1
    return {
        "observation": single["observation"][start],
        "action": torch.cat([single["action"][start + k] for k in range(length)]),
        "reward": reward,
        "next": single["next", "observation"][last],
        "terminated": mask == 0.0,
        "truncated": bool(ends[last]) and mask == 1.0,
        "valid": valid,
    }


def check(found, single, starts, length, *, valid):
    assert found.batch_size == (len(starts),)
    for row, start in enumerate(starts):
        expected = reference(single, start, length)
        assert torch.equal(found["observation"][row], expected["observation"])
        assert torch.equal(found["action"][row], expected["action"])
        assert torch.equal(found["next", "observation"][row], expected["next"])
        assert found["next", "reward"][row].item() == pytest.approx(expected["reward"], rel=1e-6)
        for name in ("terminated", "truncated"):
            assert found["next", name][row].item() == expected[name]
        assert found["next", "done"][row].item() == (expected["terminated"] or expected["truncated"])
        if valid:
            assert found["valid"][row].tolist() == expected["valid"]
    assert found["steps_to_next_obs"].tolist() == [[length]] * len(starts)
    assert ("valid" in found) == valid


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("terminated", [(), (6,)])
@pytest.mark.parametrize(("length", "starts"), [
    (1, [*range(12)]), (2, [0, 1, 2, 5, 6, 7, 8, 9, 10]), (4, [0, 5, 6, 7, 8]), (5, [5, 6, 7]), (7, [5]),
])  # fmt: skip
def test_whole_chunks_start_where_all_their_steps_lie_inside_one_trajectory(
    length, starts, terminated, mapped, tmp_path
):
    single = dataset(tmp_path if mapped else None, terminated=terminated)
    chunks = single.chunked(length, gamma=GAMMA)
    assert len(chunks) == len(starts)
    check(chunks[:], single[:], starts, length, valid=False)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("terminated", [(), (6,)])
@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_valid_chunks_start_everywhere_and_say_which_steps_precede_the_end(length, terminated, mapped, tmp_path):
    single = dataset(tmp_path if mapped else None, terminated=terminated)
    found = single.chunked(length, gamma=GAMMA, ends="valid")[:]
    check(found, single[:], [*range(12 - length + 1)], length, valid=True)
    assert found["valid"].shape == (12 - length + 1, length)
    assert found["valid"].dtype == torch.float32


def test_sums_ends_and_validity_by_hand():
    found = dataset().chunked(3, gamma=0.5, ends="valid")[2]  # rows 2, 3 (end of an episode), 4 (terminates)
    assert found["action"].tolist() == pytest.approx([0.02, -0.02, 0.03, -0.03, 0.04, -0.04])
    assert found["next", "reward"].item() == 4 + 0.5 * 8 + 0.25 * 16
    assert found["valid"].tolist() == [1.0, 1.0, 0.0]
    assert found["next", "terminated"].item()
    whole = dataset().chunked(3, gamma=0.5)[1]  # rows 1, 2, 3
    assert whole["next", "reward"].item() == 2 + 0.5 * 4 + 0.25 * 8
    assert (whole["next", "truncated"].item(), whole["next", "terminated"].item()) == (True, False)


def test_chunks_of_one_step_are_the_set_itself():
    single = dataset()
    expected = single[:].set("steps_to_next_obs", torch.ones(12, 1, dtype=torch.int64))
    torch.testing.assert_close(single.chunked(1)[:].to_dict(), expected.to_dict())
    valid = single.chunked(1, ends="valid")[:]
    assert valid.pop("valid").tolist() == [[1.0]] * 12
    torch.testing.assert_close(valid.to_dict(), expected.to_dict())


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_bootstrap_of_torchrls_estimator_is_multiplied_by_gamma_to_the_power_of_the_steps(length):
    class Value(torch.nn.Module):
        in_keys, out_keys = ["observation"], ["state_value"]

    batch = dataset().chunked(length, gamma=GAMMA)[:]
    value = 1e3 * torch.rand(len(batch), 1)
    estimator = TD0Estimator(gamma=GAMMA, value_network=Value())
    target = estimator.value_estimate(batch, next_value=value)
    power = 1.0
    for _ in range(length):
        power *= GAMMA
    expected = batch["next", "reward"] + power * (~batch["next", "terminated"]) * value
    torch.testing.assert_close(target, expected, rtol=2e-7, atol=0)  # the estimator takes the power in float32
    without = estimator.value_estimate(batch.exclude("steps_to_next_obs"), next_value=value)
    assert torch.allclose(without, target) == (length == 1), "the entry is what the estimator reads"


def test_images_are_not_copied_for_each_step():
    single = build(episodes(images=True))
    chunks = single.chunked(3)
    assert chunks.base is single
    found = chunks[:]
    assert found["observation"].shape[1:] == (3, 3, 1)
    assert torch.equal(found["next", "observation"][0], single[:]["next", "observation"][2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 8}, r"a chunk of 8 steps is longer than every trajectory of test \(the longest has 7\)"),
        ({"length": 8, "ends": "valid"}, "longer than every trajectory"),
        ({"length": 0}, "a chunk of 0 steps is none"),
        ({"length": 1.5}, "a chunk of 1.5 steps"),
        ({"length": 2, "ends": "some"}, "ends='some' is unknown; there are whole and valid"),
        ({"length": 2, "gamma": 1.5}, "gamma=1.5"),
    ],
)
def test_chunks_that_cannot_be_are_refused_in_one_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        dataset().chunked(**arguments)
    assert "\n" not in str(error.value)


def test_buffers_and_draws_of_chunks():
    chunks = dataset().chunked(3, gamma=GAMMA)
    torch.manual_seed(0)
    rows = torch.randint(len(chunks), (2, 50))
    torch.manual_seed(0)
    drawn = chunks.draw(2, 50)
    torch.testing.assert_close(drawn.to_dict(), chunks[rows].to_dict())
    batch = TransitionReplayBuffer(chunks, batch_size=64).sample()
    index = batch.pop("index")
    torch.testing.assert_close(batch.to_dict(), chunks[index].to_dict())
    assert chunks.to("cpu").base is chunks.base


def test_the_chunk_that_follows_begins_where_the_last_one_ended():
    batch = TransitionReplayBuffer(dataset().chunked(3), batch_size=4, next_action=True)[:]
    first = (batch["action"][:, 0] * 100).round().int().tolist()
    following = (batch["next", "action"][:, 0] * 100).round().int().tolist()
    assert first == [0, 1, 5, 6, 7, 8, 9]
    assert following == [0, 1, 8, 9, 7, 8, 9]  # a chunk without a whole one after it keeps its own


def test_steps_joined_one_by_one_are_the_chunks_of_the_set():
    single = dataset(terminated=(6,))
    chunks = single.chunked(3, gamma=GAMMA)
    for row, start in enumerate([0, 1, 5, 6, 7, 8, 9]):
        joined = chunk_of([single[k : k + 1] for k in range(start, start + 3)], gamma=GAMMA)
        expected = chunks[row : row + 1].exclude("steps_to_next_obs")
        torch.testing.assert_close(joined.to_dict(), expected.to_dict())


def test_experience_joins_the_chunks_of_a_data_set():
    chunks = dataset().chunked(3, gamma=GAMMA)
    buffer = OfflineOnlineReplayBuffer(chunks, online_capacity=20, batch_size=32)
    new = chunks[:4].exclude("steps_to_next_obs")
    new["observation"] = new["observation"] + 100
    assert buffer.extend(new).tolist() == [7, 8, 9, 10]
    everything = buffer[:]
    assert everything["steps_to_next_obs"].tolist() == [[3]] * 11
    torch.testing.assert_close(everything[:7].to_dict(), chunks[:].to_dict())
    torch.testing.assert_close(everything[7:].exclude("steps_to_next_obs").to_dict(), new.to_dict())
    assert isinstance(buffer.sample(), TensorDict)
    with pytest.raises(InputError, match="cannot be joined with experience; take ends='whole'"):
        OfflineOnlineReplayBuffer(dataset().chunked(3, ends="valid"), online_capacity=20)


def test_the_lengths_of_trajectories_decide_where_chunks_start_not_the_flags():
    """OGBench's masks end the bootstrap where a trajectory goes on."""
    terminals = np.zeros(6)
    terminals[1] = 1
    single = TransitionDataset.from_arrays(
        observations=np.arange(12.0).reshape(6, 2), actions=np.zeros((6, 1)), rewards=np.ones(6), terminals=terminals,
        next_observations=np.arange(2, 14.0).reshape(6, 2), episode_ends=6,
    )  # fmt: skip
    found = single.chunked(3)[:]
    assert found["next", "terminated"].flatten().tolist() == [True, True, False, False]
    assert single.chunked(3, ends="valid")[:]["valid"].min() == 1
