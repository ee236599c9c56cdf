# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The parts of a run: its task, device, data, networks, buffers and online phase."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torchrl.data import Composite, Unbounded
from torchrl.envs import DeviceCastTransform

from deflow_torchrl.algorithms import Learner, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import OfflineOnlineReplayBuffer, RandomCrop, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.data.base_actions import BaseActionBank
from deflow_torchrl.data.packed import stacked_shapes
from deflow_torchrl.data.returns import with_returns
from deflow_torchrl.data.transitions import Transitions
from deflow_torchrl.envs.factory import check_renderer, make_gym_env
from deflow_torchrl.errors import InputError
from deflow_torchrl.modules.kernels import enable_kernels
from deflow_torchrl.modules.normalizer import ObservationNormalizer
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.runs.settings import SettledConfig, TrainConfig
from deflow_torchrl.sources.base import get_source
from deflow_torchrl.tasks import Task, get_task
from deflow_torchrl.tasks.data import load_task_data
from deflow_torchrl.trainers.collection import OnlineExperience
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.online import OnlinePhase
from deflow_torchrl.trainers.update import Update, soft_pairs

_REFERENCE_CAPACITY = 2_000_000
_NORMALIZED_ROWS = 1 << 16


@dataclass(frozen=True)
class TaskData:
    """A task's data, shared by the runs of several seeds.

    Attributes:
        train: the offline set.
        validation: the validation set, where the task has one.
        about: its description, for the record.
    """

    train: TransitionDataset
    validation: TransitionDataset | None
    about: dict[str, Any]


def find_task(config: TrainConfig) -> Task:
    """The task of a run."""
    return get_task(config.task, environment=config.env, reward=config.reward)


def use_device(config: TrainConfig, device: str | None = None) -> torch.device:
    """Set kernels and threads of this process as the run has them; the run's device, or ``device`` in its place.

    Raises:
        InputError: if the device cannot be used.
    """
    name = device or config.device
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    enable_kernels(config.kernels)
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # the number of threads can move the last digits of a matrix product
    return found


def build_learner(
    config: SettledConfig,
    observation_dim: ObservationSize,
    action_dim: int,
    device: torch.device,
    data: TransitionDataset | None = None,
    *,
    reward_range: Sequence[float] | None = None,
) -> Learner:
    """Build the run's method for observations and actions of these sizes; arguments as of :func:`make_problem`.

    Raises:
        InputError: if the data have no rewards and the method reads them.
    """
    problem = make_problem(config, observation_dim, action_dim, device, data, reward_range=reward_range)
    learner = get_algorithm(config.algo.name).build(config.algo, problem)
    if data is not None and "rewards" in data.about and ("next", "reward") in learner.loss.in_keys:
        raise InputError(
            f"task={config.task}: rewards are {data.about['rewards']}, and algo={config.algo.name} learns from rewards; clone "
            "the actions (algo=flow_bc, algo=bc), or import the files with --reward success-at-end"
        )
    return learner


def make_problem(
    config: SettledConfig,
    observation_dim: ObservationSize,
    action_dim: int,
    device: torch.device,
    data: TransitionDataset | None = None,
    *,
    reward_range: Sequence[float] | None = None,
) -> ProblemSpec:
    """What the run's networks are built for.

    With ``normalize=standard`` the normalisation is fitted on ``data``; without them it is the identity until a checkpoint's
    state is loaded.
    """
    task = find_task(config)
    normalizer, spec = None, None
    if isinstance(observation_dim, Mapping):
        spec = Composite(observation=Composite({name: _spec(shape) for name, shape in observation_dim.items()}))
    elif not isinstance(observation_dim, int):
        spec = Composite(observation=_spec(observation_dim))
    if config.normalize == "standard":
        if not isinstance(observation_dim, int):
            raise InputError("normalize=standard: pictures are scaled by their encoder; leave normalize=none")
        normalizer = ObservationNormalizer(torch.zeros(observation_dim), torch.ones(observation_dim))
        if data is not None:
            rows = data.chunks(_NORMALIZED_ROWS, doing="fit the normalisation")
            normalizer = ObservationNormalizer.fit(part["observation"].cpu() for _, part in rows)
    return ProblemSpec(
        observation_dim=observation_dim if isinstance(observation_dim, int) else None,
        observation_spec=spec,
        action_dim=action_dim,
        hidden_dims=config.hidden_dims,
        gamma=task.gamma,
        q_aggregation=task.q_aggregation,
        target_divergence=task.target_divergence,
        device=device,
        normalizer=normalizer,
        encoder=config.encoder,
        reward_range=None if reward_range is None else (reward_range[0], reward_range[1]),
        reward_moments=None if data is None else (float(data.reward.mean()), float(data.reward.std())),
        chunk=config.chunk,
        num_updates=number_of_updates(config),
    )


ObservationSize = int | Sequence[int] | Mapping[str, Sequence[int]]
"""Width of vectors, shape of pictures ``[H, W, C]``, or of several observations their shapes by name; as a checkpoint has it."""


def observation_size(dataset: TransitionDataset) -> ObservationSize:
    """Size of a set's observations."""
    if dataset.entries:
        return stacked_shapes(dataset.entries, dataset.frame_stack)
    pictures = dataset.observation.dtype == torch.uint8
    return list(dataset.observation_shape) if pictures else dataset.observation_shape[-1]


def _spec(shape: Sequence[int]) -> Unbounded:
    return Unbounded(torch.Size(shape), dtype=torch.uint8 if len(shape) == 3 else torch.float32)


def number_of_updates(config: SettledConfig) -> int:
    """Gradient steps of the whole run."""
    return config.offline_steps + int(max(config.online_steps - config.warmup_steps, 0) * config.utd)


def step_gamma(config: TrainConfig, task: Task) -> float:
    """Discount of one environment step: the method's setting, else the task's."""
    gamma = getattr(config.algo, "gamma", None)
    return task.gamma if gamma is None else gamma


def training_set(dataset: TransitionDataset, config: SettledConfig, learner: Learner, gamma: float) -> Transitions:
    """The transitions that are trained on: those of the set, with returns to go if the method reads them, or whole chunks.

    Raises:
        InputError: for chunks of a method that reads returns to go.
    """
    transitions: Any = dataset
    if config.chunk > 1:
        transitions = dataset.chunked(config.chunk, gamma=gamma, ends=cast("Any", config.chunk_ends))
    return transitions if learner.returns is None else with_returns(transitions, gamma=gamma, tail=learner.returns)


def load_data(config: TrainConfig, task: Task, device: torch.device) -> TaskData:
    """Load a task's data and compare them with its environment.

    Raises:
        InputError: if the data cannot be had or used, or belong to another environment.
    """
    load = functools.partial(
        load_task_data,
        task,
        root=config.data_root,
        download=config.download,
        device=device,
        memmap=config.storage == "memmap",
    )
    if task.images:
        check_renderer(task.name)
    train = load(split="train")
    assert train is not None
    validation = load(split="val")
    _check_environment(config, task, train)
    train = train.stacked(config.frame_stack or 1)
    validation = None if validation is None else validation.stacked(train.frame_stack)
    about = {key: value for key, value in train.about.items() if key not in ("fingerprint", "sha256")}
    described = {
        **get_source(task.source).describe(task.dataset, root=config.data_root),
        "transitions": len(train),
        "provenance": about.pop("provenance", None),
        **about,
    }
    return TaskData(train, validation, described)


def _check_environment(config: TrainConfig, task: Task, dataset: TransitionDataset) -> None:
    """Reset and step the task's environment, and that of the online phase, once, before anything is written or trained."""
    if task.environment is None:
        return
    from deflow_torchrl.envs.checked import check_environment
    from deflow_torchrl.envs.online import check_online_environment

    try:
        with closing(make_gym_env(task.environment)) as env:
            _check_pictures(env, task.environment, dataset)
            check_environment(
                env,
                task.environment,
                observation_shape=tuple(dataset.observation.shape[1:]),
                action_shape=tuple(dataset.action.shape[1:]),
                action_bounds=dataset.about.get("action_bounds"),
            )
        if config.online_steps:
            check_online_environment(task.environment, chunk=config.chunk, frame_stack=config.frame_stack or 1)
    except InputError as error:
        if get_source(task.source).fixed_environment:
            raise
        raise InputError(f"{error} (env=none trains without evaluating)") from error


def _check_pictures(env: Any, name: str, dataset: TransitionDataset) -> None:
    """Refuse an environment whose observations are of another kind than the data's."""
    entries = env.get_wrapper_attr("entries") if env.has_wrapper_attr("entries") else None
    own, data = entries or env.observation_space.shape, dataset.entries or tuple(dataset.observation.shape[1:])
    if own != data:
        raise InputError(
            f"{name}: observations have shape {own}, those of the data {data}; the data belong to another environment"
        )
    if (dataset.observation.dtype == torch.uint8) != (env.observation_space.dtype == np.uint8):
        raise InputError(
            f"{name}: observations have type {env.observation_space.dtype}, those of the data "
            f"{str(dataset.observation.dtype).removeprefix('torch.')}; the data belong to another environment"
        )


def make_buffer(
    dataset: Transitions, config: SettledConfig, learner: Learner, device: torch.device, *, batches: int = 1
) -> TransitionReplayBuffer:
    """A buffer of a data set that samples so many batches' transitions at once, on the learner's device."""
    buffer = TransitionReplayBuffer(dataset, batch_size=batches * config.batch_size, next_action=learner.next_action)
    if dataset.device != device:
        buffer.append_transform(DeviceCastTransform(device))
    if (crop := _crop(dataset, config)) is not None:
        buffer.append_transform(crop)
    return buffer


def _crop(dataset: Transitions, config: TrainConfig) -> RandomCrop | None:
    """The augmentation of a run's batches."""
    if not config.p_aug:
        return None
    names = getattr(getattr(dataset, "base", dataset), "entries", None) or {}
    keys: list[Any] = [("observation", name) for name in names] or ["observation"]
    following: list[Any] = [("next", "observation", name) for name in names] or [("next", "observation")]
    return RandomCrop(probability=config.p_aug, in_keys=[*keys, *following])


def make_union_buffer(
    dataset: Transitions, config: SettledConfig, learner: Learner, device: torch.device
) -> OfflineOnlineReplayBuffer:
    """A buffer of the data set with room for online experience."""
    capacity = config.online_capacity
    if capacity is None and config.overwrite == "fifo":
        capacity = max(_REFERENCE_CAPACITY - len(dataset), 1)  # the authors': max(2M, N + 1) in all
    share = config.offline_fraction
    return OfflineOnlineReplayBuffer(
        dataset,
        online_capacity=config.online_steps if capacity is None else capacity,
        mode=cast("Any", config.mixing),
        offline_fraction=tuple(share) if isinstance(share, list) else share,
        anneal_transitions=(config.anneal_steps or config.online_steps) if config.mixing == "annealed" else None,
        overwrite=cast("Any", config.overwrite),
        batch_size=config.batch_size,
        device=device,
        next_action=learner.next_action,
        online_stride=config.chunk * max(config.collector_workers, 1),
    )


def make_online_phase(
    config: SettledConfig,
    task: Task,
    learner: Learner,
    buffer: OfflineOnlineReplayBuffer,
    *,
    bank_file: Path,
    device: torch.device,
    reward_shift: float,
    show_progress: bool,
) -> OnlinePhase:
    """Make the online phase, with a bank of base actions where the prior is frozen.

    Raises:
        InputError: if the method has no prior to freeze.
    """
    gamma = step_gamma(config, task)
    bank = None
    if config.freeze_prior:
        if learner.prior is None:
            raise InputError(f"freeze_prior=true: {config.algo.name} has no prior to freeze")
        bank = BaseActionBank(learner.prior, buffer, num_actions=config.base_actions, seed=config.seed)

    def make_experience(add: Any, discard: Any) -> OnlineExperience:
        return OnlineExperience(
            task.environment or "",
            learner.online_policy,
            seed=config.seed,
            add=add,
            discard=discard,
            device=device,
            workers=config.collector_workers,
            steps_per_collection=config.steps_per_collection,
            max_fault_share=config.max_fault_share,
            chunk=config.chunk,
            gamma=gamma,
            frame_stack=config.frame_stack or 1,
        )

    return OnlinePhase(
        buffer,
        make_experience,
        bank=bank,
        bank_file=bank_file,
        bank_progress=lambda batches, total: progress_bar(
            batches, total=total, desc="base actions", unit="batch", leave=False, disable=not show_progress
        ),
        reward_shift=reward_shift,
        reward_weight=sum(gamma**step for step in range(config.chunk)),
    )


def make_graphed(
    update: Update, config: SettledConfig, learner: Learner, data: Transitions, *shape: int
) -> GraphedUpdate | None:
    """``update`` in CUDA graphs, on batches ``[*shape, B]`` of ``data``; None where the device or the settings have none."""
    if data.device.type != "cuda" or not config.cuda_graph:
        return None
    if soft_pairs(learner.target_updater) is None:
        return None  # an updater that counts its steps in Python would be recorded at one of them
    draw = functools.partial(data.draw, *shape, config.batch_size, next_action=learner.next_action)
    crop = _crop(data, config)
    return GraphedUpdate(
        update,
        draw if crop is None else lambda: crop(draw()),
        updates_per_replay=config.updates_per_replay,
        self_check=config.self_check,
    )
