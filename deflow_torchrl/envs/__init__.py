"""Task name -> environment."""

from __future__ import annotations

from deflow_torchrl._lazy import lazy_exports

_EXPORTS = {"make_env": ".factory", "make_gym_env": ".factory"}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
