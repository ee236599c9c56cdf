# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""How a sweep is doing, read from its runs' ``metrics.jsonl``: a live table in a terminal, a line per change elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from deflow_torchrl.errors import MissingExtraError
from deflow_torchrl.sweep.jobs import Job

_ROWS = 30  # of the table: what does not fit is counted
_LINE_SECONDS = 60.0
STATES = ("waiting", "running", "done", "failed", "interrupted")


class _Tail:
    """The last numbers of a ``metrics.jsonl`` that grows, or is written anew by a run that is resumed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self._offset = -1, 0
        self.row: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        try:
            with self._path.open("rb") as file:
                about = self._path.stat()
                if about.st_ino != self._file or about.st_size < self._offset:
                    self._file, self._offset, self.row = about.st_ino, 0, {}
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    with contextlib.suppress(ValueError):
                        self.row |= json.loads(line)
        except OSError:
            pass  # not begun
        return self.row


@dataclass
class JobProgress:
    """A job as the table shows it.

    Attributes:
        job: the job.
        state: one of :data:`STATES`.
        attempts: how often it was started.
        host: where it runs; None where nobody knows.
        message: why it failed.
        step: steps of each seed whose rows are written.
        rate: steps of each seed a second, over this attempt; None until two rows are seen.
        score: mean over its seeds of the last evaluation of the acting policy; None before the first.
    """

    job: Job
    state: str = "waiting"
    attempts: int = 0
    host: str | None = None
    message: str = ""
    step: int = 0
    rate: float | None = None
    score: float | None = None
    _tails: list[_Tail] = field(default_factory=list)
    _first: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        self._tails = [_Tail(folder / "metrics.jsonl") for folder in self.job.folders]

    def look(self) -> None:
        """Read what was written since the last look."""
        rows = [tail.read() for tail in self._tails]
        step = min((int(row.get("step", 0)) for row in rows), default=0)
        now = time.monotonic()
        if self.state == "running":
            if self._first is None or step < self.step:
                self._first = (now, step)
            elif step > self.step:
                self.rate = (step - self._first[1]) / max(now - self._first[0], 1e-9)
        else:
            self._first = self.rate = None
        self.step = self.job.steps if self.state == "done" else step
        for name in ("success", "score", "return"):
            values = [row[f"eval/{name}"] for row in rows if f"eval/{name}" in row]
            if values:
                self.score = sum(values) / len(values)
                break


class Table:
    """What is printed on standard error while a sweep runs.

    Args:
        jobs: all of the sweep's.

    Keyword Args:
        show: False prints nothing.
        live: a table that is drawn again and again; where standard error is a terminal by default.
    """

    def __init__(self, jobs: Mapping[str, JobProgress], *, show: bool = True, live: bool | None = None) -> None:
        self._jobs = jobs
        self._show = show
        self._began = time.monotonic()
        self._begun_at: int | None = None
        self._printed: dict[str, tuple[Any, ...]] = {}
        self._printed_at: dict[str, float] = {}
        self._live: Any = None
        if show and (sys.stderr.isatty() if live is None else live):
            try:
                from rich.console import Console
                from rich.live import Live
            except ModuleNotFoundError as error:
                raise MissingExtraError(error.name or "rich", "cli") from error
            self._live = Live(console=Console(stderr=True), auto_refresh=False)

    def __enter__(self) -> Table:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self.update()
            self._live.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Print a line."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        elif self._show:
            print(text, file=sys.stderr, flush=True)  # noqa: T201 # what it is for

    def update(self) -> None:
        """Look at every run that may have changed, and show what has."""
        for progress in self._jobs.values():
            if progress.state == "running" or progress.job.name not in self._printed:
                progress.look()
        if self._begun_at is None:
            self._begun_at = self._steps_done()
        if self._live is not None:
            self._live.update(self._drawn(), refresh=True)
        now = time.monotonic()
        for name, progress in self._jobs.items():
            seen = (progress.state, progress.attempts, progress.host, progress.score)
            old = self._printed.get(name)
            due = progress.state == "running" and now - self._printed_at.get(name, now) > _LINE_SECONDS
            self._printed[name] = seen
            if old is None:
                self._printed_at[name] = now
            if (old is None and progress.state != "running") or (old == seen and not due):
                continue
            self._printed_at[name] = now
            if self._live is None:
                self.say(f"[{self._count('done')}/{len(self._jobs)}] {name}: {describe(progress)}; {self.eta()}")

    def _steps_done(self) -> int:
        return sum(progress.step * len(progress.job.seeds) for progress in self._counted())

    def _counted(self) -> list[JobProgress]:
        """Jobs whose steps this sweep makes: those given up are neither done nor to come."""
        return [progress for progress in self._jobs.values() if progress.state in ("waiting", "running", "done")]

    def _count(self, state: str) -> int:
        return sum(progress.state == state for progress in self._jobs.values())

    def eta(self) -> str:
        """How long all of it will take still, by the steps that were made since this sweep was started."""
        total = sum(progress.job.steps * len(progress.job.seeds) for progress in self._counted())
        done = self._steps_done()
        made, seconds = done - (self._begun_at or 0), time.monotonic() - self._began
        if done >= total:
            return "ETA 0:00"
        return f"ETA {clock((total - done) * seconds / made)}" if made > 0 else "ETA -"

    def _drawn(self) -> Any:
        from rich.table import Table as RichTable

        counts = ", ".join(f"{self._count(state)} {state}" for state in STATES if self._count(state))
        table = RichTable(title=f"{counts}; {self.eta()}", title_justify="left")
        for name, justify in (("task", "left"), ("method", "left"), ("seeds", "left"), ("step", "right"), ("steps/s", "right"),
                              ("eval", "right"), ("state", "left")):  # fmt: skip
            table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        order = {state: number for number, state in enumerate(("running", "failed", "interrupted", "waiting", "done"))}
        shown = sorted(self._jobs.values(), key=lambda progress: order[progress.state])
        for progress in shown[:_ROWS]:
            job = progress.job
            table.add_row(
                job.task,
                job.algo,
                seeds_text(job.seeds),
                f"{progress.step:,}/{job.steps:,}",
                "" if progress.rate is None else f"{progress.rate:.1f}",
                "" if progress.score is None else f"{progress.score:.3g}",
                _state(progress),
            )
        if len(shown) > _ROWS:
            table.caption = f"and {len(shown) - _ROWS} more"
        return table


def describe(progress: JobProgress) -> str:
    """A job's state, step, speed and last evaluation in a line."""
    parts = [_state(progress), f"step {progress.step}/{progress.job.steps}"]
    parts += [f"{progress.rate:.1f} steps/s"] if progress.rate is not None else []
    parts += [f"eval {progress.score:.3g}"] if progress.score is not None else []
    return ", ".join(parts)


def _state(progress: JobProgress) -> str:
    text = progress.state
    if progress.state == "running" and progress.host is not None:
        text += f" on {progress.host}"
    if progress.attempts > 1:
        text += f" (attempt {progress.attempts})"
    return f"{text}: {progress.message}" if progress.message and progress.state in ("failed", "waiting") else text


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds as they are given: a range where they are one.

    Examples:
        >>> seeds_text([0, 1, 2, 3]), seeds_text([2, 0, 5])
        ('0..3', '2,0,5')
    """
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}..{seeds[-1]}"
    return ",".join(map(str, seeds))


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, from an hour on without the seconds.

    Examples:
        >>> clock(65), clock(7300), clock(200_000)
        ('1:05', '2 h 01 min', '2 d 7 h')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes}:{rest:02d}"
