# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DeFlow for TorchRL: a flow prior, a trust-region refinement and a twin critic as LossModules and TensorDictModules."""

import sys

from lazy_loader import attach_stub

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
__all__ += ["__version__"]


def register() -> None:
    """Register this package's data sets with TorchRL, whose ``load_dataset("ogbench:NAME")`` knows them from then on."""
    from torchrl.data.datasets import register_dataset

    register_dataset("ogbench", "deflow_torchrl.sources.ogbench:OGBenchExperienceReplay", replace=True)


if "torchrl.data.datasets" in sys.modules:
    register()
