"""A control task whose optimum is known: a point goes round a disc, on either side, to a goal behind it.

A policy that averages the data's two ways is stopped by the disc. The driver that made the data is slow, and every tenth move has
a random direction. The score is the mean discounted return over that of the shortest way: 1 cannot be exceeded.

    python -m tests.support.obstacle 0,1        scores for seeds 0 and 1 of every method, whole and with each fault
"""

import math
import sys
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from tensordict import TensorDict

from deflow_torchrl.algorithms import ProblemSpec, get_algorithm
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.data.dataset import TransitionReplayBuffer
from deflow_torchrl.errors import NonFiniteLossError
from deflow_torchrl.modules.best_of_n import BestOfNModel
from deflow_torchrl.modules.critics import TwinCritic
from deflow_torchrl.objectives import terms
from deflow_torchrl.objectives.base import OffPolicyLoss
from deflow_torchrl.objectives.implicit_q import ImplicitQLoss
from deflow_torchrl.trainers import UpdateStep

STEP, RADIUS, GOAL_RADIUS, GAMMA, LIMIT = 1.2, 0.3, 0.35, 0.7, 8
_TANGENT = math.sqrt(1 - RADIUS**2)
SHORTEST = 2 * _TANGENT + RADIUS * (math.pi - 2 * math.acos(RADIUS)) - GOAL_RADIUS
OPTIMUM = GAMMA ** (math.ceil(SHORTEST / STEP) - 1)


def starts(number, generator):
    height = 0.2 * torch.rand(number, generator=generator) - 0.1
    return torch.stack([-torch.ones(number), height], -1)


def step(position, action):
    """Next position, and whether the goal is reached; a move that would cross the disc is not made."""
    move = STEP * action / action.norm(dim=-1, keepdim=True).clamp(min=1)
    nearest = (-(position * move).sum(-1) / move.square().sum(-1).clamp(min=1e-12)).clamp(0, 1)
    blocked = (position + nearest.unsqueeze(-1) * move).norm(dim=-1) < RADIUS
    following = torch.where(blocked.unsqueeze(-1), position, position + move)
    return following, (following - torch.tensor([1.0, 0.0])).norm(dim=-1) < GOAL_RADIUS


def logged(episodes=300, seed=0):
    """Transitions of a driver who chooses a side at random, and at every step his speed anew."""
    generator = torch.Generator().manual_seed(seed)
    position = starts(episodes, generator)
    side = torch.where(torch.rand(episodes, generator=generator) < 0.5, -1.0, 1.0)
    rows = {
        name: [[] for _ in range(episodes)] for name in ("observations", "actions", "rewards", "terminals", "timeouts")
    }
    alive = torch.ones(episodes, dtype=torch.bool)
    for time in range(LIMIT):
        passed = position[:, 0] > -0.05
        aim = torch.where(
            passed.unsqueeze(-1), torch.tensor([1.0, 0.0]), torch.stack([torch.zeros_like(side), 0.65 * side], -1)
        )
        heading = torch.nn.functional.normalize(aim - position, dim=-1)
        speed = 0.3 + 0.7 * torch.rand(episodes, 1, generator=generator)
        lost = torch.rand(episodes, 1, generator=generator) < 0.1
        heading = torch.where(
            lost, torch.nn.functional.normalize(torch.randn(episodes, 2, generator=generator), dim=-1), heading
        )
        action = (heading * speed + 0.05 * torch.randn(episodes, 2, generator=generator)).clamp(-1, 1)
        following, reached = step(position, action)
        for episode in alive.nonzero().flatten().tolist():
            ended = bool(reached[episode])
            values = (
                position[episode].tolist(),
                action[episode].tolist(),
                float(ended),
                ended,
                time == LIMIT - 1 and not ended,
            )
            for column, value in zip(rows.values(), values, strict=True):
                column[episode].append(value)
        alive &= ~reached
        position = following
    return {name: np.concatenate([np.asarray(value) for value in columns]) for name, columns in rows.items()}


def logged_score():
    """The driver's own score."""
    arrays = logged()
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
    lengths = np.diff(ends, prepend=-1)
    return float((GAMMA ** (lengths - 1) * arrays["rewards"][ends]).mean()) / OPTIMUM


@torch.no_grad()
def score(policy, episodes=256, seed=1):
    generator = torch.Generator().manual_seed(seed)
    position = starts(episodes, generator)
    total, alive = torch.zeros(episodes), torch.ones(episodes, dtype=torch.bool)
    for time in range(LIMIT):
        action = policy(TensorDict(observation=position, batch_size=[episodes]))["action"]
        position, reached = step(position, action)
        total += GAMMA**time * (alive & reached)
        alive &= ~reached
    return float(total.mean()) / OPTIMUM


PROBLEM = ProblemSpec(observation_dim=2, action_dim=2, hidden_dims=(64, 64), gamma=GAMMA, reward_range=(0.0, 1.0))
_FAST = {"lr": 1e-2, "tau": 0.05, "flow_steps": 5}
SETTINGS = {
    "deflow": {**_FAST, "target_divergence": 0.1},
    "fql": {**_FAST, "alpha": 0.3},
    "ifql": {**_FAST, "lr": 3e-3, "num_samples": 16},
    "floq": {
        **_FAST,
        "lr": 5e-3,
        "tau": 0.1,
        "alpha": 0.3,
        "noise_samples": 1,
        "critic_steps": 2,
        "noise_coverage": 0.02,
    },
    "flow_bc": {"lr": 1e-2, "flow_steps": 5},
}


def train(method, *, seed, updates=300):
    """Train a method on the driver's transitions; its learner."""
    algorithm, dataset = get_algorithm(method), TransitionDataset.from_arrays(**logged(), allow_jumps=True)
    torch.manual_seed(seed)
    learner = algorithm.build(algorithm.config(**SETTINGS[method]), PROBLEM)
    update, buffer = UpdateStep(learner), TransitionReplayBuffer(dataset, batch_size=256)
    for _ in range(updates):
        update(buffer.sample())
    return learner


def _descend_q(scale):
    return lambda *arguments: -scale(*arguments)


def _no_q(scale):
    return lambda *arguments: 0 * scale(*arguments)


def _unfrozen(values):
    return lambda self, state, *, target=False, frozen=False: values(self, state, target=target)


def _stay(following):
    return lambda self, state: following(self, state).set("observation", state["observation"])


def _backwards(flow_matching):
    def loss(velocity, action, noise, *others):
        return flow_matching(lambda x, time: -velocity(x, time), action, noise, *others)

    return loss


def _regress_through_q(term):
    def value_term(self, state):
        qvalue, value = self.critics.values(state).amin(0), self._value(state)
        return self._reduce(terms.expectile_regression(qvalue - value, self.expectile), state), value.detach()

    return value_term


_TARGET_OF_S = "the target's value is that of s, not of s'"
_EVERY = {
    "the flow's velocity has the other sign": (terms, "flow_matching", _backwards),
    _TARGET_OF_S: (OffPolicyLoss, "_next", _stay),
}
_ACTORS = {
    "the actor descends Q": (OffPolicyLoss, "_q_scale", _descend_q),
    "the actor has no gradient of Q": (OffPolicyLoss, "_q_scale", _no_q),
    "the actor's gradient reaches the critics": (TwinCritic, "values", _unfrozen),
}
_CHOOSERS = {
    "the worst of N acts": (BestOfNModel, "rank", _descend_q),
    "the value's gradient reaches the critics": (ImplicitQLoss, "_value_term", _regress_through_q),
}
# Faults that this task does not show for every seed: N actions of a bad flow are as good to choose from here, and whether a move
# reaches the goal tells much of its value already.
UNSEEN = {
    "deflow": (_TARGET_OF_S,),
    "fql": (_TARGET_OF_S,),
    "ifql": ("the flow's velocity has the other sign", "the value's gradient reaches the critics"),
    "floq": (_TARGET_OF_S,),
}
FAULTS = {method: {**_EVERY, **(_CHOOSERS if method == "ifql" else _ACTORS)} for method in UNSEEN}


def main():
    """Print the scores of every method, whole and with each fault."""
    seeds = [int(seed) for seed in sys.argv[1].split(",")]
    for method in sys.argv[2:] or SETTINGS:
        for fault, place in {"whole": None, **FAULTS.get(method, {})}.items():
            scores = []
            for seed in seeds:
                with faulty(place):
                    try:
                        scores.append(f"{score(train(method, seed=seed).policy):.2f}")
                    except NonFiniteLossError:
                        scores.append("diverges")
            sys.stdout.write(f"{method}, {fault}: {', '.join(scores)}\n")
            sys.stdout.flush()


@contextmanager
def faulty(place):
    if place is None:
        yield
        return
    owner, name, broken = place
    with mock.patch.object(owner, name, broken(getattr(owner, name))):
        yield


if __name__ == "__main__":
    main()
