# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The update, evaluation, checkpoints and the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports

if TYPE_CHECKING:  # what type checkers and editors see
    from deflow_torchrl.trainers.alarms import Alarm as Alarm
    from deflow_torchrl.trainers.alarms import Alarms as Alarms
    from deflow_torchrl.trainers.checkpoint import load_checkpoint as load_checkpoint
    from deflow_torchrl.trainers.checkpoint import save_checkpoint as save_checkpoint
    from deflow_torchrl.trainers.collection import OnlineExperience as OnlineExperience
    from deflow_torchrl.trainers.collection import OnlineStep as OnlineStep
    from deflow_torchrl.trainers.evaluation import EvaluationResult as EvaluationResult
    from deflow_torchrl.trainers.evaluation import Evaluator as Evaluator
    from deflow_torchrl.trainers.loop import Trainer as Trainer
    from deflow_torchrl.trainers.loop import TrainerSchedule as TrainerSchedule
    from deflow_torchrl.trainers.metrics import MetricsLog as MetricsLog
    from deflow_torchrl.trainers.online import OnlinePhase as OnlinePhase
    from deflow_torchrl.trainers.stacked import StackedTrainer as StackedTrainer
    from deflow_torchrl.trainers.stacked import StackedUpdate as StackedUpdate
    from deflow_torchrl.trainers.update import UpdateStep as UpdateStep

_EXPORTS = {
    "Alarm": ".alarms",
    "Alarms": ".alarms",
    "Evaluator": ".evaluation",
    "EvaluationResult": ".evaluation",
    "MetricsLog": ".metrics",
    "OnlinePhase": ".online",
    "Trainer": ".loop",
    "OnlineExperience": ".collection",
    "OnlineStep": ".collection",
    "StackedTrainer": ".stacked",
    "StackedUpdate": ".stacked",
    "TrainerSchedule": ".loop",
    "UpdateStep": ".update",
    "load_checkpoint": ".checkpoint",
    "save_checkpoint": ".checkpoint",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
