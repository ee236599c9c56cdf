# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""LossModules: flow matching, refinement, TD critic, DeFlow, which is the three together, and the methods it is compared with."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
