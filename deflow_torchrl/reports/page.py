# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run as one self-contained HTML page, and many runs as one page or one Markdown file (``deflow report``)."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.algorithms.panels import Panel
from deflow_torchrl.algorithms.registry import ALGORITHMS
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import write_text
from deflow_torchrl.reports.figures import (
    DIAGNOSTICS,
    check_report_extra,
    colours_of,
    draw_diagnostic_of_runs,
    draw_diagnostics,
    draw_learning_curve,
    draw_outcomes,
)
from deflow_torchrl.reports.grids import Grid
from deflow_torchrl.reports.paper import paper_grids, paper_methods, paper_runtime, table_methods, task_order
from deflow_torchrl.reports.records import METRICS
from deflow_torchrl.reports.runs import FinishedRun, find_runs, flat_settings, standard_error
from deflow_torchrl.reports.statistics import stratified_bootstrap
from deflow_torchrl.reports.tables import (
    Cell,
    Table,
    aggregate_grid,
    column_name,
    column_order,
    column_settings,
    cost_grid,
    make_tables,
    paired_grid,
    ranking_grid,
    results_grid,
    split_variants,
    time_grid,
    unlike_notes,
    untuned_note,
    variant_grids,
)

_CURVE_RESAMPLES = 2_000
_CURVES_OF_TRAINING = 8
_LARGEST_CLIP = 2_000_000  # bytes that a page holds


def write_html_report(
    path: Path,
    *,
    title: str,
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
    figure: Path,
    clip: Path | None = None,
    target_divergence: float | None,
) -> Path:
    """Write a run's page: outcome, clip, curves, alarms, diagnostics, command, numbers, settings, versions.

    Everything is in the one file; it loads nothing from anywhere.

    Args:
        path: HTML file to write, beside and renamed.

    Keyword Args:
        title: heading.
        record: see :func:`deflow_torchrl.reports.build_record`.
        rows: rows of ``metrics.jsonl``, for the diagnostics and for the curves on a narrow screen.
        figure: PNG of the curves to embed.
        clip: animated picture of the last evaluation; one of more than 2 MB is named instead.
        target_divergence: delta, for the explanation.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    small = clip is not None and clip.stat().st_size <= _LARGEST_CLIP
    values = {
        "title": title,
        "record": record,
        "figure": figure.read_bytes(),
        "narrow": draw_learning_curve(
            rows,
            final={name: outcome[METRICS[record["metric"]].key] for name, outcome in record["evaluations"].items()},
            metric=record["metric"],
            target_divergence=target_divergence,
            columns=1,
        ),
        "clip": None if clip is None else f"{clip.parent.name}/{clip.name}",
        "clip_type": None if clip is None else clip.suffix.removeprefix("."),
        "moving": clip.read_bytes() if clip is not None and small else None,
        "diagnostics": draw_diagnostics(
            rows, ALGORITHMS[record["algo"]].panels if record["algo"] in ALGORITHMS else ()
        ),
        "settings": flat_settings(record),
        "target_divergence": target_divergence,
    }
    return _write_page("report.html.j2", path, values)


@dataclass(frozen=True)
class Summary:
    """The contents of a report.

    Attributes:
        runs: found below the folders.
        tables: results of the runs, as numbers.
        results: the tables as shown, with statistics over tasks, paired differences and times.
        copied: the paper's tables for these tasks.
        notes: what a reader must know first.
        facts: how many runs there are, and the commits they were made with.
    """

    runs: Sequence[FinishedRun]
    tables: Sequence[Table]
    results: Sequence[Grid]
    copied: Sequence[Grid]
    notes: Sequence[str]
    facts: str


def summarize_runs(folders: Sequence[Path], *, label: str | None = None, last: int | None = None) -> Summary:
    """Gather the contents of a report of the runs below some folders.

    Args:
        folders: see :func:`.runs.find_runs`.

    Keyword Args:
        label: the first note, for example that the numbers are not comparable with the paper's.
        last: evaluations that are averaged into a score; None: as many as the paper, see :func:`.runs.score_of`.

    Raises:
        InputError: on folders or records that cannot be used, or runs with fewer evaluations.
    """
    if last is not None and last < 1:
        raise InputError(f"--last {last}: at least one evaluation makes a score")
    runs = find_runs(folders)
    tables = make_tables(runs, last=last)
    notes = [label] if label else []
    for provenance in dict.fromkeys(run.record["data"]["provenance"] or "unknown" for run in runs):
        if provenance != "official":
            notes.append(f"Data: {provenance}. Results on it need not be comparable with the paper's.")
    notes += [note] if (note := untuned_note(runs)) else []
    notes += unlike_notes(runs)
    if silent := sum(not run.record["evaluations"] for run in runs):
        notes.append(f"{silent} run(s) had no environment to be evaluated in and are in no table.")
    results: list[Grid | None] = []
    for table in tables:
        variants = variant_grids(table)
        # The table of variants has the column of its method too: no other table where there is no other method.
        if not variants or len({column.split(" ")[0] for column in table.columns}) > 1:
            results.append(results_grid(table))
        results += variants
    for table in tables:
        results += [ranking_grid(table), aggregate_grid(table), paired_grid(table)]
    results += [cost_grid(runs), time_grid(runs)]
    # Runs with a fixed multiplier have a table of their own in the paper.
    usual = [run for run in runs if run.record["variant"].get("fixed_alpha") is None]
    offline, online = (
        sorted({run.task for run in usual if run.online == online}, key=task_order) for online in (False, True)
    )
    titles = {column_name(run.record["algo"]) for run in runs}
    flow_critics = bool(titles & (set(table_methods("flow_critics")) - set(paper_methods())))
    copied = paper_grids(offline, online, ablation=len(usual) < len(runs), flow_critics=flow_critics)
    copied += [paper_runtime()] if copied else []
    commits = sorted({run.record["git_commit"] or "no checkout" for run in runs})
    shown = [commit[:12] + ("+changes" if commit.endswith("+changes") else "") for commit in commits]
    facts = (
        f"{len(runs)} runs of {len({run.record['algo'] for run in runs})} methods on {len({run.task for run in runs})} tasks. "
        f"Made with commit {', '.join(shown)}."
    )
    return Summary(runs, tables, [grid for grid in results if grid is not None], copied, notes, facts)


def unfinished_summary(label: str | None = None) -> Summary:
    """The summary of no finished run."""
    return Summary([], [], [], [], [label] if label else [], "No run is finished yet.")


TRAINS, FINISHED = "trains", "finished"


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        name: of its folder.
        task: its task.
        algo: its method.
        seed: its seed.
        state: :data:`TRAINS`, :data:`FINISHED`, or what else it does.
        step: of its last row of metrics.
        steps: of the whole run.
        rows: its rows of metrics.
    """

    name: str
    task: str
    algo: str
    seed: int
    state: str
    step: int
    steps: int
    rows: Sequence[Mapping[str, Any]]

    @property
    def metric(self) -> str:
        """What its evaluations are judged by, as far as its rows tell."""
        named = set().union(*self.rows)
        return next((metric for metric in ("score", "success") if f"eval/{metric}" in named), "return")

    @property
    def outcome(self) -> str:
        """Its last evaluation."""
        values = [row[f"eval/{self.metric}"] for row in self.rows if f"eval/{self.metric}" in row]
        return f"{self.metric} {values[-1]:.4g}" if values else ""


@dataclass(frozen=True)
class Progress:
    """How far runs are.

    Attributes:
        seconds: after so many the page loads itself anew; None where it does not change any more.
        updated: when this was.
        runs: their states.
    """

    seconds: float | None
    updated: str
    runs: Sequence[RunState]

    def curves(self) -> list[tuple[RunState, bytes, bytes]]:
        """Curves, wide and narrow, of the runs that train and have rows; of eight at most."""
        training = [run for run in self.runs if run.state == TRAINS and run.rows][:_CURVES_OF_TRAINING]
        return [
            (run, *(draw_learning_curve(run.rows, final={}, metric=run.metric, columns=number) for number in (3, 1)))  # type: ignore[misc]
            for run in training
        ]


def write_summary_page(summary: Summary, path: Path, *, title: str, progress: Progress | None = None) -> Path:
    """Write the page: tables, the paper's numbers, learning curves, trust region, runs. It loads nothing from anywhere.

    With ``progress`` it begins with the runs' states, and loads itself anew while they change.

    Raises:
        InputError: if it cannot be written there, or a run's rows of metrics are damaged.
        MissingExtraError: without the ``reports`` extra.
    """
    check_report_extra()
    _check_folder(path)
    values = {
        **vars(summary),
        "title": title,
        "progress": progress,
        "training": [] if progress is None else progress.curves(),
        "curves": draw_curves(summary.runs),
        "diagnostics": _draw_trust_region(summary.runs),
        "cards": [
            (name, [(_card_title(run), run.record) for runs in columns.values() for run in runs])
            for name, columns in _by_task(summary.runs).items()
        ],
    }
    return _write_page("summary.html.j2", path, values)


def write_summary_markdown(summary: Summary, path: Path, *, title: str) -> Path:
    """Write the tables and commands as Markdown.

    Raises:
        InputError: if it cannot be written there.
    """
    _check_folder(path)
    write_text(path, "\n".join(summary_markdown(summary, title=title)) + "\n")
    return path


def summary_markdown(summary: Summary, *, title: str) -> list[str]:
    """The lines of :func:`write_summary_markdown`."""
    lines = [f"# {title}", ""]
    for note in summary.notes:
        lines += [f"**{note}**", ""]
    lines += [summary.facts, ""]
    for grid in (*summary.results, *summary.copied):
        lines += [f"## {grid.title}", "", f"{grid.caption}.", "", *grid.markdown(), ""]
    return [*lines, "## Commands", "", "```bash", *(run.record["command"] for run in summary.runs), "```"]


def summary_json(summary: Summary) -> dict[str, Any]:
    """The numbers of the tables, in the metrics' units."""

    def numbers(cell: Cell) -> dict[str, Any]:
        seeds = {str(seed): score for seed, score in cell.scores.items()}
        own = {"mean": cell.mean, "std": cell.std, "standard_error": cell.error, "seeds": seeds}
        return own if cell.before is None else {**own, "before": numbers(cell.before)}

    tables = [
        {
            "online": table.online,
            "columns": list(table.columns),
            "rows": [
                {**vars(row), "cells": {column: numbers(cell) for column, cell in row.cells.items()}}
                for row in table.rows
            ],
        }
        for table in summary.tables
    ]
    return {"runs": len(summary.runs), "notes": list(summary.notes), "tables": tables}


def draw_curves(runs: Sequence[FinishedRun]) -> list[tuple[str, bytes]]:
    """Draw learning curves: name and PNG for each task and phase, and for the variants of each method.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    drawn = []
    for name, columns in _by_task(runs).items():
        first = next(iter(columns.values()))[0]
        boundary = first.record["config"]["offline_steps"] if first.online else None
        methods, varied = split_variants(columns)
        figures = {name: {column: column_name(column) for column in methods}}
        for base, variants in varied.items():
            title = f"{name}, variants of {column_name(base)}"
            figures[title] = {column: column_settings(column) for column in variants} | {base: column_name(base)}
        for title, labels in figures.items():
            curves = {label: points for column, label in labels.items() if (points := learning_curve(columns[column]))}
            if curves:
                colours = _colours(curves, runs)
                png = draw_outcomes(curves, metric=first.record["metric"], colours=colours, boundary=boundary)
                drawn.append((title, png))
    return drawn


def learning_curve(runs: Sequence[FinishedRun]) -> list[tuple[int, float, float, float]]:
    """Mean and interval of the evaluations that all runs have made; the runs differ in their seeds only.

    Returns:
        ``(step, mean, low, high)``: for several seeds a 95% bootstrap interval over them, for one seed 1.96 standard errors of
        its episodes.
    """
    metric = runs[0].record["metric"]
    histories = []
    for run in runs:
        name = run.record["acting"]
        histories.append({it["step"]: it["policies"][name] for it in run.record["history"] if name in it["policies"]})
    points = []
    for step in sorted(set.intersection(*map(set, histories))):
        outcomes = [history[step] for history in histories]
        scores = [outcome[METRICS[metric].key] for outcome in outcomes]
        if len(scores) > 1:
            interval = stratified_bootstrap([scores], lambda rows: rows.mean(1), resamples=_CURVE_RESAMPLES)
            points.append((step, interval.value, interval.low or 0.0, interval.high or 0.0))
        else:
            error = 1.96 * standard_error(metric, outcomes[0][METRICS[metric].episodes])
            ends = np.array([scores[0] - error, scores[0] + error])
            points.append((step, scores[0], *(ends.clip(0, 1) if metric == "success" else ends).tolist()))
    return points


def _draw_trust_region(runs: Sequence[FinishedRun]) -> list[tuple[str, list[tuple[Panel, bytes]]]]:
    compared, drawn = [panel for panel in DIAGNOSTICS if panel.compared], []
    for name, columns in _by_task(runs).items():
        rows = {column_name(column): [run.rows() for run in members] for column, members in columns.items()}
        # Methods without a trust region are not in the legend.
        named = {label: set(itertools.chain(*itertools.chain(*own))) for label, own in rows.items()}
        rows = {label: rows[label] for label, names in named.items() if any(panel.name in names for panel in compared)}
        pictures = [(panel, draw_diagnostic_of_runs(panel, rows, colours=_colours(rows, runs))) for panel in compared]
        if panels := [(panel, png) for panel, png in pictures if png is not None]:
            drawn.append((name, panels))
    return drawn


def _by_task(runs: Sequence[FinishedRun]) -> dict[str, dict[str, list[FinishedRun]]]:
    """Name of a task and phase -> column -> its runs, in the tables' order."""
    groups: dict[str, dict[str, list[FinishedRun]]] = {}
    for run in sorted(runs, key=lambda run: (run.online, task_order(run.task), column_order(run.column), run.seed)):
        name = f"{run.task}, offline to online" if run.online else run.task
        groups.setdefault(name, {}).setdefault(run.column, []).append(run)
    return groups


def _colours(labels: Mapping[str, Any], runs: Sequence[FinishedRun]) -> dict[str, Any]:
    methods = sorted({run.record["algo"] for run in runs}, key=column_order)
    return colours_of(list(labels), [column_name(algo) for algo in methods])


def _card_title(run: FinishedRun) -> str:
    record, score = run.record, "not evaluated"
    if record["acting"] in record["evaluations"]:
        value = record["evaluations"][record["acting"]][METRICS[record["metric"]].key]
        score = f"{100 * value:.0f}% at the end" if record["metric"] == "success" else f"{value:.1f} at the end"
    return f"{column_name(run.column)}, seed {run.seed}: {score}"


def _write_page(template: str, path: Path, values: Mapping[str, Any]) -> Path:
    check_report_extra()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    source = resources.files(__package__).joinpath(template).read_text(encoding="utf-8")
    write_text(path, environment.from_string(source).render(values))
    return path


def _check_folder(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the file")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of {path.name} does not exist")
