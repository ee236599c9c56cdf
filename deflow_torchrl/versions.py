# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Versions of what a result or a data set depends on."""

from __future__ import annotations

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
