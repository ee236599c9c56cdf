# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Minari sets, including D4RL's, as a TorchRL replay buffer, read through minari's public interface.

TorchRL has a class of the same name (``torchrl.data.datasets``, prefix ``minari:`` of its ``load_dataset``); in version 0.14.1
it returns zeros. This package does not replace it: import the class from here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchrl.data.replay_buffers.samplers import Sampler

from deflow_torchrl.data.dataset import TransitionBuilder, TransitionDataset, TransitionReplayBuffer, to_storage
from deflow_torchrl.envs.d4rl import d4rl_task, reference_returns
from deflow_torchrl.envs.observations import ObservationLayout, flatten_observation
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import folder_sha256
from deflow_torchrl.sources.base import Source
from deflow_torchrl.sources.minari_env import action_bounds, adapt_environment, minari_layout, recover_environment
from deflow_torchrl.sources.minari_sets import import_minari, minari_episodes, open_minari_dataset

if TYPE_CHECKING:
    from minari import MinariDataset

_LOG = logging.getLogger(__name__)
_SAID_BY_THE_SET = ("algorithm_name", "author", "code_permalink", "description", "minari_version")


def load_minari_dataset(
    dataset_id: str,
    *,
    download: bool = True,
    device: torch.device | str | None = None,
    memmap_dir: str | os.PathLike[str] | None = None,
    observation_keys: Sequence[str] | None = None,
    reward_shift: float | None = None,
    rescale_actions: bool = False,
) -> TransitionDataset:
    """Load a Minari set as validated transitions, episode by episode.

    * Observations are float32. Goal observations are flattened as their environment's are
      (:func:`deflow_torchrl.sources.minari_env.minari_layout`): D4RL's antmaze is ``achieved_goal`` (x, y) then
      ``observation`` (27), without the desired goal; any other dictionary has its entries in sorted order. An image stays
      uint8.
    * Each episode's final observation is its last next observation.
    * ``terminated`` is the set's. The last step of an episode, if not terminated, is ``truncated``, flagged or not.
    * Rewards are the set's plus ``reward_shift``: -1 for ``D4RL/antmaze/*`` as in the paper, 0 otherwise. Scores use the raw
      reward (:func:`deflow_torchrl.envs.normalized_score`).

    If the set's environment can be made, sizes and reward conventions of both are compared. Differences, and how
    :func:`deflow_torchrl.envs.make_minari_env` removes them, are logged.

    Args:
        dataset_id: any Minari id, for example ``D4RL/door/human-v2``.

    Keyword Args:
        download: fetch a set that is not in ``$MINARI_DATASETS_PATH``.
        device: device of the transitions. Defaults to the CPU.
        memmap_dir: keep the transitions in memory-mapped files in this folder instead; later calls use them again.
        observation_keys: entries of goal observations, in order.
        reward_shift: added to each reward.
        rescale_actions: map actions with other finite bounds onto [-1, 1]; give it to ``make_minari_env`` as well.

    Raises:
        InputError: on a malformed or unknown id, no network, a damaged or empty set, NaN, actions that are not a vector of
            real numbers or leave their bounds, or an environment of other sizes.
        MissingExtraError: if the ``minari`` extra is not installed.
    """
    dataset = open_minari_dataset(dataset_id, download=download)
    layout = minari_layout(dataset_id, dataset.observation_space, observation_keys)
    source = f"Minari set {dataset_id}"
    bounds = action_bounds(dataset.action_space, rescale_actions=rescale_actions, source=source)
    task = d4rl_task(dataset_id)
    if reward_shift is None:
        reward_shift = 0.0 if task is None else task.reward_shift
    if not np.isfinite(reward_shift):
        raise InputError(f"reward_shift must be a finite number, got {reward_shift}")
    try:
        env = recover_environment(dataset)
    except InputError as error:
        _LOG.warning(f"{error}; data and environment are not compared")
    else:
        adapt_environment(dataset, env, observation_keys=observation_keys, rescale_actions=rescale_actions).close()
    path = Path(dataset.spec.data_path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    fingerprint = {
        "minari": dataset_id,
        "files": [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "folder": str(path.resolve()),
        "entries": [list(entry) for entry, _ in layout.entries],
        "reward_shift": reward_shift,
        "rescaled": bounds is not None,
    }
    return to_storage(
        lambda folder: _read(dataset, layout, bounds, reward_shift, folder),
        fingerprint=fingerprint,
        device=device,
        memmap_dir=None if memmap_dir is None else Path(memmap_dir).expanduser() / dataset_id.replace("/", "-"),
    )


class MinariSource(Source):
    """Minari's sets by their ids. Actions with other bounds are rescaled, as :func:`make_gym_env` rescales them."""

    def load(self, name: str, *, split: str = "train", root: Any = None, **options: Any) -> TransitionDataset | None:
        """Load a set; there are no validation splits."""
        return None if split == "val" else load_minari_dataset(name, rescale_actions=True, **options)

    def ensure(self, name: str, *, download: bool = True, **_: Any) -> None:
        """Open the set, downloaded first where it is missing."""
        open_minari_dataset(name, download=download)

    def check_installed(self) -> None:
        """Check the extra ``minari``."""
        import_minari()

    def digest(self, name: str, **_: Any) -> str:
        """SHA-256 over all files of the set."""
        return folder_sha256(Path(open_minari_dataset(name).spec.data_path), "*")

    def environment(self, name: str) -> str:
        """The environment that the set names, made by :func:`make_minari_env`."""
        return f"minari:{name}"

    def reference_returns(self, name: str, environment: str) -> tuple[float, float] | None:
        """D4RL's returns, else those the set gives; in another environment than the set's own, that environment's."""
        if environment != self.environment(name):
            return reference_returns(environment.rpartition(":")[2])  # gym:module:ID is the longest form
        dataset = open_minari_dataset(name)
        own = dataset.env_spec
        return reference_returns(
            name, environment_id=None if own is None else own.id, metadata=dataset.storage.metadata
        )


SOURCE = MinariSource()


class MinariExperienceReplay(TransitionReplayBuffer):
    """A Minari set as an immutable replay buffer; ``rb[:]`` is the whole set in TED.

    :func:`load_minari_dataset` describes how observations, rewards and ends are read.

    Args:
        dataset_id: any Minari id, for example ``D4RL/door/human-v2``.

    Keyword Args:
        batch_size (int, optional): transitions per :meth:`sample`.
        download (bool, optional): fetch a set that is not in ``$MINARI_DATASETS_PATH``. Defaults to ``True``.
        device (device, optional): device of the transitions, best the learner's. Defaults to ``"cpu"``.
        memmap_dir (path, optional): keep the transitions in memory-mapped files in this folder instead; excludes ``device``.
        observation_keys (sequence of str, optional): entries of goal observations, in order. Defaults to D4RL's for
            ``D4RL/antmaze/*``, to all in sorted order for other dictionaries.
        reward_shift (float, optional): added to each reward. Defaults to -1 for ``D4RL/antmaze/*``, to 0 otherwise.
        rescale_actions (bool, optional): map actions with other finite bounds onto [-1, 1]. Defaults to ``False``.
        sampler (Sampler, optional): defaults to uniform with replacement, as in the paper.
        **kwargs: forwarded to :class:`torchrl.data.TensorDictReplayBuffer` (``transform``, ``prefetch``, ``pin_memory``...).

    Raises:
        InputError: as :func:`load_minari_dataset`.
        MissingExtraError: if the ``minari`` extra is not installed.

    Examples:
        >>> rb = MinariExperienceReplay("D4RL/door/human-v2", batch_size=256)  # doctest: +SKIP
        >>> rb.sample()["observation"].shape  # doctest: +SKIP
        torch.Size([256, 39])
    """

    def __init__(
        self,
        dataset_id: str,
        *,
        batch_size: int | None = None,
        download: bool = True,
        device: torch.device | str | None = None,
        memmap_dir: str | os.PathLike[str] | None = None,
        observation_keys: Sequence[str] | None = None,
        reward_shift: float | None = None,
        rescale_actions: bool = False,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        self.dataset_id = dataset_id
        dataset = load_minari_dataset(
            dataset_id,
            download=download,
            device=device,
            memmap_dir=memmap_dir,
            observation_keys=observation_keys,
            reward_shift=reward_shift,
            rescale_actions=rescale_actions,
        )
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, **kwargs)


def _read(
    dataset: MinariDataset,
    layout: ObservationLayout,
    bounds: tuple[np.ndarray, np.ndarray] | None,
    reward_shift: float,
    folder: Path | None,
) -> TransitionDataset:
    source = f"Minari set {dataset.id}"
    builder = TransitionBuilder(
        dataset.total_steps,
        frames=dataset.total_steps + dataset.total_episodes,
        observation_shape=layout.shape,
        observation_dtype=torch.uint8 if layout.dtype == np.uint8 else torch.float32,
        action_dim=dataset.action_space.shape[0],
        source=source,
        folder=folder,
    )
    at_goal = 0
    for episode in minari_episodes(dataset):
        where = f"{source}, episode {episode.id}"
        try:
            observations = flatten_observation(episode.observations, layout)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        actions, rewards = np.asarray(episode.actions), np.asarray(episode.rewards).reshape(-1)
        terminated = np.asarray(episode.terminations, dtype=bool)
        if actions.dtype.kind != "f":
            raise InputError(f"{where}: actions have type {actions.dtype}, expected real numbers")
        if bounds is not None:
            low, high = bounds
            actions = 2.0 * (actions - low) / (high - low) - 1.0
        at_goal += int(((rewards > 0) & ~terminated).sum())
        builder.add_episode(
            observations=observations, actions=actions, rewards=rewards + reward_shift, terminated=terminated
        )
    task = d4rl_task(dataset.id)
    if at_goal and task is not None and task.ends_early == "success":
        _LOG.warning(
            f"{dataset.id}: {at_goal} steps at the goal are not terminated in the set, so that values are bootstrapped "
            "behind them; D4RL's own files terminate there"
        )
    metadata = dataset.storage.metadata
    loaded = builder.finish(
        about={
            "provenance": f"Minari set {dataset.id}",
            **{key: metadata[key] for key in _SAID_BY_THE_SET if metadata.get(key)},
            "reward_shift": reward_shift,
            "actions_rescaled": bounds is not None,
            "action_bounds": None if bounds is None else [bound.tolist() for bound in bounds],
        }
    )
    if loaded.report is not None and loaded.report.jump is not None:
        _LOG.warning(f"{source}: {loaded.report.jump}")
    return loaded
