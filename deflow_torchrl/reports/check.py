# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Compare the numbers of Markdown files with their records: ``deflow report --check`` and ``--write``.

Markers are HTML comments, each closed by ``<!-- /deflow-report -->``; folders are relative to the file of the marker::

    <!-- deflow-report: table DIR... [last=K] -->       a block: the tables of the runs below the folders
    <!-- deflow-report: results DIR... [last=K] -->     a block: the first of these tables, of results alone
    <!-- deflow-report: paper DIR... -->                a block: the paper's figures for the tasks of these runs
    <!-- deflow-report: online DIR... -->               a block: what each run gained online
    <!-- deflow-report: value DIR NAME=VALUE... -->0.53  a number in a line, compared to as many decimals as it has

A value is of the runs below DIR that have these settings (``task``, ``algo``, ``seed``, any other as on the command line); they
must differ in their seeds only. Beside them ``stat`` (mean, std, stderr, seeds, episodes), ``at`` (end, offline, best), ``last``
and ``percent=true`` say which number it is.
"""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import write_text
from deflow_torchrl.reports.page import summarize_runs
from deflow_torchrl.reports.paper import paper_runtime
from deflow_torchrl.reports.runs import FinishedRun, as_setting, find_runs, flat_settings, score_of
from deflow_torchrl.reports.tables import make_cell, online_progress

KINDS = ("table", "results", "paper", "online", "value")
STATS = ("mean", "std", "stderr", "seeds", "episodes")
_OPEN = re.compile(r"<!--\s*deflow-report:(?P<words>.*?)-->")
_CLOSE = re.compile(r"<!--\s*/deflow-report\s*-->")
_VALUE = re.compile(rf"(?P<open>{_OPEN.pattern})(?P<text>.*?)(?P<close>{_CLOSE.pattern})")
_FENCE = re.compile(r"\s*(```|~~~)")
_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")


@dataclass(frozen=True)
class Difference:
    """A line of a file that differs from the file's records.

    Attributes:
        file: the file.
        line: counted from 1.
        found: text of the file; None where a line is missing.
        expected: text by the records; None where a line is too many.
    """

    file: Path
    line: int
    found: str | None
    expected: str | None

    def __str__(self) -> str:
        """``FILE:LINE: found ..., expected ...``."""
        found, expected = (("nothing" if it is None else repr(it)) for it in (self.found, self.expected))
        return f"{self.file}:{self.line}: found {found}, expected {expected}"


@dataclass(frozen=True)
class Checked:
    """The outcome for one file.

    Attributes:
        file: the file.
        blocks: number of blocks in it.
        values: number of values.
        differences: lines that differ from the records.
        text: the file, corrected by the records.
    """

    file: Path
    blocks: int
    values: int
    differences: tuple[Difference, ...]
    text: str


def default_files(folder: Path) -> list[Path]:
    """``README.md``, pages of ``docs/`` that have markers, and ``benchmarks/results/**/*.md`` of a checkout.

    Raises:
        InputError: if there are none.
    """
    files = [path for path in (folder / "README.md",) if path.is_file()]
    files += sorted((folder / "benchmarks" / "results").rglob("*.md"))
    pages = sorted((folder / "docs").rglob("*.md"))
    files += [page for page in pages if _CLOSE.search(page.read_text(encoding="utf-8"))]
    if not files:
        raise InputError(
            f"{folder.absolute()} has no README.md and no benchmarks/results/**/*.md; name the files to check"
        )
    return files


def check_file(path: Path) -> Checked:
    """Recompute every marked number of a Markdown file from its records.

    Args:
        path: the file; markers inside fenced code are examples, not markers.

    Raises:
        InputError: if the file cannot be read, a marker cannot be understood, or its runs cannot be read.
    """
    try:
        # newline="": line ends are kept when the file is written back.
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({getattr(error, 'strerror', None) or error})") from error
    return _Reader(path, text).run()


def write_file(checked: Checked) -> None:
    """Write the corrected text into the file.

    Raises:
        InputError: if it cannot be written.
    """
    write_text(checked.file, checked.text)


class _Reader:
    """Reads a file line by line and collects the differences and the corrected lines."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.lines = path, text.split("\n")
        self.differences: list[Difference] = []
        self.written: list[str] = []
        self.blocks = self.values = 0
        self.runs = functools.cache(find_runs)  # many values are of the same runs

    def run(self) -> Checked:
        fenced, number, folder = False, 0, self.path.parent
        # A project's own README has tables of other things than results too.
        beside_records = (
            not (folder / "pyproject.toml").exists() and next(folder.rglob("record.json"), None) is not None
        )
        while number < len(self.lines):
            line = self.lines[number]
            fenced ^= bool(_FENCE.match(line))
            opened = None if fenced else _OPEN.search(line)
            if opened and not _CLOSE.search(line, opened.end()):
                number = self._block(opened["words"], number)
                continue
            if opened:
                if _OPEN.search(_VALUE.sub("", line)):
                    raise self._wrong(number, "a value and its end stand in one line")
                line = _VALUE.sub(functools.partial(self._value, number), line)
            elif beside_records and not fenced and _RULE.fullmatch(line.strip()):
                self._differ(number, "a table beside records", "<!-- deflow-report: ... --> around it")
            self.written.append(line)
            number += 1
        return Checked(self.path, self.blocks, self.values, tuple(self.differences), "\n".join(self.written))

    def _block(self, words: str, start: int) -> int:
        """Compare a block's lines; return the number of the line after it."""
        kind, folders, options, last = self._parse(words, start)
        if kind == "value":
            raise self._wrong(start, "a value and its end stand in one line")
        end = next((at for at in range(start + 1, len(self.lines)) if _CLOSE.search(self.lines[at])), None)
        if end is None:
            raise self._wrong(start, "the block is not closed; end it with <!-- /deflow-report -->")
        if options:
            raise self._wrong(start, f"a {kind} has no {', '.join(options)}")
        self.blocks += 1
        try:
            expected = _block_lines(kind, folders, last)
        except InputError as error:
            raise InputError(f"{self.path}:{start + 1}: {error}") from error
        found = [line.rstrip() for line in self.lines[start + 1 : end]]
        for at, (one, other) in enumerate(itertools.zip_longest(found, expected), start + 1):
            if one != other:
                self._differ(at, one, other)
        ending = "\r" if self.lines[start].endswith("\r") else ""
        self.written += [self.lines[start], *(line + ending for line in expected), self.lines[end]]
        return end + 1

    def _value(self, number: int, marked: re.Match[str]) -> str:
        """Compare a value between its markers; return markers and value, corrected."""
        kind, folders, options, last = self._parse(marked["words"], number)
        if kind != "value":
            raise self._wrong(number, f"a {kind} needs lines of its own between the markers")
        self.values += 1
        stat, at = options.pop("stat", "mean"), options.pop("at", "end")
        percent = options.pop("percent", "false") == "true"
        if stat not in STATS:
            raise self._wrong(number, f"stat={stat} is none of {', '.join(STATS)}")
        try:
            found_runs = self.runs(tuple(folders))
        except InputError as error:
            raise InputError(f"{self.path}:{number + 1}: {error}") from error
        runs = [run for run in found_runs if run.record["evaluations"] and _has(run, options)]
        cells = sorted({(run.task, run.column, "online" if run.online else "offline") for run in runs})
        if not cells:
            raise self._wrong(number, "no run has these settings")
        if len(cells) > 1:
            several = "; ".join(" ".join(cell) for cell in cells[:3])
            raise self._wrong(number, f"the settings fit runs of {several}; name more")
        cell, found = make_cell(runs, at=at, last=last), marked["text"].strip()
        if stat in ("seeds", "episodes"):
            episodes = sum(len(score_of(run.record, at=at, last=last).episodes) for run in runs)
            expected = str(episodes if stat == "episodes" else len(runs))
        else:
            value = {"mean": cell.mean, "std": cell.std, "stderr": cell.error}[stat]
            if value is None:
                raise self._wrong(number, "one seed has no standard deviation")
            written = re.search(r"\.(\d+)", found)
            decimals = len(written[1]) if written else 0 if found else 2
            expected = f"{value * (100 if percent else 1):.{decimals}f}"
        if found.startswith("+") and not expected.startswith("-"):
            expected = f"+{expected}"
        if found != expected:
            self._differ(number, marked["text"], expected)
        return f"{marked['open']}{expected}{marked['close']}"

    def _parse(self, words: str, number: int) -> tuple[str, list[Path], dict[str, str], int | None]:
        """Kind, folders, settings and the number of averaged evaluations of a marker."""
        try:
            kind, *rest = shlex.split(words)
        except ValueError:
            raise self._wrong(number, f"cannot read {words.strip()!r}") from None
        if kind not in KINDS:
            raise self._wrong(number, f"{kind!r} is no kind of marker; there are {', '.join(KINDS)}")
        folders, options = [], {}
        for word in rest:
            name, equals, value = word.partition("=")
            # A sweep's folder of a variant has a = in its name too.
            if equals and "/" not in name and not (self.path.parent / word).is_dir():
                options[name] = value
            else:
                folders.append(self.path.parent / word)
        if not folders:
            raise self._wrong(number, f"{kind} names no folder of runs")
        last = options.pop("last", None)
        if last is not None and (not last.isdigit() or int(last) < 1):
            raise self._wrong(number, f"last={last} is no number of evaluations")
        return kind, folders, options, None if last is None else int(last)

    def _differ(self, number: int, found: str | None, expected: str | None) -> None:
        self.differences.append(Difference(self.path, number + 1, found, expected))

    def _wrong(self, number: int, message: str) -> InputError:
        return InputError(f"{self.path}:{number + 1}: {message} (docs/reports.md)")


def _block_lines(kind: str, folders: Sequence[Path], last: int | None) -> list[str]:
    if kind == "online":
        return online_progress([run.record for run in find_runs(folders) if run.online])
    summary = summarize_runs(folders, last=last)
    lines = [line for note in summary.notes for line in (f"**{note}**", "")] if kind == "table" else []
    for grid in summary.copied if kind == "paper" else summary.results:
        if kind == "results" and grid.kind != "results":
            continue
        # Times differ between machines; they are in the records and left out here.
        if grid.title not in ("Time", paper_runtime().title):
            lines += [f"**{grid.title}**: {grid.caption}.", "", *grid.markdown(), ""]
    return lines[:-1]


def _has(run: FinishedRun, options: dict[str, str]) -> bool:
    settings = {**flat_settings(run.record), "task": run.task, "algo": run.record["algo"], "seed": run.seed}
    return all(name in settings and as_setting(settings[name]) == value for name, value in options.items())
