# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""OGBench single-task data sets as a TorchRL replay buffer, read and relabelled by the ``ogbench`` package itself."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer, TensorStorage
from torchrl.data.datasets import register_dataset
from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from deflow_torchrl.data.download import download_ogbench_dataset, missing_file
from deflow_torchrl.data.schema import ROUNDING, transitions_from_arrays
from deflow_torchrl.envs.factory import import_ogbench, make_gym_env
from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import data_root, dataset_path, make_writable_folder

_REQUIRED = ("observations", "actions", "terminals")
_SIMULATOR_STATE = ("qpos", "qvel", "button_states")


def load_ogbench_transitions(
    dataset_id: str,
    *,
    root: str | os.PathLike[str] | None = None,
    split: Literal["train", "val"] = "train",
    download: bool = True,
) -> TensorDict:
    """Load one split of a single-task data set as validated transitions in memory (:mod:`deflow_torchrl.data.schema`).

    Rewards and masks are the task's, computed by the ``ogbench`` package on s; a transition is ``terminated`` where its
    mask is 0 and ``truncated`` where the trajectory ends otherwise.

    Args:
        dataset_id: for example ``cube-single-play-singletask-task2-v0``.

    Keyword Args:
        root: folder of NAME.npz and NAME-val.npz. Defaults to ``$DEFLOW_HOME/data``.
        split: ``"train"`` or ``"val"``.
        download: fetch missing files from OGBench's host or a mirror.

    Raises:
        InputError: on an unknown name, a missing or damaged file, no network, or data that fails validation.
    """
    name = parse_ogbench_name(dataset_id)
    if split not in ("train", "val"):
        raise InputError(f"split must be 'train' or 'val', got {split!r}")
    ogbench = import_ogbench()
    path = dataset_path(name.dataset, data_root(root), split)
    if not path.is_file():
        if not download:
            raise InputError(missing_file(path, name.dataset))
        download_ogbench_dataset(name.dataset, path.parent)
    with _readable(path):
        _check_archive(path)
        # add_info: the qpos (and button states) that rewards are computed from.
        dataset = ogbench.load_dataset(str(path), add_info=True)
    environment = make_gym_env(dataset_id)
    try:
        _check_fits(dataset, environment, path)
        from ogbench.relabel_utils import relabel_dataset

        relabel_dataset(name.environment_id, environment, dataset)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} does not fit {name.environment_id}: {' '.join(str(error).split())}") from error
    finally:
        environment.close()
    return transitions_from_arrays(
        observations=dataset["observations"],
        actions=dataset["actions"],
        next_observations=dataset["next_observations"],
        rewards=dataset["rewards"],
        masks=dataset["masks"],
        trajectory_ends=dataset["terminals"],
        source=str(path),
    )


def load_states_and_actions(path: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Read s ``[N, O]`` and a ``[N, A]`` of a file in OGBench's layout, without simulator, rewards or task.

    Rows that end a trajectory (``terminals``) are dropped as the ``ogbench`` package does: they have no successor.

    Raises:
        InputError: on a missing or damaged file, wrong types or shapes, NaN, or actions outside [-1, 1].
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"no data file {path}")
    with _readable(path):
        _check_archive(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            keep = np.asarray(archive["terminals"]) == 0
            observations, actions = archive["observations"], archive["actions"]
    if observations.ndim != 2:
        raise InputError(f"{path}: observations have shape {observations.shape}, expected one row of numbers a state")
    if not keep.any():
        raise InputError(f"{path} holds no transition: every row ends a trajectory")
    largest = float(np.abs(actions).max())
    if largest > 1 + ROUNDING:
        raise InputError(f"{path}: actions reach {largest:g}, outside [-1, 1]; rescale the actions to [-1, 1]")
    if observations.dtype.kind != "f":
        observations = observations.astype(np.float32)
    return torch.from_numpy(observations[keep]), torch.from_numpy(actions[keep])


class OGBenchExperienceReplay(TensorDictReplayBuffer):
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
        if device is not None and memmap_dir is not None:
            raise InputError("give device or memmap_dir, not both: memory-mapped transitions live on the CPU")
        transitions = load_ogbench_transitions(dataset_id, root=root, split=split, download=download)
        if memmap_dir is not None:
            folder = make_writable_folder(Path(memmap_dir).expanduser())
            transitions = transitions.memmap(str(folder))
        else:
            transitions = transitions.to(torch.device("cpu" if device is None else device))
        self.dataset_id = dataset_id
        super().__init__(
            storage=TensorStorage(transitions),
            sampler=RandomSampler() if sampler is None else sampler,
            writer=ImmutableDatasetWriter(),
            batch_size=batch_size,
            **kwargs,
        )


# After an import of this class, TorchRL's own load_dataset("ogbench:NAME") finds it.
register_dataset("ogbench", OGBenchExperienceReplay)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError, ValueError, OSError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read ({reason}); delete it and download or generate it again") from error


def _check_archive(path: Path) -> None:
    """Check what the ``ogbench`` loader would cast or broadcast without a word: types, lengths, finiteness."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        missing = [name for name in _REQUIRED if name not in archive.files]
        if missing:
            raise InputError(f"{path} has no array {', '.join(missing)}; it is not an OGBench data set")
        rows = None
        for name in (name for name in (*_REQUIRED, *_SIMULATOR_STATE) if name in archive.files):
            array = archive[name]
            if array.dtype.kind not in ("f" if name == "actions" else "fiub"):
                expected = "floating point in [-1, 1]" if name == "actions" else "real numbers"
                raise InputError(f"{path}: {name} has type {array.dtype}, expected {expected}")
            dimensions = {"actions": (2,), "terminals": (1,), "observations": (2, 4)}.get(name, (2,))
            if array.ndim not in dimensions:
                raise InputError(f"{path}: {name} has shape {array.shape}, expected {dimensions[0]} dimensions")
            if len(array) == 0:
                raise InputError(f"{path} holds no transition")
            rows = len(array) if rows is None else rows
            if len(array) != rows:
                raise InputError(f"{path}: {name} has {len(array)} rows, {_REQUIRED[0]} {rows}")
            finite = np.isfinite(array).reshape(rows, -1).all(1)
            if not finite.all():
                raise InputError(
                    f"{path}: {name} has a NaN or infinite value in row {int(finite.argmin())} of the file; "
                    "repair or drop that trajectory"
                )
            if name == "terminals" and not array[-1]:
                raise InputError(f"{path}: the last row does not end a trajectory (terminals); the file is cut short")


def _check_fits(dataset: dict[str, np.ndarray], environment: Any, path: Path) -> None:
    """Compare widths with the environment the policy will act in."""
    for name, space in (("observations", environment.observation_space), ("actions", environment.action_space)):
        if dataset[name].shape[1:] != space.shape:
            raise InputError(
                f"{path}: {name} have shape {dataset[name].shape[1:]}, the environment's are {space.shape}; "
                "the data belong to another environment"
            )
    if len(dataset["actions"]) == 0:
        raise InputError(f"{path} holds no transition: every row ends a trajectory")
    base = environment.unwrapped  # manipulation keeps the simulator's state as _data, locomotion as data
    state = (base._data if hasattr(base, "_data") else base.data).qpos.shape
    if "qpos" in dataset and dataset["qpos"].shape[1:] != state:
        raise InputError(f"{path}: qpos has {dataset['qpos'].shape[1]} columns, the environment's has {state[0]}")
