# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""From a task's name to its transitions, whichever source they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.data.download import SPLITS, download_ogbench_dataset, manifest_entry, missing_file
from deflow_torchrl.data.files import FILE_ENDINGS, import_files
from deflow_torchrl.data.ogbench import is_ogbench_layout, load_ogbench_dataset, load_ogbench_file
from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import cache_home, data_root, dataset_path, file_sha256, folder_sha256
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
    """Load a task's transitions.

    Args:
        task: the task.

    Keyword Args:
        split: ``"train"`` or ``"val"``; only OGBench's sets have the latter.
        root: folder of OGBench's files; ``$DEFLOW_HOME/data`` by default.
        download: fetch what is missing, where the source has a remote.
        device: where the transitions are kept.
        memmap: keep them in memory-mapped files in ``$DEFLOW_HOME/prepared`` instead.

    Returns:
        The transitions; ``None`` for a validation split the source does not have.

    Raises:
        InputError: where the data cannot be found, read or used.
        MissingExtraError: where the source's extra is not installed.
    """
    folder = cache_home() / "prepared" if memmap else None
    kept: dict[str, Any] = {"memmap_dir": folder} if memmap else {"device": device}
    if task.source == "ogbench":
        try:
            dataset = load_ogbench_dataset(task.dataset, split=split, root=root, download=download, **kept)
        except InputError as error:
            raise _with_hint(error, task, root) from error
        path = dataset_path(parse_ogbench_name(task.dataset).dataset, data_root(root), split)
        dataset.about |= ogbench_provenance(path)
        return dataset
    if split == "val":
        return None
    if task.source == "minari":
        from deflow_torchrl.data.minari import load_minari_dataset

        return load_minari_dataset(task.dataset, download=download, rescale_actions=True, **kept)
    dataset = TransitionDataset.load(task.dataset)
    return dataset if memmap else dataset.to(device)


def have_task_data(
    task: Task, *, root: str | Path | None = None, download: bool = True, show_progress: bool = True
) -> None:
    """See that a task's data are on this machine, without loading them; what is missing is fetched.

    Args:
        task: the task.

    Keyword Args:
        root: folder of OGBench's files; ``$DEFLOW_HOME/data`` by default.
        download: fetch what is missing, where the source has a remote.
        show_progress: show progress bars on standard error.

    Raises:
        InputError: where the data cannot be found or fetched.
        MissingExtraError: where the source's extra is not installed.
    """
    if task.source == "ogbench":
        dataset = parse_ogbench_name(task.dataset).dataset
        missing = [
            path for path in (dataset_path(dataset, data_root(root), split) for split in SPLITS) if not path.is_file()
        ]
        try:
            if missing and not download:
                raise InputError(missing_file(missing[0], dataset))
            if missing:
                download_ogbench_dataset(dataset, data_root(root), show_progress=show_progress)
        except InputError as error:
            raise _with_hint(error, task, root) from error
    elif task.source == "minari":
        from deflow_torchrl.envs.minari import open_minari_dataset

        open_minari_dataset(task.dataset, download=download)
    else:
        TransitionDataset.load(task.dataset)  # maps its files and reads none


def load_any(
    name: str, *, root: str | Path | None = None, download: bool = True, allow_jumps: bool = False, images: bool = True
) -> tuple[TransitionDataset, Task | None]:
    """Load whatever a user names: a task, a data set, a folder made by ``deflow data import``, or a file.

    Args:
        name: a task's name (:func:`deflow_torchrl.tasks.get_task`), one of OGBench's sets (``cube-single-play``), a folder, an
            .npz in OGBench's layout (both without rewards, which belong to tasks), or another file with the usual names of
            columns (:func:`deflow_torchrl.data.import_files`).

    Keyword Args:
        root: folder of OGBench's files.
        download: fetch what is missing.
        allow_jumps: accept a file whose observations jump inside an episode.
        images: accept pictures for observations; a task that is known to have them is refused before it is loaded.

    Returns:
        The transitions, and the task if it was one.

    Raises:
        InputError: where nothing of that name can be found, read or used.
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
            return _ogbench_file(path), None
        return import_files([path], allow_jumps=allow_jumps), None
    if "/" in name and ":" not in name:
        raise InputError(f"{name} is no folder, and files end in {', '.join(FILE_ENDINGS)}")
    try:
        task = get_task(name)
    except InputError:
        published = _ogbench_set(name)
        if published is None:
            raise
        path = dataset_path(published, data_root(root), "train")
        if not path.is_file():
            if not download:
                raise InputError(missing_file(path, published)) from None
            download_ogbench_dataset(published, path.parent)
        return _ogbench_file(path), None
    if task.images and not images:
        raise InputError(f"{name} has images for observations; states are needed")
    found = load_task_data(task, root=root, download=download, memmap=task.source == "own")
    assert found is not None
    return found, task


def _ogbench_set(name: str) -> str | None:
    try:
        return ogbench_dataset_name(name)
    except InputError:
        return None


def _ogbench_file(path: Path) -> TransitionDataset:
    dataset = load_ogbench_file(path)
    dataset.about |= ogbench_provenance(path)
    return dataset


def reference_returns(task: Task) -> tuple[float, float] | None:
    """The returns (random policy, expert) a task's normalised scores are computed with; ``None`` where nobody knows them.

    A Minari set evaluated in another environment than its own has that environment's references, not the set's.
    """
    if task.source != "minari" or task.environment is None:
        return None
    from deflow_torchrl.envs.d4rl import reference_returns as known
    from deflow_torchrl.envs.minari import open_minari_dataset

    if task.environment != f"minari:{task.dataset}":
        return known(task.environment.rpartition(":")[2])  # gym:module:ID is the longest form
    dataset = open_minari_dataset(task.dataset)
    environment = dataset.env_spec
    return known(
        task.dataset, environment_id=None if environment is None else environment.id, metadata=dataset.storage.metadata
    )


def data_digest(task: Task, *, root: str | Path | None = None) -> str:
    """SHA-256 of a task's data: of OGBench's training file, of the files of a Minari set, of the columns of own data."""
    if task.source == "ogbench":
        return file_sha256(dataset_path(parse_ogbench_name(task.dataset).dataset, data_root(root), "train"))
    if task.source == "minari":
        from deflow_torchrl.envs.minari import open_minari_dataset

        return folder_sha256(Path(open_minari_dataset(task.dataset).spec.data_path), "*")
    return folder_sha256(Path(task.dataset), "*.bin")


def ogbench_provenance(path: Path) -> dict[str, Any]:
    """Where a file in OGBench's layout is from, by what lies beside it.

    Returns:
        ``provenance``: ``official`` (downloaded by this package, and unchanged since), what the description of a
        generated set says, or ``unknown``; ``made_by`` or ``url`` and ``sha256`` where they are known.
    """
    about = path.with_name(f"{path.stem.removesuffix('-val')}.json")
    if about.is_file():
        try:
            made = json.loads(about.read_text(encoding="utf-8"))
            return {
                "provenance": made["provenance"],
                "made_with": {"seed": made["seed"], "episodes": made["episodes"], **made["versions"]},
            }
        except (ValueError, KeyError, TypeError):
            return {"provenance": "unknown"}
    entry = manifest_entry(path)
    if entry is not None:
        return {"provenance": "official", "url": entry["url"], "sha256": entry["sha256"]}
    return {"provenance": "unknown"}


def _with_hint(error: InputError, task: Task, root: str | Path | None) -> InputError:
    """Point to a generated set of the right name, where the data folder itself has none."""
    if root is None and "no data file" in str(error):
        file = f"{parse_ogbench_name(task.dataset).dataset}.npz"
        for room, maker in (("generated", "deflow data generate"), ("demo", "the demo")):
            found = sorted(cache_home().glob(f"{room}/*/{file}"), key=lambda path: path.stat().st_size)
            if found:  # the largest
                return InputError(f"{error}; a set generated by {maker} lies in data_root={found[-1].parent}")
    return error
