# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""OGBench single-task data sets as a TorchRL replay buffer, with rewards computed by the ``ogbench`` package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrl.data.replay_buffers.samplers import Sampler

from deflow_torchrl.data.columns import chunks
from deflow_torchrl.data.dataset import TransitionDataset, TransitionReplayBuffer, to_storage
from deflow_torchrl.envs.factory import import_ogbench, make_env_by_id
from deflow_torchrl.envs.names import OGBenchName, parse_ogbench_name
from deflow_torchrl.errors import InputError, one_line
from deflow_torchrl.paths import cache_home, data_root, dataset_path, file_sha256
from deflow_torchrl.sources.archive import NpzArchive, readable
from deflow_torchrl.sources.base import Source
from deflow_torchrl.sources.download import SPLITS, download_ogbench_dataset, manifest_entry, missing_file

_REQUIRED = ("observations", "actions", "terminals")
_SIMULATOR_STATE = ("qpos", "qvel", "button_states")
_RELABELLED_ROWS = 1 << 17
_OUT_OF_REACH = 20.0


def load_ogbench_dataset(
    dataset_id: str,
    *,
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    download: bool = True,
    device: torch.device | str | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
) -> TransitionDataset:
    """Load one split of a single-task data set as validated transitions.

    The ``ogbench`` package computes the task's rewards and masks from s. A transition is ``terminated`` where its mask is 0,
    and ``truncated`` where the trajectory ends otherwise. Each observation is stored once; the file is read as a stream.

    Args:
        dataset_id: for example ``cube-single-play-singletask-task2-v0``.

    Keyword Args:
        root: folder of NAME.npz and NAME-val.npz. Defaults to ``$DEFLOW_HOME/data``.
        split: ``"train"`` or ``"val"``.
        download: fetch missing files from OGBench's host or a mirror.
        device: device of the transitions. Defaults to ``"cpu"``.
        memmap_dir: keep the transitions in memory-mapped files in a subfolder of this folder instead; later calls use them
            again.

    Raises:
        InputError: on an unknown name, a missing or damaged file, no network, or data that fails validation.
    """
    name = parse_ogbench_name(dataset_id)
    if split not in ("train", "val"):
        raise InputError(f"split must be 'train' or 'val', got {split!r}")
    path = ogbench_file(name.dataset, root, split, download=download)
    status = path.stat()
    fingerprint = {
        "file": str(path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns, "task": dataset_id,
        "ogbench": version("ogbench"),
    }  # fmt: skip
    return to_storage(
        lambda folder: _read(path, name, folder),
        fingerprint=fingerprint,
        device=device,
        memmap_dir=None if memmap_dir is None else Path(memmap_dir).expanduser() / f"{dataset_id}-{split}",
    )


class OGBenchSource(Source):
    """OGBench's single-task sets; ``root`` holds their files."""

    fixed_environment = True

    def load(
        self, name: str, *, split: str = "train", root: str | Path | None = None, **options: Any
    ) -> TransitionDataset:
        """Load a split; ``about`` says where its file is from."""
        with _hint_at_generated(name, root):
            dataset = load_ogbench_dataset(name, split=split, root=root, **options)
        dataset.about |= ogbench_provenance(_path(name, root, split))
        return dataset

    def ensure(
        self, name: str, *, root: str | Path | None = None, download: bool = True, show_progress: bool = True
    ) -> None:
        """Fetch the files of both splits that are missing."""
        with _hint_at_generated(name, root):
            for split in SPLITS:
                ogbench_file(
                    parse_ogbench_name(name).dataset, root, split, download=download, show_progress=show_progress
                )

    def check_installed(self) -> None:
        """Check the extra ``ogbench``: its environments label the data with rewards, and evaluate."""
        import_ogbench()

    def digest(self, name: str, *, root: str | Path | None = None) -> str:
        """SHA-256 of the training file."""
        return file_sha256(_path(name, root, "train"))

    def environment(self, name: str) -> str:
        """The environment of the task."""
        return name

    def location(self, name: str, *, root: str | Path | None = None) -> Path | None:
        """``root``, where the user gave one."""
        return None if root is None else Path(root)


SOURCE = OGBenchSource()


def _path(name: str, root: str | os.PathLike[str] | None, split: str) -> Path:
    return dataset_path(parse_ogbench_name(name).dataset, data_root(root), split)


def ogbench_file(
    dataset: str,
    root: str | os.PathLike[str] | None,
    split: str = "train",
    *,
    download: bool = True,
    show_progress: bool = True,
) -> Path:
    """Path of one split of a published set; a missing file is fetched together with the other split.

    Args:
        dataset: name of the data files, for example ``cube-single-play-v0``.
        root: their folder. Defaults to ``$DEFLOW_HOME/data``.
        split: ``"train"`` or ``"val"``.

    Keyword Args:
        download: fetch what is missing.
        show_progress: show a progress bar on standard error.

    Raises:
        InputError: if the file is missing and cannot or must not be fetched.
    """
    path = dataset_path(dataset, data_root(root), split)
    if not path.is_file():
        if not download:
            raise InputError(missing_file(path, dataset))
        download_ogbench_dataset(dataset, path.parent, show_progress=show_progress)
    return path


@contextmanager
def _hint_at_generated(name: str, root: str | Path | None) -> Iterator[None]:
    """Where the data folder has no such file, name a generated set that has."""
    try:
        yield
    except InputError as error:
        if root is None and "no data file" in str(error):
            file = f"{parse_ogbench_name(name).dataset}.npz"
            for room, maker in (("generated", "deflow data generate"), ("demo", "the demo")):
                found = sorted(cache_home().glob(f"{room}/*/{file}"), key=lambda path: path.stat().st_size)
                if found:  # the largest
                    raise InputError(
                        f"{error}; a set generated by {maker} lies in data_root={found[-1].parent}"
                    ) from error
        raise


def ogbench_provenance(path: Path) -> dict[str, Any]:
    """Find out where a file in OGBench's layout is from, by the files beside it.

    Returns:
        ``provenance``: ``official`` (downloaded by this package, and unchanged since), what the description of a
        generated set says, or ``unknown``; ``made_by`` or ``url`` and ``sha256`` where they are known.
    """
    about = path.with_name(f"{path.stem.removesuffix('-val')}.json")
    if about.is_file():
        with suppress(ValueError, KeyError, TypeError):
            made = json.loads(about.read_text(encoding="utf-8"))
            made_with = {"seed": made["seed"], "episodes": made["episodes"], **made["versions"]}
            return {"provenance": made["provenance"], "made_with": made_with}
    elif (entry := manifest_entry(path)) is not None:
        return {"provenance": "official", "url": entry["url"], "sha256": entry["sha256"]}
    return {"provenance": "unknown"}


class OGBenchExperienceReplay(TransitionReplayBuffer):
    """An OGBench single-task data set as an immutable replay buffer; ``rb[:]`` is the whole set in TED.

    TorchRL's ``load_dataset("ogbench:NAME")`` gives the same after ``deflow_torchrl.register()``.

    Args:
        dataset_id: single-task name, for example ``cube-single-play-singletask-task2-v0``.

    Keyword Args:
        batch_size (int, optional): transitions per :meth:`sample`.
        root (path, optional): folder of NAME.npz and NAME-val.npz as the ``ogbench`` package writes and reads them.
            Defaults to ``$DEFLOW_HOME/data``.
        split (str, optional): ``"train"`` (default) or ``"val"``.
        download (bool, optional): fetch missing files from OGBench's host or a mirror. Defaults to ``True``.
        device (device, optional): device of the transitions, best the learner's. Defaults to ``"cpu"``.
        memmap_dir (path, optional): keep the transitions in memory-mapped files in this folder instead; excludes ``device``.
        sampler (Sampler, optional): defaults to uniform with replacement, as in the paper.
        **kwargs: forwarded to :class:`torchrl.data.TensorDictReplayBuffer` (``transform``, ``prefetch``, ``pin_memory``...).

    Raises:
        InputError: on an unknown name, a missing or damaged file, no network, or data that fails validation.

    Examples:
        >>> rb = OGBenchExperienceReplay("cube-single-play-singletask-task2-v0", batch_size=256)  # doctest: +SKIP
        >>> rb.sample()["next", "reward"].shape  # doctest: +SKIP
        torch.Size([256, 1])
    """

    def __init__(
        self,
        dataset_id: str,
        *,
        batch_size: int | None = None,
        root: str | os.PathLike[str] | None = None,
        split: str = "train",
        download: bool = True,
        device: torch.device | str | None = None,
        memmap_dir: str | os.PathLike[str] | None = None,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        self.dataset_id = dataset_id
        dataset = load_ogbench_dataset(
            dataset_id, root=root, split=split, download=download, device=device, memmap_dir=memmap_dir
        )
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, **kwargs)


def is_ogbench_layout(path: Path) -> bool:
    """Whether an .npz file has OGBench's arrays: the simulator's state, from which rewards are computed, but no rewards.

    Raises:
        InputError: if it is missing or damaged.
    """
    with NpzArchive(path) as archive:
        return all(name in archive for name in (*_REQUIRED, "qpos")) and "rewards" not in archive


def load_ogbench_file(path: str | os.PathLike[str]) -> TransitionDataset:
    """Load states and actions of a file in OGBench's layout, without simulator or task: every reward is 0.

    Rows that end a trajectory (``terminals``) hold its final observation, as the ``ogbench`` package has it.

    Raises:
        InputError: on a missing or damaged file, wrong types or shapes, NaN, or actions outside [-1, 1].
    """
    path = Path(path).expanduser()
    with _archive(path) as archive:
        nothing = np.zeros(archive["terminals"].shape, np.float32)
        dataset = _assemble(archive, rewards=nothing, terminated=nothing, allow_jumps=True)
    dataset.about |= {"rewards": "none in the file: each task computes its own", **ogbench_provenance(path)}
    return dataset


@contextmanager
def _archive(path: Path) -> Iterator[NpzArchive]:
    with NpzArchive(path) as archive, readable(path):
        _check_archive(archive, path)
        yield archive


def _read(path: Path, name: OGBenchName, folder: Path | None) -> TransitionDataset:
    # Rewards of a visual task are those of the same task with states, whose environment needs no renderer.
    environment = make_env_by_id(name.state_environment_id)
    from ogbench.manipspace.envs.manipspace_env import ManipSpaceEnv

    from deflow_torchrl.envs.seeding import without_precision_warnings

    try:
        with _archive(path) as archive:
            with without_precision_warnings():
                _check_fits(archive, environment, path, images=name.images)
            try:
                rewards, terminated = _relabel(archive, name.state_environment_id, environment)
            except (KeyError, IndexError, ValueError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{path} does not fit {name.environment_id}: {one_line(error)}") from error
            # In mazes, teleporters and kicked balls jump: a jump is reported, not refused. For arms the largest possible step
            # was not measured; _OUT_OF_REACH times the usual largest step is certainly too far.
            jumps = _OUT_OF_REACH if isinstance(environment.unwrapped, ManipSpaceEnv) else True
            return _assemble(archive, rewards=rewards, terminated=terminated, allow_jumps=jumps, folder=folder)
    finally:
        environment.close()


def _assemble(archive: NpzArchive, *, rewards: np.ndarray, terminated: np.ndarray, **options: Any) -> TransitionDataset:
    terminals = archive["terminals"][0 : archive["terminals"].shape[0]]
    if not terminals[-1]:
        raise InputError(f"{archive.path}: the last row does not end a trajectory (terminals); the file is cut short")
    if terminals.all():
        raise InputError(f"{archive.path} holds no transition: every row ends a trajectory")
    return TransitionDataset.from_arrays(
        archive["observations"],
        archive["actions"],
        rewards,
        terminated,
        episode_ends=np.cumsum(terminals != 0) - (terminals != 0),
        final_observation_rows=True,
        source=str(archive.path),
        **options,
    )


def _relabel(archive: NpzArchive, environment_id: str, environment: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rewards ``[R]`` and flags (mask 0) ``[R]`` of every row of the file, by the package's own rules."""
    from ogbench.relabel_utils import relabel_dataset

    state = [name for name in _SIMULATOR_STATE if name in archive]
    rewards, masks = [], []
    for part in zip(*(chunks(archive[name], rows=_RELABELLED_ROWS) for name in state), strict=True):
        labelled = {name: values for name, (_, values) in zip(state, part, strict=True)}
        relabel_dataset(environment_id, environment, labelled)
        rewards.append(labelled["rewards"])
        masks.append(labelled["masks"])
    if not rewards:
        raise InputError(f"{archive.path} does not fit {environment_id}: it holds no simulator state (qpos)")
    return np.concatenate(rewards), np.concatenate(masks) == 0


def _check_archive(archive: NpzArchive, path: Path) -> None:
    """Check types and lengths of arrays, which the ``ogbench`` package would silently cast or broadcast."""
    missing = [name for name in _REQUIRED if name not in archive]
    if missing:
        raise InputError(f"{path} has no array {', '.join(missing)}; it is not an OGBench data set")
    rows = archive["observations"].shape[:1]
    for name in (name for name in (*_REQUIRED, *_SIMULATOR_STATE) if name in archive):
        column = archive[name]
        if column.dtype.kind not in ("f" if name == "actions" else "fiub"):
            expected = "floating point in [-1, 1]" if name == "actions" else "real numbers"
            raise InputError(f"{path}: {name} has type {column.dtype}, expected {expected}")
        dimensions = {"actions": (2,), "terminals": (1,), "observations": (2, 4)}.get(name, (2,))
        if len(column.shape) not in dimensions:
            raise InputError(f"{path}: {name} has shape {column.shape}, expected {dimensions[0]} dimensions")
        if column.shape[0] == 0:
            raise InputError(f"{path} holds no transition")
        if column.shape[:1] != rows:
            raise InputError(f"{path}: {name} has {column.shape[0]} rows, {_REQUIRED[0]} {rows[0]}")


def _check_fits(archive: NpzArchive, environment: Any, path: Path, *, images: bool) -> None:
    """Compare the widths of observations, actions and simulator state with the environment's."""
    spaces = {"actions": environment.action_space} | ({} if images else {"observations": environment.observation_space})
    for name, space in spaces.items():
        if archive[name].shape[1:] != space.shape:
            raise InputError(
                f"{path}: {name} have shape {archive[name].shape[1:]}, the environment's are {space.shape}; "
                "the data belong to another environment"
            )
    if images and (archive["observations"].dtype != np.uint8 or len(archive["observations"].shape) != 4):
        raise InputError(
            f"{path}: observations must be uint8 images [N, H, W, C]; the data belong to another environment"
        )
    environment.reset(seed=0)  # builds the simulator
    base = environment.unwrapped  # manipulation keeps the simulator's state as _data, locomotion as data
    state = (base._data if hasattr(base, "_data") else base.data).qpos.shape
    if "qpos" in archive and archive["qpos"].shape[1:] != state:
        raise InputError(f"{path}: qpos has {archive['qpos'].shape[1]} columns, the environment's has {state[0]}")
    for name in (name for name in _SIMULATOR_STATE if name in archive):
        for begin, part in chunks(archive[name]):
            finite = np.isfinite(part).all(1)
            if not finite.all():
                raise InputError(
                    f"{path}: {name} has a NaN or infinite value in row {begin + int(finite.argmin())} of the file; "
                    "repair or drop that trajectory"
                )
