# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Progress of a sweep on standard error: bars in a terminal, else a line for each change. Needs the extra ``cli``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn

from deflow_torchrl.progress import clock
from deflow_torchrl.sweep.jobs import JobProgress
from deflow_torchrl.sweep.plan import seeds_text

_ROWS = 30  # bars at most: the other jobs are counted
_LINE_SECONDS = 60.0
_SPEED_SECONDS = 3600.0  # over which speeds are averaged
_STATES = ("running", "failed", "interrupted", "waiting", "done")


class SweepProgress(Progress):
    """Show the progress of a sweep's jobs.

    Args:
        jobs: all of the sweep's, by name.

    Keyword Args:
        live: whether to redraw bars; by default if standard error is a terminal.
    """

    def __init__(self, jobs: Mapping[str, JobProgress], *, live: bool | None = None) -> None:
        self._live_bars = sys.stderr.isatty() if live is None else live
        self._jobs, self._bars, self._printed = jobs, dict[str, Task](), dict[str, tuple[Any, float]]()
        texts = ["{task.description}", *(f"{{task.fields[{name}]}}" for name in ("speed", "score", "state"))]
        name, *others = (TextColumn(text, markup=False) for text in texts)
        super().__init__(
            name, BarColumn(), MofNCompleteColumn(), *others, console=Console(stderr=True), auto_refresh=False,
            speed_estimate_period=_SPEED_SECONDS, disable=not self._live_bars,
        )  # fmt: skip
        for progress in jobs.values():
            progress.look()
            job = progress.job
            self.add_task(
                f"{job.task} {job.algo} {seeds_text(job.seeds)}", total=job.steps, completed=progress.step,
                attempt=progress.attempts, speed="", score="", state="",
            )  # fmt: skip
        self._bars = dict(zip(jobs, self.tasks, strict=True))
        total, completed = self._steps()
        self._all = self.add_task("", total=total, completed=completed)

    def say(self, text: str) -> None:
        """Print a line."""
        if self._live_bars:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201 # what it is for

    def show(self) -> None:
        """Show what has changed since the last call."""
        total, completed = self._steps()
        self.update(self._all, total=total, completed=completed)
        for name, progress in self._jobs.items():
            bar = self._bars[name]
            if bar.fields["attempt"] != progress.attempts:  # its speed is measured anew
                self.reset(bar.id, completed=progress.step, **{**bar.fields, "attempt": progress.attempts})
            speed = "" if bar.speed is None or progress.state != "running" else f"{bar.speed:.1f} steps/s"
            score = "" if progress.score is None else f"eval {progress.score:.3g}"
            self.update(bar.id, completed=progress.step, speed=speed, score=score, state=progress.describe())
            if not self._live_bars:
                self._show_line(name, progress)
        self.refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Give rich the counts of jobs by state, a bar for each of the first jobs, and how many more there are."""
        if not self._bars:
            return  # rich asks before there are any
        counts = [(sum(it.state == state for it in self._jobs.values()), state) for state in _STATES]
        yield f"{', '.join(f'{number} {state}' for number, state in counts if number)}; {self._eta()}"
        shown = sorted(self._jobs, key=lambda name: _STATES.index(self._jobs[name].state))
        yield self.make_tasks_table([self._bars[name] for name in shown[:_ROWS]])
        if len(shown) > _ROWS:
            yield f"and {len(shown) - _ROWS} more"

    def _show_line(self, name: str, progress: JobProgress) -> None:
        now, running = time.monotonic(), progress.state == "running"
        seen = (progress.state, progress.attempts, progress.host, progress.score)
        old, at = self._printed.get(name, (None, now))
        if (running if old is None else seen != old) or (running and now - at > _LINE_SECONDS):
            done, fields, at = sum(it.state == "done" for it in self._jobs.values()), self._bars[name].fields, now
            parts = [fields["state"], f"step {progress.step}/{progress.job.steps}", fields["speed"], fields["score"]]
            self.say(f"[{done}/{len(self._jobs)}] {name}: {', '.join(filter(None, parts))}; {self._eta()}")
        self._printed[name] = (seen, at)

    def _steps(self) -> tuple[int, int]:
        """Steps of all seeds in all, and those made; failed jobs count as neither finished nor pending."""
        counted = [it for it in self._jobs.values() if it.state in ("waiting", "running", "done")]
        return sum(it.job.steps * len(it.job.seeds) for it in counted), sum(
            it.step * len(it.job.seeds) for it in counted
        )

    def _eta(self) -> str:
        left = self.tasks[self._all].time_remaining
        return "ETA -" if left is None else f"ETA {clock(left)}"
