# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Runs of several seeds, trained together in one process: ``deflow train ... seeds=[0,1,2]``.

The folder holds the group's settings and, for each seed, the folder of an ordinary run. Together they go on from the newest
step of which every seed has a whole checkpoint; once all are finished each may go on by itself.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.config import (
    SettledConfig,
    TrainConfig,
    apply_overrides,
    config_from_dict,
    config_to_dict,
    default_out,
    with_task_defaults,
)
from deflow_torchrl.errors import InputError
from deflow_torchrl.experiment import (
    CONFIG_FILE,
    GROUP_FILE,
    Run,
    check_free,
    final_numbers,
    open_evaluator,
    read_run_settings,
    read_settings,
    resumable_from_anywhere,
    saying_how_to_go_on,
    seed_folder,
    write_settings,
)
from deflow_torchrl.generators import seed_generators
from deflow_torchrl.paths import make_writable_folder, write_text
from deflow_torchrl.reports.records import summarize
from deflow_torchrl.trainers import StackedTrainer, StackedUpdate
from deflow_torchrl.trainers.checkpoint import is_whole, list_checkpoints, step_of
from deflow_torchrl.trainers.resume import changed_settings, check_resumable, drop_later_checkpoints, find_checkpoint

SUMMARY_FILE = "summary.json"


def is_group(out: Path) -> bool:
    """Whether a folder holds the runs of seeds that were trained together."""
    return (out / GROUP_FILE).is_file()


def train_group(
    config: TrainConfig, *, command: str, final_episodes: int | None = None, show_progress: bool = True
) -> dict[str, Any]:
    """Train and evaluate a new run of each of ``config.seeds``, all at once.

    Args:
        config: the settings.

    Keyword Args:
        command: the command line, for the records.
        final_episodes: episodes of the evaluation at the end; ``config.eval_episodes`` by default.
        show_progress: show progress bars on standard error.

    Returns:
        The summary, as written to ``summary.json``: ``out``, ``metric``, ``seeds`` (seed -> folder and final numbers by
        policy), and by policy ``mean`` and ``std`` of the metric over seeds (std by n - 1; None of a single seed).

    Raises:
        InputError: on data, device, settings or folder that cannot be used; nothing is left behind then.
        NonFiniteLossError: if a loss of any seed became NaN or infinite.
        KeyboardInterrupt: after checkpoints were saved.
    """
    out = default_out(config) if config.out is None else Path(config.out)
    check_free(out)
    settled = resumable_from_anywhere(replace(with_task_defaults(config), out=str(out)))
    for seed in settled.seeds or ():
        check_free(seed_folder(out, seed))
    group = _Group(settled, [command], final_episodes=final_episodes, show_progress=show_progress)
    make_writable_folder(out)
    return group.go([None] * len(group.runs), resume=False)


def resume_group(
    out: Path,
    *,
    command: str,
    overrides: Sequence[str] = (),
    force: bool = False,
    step: int | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Go on with all seeds from the newest step of which each has a checkpoint; options as of :func:`.experiment.resume`.

    Raises:
        InputError: as there; if a checkpoint of that step is damaged; or if a seed has gone on by itself since.
    """
    settings = read_settings(out / GROUP_FILE)
    saved = config_from_dict(settings["config"])
    if not saved.seeds:
        raise InputError(f"{out / GROUP_FILE} is damaged: it names no seeds")
    fixed = [override for override in overrides if override.partition("=")[0] in ("out", "seed", "seeds")]
    if fixed:
        raise InputError(f"{fixed[0]}: cannot be changed; {out} holds the runs of seeds {saved.seeds}")
    config = replace(resumable_from_anywhere(apply_overrides(saved, overrides)), out=str(out))
    before = {seed: _of_seed(saved, seed) for seed in saved.seeds or ()}
    if settings["finished"]:
        for seed, own in before.items():
            _check_not_gone_on(seed_folder(out, seed), own)
    checkpoints = common_checkpoints([seed_folder(out, seed) for seed in before], out=out, step=step)
    changes = [
        check_resumable(
            config_to_dict(_of_seed(config, seed)),
            saved=config_to_dict(own),
            checkpoint=checkpoint,
            config_file=out / GROUP_FILE,
            force=force,
        )
        for (seed, own), checkpoint in zip(before.items(), checkpoints, strict=True)
    ]
    group = _Group(
        config,
        [settings["command"], command],
        final_episodes=settings["final_episodes"],
        show_progress=show_progress,
    )
    return group.go(checkpoints, resume=True, keep_settings=any(changes), saved=saved)


def common_checkpoints(folders: Sequence[Path], *, out: Path, step: int | None = None) -> list[Path | None]:
    """Each run's checkpoint of the newest step (or of ``step``) of which all have one; None of each where there is none.

    Raises:
        InputError: if a run has none of ``step``, or a checkpoint that was chosen is damaged: with the newest step of which
            all are whole.
    """
    kept = [list_checkpoints(folder / "checkpoints") for folder in folders]
    steps = sorted(set.intersection(*({step_of(path) for path in paths} for paths in kept)))
    if step is None:
        if not steps:
            # What a kill within the very first save leaves is lost, more is not thrown away.
            if max((len(paths) for paths in kept), default=0) > 1:
                missing = [str(folder) for folder, paths in zip(folders, kept, strict=True) if not paths] or [
                    "each of them"
                ]
                raise InputError(
                    f"{out}: the seeds have no step in common of which all have a checkpoint ({', '.join(missing)} lacks it); "
                    "put the missing folders back, or resume the others' one by one after moving group.yaml away"
                )
            return [None] * len(folders)
        step = steps[-1]
    chosen = [find_checkpoint(folder / "checkpoints", step) for folder in folders]
    damaged = [path for path in chosen if path is not None and not is_whole(path)]
    if damaged:
        whole = [
            other
            for other in steps
            if all(is_whole(path) for paths in kept for path in paths if step_of(path) == other)
        ]
        advice = (
            f"; the newest whole ones are of step {whole[-1]}: deflow resume {shlex.quote(str(out))} --step {whole[-1]}"
        )
        raise InputError(f"{damaged[0]} is damaged or altered; it was not loaded{advice if whole else ''}")
    return chosen


class _Group:
    """The seeds' runs, put together before anything is written."""

    def __init__(
        self, config: SettledConfig, commands: Sequence[str], *, final_episodes: int | None, show_progress: bool
    ) -> None:
        self.config = config
        self.out = Path(config.out or "")
        self.seeds = config.seeds or []
        self.commands = list(commands)
        self.show_progress = show_progress
        self.runs: list[Run] = []
        for seed in self.seeds:
            self.runs.append(
                Run(
                    _of_seed(config, seed),
                    seed_folder(self.out, seed),
                    commands=self.commands,
                    final_episodes=final_episodes,
                    data=self.runs[0].data if self.runs else None,
                    stacked=self.seeds,
                    show_progress=show_progress,
                )
            )
        self.final_episodes = self.runs[0].final_episodes

    def go(
        self,
        checkpoints: Sequence[Path | None],
        *,
        resume: bool,
        keep_settings: bool = False,
        saved: TrainConfig | None = None,
    ) -> dict[str, Any]:
        with saying_how_to_go_on(self.out, self.config.offline_steps, self._newest):
            # The new settings only when every seed has a checkpoint with them: a kill before that changes nothing.
            self._write_settings(finished=False, config=saved)
            for run, checkpoint in zip(self.runs, checkpoints, strict=True):
                make_writable_folder(run.out)
                if not resume:
                    run.write_config()
                if checkpoint is None:
                    drop_later_checkpoints(run.out / "checkpoints", -1)  # those that other seeds lack
                run.open(resume=resume, checkpoint=checkpoint, keep_settings=keep_settings)
            self._write_settings(finished=False)
            if checkpoints[0] is None:
                # A stream of the seeds' own: a separate run's would be that of the last seed's networks.
                seed_generators(int(np.random.SeedSequence(self.seeds).generate_state(1, np.uint64)[0] >> 1))
            first = self.runs[0]
            update = StackedUpdate([run.update for run in self.runs], seeds=self.seeds)
            buffer = first.batches(len(self.runs))
            trainers = [run.trainer for run in self.runs]
            with open_evaluator(first.task, self.config, first.device) as evaluator:
                for run in self.runs:
                    run.evaluate_with(evaluator)
                with ExitStack() as timed:
                    for run in self.runs:
                        timed.enter_context(run.history.timed("train_and_evaluate"))
                    graphed = first.graphed(update, len(self.runs))
                    StackedTrainer(update, buffer, trainers, show_progress=self.show_progress, graphed=graphed).run()
                for run in self.runs:
                    run.evaluate_if_missing()
            records = [run.report() for run in self.runs]
            summary = self._summary(records)
            write_text(self.out / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
            self._write_settings(finished=True)
        return summary

    def _newest(self) -> tuple[int, str] | None:
        kept = [{step_of(path) for path in list_checkpoints(run.out / "checkpoints")} for run in self.runs]
        common = set.intersection(*kept)
        return (max(common), f"checkpoints are of step {max(common)}") if common else None

    def _write_settings(self, *, finished: bool, config: TrainConfig | None = None) -> None:
        settings = {
            "config": config_to_dict(config or self.config),
            "final_episodes": self.final_episodes,
            "command": self.commands[0],
            "finished": finished,
        }
        write_settings(self.out / GROUP_FILE, settings)

    def _summary(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        metric = records[0]["metric"]
        finals = [final_numbers(record["evaluations"], metric) for record in records]
        policies = list(finals[0])
        return {
            "out": str(self.out),
            "metric": metric,
            "seeds": {
                str(run.config.seed): {"out": str(run.out), **summarize(record)}
                for run, record in zip(self.runs, records, strict=True)
            },
            "mean": {name: statistics.mean(final[name] for final in finals) for name in policies},
            "std": {
                name: statistics.stdev(final[name] for final in finals) if len(finals) > 1 else None
                for name in policies
            },
            "transitions": records[0]["data"]["transitions"],
            "time": records[0]["time"],
        }


def _of_seed(config: SettledConfig, seed: int) -> SettledConfig:
    """The settings of one seed's run."""
    return replace(config, seeds=None, seed=seed, out=str(seed_folder(Path(config.out or ""), seed)))


def _check_not_gone_on(folder: Path, config: TrainConfig) -> None:
    """Raise InputError if a run of a finished group has other settings than the group gave it, or is gone."""
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} is missing; its group cannot go on without it")
    own = read_run_settings(folder)["config"]
    changes = changed_settings({"settings": config_to_dict(config)}, {"settings": own})
    if changes:
        raise InputError(
            f"{folder} has gone on by itself since the seeds were trained together ({'; '.join(changes)}); resume the seeds' "
            "folders one by one"
        )
