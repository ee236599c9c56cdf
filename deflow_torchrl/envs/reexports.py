# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A name of :mod:`deflow_torchrl.sources` that this package exports too. Nothing else in this room imports from there."""

from deflow_torchrl.sources.minari_env import make_minari_env  # noqa: F401
