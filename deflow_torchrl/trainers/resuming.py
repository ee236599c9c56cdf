# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Whether a run may go on from a checkpoint, and from which: the rules of ``deflow resume``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deflow_torchrl.errors import InputError
from deflow_torchrl.trainers.checkpoint import list_checkpoints, read_header, step_of
from deflow_torchrl.trainers.identity import changed_settings, check_identity, run_identity

# What the experience and the base actions of a running online phase were made with.
_FIXED_ONLINE = ("offline_steps", "freeze_prior", "base_actions", "env", "seed", "collector_workers", "overwrite")


def find_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """The checkpoint to go on from: the one of ``step``, else the last; None where there is none yet.

    Raises:
        InputError: if there is none of ``step``.
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
    """Compare the settings to go on with to those the run has had so far.

    Args:
        settings: what the run is to go on with.

    Keyword Args:
        saved: what the run folder keeps, which is compared where there is no checkpoint yet.
        checkpoint: what it goes on from.
        config_file: the run folder's settings, for messages.
        force: go on although settings differ.

    Returns:
        What differs, one ``name: theirs -> ours`` each; empty without ``force``.

    Raises:
        InputError: on another task, method or version; on settings that differ, without ``force``; on numbers of steps that
            the checkpoint has passed, and on settings that an online phase is built on, once it has begun.
    """
    ours = run_identity(settings, data_sha256=None)
    if checkpoint is None:
        source, step, theirs = config_file, 0, run_identity(saved, data_sha256=None)
    else:
        header = read_header(checkpoint)
        source, step, theirs = checkpoint, header["step"], header["identity"]
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
    """Remove the checkpoints after the step a run goes on from: they are of a course that is given up."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            path.unlink(missing_ok=True)


def _check_steps(done: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if done > theirs.get("offline_steps", done):
        fixed = [name for name in _FIXED_ONLINE if theirs.get(name) != ours.get(name)]
        drawn = [settings.get("algo", {}).get("flow_steps") for settings in (theirs, ours)]
        if ours.get("freeze_prior") and drawn[0] != drawn[1]:
            raise InputError(
                f"algo.flow_steps: {drawn[0]} -> {drawn[1]}: cannot change any more, the frozen prior's base actions are drawn"
            )
        if fixed:
            lines = "; ".join(f"{name}: {theirs.get(name)} -> {ours.get(name)}" for name in fixed)
            raise InputError(f"{lines}: cannot change any more, the run is in its online phase (step {done})")
    steps = ours["offline_steps"] + ours.get("online_steps", 0)
    if done > steps:
        raise InputError(f"the run is at step {done} already, past the {steps} it is to have; choose an older --step")
