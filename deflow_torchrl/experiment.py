# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run from settings to report: data, networks, training, evaluation, record, curve and page in one folder."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torchrl.envs import DeviceCastTransform

from deflow_torchrl.algorithms import Learner, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.config import (
    SettledConfig,
    TrainConfig,
    apply_overrides,
    config_from_dict,
    config_to_dict,
    default_out,
    method_values,
    with_task_defaults,
)
from deflow_torchrl.data import OfflineOnlineReplayBuffer, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.data.base_actions import BaseActionBank
from deflow_torchrl.envs.factory import make_gym_env, success_timing
from deflow_torchrl.errors import (
    CheckpointNotWritten,
    EnvironmentFaultError,
    InputError,
    NonFiniteLossError,
    RunInterrupted,
)
from deflow_torchrl.generators import seed_generators
from deflow_torchrl.modules.kernels import enable_kernels
from deflow_torchrl.paths import make_writable_folder, write_text
from deflow_torchrl.processes import available_cores
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports import build_record, check_report_extra, plot_learning_curve, write_html_report
from deflow_torchrl.reports.records import RECORD_FILE
from deflow_torchrl.sources.base import get_source, settled_name
from deflow_torchrl.tasks import Task, get_task
from deflow_torchrl.tasks.data import load_task_data, reference_returns
from deflow_torchrl.trainers import EvaluationResult, Evaluator, MetricsLog, Trainer, TrainerSchedule, UpdateStep
from deflow_torchrl.trainers.alarms import Alarms
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint, step_of
from deflow_torchrl.trainers.collection import OnlineExperience
from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.metrics import check_logger, logger_state, make_logger
from deflow_torchrl.trainers.online import OnlinePhase
from deflow_torchrl.trainers.resume import (
    RunHistory,
    check_resumable,
    find_checkpoint,
    run_identity,
)
from deflow_torchrl.trainers.update import Update, restore_learner, soft_pairs

CONFIG_FILE = "config.yaml"
GROUP_FILE = "group.yaml"  # beside the run folders of seeds that are trained together
ACTING = "acting"
BANK_FILE = "base_actions.pt"
_NUM_ENVS = 10
_DIAGNOSED_TRANSITIONS = 10_000
_REFERENCE_CAPACITY = 2_000_000


def train(
    config: TrainConfig,
    *,
    command: str,
    final_episodes: int | None = None,
    extra_seconds: Mapping[str, float] | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train and evaluate a new run and leave its folder.

    Args:
        config: the settings; those that are None and the task's are filled in.

    Keyword Args:
        command: the command line, for the record.
        final_episodes: episodes of the evaluation at the end; ``config.eval_episodes`` by default.
        extra_seconds: wall time of phases before this one, for the record.
        show_progress: show progress bars on standard error.

    Returns:
        The record, as written to ``record.json``.

    Raises:
        InputError: on data, device or folder that cannot be used; nothing is left behind then.
        NonFiniteLossError: if a loss became NaN or infinite.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    if config.seeds is not None:
        raise InputError("a run has one seed; several are trained by deflow_torchrl.group.train_group")
    out = default_out(config) if config.out is None else Path(config.out)
    check_free(out)
    settled = resumable_from_anywhere(replace(with_task_defaults(config), out=str(out)))
    run = Run(
        settled,
        out,
        commands=[command],
        extra_seconds=extra_seconds,
        final_episodes=final_episodes,
        show_progress=show_progress,
    )
    make_writable_folder(out)
    run.write_config()
    return run.go(resume=False)


def check_free(out: Path) -> None:
    """Raise InputError if ``out`` already holds a run."""
    if (out / CONFIG_FILE).exists() or (out / GROUP_FILE).exists():
        raise InputError(
            f"{out} already holds a run; go on with `deflow resume {out}` or choose another folder with out="
        )


def resume(
    out: Path,
    *,
    command: str,
    overrides: Sequence[str] = (),
    force: bool = False,
    step: int | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Go on with an interrupted run from its last checkpoint (from the start, if it has none); see also :func:`train`.

    Args:
        out: run folder.

    Keyword Args:
        command: the command line, for the record.
        overrides: ``key=value`` settings to change.
        force: go on although settings differ from the checkpoint's.
        step: go on from this kept checkpoint; the later ones are removed.
        show_progress: show progress bars on standard error.

    Raises:
        InputError: if ``out`` is no run folder, its checkpoint is damaged or of another run, or settings differ.
    """
    settings = read_run_settings(out)
    _check_free_of_group(out, settings)
    saved = config_from_dict(settings["config"])
    if any(override.startswith("out=") for override in overrides):
        raise InputError(f"out= cannot be changed; move {out} to where you want it")
    if any(override.startswith("seeds=") for override in overrides):
        raise InputError(f"seeds= cannot be changed: {out} is a run of one seed")
    config = replace(resumable_from_anywhere(apply_overrides(saved, overrides)), out=str(out))
    checkpoint = find_checkpoint(out / "checkpoints", step)
    changes = check_resumable(
        config_to_dict(config),
        saved=config_to_dict(saved),
        checkpoint=checkpoint,
        config_file=out / CONFIG_FILE,
        force=force,
    )
    commands = [settings["command"], command] if settings["command"] else [command]
    run = Run(
        config,
        out,
        commands=commands,
        final_episodes=settings["final_episodes"],
        stacked=settings["stacked"],
        show_progress=show_progress,
    )
    return run.go(resume=True, checkpoint=checkpoint, keep_settings=bool(changes))


def evaluate_run(
    out: Path,
    *,
    episodes: int | None,
    device: str | None = None,
    policy: str | None = None,
    workers: int | None = None,
    seed: int = DEFAULT_EVALUATION_SEED,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Evaluate the policies of a run's last checkpoint, each on the same starts.

    Args:
        out: run folder.

    Keyword Args:
        episodes: episodes of each policy; the run's own number by default.
        device: device of the policies; the run's own by default.
        policy: evaluate this one alone, ``acting`` being the run's acting policy; all by default.
        workers: processes that step environments; the run's own setting by default.
        seed: of the starts and the noise.
        show_progress: show progress bars on standard error.

    Returns:
        Step, seed, metric, and policy name -> outcome.

    Raises:
        InputError: if ``out`` is no run folder, holds no checkpoint or has no such policy.
    """
    loaded = load_run(out, policy=policy, device=device)
    config, learner, task = loaded.config, loaded.learner, loaded.task
    if workers is not None:
        config = replace(config, eval_workers=workers)
    with open_evaluator(task, config, loaded.device) as evaluator:
        if evaluator is None:
            raise InputError(f"{out} was trained without an environment (env=); there is nothing to evaluate it in")
        outcomes = _evaluate_all(
            evaluator, learner, episodes or loaded.final_episodes or config.eval_episodes, show_progress, seed=seed
        )
    return {
        "step": loaded.state["step"],
        "seed": seed,
        "metric": task.metric,
        "evaluations": _outcomes(outcomes, reference_returns(task)),
    }


@dataclass(frozen=True)
class LoadedRun:
    """A run's last checkpoint in the networks it belongs to.

    Attributes:
        config: the run's settings.
        final_episodes: episodes of its last evaluation; None where the settings say nothing.
        task: what it is about.
        checkpoint: the file.
        state: the checkpoint's state.
        learner: the method with its weights.
        device: where they are.
    """

    config: SettledConfig
    final_episodes: int | None
    task: Task
    checkpoint: Path
    state: Mapping[str, Any]
    learner: Learner
    device: torch.device


def load_run(out: Path, *, policy: str | None = None, device: str | None = None) -> LoadedRun:
    """Load a run's last checkpoint, and use kernels and threads as the run does from now on.

    Args:
        out: run folder.

    Keyword Args:
        policy: keep this one alone among the evaluated policies, ``acting`` being the run's acting policy.
        device: where to; the run's own by default.

    Raises:
        InputError: if ``out`` is no run folder, holds no checkpoint or has no such policy.
    """
    settings = read_run_settings(out)
    config = config_from_dict(settings["config"])
    checkpoints = list_checkpoints(out / "checkpoints")
    if not checkpoints:
        raise InputError(f"{out} has no checkpoint yet; train it with `deflow resume {out}`")
    identity = run_identity(config_to_dict(config), data_sha256=None)
    state = load_checkpoint(checkpoints[-1], identity=identity)
    where = _device(device or config.device)
    enable_kernels(config.kernels)
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # the number of threads can move the last digits of a matrix product
    learner = _build(config, state["observation_dim"], state["action_dim"], where)
    restore_learner(UpdateStep(learner), state, checkpoints[-1])
    policies = learner.evaluated_policies
    if policy is not None:
        name = learner.acting_policy if policy == ACTING else policy
        if name not in policies:
            raise InputError(f"{out} has no policy {name!r}; there are {', '.join(policies)}")
        learner = replace(learner, evaluated_policies={name: policies[name]})
    return LoadedRun(config, settings["final_episodes"], _task(config), checkpoints[-1], state, learner, where)


def read_run_settings(out: Path) -> dict[str, Any]:
    """Read the settings a run folder keeps.

    Returns:
        ``config``, ``final_episodes``, the ``command`` that began it (or None), and the seeds it was ``stacked`` with (or None).

    Raises:
        InputError: if ``out`` is no run folder.
    """
    if (out / GROUP_FILE).is_file() and not (out / CONFIG_FILE).is_file():
        settings = read_settings(out / GROUP_FILE)
        raise InputError(
            f"{out} holds the runs of seeds {settings['config']['seeds']}; name one of them, for example "
            f"{seed_folder(out, settings['config']['seeds'][0])}"
        )
    if not (out / CONFIG_FILE).is_file():
        raise InputError(f"{out} is not a run folder: it has no {CONFIG_FILE}")
    return read_settings(out / CONFIG_FILE)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a run's :data:`CONFIG_FILE` or a group's :data:`GROUP_FILE`.

    Raises:
        InputError: if it is damaged.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        needed = {key: settings[key] for key in ("config", "final_episodes")}
        return {"command": None, "stacked": None, "finished": False, **settings, **needed}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what :func:`read_settings` reads."""
    import yaml

    write_text(path, yaml.safe_dump(dict(settings), sort_keys=False))


def seed_folder(out: Path, seed: int) -> Path:
    """The run folder of a seed that is trained together with others in ``out``."""
    return out / f"seed{seed}"


def _check_free_of_group(out: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError if a run belongs to a group that is still training."""
    group = out.absolute().parent
    if settings["stacked"] and (group / GROUP_FILE).is_file() and not read_settings(group / GROUP_FILE)["finished"]:
        raise InputError(
            f"{out} is trained together with the runs of seeds {settings['stacked']}, which are not finished; go on with all "
            f"of them: deflow resume {shlex.quote(str(group))}"
        )


@dataclass(frozen=True)
class TaskData:
    """A task's data as runs of several seeds share it.

    Attributes:
        train: the offline set.
        validation: the validation set, where the task has one.
        about: its description, for the record.
    """

    train: TransitionDataset
    validation: TransitionDataset | None
    about: dict[str, Any]


class Run:
    """One run's parts, put together before anything is written.

    Args:
        config: the settings.
        out: run folder.

    Keyword Args:
        commands: command lines that worked on it so far, this one last.
        extra_seconds: wall time of phases before this one.
        final_episodes: episodes of the evaluation at the end; ``config.eval_episodes`` by default.
        data: the task's data, where it is loaded already.
        stacked: seeds of all runs that it is trained with in one process; None for a run by itself.
        show_progress: show progress bars on standard error.
    """

    def __init__(
        self,
        config: SettledConfig,
        out: Path,
        *,
        commands: Sequence[str],
        extra_seconds: Mapping[str, float] | None = None,
        final_episodes: int | None,
        data: TaskData | None = None,
        stacked: Sequence[int] | None = None,
        show_progress: bool,
    ) -> None:
        self.config = config
        self.out = out
        self.stacked = stacked
        self.history = RunHistory(commands, seconds=extra_seconds)
        self.final_episodes = final_episodes or config.eval_episodes
        self.show_progress = show_progress
        self.outcomes: dict[str, EvaluationResult] = {}
        self.task = _task(config)
        if self.task.images:
            raise _images(config.task)
        if config.online_steps and self.task.environment is None:
            raise InputError(f"online_steps={config.online_steps} needs an environment; name one with env=")
        check_logger(config.logger)
        check_report_extra()
        self.device = _device(config.device)
        if config.online_steps and config.storage == "memmap" and self.device.type != "cpu":
            raise InputError(
                f"storage=memmap keeps the data on the CPU, and online batches are put together on device={config.device}; set "
                "storage=device, or device=cpu"
            )
        enable_kernels(config.kernels)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with self.history.timed("load_data"):
            self.data = self._load() if data is None else data
            dataset, validation = self.data.train, self.data.validation
            self.reward_bound = float(dataset.reward.abs().max())
            self.reward_shift = float(dataset.about.get("reward_shift", 0.0))
            self.references = reference_returns(self.task)
        seed_generators(config.seed)
        self.learner = _build(config, dataset.observation.shape[-1], dataset.action.shape[-1], self.device)
        with self.history.timed("load_data"):
            self.buffer = self._union(dataset) if config.online_steps else self._buffer(dataset)
            self.validation = None if validation is None else self._buffer(validation)
        if self.learner.diagnostics is not None:  # a few thousand rows of a set that may not fit into memory
            rows = torch.linspace(0, len(dataset) - 1, min(len(dataset), _DIAGNOSED_TRANSITIONS)).round().long()
            self.learner.diagnostics.use_data(dataset[rows])
        rules = get_algorithm(config.algo.name).alarms
        self.alarms = Alarms(gamma=self._gamma, reward_bound=self.reward_bound, rules=rules)
        self.update = UpdateStep(self.learner, compile_loss=config.compile)

    def write_config(self) -> None:
        """Write the settings into the run folder."""
        settings = {
            "config": config_to_dict(self.config),
            "final_episodes": self.final_episodes,
            "command": self.history.commands[0],
        }
        if self.stacked is not None:
            settings["stacked"] = list(self.stacked)
        write_settings(self.out / CONFIG_FILE, settings)

    def go(self, *, resume: bool, checkpoint: Path | None = None, keep_settings: bool = False) -> dict[str, Any]:
        """Train, evaluate and report; the record."""

        def newest() -> tuple[int, str] | None:
            kept = list_checkpoints(self.out / "checkpoints")
            return (step_of(kept[-1]), f"checkpoint is {kept[-1]}") if kept else None

        with saying_how_to_go_on(self.out, self.config.offline_steps + self.config.online_steps, newest):
            self.open(resume=resume, checkpoint=checkpoint, keep_settings=keep_settings)
            with open_evaluator(self.task, self.config, self.device) as evaluator:
                self.evaluate_with(evaluator)
                with self.history.timed("train_and_evaluate"):
                    self.trainer.run()
                self.evaluate_if_missing()
            return self.report()

    def open(self, *, resume: bool, checkpoint: Path | None, keep_settings: bool) -> None:
        """Make the trainer, at the checkpoint where there is one, and the files it writes."""
        config = self.config
        metrics = MetricsLog(self.out, resume_step=0 if resume and checkpoint is None else None)
        trainer = self.trainer = Trainer(
            self.update,
            self.buffer,
            schedule=TrainerSchedule(
                offline_steps=config.offline_steps,
                online_steps=config.online_steps,
                log_interval=config.log_interval,
                eval_interval=config.eval_interval,
                save_interval=config.save_interval,
                utd=config.utd,
                warmup_steps=config.warmup_steps,
            ),
            checkpoints=self.out / "checkpoints",
            online=self._online_phase() if config.online_steps else None,
            metrics=metrics,
            evaluate=None if self.task.environment is None else self._evaluate,
            score=f"eval/{self.task.metric}",
            identity=run_identity(config_to_dict(config), data_sha256=self.data.about["sha256"]),
            history=self.history,
            alarms=self.alarms,
            extra_state=self.learner_sizes,
            validation=self.validation,
            show_progress=self.show_progress,
            label="" if self.stacked is None else f"seed {config.seed}, ",
            graphed=None if self.stacked is not None else self.graphed(self.update),
        )
        if checkpoint is not None:
            trainer.resume(checkpoint, keep_settings=keep_settings)
        if resume:
            self.write_config()
        written = trainer.written_step if resume else None
        logger = make_logger(config.logger, self.out, state=trainer.notes.get("logger"), step=written)
        trainer.notes["logger"] = logger_state(config.logger, logger)
        metrics.send_to(logger)

    def evaluate_with(self, evaluator: Evaluator | None) -> None:
        """Have the trainer's evaluations made by this evaluator; by none, where there is no environment."""
        self._evaluator = evaluator

    def evaluate_if_missing(self) -> None:
        """Make the last evaluation, if the run was killed between its last checkpoint and its record."""
        if self._evaluator is not None and not self.outcomes:
            self._evaluate()

    @property
    def _gamma(self) -> float:
        given = getattr(self.config.algo, "gamma", None)
        return self.task.gamma if given is None else given

    @property
    def learner_sizes(self) -> dict[str, int]:
        """What a checkpoint needs for its networks to be built without the data."""
        sample = self.buffer[:1]
        return {"observation_dim": sample["observation"].shape[-1], "action_dim": sample["action"].shape[-1]}

    def _load(self) -> TaskData:
        train = self._load_data("train")
        assert train is not None
        if train.observation.ndim != 2:
            raise _images(self.config.task)
        validation = self._load_data("val")
        self._check_environment(train)
        return TaskData(train, validation, self._describe_data(train))

    def _load_data(self, split: Literal["train", "val"]) -> TransitionDataset | None:
        config = self.config
        return load_task_data(
            self.task,
            split=split,
            root=config.data_root,
            download=config.download,
            device=self.device,
            memmap=config.storage == "memmap",
        )

    def graphed(self, update: Update, *shape: int) -> GraphedUpdate | None:
        """``update`` in CUDA graphs, on batches ``[*shape, B]``; None where the device or the settings have none."""
        config, data = self.config, self.data.train
        if self.device.type != "cuda" or not config.cuda_graph or data.device.type != "cuda":
            return None
        if soft_pairs(self.learner.target_updater) is None:
            return None  # one that counts its steps in Python would be recorded at one of them
        return GraphedUpdate(
            update,
            functools.partial(data.draw, *shape, config.batch_size, next_action=self.learner.next_action),
            updates_per_replay=config.updates_per_replay,
            self_check=config.self_check,
        )

    def batches(self, number: int) -> TransitionReplayBuffer:
        """A buffer of the offline set that samples so many batches' transitions at once."""
        return self._buffer(self.data.train, number=number)

    def _buffer(self, dataset: TransitionDataset, *, number: int = 1) -> TransitionReplayBuffer:
        buffer = TransitionReplayBuffer(
            dataset, batch_size=number * self.config.batch_size, next_action=self.learner.next_action
        )
        if dataset.device != self.device:
            buffer.append_transform(DeviceCastTransform(self.device))
        return buffer

    def _union(self, dataset: TransitionDataset) -> OfflineOnlineReplayBuffer:
        """The data set and room for what the online phase brings."""
        config = self.config
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
            device=self.device,
            next_action=self.learner.next_action,
            online_stride=max(config.collector_workers, 1),
        )

    def _online_phase(self) -> OnlinePhase:
        config, environment = self.config, self.task.environment
        assert isinstance(self.buffer, OfflineOnlineReplayBuffer)
        assert environment is not None

        def make_experience(add: Any, discard: Any) -> OnlineExperience:
            return OnlineExperience(
                environment,
                self.learner.online_policy,
                seed=config.seed,
                add=add,
                discard=discard,
                device=self.device,
                workers=config.collector_workers,
                steps_per_collection=config.steps_per_collection,
                max_fault_share=config.max_fault_share,
            )

        def progress(batches: Any, total: int) -> Any:
            return progress_bar(
                batches, total=total, desc="base actions", unit="batch", leave=False, disable=not self.show_progress
            )

        bank = None
        if config.freeze_prior:
            if self.learner.prior is None:
                raise InputError(f"freeze_prior=true: {config.algo.name} has no prior to freeze")
            bank = BaseActionBank(self.learner.prior, self.buffer, num_actions=config.base_actions, seed=config.seed)
        return OnlinePhase(
            self.buffer,
            make_experience,
            bank=bank,
            bank_file=self.out / BANK_FILE,
            bank_progress=progress,
            reward_shift=self.reward_shift,
        )

    def _check_environment(self, dataset: TransitionDataset) -> None:
        """Make the environment once, before anything is written or trained, and compare its widths with the data's."""
        if self.task.environment is None or get_source(self.task.source).fixed_environment:
            return  # of the latter the loader has done so
        try:
            env = make_gym_env(self.task.environment)
        except InputError as error:
            raise InputError(f"{error} (env=none trains without evaluating)") from error
        spaces = {"observations": env.observation_space.shape, "actions": env.action_space.shape}
        env.close()
        for name, shape in (("observations", dataset.observation.shape[1:]), ("actions", dataset.action.shape[1:])):
            if tuple(shape) != spaces[name]:
                raise InputError(
                    f"{self.task.dataset}: {name} have shape {tuple(shape)}, those of {self.task.environment} {spaces[name]}; "
                    "the data belong to another environment"
                )

    def _describe_data(self, dataset: TransitionDataset) -> dict[str, Any]:
        about = {key: value for key, value in dataset.about.items() if key not in ("fingerprint", "sha256")}
        return {
            **get_source(self.task.source).describe(self.task.dataset, root=self.config.data_root),
            "transitions": len(dataset),
            "provenance": about.pop("provenance", None),
            **about,
        }

    def _evaluate(self) -> dict[str, float]:
        evaluator = self._evaluator
        assert evaluator is not None
        if self.trainer.step < self.config.offline_steps + self.config.online_steps:
            result = _evaluate(evaluator, "eval", self.learner.policy, self.config.eval_episodes, self.show_progress)
            self._note({self.learner.acting_policy: result})
            return _metrics("eval", result, self.task, self.references)
        self.outcomes = _evaluate_all(evaluator, self.learner, self.final_episodes, self.show_progress)
        self._note(self.outcomes)
        row: dict[str, float] = {}
        for name, result in self.outcomes.items():
            row |= _metrics(
                "eval" if self.learner.evaluated_policies[name] is self.learner.policy else f"eval/{name}",
                result,
                self.task,
                self.references,
            )
        return row

    def _note(self, results: Mapping[str, EvaluationResult]) -> None:
        """Keep an evaluation, episode by episode, for the record."""
        trainer = self.trainer
        earlier = [item for item in trainer.notes.get("evaluations", []) if item["step"] < trainer.step]
        phase = trainer.schedule.phase(trainer.step)
        note = {"step": trainer.step, "phase": phase, "policies": _outcomes(results, self.references)}
        trainer.notes["evaluations"] = [*earlier, note]

    def report(self) -> dict[str, Any]:
        """Write record, curve and page; the record."""
        trainer = self.trainer
        rows = [] if trainer.metrics is None else trainer.metrics.rows
        delta = getattr(self.learner.loss, "target_divergence", None)
        record = build_record(
            commands=self.history.commands,
            config=config_to_dict(self.config),
            data=self.data.about,
            metric=self.task.metric,
            acting=self.learner.acting_policy,
            variant=method_variant(self.config),
            success_timing=None if self.task.environment is None else success_timing(self.task.environment),
            evaluation_seed=DEFAULT_EVALUATION_SEED,
            evaluations=_outcomes(self.outcomes, self.references),
            history=trainer.notes.get("evaluations", []),
            online=None if trainer.online is None else trainer.online.counters,
            alarms=None if self.learner.diagnostics is None else [asdict(alarm) for alarm in self.alarms.raised],
            stacked=self.stacked,
            seconds={**self.history.seconds, "updates": trainer.trained_seconds},
        )
        write_text(self.out / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        title = f"{self.config.algo.name} on {self.config.task}, seed {self.config.seed}"
        figure = plot_learning_curve(
            rows,
            self.out / "learning_curve.png",
            title=title,
            metric=self.task.metric,
            final=final_numbers(record["evaluations"], self.task.metric),
            target_divergence=None if delta is None else float(delta),
        )
        write_html_report(
            self.out / "report.html",
            title=title,
            record=record,
            rows=rows,
            figure=figure,
            target_divergence=None if delta is None else round(float(delta), 8),
        )
        return record


@contextmanager
def saying_how_to_go_on(out: Path, steps: int, newest: Callable[[], tuple[int, str] | None]) -> Iterator[None]:
    """Add to what ends the training in the block how to go on.

    Args:
        out: what ``deflow resume`` is given.
        steps: how many there are to be.
        newest: step of the newest checkpoint and words for where it is; None where there is none.
    """
    go_on = f"deflow resume {shlex.quote(str(out))}"
    try:
        yield
    except KeyboardInterrupt as error:
        found = newest()
        state = f"saved at step {found[0]}" if found else "before anything was trained"
        raise RunInterrupted(f"interrupted, {state} of {steps}; go on with: {go_on}") from error
    except NonFiniteLossError as error:
        found = newest()
        where = f"the last good {found[1]}" if found else "there was no checkpoint yet"
        raise NonFiniteLossError(f"{error}; {where}") from error
    except CheckpointNotWritten as error:
        raise CheckpointNotWritten(error.path, error.cause, f"make room and go on with: {go_on}") from error
    except EnvironmentFaultError as error:
        raise EnvironmentFaultError(f"{error}; when it is mended go on with: {go_on}") from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _build(config: SettledConfig, observation_dim: int, action_dim: int, device: torch.device) -> Learner:
    task = _task(config)
    problem = ProblemSpec(
        observation_dim=observation_dim,
        action_dim=action_dim,
        hidden_dims=config.hidden_dims,
        gamma=task.gamma,
        q_aggregation=task.q_aggregation,
        target_divergence=task.target_divergence,
        device=device,
    )
    return get_algorithm(config.algo.name).build(config.algo, problem)


def resumable_from_anywhere(config: SettledConfig) -> SettledConfig:
    """The settings with absolute paths of data."""
    config = replace(config, task=settled_name(config.task))
    if config.data_root is not None:
        config = replace(config, data_root=str(Path(config.data_root).expanduser().absolute()))
    return config


def method_variant(config: TrainConfig) -> dict[str, Any]:
    """The method's settings that are neither its own, nor the task's or the preset's: what a table says beside its name."""
    usual = asdict(get_algorithm(config.algo.name).config())
    usual |= {name: value for name, value in method_values(config).items() if usual.get(name, "") is None}
    return {name: value for name, value in asdict(config.algo).items() if value != usual[name]}


def _images(task: str) -> InputError:
    return InputError(
        f"{task} has images for observations, and networks that read images are not part of this version; its data can be "
        "loaded and sampled in Python (docs/data.md)"
    )


def _task(config: TrainConfig) -> Task:
    return get_task(config.task, environment=config.env)


@contextmanager
def open_evaluator(task: Task, config: TrainConfig, device: torch.device) -> Iterator[Evaluator | None]:
    """The evaluator of a task; None where it has no environment."""
    if task.environment is None:
        yield None
        return
    workers = config.eval_workers or available_cores()
    with Evaluator(task.environment, num_envs=_NUM_ENVS, workers=workers, device=device) as evaluator:
        yield evaluator


def _evaluate(
    evaluator: Evaluator,
    label: str,
    policy: Any,
    episodes: int,
    show_progress: bool,
    *,
    seed: int = DEFAULT_EVALUATION_SEED,
) -> EvaluationResult:
    with progress_bar(
        total=episodes, desc=f"evaluate {label}", unit="episode", leave=False, disable=not show_progress
    ) as bar:
        return evaluator.run(policy, episodes=episodes, seed=seed, on_episode=bar.update)


def _evaluate_all(
    evaluator: Evaluator,
    learner: Learner,
    episodes: int,
    show_progress: bool,
    *,
    seed: int = DEFAULT_EVALUATION_SEED,
) -> dict[str, EvaluationResult]:
    return {
        name: _evaluate(evaluator, name, policy, episodes, show_progress, seed=seed)
        for name, policy in learner.evaluated_policies.items()
    }


def _outcomes(
    results: Mapping[str, EvaluationResult], references: tuple[float, float] | None
) -> dict[str, dict[str, Any]]:
    """Policy name -> plain outcome, with normalised scores where the task has references."""
    return {name: result.as_dict(references) for name, result in results.items()}


def final_numbers(evaluations: Mapping[str, Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Policy name -> the number the task is judged by."""
    key = {"success": "success_rate", "score": "mean_score", "return": "mean_return"}[metric]
    return {name: outcome[key] for name, outcome in evaluations.items()}


def _metrics(
    prefix: str, result: EvaluationResult, task: Task, references: tuple[float, float] | None
) -> dict[str, float]:
    row = {
        f"{prefix}/success": result.success_rate,
        f"{prefix}/return": float(result.episode_return.mean()),
        f"{prefix}/length": float(result.length.mean()),
        f"{prefix}/episodes": len(result.success),
    }
    if task.metric == "return":
        del row[f"{prefix}/success"]  # the environment knows none
    if references is not None:
        row[f"{prefix}/score"] = float(result.score(references).mean())
    return row
