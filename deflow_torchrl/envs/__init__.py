# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Task name -> environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports

if TYPE_CHECKING:  # what type checkers and editors see
    from deflow_torchrl.envs.factory import make_env as make_env
    from deflow_torchrl.envs.factory import make_gym_env as make_gym_env

_EXPORTS = {"make_env": ".factory", "make_gym_env": ".factory"}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
