# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The settings of a run: a dataclass as schema, their checks, and the values that a task fills in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from deflow_torchrl.algorithms.registry import get_algorithm
from deflow_torchrl.algorithms.settings import PRESETS, UPDATE_PRECISIONS, needed, one_of
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import file_name
from deflow_torchrl.tasks import (
    chosen_by_task,
    get_task,
    original_settings,
    paper_settings,
    paper_task,
    published_settings,
    usual_protocol,
)

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "preset": (None, *PRESETS),
    "mixing": (None, "uniform", "balanced", "annealed"),
    "overwrite": (None, "online", "fifo"),
    "reward": (None, "task", "sparse"),
    "chunk_ends": (None, "whole", "valid", "valid_row"),
    "storage": ("device", "memmap"),
    "normalize": ("none", "standard"),
    "precision": UPDATE_PRECISIONS,
    "encoder": (None, "impala_small", "impala", "impala_large", "impala_debug"),
    "logger": ("none", "wandb", "tensorboard", "mlflow"),
}
_AT_LEAST_ONE = (
    "chunk", "frame_stack", "batch_size", "eval_episodes", "log_interval", "base_actions", "steps_per_collection",
    "updates_per_replay", "anneal_steps", "online_capacity", "threads", "eval_workers",
    "eval_max_steps",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "offline_steps", "online_steps", "warmup_steps", "collector_workers", "eval_interval", "save_interval", "seed",
)  # fmt: skip
_OF_PICTURES = {
    "encoder": "encoder",
    "p_aug": "crop_probability",
    "frame_stack": "frame_stack",
}  # setting -> in the table
_OF_THE_TASK = (
    "offline_steps", "overwrite", "hidden_dims", "eval_interval", "eval_episodes", "batch_size", "mixing", "warmup_steps",
    "reward", "chunk", "chunk_ends", *_OF_PICTURES,
)  # fmt: skip


@dataclass
class TrainConfig:
    """Settings of ``deflow train``, ``key=value``; the defaults are the paper's protocol.

    Settings that are None and described as the task's are filled in by :func:`with_task_defaults`, those of the method too.

    Attributes:
        task: OGBench single-task name, for example ``cube-single-play-singletask-task2-v0``; the paper's D4RL names
            (``door-human-v1``); ``minari:ID``; or ``file:FOLDER``, a set made by ``deflow data import``.
        env: where ``file:`` and ``minari:`` data are evaluated: a gymnasium id, an OGBench single-task name, or ``none``; a
            Minari set's own environment where None.
        preset: which values to take where the paper and its authors' code disagree (docs/tasks.md): ``paper``, those printed,
            or ``released``, those of the code; this package's choice for each setting where None. A setting that is given
            stays as given.
        protocol: name of the protocol a sweep took the settings from, for the record; only ``deflow sweep protocol=`` sets it.
        seed: seed of networks, batches and noise.
        seeds: train one run for each of these seeds (``seeds=[0,1,2]``), all at once in one process and offline; each has a run
            folder of its own in ``out``.
        reward: ``task``, the environment's, or ``sparse``: -1 until the task is solved, then 0, in data and environment; of
            OGBench's scene and puzzle tasks only. ``task`` where None.
        offline_steps: gradient steps on the data set; the task's where None (1M of tasks outside the paper).
        online_steps: environment steps after them, on the policy's own experience and the data set.
        utd: gradient steps per environment step.
        warmup_steps: environment steps before the first online gradient step; 0 where None.
        mixing: how batches mix data set and experience: ``uniform`` over their union (the paper's), ``balanced`` (a fixed
            share) or ``annealed`` (a share that moves); ``uniform`` where None, or what the method is defined by.
        offline_fraction: ``balanced``: the data set's share of a batch; ``annealed``: ``[START,END]``.
        anneal_steps: ``annealed``: environment steps from START to END; all online steps where None.
        overwrite: what new experience replaces when there is no room: the oldest experience (``online``), or the oldest
            transition of all (``fifo``, the authors' code: their buffer has room for two million); the preset's where None.
        online_capacity: transitions of experience kept; all where None (with ``fifo``: room up to two million in all).
        freeze_prior: keep the flow prior as the offline phase left it: its base actions are drawn once, into a bank.
        base_actions: ``freeze_prior``: base actions kept of each state.
        collector_workers: processes that act; 0 acts in the learner's process, with the weights of the very last update.
        steps_per_collection: environment steps acted with the same weights (for processes: a multiple of them).
        max_fault_share: share of online episodes that may fail (an environment that raises or returns NaN).
        batch_size: transitions per gradient step; 256 where None.
        chunk: actions chosen at once and executed open loop (Q-chunking); the transitions are chunks of so many steps, whose
            rewards are discounted step by step; 1 where None.
        chunk_ends: where chunks of the data start: ``whole``, where all steps lie inside one trajectory; or everywhere, with
            flags of the steps behind a trajectory's end (``valid``, Q-chunking's), or one flag of the whole chunk (``valid_row``,
            QAM's). ``whole`` where None.
        hidden_dims: widths of the hidden layers of every network; where None 4 x 512, or the paper's for this method
            on this task.
        normalize: what the networks read: observations as they are (``none``, as the paper), or ``standard``, in units of the
            training data's standard deviation around its mean, column by column; the map is saved and exported with the policy.
        encoder: what encodes pictures: ``impala_small`` (the paper's), ``impala``, ``impala_large`` or ``impala_debug``; every
            part of a method has one of its own. The task's where None.
        p_aug: probability that the pictures of a batch are cropped at random; the task's where None (0.5 of visual tasks,
            else 0).
        frame_stack: frames of an observation, joined along the channels; the task's where None (3 of visual tasks, else 1).
        log_interval: steps between rows of metrics.
        eval_interval: steps between evaluations, 0 evaluates at the end only; the task's where None (100K).
        eval_episodes: episodes of each evaluation; the task's where None (50).
        video: ``true`` writes a clip of each evaluation into ``videos`` of the run folder, ``final`` of the last one alone, which
            shows all policies side by side and is in the report. Drawing needs a renderer (``deflow doctor``).
        eval_max_steps: environment steps of an evaluation episode at most; the environment's own limit where None.
        save_interval: steps between checkpoints; 0 saves at the end only.
        data_root: folder of NAME.npz and NAME-val.npz; ``$DEFLOW_HOME/data`` where None.
        download: fetch missing data from the source's host.
        storage: ``device`` keeps the data on the learner's device, ``memmap`` in memory-mapped files in
            ``$DEFLOW_HOME/prepared``, for sets larger than memory (online experience stays in memory).
        out: run folder, ``runs/TASK-ALGO-seedN`` where None; with ``seeds`` the folder of the run folders,
            ``runs/TASK-ALGO-seedsN-M``.
        device: learner's device.
        compile: run the losses through torch.compile (pays on long runs; needs a C++ compiler on a CPU).
        kernels: compute the networks with this package's CPU kernels; false goes through their layers (the same to rounding,
            slower). Without effect on a GPU, and on losses under compile.
        cuda_graph: on a GPU that holds the data, offline updates are captured in CUDA graphs, drawing of the batch included.
        updates_per_replay: ``cuda_graph``: updates of one graph.
        self_check: ``cuda_graph``: before it is used, three updates with and without it are compared; if they differ the run goes
            on without it and says so.
        precision: of the float32 matrix products of a whole update, forward and backward: ``highest``; ``high`` or ``medium`` as
            in ``torch.set_float32_matmul_precision`` (TF32 on a GPU; ``medium`` is bfloat16 on a CPU with AMX or AVX-512 BF16,
            and changes nothing on others). Acting, evaluation and diagnostics are always computed in full.
        threads: torch's CPU threads; torch's default where None.
        eval_workers: processes that step environments; all cores where None.
        logger: ``none``, ``wandb``, ``tensorboard`` or ``mlflow``, beside the JSONL and CSV that are always written.
        algo: the method's settings, ``algo=NAME`` and ``algo.<name>=...``.
    """

    task: str = "???"
    env: str | None = None
    preset: str | None = None
    protocol: str | None = None
    seed: int = 0
    seeds: list[int] | None = None
    reward: str | None = None
    offline_steps: int | None = None
    online_steps: int = 0
    utd: float = 1.0
    warmup_steps: int | None = None
    mixing: str | None = None
    offline_fraction: Any = 0.5
    anneal_steps: int | None = None
    overwrite: str | None = None
    online_capacity: int | None = None
    freeze_prior: bool = False
    base_actions: int = 8
    collector_workers: int = 0
    steps_per_collection: int = 1
    max_fault_share: float = 0.1
    batch_size: int | None = None
    chunk: int | None = None
    chunk_ends: str | None = None
    hidden_dims: list[int] | None = None
    normalize: str = "none"
    encoder: str | None = None
    p_aug: float | None = None
    frame_stack: int | None = None
    log_interval: int = 1_000
    eval_interval: int | None = None
    eval_episodes: int | None = None
    eval_max_steps: int | None = None
    video: Any = False
    save_interval: int = 100_000
    data_root: str | None = None
    download: bool = True
    storage: str = "device"
    out: str | None = None
    device: str = "cpu"
    compile: bool = False
    kernels: bool = True
    cuda_graph: bool = True
    updates_per_replay: int = 10
    self_check: bool = True
    precision: str = "highest"
    threads: int | None = None
    eval_workers: int | None = None
    logger: str = "none"
    algo: Any = "???"


if TYPE_CHECKING:

    class SettledConfig(TrainConfig):
        """Settings in which nothing that a run needs is None."""

        offline_steps: int
        overwrite: str
        hidden_dims: list[int]
        encoder: str
        p_aug: float
        frame_stack: int
        eval_interval: int
        eval_episodes: int
        batch_size: int
        mixing: str
        warmup_steps: int
        reward: str
        chunk: int
        chunk_ends: str

else:
    SettledConfig = TrainConfig


def with_task_defaults(config: TrainConfig) -> SettledConfig:
    """Fill in the settings that are None with the values of the task and the preset.

    A task of the paper has the paper's protocol and the values of its Table 6; with ``online_steps`` the values of
    offline-to-online training come first. Other tasks have the protocol of OGBench's state-based tasks, and no value for
    settings that the paper chooses for each task. Settings that are not None stay, so that filling twice changes nothing.

    Raises:
        InputError: on an unknown task, or where the paper chooses a setting of the method for each task and neither the paper
            nor the settings have a value for this one.
    """
    settled = with_run_defaults(config)
    algo = config.algo
    values = method_values(config)
    filled = {
        item.name: _as_annotated(item, values[item.name])
        for item in dataclasses.fields(algo)
        if getattr(algo, item.name) is None and item.name in values
    }
    algo = replace(algo, **filled)
    for name in paper_settings(algo.name):
        if hasattr(algo, name) and name not in algo.alternatives:
            needed(getattr(algo, name), name)
    if algo.alternatives:
        one_of(algo)
    return replace(settled, algo=algo)


def with_run_defaults(config: TrainConfig) -> SettledConfig:
    """Fill in the settings of the run that are None; those of the method stay as they are."""
    missing = [name for name in _OF_THE_TASK if getattr(config, name) is None]
    if not missing:
        return cast("SettledConfig", config)  # a run folder's task is looked up when it is used
    task = paper_task(config.task, "offline_to_online") if config.online_steps else None
    task = task or paper_task(config.task)
    pixels: Mapping[str, Any] | None
    if task is None:
        values = usual_protocol(pixels=get_task(config.task, environment=config.env).images)
        pixels = values.pop("pixels")
    else:
        pixels = task.pixels
        values = {
            "offline_steps": task.offline_steps,
            "eval_interval": task.eval_interval,
            "eval_episodes": task.eval_episodes,
            "hidden_dims": task.hidden_dims.get(config.algo.name, task.default_hidden_dims),
        }
        values |= {
            name: task.released[name] for name in values if config.preset == "released" and name in task.released
        }
    values["hidden_dims"] = list(values["hidden_dims"])
    values |= {"encoder": "impala_small", "p_aug": 0.0, "frame_stack": 1}
    if pixels is not None:
        values |= {name: pixels[known] for name, known in _OF_PICTURES.items()}
    values |= {"overwrite": "fifo" if config.preset == "released" else "online", "batch_size": 256, "mixing": "uniform"}
    values |= {"warmup_steps": 0, "reward": "task", "chunk": 1, "chunk_ends": "whole"}
    values |= get_algorithm(config.algo.name).run_settings
    values |= {name: value for name, value in footing_settings(config).items() if not name.startswith("algo.")}
    return cast("SettledConfig", replace(config, **{name: values[name] for name in missing}))


def footing_settings(config: TrainConfig) -> dict[str, Any]:
    """Settings of the run, and ``algo.NAME`` of the method, that an original footing has on the task."""
    if getattr(config.algo, "footing", "common") == "common":
        return {}
    return original_settings(config.algo.name, config.task, vars(config.algo))


def method_values(config: TrainConfig) -> dict[str, Any]:
    """Values that the task and the preset give to settings of the run's method."""
    task = get_task(config.task, environment=config.env, reward=config.reward)
    # Every task has these, in the paper or not.
    values: dict[str, Any] = {
        "gamma": task.gamma, "q_aggregation": task.q_aggregation, "target_divergence": task.target_divergence,
    }  # fmt: skip
    values |= config.algo.common
    for row in (paper_task(config.task), paper_task(config.task, "offline_to_online") if config.online_steps else None):
        if row is not None:
            values |= row.hyperparameters.get(config.algo.name, {})
            values |= published_settings(config.algo.name, row, online=bool(config.online_steps))
            if config.preset == "released":
                values |= {name: value for name, value in row.released.items() if name in values}
    values |= {key: choice[config.preset] for key, choice in config.algo.choices.items()}
    prefix = "algo."
    values |= {
        name.removeprefix(prefix): value for name, value in footing_settings(config).items() if name.startswith(prefix)
    }
    return values


def values_like(config: TrainConfig, tasks: Sequence[str]) -> dict[str, Any]:
    """Values of the method's settings that are None, each of the first of these tasks that has one."""
    values: dict[str, Any] = {}
    for task in reversed(tasks):
        values |= method_values(replace(config, task=task))
    return {
        item.name: _as_annotated(item, values[item.name])
        for item in dataclasses.fields(config.algo)
        if getattr(config.algo, item.name) is None and item.name in values and item.name not in config.algo.choices
    }


def untuned_settings(config: TrainConfig) -> list[str]:
    """Settings of the method that are chosen by task, and for which nobody published a value for this one."""
    known: Mapping[str, Any] = {}
    row = paper_task(config.task, "offline_to_online") if config.online_steps else None
    if (row := row or paper_task(config.task)) is not None:
        known = {
            **row.hyperparameters.get(config.algo.name, {}),
            **published_settings(config.algo.name, row, online=bool(config.online_steps)),
        }
    chosen = chosen_by_task(config.algo.name)
    return [name for name in chosen if name not in known and getattr(config.algo, name, None) is not None]


def _as_annotated(item: dataclasses.Field[Any], value: Any) -> Any:
    return float(value) if "float" in str(item.type) else value


def config_from_dict(values: dict[str, Any]) -> SettledConfig:
    """Build and check the settings from a plain dictionary, as a run folder keeps them.

    Settings of the run that are missing or None are the task's (:func:`with_task_defaults`). Those of the method stay None, as
    earlier versions left them where they were the task's.

    Raises:
        InputError: on unknown names or values out of range, and on an unknown task.
    """
    try:
        algo = dict(values["algo"])
        config = TrainConfig(**{**values, "algo": get_algorithm(algo["name"]).config(**algo)})
        _check(config)
    except InputError:
        raise
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"settings do not fit this version: {type(error).__name__} {error}") from error
    return with_run_defaults(config)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The settings as a plain dictionary."""
    return asdict(config)


def method_variant(config: TrainConfig) -> dict[str, Any]:
    """The method's settings that are neither its defaults, nor the task's or the preset's: a table shows them with its name."""
    usual = asdict(get_algorithm(config.algo.name).config())
    usual |= {name: value for name, value in method_values(config).items() if usual.get(name, "") is None}
    return {name: value for name, value in asdict(config.algo).items() if value != usual[name]}


def default_out(config: TrainConfig) -> Path:
    """The run folder where none is given."""
    seed = f"seed{config.seed}" if config.seeds is None else f"seeds{'-'.join(map(str, config.seeds))}"
    return Path("runs") / f"{file_name(config.task)}-{config.algo.name}-{seed}"


def setting_names(config: type[Any]) -> list[str]:
    """Names of the settings a user can set, of :class:`TrainConfig` or of a method's settings."""
    return [item.name for item in dataclasses.fields(config) if item.name not in ("name", "protocol")]


def _need(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise InputError(f"{name}={value} is out of range; expected {expected}")


def _check(config: TrainConfig) -> None:
    if config.task == "???":
        raise InputError("no task given; name one, for example task=cube-single-play-singletask-task2-v0")
    for least, names in ((1, _AT_LEAST_ONE), (0, _AT_LEAST_ZERO)):
        for name in names:
            value = getattr(config, name)
            _need(value is None or value >= least, name, value, f"at least {least}")
    for name, choices in _CHOICES.items():
        _need(
            getattr(config, name) in choices, name, getattr(config, name), f"one of {', '.join(filter(None, choices))}"
        )
    for name, what in (("out", "a folder"), ("data_root", "a folder"), ("env", "a name")):
        _need(getattr(config, name) != "", name, "''", what)
    _need(config.offline_steps != 0 or config.online_steps >= 1, "offline_steps", 0, "at least 1, or online_steps")
    _need(config.seed < 2**63, "seed", config.seed, "a number below 2**63")
    _need(config.p_aug is None or 0 <= config.p_aug <= 1, "p_aug", config.p_aug, "a probability, 0 to 1")
    _need(config.video in (True, False, "final"), "video", config.video, "true, false or final")
    widths = config.hidden_dims
    _need(widths is None or (bool(widths) and min(widths) >= 1), "hidden_dims", widths, "positive widths")
    _check_online(config)
    if not get_algorithm(config.algo.name).trains_offline and (config.offline_steps or not config.online_steps):
        raise InputError(
            f"algo={config.algo.name} learns from its own experience beside the data and has no offline phase; set "
            "online_steps, and leave offline_steps out"
        )
    if config.seeds is not None:
        _check_seeds(config, config.seeds)
    for name, value in vars(config.algo).items():
        _need(not isinstance(value, float) or math.isfinite(value), f"algo.{name}", value, "a finite number")
    config.algo.check(_need)
    precision = getattr(config.algo, "sampler_precision", "highest")
    if config.compile and precision in ("high", "medium"):
        raise InputError(f"algo.sampler_precision={precision} cannot be compiled; choose bfloat16, or compile=false")


def _check_online(config: TrainConfig) -> None:
    _need(config.utd > 0 and math.isfinite(config.utd), "utd", config.utd, "a positive number")
    _need(0 <= config.max_fault_share <= 1, "max_fault_share", config.max_fault_share, "a share between 0 and 1")
    share = config.offline_fraction
    shares = list(share) if isinstance(share, (list, tuple)) else [share]
    fits = all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in shares)
    if config.mixing == "annealed":
        _need(fits and len(shares) == 2, "offline_fraction", share, "two shares, for example [1.0,0.5], with annealed")
    else:
        _need(fits and shares == [share], "offline_fraction", share, "a share between 0 and 1")
    workers, steps = config.collector_workers, config.steps_per_collection
    expected = f"a multiple of collector_workers={workers}"
    _need(workers == 0 or steps % workers == 0, "steps_per_collection", steps, expected)
    if config.online_steps == 0 and config.freeze_prior:
        raise InputError("freeze_prior=true freezes the prior in the online phase; set online_steps too")
    if config.online_steps and config.env == "none":
        raise InputError(f"online_steps={config.online_steps} needs an environment, and env=none asks for none")


def _check_seeds(config: TrainConfig, seeds: list[int]) -> None:
    _need(len(seeds) > 0, "seeds", seeds, "at least one, for example seeds=[0,1,2]")
    _need(len(set(seeds)) == len(seeds), "seeds", seeds, "each seed once")
    _need(all(0 <= seed < 2**63 for seed in seeds), "seeds", seeds, "numbers from 0 to below 2**63")
    if config.seed != 0:
        raise InputError(f"seed={config.seed} beside seeds={seeds}: give one of the two")
    if config.online_steps:
        raise InputError(
            f"online_steps={config.online_steps}: seeds are trained together offline only; leave it off, and go on with each "
            f"seed's own folder: deflow resume OUT/seed{seeds[0]} online_steps={config.online_steps} --force"
        )
    if config.compile:
        raise InputError("compile=true: the stacked losses of seeds cannot be compiled; leave it off")
    if config.logger in ("wandb", "mlflow"):
        raise InputError(f"logger={config.logger} follows one run in a process; with seeds take tensorboard or none")
