# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Generate OGBench data sets locally, by OGBench's own protocol (:mod:`deflow_torchrl.sources.oracles`).

Every episode has its own random stream, derived from (seed, split, episode). So a set does not depend on the number of
processes, a shorter set is the beginning of a longer one, and a repeated call keeps the episodes finished before a kill. A set of
pictures has the episodes of its set of states.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed, wait
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.data.schema import MIN_TRANSITIONS
from deflow_torchrl.envs.factory import check_renderer, import_ogbench
from deflow_torchrl.errors import InputError, nearest
from deflow_torchrl.paths import (
    atomic_write,
    cache_home,
    dataset_path,
    make_writable_folder,
    only_one_prepares,
    write_text,
)
from deflow_torchrl.processes import (
    KillableSpawnContext,
    available_cores,
    children_ignore_signals,
    die_with_parent,
    raise_if_stopped,
)
from deflow_torchrl.progress import clock
from deflow_torchrl.sources.oracles import (
    GENERATED_DATASETS,
    VISUAL_DATASETS,
    EpisodeCollector,
    EpisodeSettings,
    episode_settings,
)

_TIMED_FRAMES = 3
_LOOK_SECONDS = 0.2


def generated_dataset_name(name: str) -> str:
    """Complete the name of a set that can be generated, given with or without its ending ``-v0``.

    Raises:
        InputError: if there is no generator for it, with the nearest names.
    """
    known = [*GENERATED_DATASETS, *VISUAL_DATASETS]
    for candidate in (name, f"{name}-v0"):
        if candidate in known:
            return candidate
    near = nearest(f"{name.removesuffix('-v0')}-v0", known, n=2, cutoff=0.94)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise InputError(f"no generator for {name!r}; {hint}")


def generated_root(dataset: str, *, episodes: int, val_episodes: int, seed: int, max_steps: int | None = None) -> Path:
    """Default folder of a generated set, apart from downloaded data: it must not be taken for the published set."""
    steps = "" if max_steps is None else f"-{max_steps}steps"
    return cache_home() / "generated" / f"{dataset}-{episodes}-{val_episodes}{steps}-seed{seed}"


def generate_ogbench_dataset(
    dataset: str,
    root: str | os.PathLike[str],
    *,
    episodes: int,
    val_episodes: int,
    seed: int = 0,
    workers: int | None = None,
    max_steps: int | None = None,
    progress: Callable[[Iterator[None], int], Iterator[None]] | None = None,
    announce: Callable[[str], object] = lambda _: None,
) -> Path:
    """Generate ``root/NAME.npz`` and ``root/NAME-val.npz``, which plain ``ogbench`` loads, and ``NAME.json`` about them.

    Finished episodes are kept in ``root/.NAME.DIGEST.parts`` (DIGEST: of the settings) until both files are written; a
    repeated call continues from there. A set that was made with the same settings is left as it is; other data of the name
    is refused.

    Args:
        dataset: a key of :data:`GENERATED_DATASETS` or :data:`VISUAL_DATASETS`, with or without its ``-v0``.
        root: folder to write in.

    Keyword Args:
        episodes: training episodes, each one transition shorter than its ``episode_steps``.
        val_episodes: validation episodes.
        seed: seed of the set.
        workers: processes; all cores by default.
        max_steps: steps of an episode at most (rows of the file; the transitions are one fewer); the set's own by default.
        progress: wraps the iterator of finished episodes, of sets of pictures frames (iterator, total), for a progress bar.
        announce: is told how long a set of pictures will take, measured on a few frames, before they are drawn.

    Returns:
        Path of the training file.

    Raises:
        InputError: on an unknown set, a number below 1 (``max_steps`` below 3), no GL driver, a read-only folder, a full disk,
            other data of this name in the folder, or where another process is writing it there.
        MissingExtraError: if the ``ogbench`` extra is not installed.
    """
    dataset = generated_dataset_name(dataset)
    settings = episode_settings(dataset)
    workers = available_cores() if workers is None else workers
    if max_steps is not None:
        if max_steps < MIN_TRANSITIONS + 1:
            raise InputError(f"max_steps={max_steps}: an episode has at least {MIN_TRANSITIONS + 1} steps")
        settings = replace(settings, episode_steps=min(max_steps, settings.episode_steps))
    if min(episodes, val_episodes, workers) < 1 or seed < 0:
        raise InputError(
            f"episodes, val_episodes and workers must be at least 1 and seed at least 0, "
            f"got {episodes}, {val_episodes}, {workers} and {seed}"
        )
    if dataset in VISUAL_DATASETS:
        check_renderer(dataset)
    about = {"dataset": dataset, "seed": seed, "settings": asdict(settings), "versions": _versions()}
    folder = make_writable_folder(Path(root).expanduser())
    numbers = {"train": episodes, "val": val_episodes}
    files = {split: dataset_path(dataset, folder, split) for split in numbers}
    description = folder / f"{dataset}.json"
    with only_one_prepares(dataset, folder), _failures_in_one_line(folder), _in_table(dataset, settings):
        if any(path.is_file() for path in files.values()):
            _check_same(description, {**about, "episodes": numbers})
        if not all(path.is_file() for path in files.values()):
            # A folder for each settings: a process that is still at work for others must not write into this set.
            digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
            parts = folder / f".{dataset}.{digest}.parts"
            parts.mkdir(exist_ok=True)
            jobs = [(split, episode) for split, number in numbers.items() for episode in range(number)]
            open_jobs = [job for job in jobs if not _part_path(parts, *job).is_file()]
            total, run = len(open_jobs), _run_jobs
            if dataset in VISUAL_DATASETS:
                total *= settings.episode_steps
                run = functools.partial(_run_drawn_jobs, total=total, announce=announce)
            # Closed here: after an error in the progress bar the workers must not wait for the garbage collector.
            with closing(run(dataset, seed, open_jobs, parts, min(workers, len(open_jobs)))) as finished:
                for _ in finished if progress is None else progress(finished, total):
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
def _in_table(dataset: str, settings: EpisodeSettings) -> Iterator[None]:
    """Put settings into the table, from which :func:`generate_episode` takes them, during the block."""
    before = GENERATED_DATASETS.get(dataset)
    GENERATED_DATASETS[dataset] = settings
    try:
        yield
    finally:
        if before is None:
            del GENERATED_DATASETS[dataset]
        else:
            GENERATED_DATASETS[dataset] = before


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
    """Write episodes; yields at the end of each."""
    if not jobs:
        return
    with _workers(dataset, workers) as (pool, _):
        with children_ignore_signals():
            futures = [pool.submit(_write_episode, dataset, seed, split, episode, parts) for split, episode in jobs]
        raise_if_stopped()
        for future in as_completed(futures):
            future.result()
            yield


def _run_drawn_jobs(
    dataset: str,
    seed: int,
    jobs: list[tuple[str, int]],
    parts: Path,
    workers: int,
    *,
    total: int,
    announce: Callable[[str], object],
) -> Generator[None, None, None]:
    """Write episodes of pictures; yields at each frame, after it has said how long all of them take."""
    if not jobs:
        return
    with _workers(dataset, workers) as (pool, frames):
        with children_ignore_signals():
            timed = [pool.submit(_seconds_a_frame, dataset) for _ in range(workers)]
        raise_if_stopped()
        seconds = sum(future.result() for future in timed) / workers
        announce(
            f"{total:,} frames take about {clock(total * seconds / workers)}: {seconds:.2g} s each in {workers} "
            f"process{'es' if workers > 1 else ''}; after a kill the same command goes on, with the episodes that are finished"
        )
        pending = {pool.submit(_write_episode, dataset, seed, split, episode, parts) for split, episode in jobs}
        seen = 0
        while pending:
            done, pending = wait(pending, timeout=_LOOK_SECONDS)
            for future in done:
                future.result()
            for _ in range(frames.value - seen):
                seen += 1
                yield


@contextmanager
def _workers(dataset: str, workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Processes that write episodes, and the number of steps they have made."""
    # spawn: a forked child would inherit torch's threads and the parent's simulator state.
    context = KillableSpawnContext()
    with children_ignore_signals():
        steps = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin_worker, initargs=(dataset, GENERATED_DATASETS[dataset], steps)
    )
    try:
        yield pool, steps
    except BaseException:
        # An orderly shutdown would wait for whole episodes, and after a second Ctrl-C some workers would never end. A part
        # is complete or not there at all, so a kill loses only the episodes in progress.
        context.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


_SHARED: dict[str, Any] = {}  # "steps": of all workers together


def _begin_worker(dataset: str, settings: EpisodeSettings, steps: Any) -> None:
    """Give a worker the parent's settings, which a caller may have changed in the table."""
    die_with_parent()
    os.environ.setdefault("LP_NUM_THREADS", "1")  # a renderer in software would take all cores for each worker
    GENERATED_DATASETS[dataset] = settings
    _SHARED["steps"] = steps


def _count_step() -> None:
    if (steps := _SHARED.get("steps")) is not None:
        with steps.get_lock():
            steps.value += 1


def _seconds_a_frame(dataset: str) -> float:
    """Time a few steps of the simulator that this worker keeps."""
    collector = _collector(dataset, GENERATED_DATASETS[dataset])
    observation = collector.begin(0)
    began = time.perf_counter()
    for _ in range(_TIMED_FRAMES):
        observation, *_ = collector.env.step(np.clip(collector.act(observation), -1, 1))
    return (time.perf_counter() - began) / _TIMED_FRAMES


def _write_episode(dataset: str, seed: int, split: str, episode: int, parts: Path) -> None:
    arrays = generate_episode(dataset, seed=seed, split=split, episode=episode)
    with atomic_write(_part_path(parts, split, episode)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes any keyword for its option


_COLLECTORS: dict[str, tuple[EpisodeSettings, EpisodeCollector]] = {}


def generate_episode(dataset: str, *, seed: int, split: str, episode: int) -> dict[str, np.ndarray]:
    """Run one episode of a data set in this process; numpy's global generator is reseeded.

    Args:
        dataset: a key of :data:`GENERATED_DATASETS` or :data:`VISUAL_DATASETS`.

    Keyword Args:
        seed: seed of the set.
        split: ``"train"`` or ``"val"``.
        episode: number of the episode in its split.

    Returns:
        ``observations [T, O]`` (pictures: ``[T, 64, 64, 3]`` uint8), ``actions [T, A]``, ``terminals [T]``, ``qpos``, ``qvel``
        and, where the environment has buttons, ``button_states``; T is the episode's steps.
    """
    settings = episode_settings(dataset)
    collectors = [_collector(dataset, settings)]
    if dataset in VISUAL_DATASETS and getattr(settings, "visible_cube", None) is not None:
        # Whether an episode belongs into the set is known before it is drawn.
        states = VISUAL_DATASETS[dataset]
        environment_id = GENERATED_DATASETS[states].environment_id
        collectors.insert(0, _collector(states, replace(settings, environment_id=environment_id)))
    for attempt in itertools.count():
        spawn_key = (attempt,) if attempt else ()
        stream = np.random.SeedSequence(
            [seed, ("train", "val").index(split), episode], spawn_key=spawn_key
        ).generate_state(2)
        for collector in collectors:
            np.random.seed(stream[0])  # the oracles draw from numpy's global generator
            arrays = collector.run(int(stream[1]), _count_step if collector is collectors[-1] else lambda: None)
            if arrays is None:
                break
        if arrays is not None:
            return arrays
    raise AssertionError("unreachable")


def _collector(dataset: str, settings: EpisodeSettings) -> EpisodeCollector:
    """The simulator that this process keeps for a set with these settings."""
    if dataset not in _COLLECTORS or _COLLECTORS[dataset][0] != settings:
        _COLLECTORS[dataset] = settings, settings.collector()
    return _COLLECTORS[dataset][1]


def _join_parts(paths: list[Path], target: Path) -> None:
    """Write the episodes one after another into ``target``."""
    with np.load(paths[0], allow_pickle=False) as first:
        names = first.files
    with atomic_write(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in names:
            # np.savez writes the time of day into the archive; with ZipInfo's fixed date, equal sets are equal files.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                _write_joined(file, paths, name)


def _write_joined(file: Any, paths: list[Path], name: str) -> None:
    """Write an array of all episodes in NumPy's format, one episode in memory at a time."""
    first = _read_array(paths[0], name)
    rows = sum(len(_read_array(path, "terminals")) for path in paths)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (rows, *first.shape[1:])}
    np.lib.format.write_array_header_1_0(file, header)
    for path in paths:
        file.write(_read_array(path, name).tobytes())


def _read_array(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as part:
        return part[name]
