import contextlib
import math
import os
import re
import sys
import warnings
from importlib.metadata import version

import numpy as np
import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    PrioritizedSampler,
    RandomSampler,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.samplers import prioritized
from torchrl.envs.transforms import MultiStepTransform, RewardScaling

from deflow_torchrl.data import TRANSITION_KEYS, OfflineOnlineReplayBuffer, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.errors import InputError
from deflow_torchrl.versions import extension_fault
from tests.support.episodes import build, episodes

DATASET = build(episodes())  # 12 transitions, s [2], a [2]
OFFLINE = len(DATASET)


def online(*shape, start=0, **extra):
    """Transitions that differ from the offline ones and from each other; s is their running number + 1000."""
    count = math.prod(shape)
    numbers = torch.arange(start, start + count, dtype=torch.float32).reshape(*shape, 1) + 1000
    truncated = (numbers % 3 == 0).reshape(*shape, 1)
    terminated = (numbers % 5 == 0).reshape(*shape, 1) & ~truncated
    return TensorDict(
        observation=numbers.expand(*shape, 2).clone(),
        action=(numbers.expand(*shape, 2) % 7) / 10,
        next=TensorDict(
            observation=numbers.expand(*shape, 2) + 1,
            reward=-numbers,
            terminated=terminated,
            truncated=truncated,
            done=terminated | truncated,
            batch_size=shape,
        ),
        batch_size=shape,
        **extra,
    )


def make(offline=DATASET, *, online_capacity=5, batch_size=4, **kwargs) -> OfflineOnlineReplayBuffer:
    return OfflineOnlineReplayBuffer(offline, online_capacity=online_capacity, batch_size=batch_size, **kwargs)


def like_an_accelerator(buffer):
    """Take the path that never asks the device anything; it computes the same on a CPU."""
    buffer._storage._host_waits = False
    return buffer


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in TRANSITION_KEYS)


# --- what is where


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("lengths", [(4, 1, 7), (4, 4, 4), (4, 4, 2)])
def test_rows_are_the_offline_set_then_the_online_transitions(lengths, accelerator, mapped, tmp_path):
    dataset = build(episodes(lengths), tmp_path / "offline" if mapped and not (tmp_path / "offline").mkdir() else None)
    buffer = make(dataset, online_dir=tmp_path / "online" if mapped else None)
    if accelerator:
        like_an_accelerator(buffer)
    assert same(buffer[:], dataset[:])
    index = buffer.extend(online(3))
    assert index.tolist() == [len(dataset) + i for i in range(3)]
    assert same(buffer[:], torch.cat([dataset[:], online(3)]))
    mixed = torch.tensor([[1, len(dataset) + 2], [len(dataset), 0]])
    assert same(buffer[mixed], torch.cat([dataset[:], online(3)])[mixed])
    assert buffer[-1]["observation"].tolist() == [1002, 1002]
    assert buffer.is_online(mixed).tolist() == [[False, True], [True, False]]
    assert (buffer.num_offline, buffer.num_online, len(buffer)) == (len(dataset), 3, len(dataset) + 3)
    assert buffer.capacity == len(dataset) + 5
    for outside in (len(buffer), -len(buffer) - 1):
        with pytest.raises(IndexError, match="out of range"):
            buffer[torch.tensor([outside])]


@pytest.mark.parametrize("starts", [[0, 4, 4], [0, 0, 4], [0, 4, 8, 8, 12, 12]])
def test_episodes_without_a_transition_are_passed_over(starts):
    rows = 12
    dataset = TransitionDataset(
        observation=torch.randn(rows + len(starts), 2), action=torch.zeros(rows, 2), reward=torch.zeros(rows),
        terminated=torch.zeros(rows, dtype=torch.bool), episode_starts=torch.tensor(starts),
    )  # fmt: skip
    assert same(make(dataset)[:], dataset[:])


def test_the_batch_is_ted_with_the_rows_it_came_from():
    buffer = make(batch_size=64)
    buffer.extend(online(5))
    batch = buffer.sample()
    assert set(batch.keys(True, True)) == {*TRANSITION_KEYS, "index"}
    assert batch.batch_size == (64,)
    assert batch["index"].dtype == torch.int64
    assert same(batch, buffer[:][batch["index"]])
    assert batch["next"].batch_size == (64,)
    for key in ("terminated", "truncated", "done", "reward"):
        assert batch["next", key].shape == (64, 1)


def test_a_dataset_is_not_copied():
    assert make().dataset is DATASET
    assert make(TransitionReplayBuffer(DATASET)).dataset is DATASET
    before = DATASET[:].clone()
    buffer = make(overwrite="fifo", online_capacity=1)
    buffer.extend(online(9))
    assert same(DATASET[:], before)


def test_writing_into_a_batch_leaves_the_buffer_alone():
    buffer = make(batch_size=32)
    buffer.extend(online(5))
    before = buffer[:].clone()
    batch = buffer.sample()
    for key in TRANSITION_KEYS:
        batch[key].zero_()
    buffer[3]["observation"].zero_()
    assert same(buffer[:], before)


def sources(kind, tmp_path):
    """The same offline transitions as something else than a TransitionDataset, with keys online data do not have."""
    transitions = DATASET[:]
    transitions["index"] = torch.arange(OFFLINE)
    transitions["episode"] = torch.zeros(OFFLINE, dtype=torch.int64)
    if kind == "TensorDict":
        return transitions
    if kind == "[B, T]":
        return transitions.reshape(3, 4)
    storage = LazyTensorStorage(100) if kind == "replay buffer" else LazyMemmapStorage(100, scratch_dir=str(tmp_path))
    buffer = TensorDictReplayBuffer(storage=storage)
    buffer.extend(transitions)
    return buffer


@pytest.mark.parametrize("kind", ["TensorDict", "[B, T]", "replay buffer", "memory-mapped buffer"])
def test_other_offline_data_are_taken_by_the_keys_of_a_transition(kind, tmp_path):
    source = sources(kind, tmp_path)
    buffer = make(source)
    buffer.extend(online(3))
    assert same(buffer[:], torch.cat([DATASET[:], online(3)]))
    assert buffer.dataset is None
    if kind == "TensorDict":
        source["observation"].zero_()
        assert same(buffer[:OFFLINE], DATASET[:])
    assert buffer.sample()["index"].shape == (4,)


def test_transforms_of_an_offline_buffer_are_applied():
    source = TransitionReplayBuffer(DATASET, transform=RewardScaling(loc=0.0, scale=2.0, in_keys=[("next", "reward")]))
    buffer = make(source)
    assert torch.equal(buffer[:]["next", "reward"], DATASET[:]["next", "reward"] * 2)


def test_images_keep_their_type():
    dataset = build(episodes(images=True))
    buffer = make(dataset, batch_size=32)
    new = dataset[:3].clone()
    new["observation"] = 255 - new["observation"]
    buffer.extend(new)
    assert same(buffer[:], torch.cat([dataset[:], new]))
    assert buffer.sample()["next", "observation"].dtype == torch.uint8


# --- the schema


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 2)])
def test_a_collectors_batch_is_flattened_and_only_the_schema_is_kept(shape):
    buffer = make()
    batch = online(*shape)
    batch["collector"] = TensorDict(traj_ids=torch.zeros(shape, dtype=torch.int64), batch_size=shape)
    batch["base_action"] = torch.zeros(*shape, 2)
    keys = set(batch.keys(True, True))
    assert buffer.extend(batch).tolist() == [12, 13, 14, 15]
    assert same(buffer[12:], online(4))
    assert set(batch.keys(True, True)) == keys  # left as it was
    assert set(buffer[:].keys(True, True)) == set(TRANSITION_KEYS)
    stacked = make()
    stacked.extend(LazyStackedTensorDict(*online(4).unbind(0)))
    assert same(stacked[12:], online(4))


def test_one_transition_is_added_like_a_batch_of_one():
    buffer = make()
    assert buffer.add(online(1)[0]) == 12
    assert same(buffer[12:], online(1))
    assert buffer.extend(online(2)[:0]).shape == (0,)
    assert len(buffer) == 13


def spoiled(how):
    batch = online(3)
    if how == "missing":
        del batch["next", "truncated"], batch["next", "done"]
    elif how == "contradiction":
        batch["next", "done"][2] = False
    elif how == "float64":
        batch["next", "reward"] = batch["next", "reward"].double()
    elif how == "shape":
        batch["action"] = torch.zeros(3, 4)
    elif how == "flat reward":
        batch["next", "reward"] = batch["next", "reward"][:, 0]
    elif how == "nan":
        batch["next", "observation"][1, 0] = float("nan")
    elif how == "infinite":
        batch["action"][2, 1] = float("inf")
    elif how == "integer flag":
        batch["next", "done"] = batch["next", "done"].long()
    return batch


WRONG = {
    "missing": "new transitions: next.truncated is missing; found action, next.observation, ",
    "contradiction": "next.done of transition 2 is not terminated or truncated; mend the flags",
    "float64": r"next.reward is float64 \[1\] a transition, float32 \[1\] is needed",
    "shape": r"action is float32 \[4\] a transition, float32 \[2\] is needed",
    "flat reward": r"next.reward is float32 \[\] a transition, float32 \[1\] is needed",
    "nan": "next.observation of transition 1 is not finite",
    "infinite": "action of transition 2 is not finite",
    "integer flag": r"next.done is int64 \[1\] a transition, bool \[1\] is needed",
}


@pytest.mark.parametrize("how", WRONG)
def test_online_transitions_that_do_not_fit_are_refused_and_nothing_is_added(how):
    buffer = make()
    buffer.extend(online(1))
    with pytest.raises(InputError, match=WRONG[how]) as error:
        buffer.extend(spoiled(how))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError):
        buffer.add(spoiled(how)[2] if how != "nan" else spoiled(how)[1])
    assert len(buffer) == 13
    assert same(buffer[12:], online(1))


def test_nan_behind_a_terminal_row_stands_for_nothing():
    batch = online(3)
    batch["next", "observation"][1, 0] = float("nan")
    batch["next", "terminated"][1] = batch["next", "done"][1] = True
    buffer = make()
    rows = buffer.extend(batch)
    assert torch.equal(buffer[rows[1]]["next", "observation"], batch["observation"][1])
    assert torch.equal(buffer[rows[0]]["next", "observation"], batch["next", "observation"][0])
    assert batch["next", "observation"].isnan().any(), "the caller's batch stays as it is"


@pytest.mark.parametrize("how", WRONG)
def test_offline_transitions_that_do_not_fit_are_refused(how):
    if how == "shape":
        offline = online(3)
        offline["action"] = torch.zeros(3, 1, 2)
        wrong = r"action \[N, A\] are needed"
    else:
        offline, wrong = spoiled(how), WRONG[how].removeprefix("new transitions: ")
    with pytest.raises(InputError, match=wrong):
        make(offline)


@pytest.mark.parametrize("missing", [("truncated",), ("terminated",), ("done",), ("terminated", "truncated")])
def test_flags_that_an_environment_leaves_out_follow_from_the_others(missing):
    full, batch = online(5), online(5)  # rows 0 and 5 terminate, row 2 is cut
    for name in missing:
        del batch["next", name]
    if len(missing) == 2:  # nobody knows that it was cut: an end of the task
        full["next", "terminated"], full["next", "truncated"] = full["next", "done"], torch.zeros(5, 1) > 0
    buffer = make()
    assert same(buffer[buffer.extend(batch)], full)
    assert same(make(batch)[:], full)


def stepped(key, values):
    batch = online(3)
    batch[key] = torch.tensor(values).reshape(3, 1)
    return batch


@pytest.mark.parametrize("key", ["steps_to_next_obs", ("next", "steps_to_next_obs")])
def test_transitions_of_another_number_of_steps_are_refused(key):
    wrong = "transition 1 spans 3 steps .steps_to_next_obs., {} is needed: leave MultiStepTransform out"
    buffer = make()
    buffer.extend(stepped(key, [1, 1, 1]))
    for store in (buffer.extend, make):
        with pytest.raises(InputError, match=wrong.format(1)):
            store(stepped(key, [1, 3, 3]))
    buffer = make(DATASET.chunked(2))
    chunks = DATASET.chunked(2)[:3]
    buffer.extend(chunks)
    chunks["steps_to_next_obs"][1] = 3
    with pytest.raises(InputError, match=wrong.format(2)):
        buffer.extend(chunks)


def test_n_step_transitions_of_torchrls_transform_are_refused():
    buffer = make(transform=MultiStepTransform(n_steps=3, gamma=0.9))
    with pytest.raises(InputError, match="leave MultiStepTransform out"):
        buffer.extend(online(5))


def test_a_stored_action_forgets_how_it_was_computed():
    batch, weight = online(3), torch.ones(1, requires_grad=True)
    batch["action"] = batch["action"] * weight
    for buffer in (make(), make(batch)):
        buffer.extend(batch)
        buffer.extend(batch)
        assert not buffer.sample()["action"].requires_grad


def test_the_padding_of_split_trajectories_is_not_stored():
    batch = online(2, 3)
    batch["collector"] = TensorDict(mask=torch.tensor([[True, True, True], [True, False, False]]), batch_size=[2, 3])
    buffer = make()
    assert buffer.extend(batch).tolist() == [12, 13, 14, 15]
    assert same(buffer[12:], online(4))
    assert same(make(batch)[:], online(4))
    batch["collector", "mask"] = torch.zeros(2, 3, dtype=torch.bool)
    assert buffer.extend(batch).shape == (0,)


def test_several_processes_cannot_write():
    with pytest.raises(InputError, match="each process would write into a copy of its own; leave the collector's rep"):
        make().share()


def test_a_collector_in_this_process_writes_by_itself():
    pytest.importorskip("gymnasium")
    from torchrl.collectors import Collector, MultiSyncCollector
    from torchrl.envs.utils import RandomPolicy

    from deflow_torchrl.envs import make_env

    env = make_env("gym:Pendulum-v1")
    buffer = make(env.rollout(5), online_capacity=20)
    policy = RandomPolicy(env.action_spec)
    for batch in Collector(env, policy, frames_per_batch=5, total_frames=10, replay_buffer=buffer):
        assert batch is None
    assert buffer.num_online == 10
    with pytest.raises(InputError, match="is not shared"):
        MultiSyncCollector([lambda: env], policy, frames_per_batch=5, total_frames=10, replay_buffer=buffer)


def test_what_is_no_batch_of_transitions_is_refused():
    with pytest.raises(InputError, match="a TensorDict is needed, not a list"):
        make().extend([online(1)])
    with pytest.raises(InputError, match="6 at once, the online zone holds 5; add fewer"):
        make().extend(online(6))
    with pytest.raises(InputError, match="not a list"):
        make([1])
    with pytest.raises(InputError, match="there is no transition"):
        make(online(3)[:0])


@pytest.mark.parametrize("write", ["set_", "set_at_", "update_", "item"])
def test_stored_transitions_cannot_be_changed(write):
    buffer = make()
    buffer.extend(online(2))
    change = {
        "set_": lambda: buffer.set_("action", torch.zeros(14, 2)),
        "set_at_": lambda: buffer.set_at_("action", torch.zeros(2), 3),
        "update_": lambda: buffer.update_(online(14)),
        "item": lambda: buffer.__setitem__(0, online(1)[0]),
    }[write]
    with pytest.raises(RuntimeError, match="are not changed"):
        change()
    assert same(buffer[:], torch.cat([DATASET[:], online(2)]))


# --- what is drawn


def chi_square_quantile(degrees, z=4.0):
    """Upper quantile of about 3e-5 (Wilson and Hilferty, 1931): a false alarm in 30,000 runs."""
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def assert_equally_likely(draws, rows):
    """Pearson's test that every one of ``rows``, and nothing else, is drawn equally often."""
    counts = torch.bincount(draws.flatten(), minlength=max(rows) + 1)
    assert counts.sum() == counts[rows].sum()
    expected = draws.numel() / len(rows)
    assert ((counts[rows] - expected) ** 2 / expected).sum() < chi_square_quantile(len(rows) - 1)


STATES = {
    "offline only": ("online", 0, []),
    "some online": ("online", 3, []),
    "ring full": ("online", 13, []),
    "discarded": ("online", 13, [12, 15]),
    "fifo, array not full": ("fifo", 4, []),
    "fifo, some overwritten": ("fifo", 9, []),
    "fifo, discarded": ("fifo", 9, [1, 13, 16]),
    "fifo, all overwritten": ("fifo", 40, []),
}


def filled(state, **kwargs):
    overwrite, added, discarded = STATES[state]
    buffer = make(overwrite=overwrite, **kwargs)
    for start in range(0, added, 3):
        buffer.extend(online(min(3, added - start), start=start))
    if discarded:
        buffer.discard(torch.tensor(discarded))
    return buffer, [row for row in range(len(buffer)) if row not in discarded]


@pytest.mark.parametrize("state", STATES)
def test_uniform_draws_every_held_transition_equally_often_at_every_place(state):
    buffer, rows = filled(state, batch_size=50)
    draws = torch.stack([buffer.sample()["index"] for _ in range(400)])
    assert_equally_likely(draws, rows)
    assert_equally_likely(draws[:, 0], rows)
    assert_equally_likely(draws[:, -1], rows)
    assert len(rows) == buffer.num_online + OFFLINE - buffer._storage.overwritten


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_balanced_draws_exactly_the_share_and_uniformly_within(state, fraction):
    buffer, rows = filled(state, batch_size=10, mode="balanced", offline_fraction=fraction)
    draws = torch.stack([buffer.sample()["index"] for _ in range(150)])
    offline_rows = [row for row in rows if not buffer.is_online(torch.tensor(row))]
    online_rows = [row for row in rows if row not in offline_rows]
    count = round(fraction * 10) if online_rows else 10
    count = count if offline_rows else 0
    assert ((~buffer.is_online(draws)).sum(1) == count).all()
    assert buffer.offline_fraction == pytest.approx(count / 10)
    if count:
        assert_equally_likely(draws[:, :count], offline_rows)
    if count < 10:
        assert_equally_likely(draws[:, count:], online_rows)


def test_annealed_share_is_linear_in_the_online_transitions_ever_added():
    buffer = make(mode="annealed", offline_fraction=(0.8, 0.2), anneal_transitions=20, batch_size=10)
    shares = [(~buffer.is_online(buffer.sample()["index"])).sum().item()]
    for added in range(0, 30, 5):
        buffer.extend(online(5, start=added))
        shares.append((~buffer.is_online(buffer.sample()["index"])).sum().item())
    expected = [1.0, *(0.8 - 0.6 * min(added / 20, 1) for added in range(5, 35, 5))]
    assert shares == [round(10 * share) for share in expected]
    assert buffer.offline_fraction == pytest.approx(0.2)


def test_uniform_draws_what_torchrls_sampler_draws_from_one_storage():
    buffer = make(generator=torch.Generator().manual_seed(3))
    buffer.extend(online(5))
    single = TensorDictReplayBuffer(
        storage=LazyTensorStorage(17), batch_size=4, generator=torch.Generator().manual_seed(3)
    )
    single.extend(buffer[:])
    for _ in range(5):
        assert same(buffer.sample(), single.sample())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("mode", ["uniform", "balanced"])
def test_the_path_without_waiting_gives_the_same_batches(state, mode):
    buffer, _ = filled(state, batch_size=64, mode=mode)
    torch.manual_seed(1)
    batch = buffer.sample()
    like_an_accelerator(buffer)
    torch.manual_seed(1)
    other = buffer.sample()
    assert torch.equal(batch["index"], other["index"])
    assert same(batch, other)


# --- what is overwritten


def test_the_offline_prefix_stays_and_the_online_zone_is_a_ring():
    buffer = make()
    rows = [buffer.extend(online(3, start=start)).tolist() for start in (0, 3, 6)]
    assert rows == [[12, 13, 14], [15, 16, 12], [13, 14, 15]]
    assert same(buffer[:12], DATASET[:])
    assert (buffer[12:]["observation"][:, 0] - 1000).tolist() == [5, 6, 7, 8, 4]
    assert buffer.is_online(torch.arange(17)).tolist() == [False] * 12 + [True] * 5
    assert (buffer.num_online, len(buffer)) == (5, 17)


def test_fifo_overwrites_the_oldest_offline_rows_then_goes_round():
    """The reference's ReplayBuffer: one array, written at a pointer that starts behind the data and wraps to 0."""
    array = torch.cat([DATASET[:]["observation"], torch.zeros(5, 2)])
    pointer, size = 12, 12
    buffer = make(overwrite="fifo")
    for number in range(50):
        new = online(1, start=number)
        array[pointer] = new["observation"][0]
        pointer, size = (pointer + 1) % 17, max(size, min(pointer + 1, 17))
        row = buffer.extend(new)
        assert (row + 1) % 17 == pointer
        assert torch.equal(buffer[:]["observation"], array[:size])
        assert torch.equal(buffer.is_online(torch.arange(size)), array[:size, 0] >= 1000)
        assert (len(buffer), buffer.num_online) == (size, min(number + 1, 17))
    assert buffer.num_offline == 12


def test_the_references_array_has_a_single_free_row():
    buffer = make(overwrite="fifo", online_capacity=1)
    assert buffer.extend(online(4)).tolist() == [12, 0, 1, 2]
    assert same(buffer[[12, 0, 1, 2]], online(4))
    assert same(buffer[3:12], DATASET[3:])


def test_emptying_forgets_the_online_transitions_alone():
    buffer = make()
    buffer.extend(online(4))
    buffer.discard(torch.tensor([12]))
    buffer.empty()
    assert (len(buffer), buffer.num_online, buffer.num_discarded) == (12, 0, 0)
    assert buffer.extend(online(1)).tolist() == [12]
    assert same(buffer[:12], DATASET[:])


# --- discarded rows


def test_discarded_rows_come_back_when_they_are_overwritten():
    buffer = make(batch_size=50)
    index = buffer.extend(online(4))
    buffer.discard(index[1:3])
    buffer.discard(index[1])  # again
    assert (buffer.num_online, buffer.num_discarded, len(buffer)) == (2, 2, 16)
    buffer.extend(online(3, start=4))  # rows 16, 12, 13
    assert (buffer.num_online, buffer.num_discarded, len(buffer)) == (4, 1, 17)
    draws = torch.stack([buffer.sample()["index"] for _ in range(200)])
    assert_equally_likely(draws, [row for row in range(17) if row != 14])


@pytest.mark.parametrize("row", [0, 11, 15, 99, -1])
def test_only_held_online_rows_can_be_discarded(row):
    buffer = make()
    buffer.extend(online(3))
    with pytest.raises(InputError, match=f"row {row} holds no online transition"):
        buffer.discard(torch.tensor([12, row]))
    assert buffer.num_discarded == 0


def test_nothing_left_to_sample_is_said():
    buffer = make(overwrite="fifo", online_capacity=5)
    for start in range(0, 20, 5):
        buffer.extend(online(5, start=start))
    buffer.discard(torch.arange(17))
    with pytest.raises(RuntimeError, match="every transition of the buffer was discarded"):
        buffer.sample()


# --- TorchRL's features


class Tree:
    """What the sampler asks of TorchRL's compiled segment trees, for where its extension does not load (see the fixture)."""

    neutral, reduce = 0.0, staticmethod(torch.sum)

    def __init__(self, size):
        self.values = torch.full((size,), self.neutral)

    def __getitem__(self, rows):
        return self.values[rows]

    def __setitem__(self, rows, values):
        self.values[rows] = values

    def query(self, begin, end):
        return float(self.reduce(self.values[begin:end]))

    def scan_lower_bound(self, mass):
        return torch.searchsorted(self.values.double().cumsum(0), torch.as_tensor(mass).double())


class MinTree(Tree):
    neutral, reduce = math.inf, staticmethod(torch.min)


@pytest.fixture
def priorities(monkeypatch):
    """Priorities for ``make``: TorchRL's sampler, on plain trees where its wheel was compiled against another torch."""
    if prioritized.SumSegmentTreeFp32 is None:
        for name in ("Fp32", "Fp64"):
            monkeypatch.setattr(prioritized, f"SumSegmentTree{name}", Tree)
            monkeypatch.setattr(prioritized, f"MinSegmentTree{name}", MinTree)
    np.random.seed(0)
    return lambda capacity=17, alpha=1.0, beta=1.0: PrioritizedSampler(capacity, alpha, beta)


def test_priorities_start_at_the_default_and_can_be_updated(priorities):
    buffer = make(sampler=priorities(), batch_size=50)
    buffer.extend(online(3))
    draws = torch.stack([buffer.sample()["index"] for _ in range(200)])
    assert_equally_likely(draws, list(range(15)))
    buffer.update_priority(torch.arange(15), torch.full((15,), 1e-12))
    buffer.update_priority(torch.tensor([2, 13]), torch.tensor([3.0, 1.0]))
    draws = torch.stack([buffer.sample()["index"] for _ in range(40)])
    assert set(draws.unique().tolist()) == {2, 13}
    assert (draws == 2).float().mean() == pytest.approx(0.75, abs=0.05)
    batch = buffer.sample()
    assert batch["priority_weight"].shape == (50,)
    batch["td_error"] = torch.ones(50, 1)
    buffer.update_tensordict_priority(batch)


def test_where_torchrls_extension_does_not_load_one_line_names_versions_that_fit(monkeypatch):
    for name in ("Fp32", "Fp64"):  # as torchrl leaves them where its extension does not load
        monkeypatch.setattr(prioritized, f"SumSegmentTree{name}", None)
        monkeypatch.setattr(prioritized, f"MinSegmentTree{name}", None)
    monkeypatch.setitem(sys.modules, "torchrl._torchrl", None)
    line = (
        rf"does not load: torchrl {version('torchrl')} .* torch {re.escape(torch.__version__)}; "
        r"torchrl \S+ with torch \S+ works"
    )
    for call in (make, lambda sampler: make().set_sampler(sampler)):
        with pytest.raises(InputError, match=line) as caught:
            call(sampler=lambda: PrioritizedSampler(17, 1.0, 1.0))
        assert "\n" not in str(caught.value)


def test_priorities_in_torchrls_own_trees_decide_what_is_drawn():
    if fault := extension_fault():
        pytest.skip(fault)
    np.random.seed(0)
    buffer = make(sampler=lambda: PrioritizedSampler(17, 1.0, 1.0), batch_size=50)
    buffer.update_priority(torch.arange(OFFLINE), torch.full((OFFLINE,), 1e-12))
    buffer.update_priority(torch.tensor([2, 7]), torch.tensor([3.0, 1.0]))
    draws = torch.stack([buffer.sample()["index"] for _ in range(40)])
    assert set(draws.unique().tolist()) == {2, 7}
    assert (draws == 2).float().mean() == pytest.approx(0.75, abs=0.05)


def test_discarded_rows_have_no_priority_until_they_are_overwritten(priorities):
    buffer = make(sampler=priorities(), batch_size=50)
    index = buffer.extend(online(5))
    buffer.update_priority(index, torch.tensor([1.0, 1e-6, 1.0, 1.0, 1.0]))
    buffer.discard(index[1])
    # Weights are relative to the smallest priority that can be drawn; the discarded row had the smallest of all.
    assert buffer.sample()["priority_weight"].tolist() == pytest.approx([1.0] * 50)
    buffer.update_priority(index, torch.full((5,), 1e6))  # of a batch sampled before
    assert 13 not in torch.stack([buffer.sample()["index"] for _ in range(20)])
    buffer.extend(online(2, start=5))
    assert 13 in torch.stack([buffer.sample()["index"] for _ in range(20)])


@pytest.mark.parametrize("sampler", [SamplerWithoutReplacement, RandomSampler])
def test_other_samplers_work_in_uniform_mode_and_never_see_discarded_rows(sampler):
    buffer = make(sampler=sampler(), batch_size=5)
    buffer.extend(online(3))
    if sampler is SamplerWithoutReplacement:
        epoch = torch.cat([buffer.sample()["index"] for _ in range(3)])
        assert sorted(epoch.tolist()) == list(range(15))
    buffer.discard(torch.tensor([12, 14]))
    batches = [buffer.sample() for _ in range(60)]
    draws = torch.cat([batch["index"] for batch in batches])
    assert set(draws.tolist()) == {*range(12), 13}
    assert same(torch.cat(batches), buffer[:][draws])


def test_a_sampler_of_ones_own_is_for_uniform_mode(priorities):
    for mode, fraction in (("balanced", 0.5), ("annealed", (0.5, 0.1))):
        with pytest.raises(InputError, match=f"mode='{mode}' draws by itself"):
            make(mode=mode, offline_fraction=fraction, anneal_transitions=5, sampler=RandomSampler())
    with pytest.raises(InputError, match="draws by itself"):
        make(mode="balanced").set_sampler(RandomSampler())
    with pytest.raises(InputError, match=r"max_capacity=16\) is too small; give 17"):
        make(sampler=priorities(16))
    buffer = make(batch_size=50)
    buffer.discard(buffer.extend(online(3))[1])
    buffer.set_sampler(priorities())
    draws = torch.stack([buffer.sample()["index"] for _ in range(100)])
    assert_equally_likely(draws, [*range(13), 14])


def test_transforms_run_on_both_zones_and_back_when_extending():
    buffer = make(transform=RewardScaling(loc=0.0, scale=2.0, in_keys=[("next", "reward")]), batch_size=32)
    buffer.extend(online(4))
    batch = buffer.sample()
    whole = torch.cat([DATASET[:], online(4)])
    assert torch.equal(batch["next", "reward"], whole["next", "reward"][batch["index"]] * 2)
    factory = make(transform_factory=lambda: RewardScaling(loc=0.0, scale=2.0, in_keys=[("next", "reward")]))
    factory.extend(online(1))
    assert torch.equal(factory[12:]["next", "reward"], online(1)["next", "reward"] * 2)
    buffer = make()
    buffer.append_transform(lambda td: td.set("sum", td["action"].sum(-1)))
    assert torch.equal((batch := buffer.sample())["sum"], batch["action"].sum(-1))


def test_sizes_iteration_and_information():
    buffer = make()
    buffer.extend(online(3))
    with pytest.warns(UserWarning, match="conflicting batch_sizes"):
        assert buffer.sample(9).batch_size == (9,)
    assert [batch.batch_size for batch, _ in zip(buffer, range(3), strict=False)] == [(4,)] * 3
    batch, info = buffer.sample(return_info=True)
    assert torch.equal(batch["index"], info["index"])
    assert (buffer.write_count, buffer.stats()["size"], buffer.stats()["capacity"]) == (3, 15, 17)
    assert buffer.can_sample()
    with pytest.raises(RuntimeError, match="batch_size not specified"):
        make(batch_size=None).sample()


def test_the_generator_decides_and_the_global_one_is_left_alone():
    state = torch.get_rng_state()
    first, second = (make(generator=torch.Generator().manual_seed(7), mode="balanced") for _ in range(2))
    for buffer in (first, second):
        buffer.extend(online(3))
    assert torch.equal(first.sample()["index"], second.sample()["index"])
    assert torch.equal(torch.get_rng_state(), state)


def test_prefetched_batches_without_discarded_rows():
    buffer = make(prefetch=2)
    buffer.extend(online(5))
    buffer.sample()
    buffer.discard(torch.arange(12, 17))
    assert not buffer.is_online(torch.stack([buffer.sample()["index"] for _ in range(20)])).any()
    buffer.shutdown()


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mixed"}, "mode='mixed' is none of uniform, balanced, annealed"),
        ({"overwrite": "both"}, "overwrite='both'"),
        ({"online_capacity": 0}, "online_capacity=0"),
        ({"online_capacity": 1.5}, "online_capacity=1.5"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"mode": "balanced", "offline_fraction": 1.1}, "offline_fraction=1.1"),
        ({"mode": "balanced", "offline_fraction": (0.5, 0.1)}, r"offline_fraction=\(0.5, 0.1\)"),
        ({"mode": "balanced", "offline_fraction": math.nan}, "offline_fraction=nan"),
        ({"mode": "annealed", "offline_fraction": 0.5, "anneal_transitions": 5}, "offline_fraction=0.5 is no pair"),
        ({"mode": "annealed", "offline_fraction": (0.5, 2), "anneal_transitions": 5}, r"offline_fraction=\(0.5, 2\)"),
        ({"mode": "annealed", "offline_fraction": (0.5, 0.1)}, "anneal_transitions=None"),
        ({"offline": DATASET[:], "device": "meta", "online_dir": "folder"}, "online_dir='folder'"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_options_that_cannot_work_are_refused():
    for name in ("storage", "writer", "collate_fn", "sample_unit", "consume_after_n_samples"):
        with pytest.raises(TypeError, match=name):
            make(**{name: None})


# --- state


def through_a_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("sampler", ["own", "shuffled", "balanced", "priorities"])
@pytest.mark.parametrize("state", STATES)
def test_a_restored_buffer_goes_on_bit_for_bit(state, sampler, tmp_path, priorities):
    options = {
        "own": {}, "shuffled": {"sampler": SamplerWithoutReplacement},
        "balanced": {"mode": "balanced"}, "priorities": {"sampler": lambda: priorities(alpha=0.7)},
    }[sampler]  # fmt: skip
    buffer, _ = filled(state, generator=torch.Generator().manual_seed(5), **options)
    if sampler == "priorities":
        buffer.update_priority(torch.arange(6), torch.arange(6.0) + 1)
    buffer.sample()
    restored = make(overwrite=STATES[state][0], **options)
    if state.startswith("fifo"):  # the other way to the same
        buffer.dumps(tmp_path / "state")
        restored.loads(tmp_path / "state")
        assert os.listdir(tmp_path / "state") == ["buffer.pt"]
    else:
        restored.load_state_dict(through_a_file(buffer.state_dict(), tmp_path / "state"))
    assert len(restored) == len(buffer)
    for number in range(6):
        assert same(restored[:], buffer[:])
        one, other = buffer.sample(), restored.sample()
        assert torch.equal(one["index"], other["index"])
        assert same(one, other)
        new = online(2, start=100 + 2 * number)
        assert torch.equal(buffer.extend(new), restored.extend(new))
        assert (restored.num_online, restored.num_discarded) == (buffer.num_online, buffer.num_discarded)


def test_torchs_own_generator_restores_the_sampling(tmp_path):
    buffer = make()
    buffer.extend(online(3))
    state, generator = through_a_file(buffer.state_dict(), tmp_path / "state"), torch.get_rng_state()
    expected = [buffer.sample()["index"] for _ in range(4)]
    restored = make()
    restored.load_state_dict(state)
    torch.set_rng_state(generator)
    assert all(torch.equal(restored.sample()["index"], index) for index in expected)


def test_batches_drawn_ahead_are_part_of_the_state(tmp_path):
    buffer = make(prefetch=2, generator=torch.Generator().manual_seed(1))
    buffer.extend(online(3))
    buffer.sample()
    state = through_a_file(buffer.state_dict(), tmp_path / "state")
    restored = make(prefetch=2)
    restored.load_state_dict(state)
    for _ in range(2):
        one, other = buffer.sample(), restored.sample()
        assert torch.equal(one["index"], other["index"])
        assert same(one, other)
    buffer.shutdown()
    restored.shutdown()


def test_the_state_holds_the_online_rows_alone(tmp_path):
    buffer = make(build(episodes((5000,))), online_capacity=100_000)
    buffer.extend(online(3))
    torch.save(buffer.state_dict(), tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < 10_000


def other_buffers():
    changed = DATASET[:].clone()
    changed["next", "reward"][7] += 1
    wider = online(12)
    wider["action"] = torch.zeros(12, 3)
    return {
        "offline": make(changed),
        "offline, other rows": make(DATASET[:11]),
        "online_capacity": make(online_capacity=2),  # less than was written
        "overwrite": make(overwrite="fifo"),
        "schema": make(wider),
    }


@pytest.mark.parametrize("what", list(other_buffers()))
def test_a_state_of_another_buffer_is_refused_and_nothing_is_loaded(what):
    buffer = make()
    buffer.extend(online(3))
    other = other_buffers()[what]
    with pytest.raises(InputError, match=f"the state is of another buffer: {what.partition(',')[0]} is"):
        other.load_state_dict(buffer.state_dict())
    assert other.num_online == 0


def test_a_state_fits_a_larger_zone_while_nothing_was_overwritten():
    buffer = make(online_capacity=4)
    buffer.extend(online(3))
    larger = make(online_capacity=9)
    larger.load_state_dict(buffer.state_dict())
    assert same(larger[:], buffer[:])
    buffer.extend(online(3))
    with pytest.raises(InputError, match="online_capacity is 4 there, 9 here"):
        make(online_capacity=9).load_state_dict(buffer.state_dict())


def test_the_same_transitions_kept_elsewhere_are_the_same_offline_set(tmp_path):
    mapped = build(episodes(), tmp_path)
    buffer = make()
    buffer.extend(online(3))
    for offline in (mapped, DATASET[:]):
        restored = make(offline)
        restored.load_state_dict(buffer.state_dict())
        assert same(restored[:], buffer[:])


def test_a_state_of_another_sampler_or_damaged_is_refused(tmp_path):
    buffer = make()
    buffer.extend(online(3))
    with pytest.raises(InputError, match="its sampler is a UnionSampler, here it is a SamplerWithoutReplacement"):
        make(sampler=SamplerWithoutReplacement()).load_state_dict(buffer.state_dict())
    state = buffer.state_dict()
    state["_storage"]["online"]["action"] = torch.zeros(2, 2)
    with pytest.raises(InputError, match="the state is damaged"):
        make().load_state_dict(state)
    for name, value in (("written", -1), ("written", "3"), ("discarded", torch.tensor([3])), ("discarded", None)):
        state = buffer.state_dict()
        state["_storage"][name] = value
        with pytest.raises(InputError, match="the state is damaged"):
            make().load_state_dict(state)
    with pytest.raises(InputError, match="_prefetch_state, _sampler, _transforms is missing"):
        make().load_state_dict({"_storage": state["_storage"]})
    buffer.dumps(tmp_path)
    file = tmp_path / "buffer.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="missing or damaged"):
        make().loads(tmp_path)
    with pytest.raises(InputError, match="missing or damaged"):
        make().loads(tmp_path / "nowhere")


def test_the_mode_may_change_between_saving_and_loading():
    buffer = make()
    buffer.extend(online(5))
    restored = make(mode="balanced")
    restored.load_state_dict(buffer.state_dict())
    assert restored.is_online(restored.sample()["index"]).sum() == 2


# --- files


def test_online_columns_lie_in_files_and_a_second_buffer_does_not_disturb_the_first(tmp_path):
    first = make(online_dir=tmp_path)
    first.extend(online(3))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "online_action.bin", "online_flags.bin", "online_frames.bin", "online_reward.bin",
    ]  # fmt: skip
    second = make(online_dir=tmp_path)
    second.extend(online(3, start=50))
    assert same(first[12:], online(3))
    assert same(second[12:], online(3, start=50))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write in"):
        make(online_dir=tmp_path / "file")


# --- GPU


class NoQuestions(TorchDispatchMode):
    """An error at operations for which, on an accelerator, the host would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:2])
        )
        if masks or name in ("_local_scalar_dense", "equal", "lift_fresh", "masked_select", "nonzero", "_unique2"):
            raise AssertionError(f"{name} makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["uniform", "balanced"])
@pytest.mark.parametrize("overwrite", ["online", "fifo"])
@pytest.mark.parametrize("next_action", [False, True])
def test_the_accelerators_way_of_sampling_asks_the_device_nothing(mode, overwrite, next_action):
    buffer = like_an_accelerator(make(mode=mode, overwrite=overwrite, batch_size=64, next_action=next_action))
    buffer.extend(online(5))
    buffer.extend(online(5, start=5))
    buffer.discard(torch.tensor([14]))
    with NoQuestions():
        batch = buffer.sample()
        drawn = DATASET.draw(64, next_action=next_action)
    for found in (batch, drawn):
        assert (("next", "action") in found.keys(True)) == next_action
    for question in (lambda: bool(batch["index"][0]), lambda: batch["index"][batch["index"] > 0]):
        with NoQuestions(), pytest.raises(AssertionError, match="makes the host wait"):
            question()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["uniform", "balanced"])
@pytest.mark.parametrize("overwrite", ["online", "fifo"])
@pytest.mark.parametrize("next_action", [False, True])
def test_on_a_gpu_sampling_never_waits_and_reads_the_same(mode, overwrite, next_action):
    buffer = make(device="cuda", mode=mode, overwrite=overwrite, batch_size=64, next_action=next_action)
    buffer.extend(online(3))  # from the CPU
    buffer.extend(online(5, start=3).to("cuda"))
    buffer.discard(torch.tensor([14], device="cuda"))
    buffer.sample()
    with no_waiting_for_the_device():
        batch = buffer.sample()
    assert batch.device.type == "cuda"
    reference = make(mode=mode, overwrite=overwrite, next_action=next_action)
    reference.load_state_dict(buffer.state_dict())
    expected = reference[:][batch["index"].cpu()]
    assert same(batch.cpu(), expected)
    assert (("next", "action") in batch.keys(True)) == next_action
    if next_action:
        assert torch.equal(batch["next", "action"].cpu(), expected["next", "action"])
    assert 14 not in batch["index"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("next_action", [False, True])
def test_on_a_gpu_drawing_from_a_set_never_waits(next_action):
    dataset = DATASET.to("cuda")
    dataset.draw(64, next_action=next_action)
    with no_waiting_for_the_device():
        batch = dataset.draw(64, next_action=next_action)
    assert batch["observation"].is_cuda


@contextlib.contextmanager
def no_waiting_for_the_device():
    """An error where the host waits for the device."""
    try:
        # Its first call warns, and as an error the warning would come with the mode switched on already: for every later test.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_warning_from_the_plain_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = make()
        buffer.extend(online(3))
        buffer.sample()
