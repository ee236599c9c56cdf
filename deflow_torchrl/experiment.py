# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run from settings to report: data, networks, training, evaluation, record, curve and page in one folder."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from deflow_torchrl.algorithms import Learner, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.config import TrainConfig, config_from_dict, config_to_dict, default_out
from deflow_torchrl.data import OGBenchExperienceReplay
from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError, NonFiniteLossError, RunInterrupted
from deflow_torchrl.paths import cache_home, data_root, dataset_path, make_writable_folder, write_text
from deflow_torchrl.processes import available_cores
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports import build_record, check_report_extra, plot_learning_curve, write_html_report
from deflow_torchrl.reports.records import file_sha256
from deflow_torchrl.tasks import ogbench_task
from deflow_torchrl.trainers import EvaluationResult, Evaluator, MetricsLog, OfflineTrainer, TrainerSchedule, UpdateStep
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint, step_of
from deflow_torchrl.trainers.loggers import check_logger, make_logger
from deflow_torchrl.trainers.trainer import restore_learner

CONFIG_FILE = "config.yaml"
RECORD_FILE = "record.json"
_NUM_ENVS = 10


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
        config: the settings.

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
    out = default_out(config) if config.out is None else Path(config.out)
    if (out / CONFIG_FILE).exists():
        raise InputError(
            f"{out} already holds a run; go on with `deflow resume {out}` or choose another folder with out="
        )
    config = replace(config, out=str(out))
    run = _Run(config, out, command=command, final_episodes=final_episodes, show_progress=show_progress)
    make_writable_folder(out)
    run.write_config()
    return run.go(resume=False, extra_seconds=dict(extra_seconds or {}))


def check_free(out: Path) -> None:
    """Raise InputError if ``out`` already holds a run."""
    if (out / CONFIG_FILE).exists():
        raise InputError(
            f"{out} already holds a run; go on with `deflow resume {out}` or choose another folder with out="
        )


def resume(out: Path, *, command: str, show_progress: bool = True) -> dict[str, Any]:
    """Go on with an interrupted run from its last checkpoint (from the start, if it has none); arguments as in :func:`train`.

    Raises:
        InputError: if ``out`` is no run folder or its checkpoint is damaged.
    """
    settings = read_run_settings(out)
    config = replace(config_from_dict(settings["config"]), out=str(out))
    run = _Run(config, out, command=command, final_episodes=settings["final_episodes"], show_progress=show_progress)
    return run.go(resume=True, extra_seconds={})


def evaluate_run(
    out: Path, *, episodes: int | None, device: str | None = None, show_progress: bool = True
) -> dict[str, Any]:
    """Evaluate the policies of a run's last checkpoint, each on the same starts.

    Args:
        out: run folder.

    Keyword Args:
        episodes: episodes of each policy; the run's own number by default.
        device: device of the policies; the run's own by default.
        show_progress: show progress bars on standard error.

    Returns:
        Step, and policy name -> outcome.

    Raises:
        InputError: if ``out`` is no run folder or holds no checkpoint.
    """
    settings = read_run_settings(out)
    config = config_from_dict(settings["config"])
    checkpoints = list_checkpoints(out / "checkpoints")
    if not checkpoints:
        raise InputError(f"{out} has no checkpoint yet; train it with `deflow resume {out}`")
    state = load_checkpoint(checkpoints[-1])
    where = _device(device or config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # the number of threads can move the last digits of a matrix product
    learner = _build(config, state["observation_dim"], state["action_dim"], where)
    restore_learner(UpdateStep(learner), state, checkpoints[-1])
    with _evaluator(config, where) as evaluator:
        outcomes = _evaluate_all(
            evaluator, learner, episodes or settings["final_episodes"] or config.eval_episodes, show_progress
        )
    return {
        "step": state["update"]["step"],
        "evaluations": {name: result.as_dict() for name, result in outcomes.items()},
    }


def read_run_settings(out: Path) -> dict[str, Any]:
    """Read the settings a run folder keeps: ``config`` and ``final_episodes``.

    Raises:
        InputError: if ``out`` is no run folder.
    """
    import yaml

    path = out / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{out} is not a run folder: it has no {CONFIG_FILE}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {"config": settings["config"], "final_episodes": settings["final_episodes"]}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: {' '.join(str(error).split())}") from error


class _Run:
    """One run's parts, put together before anything is written."""

    def __init__(
        self, config: TrainConfig, out: Path, *, command: str, final_episodes: int | None, show_progress: bool
    ) -> None:
        self.config = config
        self.out = out
        self.command = command
        self.final_episodes = final_episodes or config.eval_episodes
        self.show_progress = show_progress
        self.outcomes: dict[str, EvaluationResult] = {}
        self.seconds: dict[str, float] = {}
        if ogbench_task(config.task).images:
            raise InputError(
                f"{config.task} has images for observations, and networks that read images are not part of this version; its "
                f'data can be loaded, with load_dataset("ogbench:{config.task}") of TorchRL'
            )
        check_logger(config.logger)
        check_report_extra()
        self.device = _device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with self._timed("load_data"):
            self.buffer, self.validation = self._load_data()
            self.data = self._describe_data()
        sample = self.buffer[:1]
        torch.manual_seed(config.seed)
        self.learner = _build(config, sample["observation"].shape[-1], sample["action"].shape[-1], self.device)
        self.update = UpdateStep(self.learner, compile_loss=config.compile)

    def write_config(self) -> None:
        import yaml

        settings = {"config": config_to_dict(self.config), "final_episodes": self.final_episodes}
        write_text(self.out / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False))

    def go(self, *, resume: bool, extra_seconds: dict[str, float]) -> dict[str, Any]:
        folder = self.out / "checkpoints"
        try:
            return self._go(folder, resume=resume, extra_seconds=extra_seconds)
        except KeyboardInterrupt as error:
            kept = list_checkpoints(folder)
            state = f"saved at step {step_of(kept[-1])}" if kept else "before anything was trained"
            raise RunInterrupted(
                f"interrupted, {state} of {self.config.offline_steps}; go on with: deflow resume {shlex.quote(str(self.out))}"
            ) from error
        except NonFiniteLossError as error:
            kept = list_checkpoints(folder)
            where = f"the last good checkpoint is {kept[-1]}" if kept else "there was no checkpoint yet"
            raise NonFiniteLossError(f"{error}; {where}") from error

    def _go(self, folder: Path, *, resume: bool, extra_seconds: dict[str, float]) -> dict[str, Any]:
        trainer = OfflineTrainer(
            self.update,
            self.buffer,
            schedule=TrainerSchedule(
                steps=self.config.offline_steps,
                log_interval=self.config.log_interval,
                eval_interval=self.config.eval_interval,
                save_interval=self.config.save_interval,
            ),
            checkpoints=folder,
            extra_state=self.learner_sizes,
            validation=self.validation,
            show_progress=self.show_progress,
        )
        checkpoints = list_checkpoints(folder) if resume else []
        if checkpoints:
            trainer.restore(checkpoints[-1])
        metrics = trainer.metrics = MetricsLog(
            self.out,
            logger=make_logger(self.config.logger, self.out),
            resume_step=trainer.written_step if resume else None,
        )
        with _evaluator(self.config, self.device) as evaluator:
            trainer.evaluate = lambda: self._evaluate(evaluator)
            with self._timed("train_and_evaluate"):
                trainer.run()
            if not self.outcomes:  # the run had been killed between its last checkpoint and its record
                self._evaluate(evaluator)
        return self._report(trainer, metrics, extra_seconds)

    @property
    def learner_sizes(self) -> dict[str, int]:
        sample = self.buffer[:1]
        return {"observation_dim": sample["observation"].shape[-1], "action_dim": sample["action"].shape[-1]}

    def _load_data(self) -> tuple[OGBenchExperienceReplay, OGBenchExperienceReplay]:
        config = self.config

        def load(split: Literal["train", "val"]) -> OGBenchExperienceReplay:
            return OGBenchExperienceReplay(
                config.task,
                batch_size=config.batch_size,
                root=config.data_root,
                split=split,
                download=config.download,
                device=self.device,
            )

        try:
            return load("train"), load("val")
        except InputError as error:
            raise _with_hint(error, config) from error

    def _describe_data(self) -> dict[str, Any]:
        path = dataset_path(parse_ogbench_name(self.config.task).dataset, data_root(self.config.data_root), "train")
        about = path.with_suffix(".json")
        return {
            "file": path.name,
            "sha256": file_sha256(path),
            "transitions": len(self.buffer),
            "provenance": json.loads(about.read_text(encoding="utf-8"))["provenance"] if about.is_file() else None,
        }

    def _evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        if self.update.step < self.config.offline_steps:
            result = _evaluate(evaluator, "eval", self.learner.policy, self.config.eval_episodes, self.show_progress)
            return _metrics("eval", result)
        self.outcomes = _evaluate_all(evaluator, self.learner, self.final_episodes, self.show_progress)
        row: dict[str, float] = {}
        for name, result in self.outcomes.items():
            row |= _metrics(
                "eval" if self.learner.evaluated_policies[name] is self.learner.policy else f"eval/{name}", result
            )
        return row

    def _report(self, trainer: OfflineTrainer, metrics: MetricsLog, extra_seconds: dict[str, float]) -> dict[str, Any]:
        delta = getattr(self.learner.loss, "target_divergence", None)
        record = build_record(
            command=self.command,
            config=config_to_dict(self.config),
            data=self.data,
            evaluations={name: result.as_dict() for name, result in self.outcomes.items()},
            seconds={**extra_seconds, **self.seconds, "updates": trainer.trained_seconds},
        )
        write_text(self.out / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        title = f"{self.config.algo.name} on {self.config.task}, seed {self.config.seed}"
        figure = plot_learning_curve(
            metrics.rows,
            self.out / "learning_curve.png",
            title=title,
            final={name: result.success_rate for name, result in self.outcomes.items()},
            target_divergence=None if delta is None else float(delta),
        )
        write_html_report(
            self.out / "report.html",
            title=title,
            record=record,
            figure=figure,
            target_divergence=None if delta is None else round(float(delta), 8),
        )
        return record

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _build(config: TrainConfig, observation_dim: int, action_dim: int, device: torch.device) -> Learner:
    task = ogbench_task(config.task)
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


def _evaluator(config: TrainConfig, device: torch.device) -> Evaluator:
    return Evaluator(config.task, num_envs=_NUM_ENVS, workers=config.eval_workers or available_cores(), device=device)


def _evaluate(evaluator: Evaluator, label: str, policy: Any, episodes: int, show_progress: bool) -> EvaluationResult:
    with progress_bar(
        total=episodes, desc=f"evaluate {label}", unit="episode", leave=False, disable=not show_progress
    ) as bar:
        return evaluator.run(policy, episodes=episodes, on_episode=bar.update)


def _evaluate_all(
    evaluator: Evaluator, learner: Learner, episodes: int, show_progress: bool
) -> dict[str, EvaluationResult]:
    return {
        name: _evaluate(evaluator, name, policy, episodes, show_progress)
        for name, policy in learner.evaluated_policies.items()
    }


def _metrics(prefix: str, result: EvaluationResult) -> dict[str, float]:
    return {
        f"{prefix}/success": result.success_rate,
        f"{prefix}/return": float(result.episode_return.mean()),
        f"{prefix}/length": float(result.length.mean()),
        f"{prefix}/episodes": len(result.success),
    }


def _with_hint(error: InputError, config: TrainConfig) -> InputError:
    """Point to a generated set of the right name, where the data folder itself has none."""
    if config.data_root is None and "no data file" in str(error):
        file = f"{parse_ogbench_name(config.task).dataset}.npz"
        for room, maker in (("generated", "deflow data generate"), ("demo", "the demo")):
            found = sorted(cache_home().glob(f"{room}/*/{file}"), key=lambda path: path.stat().st_size)
            if found:  # the largest
                return InputError(f"{error}; a set generated by {maker} lies in data_root={found[-1].parent}")
    return error
