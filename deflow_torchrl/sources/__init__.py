# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Sources of transitions: OGBench, Minari, files of the user's own, and sources that other packages add."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
