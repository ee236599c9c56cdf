# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The online phase: each step acts once, stores what came, and hands out batches of old and new experience."""

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
from deflow_torchrl.data.union_buffer import OfflineOnlineReplayBuffer
from deflow_torchrl.errors import InputError
from deflow_torchrl.trainers.collection import OnlineExperience
from deflow_torchrl.trainers.update import UpdateStep

_log = logging.getLogger(__name__)

MakeExperience = Callable[[Callable[[TensorDictBase], torch.Tensor], Callable[[torch.Tensor], None]], OnlineExperience]
"""Makes the collection from where transitions go (``add``) and how faulty ones are forgotten (``discard``)."""


@dataclass(eq=False, repr=False)
class OnlinePhase:
    """Collection, union buffer and, with a frozen prior, the bank of its base actions.

    Nothing is made before :meth:`begin`, so that an offline phase costs no simulator.

    Args:
        buffer: the union of data set and experience.
        make_experience: see :data:`MakeExperience`.

    Keyword Args:
        bank: base actions of the prior, which is then frozen; trained on, if None.
        bank_file: where the bank's offline part is kept, so that a resumed run need not draw it again.
        bank_progress: wraps the drawing, see :meth:`BaseActionBank.fill`.
        reward_shift: added to the environment's rewards before they are stored, as the data's loader did to its own.
    """

    buffer: OfflineOnlineReplayBuffer
    make_experience: MakeExperience
    _: KW_ONLY
    bank: BaseActionBank | None = None
    bank_file: Path | None = None
    bank_progress: Callable[..., Any] | None = None
    reward_shift: float = 0.0

    def __post_init__(self) -> None:
        self._experience: OnlineExperience | None = None
        self._restored: dict[str, Any] | None = None
        # Finished episodes since the last row of metrics: return, length, success.
        self._ended: list[list[float]] = []
        self.largest_reward = 0.0

    @property
    def begun(self) -> bool:
        """Whether :meth:`begin` is done."""
        return self._experience is not None

    @property
    def restorable(self) -> bool:
        """Whether a checkpoint of this moment goes on exactly."""
        return self._experience is None or self._experience.restorable

    def begin(self, update: UpdateStep) -> None:
        """Draw the bank, freeze the prior and start acting. May be interrupted and called again."""
        if self.bank is not None:
            self._fill_bank(self.bank)
            if self._restored is not None:
                self.bank.load_state_dict(self._restored["bank"])
            update.freeze_prior()
        experience = self.make_experience(self._add, self.buffer.discard)
        if self._restored is not None:
            experience.load_state_dict(self._restored["experience"])
        if not experience.replayable:  # asked now: the simulator may fail later
            _log.warning(
                "the environment does not repeat itself: checkpoints fall on the end of an episode, or, with worker processes "
                "and longer collections, a resume cuts the running episodes short"
            )
        self._experience = experience

    def _fill_bank(self, bank: BaseActionBank) -> None:
        # A file of before the checkpoint that the phase begins from may be of another prior: of settings given up since.
        if self._restored is not None and self.bank_file is not None and self.bank_file.is_file():
            bank.load(self.bank_file)
            return
        bank.fill(progress=self.bank_progress)
        if self.bank_file is None:
            return
        try:
            bank.save(self.bank_file)
        except InputError as error:  # it only spares a resumed run some time
            _log.warning("%s: the base actions are not kept, a resumed run draws them again", error)

    def step(self) -> None:
        """Act once: one transition more in the buffer, unless the environment failed."""
        assert self._experience is not None
        outcome = self._experience.step()
        if outcome.episode_return is not None:
            self._ended.append([outcome.episode_return, float(outcome.length or 0), float(bool(outcome.success))])

    def _add(self, transition: TensorDictBase) -> torch.Tensor:
        if self.reward_shift:
            transition["next", "reward"] = transition["next", "reward"] + self.reward_shift
        self.largest_reward = max(self.largest_reward, float(transition["next", "reward"].abs().max()))
        index = self.buffer.extend(transition)
        if self.bank is not None:
            self.bank.extend(index)
        return index

    def sample(self) -> TensorDictBase:
        """A batch, with base actions where the prior is frozen."""
        batch = self.buffer.sample()
        return batch if self.bank is None or not self.begun else self.bank(batch)

    def metrics(self, batch: TensorDictBase | None) -> dict[str, float]:
        """What a row says of the online phase and of the step's last batch, if it had one.

        Statistics are of the episodes that ended since the row before.
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
        """Wall time the learner waited for experience."""
        return 0.0 if self._experience is None else self._experience.waiting_seconds

    def state_dict(self) -> dict[str, Any]:
        """Everything but the data set and the bank's part of it."""
        state: dict[str, Any] = {"buffer": self.buffer.state_dict(), "begun": self.begun, "counters": self.counters}
        state["largest_reward"] = self.largest_reward
        if self._experience is not None:
            state["experience"] = self._experience.state_dict()
            state["ended"] = [list(episode) for episode in self._ended]
            state["bank"] = None if self.bank is None else self.bank.state_dict()
        elif self._restored is not None:
            state |= {key: self._restored[key] for key in ("experience", "ended", "bank")} | {"begun": True}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; :meth:`begin` then goes on where it was.

        Raises:
            InputError: if the state is of another data set.
        """
        self.buffer.load_state_dict(state["buffer"])
        self.largest_reward = state["largest_reward"]
        if state["begun"]:
            self._restored = state
            self._ended = [list(episode) for episode in state["ended"]]

    def close(self) -> None:
        """End the collection's processes."""
        if self._experience is not None:
            self._experience.close()
