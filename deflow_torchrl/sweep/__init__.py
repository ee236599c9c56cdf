# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Many runs by one command: every task with every method and seed, on this machine's cores or on a Ray cluster.

A sweep keeps no state of its own that matters: what is finished, begun or still to come is read from the run folders, so that
the same command goes on after any interruption, on any engine.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
