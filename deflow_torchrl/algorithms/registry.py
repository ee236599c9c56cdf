# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The methods by name: every file of this room that has an ``ALGORITHM``, and what others register."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path

from deflow_torchrl.algorithms.settings import Algorithm, MethodConfig
from deflow_torchrl.errors import InputError


def _found() -> dict[str, Algorithm]:
    modules = (
        importlib.import_module(f"{__package__}.{module.name}")
        for module in pkgutil.iter_modules([str(Path(__file__).parent)])
        if module.name not in _PARTS
    )
    algorithms = [module.ALGORITHM for module in modules]
    # DeFlow, which the package is about and which runs by default, before those it is compared with.
    return {algorithm.name: algorithm for algorithm in sorted(algorithms, key=lambda it: it.name != "deflow")}


_PARTS = ("alarms", "base", "diagnostics", "registry", "settings")
"""Files of this room that are no methods."""

ALGORITHMS: dict[str, Algorithm] = _found()


def register_algorithm(algorithm: Algorithm) -> None:
    """Make a method known by its name: ``algo=NAME`` of settings composed in this process.

    Args:
        algorithm: its name, settings and how to build it; see ``examples/extending_method.py``.

    Raises:
        InputError: if the name is taken by another method, or the settings are no
            :class:`~deflow_torchrl.algorithms.settings.MethodConfig` of that name.
    """
    if not (isinstance(algorithm.config, type) and issubclass(algorithm.config, MethodConfig)):
        raise InputError(f"the settings of {algorithm.name!r} are no MethodConfig, but {algorithm.config!r}")
    if algorithm.config().name != algorithm.name:
        raise InputError(f"the settings of {algorithm.name!r} call themselves {algorithm.config().name!r}")
    if ALGORITHMS.get(algorithm.name, algorithm) != algorithm:
        raise InputError(f"there is a method {algorithm.name!r} already; choose another name")
    ALGORITHMS[algorithm.name] = algorithm


def get_algorithm(name: str) -> Algorithm:
    """Look a method up.

    Raises:
        InputError: on an unknown name, with the nearest ones.
    """
    if name not in ALGORITHMS:
        near = difflib.get_close_matches(name, list(ALGORITHMS), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(ALGORITHMS)}"
        raise InputError(f"unknown method {name!r}; {hint}")
    return ALGORITHMS[name]
