# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The online phase: act once a step, store the transition, and sample batches of old and new experience."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from deflow_torchrl.data.base_actions import BaseActionBank
from deflow_torchrl.data.union.buffer import OfflineOnlineReplayBuffer
from deflow_torchrl.errors import InputError
from deflow_torchrl.trainers.collection import OnlineExperience
from deflow_torchrl.trainers.update import UpdateStep

_log = logging.getLogger(__name__)

MakeExperience = Callable[[Callable[[TensorDictBase], torch.Tensor], Callable[[torch.Tensor], None]], OnlineExperience]
"""Makes the collection from two functions: ``add`` stores a transition, ``discard`` removes faulty ones."""


@dataclass(eq=False, repr=False)
class OnlinePhase:
    """Collection, union buffer and, with a frozen prior, the bank of its base actions.

    Environments are made by :meth:`begin`, so that the offline phase needs no simulator.

    Args:
        buffer: the union of data set and experience.
        make_experience: see :data:`MakeExperience`.

    Keyword Args:
        bank: base actions of the prior, which is then frozen; if None the prior is trained further.
        bank_file: file for the bank's offline part, so that a resumed run need not draw it again.
        bank_progress: progress bar of the drawing, see :meth:`BaseActionBank.fill`.
        reward_shift: added to the environment's rewards before they are stored, as the data's loader did to its own.
        reward_weight: sum of the discounts in a stored reward: 1, or that of the steps of a chunk.
    """

    buffer: OfflineOnlineReplayBuffer
    make_experience: MakeExperience
    _: KW_ONLY
    bank: BaseActionBank | None = None
    bank_file: Path | None = None
    bank_progress: Callable[..., Any] | None = None
    reward_shift: float = 0.0
    reward_weight: float = 1.0

    def __post_init__(self) -> None:
        self._experience: OnlineExperience | None = None
        self._restored: dict[str, Any] | None = None
        # Finished episodes since the last row of metrics: return, length, success.
        self._ended: list[list[float]] = []
        self.largest_reward = 0.0
        self._postponed = 0  # updates that are due when the running episode ends
        self._episode_over = False

    @property
    def begun(self) -> bool:
        """Whether :meth:`begin` has been called."""
        return self._experience is not None

    @property
    def restorable(self) -> bool:
        """Whether a run can continue exactly from a checkpoint written now."""
        return self._experience is None or self._experience.restorable

    def begin(self, update: UpdateStep) -> None:
        """Draw the bank, freeze the prior and start acting; may be interrupted and called again."""
        if self.bank is not None:
            self._fill_bank(self.bank)
            if self._restored is not None:
                self.bank.load_state_dict(self._restored["bank"])
            update.freeze_prior()
        experience = self.make_experience(self._add, self.buffer.discard)
        try:
            if self._restored is not None:
                experience.load_state_dict(self._restored["experience"])
            replayable = experience.replayable  # measured now: the simulator may fail later
        except BaseException:
            experience.close()
            raise
        if not replayable:
            _log.warning(
                "the environment does not repeat itself: checkpoints fall on the end of an episode, or, with worker processes "
                "and longer collections, a resume cuts the running episodes short"
            )
        self._experience = experience

    def _fill_bank(self, bank: BaseActionBank) -> None:
        # Without a restored state, a file from an earlier process may belong to another prior.
        if self._restored is not None and self.bank_file is not None and self.bank_file.is_file():
            bank.load(self.bank_file)
            return
        bank.fill(progress=self.bank_progress)
        if self.bank_file is None:
            return
        try:
            bank.save(self.bank_file)
        except InputError as error:  # the file only saves time
            _log.warning("%s: the base actions are not kept, a resumed run draws them again", error)

    def step(self) -> None:
        """Act once and store the transition, unless the environment failed."""
        assert self._experience is not None
        outcome = self._experience.step()
        self._episode_over = outcome.fault or outcome.episode_return is not None
        if outcome.episode_return is not None:
            self._ended.append([outcome.episode_return, float(outcome.length or 0), float(bool(outcome.success))])

    def updates_of_ended_episodes(self, due: int, *, last: bool) -> int:
        """Postpone ``due`` updates to the end of the running episode; those to make now: all at the run's ``last`` step."""
        self._postponed += due
        if not (self._episode_over or last):
            return 0
        now, self._postponed = self._postponed, 0
        return now

    def _add(self, transition: TensorDictBase) -> torch.Tensor:
        if self.reward_shift:
            transition["next", "reward"] = transition["next", "reward"] + self.reward_shift * self.reward_weight
        largest = float(transition["next", "reward"].abs().max()) / self.reward_weight
        self.largest_reward = max(self.largest_reward, largest)
        index = self.buffer.extend(transition)
        if self.bank is not None:
            self.bank.extend(index)
        return index

    def sample(self) -> TensorDictBase:
        """Sample a batch, with base actions if the prior is frozen."""
        batch = self.buffer.sample()
        return batch if self.bank is None or not self.begun else self.bank(batch)

    def metrics(self, batch: TensorDictBase | None) -> dict[str, float]:
        """Compute a row's metrics of the online phase and of the step's last batch, if there is one.

        Statistics are over the episodes that ended since the last row.
        """
        assert self._experience is not None
        row = {f"online/{name}": float(value) for name, value in self._experience.counters.items()}
        if self._ended:
            returns, lengths, successes = np.array(self._ended).T
            row |= {
                "online/return": float(returns.mean()),
                "online/length": float(lengths.mean()),
                "online/success": float(successes.mean()),
            }
            self._ended = []
        if batch is not None:
            row["train/online_share"] = float(self.buffer.is_online(batch["index"]).float().mean())
        return row

    @property
    def counters(self) -> dict[str, int]:
        """Episodes, faults, restarts and environment steps so far."""
        if self._experience is not None:
            return dict(self._experience.counters)
        return {} if self._restored is None else dict(self._restored["counters"])

    @property
    def waiting_seconds(self) -> float:
        """Wall time for which the learner waited for transitions."""
        return 0.0 if self._experience is None else self._experience.waiting_seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the state, without the data set and the bank's offline part."""
        state: dict[str, Any] = {"buffer": self.buffer.state_dict(), "begun": self.begun, "counters": self.counters}
        state |= {"largest_reward": self.largest_reward, "postponed": self._postponed}
        if self._experience is not None:
            state["experience"] = self._experience.state_dict()
            state["ended"] = [list(episode) for episode in self._ended]
            state["bank"] = None if self.bank is None else self.bank.state_dict()
        elif self._restored is not None:
            state |= {key: self._restored[key] for key in ("experience", "ended", "bank")} | {"begun": True}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a result of :meth:`state_dict`; :meth:`begin` then continues from it.

        Raises:
            InputError: if the state belongs to another data set.
        """
        self.buffer.load_state_dict(state["buffer"])
        self.largest_reward = state["largest_reward"]
        self._postponed = state.get("postponed", 0)
        if state["begun"]:
            self._restored = state
            self._ended = [list(episode) for episode in state["ended"]]

    def close(self) -> None:
        """Close the environments and end the processes."""
        if self._experience is not None:
            self._experience.close()
