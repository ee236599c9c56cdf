"""The update, evaluation, checkpoints and the training loop."""

from __future__ import annotations

from deflow_torchrl._lazy import lazy_exports

_EXPORTS = {
    "Evaluator": ".evaluation",
    "EvaluationResult": ".evaluation",
    "MetricsLog": ".metrics",
    "OfflineTrainer": ".trainer",
    "TrainerSchedule": ".trainer",
    "UpdateStep": ".update",
    "load_checkpoint": ".checkpoint",
    "save_checkpoint": ".checkpoint",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
