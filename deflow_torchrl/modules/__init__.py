# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Networks and policies: the flow prior, the refinement and the actor that chains them; policies of other methods."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
