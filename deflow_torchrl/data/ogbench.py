"""OGBench single-task data sets as a TorchRL replay buffer, read and relabelled by the ``ogbench`` package itself."""

from __future__ import annotations

import os
import socket
import urllib.error
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from deflow_torchrl.data.schema import transitions_from_arrays
from deflow_torchrl.envs.factory import import_ogbench, make_gym_env
from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import data_root, dataset_path, make_writable_folder

_ARRAYS = ("observations", "actions", "terminals")
_CONNECT_TIMEOUT_S = 20.0


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
        download: fetch missing files from OGBench's host.

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
            raise InputError(_missing(path, name.dataset))
        _download(name.dataset, path)
    with _readable(path):
        _check_archive(path)
        # add_info: the qpos (and button states) that rewards are computed from.
        dataset = ogbench.load_dataset(str(path), add_info=True)
    if len(dataset["actions"]) == 0:
        raise InputError(f"{path} holds no transition")
    environment = make_gym_env(dataset_id)
    try:
        from ogbench.relabel_utils import relabel_dataset

        relabel_dataset(name.environment_id, environment, dataset)
    except (KeyError, IndexError) as error:
        raise InputError(f"{path} does not fit {name.environment_id}: {error!r}") from error
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


class OGBenchExperienceReplay(TensorDictReplayBuffer):
    """An OGBench single-task data set as an immutable replay buffer; ``rb[:]`` is the whole set in TED.

    Args:
        dataset_id: single-task name, for example ``cube-single-play-singletask-task2-v0``.

    Keyword Args:
        batch_size (int, optional): transitions per :meth:`sample`.
        root (path, optional): folder of NAME.npz and NAME-val.npz as the ``ogbench`` package writes and reads them.
            Defaults to ``$DEFLOW_HOME/data``.
        split (str, optional): ``"train"`` (default) or ``"val"``.
        download (bool, optional): fetch missing files from OGBench's host. Defaults to ``True``.
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


def _missing(path: Path, dataset: str) -> str:
    return (
        f"no data file {path}; put the published {path.name} there, name its folder with data_root=, "
        f"or run `deflow demo` to generate a small {dataset} set"
    )


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
    # numpy names neither the file nor the missing array; allow_pickle=False refuses objects instead of running them.
    # Opened here: numpy leaks the file it opened itself when the archive turns out to be damaged.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        missing = [name for name in _ARRAYS if name not in archive.files]
        if missing:
            raise InputError(f"{path} has no array {', '.join(missing)}; it is not an OGBench data set")
        rows = {name: len(archive[name]) for name in archive.files}
        if min(rows.values()) == 0:
            raise InputError(f"{path} holds no transition")
        if len(set(rows.values())) != 1:
            raise InputError(f"{path}: arrays differ in length: {rows}")
        shapes = {name: archive[name].ndim for name in ("observations", "actions")}
        if archive["actions"].dtype.kind != "f" or shapes["actions"] != 2:
            raise InputError(
                f"{path}: actions have type {archive['actions'].dtype} and {shapes['actions']} dimensions, "
                "expected floating point [N, A]"
            )
        if not bool(archive["terminals"][-1]):
            raise InputError(f"{path}: the last row does not end a trajectory (terminals); the file is cut short")


def _download(dataset: str, path: Path) -> None:
    folder = make_writable_folder(path.parent)
    ogbench = import_ogbench()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_CONNECT_TIMEOUT_S)  # the package's own download has none
    try:
        ogbench.download_datasets([dataset], str(folder))
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"{_missing(path, dataset)} (download failed: {reason})") from error
    finally:
        socket.setdefaulttimeout(timeout)
        for leftover in folder.glob(f"{dataset}*.npz.tmp"):
            leftover.unlink()
