# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""OGBench single-task data sets as a TorchRL replay buffer, relabelled by the ``ogbench`` package itself."""

from __future__ import annotations

import http.client
import os
import socket
import urllib.error
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchrl.data.datasets import register_dataset
from torchrl.data.replay_buffers.samplers import Sampler

from deflow_torchrl.data.archive import NpzArchive, readable
from deflow_torchrl.data.assembly import dataset_from_arrays
from deflow_torchrl.data.columns import chunks
from deflow_torchrl.data.dataset import TransitionDataset, TransitionReplayBuffer, to_storage
from deflow_torchrl.data.oracles import GENERATED_DATASETS
from deflow_torchrl.envs.factory import import_ogbench, make_env_by_id
from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import data_root, dataset_path, make_writable_folder

_REQUIRED = ("observations", "actions", "terminals")
_SIMULATOR_STATE = ("qpos", "qvel", "button_states")
_RELABELLED_ROWS = 1 << 17
_CONNECT_TIMEOUT_S = 20.0


def load_ogbench_dataset(
    dataset_id: str,
    *,
    root: str | os.PathLike[str] | None = None,
    split: Literal["train", "val"] = "train",
    download: bool = True,
    device: torch.device | str | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
) -> TransitionDataset:
    """Load one split of a single-task data set as validated transitions, each observation stored once.

    Rewards and masks are the task's, computed by the ``ogbench`` package on s; a transition is ``terminated`` where its
    mask is 0 and ``truncated`` where the trajectory ends otherwise. The file is read as a stream.

    Args:
        dataset_id: for example ``cube-single-play-singletask-task2-v0``.

    Keyword Args:
        root: folder of NAME.npz and NAME-val.npz. Defaults to ``$DEFLOW_HOME/data``.
        split: ``"train"`` or ``"val"``.
        download: fetch missing files from OGBench's host or a mirror.
        device: where the transitions are kept. Defaults to ``"cpu"``.
        memmap_dir: keep them in memory-mapped files in a folder of their own in this one instead, found again by later calls.

    Raises:
        InputError: on an unknown name, a missing or damaged file, no network, or data that fails validation.
    """
    name = parse_ogbench_name(dataset_id)
    if split not in ("train", "val"):
        raise InputError(f"split must be 'train' or 'val', got {split!r}")
    path = dataset_path(name.dataset, data_root(root), split)
    if not path.is_file():
        if not download:
            raise InputError(_missing(path, name.dataset))
        _download(name.dataset, path)
    status = path.stat()
    fingerprint = {
        "file": str(path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns, "task": dataset_id,
        "ogbench": version("ogbench"),
    }  # fmt: skip
    return to_storage(
        lambda folder: _read(path, name.environment_id, folder),
        fingerprint=fingerprint,
        device=device,
        memmap_dir=None if memmap_dir is None else Path(memmap_dir).expanduser() / f"{dataset_id}-{split}",
    )


class OGBenchExperienceReplay(TransitionReplayBuffer):
    """An OGBench single-task data set as an immutable replay buffer; ``rb[:]`` is the whole set in TED.

    Args:
        dataset_id: single-task name, for example ``cube-single-play-singletask-task2-v0``.

    Keyword Args:
        batch_size (int, optional): transitions per :meth:`sample`.
        root (path, optional): folder of NAME.npz and NAME-val.npz as the ``ogbench`` package writes and reads them.
            Defaults to ``$DEFLOW_HOME/data``.
        split (str, optional): ``"train"`` (default) or ``"val"``.
        download (bool, optional): fetch missing files from OGBench's host or a mirror. Defaults to ``True``.
        device (device, optional): where the transitions are kept, the learner's device. Defaults to ``"cpu"``.
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
        split: Literal["train", "val"] = "train",
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


# After an import of this class, TorchRL's own load_dataset("ogbench:NAME") finds it.
register_dataset("ogbench", OGBenchExperienceReplay)


def load_states_and_actions(path: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read s ``[N, O]`` and a ``[N, A]`` of a file in OGBench's layout, without simulator, rewards or task.

    Rows that end a trajectory (``terminals``) are dropped as the ``ogbench`` package does: they have no successor.

    Raises:
        InputError: on a missing or damaged file, wrong types or shapes, NaN, or actions outside [-1, 1].
    """
    path = Path(path).expanduser()
    with NpzArchive(path) as archive, readable(path):
        dataset = _assemble(archive, path, rewards=None, terminated=None, folder=None, allow_jumps=True)
    if dataset.observation.ndim != 2:
        raise InputError(
            f"{path}: observations have shape {tuple(dataset.observation.shape)}, expected a row of numbers a state"
        )
    transitions = dataset[:]
    return transitions["observation"], transitions["action"]


def _read(path: Path, environment_id: str, folder: Path | None) -> TransitionDataset:
    environment = make_env_by_id(
        environment_id.removeprefix("visual-")
    )  # pictures are of the same task; no renderer needed
    try:
        with NpzArchive(path) as archive, readable(path):
            _check_fits(archive, environment, path, images=environment_id.startswith("visual-"))
            try:
                rewards, terminated = _relabel(archive, environment_id, environment)
            except (KeyError, IndexError, ValueError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{path} does not fit {environment_id}: {' '.join(str(error).split())}") from error
            # Teleporters are the one thing in OGBench that moves a state at once; balls and falls are near it.
            walks = any(part in environment_id for part in ("maze", "soccer"))
            return _assemble(archive, path, rewards=rewards, terminated=terminated, folder=folder, allow_jumps=walks)
    finally:
        environment.close()


def _assemble(
    archive: NpzArchive,
    path: Path,
    *,
    rewards: np.ndarray | None,
    terminated: np.ndarray | None,
    folder: Path | None,
    allow_jumps: bool,
) -> TransitionDataset:
    _check_archive(archive, path)
    terminals = archive["terminals"][0 : archive["terminals"].shape[0]]
    if len(terminals) and not terminals[-1]:
        raise InputError(f"{path}: the last row does not end a trajectory (terminals); the file is cut short")
    if len(terminals) and terminals.all():
        raise InputError(f"{path} holds no transition: every row ends a trajectory")
    nothing = np.zeros(len(terminals), np.float32)
    return dataset_from_arrays(
        observations=archive["observations"],
        actions=archive["actions"],
        rewards=nothing if rewards is None else rewards,
        terminals=nothing if terminated is None else terminated,
        episode_ends=np.cumsum(terminals != 0) - (terminals != 0),
        final_observation_rows=True,
        allow_jumps=allow_jumps,
        source=str(path),
        folder=folder,
    )


def _relabel(archive: NpzArchive, environment_id: str, environment: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rewards ``[R]`` and flags (mask 0) ``[R]`` of every row of the file, by the package's own rules."""
    from ogbench.relabel_utils import relabel_dataset

    state = [name for name in _SIMULATOR_STATE if name in archive]
    rewards, terminated = [], []
    parts = zip(*(chunks(archive[name], rows=_RELABELLED_ROWS) for name in state), strict=True)
    for part in parts:
        labelled = {name: values for name, (_, values) in zip(state, part, strict=True)}
        relabel_dataset(environment_id, environment, labelled)
        rewards.append(labelled["rewards"])
        terminated.append(labelled["masks"] == 0)
    if not rewards:
        raise InputError(f"{archive.path} does not fit {environment_id}: it holds no simulator state (qpos)")
    return np.concatenate(rewards), np.concatenate(terminated)


def _missing(path: Path, dataset: str) -> str:
    generate = f", or make it with `deflow data generate {dataset}`" if dataset in GENERATED_DATASETS else ""
    return f"no data file {path}; put the published {path.name} there, or name its folder with data_root={generate}"


def _download(dataset: str, path: Path) -> None:
    folder = make_writable_folder(path.parent)
    ogbench = import_ogbench()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_CONNECT_TIMEOUT_S)  # the package's own download has none
    try:
        ogbench.download_datasets([dataset], str(folder))
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"{_missing(path, dataset)} (download failed: {reason})") from error
    finally:
        socket.setdefaulttimeout(timeout)
        for leftover in folder.glob(f"{dataset}*.npz.tmp"):
            leftover.unlink()


def _check_archive(archive: NpzArchive, path: Path) -> None:
    """Check types and lengths of what the package's loader would cast or broadcast without a word."""
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
    """Compare widths with the environment the policy will act in, and the simulator's state with its own."""
    _check_archive(archive, path)
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
