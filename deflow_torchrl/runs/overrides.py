# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""``key=value`` settings in Hydra's grammar: the reader that training, resuming and sweeps share, and its inverse."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deflow_torchrl.algorithms.registry import get_algorithm
from deflow_torchrl.errors import InputError, MissingExtraError, did_you_mean
from deflow_torchrl.runs.settings import (
    SettledConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    setting_names,
    with_run_defaults,
    with_task_defaults,
)


def compose_config(overrides: Sequence[str]) -> SettledConfig:
    """Compose and check the settings of a new run; those that are not given are the task's.

    Args:
        overrides: ``key=value`` as in Hydra.

    Raises:
        InputError: on an unknown setting (with the nearest name), a value of the wrong type or out of range, an unknown task,
            or a setting of the method that neither the task nor an override gives.
        MissingExtraError: without the ``cli`` extra.
    """
    methods = [text.removeprefix("algo=") for text in overrides if text.startswith("algo=")]
    base = TrainConfig(algo=get_algorithm(methods[-1] if methods else "deflow").config())
    return with_task_defaults(_on_top(base, read_overrides(overrides, base)))


def apply_overrides(config: TrainConfig, overrides: Sequence[str]) -> SettledConfig:
    """Put ``key=value`` overrides on top of the settings of a run, checked as :func:`compose_config` does.

    Raises:
        InputError: as ``compose_config``; on another method, which has other settings; and on another preset, which would
            change nothing, because every setting of a run has a value.
        MissingExtraError: without the ``cli`` extra.
    """
    if not overrides:
        return with_run_defaults(config)
    given = read_overrides(overrides, config)
    if given.get("preset", config.preset) != config.preset:
        raise InputError(
            f"preset={given['preset']}: a preset is for a new run; of this one change the settings themselves"
        )
    return _on_top(config, given)


def read_overrides(overrides: Sequence[str], base: TrainConfig) -> dict[str, Any]:
    """Read ``key=value`` settings with Hydra's grammar, converted to the types of the settings.

    Args:
        overrides: the settings; ``algo=NAME`` may only name the method of ``base``.
        base: the settings that interpolations (``${seed}``) refer to.

    Returns:
        Name, with ``algo.`` before a setting of the method, -> value, of the settings given. Ranges are not checked.

    Raises:
        InputError: on an unknown setting, another method, or a value that cannot be read or is of the wrong type.
        MissingExtraError: without the ``cli`` extra.
    """
    try:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "hydra", "cli") from error
    _check_names(overrides, base)
    values, names = OmegaConf.structured(base), []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            if override.is_sweep_override():
                raise InputError(f"{text!r} names several values; a run has one")
            name, value = override.key_or_group, override.value()
            if name != "algo":
                OmegaConf.update(values, name, value)
                names.append(name)
            elif value != base.algo.name:
                raise InputError(f"{text}: this run's method is {base.algo.name}; train another run with another one")
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot read {text!r}: {reason}; write key=value as in Hydra") from error
    given = {name: OmegaConf.select(values, name) for name in names}
    return {name: list(value) if OmegaConf.is_list(value) else value for name, value in given.items()}


def put(values: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Put settings by their names (``seed``, ``algo.lr``) into a dictionary as :func:`config_to_dict` gives it."""
    for name, value in settings.items():
        (values["algo"] if name.startswith("algo.") else values)[name.removeprefix("algo.")] = value


def override_value(value: Any) -> str:
    """A value as it stands behind ``key=``: text is quoted where Hydra's grammar would read something else.

    Examples:
        >>> [override_value(value) for value in ("data/arm", "my arm", "1", None, False, 3)]
        ['data/arm', "'my arm'", "'1'", 'null', 'false', '3']
    """
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    plain = re.fullmatch(r"(?:[A-Za-z_/]|\.{1,2}/)[\w./:-]*", value, re.ASCII)
    if plain and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    # In Hydra's grammar a backslash escapes only before a quote, the closing one too, and before an interpolation.
    escaped = re.sub(r"(\\*)('|\$(?=\{)|\Z)", lambda it: it[1] * 2 + ("\\" + it[2] if it[2] else ""), value)
    return f"'{escaped}'"


def _check_names(overrides: Sequence[str], base: TrainConfig) -> None:
    names = {override.partition("=")[0] for override in overrides}
    if {"seed", "seeds"} <= names:
        raise InputError("give seed= or seeds=, not both")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not a setting; write key=value, for example seed=1")
        if name.startswith(("+", "~")) or "@" in name:
            raise InputError(f"{override!r}: settings cannot be added or removed, only set")
        if name == "protocol":
            raise InputError(
                f"{override}: a protocol is a sweep's; deflow sweep {override} sets it, of any number of runs"
            )
        if name == "algo":
            get_algorithm(value)
        prefix = "algo." if name.startswith("algo.") else ""
        known = setting_names(type(base.algo) if prefix else TrainConfig)
        if name.removeprefix(prefix) not in known:
            raise InputError(f"unknown setting {name!r}; {did_you_mean(name, [prefix + it for it in known])}")


def _on_top(base: TrainConfig, given: Mapping[str, Any]) -> SettledConfig:
    values = config_to_dict(base)
    put(values, given)
    return config_from_dict(values)
