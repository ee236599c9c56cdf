# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Resuming a run: which checkpoint, under which rules (those of ``deflow resume``), and the history over interruptions."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deflow_torchrl import __version__
from deflow_torchrl.algorithms.registry import get_algorithm
from deflow_torchrl.errors import InputError
from deflow_torchrl.trainers.checkpoint import check_identity, list_checkpoints, read_header, step_of
from deflow_torchrl.versions import package_versions

# Settings that change neither weights nor metrics. The number of threads is not among them: it can change the last digit of
# a matrix product.
NEUTRAL_SETTINGS = frozenset(
    {
        "out",
        "data_root",
        "download",
        "eval_workers",
        "logger",
        "save_interval",
        "updates_per_replay",
        "self_check",
        "video",
    }
)
# Packages whose versions can change digits of networks or simulators.
_PACKAGES = ("torch", "torchrl", "tensordict", "numpy", "gymnasium", "mujoco", "ogbench", "gymnasium-robotics")
# Settings that the experience and the base actions of a running online phase depend on.
_FIXED_ONLINE = ("offline_steps", "freeze_prior", "base_actions", "env", "seed", "collector_workers", "overwrite")


def run_identity(settings: Mapping[str, Any], *, data_sha256: str | None) -> dict[str, Any]:
    """Return the identity of a run, which its checkpoints hold.

    Args:
        settings: all settings of the run, as :func:`deflow_torchrl.runs.settings.config_to_dict` gives them.

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


def changed_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """List the differences between two identities' settings and packages, as ``name: theirs -> ours``, in our order.

    :data:`NEUTRAL_SETTINGS`, which can change no result, are left out.

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


def find_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """Find the checkpoint to resume from: that of ``step``, else the last; None if there is none yet.

    Raises:
        InputError: if there is no checkpoint of ``step``.
    """
    kept = list_checkpoints(folder)
    if step is None:
        return kept[-1] if kept else None
    for path in kept:
        if step_of(path) == step:
            return path
    steps = ", ".join(str(step_of(path)) for path in kept) or "none"
    raise InputError(f"{folder} has no checkpoint of step {step}; it has {steps}")


def check_resumable(
    settings: Mapping[str, Any], *, saved: Mapping[str, Any], checkpoint: Path | None, config_file: Path, force: bool
) -> list[str]:
    """Compare the settings to resume with to those of the run so far.

    Args:
        settings: the settings to resume with.

    Keyword Args:
        saved: the settings in the run folder, compared if there is no checkpoint yet.
        checkpoint: the checkpoint to resume from.
        config_file: the run folder's file of settings, for messages.
        force: resume although settings differ.

    Returns:
        The differences, as ``name: theirs -> ours``; empty without ``force``.

    Raises:
        InputError: on another task, method or version; on different settings, without ``force``; on fewer steps than the
            checkpoint has; and, once the online phase has begun, on changes of settings it depends on.
    """
    ours = run_identity(settings, data_sha256=None)
    if checkpoint is None:
        source, step, theirs = config_file, 0, run_identity(saved, data_sha256=None)
    else:
        header = read_header(checkpoint)
        source, step, theirs = checkpoint, header["step"], header["identity"]
        # Settings that came after the checkpoint's version are those that the run folder's settings were completed with.
        settled = theirs.get("settings", {})
        algo = {"algo": saved["algo"] | settled.get("algo", {})} if "algo" in saved else {}
        theirs = {**theirs, "settings": {**saved, **settled, **algo}}
    check_identity(source, theirs, ours)
    changes = changed_settings(theirs, ours)
    if changes and not force:
        raise InputError(
            f"settings differ from those of {source}: {'; '.join(changes)}; put them back, or go on with the new ones with "
            "--force"
        )
    _check_steps(step, theirs.get("settings", {}), settings)
    return changes


def drop_later_checkpoints(folder: Path, step: int) -> None:
    """Remove the checkpoints of steps after the one that a run is resumed from."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            path.unlink(missing_ok=True)


class RunHistory:
    """Commands, wall times and processor time of a run over all its interruptions.

    Args:
        commands: the commands so far, the present one last.

    Keyword Args:
        seconds: wall time of phases before this process.

    Attributes:
        commands: every command that worked on the run, in order. Of a killed process, the time up to its last checkpoint is
            counted.
    """

    def __init__(self, commands: Sequence[str], *, seconds: Mapping[str, float] | None = None) -> None:
        self.commands = list(commands)
        self._seconds = dict(seconds or {})
        self._running: dict[str, float] = {}
        self._cpu = _cpu_seconds()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the block's wall time as ``phase``."""
        self._running[phase] = time.perf_counter()
        try:
            yield
        finally:
            self._seconds, self._cpu = self.seconds, _cpu_seconds()
            del self._running[phase]

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by phase, running phases included, and ``cpu``: processor time since the run's beginning."""
        now, total = time.perf_counter(), dict(self._seconds)
        for phase, began in self._running.items():
            total[phase] = total.get(phase, 0.0) + now - began
        total["cpu"] = total.get("cpu", 0.0) + _cpu_seconds() - self._cpu
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"commands": list(self.commands), "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add the commands and times of a checkpoint to those of this process, whose command stays the last."""
        self.commands = [*state["commands"], self.commands[-1]]
        for phase, seconds in state["seconds"].items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds


def _cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _check_steps(done: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if done > theirs.get("offline_steps", done):
        fixed = [name for name in _FIXED_ONLINE if theirs.get(name) != ours.get(name)]
        for name in get_algorithm(ours["algo"]["name"]).config.prior_settings if ours.get("freeze_prior") else ():
            before, after = theirs["algo"].get(name), ours["algo"].get(name)
            if before != after:
                raise InputError(
                    f"algo.{name}: {before} -> {after}: cannot change any more, the frozen prior's base actions are drawn"
                )
        if fixed:
            lines = "; ".join(f"{name}: {theirs.get(name)} -> {ours.get(name)}" for name in fixed)
            raise InputError(f"{lines}: cannot change any more, the run is in its online phase (step {done})")
    elif done > ours["offline_steps"]:
        raise InputError(
            f"offline_steps={ours['offline_steps']}: the run has trained {done} steps offline already; give at least as many, or "
            "choose an older --step"
        )
    steps = ours["offline_steps"] + ours.get("online_steps", 0)
    if done > steps:
        raise InputError(f"the run is at step {done} already, past the {steps} it is to have; choose an older --step")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value
