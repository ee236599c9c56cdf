"""Method name -> networks, loss and optimiser groups."""

from __future__ import annotations

from deflow_torchrl._lazy import lazy_exports

_EXPORTS = {
    "Algorithm": ".base",
    "Learner": ".base",
    "ALGORITHMS": ".registry",
    "get_algorithm": ".registry",
    "DeFlowConfig": ".settings",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
