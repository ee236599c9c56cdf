# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The loop around training steps, of one run or of several at once: signals wait for the step, what is whole is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from deflow_torchrl.errors import NonFiniteLossError
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.trainers.interrupts import Interrupts

if TYPE_CHECKING:
    from deflow_torchrl.trainers.trainer import TrainerSchedule


class TrainingLoop(ABC):
    """Takes steps until there are as many as the schedule has; a step is trained, then evaluated, then finished.

    Steps at which nothing is due may be trained several at once.

    A step is trained and finished without interruption: Ctrl-C comes before, after, or in an evaluation.

    Attributes:
        schedule: how many steps there are.
        step: steps trained so far.
        show_progress: show a progress bar on standard error.
    """

    schedule: TrainerSchedule
    step: int
    show_progress: bool

    def run(self) -> None:
        """Train from the current step to ``schedule.steps``."""
        bar = progress_bar(
            total=self.schedule.steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not self.show_progress,
        )
        with bar, Interrupts() as interrupts:
            try:
                while self.unfinished or self.step < self.schedule.steps:
                    if not self.unfinished:
                        self._prepare_step()
                        with interrupts.deferred():
                            before = self.step
                            self._train_step()
                            bar.update(self.step - before)
                    self.evaluate_step()
                    with interrupts.deferred():
                        self._finish_step()
            except NonFiniteLossError:
                raise
            except (KeyboardInterrupt, Exception):
                # A failed evaluation costs its own time, never the steps before it.
                with interrupts.deferred():
                    self._save_what_is_whole()
                raise
            finally:
                self._close()

    @property
    @abstractmethod
    def unfinished(self) -> bool:
        """Whether the current step is trained but not yet evaluated and written."""

    @abstractmethod
    def evaluate_step(self) -> None:
        """Evaluate, if the current step is to be evaluated."""

    @abstractmethod
    def _train_step(self) -> None:
        """Train one step, or several up to the next one at which something is due."""

    @abstractmethod
    def _finish_step(self) -> None:
        """Write the step's row of metrics and, where one is due, a checkpoint."""

    @abstractmethod
    def _save_what_is_whole(self) -> None:
        """Save before an error or Ctrl-C ends the run."""

    def _prepare_step(self) -> None:  # noqa: B027 # most have nothing to prepare
        """What may be interrupted before a step."""

    def _close(self) -> None:  # noqa: B027
        """End what runs beside the loop."""
