# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Checkpoints: plain tensors and numbers in one file, written beside and renamed, loaded without running anybody's code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import atomic_write

FORMAT = 1
_KEPT = 3


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``folder/step_NNNNNNNNN.pt`` atomically and drop all but the last three.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: gradient steps done.
        state: nested dictionaries and lists of tensors, numbers and strings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    with atomic_write(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
    for old in list_checkpoints(folder)[:-_KEPT]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def step_of(path: Path) -> int:
    """Gradient steps done when a checkpoint was written."""
    return int(path.stem.removeprefix("step_"))


def load_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a checkpoint with ``weights_only=True``: a pickled object in it is refused, never executed.

    Raises:
        InputError: if the file is missing, damaged, of another format or holds anything but data.
    """
    if path.exists() and not zipfile.is_zipfile(path):
        raise InputError(f"{path} is damaged or not a checkpoint of this program; it was not loaded")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint {path}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path} is damaged or not a checkpoint of this program; it was not loaded") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path} has checkpoint format {found}, this version reads {FORMAT}")
    return state
