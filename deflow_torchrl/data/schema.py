# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One transition, one layout: TorchRL's TED, float32, checked once when loaded.

==============================  ==========  =======================================================================
entry                           shape       meaning
==============================  ==========  =======================================================================
``observation``                 ``[N, O]``  s, float32; images ``[N, H, W, C]`` uint8
``action``                      ``[N, A]``  a, float32, inside +-(1 - 1e-5)
``("next", "observation")``     ``[N, O]``  s'
``("next", "reward")``          ``[N, 1]``  r(s, a), float32
``("next", "terminated")``      ``[N, 1]``  bool: no bootstrap behind this transition
``("next", "truncated")``       ``[N, 1]``  bool: the trajectory was cut here, the bootstrap was not
``("next", "done")``            ``[N, 1]``  bool: terminated or truncated
==============================  ==========  =======================================================================
"""

from __future__ import annotations

ACTION_LIMIT = 1.0 - 1e-5
"""The reference clips the data's actions to +-(1 - 1e-5)."""

ROUNDING = 1e-6
"""How far rounding may take an action beyond its bound before it counts as outside."""

MIN_TRANSITIONS = 2
"""Fewer are taken for a mistake."""
