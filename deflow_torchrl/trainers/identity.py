# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What a checkpoint belongs to: the run's task, method, versions, data and settings, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deflow_torchrl import __version__
from deflow_torchrl.errors import InputError
from deflow_torchrl.versions import package_versions

# Settings that change neither weights nor rows of metrics. Threads are not among them: their number can move the last digit
# of a matrix product.
NEUTRAL_SETTINGS = frozenset(
    {"out", "data_root", "download", "eval_workers", "logger", "save_interval", "updates_per_replay", "self_check"}
)
# Packages whose versions can move a digit of networks or simulators.
_PACKAGES = ("torch", "torchrl", "tensordict", "numpy", "gymnasium", "mujoco", "ogbench", "gymnasium-robotics")
_FIXED = ("task", "algo", "version", "data_sha256")


def run_identity(settings: Mapping[str, Any], *, data_sha256: str | None) -> dict[str, Any]:
    """What a checkpoint of this run says it belongs to.

    Args:
        settings: all settings of the run, as :func:`deflow_torchrl.config.config_to_dict` gives them.

    Keyword Args:
        data_sha256: digest of the offline data.

    Returns:
        ``task``, ``algo``, ``version`` of this package, ``data_sha256``, ``settings`` and the ``packages``' versions.
    """
    versions = package_versions()
    return {
        "task": settings["task"],
        "algo": settings["algo"]["name"],
        "version": __version__,
        "data_sha256": data_sha256,
        "settings": dict(settings),
        "packages": {name: versions[name] for name in _PACKAGES if name in versions},
    }


def check_identity(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise InputError if a checkpoint is of another task, method, version or data than this run, listing what differs.

    Versions of this package are one for a checkpoint if they agree up to the patch number: a patch release changes neither
    what a checkpoint holds nor the numbers that follow from it. Settings are compared by :func:`changed_settings`.

    Args:
        path: the checkpoint, for the message.
        theirs: the checkpoint's identity.
        ours: this run's; what it leaves out (None too) is not compared.
    """
    compared = [key for key in _FIXED if ours.get(key) is not None]
    differing = [key for key in compared if _comparable(key, theirs.get(key)) != _comparable(key, ours[key])]
    if differing:
        lines = [f"{key} {theirs.get(key, 'unknown')} there, {ours[key]} here" for key in differing]
        raise InputError(f"{path} is of another run ({'; '.join(lines)}); it was not loaded")


def changed_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs between two identities' settings and packages, one ``name: theirs -> ours`` each, in our order.

    Settings that can change no result (:data:`NEUTRAL_SETTINGS`) are left out.

    Examples:
        >>> old = {"settings": {"seed": 0, "out": "a", "algo": {"lr": 0.001}}}
        >>> changed_settings(old, {"settings": {"seed": 1, "out": "b", "algo": {"lr": 0.001}}})
        ['seed: 0 -> 1']
    """
    changes = []
    for group, neutral in (("settings", NEUTRAL_SETTINGS), ("packages", frozenset[str]())):
        before, after = dict(_flat(theirs.get(group, {}))), dict(_flat(ours.get(group, {})))
        for name in dict.fromkeys([*after, *before]):
            if name not in neutral and before.get(name) != after.get(name):
                changes.append(f"{name}: {before.get(name)} -> {after.get(name)}")
    return changes


def _comparable(key: str, value: Any) -> Any:
    return ".".join(str(value).split(".")[:2]) if key == "version" else value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value
