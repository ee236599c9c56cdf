# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The methods by name."""

from __future__ import annotations

from collections.abc import Mapping

from deflow_torchrl.algorithms.base import Algorithm
from deflow_torchrl.algorithms.deflow import DEFLOW
from deflow_torchrl.errors import InputError

ALGORITHMS: Mapping[str, Algorithm] = {algorithm.name: algorithm for algorithm in (DEFLOW,)}


def get_algorithm(name: str) -> Algorithm:
    """Look a method up.

    Raises:
        InputError: on an unknown name.
    """
    if name not in ALGORITHMS:
        raise InputError(f"unknown method {name!r}; there are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
