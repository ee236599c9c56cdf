# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Transitions in TorchRL's TED layout: from OGBench, Minari or own files, checked, stored once, described."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
