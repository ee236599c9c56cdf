# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Generate OGBench data sets locally, by OGBench's own protocol (:mod:`deflow_torchrl.sources.oracles`).

Every episode has its own random stream, derived from (seed, split, episode). So a set does not depend on the number of
processes, a shorter set is the beginning of a longer one, and a repeated call keeps the episodes finished before a kill.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.envs.factory import import_ogbench
from deflow_torchrl.errors import InputError, nearest
from deflow_torchrl.paths import (
    atomic_write,
    cache_home,
    dataset_path,
    make_writable_folder,
    only_one_prepares,
    write_text,
)
from deflow_torchrl.processes import KillableSpawnContext, available_cores, children_ignore_ctrl_c, die_with_parent
from deflow_torchrl.sources.oracles import GENERATED_DATASETS, EpisodeCollector, EpisodeSettings


def generated_dataset_name(name: str) -> str:
    """Complete the name of a set that can be generated, given with or without its ending ``-v0``.

    Raises:
        InputError: if there is no generator for it, with the nearest names.
    """
    for candidate in (name, f"{name}-v0"):
        if candidate in GENERATED_DATASETS:
            return candidate
    near = nearest(f"{name.removesuffix('-v0')}-v0", GENERATED_DATASETS, n=2, cutoff=0.94)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(GENERATED_DATASETS)}"
    raise InputError(f"no generator for {name!r}; {hint}")


def generated_root(dataset: str, *, episodes: int, val_episodes: int, seed: int) -> Path:
    """Default folder of a generated set, apart from downloaded data: it must not be taken for the published set."""
    return cache_home() / "generated" / f"{dataset}-{episodes}-{val_episodes}-seed{seed}"


def generate_ogbench_dataset(
    dataset: str,
    root: str | os.PathLike[str],
    *,
    episodes: int,
    val_episodes: int,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[Iterator[None], int], Iterator[None]] | None = None,
) -> Path:
    """Generate ``root/NAME.npz`` and ``root/NAME-val.npz``, which plain ``ogbench`` loads, and ``NAME.json`` about them.

    Finished episodes are kept in ``root/.NAME.DIGEST.parts`` (DIGEST: of the settings) until both files are written; a
    repeated call continues from there. A set that was made with the same settings is left as it is; other data of the name
    is refused.

    Args:
        dataset: a key of :data:`GENERATED_DATASETS`, with or without its ``-v0``.
        root: folder to write in.

    Keyword Args:
        episodes: training episodes, each one transition shorter than its ``episode_steps``.
        val_episodes: validation episodes.
        seed: seed of the set.
        workers: processes; all cores by default.
        progress: wraps the iterator of finished episodes (iterator, total), for a progress bar.

    Returns:
        Path of the training file.

    Raises:
        InputError: on an unknown set, a number below 1, a read-only folder, a full disk, other data of this name in the
            folder, or where another process is writing it there.
        MissingExtraError: if the ``ogbench`` extra is not installed.
    """
    dataset = generated_dataset_name(dataset)
    settings = GENERATED_DATASETS[dataset]
    workers = available_cores() if workers is None else workers
    if min(episodes, val_episodes, workers) < 1 or seed < 0:
        raise InputError(
            f"episodes, val_episodes and workers must be at least 1 and seed at least 0, "
            f"got {episodes}, {val_episodes}, {workers} and {seed}"
        )
    about = {"dataset": dataset, "seed": seed, "settings": asdict(settings), "versions": _versions()}
    folder = make_writable_folder(Path(root).expanduser())
    numbers = {"train": episodes, "val": val_episodes}
    files = {split: dataset_path(dataset, folder, split) for split in numbers}
    description = folder / f"{dataset}.json"
    with only_one_prepares(dataset, folder), _failures_in_one_line(folder):
        if any(path.is_file() for path in files.values()):
            _check_same(description, {**about, "episodes": numbers})
        if not all(path.is_file() for path in files.values()):
            # A folder for each settings: a process that is still at work for others must not write into this set.
            digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
            parts = folder / f".{dataset}.{digest}.parts"
            parts.mkdir(exist_ok=True)
            jobs = [(split, episode) for split, number in numbers.items() for episode in range(number)]
            open_jobs = [job for job in jobs if not _part_path(parts, *job).is_file()]
            # Closed here: after an error in the progress bar the workers must not wait for the garbage collector.
            with closing(_run_jobs(dataset, seed, open_jobs, parts, min(workers, len(open_jobs)))) as finished:
                for _ in finished if progress is None else progress(finished, len(open_jobs)):
                    pass
            about |= {
                "provenance": "regenerated locally with the ogbench package's oracle; not the published set",
                "episodes": numbers,
                "transitions": {split: number * (settings.episode_steps - 1) for split, number in numbers.items()},
            }
            write_text(description, json.dumps(about, indent=2) + "\n")  # first: without it, a set passes for published
            for split, number in numbers.items():
                _join_parts([_part_path(parts, split, episode) for episode in range(number)], files[split])
        for parts in folder.glob(f".{dataset}.*parts"):  # of other settings too: a set that stands refuses them
            shutil.rmtree(parts, ignore_errors=True)
    return files["train"]


@contextmanager
def _failures_in_one_line(folder: Path) -> Iterator[None]:
    """Turn a full disk and a killed worker into one line; finished episodes stay either way."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write in {folder} ({error.strerror or error}); finished episodes are kept: the same command goes on"
        ) from error
    except BrokenExecutor as error:
        raise InputError(
            "a worker process was killed, perhaps for memory; finished episodes are kept: repeat with fewer workers"
        ) from error


def _check_same(description: Path, wanted: dict[str, Any]) -> None:
    """Refuse to touch files of this name that are described otherwise or not at all."""
    path = description.with_suffix(".npz")
    wanted = json.loads(json.dumps(wanted))  # tuples become lists
    try:
        found = json.loads(description.read_text(encoding="utf-8"))
        others = [name for name in wanted if found.get(name) != wanted[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is in the way and was not generated here (no {description.name} describes it); choose another folder"
        ) from error
    if others:
        values = {name: f" ({json.dumps(found.get(name))} there)" for name in ("seed", "episodes")}
        said = ", ".join(f"{name}{values.get(name, '')}" for name in others)
        raise InputError(f"{path} is in the way: made with other {said}; choose another folder or delete it")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import_ogbench()
    return {name: version(name) for name in ("ogbench", "mujoco", "gymnasium", "numpy")}


def _part_path(parts: Path, split: str, episode: int) -> Path:
    return parts / f"{split}-{episode:06d}.npz"


def _run_jobs(
    dataset: str, seed: int, jobs: list[tuple[str, int]], parts: Path, workers: int
) -> Generator[None, None, None]:
    if not jobs:
        return
    # spawn: a forked child would inherit torch's threads and the parent's simulator state.
    context = KillableSpawnContext()
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin_worker, initargs=(dataset, GENERATED_DATASETS[dataset])
    )
    try:
        with children_ignore_ctrl_c():
            futures = [pool.submit(_write_episode, dataset, seed, split, episode, parts) for split, episode in jobs]
        for future in as_completed(futures):
            future.result()
            yield
    except BaseException:
        # An orderly shutdown would wait for whole episodes, and after a second Ctrl-C some workers would never end. A part
        # is complete or not there at all, so a kill loses only the episodes in progress.
        context.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _begin_worker(dataset: str, settings: EpisodeSettings) -> None:
    """Give a worker the parent's settings, which a caller may have changed in the table."""
    die_with_parent()
    GENERATED_DATASETS[dataset] = settings


def _write_episode(dataset: str, seed: int, split: str, episode: int, parts: Path) -> None:
    arrays = generate_episode(dataset, seed=seed, split=split, episode=episode)
    with atomic_write(_part_path(parts, split, episode)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes any keyword for its option


_COLLECTORS: dict[str, tuple[EpisodeSettings, EpisodeCollector]] = {}


def generate_episode(dataset: str, *, seed: int, split: str, episode: int) -> dict[str, np.ndarray]:
    """Run one episode of a data set in this process; numpy's global generator is reseeded.

    Args:
        dataset: a key of :data:`GENERATED_DATASETS`.

    Keyword Args:
        seed: seed of the set.
        split: ``"train"`` or ``"val"``.
        episode: number of the episode in its split.

    Returns:
        ``observations [T, O]``, ``actions [T, A]``, ``terminals [T]``, ``qpos``, ``qvel`` and, where the environment has
        buttons, ``button_states``; T is the episode's steps.
    """
    settings = GENERATED_DATASETS[dataset]
    if dataset not in _COLLECTORS or _COLLECTORS[dataset][0] is not settings:
        _COLLECTORS[dataset] = settings, settings.collector()
    collector = _COLLECTORS[dataset][1]
    for attempt in itertools.count():
        spawn_key = (attempt,) if attempt else ()
        stream = np.random.SeedSequence(
            [seed, ("train", "val").index(split), episode], spawn_key=spawn_key
        ).generate_state(2)
        np.random.seed(stream[0])  # the oracles draw from numpy's global generator
        arrays = collector.run(int(stream[1]))
        if arrays is not None:
            return arrays
    raise AssertionError("unreachable")


def _join_parts(paths: list[Path], target: Path) -> None:
    """Write the episodes one after another into ``target``, one array of the set in memory at a time."""
    with np.load(paths[0], allow_pickle=False) as first:
        names = first.files
    with atomic_write(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in names:
            # np.savez writes the time of day into the archive; with ZipInfo's fixed date, equal sets are equal files.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.concatenate([_read_array(path, name) for path in paths]))


def _read_array(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as part:
        return part[name]
