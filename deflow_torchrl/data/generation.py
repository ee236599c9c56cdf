# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Local generation of OGBench data sets with the scripted oracles of the ``ogbench`` wheel, by OGBench's own protocol.

Every episode has its own random stream, derived from (seed, split, episode): a set does not depend on how many processes
made it, a shorter set is the beginning of a longer one, and finished episodes survive a kill.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import multiprocessing
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.envs.factory import import_ogbench, make_env_by_id
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import atomic_write, dataset_path, make_writable_folder, write_text
from deflow_torchrl.processes import available_cores, children_ignore_ctrl_c

_SPLITS = ("train", "val")
_DTYPES = {"terminals": np.dtype(bool)}


@dataclass(frozen=True)
class GenerationSettings:
    """How one data set is generated; the values are OGBench's.

    Attributes:
        environment_id: goal-conditioned environment, run in its data-collection mode.
        oracle: ``module:class`` of the scripted policy.
        oracle_options: its options.
        markovian: closed-loop oracle with Gaussian action noise of a per-episode level (``noisy`` sets), else the
            open-loop plan oracle, whose plan carries smoothed noise (``play`` sets).
        max_noise: upper end of that level.
        random_action_probability: share of uniformly random actions.
        episode_steps: steps of an episode; its last row has no successor, so it yields one transition less.
    """

    environment_id: str
    oracle: str
    oracle_options: dict[str, float]
    markovian: bool = False
    max_noise: float = 0.1
    random_action_probability: float = 0.0
    episode_steps: int = 1001


GENERATED_DATASETS: dict[str, GenerationSettings] = {
    "cube-single-play-v0": GenerationSettings(
        environment_id="cube-single-v0",
        oracle="ogbench.manipspace.oracles.plan.cube_plan:CubePlanOracle",
        oracle_options={"noise": 0.1, "noise_smoothing": 0.5},
    ),
    "cube-single-noisy-v0": GenerationSettings(
        environment_id="cube-single-v0",
        oracle="ogbench.manipspace.oracles.markov.cube_markov:CubeMarkovOracle",
        oracle_options={"min_norm": 0.4},
        markovian=True,
        random_action_probability=0.1,
    ),
}
"""Data sets that can be generated here, by the name of their file."""

# Noise of the Markov oracle relative to its level: x, y, z, yaw, gripper.
_MARKOV_NOISE_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])


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

    Finished episodes are kept in ``root/.NAME.parts`` until both files stand; a repeated call goes on from there.

    Args:
        dataset: a key of :data:`GENERATED_DATASETS`.
        root: folder to write in.

    Keyword Args:
        episodes: training episodes, each of 1000 transitions for the sets here.
        val_episodes: validation episodes.
        seed: seed of the set.
        workers: processes; all cores by default.
        progress: wraps the iterator of finished episodes (iterator, total), for a progress bar.

    Returns:
        Path of the training file.

    Raises:
        InputError: on an unknown set, a number below 1 or a read-only folder.
        MissingExtraError: if the ``ogbench`` extra is not installed.
    """
    settings = GENERATED_DATASETS.get(dataset)
    if settings is None:
        raise InputError(f"no generator for {dataset!r}; there are {', '.join(GENERATED_DATASETS)}")
    workers = available_cores() if workers is None else workers
    if min(episodes, val_episodes, workers) < 1 or seed < 0:
        raise InputError(
            f"episodes, val_episodes and workers must be at least 1 and seed at least 0, "
            f"got {episodes}, {val_episodes}, {workers} and {seed}"
        )
    versions = _versions()
    folder = make_writable_folder(Path(root).expanduser())
    about = {"dataset": dataset, "seed": seed, "settings": asdict(settings), "versions": versions}
    with _only_one(folder / f".{dataset}.lock", dataset):
        parts = _parts_folder(folder / f".{dataset}.parts", about)
        numbers = dict(zip(_SPLITS, (episodes, val_episodes), strict=True))
        jobs = [(split, episode) for split, number in numbers.items() for episode in range(number)]
        open_jobs = [job for job in jobs if not _part_path(parts, *job).is_file()]
        finished = _run_jobs(dataset, seed, open_jobs, parts, min(workers, max(len(open_jobs), 1)))
        for _ in finished if progress is None else progress(finished, len(open_jobs)):
            pass
        about |= {
            "provenance": "regenerated locally with the ogbench package's oracle; not the published set",
            "episodes": numbers,
            "transitions": {split: number * (settings.episode_steps - 1) for split, number in numbers.items()},
        }
        # The description first: a set without one would pass for published data.
        write_text(folder / f"{dataset}.json", json.dumps(about, indent=2) + "\n")
        for split, number in numbers.items():
            parts_of_split = [_part_path(parts, split, episode) for episode in range(number)]
            _join_parts(parts_of_split, dataset_path(dataset, folder, split))
        shutil.rmtree(parts)
    return dataset_path(dataset, folder, "train")


@contextmanager
def _only_one(lock: Path, dataset: str) -> Iterator[None]:
    """Hold ``lock`` against another process that generates the same set; the system frees it if this one is killed."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is generating {dataset} in {lock.parent}; wait for it") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    import_ogbench()
    return {name: version(name) for name in ("ogbench", "mujoco", "gymnasium", "numpy")}


def _parts_folder(parts: Path, about: dict[str, Any]) -> Path:
    """Open the folder of finished episodes; episodes of other settings in it are removed."""
    fingerprint = json.dumps(about, indent=2, sort_keys=True)
    marker = parts / "settings.json"
    if not marker.is_file() or marker.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        write_text(marker, fingerprint)
    return parts


def _part_path(parts: Path, split: str, episode: int) -> Path:
    return parts / f"{split}-{episode:06d}.npz"


def _run_jobs(dataset: str, seed: int, jobs: list[tuple[str, int]], parts: Path, workers: int) -> Iterator[None]:
    if not jobs:
        return
    # spawn: a forked child would inherit torch's threads and the parent's simulator state.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        with children_ignore_ctrl_c():
            futures = [pool.submit(_write_episode, dataset, seed, split, episode, parts) for split, episode in jobs]
        for future in as_completed(futures):
            future.result()
            yield
    finally:
        pool.shutdown(cancel_futures=True)


def _write_episode(dataset: str, seed: int, split: str, episode: int, parts: Path) -> None:
    arrays = generate_episode(dataset, seed=seed, split=split, episode=episode)
    with atomic_write(_part_path(parts, split, episode)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes any keyword for its option


_ENVIRONMENTS: dict[str, tuple[Any, Any]] = {}


def generate_episode(dataset: str, *, seed: int, split: str, episode: int) -> dict[str, np.ndarray]:
    """Run one episode of a data set in this process.

    Args:
        dataset: a key of :data:`GENERATED_DATASETS`.

    Keyword Args:
        seed: seed of the set.
        split: ``"train"`` or ``"val"``.
        episode: number of the episode in its split.

    Returns:
        ``observations [T, O]``, ``actions [T, A]``, ``terminals [T]``, ``qpos`` and ``qvel``, T the episode's steps.
    """
    settings = GENERATED_DATASETS[dataset]
    if dataset not in _ENVIRONMENTS:
        env = make_env_by_id(
            settings.environment_id,
            terminate_at_goal=False,
            mode="data_collection",
            max_episode_steps=settings.episode_steps,
        )
        module, name = settings.oracle.split(":")
        oracle = getattr(importlib.import_module(module), name)(env=env, **settings.oracle_options)
        _ENVIRONMENTS[dataset] = env, oracle
    env, oracle = _ENVIRONMENTS[dataset]
    stream = np.random.SeedSequence([seed, _SPLITS.index(split), episode]).generate_state(2)
    np.random.seed(stream[0])  # the oracles draw from numpy's global generator
    observation, info = env.reset(seed=int(stream[1]))
    noise = np.random.uniform(0, settings.max_noise) * _MARKOV_NOISE_SCALE if settings.markovian else None
    oracle.reset(observation, info)
    rows: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "terminals", "qpos", "qvel")}
    done = False
    while not done:
        if np.random.rand() < settings.random_action_probability:
            action = env.action_space.sample()
        else:
            action = np.array(oracle.select_action(observation, info))
            if noise is not None:
                action = action + np.random.normal(0, noise, action.shape)
        action = np.clip(action, -1, 1)
        following, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if oracle.done:
            oracle.reset(*env.unwrapped.set_new_target(p_stack=0.0))
        for name, value in zip(rows, (observation, action, done, info["prev_qpos"], info["prev_qvel"]), strict=True):
            rows[name].append(value)
        observation = following
    return {name: np.asarray(values, dtype=_DTYPES.get(name, np.float32)) for name, values in rows.items()}


def _join_parts(paths: list[Path], target: Path) -> None:
    """Write the episodes one after another into ``target``."""
    episodes = []
    for path in paths:
        with np.load(path, allow_pickle=False) as part:
            episodes.append({name: part[name] for name in part.files})
    arrays = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
    with atomic_write(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # np.savez stamps the time of day into the archive; a fixed entry makes equal sets equal files.
            with archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
