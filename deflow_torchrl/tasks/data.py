# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Load the transitions of a task, or of a set, folder or file that a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import cache_home
from deflow_torchrl.sources.base import get_source
from deflow_torchrl.sources.files import import_files
from deflow_torchrl.sources.ogbench import is_ogbench_layout, load_ogbench_file, ogbench_file
from deflow_torchrl.sources.tables import FILE_ENDINGS
from deflow_torchrl.tasks.registry import Task, get_task, ogbench_dataset_name


def load_task_data(
    task: Task,
    *,
    split: Literal["train", "val"] = "train",
    root: str | Path | None = None,
    download: bool = True,
    device: torch.device | str = "cpu",
    memmap: bool = False,
) -> TransitionDataset | None:
    """Load a task's transitions from its source.

    Args:
        task: the task.

    Keyword Args:
        split: ``"train"`` or ``"val"``; only OGBench's sets have the latter.
        root: folder of OGBench's files; ``$DEFLOW_HOME/data`` by default.
        download: fetch what is missing, if the source has a remote.
        device: device of the transitions.
        memmap: keep the transitions in memory-mapped files in ``$DEFLOW_HOME/prepared`` instead.

    Returns:
        The transitions; ``None`` for a validation split that the source does not have.

    Raises:
        InputError: if the data cannot be found, read or used.
        MissingExtraError: if the source's extra is not installed.
    """
    kept: dict[str, Any] = {"memmap_dir": cache_home() / "prepared"} if memmap else {"device": device}
    dataset = get_source(task.source).load(task.dataset, split=split, root=root, download=download, **kept)
    if dataset is None or task.reward == "task":
        return dataset
    sparse = -(dataset.reward != 0).to(dataset.reward.dtype)
    return dataset.with_rewards(sparse, about={"reward": f"{task.reward}: {task.reward_meaning}"})


def load_any(
    name: str, *, root: str | Path | None = None, download: bool = True, allow_jumps: bool = False, images: bool = True
) -> tuple[TransitionDataset, Task | None]:
    """Load what a user names: a task, a data set, a folder made by ``deflow data import``, or a file.

    Args:
        name: a task's name (:func:`deflow_torchrl.tasks.get_task`), one of OGBench's sets (``cube-single-play``), a folder, an
            .npz in OGBench's layout (both without rewards, which belong to tasks), or another file with the usual names of
            columns (:func:`deflow_torchrl.data.import_files`).

    Keyword Args:
        root: folder of OGBench's files.
        download: fetch what is missing.
        allow_jumps: accept a file whose observations jump inside an episode.
        images: accept image observations; otherwise a task that is known to have them is refused before it is loaded.

    Returns:
        The transitions, and the task if the name is one.

    Raises:
        InputError: if nothing of that name can be found, read or used.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(path.glob("*.npz"))
        if inside and not (path / "dataset.json").is_file():
            raise InputError(
                f"{path} holds files; name one of them, for example {inside[0]}, or a task with --data-root {path}"
            )
        return TransitionDataset.load(path), None
    if path.suffix.lower() in FILE_ENDINGS:
        if path.suffix.lower() == ".npz" and is_ogbench_layout(path):
            return load_ogbench_file(path), None
        return import_files([path], allow_jumps=allow_jumps), None
    if "/" in name and ":" not in name:
        raise InputError(f"{name} is no folder, and files end in {', '.join(FILE_ENDINGS)}")
    try:
        task = get_task(name)
    except InputError as error:
        try:
            published = ogbench_dataset_name(name)
        except InputError:
            raise error from None
        return load_ogbench_file(ogbench_file(published, root, download=download)), None
    if task.images and not images:
        raise InputError(f"{name} has images for observations; states are needed")
    found = get_source(task.source).load(task.dataset, root=root, download=download)
    assert found is not None
    return found, task


def reference_returns(task: Task) -> tuple[float, float] | None:
    """Returns of (random policy, expert) for a task's normalised scores; ``None`` if they are unknown."""
    if task.environment is None:
        return None
    return get_source(task.source).reference_returns(task.dataset, task.environment)
