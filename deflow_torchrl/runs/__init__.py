# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Runs from settings to record: training, resuming, evaluating and comparing, of one seed or several at once."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
