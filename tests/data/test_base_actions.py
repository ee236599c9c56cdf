"""Base actions drawn once: the prior's distribution, beside the right states, through kills and copies."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import DiffusionActor

from deflow_torchrl.data import BaseActionBank, OfflineOnlineReplayBuffer, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.errors import InputError
from deflow_torchrl.modules import FlowMatchingPolicy

OBSERVATION_DIM, ACTION_DIM = 2, 2


class RingVelocity(nn.Module):
    """Exact velocity field of a flow from N(0, I) to nine Gaussians, on a ring that the state turns and widens and within it.

    For modes m_k of width w, p_t is a mixture of N(t m_k, (1 - t)^2 + t^2 w^2) and the field its posterior mean of
    (x1 - x0) given x_t. Noise of another size moves mass between the ring and its middle.
    """

    width = 0.05

    def forward(self, inputs):
        state, x, t = inputs[..., :OBSERVATION_DIM], inputs[..., OBSERVATION_DIM:-1], inputs[..., -1:]
        angle = torch.arange(8, device=x.device) * torch.pi / 4 + state[..., :1]
        radius = 0.5 + 0.2 * torch.tanh(state[..., 1:2])
        modes = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        modes = torch.cat([modes, torch.zeros_like(modes[..., :1, :])], -2)
        variance = ((1 - t) ** 2 + (t * self.width) ** 2).unsqueeze(-1)
        offset = x.unsqueeze(-2) - t.unsqueeze(-1) * modes
        weight = torch.softmax(-offset.square().sum(-1, keepdim=True) / (2 * variance), -2)
        slope = (t * self.width**2 - (1 - t)).unsqueeze(-1) / variance
        return (weight * (modes + slope * offset)).sum(-2)


def ring(**kwargs):
    return FlowMatchingPolicy(RingVelocity(), ACTION_DIM, 20, out_keys=("base_action",), **kwargs)


class Memo(nn.Module):
    """The state itself as base action, with noise of a thousandth: tells which state a draw is of."""

    def forward(self, observation):
        return observation[..., :ACTION_DIM] + 1e-3 * torch.randn_like(observation[..., :ACTION_DIM])


def memo():
    return TensorDictModule(Memo(), in_keys=["observation"], out_keys=["base_action"])


def dataset(episodes=5, length=7, **kwargs):
    """Every observation is another one; the last row of an episode is a final observation."""
    rows = episodes * (length + 1)
    last = np.arange(rows) % (length + 1) == length
    return TransitionDataset.from_arrays(
        observations=np.random.default_rng(0).normal(size=(rows, OBSERVATION_DIM)).astype(np.float32),
        actions=np.zeros((rows, ACTION_DIM), np.float32),
        rewards=np.zeros(rows, np.float32),
        terminals=np.zeros(rows),
        timeouts=last,
        **{"final_observation_rows": True, **kwargs},
    )


def transitions(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    observation = torch.randn(count, OBSERVATION_DIM, generator=generator)
    following = torch.randn(count, OBSERVATION_DIM, generator=generator)
    flag = torch.zeros(count, 1, dtype=torch.bool)
    return TensorDict(
        observation=observation,
        action=torch.zeros(count, ACTION_DIM),
        next=TensorDict(
            observation=following, reward=torch.zeros(count, 1), terminated=flag, truncated=flag, done=flag,
            batch_size=[count],
        ),
        batch_size=[count],
    )  # fmt: skip


def plain_buffer(count=40, capacity=60):
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=64)
    buffer.extend(transitions(count))
    return buffer


def offline_buffer(**kwargs):
    return TransitionReplayBuffer(dataset(**kwargs), batch_size=64)


def union_buffer(**kwargs):
    return OfflineOnlineReplayBuffer(dataset(), online_capacity=20, batch_size=64, **kwargs)


def fifo_buffer():
    return union_buffer(overwrite="fifo")


def transformed_buffer():
    """Observations reach the networks, and so the prior, at twice their stored size."""

    def double(transitions):
        for key in ("observation", ("next", "observation")):
            transitions[key] = 2 * transitions[key]
        return transitions

    return TransitionReplayBuffer(dataset(), batch_size=64, transform=double)


OFFLINE = pytest.mark.parametrize("make_buffer", [plain_buffer, offline_buffer, union_buffer, fifo_buffer])
ONLINE = pytest.mark.parametrize("make_buffer", [plain_buffer, union_buffer, fifo_buffer])


def filled(prior, buffer, **kwargs):
    bank = BaseActionBank(prior, buffer, **kwargs)
    bank.fill()
    return bank


def of_their_states(batch):
    """Whether the base actions of :class:`Memo` are those of the batch's own states."""
    pairs = ((batch, batch["base_action"]), (batch["next"], batch["next", "base_action"]))
    return all(bool((state["observation"] - action).abs().max() < 0.01) for state, action in pairs)


def p_value(x, y, permutations=500):
    """Of the two-sample permutation test with the energy distance, equal sizes, by a generator of its own."""
    both, generator = torch.cat([x, y]), torch.Generator().manual_seed(0)
    sides = torch.ones(len(both))
    sides[len(x) :] = -1
    others = [sides[torch.randperm(len(both), generator=generator)] for _ in range(permutations)]
    signs = torch.stack([sides, *others])
    # 2 E|x - y| - E|x - x'| - E|y - y'| is minus the quadratic form of the distances in the sides' signs.
    energy = -((signs @ torch.cdist(both, both)) * signs).sum(1)
    return (energy >= energy[0]).float().mean().item()


class Narrow(nn.Module):
    """The ring sampled from noise scaled by 0.8: what a bank with wrong noise would hold."""

    def forward(self, observation):
        return ring().module(observation, 0.8 * torch.randn(*observation.shape[:-1], ACTION_DIM))


def test_the_field_of_these_tests_has_nine_modes():
    states = torch.zeros(4000, OBSERVATION_DIM)
    turned, offset = on_the_ring(states, ring().module(states))
    nearest = torch.unique((turned - offset).mul(100).round(), dim=0, return_counts=True)[1]
    assert len(nearest) == 9
    assert nearest.min() > 300
    assert offset.norm(dim=-1).quantile(0.95) < 0.3


def on_the_ring(state, action):
    """Actions with the state's turn and radius taken out, and their offsets from the nearest mode, over the radius."""
    cos, sin, radius = state[:, 0].cos(), state[:, 0].sin(), 0.5 + 0.2 * torch.tanh(state[:, 1:2])
    turned = (
        torch.stack([cos * action[:, 0] + sin * action[:, 1], cos * action[:, 1] - sin * action[:, 0]], -1) / radius
    )
    angle = torch.arange(8) * torch.pi / 4
    modes = torch.cat([torch.stack([angle.cos(), angle.sin()], -1), torch.zeros(1, 2)])
    return turned, turned - modes[torch.cdist(turned, modes).argmin(1)]


@pytest.mark.parametrize("side", ["s", "s'"])
def test_the_banks_actions_are_distributed_as_fresh_ones_and_wrong_noise_is_noticed(side):
    buffer = plain_buffer(count=2000, capacity=2000)
    batch = buffer[:]
    batch["index"] = torch.arange(2000)
    states = (batch if side == "s" else batch["next"])["observation"]
    fresh = on_the_ring(states, ring().module(states))[0]

    def compared(prior):
        held = filled(prior, buffer, num_actions=4)(batch.clone())
        held = on_the_ring(states, (held if side == "s" else held["next"])["base_action"])[0]
        return p_value(held, fresh), p_value(held.norm(dim=-1, keepdim=True), fresh.norm(dim=-1, keepdim=True))

    # A bank that gave a state another one's actions would lose the ring: it turns with the state.
    assert min(compared(ring())) > 0.05
    narrow = TensorDictModule(Narrow(), in_keys=["observation"], out_keys=["base_action"])
    assert min(compared(narrow)) < 0.01


@pytest.mark.parametrize("make_buffer", [plain_buffer, offline_buffer, union_buffer, fifo_buffer, transformed_buffer])
@pytest.mark.parametrize("batch_size", [1, 24, 8192])
def test_every_row_has_the_base_actions_of_its_own_states(make_buffer, batch_size):
    buffer = make_buffer()
    batch = buffer[:]
    batch["index"] = torch.arange(len(buffer))
    assert of_their_states(filled(memo(), buffer, num_actions=3, batch_size=batch_size)(batch))
    sampled = buffer.sample()
    assert of_their_states(filled(memo(), buffer, num_actions=3)(sampled))


def test_an_encoder_may_stand_before_the_prior():
    encoder = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["encoded"])
    behind = TensorDictSequential(encoder, TensorDictSequential(ring(in_keys=("encoded", "noise"))))
    banks = [filled(prior, offline_buffer(), num_actions=2) for prior in (behind, ring())]
    encoded, plain = (bank._actions for bank in banks)
    assert plain.unique(dim=0).numel() > 100
    torch.testing.assert_close(encoded, plain)


def test_a_data_sets_bank_has_one_state_a_transition():
    frames = filled(ring(), offline_buffer(), num_actions=4)._actions
    assert frames.shape == (5 * 8, 4, ACTION_DIM)
    assert filled(ring(), plain_buffer(40, 40), num_actions=4)._actions.shape == (2 * 40, 4, ACTION_DIM)


@OFFLINE
def test_the_draws_of_a_state_are_distinct_and_all_are_used(make_buffer):
    bank = filled(ring(), make_buffer(), num_actions=5)
    batch = TensorDict(index=torch.full((400,), 3), next=TensorDict(batch_size=[400]), batch_size=[400])
    batch = bank(batch)
    assert len(batch["base_action"].unique(dim=0)) == 5
    assert len(batch["next", "base_action"].unique(dim=0)) == 5


@OFFLINE
def test_the_choices_of_s_and_of_its_successor_are_independent(make_buffer):
    bank, count = filled(ring(), make_buffer(), num_actions=2), 4000
    batch = bank(TensorDict(index=torch.full((count,), 3), next=TensorDict(batch_size=[count]), batch_size=[count]))
    one, other = (
        (actions == actions[0]).all(-1).long() for actions in (batch["base_action"], batch["next", "base_action"])
    )
    cells = (2 * one + other).bincount(minlength=4)
    # Each cell is Binomial(4000, 1/4): mean 1000, standard deviation 27.
    assert (cells - count / 4).abs().max() < 4 * 27


def test_where_s_is_its_own_successor_the_draws_still_differ():
    data = transitions(30)
    data["next", "observation"] = data["observation"]
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(30), batch_size=30)
    buffer.extend(data)
    actions = filled(ring(), buffer, num_actions=3)._actions.reshape(30, 6, ACTION_DIM)
    assert all(len(of_one.unique(dim=0)) == 6 for of_one in actions)


@ONLINE
def test_draws_leave_the_global_generator_alone_and_do_not_depend_on_it(make_buffer):
    tables = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        buffer = make_buffer()
        bank = filled(ring(), buffer, num_actions=3, seed=5, batch_size=50)
        bank.extend(buffer.extend(transitions(4)))
        torch.testing.assert_close(torch.random.get_rng_state(), before, rtol=0, atol=0)
        tables.append(bank._actions)
    torch.testing.assert_close(*tables, rtol=0, atol=0)
    assert not torch.equal(filled(ring(), make_buffer(), num_actions=3, seed=6, batch_size=50)._actions, tables[0])


def test_the_choice_of_a_batch_comes_from_the_global_generator():
    bank, batch = filled(ring(), offline_buffer()), offline_buffer().sample()
    torch.manual_seed(1)
    first = bank(batch.clone())["base_action"]
    torch.manual_seed(1)
    torch.testing.assert_close(bank(batch.clone())["base_action"], first, rtol=0, atol=0)
    assert not torch.equal(bank(batch)["base_action"], first)


def test_no_two_calls_of_the_prior_share_their_noise():
    data = transitions(60)
    data["observation"] = torch.zeros(60, OBSERVATION_DIM)
    data["next", "observation"] = torch.zeros(60, OBSERVATION_DIM)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(80), batch_size=30)
    buffer.extend(data[:40])
    bank = filled(ring(), buffer, num_actions=2, batch_size=16)
    for row in range(40, 60):
        bank.extend(buffer.extend(data[row : row + 1]))
    actions = bank._actions[: 2 * 60].reshape(-1, ACTION_DIM)
    assert len(actions.unique(dim=0)) == len(actions)


def test_a_prior_with_noise_of_its_own_explores_whatever_the_mode():
    prior = DiffusionActor(ACTION_DIM, OBSERVATION_DIM, num_steps=4, out_keys=["base_action"])
    buffer = plain_buffer(count=6)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        bank = filled(prior, buffer, num_actions=7)
        bank.extend(buffer.extend(transitions(2)))
    assert all(len(of_one.unique(dim=0)) == 7 for of_one in bank._actions[: 2 * 8])


def test_given_noise_in_the_buffer_is_not_the_draws():
    data = transitions(30)
    data["noise"] = torch.zeros(30, ACTION_DIM)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(30), batch_size=30)
    buffer.extend(data)
    actions = filled(ring(), buffer, num_actions=3)._actions
    assert all(len(of_one.unique(dim=0)) == 3 for of_one in actions)


def test_a_batch_costs_no_call_of_the_prior():
    calls = []
    prior = memo()
    prior.module.register_forward_hook(lambda *_: calls.append(1))
    buffer = plain_buffer()
    bank = filled(prior, buffer)
    made = len(calls)
    for _ in range(3):
        bank(buffer.sample())
    assert len(calls) == made > 0


# -- online -----------------------------------------------------------------------------------------------------------


@ONLINE
def test_online_rows_have_their_own_base_actions_and_offline_ones_keep_theirs(make_buffer):
    buffer = make_buffer()
    bank = filled(memo(), buffer, num_actions=3)
    for number in range(12):
        bank.extend(buffer.extend(transitions(2 if number % 2 else 1, seed=10 + number)))
        batch = buffer[:]
        batch["index"] = torch.arange(len(buffer))
        assert of_their_states(bank(batch))
        assert of_their_states(bank(buffer.sample()))


@ONLINE
def test_overwritten_rows_have_the_new_transitions_base_actions(make_buffer):
    buffer = make_buffer()
    bank = filled(memo(), buffer, num_actions=3)
    for number in range(30):  # beyond the capacity of each of them
        bank.extend(buffer.extend(transitions(3, seed=10 + number)))
    batch = buffer[:]
    batch["index"] = torch.arange(len(buffer))
    assert of_their_states(bank(batch))
    if make_buffer is not union_buffer:
        assert bool(bank._extended[:10].all()), "the oldest rows were overwritten"


@ONLINE
def test_a_row_the_bank_has_not_seen_is_refused(make_buffer):
    buffer = make_buffer()
    bank = filled(memo(), buffer)
    buffer.extend(transitions(1))
    batch = buffer[:]
    batch["index"] = torch.arange(len(buffer))
    with pytest.raises(InputError, match=rf"row {len(buffer) - 1} has no base actions; call extend"):
        bank(batch)


def test_an_offline_row_is_not_extended():
    buffer = union_buffer()
    bank = filled(memo(), buffer)
    with pytest.raises(InputError, match="row 3 is offline"):
        bank.extend(torch.tensor([3]))


# -- keeping ----------------------------------------------------------------------------------------------------------


@ONLINE
def test_a_resumed_bank_is_bit_for_bit_the_one_that_went_on(make_buffer, tmp_path):
    straight_buffer = make_buffer()
    straight = filled(ring(), straight_buffer, num_actions=3)
    straight.save(tmp_path / "bank.pt")
    for number in range(3):
        straight.extend(straight_buffer.extend(transitions(2, seed=number)))
    torch.save(straight.state_dict(), tmp_path / "online.pt")
    buffer = make_buffer()
    resumed = BaseActionBank(ring(), buffer, num_actions=3)
    for number in range(3):  # a run restores its buffer first, offline rows that were overwritten included
        buffer.extend(transitions(2, seed=number))
    resumed.load(tmp_path / "bank.pt")
    resumed.load_state_dict(torch.load(tmp_path / "online.pt", weights_only=True))
    for number in range(3, 9):
        straight.extend(straight_buffer.extend(transitions(2, seed=number)))
        resumed.extend(buffer.extend(transitions(2, seed=number)))
    torch.testing.assert_close(resumed._actions, straight._actions, rtol=0, atol=0)
    batch = buffer[:]
    batch["index"] = torch.arange(len(buffer))
    resumed(batch)


def test_filling_again_is_as_good_as_loading(tmp_path):
    buffer = offline_buffer()
    bank = filled(ring(), buffer, num_actions=3)
    bank.save(tmp_path / "bank.pt")
    loaded = BaseActionBank(ring(), buffer, num_actions=3)
    loaded.load(tmp_path / "bank.pt")
    torch.testing.assert_close(loaded._actions, filled(ring(), buffer, num_actions=3)._actions, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["bank.pt"]


def test_a_bank_of_something_else_is_refused_and_says_what_differs(tmp_path):
    path = tmp_path / "bank.pt"

    def prior(seed):
        torch.manual_seed(seed)
        return FlowMatchingPolicy(nn.Linear(OBSERVATION_DIM + ACTION_DIM + 1, ACTION_DIM), ACTION_DIM, 2,
                                  out_keys=("base_action",))  # fmt: skip

    filled(prior(0), offline_buffer(), num_actions=3).save(path)
    for other, difference in (
        (BaseActionBank(prior(1), offline_buffer(), num_actions=3), "prior"),
        (BaseActionBank(prior(0), offline_buffer(), num_actions=4), "num_actions"),
        (BaseActionBank(prior(0), offline_buffer(), num_actions=3, seed=1), "seed"),
        (BaseActionBank(prior(0), offline_buffer(episodes=6), num_actions=3), "data, states, transitions"),
        (BaseActionBank(prior(0), plain_buffer(35), num_actions=3), "data, states"),
    ):
        with pytest.raises(InputError, match=rf"of another bank \(different: {difference}\); fill this one"):
            other.load(path)
        with pytest.raises(InputError, match="empty"):
            other.save(path)
    moved = prior(0)
    bank = BaseActionBank(moved, offline_buffer(), num_actions=3)
    bank.load(path)
    with torch.no_grad():
        moved.module.velocity_network.bias[0] += 1e-6
    with pytest.raises(InputError, match="prior"):
        bank.load(path)


def test_a_damaged_or_pickled_file_is_refused_and_not_executed(tmp_path):
    bank = BaseActionBank(ring(), offline_buffer())
    with pytest.raises(InputError, match="no base actions"):
        bank.load(tmp_path / "none.pt")
    whole = tmp_path / "whole.pt"
    filled(ring(), offline_buffer()).save(whole)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:-100])
    evil = tmp_path / "evil.pt"
    torch.save({"actions": Evil(tmp_path / "executed")}, evil)
    other = tmp_path / "other.pt"
    torch.save([1, 2], other)
    few = tmp_path / "few.pt"
    state = torch.load(whole, weights_only=True)
    torch.save({**state, "actions": state["actions"][:1]}, few)
    for path in (cut, evil, other, few):
        with pytest.raises(InputError, match=f"{path.name} is damaged or holds no base actions"):
            bank.load(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(InputError, match="cannot write"):
        filled(ring(), offline_buffer()).save(tmp_path / "no" / "folder" / "bank.pt")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_state_of_another_bank_is_refused():
    buffer = union_buffer()
    bank = filled(ring(), buffer, num_actions=3)
    bank.extend(buffer.extend(transitions(2)))
    state = bank.state_dict()
    with pytest.raises(InputError, match="3 base actions a state, this bank 4"):
        filled(ring(), union_buffer(), num_actions=4).load_state_dict(state)
    with pytest.raises(InputError, match="row 36"):
        filled(ring(), offline_buffer(), num_actions=3).load_state_dict(state)


# -- bad input --------------------------------------------------------------------------------------------------------


def writing(function):
    return TensorDictModule(function, in_keys=["observation"], out_keys=["base_action"])


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (writing(lambda s: torch.full_like(s, torch.nan)), "writes NaN or infinity"),
        (writing(lambda s: s[:, :1]), r"expected \[\d+, 2\]"),
        (writing(lambda s: s.unsqueeze(1)), r"expected \[\d+, 2\]"),
        (writing(lambda s: s.long()), "torch.int64, expected floating point"),
        (TensorDictModule(nn.Identity(), in_keys=["pixels"], out_keys=["base_action"]), "'pixels'"),
    ],
)
@pytest.mark.parametrize("make_buffer", [plain_buffer, offline_buffer])
def test_a_prior_that_does_not_fit_is_refused(prior, message, make_buffer):
    bank = BaseActionBank(prior, make_buffer())
    with pytest.raises(InputError, match=message) as caught:
        bank.fill()
    assert "\n" not in str(caught.value)


def test_a_prior_that_changes_its_type_is_refused():
    buffer, prior = plain_buffer(), memo()
    bank = filled(prior, buffer)
    prior.module.register_forward_hook(lambda module, inputs, output: output.double())
    with pytest.raises(InputError, match=r"expected .* torch\.float32"):
        bank.extend(buffer.extend(transitions(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_actions": 0}, "num_actions must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"base_action_key": "base"}, "not 'base'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        BaseActionBank(memo(), plain_buffer(), **options)


def test_a_batch_without_rows_and_an_empty_bank_are_refused():
    buffer = plain_buffer()
    with pytest.raises(InputError, match=r"call fill\(\) or load\(\) first"):
        BaseActionBank(memo(), buffer)(buffer.sample())
    with pytest.raises(InputError, match="'index'"):
        filled(memo(), buffer)(buffer.sample().exclude("index"))


@pytest.mark.parametrize("make_buffer", [plain_buffer, offline_buffer])
def test_progress_sees_every_call_of_the_prior(make_buffer):
    seen = []

    def progress(calls, total):
        for call in calls:
            seen.append((call, total))
            yield call

    bank = BaseActionBank(memo(), make_buffer(), num_actions=2, batch_size=12)
    bank.fill(progress)
    total = seen[0][1]
    assert [call for call, _ in seen] == list(range(total))
    assert total > 3
    with pytest.raises(InputError, match="progress did not go through"):
        BaseActionBank(memo(), make_buffer()).fill(lambda calls, total: iter(()))


def test_nan_behind_a_terminated_row_stands_for_nothing():
    tables = []
    for missing in (False, True):
        data = transitions(8)
        if missing:
            data["next", "terminated"] = data["next", "terminated"].clone()
            data["next", "terminated"][3] = True
            data["next", "observation"][3, 1] = torch.nan
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(8), batch_size=8)
        buffer.extend(data)
        tables.append(filled(memo(), buffer, num_actions=2)._actions)
    others = torch.arange(16) != 7  # s' of row 3
    assert torch.equal(tables[0][others], tables[1][others])
    torch.testing.assert_close(tables[1][7], tables[1][6], atol=0.01, rtol=0)
    data["next", "terminated"][3] = False
    buffer.extend(data)
    with pytest.raises(InputError, match="NaN or infinity"):
        filled(memo(), buffer, num_actions=2)
