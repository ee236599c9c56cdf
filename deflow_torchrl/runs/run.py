# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Runs from settings to report: trained and resumed, one by itself or those of several seeds at once in one process.

The folder of several seeds holds their settings and, for each seed, the folder of an ordinary run. Together they go on from the
newest step of which every seed has a whole checkpoint; once all are finished each may go on by itself.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.data import OfflineOnlineReplayBuffer
from deflow_torchrl.envs.drawing import ActedEpisode, check_drawing
from deflow_torchrl.envs.factory import success_timing
from deflow_torchrl.errors import (
    CheckpointNotWritten,
    EnvironmentFaultError,
    InputError,
    NonFiniteLossError,
    RunError,
    RunInterrupted,
)
from deflow_torchrl.generators import seed_generators
from deflow_torchrl.paths import make_writable_folder, write_text
from deflow_torchrl.processes import children_ignore_signals, interruptible
from deflow_torchrl.reports import build_record, check_report_extra, plot_learning_curve, write_html_report
from deflow_torchrl.reports.records import RECORD_FILE
from deflow_torchrl.runs import build, folder
from deflow_torchrl.runs.evaluate import evaluate_policies, final_numbers, metrics_row, open_evaluator, outcomes
from deflow_torchrl.runs.group import check_not_gone_on, common_checkpoints, summarize_group
from deflow_torchrl.runs.overrides import apply_overrides
from deflow_torchrl.runs.render import RecordedActions, render_evaluation
from deflow_torchrl.runs.settings import (
    SettledConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    default_out,
    method_variant,
    untuned_settings,
    with_task_defaults,
)
from deflow_torchrl.sources.base import settled_name
from deflow_torchrl.tasks.data import reference_returns
from deflow_torchrl.trainers import (
    EvaluationResult,
    Evaluator,
    MetricsLog,
    StackedTrainer,
    StackedUpdate,
    Trainer,
    TrainerSchedule,
    UpdateStep,
)
from deflow_torchrl.trainers.alarms import Alarms
from deflow_torchrl.trainers.checkpoint import list_checkpoints, step_of
from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.metrics import check_logger, open_logger
from deflow_torchrl.trainers.resume import (
    RunHistory,
    check_resumable,
    drop_later_checkpoints,
    find_checkpoint,
    run_identity,
)
from deflow_torchrl.trainers.update import Update

_LOG = logging.getLogger(__name__)
_DIAGNOSED_TRANSITIONS = 10_000


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

    Raises:
        InputError: on data, a device, an environment or settings that cannot be used.
    """

    def __init__(
        self,
        config: SettledConfig,
        out: Path,
        *,
        commands: Sequence[str],
        extra_seconds: Mapping[str, float] | None = None,
        final_episodes: int | None = None,
        data: build.TaskData | None = None,
        stacked: Sequence[int] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.config = config
        self.out = out
        self.stacked = stacked
        self.history = RunHistory(commands, seconds=extra_seconds)
        self.final_episodes = final_episodes or config.eval_episodes
        self.show_progress = show_progress
        self.outcomes: dict[str, EvaluationResult] = {}
        self.task = build.find_task(config)
        if config.online_steps and self.task.environment is None:
            raise InputError(f"online_steps={config.online_steps} needs an environment; name one with env=")
        check_logger(config.logger)
        check_report_extra()
        if config.video:
            if self.task.environment is None:
                raise InputError(f"video={config.video} needs an environment; name one with env=")
            check_report_extra("PIL")
            check_drawing(self.task.environment)
        self.device = build.use_device(config)
        if config.online_steps and config.storage == "memmap" and self.device.type != "cpu":
            raise InputError(
                f"storage=memmap keeps the data on the CPU, and online batches are put together on device={config.device}; set "
                "storage=device, or device=cpu"
            )
        with self.history.timed("load_data"):
            self.data = build.load_data(config, self.task, self.device) if data is None else data
            dataset, validation = self.data.train, self.data.validation
            reward_bound = float(dataset.reward.abs().max())
            self.references = reference_returns(self.task)
        width = build.observation_size(dataset)
        pictures = not isinstance(width, int)
        if pictures and not get_algorithm(config.algo.name).pictures:
            raise InputError(f"algo={config.algo.name} has no version for images, and {config.task} has images")
        if pictures and config.online_steps:
            raise InputError(
                f"online_steps={config.online_steps}: {config.task} has pictures, which are trained on offline only, as in the "
                "paper; leave online_steps off"
            )
        self.sizes: dict[str, Any] = {
            "observation_dim": width,
            "action_dim": config.chunk * dataset.action.shape[-1],
            "reward_range": [float(dataset.reward.min()), float(dataset.reward.max())],
        }
        self.action_bounds = dataset.about.get("action_bounds")
        gamma = build.step_gamma(config, self.task)
        seed_generators(config.seed)
        learner = self.learner = build.build_learner(config, **self.sizes, device=self.device, data=dataset)
        with self.history.timed("load_data"):
            transitions = self.transitions = build.training_set(dataset, config, learner, gamma)
            make = build.make_union_buffer if config.online_steps else build.make_buffer
            self.buffer = make(transitions, config, learner, self.device)
            self.validation = None
            if validation is not None:
                validated = build.training_set(validation, config, learner, gamma)
                self.validation = build.make_buffer(validated, config, learner, self.device)
        if (
            learner.diagnostics is not None and not pictures
        ):  # a few thousand rows of a set that may not fit into memory
            rows = torch.linspace(0, len(transitions) - 1, min(len(transitions), _DIAGNOSED_TRANSITIONS)).round().long()
            learner.diagnostics.use_data(transitions[rows])
        updates = build.number_of_updates(config)
        late = max((stage.begin for stage in learner.stages), default=0)
        if late >= updates:
            raise InputError(
                f"{config.algo.name} has phases, the last of which begins after {late} updates, and the run has {updates}; give "
                "it more steps, or shorter phases"
            )
        self.alarms = Alarms(gamma=gamma, reward_bound=reward_bound, rules=get_algorithm(config.algo.name).alarms)
        self.update = UpdateStep(learner, compile_loss=config.compile, precision=config.precision)

    def write_config(self) -> None:
        """Write the settings into the run folder."""
        settings = {
            "config": config_to_dict(self.config),
            "final_episodes": self.final_episodes,
            "command": self.history.commands[0],
        }
        if self.stacked is not None:
            settings["stacked"] = list(self.stacked)
        folder.write_settings(self.out / folder.CONFIG_FILE, settings)

    def open(self, evaluator: Evaluator | None, *, resume: bool, checkpoint: Path | None, keep_settings: bool) -> None:
        """Make the trainer, at the checkpoint where there is one, and the files it writes.

        Args:
            evaluator: of the run's task; None where it has no environment.

        Keyword Args:
            resume: whether the run was begun before.
            checkpoint: the checkpoint it goes on from.
            keep_settings: the checkpoint is of other settings, which this run's replace.
        """
        config = self.config
        self.evaluator = evaluator
        self.metrics = MetricsLog(self.out, resume_step=0 if resume and checkpoint is None else None)
        online = None
        if isinstance(self.buffer, OfflineOnlineReplayBuffer):
            online = build.make_online_phase(
                config,
                self.task,
                self.learner,
                self.buffer,
                bank_file=self.out / folder.BANK_FILE,
                device=self.device,
                reward_shift=float(self.data.train.about.get("reward_shift", 0.0)),
                show_progress=self.show_progress,
            )
        trainer = self.trainer = Trainer(
            self.update,
            self.buffer,
            schedule=TrainerSchedule(**{item.name: getattr(config, item.name) for item in fields(TrainerSchedule)}),
            checkpoints=self.out / folder.CHECKPOINTS,
            online=online,
            metrics=self.metrics,
            evaluate=None if evaluator is None else self._evaluate,
            score=f"eval/{self.task.metric}",
            identity=run_identity(config_to_dict(config), data_sha256=self.data.about["sha256"]),
            history=self.history,
            alarms=self.alarms,
            # Enough to build and export the networks without the data.
            extra_state=self.sizes
            if self.action_bounds is None
            else {**self.sizes, "action_bounds": self.action_bounds},
            validation=self.validation,
            show_progress=self.show_progress,
            label="" if self.stacked is None else f"seed {config.seed}, ",
            graphed=None if self.stacked is not None else self.graphed(self.update),
        )
        if checkpoint is not None:
            trainer.resume(checkpoint, keep_settings=keep_settings)
        if resume:
            self.write_config()
        open_logger(
            config.logger,
            self.out,
            metrics=self.metrics,
            state=trainer.notes.pop("logger", None),
            step=trainer.written_step if resume else None,
        )

    def graphed(self, update: Update, *shape: int) -> GraphedUpdate | None:
        """:func:`make_graphed` on the run's data."""
        return build.make_graphed(update, self.config, self.learner, self.transitions, *shape)

    def evaluate_if_missing(self) -> None:
        """Make the last evaluation, if the run was killed between its last checkpoint and its record."""
        if self.evaluator is not None and not self.outcomes:
            self._evaluate()

    def report(self) -> dict[str, Any]:
        """Write record, curve and page; the record."""
        trainer, metric = self.trainer, self.task.metric
        delta = getattr(self.learner.loss, "target_divergence", None)
        record = build_record(
            commands=self.history.commands,
            config=config_to_dict(self.config),
            data=self.data.about,
            metric=metric,
            acting=self.learner.acting_policy,
            variant=method_variant(self.config),
            success_timing=None if self.task.environment is None else success_timing(self.task.environment),
            evaluation_seed=DEFAULT_EVALUATION_SEED,
            evaluations=outcomes(self.outcomes, self.references),
            history=trainer.notes.get("evaluations", []),
            online=None if trainer.online is None else trainer.online.counters,
            alarms=None if self.learner.diagnostics is None else [asdict(alarm) for alarm in self.alarms.raised],
            stacked=self.stacked,
            untuned=untuned_settings(self.config),
            seconds={**self.history.seconds, "updates": trainer.trained_seconds},
        )
        write_text(self.out / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        title = f"{self.config.algo.name} on {self.config.task}, seed {self.config.seed}"
        figure = plot_learning_curve(
            self.metrics.rows,
            self.out / "learning_curve.png",
            title=title,
            metric=metric,
            final=final_numbers(record["evaluations"], metric),
            target_divergence=None if delta is None else float(delta),
        )
        write_html_report(
            self.out / "report.html",
            title=title,
            record=record,
            rows=self.metrics.rows,
            figure=figure,
            clip=self._clip if self._clip.is_file() else None,
            target_divergence=None if delta is None else round(float(delta), 8),
        )
        return record

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the acting policy, or at the last step all policies; the entries of the row of metrics."""
        trainer, learner = self.trainer, self.learner
        last = trainer.step >= trainer.schedule.steps
        policies = learner.evaluated_policies if last else {learner.acting_policy: learner.policy}
        drawn = self.config.video if last else self.config.video is True
        recorded = {name: RecordedActions() for name in policies} if drawn else {}
        results = evaluate_policies(
            cast("Evaluator", self.evaluator),
            policies,
            self.final_episodes if last else self.config.eval_episodes,
            show_progress=self.show_progress,
            on_step=recorded,
        )
        if drawn:
            self._draw({name: recorded[name].episodes(result) for name, result in results.items()})
        if last:
            self.outcomes = results
        earlier = [item for item in trainer.notes.get("evaluations", []) if item["step"] < trainer.step]
        phase = trainer.schedule.phase(trainer.step)
        note = {"step": trainer.step, "phase": phase, "policies": outcomes(results, self.references)}
        trainer.notes["evaluations"] = [*earlier, note]
        row: dict[str, float] = {}
        for name, result in results.items():
            prefix = "eval" if name == learner.acting_policy else f"eval/{name}"
            row |= metrics_row(prefix, result, self.task, self.references)
        return row

    @property
    def _clip(self) -> Path:
        """The clip of an evaluation now."""
        suffix = ".gif" if self.config.logger == "wandb" else ".webp"  # wandb shows no other animated picture
        return self.out / folder.VIDEOS / f"step-{self.trainer.step:08d}{suffix}"

    def _draw(self, acted: Mapping[str, Sequence[ActedEpisode]]) -> None:
        """Write a clip of an evaluation; where that fails, the training goes on without it."""
        self._clip.parent.mkdir(exist_ok=True)
        title, chunk = f"step {self.trainer.step:,}, ", self.config.chunk
        try:
            render_evaluation(self._clip, self.task, acted, chunk=chunk, title=title, show_progress=self.show_progress)
        except (InputError, RunError) as error:
            _LOG.warning("no clip of the evaluation at step %d: %s", self.trainer.step, error)
        else:
            self.metrics.send_clip(self._clip, step=self.trainer.step)


def train(
    config: TrainConfig,
    *,
    command: str,
    final_episodes: int | None = None,
    extra_seconds: Mapping[str, float] | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train and evaluate a new run, or with ``config.seeds`` a run of each seed, all at once, and leave its folder.

    Args:
        config: the settings; those that are None and the task's are filled in.

    Keyword Args:
        command: the command line, for the record.
        final_episodes: episodes of the evaluation at the end; ``config.eval_episodes`` by default.
        extra_seconds: wall time of phases before this one, for the record.
        show_progress: show progress bars on standard error.

    Returns:
        The record, as written to ``record.json``. Of several seeds the summary, as written to ``summary.json``: ``out``,
        ``metric``, ``seeds`` (seed -> folder and final numbers by policy), and by policy ``mean`` and ``std`` of the metric
        over seeds (std by n - 1; None of a single seed).

    Raises:
        InputError: on data, device, settings or folder that cannot be used; nothing is left behind then.
        LockHeldError: if another process works in the folder.
        NonFiniteLossError: if a loss became NaN or infinite.
        RunInterrupted: on one of :data:`~deflow_torchrl.processes.STOP_SIGNALS`, after checkpoints were saved.
    """
    out = Path(config.out or default_out(config))
    config = with_absolute_paths(replace(with_task_defaults(config), out=str(out)))
    with _working_on(config, command):
        for path in (out, *(Path(own.out or "") for own in folder.seed_configs(config))):
            folder.check_free(path)
        runs = _make_runs(
            config,
            [command],
            final_episodes=final_episodes,
            extra_seconds=extra_seconds,
            show_progress=show_progress,
        )
        return _go(config, runs, [None] * len(runs))


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

    Several seeds go on from the newest step of which each has a checkpoint.

    Args:
        out: run folder, or the folder of several seeds.

    Keyword Args:
        command: the command line, for the record.
        overrides: ``key=value`` settings to change.
        force: go on although settings differ from the checkpoint's.
        step: go on from this kept checkpoint; the later ones are removed.
        show_progress: show progress bars on standard error.

    Raises:
        InputError: if ``out`` is no run folder, a checkpoint is damaged or of another run, settings differ, or a seed has gone
            on by itself since.
    """
    grouped = folder.is_group(out)
    settings_file = out / (folder.GROUP_FILE if grouped else folder.CONFIG_FILE)
    settings = folder.read_settings(settings_file) if grouped else folder.read_run_settings(out)
    if not grouped:
        folder.check_free_of_group(out)
    saved = config_from_dict(settings["config"])
    if grouped and not saved.seeds:
        raise InputError(f"{settings_file} is damaged: it names no seeds")
    _check_fixed(out, saved, overrides)
    config = replace(with_absolute_paths(apply_overrides(saved, overrides)), out=str(out))
    with _working_on(config, command):
        before, after = folder.seed_configs(replace(saved, out=str(out))), folder.seed_configs(config)
        if settings["finished"]:
            for own in before:
                check_not_gone_on(own)
        if grouped:
            checkpoints = common_checkpoints([Path(own.out or "") for own in before], out=out, step=step)
        else:
            checkpoints = [find_checkpoint(out / folder.CHECKPOINTS, step)]
        changes = [
            check_resumable(
                config_to_dict(new),
                saved=config_to_dict(old),
                checkpoint=checkpoint,
                config_file=settings_file,
                force=force,
            )
            for new, old, checkpoint in zip(after, before, checkpoints, strict=True)
        ]
        commands = [*filter(None, [settings["command"]]), command]
        runs = _make_runs(
            config,
            commands,
            final_episodes=settings["final_episodes"],
            stacked=settings["stacked"],
            show_progress=show_progress,
        )
        return _go(config, runs, checkpoints, resume=True, keep_settings=any(changes), saved=saved)


def with_absolute_paths(config: SettledConfig) -> SettledConfig:
    """The settings with absolute paths of data, so that a run can be resumed from any folder."""
    config = replace(config, task=settled_name(config.task))
    if config.data_root is not None:
        config = replace(config, data_root=str(Path(config.data_root).expanduser().absolute()))
    return config


def _check_fixed(out: Path, saved: TrainConfig, overrides: Sequence[str]) -> None:
    names = [override.partition("=")[0] for override in overrides]
    if saved.seeds is not None:
        fixed = [override for override, name in zip(overrides, names, strict=True) if name in ("out", "seed", "seeds")]
        if fixed:
            raise InputError(f"{fixed[0]}: cannot be changed; {out} holds the runs of seeds {saved.seeds}")
    elif "out" in names:
        raise InputError(f"out= cannot be changed; move {out} to where you want it")
    elif "seeds" in names:
        raise InputError(f"seeds= cannot be changed: {out} is a run of one seed")


def _make_runs(
    config: SettledConfig, commands: Sequence[str], *, stacked: Sequence[int] | None = None, **options: Any
) -> list[Run]:
    """The run of each seed; all share the data of the first."""
    runs: list[Run] = []
    for own in folder.seed_configs(config):
        runs.append(
            Run(
                own,
                Path(own.out or ""),
                commands=commands,
                data=runs[0].data if runs else None,
                stacked=config.seeds or stacked,
                **options,
            )
        )
    return runs


def _go(
    config: SettledConfig,
    runs: Sequence[Run],
    checkpoints: Sequence[Path | None],
    *,
    resume: bool = False,
    keep_settings: bool = False,
    saved: TrainConfig | None = None,
) -> dict[str, Any]:
    """Train, evaluate and report; the record, or the summary of several seeds."""
    out, first = Path(config.out or ""), runs[0]
    make_writable_folder(out)

    def write_group(config: TrainConfig, *, finished: bool) -> None:
        if config.seeds is not None:
            about = {"final_episodes": first.final_episodes, "command": first.history.commands[0], "finished": finished}
            folder.write_settings(out / folder.GROUP_FILE, {"config": config_to_dict(config), **about})

    # The new settings only when every seed has a checkpoint with them: a kill before that changes nothing.
    write_group(saved or config, finished=False)
    with open_evaluator(first.task, config, first.device) as evaluator:
        for run, checkpoint in zip(runs, checkpoints, strict=True):
            make_writable_folder(run.out)
            if not resume:
                run.write_config()
            if checkpoint is None:
                drop_later_checkpoints(run.out / folder.CHECKPOINTS, -1)  # those that other seeds lack
            run.open(evaluator, resume=resume, checkpoint=checkpoint, keep_settings=keep_settings)
        write_group(config, finished=False)
        trainer = first.trainer if config.seeds is None else _stacked(config.seeds, runs, new=checkpoints[0] is None)
        with ExitStack() as timed:
            for run in runs:
                timed.callback(run.metrics.close)
                timed.enter_context(run.history.timed("train_and_evaluate"))
            trainer.run()
        for run in runs:
            run.evaluate_if_missing()
    records = [run.report() for run in runs]
    if config.seeds is None:
        return records[0]
    summary = summarize_group(out, config.seeds, records)
    write_text(out / folder.SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    write_group(config, finished=True)
    return summary


def _stacked(seeds: Sequence[int], runs: Sequence[Run], *, new: bool) -> StackedTrainer:
    """The trainer of all seeds' runs at once."""
    if new:
        # A stream of the seeds' own: a separate run's would be that of the last seed's networks.
        seed_generators(int(np.random.SeedSequence(list(seeds)).generate_state(1, np.uint64)[0] >> 1))
    first = runs[0]
    update = StackedUpdate([run.update for run in runs], seeds=seeds)
    return StackedTrainer(
        update,
        build.make_buffer(first.transitions, first.config, first.learner, first.device, batches=len(runs)),
        [run.trainer for run in runs],
        show_progress=first.show_progress,
        graphed=first.graphed(update, len(runs)),
    )


@contextmanager
def _working_on(config: SettledConfig, command: str) -> Iterator[None]:
    """Keep other processes from the folders of a run or group; say in an exception that ends the block how to go on.

    Each of :data:`~deflow_torchrl.processes.STOP_SIGNALS` is such an exception.

    Args:
        config: its settings.
        command: the command line.
    """
    out, steps = Path(config.out or ""), config.offline_steps + config.online_steps
    runs = [Path(own.out or "") for own in folder.seed_configs(config)]

    def go_on() -> str:
        begun = (out / folder.CONFIG_FILE).is_file() or folder.is_group(out)
        return f"deflow resume {shlex.quote(str(out))}" if begun else command

    def newest() -> Path | None:
        """A checkpoint of the newest step of which every run has one."""
        kept = [{step_of(path): path for path in list_checkpoints(run / folder.CHECKPOINTS)} for run in runs]
        common = set.intersection(*map(set, kept))
        return kept[0][max(common)] if common else None

    try:
        with children_ignore_signals():
            pass  # buffers have semaphores: their keeper is started now, so that no signal ends it
        with interruptible(), folder.hold_folders(list(dict.fromkeys([out, *runs]))):
            yield
    except KeyboardInterrupt as error:
        found = newest()
        state = f"saved at step {step_of(found)}" if found else "before anything was trained"
        raise RunInterrupted(f"interrupted, {state} of {steps}; go on with: {go_on()}") from error
    except NonFiniteLossError as error:
        found = newest()
        where = "there was no checkpoint yet"
        if found is not None:
            where = f"checkpoint is {found}" if len(runs) == 1 else f"checkpoints are of step {step_of(found)}"
            where = f"the last good {where}"
        raise NonFiniteLossError(f"{error}; {where}") from error
    except CheckpointNotWritten as error:
        raise CheckpointNotWritten(error.path, error.cause, f"make room and go on with: {go_on()}") from error
    except EnvironmentFaultError as error:
        raise EnvironmentFaultError(f"{error}; when it is mended go on with: {go_on()}") from error
