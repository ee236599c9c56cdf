# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Many runs by one command: every task with every method and seed, on this machine's cores or on a Ray cluster.

Which jobs are finished, started or pending is read from the run folders. The same command therefore resumes a sweep after any
interruption, on any engine.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
