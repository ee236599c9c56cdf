# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Many runs as one page or one Markdown file: ``deflow report``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import write_text
from deflow_torchrl.reports.extra import check_report_extra
from deflow_torchrl.reports.figures import DIAGNOSTICS, Diagnostic, colours_of, draw_diagnostic_of_runs, draw_outcomes
from deflow_torchrl.reports.grids import Grid
from deflow_torchrl.reports.html import as_base64, page_template
from deflow_torchrl.reports.paper import paper_grids, paper_runtime, task_order
from deflow_torchrl.reports.runs import KEYS, FinishedRun, find_runs, standard_error
from deflow_torchrl.reports.statistics import stratified_bootstrap
from deflow_torchrl.reports.tables import (
    NAMES,
    Table,
    aggregate_grid,
    column_name,
    column_order,
    make_tables,
    paired_grid,
    ranking_grid,
    results_grid,
    time_grid,
    variant_grids,
)

_TRUST_REGION = ("train/divergence_ratio", "train/alpha", "train/action_distance")
_CURVE_RESAMPLES = 2_000


@dataclass(frozen=True)
class Summary:
    """What a report says of some runs.

    Attributes:
        runs: found below the folders.
        tables: ours, before they are put in words.
        results: the same as shown, with statistics over tasks, paired differences and times.
        copied: the paper's tables for these tasks.
        notes: what a reader must know first.
        facts: how much there is.
    """

    runs: tuple[FinishedRun, ...]
    tables: tuple[Table, ...]
    results: tuple[Grid, ...]
    copied: tuple[Grid, ...]
    notes: tuple[str, ...]
    facts: str


def summarize_runs(folders: Sequence[Path], *, label: str | None = None, last: int | None = None) -> Summary:
    """Gather what there is to say of the runs below some folders.

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
    silent = sum(not run.record["evaluations"] for run in runs)
    if silent:
        notes.append(f"{silent} run(s) had no environment to be evaluated in and are in no table.")
    results = []
    for table in tables:
        variants = variant_grids(table)
        # Beside the variants of the only method its own column would be a table of what they show too.
        if not variants or len({column.split(" ")[0] for column in table.columns}) > 1:
            results.append(results_grid(table))
        results += variants
    for table in tables:
        further = (ranking_grid(table), aggregate_grid(table), paired_grid(runs, table))
        results += [grid for grid in further if grid is not None]
    results.append(time_grid(runs))
    fixed = [
        run for run in runs if run.record["variant"].get("fixed_alpha") is not None
    ]  # these have a table of their own
    tasks = {
        online: sorted({run.task for run in runs if run.online == online and run not in fixed}, key=task_order)
        for online in (False, True)
    }
    copied = paper_grids(tasks[False], tasks[True], ablation=bool(fixed))
    copied += [paper_runtime()] if copied else []
    commits = sorted({run.record["git_commit"] or "no checkout" for run in runs})
    facts = (
        f"{len(runs)} runs of {len({run.record['algo'] for run in runs})} methods on {len({run.task for run in runs})} tasks. "
        f"Made with commit {', '.join(commit[:12] + ('+changes' if commit.endswith('+changes') else '') for commit in commits)}."
    )
    return Summary(tuple(runs), tuple(tables), tuple(results), tuple(copied), tuple(notes), facts)


def write_summary_page(summary: Summary, path: Path, *, title: str) -> Path:
    """Write the page: tables, the paper's numbers, learning curves, trust region, runs. It loads nothing from anywhere.

    Raises:
        InputError: if it cannot be written there, or a run's rows of metrics are damaged.
        MissingExtraError: without the ``reports`` extra.
    """
    check_report_extra()
    _check_folder(path)
    page = page_template("summary.html.j2").render(
        title=title,
        notes=summary.notes,
        facts=summary.facts,
        results=summary.results,
        copied=summary.copied,
        curves=[(name, as_base64(png)) for name, png in draw_curves(summary.runs)],
        diagnostics=[
            (name, [(diagnostic, as_base64(png)) for diagnostic, png in panels])
            for name, panels in _draw_trust_region(summary.runs)
        ],
        cards=[
            (_name(task, online), [_card(run) for members in columns.values() for run in members])
            for (task, online), columns in _by_task(summary.runs).items()
        ],
    )
    write_text(path, page)
    return path


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
    lines += ["## Commands", "", "```bash"]
    lines += [run.record["command"] for run in summary.runs]
    return [*lines, "```"]


def summary_json(summary: Summary) -> dict[str, Any]:
    """The numbers of the tables, in the metrics' units."""
    return {
        "runs": len(summary.runs),
        "notes": list(summary.notes),
        "tables": [
            {
                "online": table.online,
                "columns": list(table.columns),
                "rows": [
                    {
                        "family": row.family, "name": row.name, "kind": row.kind, "metric": row.metric,
                        "cells": {column: _cell_json(cell) for column, cell in row.cells.items()},
                    }
                    for row in table.rows
                ],
            }
            for table in summary.tables
        ],
    }  # fmt: skip


def _cell_json(cell: Any) -> dict[str, Any]:
    numbers = {"mean": cell.mean, "std": cell.std, "standard_error": cell.error}
    numbers["seeds"] = {str(seed): score for seed, score in cell.scores.items()}
    return numbers if cell.before is None else {**numbers, "before": _cell_json(cell.before)}


def learning_curve(runs: Sequence[FinishedRun]) -> list[tuple[int, float, float, float]]:
    """Step, mean and interval of each evaluation that all of some runs, alike but for their seeds, have made.

    Returns:
        ``(step, mean, low, high)``; of several seeds a 95% bootstrap interval over them, of one 1.96 standard errors of its
        episodes.
    """
    histories = []
    for run in runs:
        name = run.record["acting"]
        notes = [note for note in run.record["history"] if name in note["policies"]]
        histories.append({note["step"]: note["policies"][name] for note in notes})
    metric = runs[0].record["metric"]
    points = []
    for step in sorted(set.intersection(*map(set, histories))):
        outcomes = [history[step] for history in histories]
        scores = [outcome[KEYS[metric]] for outcome in outcomes]
        if len(scores) > 1:
            interval = stratified_bootstrap([scores], lambda rows: rows.mean(1), resamples=_CURVE_RESAMPLES)
            assert interval.low is not None
            assert interval.high is not None
            points.append((step, interval.value, interval.low, interval.high))
        else:
            episodes = outcomes[0][{"success": "success", "score": "score", "return": "episode_return"}[metric]]
            error = 1.96 * standard_error(metric, episodes)
            low, high = scores[0] - error, scores[0] + error
            points.append(
                (step, scores[0], *np.clip((low, high), 0, 1).tolist())
                if metric == "success"
                else (step, scores[0], low, high)
            )
    return points


def _by_task(runs: Sequence[FinishedRun]) -> dict[tuple[str, bool], dict[str, list[FinishedRun]]]:
    groups: dict[tuple[str, bool], dict[str, list[FinishedRun]]] = {}
    for run in sorted(runs, key=lambda run: (run.online, task_order(run.task), column_order(run.column), run.seed)):
        groups.setdefault((run.task, run.online), {}).setdefault(run.column, []).append(run)
    return groups


def draw_curves(runs: Sequence[FinishedRun]) -> list[tuple[str, bytes]]:
    """Learning curves, a PNG for each task and phase, and one for the variants of a method beside it; each with its name.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    drawn = []
    for (task, online), columns in _by_task(runs).items():
        first = next(iter(columns.values()))[0].record
        boundary = first["config"]["offline_steps"] if online else None
        for name, group in _figures(columns):
            shown = {
                column: column.partition(" (")[2].removesuffix(")") if name and " (" in column else column_name(column)
                for column in group
            }
            curves = {shown[column]: points for column in group if (points := learning_curve(columns[column]))}
            if curves:
                colours = colours_of(list(curves), list(NAMES.values())[::-1])
                png = draw_outcomes(curves, metric=first["metric"], colours=colours, boundary=boundary)
                drawn.append((f"{_name(task, online)}{name}", png))
    return drawn


def _draw_trust_region(runs: Sequence[FinishedRun]) -> list[tuple[str, list[tuple[Diagnostic, bytes]]]]:
    chosen = [diagnostic for diagnostic in DIAGNOSTICS if next(iter(diagnostic.curves)) in _TRUST_REGION]
    drawn = []
    for (task, online), columns in _by_task(runs).items():
        rows = {column_name(column): [run.rows() for run in members] for column, members in columns.items()}
        # Methods without a trust region would be colours of nothing.
        rows = {
            column: own
            for column, own in rows.items()
            if any(name in row for one in own for row in one for name in _TRUST_REGION)
        }
        colours = colours_of(list(rows), list(NAMES.values())[::-1])
        panels = [
            (diagnostic, png)
            for diagnostic in chosen
            if (png := draw_diagnostic_of_runs(diagnostic, rows, colours=colours)) is not None
        ]
        if panels:
            drawn.append((_name(task, online), panels))
    return drawn


def _figures(columns: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Columns a figure: the methods, and for each that has variants these beside it; with what is added to the figure's name."""
    varied = {
        base: [column for column in columns if column.startswith(f"{base} (")] for base in columns if " (" not in base
    }
    apart = {column for variants in varied.values() for column in variants}
    figures = [("", [column for column in columns if column not in apart])]
    for base, variants in varied.items():
        if variants:
            figures.append((f", variants of {column_name(base)}", [*variants, base]))
    return figures


def _name(task: str, online: bool) -> str:
    return f"{task}, offline to online" if online else task


def _card(run: FinishedRun) -> tuple[str, str, Mapping[str, str]]:
    record = run.record
    hardware, data = record["hardware"], record["data"]
    facts = {
        "settings, SHA-256": record["config_sha256"],
        "settings that differ from the method's and the task's": json.dumps(record["variant"])
        if record["variant"]
        else "none",
        "protocol, preset": ", ".join(str(record[name] or "none named") for name in ("protocol", "preset")),
        "seeds of training and of evaluation": f"{record['seeds']['training']}, {record['seeds']['evaluation']}",
        "data": f"{data['name']}, {data['transitions']:,} transitions, {data['provenance'] or 'provenance unknown'}",
        "data, SHA-256": data["sha256"] or "unknown",
        "success and reward are judged": {
            "pre": "before the step",
            "post": "after the step",
            None: "by another simulator than OGBench's",
        }[record["success_timing"]],
        "git commit": record["git_commit"] or "not a checkout",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "machine": f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['torch_threads']} thread(s), accelerator: "
        f"{hardware['accelerator'] or 'none'}",
        "time": ", ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in record["time"].items())
        + (f" (of seeds {record['stacked']} together)" if record["stacked"] else ""),
        "alarms": "no diagnostics" if record["alarms"] is None else str(len(record["alarms"])),
    }
    return f"{column_name(run.column)}, seed {run.seed}: {_score(run)}", "\n".join(record["commands"]), facts


def _score(run: FinishedRun) -> str:
    record = run.record
    if record["acting"] not in record["evaluations"]:
        return "not evaluated"
    value = record["evaluations"][record["acting"]][KEYS[record["metric"]]]
    return f"{100 * value:.0f}% at the end" if record["metric"] == "success" else f"{value:.1f} at the end"


def _check_folder(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the file")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of {path.name} does not exist")
