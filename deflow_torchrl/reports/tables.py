# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Tables of runs in the paper's layout: tasks by family down, methods across, mean±std over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.grids import Entry, Grid, GridRow
from deflow_torchrl.reports.paper import family_of, paper_means, task_order
from deflow_torchrl.reports.runs import FinishedRun, Score, natural, score_of, standard_error
from deflow_torchrl.reports.statistics import (
    careful_standard_error,
    inside_noise,
    kendall_tau,
    mean_and_std,
    paired_difference,
    probability_of_improvement,
    seeds_inside_noise,
    stratified_bootstrap,
    success_standard_error,
)

BOLD_FROM = 0.95
"""Share of the row's best from which the paper prints a mean in bold."""
NEAR = "≈"
UNITS = {"success": "success in %", "score": "normalised score", "return": "return"}
_SCALE = {"success": 100.0, "score": 1.0, "return": 1.0}
NAMES = {
    "flow_bc": "flow BC", "bc": "BC", "iql": "IQL", "rebrac": "ReBRAC", "fawac": "FAWAC", "fbrac": "FBRAC", "ifql": "IFQL",
    "fql": "FQL", "deflow": "DeFlow",
}  # fmt: skip
"""Methods as a table names them, in the paper's order with DeFlow last."""
_READING = (
    f"mean±std over seeds (by S - 1), in brackets the standard error of the mean over all episodes; bold: at least "
    f"{BOLD_FROM:.0%} of the row's best; {NEAR}: the gap to the best lies inside the noise, of the episodes or of the seeds "
    "(two-sided 95%, Welch's test over seeds)"
)


@dataclass(frozen=True)
class Cell:
    """The runs of a task and column.

    Attributes:
        scores: seed -> score, in the metric's unit.
        mean: over seeds.
        std: over seeds, by S - 1; None of one seed.
        error: standard error of the mean over all episodes.
        careful: the same for comparisons, see :func:`.statistics.careful_standard_error`.
        steps: the evaluations each score is the mean of.
        episodes: of a seed.
        before: the same at the end of the offline phase, of runs that went online.
    """

    scores: Mapping[int, float]
    mean: float
    std: float | None
    error: float
    careful: float
    steps: tuple[int, ...]
    episodes: int
    before: Cell | None = None

    def near(self, other: Cell) -> bool:
        """Whether noise alone explains the gap to the other mean: that of the episodes, or that of the seeds.

        The spread of seeds holds the episodes' noise too, but of a few seeds it can come out smaller than that by luck.
        """
        if inside_noise(self.mean - other.mean, self.careful, other.careful):
            return True
        mine, theirs = (list(cell.scores.values()) for cell in (self, other))
        return min(len(mine), len(theirs)) > 1 and seeds_inside_noise(mine, theirs)


@dataclass(frozen=True)
class Row:
    """A row of a table: a task, or the average of a family's tasks.

    Attributes:
        family: of the task.
        name: the task, or words for the average.
        kind: ``task`` or ``average``.
        metric: ``success``, ``score`` or ``return``.
        cells: column -> cell; without an entry where there is no run.
    """

    family: str
    name: str
    kind: str
    metric: str
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """Results of runs of one kind: offline, or offline to online."""

    online: bool
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def make_tables(runs: Sequence[FinishedRun], *, last: int | None = None) -> list[Table]:
    """The table of the runs that stayed offline and that of those that went online, each where there are any.

    Args:
        runs: finished runs; those without an evaluation (no environment) are left out.

    Keyword Args:
        last: evaluations that are averaged into a score, see :func:`.runs.score_of`.

    Raises:
        InputError: if a run has fewer evaluations, or none at the end of its offline phase although it went online.
    """
    tables = []
    for online in (False, True):
        chosen = [run for run in runs if run.online == online and run.record["evaluations"]]
        if not chosen:
            continue
        columns = sorted({run.column for run in chosen}, key=column_order)
        tasks = sorted({run.task for run in chosen}, key=task_order)
        families = list(dict.fromkeys(family_of(task) for task in tasks))
        rows = []
        for family in families:
            members = [_task_row(task, chosen, columns, online, last) for task in tasks if family_of(task) == family]
            rows += members
            if len(members) > 1 and family != "other" and len({row.metric for row in members}) == 1:
                rows.append(_average(family, members, columns))
        tables.append(Table(online, tuple(columns), tuple(rows)))
    return tables


def make_cell(
    runs: Sequence[FinishedRun], *, at: str = "end", last: int | None = None, before: Cell | None = None
) -> Cell:
    """Mean, deviation and standard error of runs that differ in their seeds only.

    Raises:
        InputError: if one has too few evaluations, or they are of other steps than another's.
    """
    scores = {run.seed: score_of(run.record, at=at, last=last) for run in sorted(runs, key=lambda run: run.seed)}
    mean, std = mean_and_std([score.value for score in scores.values()])
    steps = {score.steps for score in scores.values()}
    if len(steps) > 1 and at != "best":
        shown = " and ".join(", ".join(map(str, one)) for one in sorted(steps))
        raise InputError(
            f"{runs[0].column} on {runs[0].task}: its seeds' scores are of evaluations at {shown}; --last 1 takes the last"
        )
    metric, episodes = runs[0].record["metric"], _episodes(scores)
    error = careful = standard_error(metric, episodes)
    if metric == "success":
        careful = careful_standard_error(float(np.mean(episodes)), len(episodes))
    each = len(episodes) // sum(len(score.steps) for score in scores.values())
    values = {seed: score.value for seed, score in scores.items()}
    return Cell(values, mean, std, error, careful, min(steps), each, before)


def results_grid(table: Table) -> Grid:
    """The table as it is shown: units, bold, what is inside the noise. Variants of a method have a table of their own."""
    varied = {column for columns in _variants(table).values() for column in columns}
    columns = [column for column in table.columns if column not in varied]
    title = "Offline to online" if table.online else "Offline"
    return _results(title, table, table.rows, columns, [column_name(column) for column in columns])


def variant_grids(table: Table) -> list[Grid]:
    """For each method whose runs differ in a setting beside its usual runs: these and the variants, by value."""
    grids = []
    for base, variants in _variants(table).items():
        title = f"Variants of {column_name(base)}, {_phase(table)}"
        headers = [
            column_name(base),
            *(column.partition(" (")[2].removesuffix(")").replace("=", " = ") for column in variants),
        ]
        rows = [row for row in table.rows if any(column in row.cells for column in variants)]
        grids.append(_results(title, table, rows, [base, *variants], headers))
    return grids


def column_name(column: str) -> str:
    """A column as it is shown: the method's name, and the settings it is run with.

    Examples:
        >>> column_name("fql"), column_name("deflow (fixed_alpha=0.3)"), column_name("mine")
        ('FQL', 'DeFlow (fixed_alpha=0.3)', 'mine')
    """
    algo, bracket, settings = column.partition(" (")
    return NAMES.get(algo, algo) + bracket + settings


def _variants(table: Table) -> dict[str, list[str]]:
    """A method's column without settings -> its columns with settings; only methods that have both."""
    return {
        base: found
        for base in table.columns
        if " (" not in base and (found := [column for column in table.columns if column.startswith(f"{base} (")])
    }


def _results(title: str, table: Table, rows: Sequence[Row], columns: Sequence[str], headers: Sequence[str]) -> Grid:
    rows = [row for row in rows if any(column in row.cells for column in columns)]
    units = dict.fromkeys(UNITS[row.metric] for row in rows)
    several = len(units) > 1
    lines = []
    for row in rows:
        best = max((row.cells[column] for column in columns if column in row.cells), key=lambda cell: cell.mean)
        entries = [_entry(row, row.cells.get(column), best) for column in columns]
        name = f"{row.name} ({UNITS[row.metric]})" if several else row.name
        lines.append(GridRow(row.kind, (Entry(row.family), Entry(name), *entries)))
    arrow = "end of the offline phase → end of the run; " if table.online else ""
    caption = f"{arrow}{' or '.join(units)}; {_READING}. {_evaluations(rows, columns)}"
    return Grid(title, caption, ("family", "task", *headers), tuple(lines))


def _evaluations(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Which evaluations, and how many episodes, are in the cells."""
    groups: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for column in columns:
            if row.kind == "task" and column in row.cells:
                groups.setdefault(_contents(row.cells[column]), {}).setdefault(row.name, []).append(column_name(column))
    if len(groups) == 1:
        return f"A seed's score is {next(iter(groups))}"
    words = []
    for contents, tasks in groups.items():
        places = [f"{', '.join(names)} on {task}" for task, names in tasks.items()]
        words.append(f"{contents} ({'; '.join(places)})")
    return f"A seed's score is {'; '.join(words)}"


def _contents(cell: Cell) -> str:
    def said(steps: Sequence[int]) -> str:
        shown = [f"{step:,}" for step in steps]
        return (
            f"the evaluation at step {shown[0]}"
            if len(shown) == 1
            else f"the mean of those at steps {', '.join(shown)}"
        )

    before = "" if cell.before is None else f"{said(cell.before.steps)}, then "
    return f"{before}{said(cell.steps)}, of {cell.episodes} episodes each"


def _phase(table: Table) -> str:
    return "offline to online" if table.online else "offline"


def ranking_grid(table: Table) -> Grid | None:
    """How far our order of the methods is the paper's, task by task; None where no task has two methods of the paper's."""
    lines = []
    for row in table.rows:
        means = paper_means(row.name, online=table.online) if row.kind == "task" else {}
        common = [column for column in table.columns if column in row.cells and column in means]
        if len(common) < 2:
            continue
        ours = {column: row.cells[column] for column in common}
        tau = kendall_tau([cell.mean for cell in ours.values()], [means[column] for column in common])
        pairs = [(one, other) for place, one in enumerate(common) for other in common[place + 1 :]]
        clear = [(one, other) for one, other in pairs if not ours[one].near(ours[other])]
        near = len(pairs) - len(clear)
        agreeing = sum((ours[one].mean - ours[other].mean) * (means[one] - means[other]) > 0 for one, other in clear)
        lines.append(
            GridRow("task", (
                Entry(row.name), Entry(_order({column: cell.mean for column, cell in ours.items()})),
                Entry(_order({column: means[column] for column in common})),
                Entry("" if tau is None else f"{tau:+.2f}", tau), Entry(f"{near} of {len(pairs)}", near),
                Entry(f"{agreeing} of {len(pairs) - near}", agreeing),
            ))
        )  # fmt: skip
    if not lines:
        return None
    caption = (
        "Methods that both have, by their means; tau: Kendall's tau-b of the two orders, 1 for the same and -1 for the reverse. "
        "Pairs inside our noise have no order of their own in our runs; the last column counts those of the other pairs that "
        "stand as in the paper. Other data, steps or networks than the paper's can change an order without either being wrong"
    )
    headers = (
        "task",
        "our order",
        "the paper's order (copied)",
        "tau",
        "pairs inside our noise",
        "other pairs as in the paper",
    )
    return Grid(f"Ranking beside the paper's, {_phase(table)}", caption, headers, tuple(lines))


def _order(means: Mapping[str, float]) -> str:
    """Methods from best to worst, level ones joined by =."""
    columns = sorted(means, key=lambda column: -means[column])
    text = column_name(columns[0])
    for one, other in itertools.pairwise(columns):
        text += f" {'=' if means[one] == means[other] else '>'} {column_name(other)}"
    return text


def aggregate_grid(table: Table) -> Grid | None:
    """Interquartile mean of each column, and how often the reference column beats it; None where nothing can be said.

    The reference is the first of DeFlow's columns. Tasks judged by return have no common scale and are left out.
    """
    rows = [row for row in table.rows if row.kind == "task" and row.metric != "return"]
    if not rows:
        return None
    reference = next((column for column in table.columns if column.split(" ")[0] == "deflow"), None)
    lines = []
    for column in table.columns:
        mine = [_shown(row, column) for row in rows if column in row.cells]
        if not mine:
            continue
        middle = stratified_bootstrap(mine)
        entries = [
            Entry(column_name(column)),
            Entry(str(len(mine)), len(mine)),
            Entry(f"{middle.value:.1f}", middle.value),
        ]
        entries.append(Entry(_range(middle.low, middle.high, ".1f")))
        if reference is not None:
            shared = [row for row in rows if column in row.cells and reference in row.cells]
            if column == reference or not shared:
                entries += [Entry(""), Entry("")]
            else:
                odds = probability_of_improvement(
                    [_shown(row, reference) for row in shared], [_shown(row, column) for row in shared]
                )
                entries += [Entry(f"{odds.value:.2f}", odds.value), Entry(_range(odds.low, odds.high, ".2f"))]
        lines.append(GridRow("task", tuple(entries)))
    headers = ["method", "tasks", "IQM", "95% interval"]
    caption = (
        "Interquartile mean of all runs, with a bootstrap interval that resamples seeds within each task (none of single seeds; "
        "of few seeds too narrow). Columns with other tasks are not comparable"
    )
    if reference is not None:
        headers += [f"P({column_name(reference)} better)", "95% interval"]
        caption += f"; P: how often a run of {column_name(reference)} beats one of the row's method on the same task, ties half"
    return Grid(f"Over tasks, {_phase(table)}", caption, tuple(headers), tuple(lines))


def paired_grid(runs: Sequence[FinishedRun], table: Table) -> Grid | None:
    """Differences on common starts, episode by episode, of the reference column to each other; None where there are none."""
    reference = next((column for column in table.columns if column.split(" ")[0] == "deflow"), None)
    lines = []
    by_cell: dict[tuple[str, str], dict[int, FinishedRun]] = {}
    for run in runs:
        if run.online == table.online and run.record["evaluations"]:
            by_cell.setdefault((run.task, run.column), {})[run.seed] = run
    for row in table.rows:
        if reference is None or reference not in row.cells or row.kind != "task":
            continue
        for column in row.cells:
            if column == reference:
                continue
            pairs = _pairs(by_cell[row.name, column], by_cell[row.name, reference])
            if not pairs[0]:
                continue
            result, scale = paired_difference(*pairs), _SCALE[row.metric]
            lines.append(
                GridRow("task", (
                    Entry(row.name), Entry(column_name(column)),
                    Entry(f"{result.mean * scale:+.1f}", result.mean),
                    Entry(_range(result.low * scale, result.high * scale, "+.1f")),
                    Entry(str(result.pairs), result.pairs),
                ))
            )  # fmt: skip
    if reference is None or not lines:
        return None
    units = dict.fromkeys(UNITS[row.metric] for row in table.rows)
    caption = (
        f"{column_name(reference)} minus the other method, {' or '.join(units)}, over episodes of the same start in the "
        "final evaluations of the same seed of training, with a 95% bootstrap interval over these pairs: the noise of the "
        "episodes under these very policies, not that of training"
    )
    headers = ("task", "method", f"{column_name(reference)} minus method", "95% interval", "pairs")
    return Grid(f"Paired differences, {_phase(table)}", caption, headers, tuple(lines))


def time_grid(runs: Sequence[FinishedRun]) -> Grid:
    """Milliseconds a gradient step of each column, and the machine."""
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        hardware = run.record["hardware"]
        machine = f"{hardware['accelerator'] or hardware['cpu']}, {hardware['torch_threads']} thread(s)"
        stacked = run.record["stacked"]
        machine += f", {len(stacked)} seeds in one process, time of all" if stacked else ""
        name = f"{run.column}, offline to online" if run.online else run.column
        groups.setdefault((name, machine), []).append(run)
    rows = []
    for (column, machine), members in sorted(groups.items(), key=lambda item: (column_order(item[0][0]), item[0][1])):
        each = [1000 * run.record["time"].get("updates", math.nan) / gradient_steps(run.record) for run in members]
        mean, std = float(np.mean(each)), float(np.std(each, ddof=1)) if len(each) > 1 else None
        text = "" if math.isnan(mean) else f"{mean:.2f}" + ("" if std is None else f"±{std:.2f}")
        rows.append(
            GridRow(
                "task",
                (Entry(column_name(column)), Entry(machine), Entry(str(len(each)), len(each)), Entry(text, mean)),
            )
        )
    caption = "Wall time of drawing batches and updating, without acting and evaluating, by gradient steps; mean±std over runs"
    return Grid("Time", caption, ("method", "machine", "runs", "ms per gradient step"), tuple(rows))


def gradient_steps(record: Mapping[str, Any]) -> float:
    """Gradient steps of a run, offline and online."""
    config = record["config"]
    online = max(config["online_steps"] - config.get("warmup_steps", 0), 0)
    return config["offline_steps"] + online * config.get("utd", 1.0)


def online_progress(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines of what each run gained online, by prior and seed: at the offline phase's end, at best, at the end.

    Args:
        records: of runs that went online and are judged by success.

    Raises:
        InputError: if one has no evaluation in a phase.
    """
    lines = [
        "| prior | seed | offline steps | success offline | best online | at the end | gain, best | gain, end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda it: (it["config"]["seed"], not it["config"]["freeze_prior"])):
        config, name = record["config"], record["acting"]
        before, best, end = (score_of(record, at=at).value for at in ("offline", "best", "end"))
        step = next(
            note["step"]
            for note in record["history"]
            if note["phase"] == "online" and note["policies"][name]["success_rate"] == best
        )
        episodes = record["evaluations"][name]["episodes"]
        shown = [f"{rate:.2f} +- {success_standard_error(rate, episodes):.2f}" for rate in (before, best, end)]
        lines.append(
            f"| {'frozen' if config['freeze_prior'] else 'full'} | {config['seed']} | {config['offline_steps']} | {shown[0]} "
            f"| {shown[1]} ({step - config['offline_steps']}) | {shown[2]} ({config['online_steps']}) "
            f"| {best - before:+.2f} | {end - before:+.2f} |"
        )
    return lines


def _task_row(task: str, runs: Sequence[FinishedRun], columns: Sequence[str], online: bool, last: int | None) -> Row:
    cells = {}
    for column in columns:
        members = [run for run in runs if run.task == task and run.column == column]
        if members:
            before = make_cell(members, at="offline", last=last) if online and _began_offline(members) else None
            cells[column] = make_cell(members, last=last, before=before)
    metric = next(run.record["metric"] for run in runs if run.task == task)
    return Row(family_of(task), task, "task", metric, cells)


def _began_offline(runs: Sequence[FinishedRun]) -> bool:
    return all(run.record["config"]["offline_steps"] > 0 for run in runs)


def _average(family: str, members: Sequence[Row], columns: Sequence[str]) -> Row:
    """Means over a family's tasks; the deviation is over seeds of the tasks' average, as in the paper's Table 1."""
    cells = {}
    for column in columns:
        own = [row.cells[column] for row in members if column in row.cells]
        if len(own) < len(members):
            continue  # an average over fewer tasks is another number
        before = [cell.before for cell in own if cell.before is not None]
        cells[column] = _mean_cell(own, _mean_cell(before) if len(before) == len(own) else None)
    return Row(family, f"average of {len(members)} tasks", "average", members[0].metric, cells)


def _mean_cell(cells: Sequence[Cell], before: Cell | None = None) -> Cell:
    seeds = set.intersection(*(set(cell.scores) for cell in cells))
    scores = {seed: float(np.mean([cell.scores[seed] for cell in cells])) for seed in sorted(seeds)}
    whole = all(len(cell.scores) == len(seeds) for cell in cells)
    error, careful = (
        math.sqrt(sum(each**2 for each in errors)) / len(cells)
        for errors in ([cell.error for cell in cells], [cell.careful for cell in cells])
    )
    mean = float(np.mean([cell.mean for cell in cells]))
    std = mean_and_std(list(scores.values()))[1] if whole else None
    return Cell(scores if whole else {}, mean, std, error, careful, cells[0].steps, cells[0].episodes, before)


def _entry(row: Row, cell: Cell | None, best: Cell) -> Entry:
    if cell is None:
        return Entry("")
    scale = _SCALE[row.metric]
    near = cell is not best and cell.near(best)
    # Of a negative best 95% would be a better number than the best.
    bold = cell.mean == best.mean or (best.mean > 0 and cell.mean >= BOLD_FROM * best.mean)
    text = f"{_numbers(cell, scale)} ({cell.error * scale:.1f}){NEAR if near else ''}"
    if cell.before is not None:
        text = f"{_numbers(cell.before, scale)} → {text}"
    seeds = ", ".join(f"seed {seed}: {score * scale:.1f}" for seed, score in cell.scores.items())
    return Entry(text, cell.mean, bold=bold, hint=seeds)


def _numbers(cell: Cell, scale: float) -> str:
    return f"{cell.mean * scale:.0f}" + ("" if cell.std is None else f"±{cell.std * scale:.0f}")


def _shown(row: Row, column: str) -> list[float]:
    return [score * _SCALE[row.metric] for score in row.cells[column].scores.values()]


def _range(low: float | None, high: float | None, digits: str) -> str:
    return "" if low is None or high is None else f"{low:{digits}} to {high:{digits}}"


def _pairs(first: Mapping[int, FinishedRun], second: Mapping[int, FinishedRun]) -> tuple[list[float], list[float]]:
    pairs: tuple[list[float], list[float]] = ([], [])
    for seed in sorted(set(first) & set(second)):
        records = [runs[seed].record for runs in (first, second)]
        outcomes = [record["evaluations"][record["acting"]] for record in records]
        if outcomes[0]["seeds"] == outcomes[1]["seeds"]:
            for episodes, record in zip(pairs, records, strict=True):
                episodes.extend(score_of(record, last=1).episodes)
    return pairs


def _episodes(scores: Mapping[int, Score]) -> list[float]:
    return [episode for score in scores.values() for episode in score.episodes]


def column_order(column: str) -> tuple[Any, ...]:
    """Sort key of columns: the paper's order of methods, with DeFlow last, then others by name; variants by their settings."""
    order = list(NAMES)
    algo = column.split(" ", maxsplit=1)[0]
    return (order.index(algo) if algo in order else len(order), algo, natural(column))
