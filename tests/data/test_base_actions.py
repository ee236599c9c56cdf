"""Base actions drawn once: the prior's distribution, beside the right states, through kills and copies."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import DiffusionActor

from deflow_torchrl.data import BaseActionBank, TransitionDataset, TransitionReplayBuffer
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


BUFFERS = pytest.mark.parametrize("make_buffer", [plain_buffer, offline_buffer])


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
    turned = torch.stack([cos * action[:, 0] + sin * action[:, 1], cos * action[:, 1] - sin * action[:, 0]], -1) / radius
    angle = torch.arange(8) * torch.pi / 4
    modes = torch.cat([torch.stack([angle.cos(), angle.sin()], -1), torch.zeros(1, 2)])
    return turned, turned - modes[torch.cdist(turned, modes).argmin(1)]


@pytest.mark.parametrize("side", ["s", "s'"])
def test_the_banks_actions_are_distributed_as_fresh_ones_and_wrong_noise_is_noticed(side):
    buffer = plain_buffer(count=1000, capacity=1000)
    batch = buffer[:]
    batch["index"] = torch.arange(1000)
    states = (batch if side == "s" else batch["next"])["observation"]
    fresh = on_the_ring(states, ring().module(states))

    def compared(prior):
        held = filled(prior, buffer, num_actions=4)(batch.clone())
        held = on_the_ring(states, (held if side == "s" else held["next"])["base_action"])
        return [p_value(mine, theirs) for mine, theirs in zip(held, fresh, strict=True)]

    # A bank that gave a state another one's actions would lose the ring: it turns with the state.
    assert min(compared(ring())) > 0.05
    narrow = TensorDictModule(Narrow(), in_keys=["observation"], out_keys=["base_action"])
    assert min(compared(narrow)) < 0.01
