# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Versions of what a result or a data set depends on."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata

_PACKAGES = (
    "deflow-torchrl", "torch", "torchrl", "tensordict", "numpy", "gymnasium", "mujoco", "ogbench", "minari",
    "gymnasium-robotics",
)  # fmt: skip


def package_versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, and of ``more``; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def extension_fault() -> str | None:
    """Why TorchRL's compiled extension, which ``PrioritizedSampler`` needs, does not load; None if it does.

    A wheel of torchrl loads beside the minor version of torch it was compiled against, which its metadata do not say: that of
    torchrl 0.14.1 was tried, and samples, with torch 2.14.1.
    """
    import torch

    try:
        importlib.import_module("torchrl._torchrl")
    except ImportError:
        return (
            f"torchrl's compiled extension, which PrioritizedSampler needs, does not load: torchrl {metadata.version('torchrl')} "
            f"was not compiled against torch {torch.__version__}; torchrl 0.14.1 with torch 2.14.1 works"
        )
    return None
