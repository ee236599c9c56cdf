# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Returns to go of the transitions of a data set, and of experience when its trajectories end (Cal-QL)."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.data.schema import Rows
from deflow_torchrl.data.transitions import Transitions
from deflow_torchrl.errors import InputError

Tail = Literal["last_reward", "cut"]

UNKNOWN_RETURN = -1e9
"""Return to go of experience whose trajectory goes on: no lower bound of its value."""


class ReturnsToGo(Transitions):
    """A data set whose transitions hold ``mc_return [N, 1]`` too: G_t = r_t + gamma (1 - terminated_t) G_{t+1}.

    Args:
        base: the data set.

    Keyword Args:
        gamma: discount in [0, 1).
        tail: how a trajectory that is cut without an end of the task goes on. ``"last_reward"``: with its last reward for ever,
            G_T = r_T / (1 - gamma). ``"cut"``, the authors' rule: it stops there, but where every reward is the data's smallest
            one it has failed, and G = r / (1 - gamma) everywhere.

    Raises:
        InputError: on an unknown tail.

    Examples:
        >>> dataset = TransitionDataset.from_arrays(
        ...     observations=torch.zeros(4, 1), actions=torch.zeros(4, 1), rewards=-torch.ones(4), terminals=[0, 0, 0, 0],
        ...     timeouts=[0, 0, 0, 1], next_observations=torch.zeros(4, 1), allow_jumps=True)
        >>> ReturnsToGo(dataset, gamma=0.5)[:]["mc_return"].flatten()
        tensor([-2., -2., -2., -2.])
    """

    def __init__(self, base: TransitionDataset, *, gamma: float, tail: Tail = "last_reward") -> None:
        if tail not in get_args(Tail):
            raise InputError(f"tail={tail!r} is not one of {', '.join(get_args(Tail))}")
        self.base, self.gamma, self.tail = base, gamma, tail
        self._failing = float(base.reward.min())
        lengths = base.episode_lengths
        last = base.episode_starts + lengths - 1
        self.returns = torch.empty(len(base), device=base.device)
        failed = torch.ones_like(last, dtype=torch.bool)
        following = torch.zeros_like(last, dtype=torch.float32)
        for steps in range(int(lengths.max())):  # all trajectories at once, from their ends
            inside = steps < lengths
            rows = (last - steps)[inside]
            reward, terminated = base.read("reward", rows), base.read("terminated", rows)
            if steps == 0:  # a trajectory of one observation is not inside
                following[inside] = torch.where(terminated, 0.0, self._tail_value(reward))
            failed[inside] &= (reward == self._failing) & ~terminated
            following[inside] = reward + gamma * (~terminated) * following[inside]
            self.returns[rows] = following[inside]
        if tail == "cut":
            self.returns[failed.repeat_interleave(lengths)] = self._failing / (1 - gamma)

    def _tail_value(self, reward: torch.Tensor) -> torch.Tensor:
        """Return behind the last transition of a trajectory that was cut."""
        return reward / (1 - self.gamma) if self.tail == "last_reward" else torch.zeros_like(reward)

    def of_trajectory(self, reward: torch.Tensor, terminated: torch.Tensor) -> torch.Tensor:
        """Returns to go ``[n]`` of one trajectory's rewards ``[n]`` and ends of the task ``[n]``."""
        if self.tail == "cut" and bool((reward == self._failing).all()) and not bool(terminated.any()):
            return torch.full_like(reward, self._failing / (1 - self.gamma))
        returns, following = torch.empty_like(reward), self._tail_value(reward[-1])
        for step in range(len(reward) - 1, -1, -1):
            following = reward[step] + self.gamma * (~terminated[step]) * following
            returns[step] = following
        return returns

    def __len__(self) -> int:
        """Number of transitions."""
        return len(self.base)

    @property
    def device(self) -> torch.device:
        """Where the transitions are kept."""
        return self.base.device

    @property
    def num_episodes(self) -> int:
        """Trajectories of the set."""
        return self.base.num_episodes

    def gather(self, rows: torch.Tensor) -> Rows:
        """Copy the transitions ``rows``, int64 ``[n]`` on the set's device."""
        return self.base.gather(rows)

    def next_actions(self, rows: torch.Tensor) -> torch.Tensor:
        """As :meth:`TransitionDataset.next_actions`."""
        return self.base.next_actions(rows)

    def to(self, device: torch.device | str) -> ReturnsToGo:
        """Copy the set into the memory of ``device``."""
        return ReturnsToGo(self.base.to(device), gamma=self.gamma, tail=self.tail)

    def stacked(self, frame_stack: int) -> ReturnsToGo:
        """The same returns with observations of several frames."""
        return ReturnsToGo(self.base.stacked(frame_stack), gamma=self.gamma, tail=self.tail)

    def extras(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """``mc_return`` float32 ``[n, 1]``."""
        return {"mc_return": self.returns[rows].unsqueeze(-1)}

    def __repr__(self) -> str:
        return f"ReturnsToGo(gamma={self.gamma}, tail={self.tail!r}, of {self.base})"


class OnlineReturns:
    """Returns to go of experience ``[slots, 1]``: :data:`UNKNOWN_RETURN` until a trajectory ends.

    A trajectory is followed back over ``stride`` rows at a time while s' of the older row is s of the newer one; rows that were
    discarded by then, and those before them, are not of it.

    Args:
        rule: computes the returns of a trajectory.
        columns: of the experience: reward and flags as in :class:`~deflow_torchrl.data.schema.Rows`.

    Keyword Args:
        stride: distance of a transition to the one that follows it in its trajectory.
    """

    def __init__(self, rule: ReturnsToGo, columns: Rows, *, stride: int) -> None:
        self.rule, self.columns, self.stride = rule, columns, stride
        reward = columns.reward[0]
        self.values = torch.full_like(reward, UNKNOWN_RETURN)

    def written(self, slots: torch.Tensor, total: int, discarded: torch.Tensor) -> None:
        """Take note of transitions that were written into ``slots`` [n], the newest last, ``total`` ever."""
        device, number = self.values.device, len(self.values)
        self.values[slots.to(device)] = UNKNOWN_RETURN
        observation, next_observation = self.columns.frames
        reward, (terminated, _, done) = self.columns.reward[0, :, 0], self.columns.flags[..., 0]
        for age, slot in enumerate(reversed(slots.tolist())):
            if not bool(done[slot]):
                continue
            held = (min(total, number) - age - 1) // self.stride + 1  # this one and those before it in its stream
            rows = (slot - self.stride * torch.arange(held, device=device)) % number
            rows = _until(rows, done[rows[1:]] | torch.isin(rows[1:], discarded.to(device)))
            rows = _until(rows, (next_observation[rows[1:]] != observation[rows[:-1]]).flatten(1).any(1)).flip(0)
            self.values[rows, 0] = self.rule.of_trajectory(reward[rows], terminated[rows].bool())


def _until(rows: torch.Tensor, apart: torch.Tensor) -> torch.Tensor:
    """The rows before the first of ``rows[1:]`` that is ``apart``."""
    ends = apart.nonzero()
    return rows[: int(ends[0]) + 1] if len(ends) else rows


def with_returns(transitions: Transitions, *, gamma: float, tail: Tail) -> ReturnsToGo:
    """The data set with returns to go.

    Raises:
        InputError: for chunks of actions, whose returns are not computed.
    """
    if not isinstance(transitions, TransitionDataset):
        raise InputError("returns to go are those of single steps: train this method with chunk=1")
    return ReturnsToGo(transitions, gamma=gamma, tail=tail)
