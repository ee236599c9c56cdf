# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Offline transitions and online experience in one TorchRL replay buffer."""
