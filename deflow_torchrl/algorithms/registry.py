# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The methods by name: those of this room, what other packages announce, and what is registered by a call."""

from __future__ import annotations

from deflow_torchrl.algorithms.settings import Algorithm, MethodConfig
from deflow_torchrl.errors import InputError
from deflow_torchrl.plugins import Registry

# DeFlow, which the package is about and which runs by default, comes first.
_NAMES = (
    "deflow",
    "bc",
    "cac",
    "calql",
    "deflow_floq",
    "dsrl",
    "fan",
    "fawac",
    "fbrac",
    "fedit",
    "floq",
    "flow_bc",
    "fql",
    "idql",
    "ifql",
    "iql",
    "qam",
    "qam_e",
    "qam_f",
    "rebrac",
    "rlpd",
    "srpo",
    "trqam",
)

ALGORITHMS: Registry[Algorithm] = Registry(
    Algorithm,
    "method",
    "deflow_torchrl.algorithms",
    {name: f"{__package__}.{name}:ALGORITHM" for name in _NAMES},
)


def register_algorithm(algorithm: Algorithm) -> None:
    """Make a method known by its name: ``algo=NAME`` of settings composed in this process.

    Other packages announce theirs as entry points of the group ``deflow_torchrl.algorithms``, name = module:attribute.

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
    ALGORITHMS.register(algorithm.name, algorithm)


def get_algorithm(name: str) -> Algorithm:
    """Look a method up.

    Raises:
        InputError: on an unknown name, with the nearest ones.
    """
    return ALGORITHMS.find(name)
