# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Task name to environment: OGBench single-task problems, and the environments of Minari sets."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
