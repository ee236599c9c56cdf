# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Tables of runs in the paper's layout: tasks by family down, methods across, mean±std over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deflow_torchrl.algorithms.registry import ALGORITHMS
from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.grids import Entry, Grid, grid_row, make_grid
from deflow_torchrl.reports.paper import family_of, method_order, paper_means, paper_methods, task_order
from deflow_torchrl.reports.records import METRICS
from deflow_torchrl.reports.runs import FinishedRun, as_setting, natural, score_of, standard_error
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
from deflow_torchrl.tasks import has_own_footing

BOLD_FROM = 0.95  # share of the row's best from which the paper prints a mean in bold
NEAR = "≈"
# What the methods of a row share in a fair comparison, and what records have that lack it.
_ALIKE = {
    "data": None, "offline_steps": 0, "online_steps": 0, "batch_size": None, "hidden_dims": None, "chunk": 1,
    "precision": "highest",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """The runs of a task and column.

    Attributes:
        scores: seed -> score, in the metric's unit.
        mean: over seeds.
        std: over seeds, by S - 1; None for one seed.
        error: standard error of the mean over all episodes.
        careful: the same for comparisons, see :func:`.statistics.careful_standard_error`.
        steps: the evaluations each score is the mean of.
        episodes: of one evaluation of one seed; fewest and most.
        starts: seed -> :attr:`.runs.Score.starts`; none of an average over tasks.
        runs: seed -> run; likewise.
        before: the cell at the end of the offline phase, for runs that went online.
    """

    scores: Mapping[int, float]
    mean: float
    std: float | None
    error: float
    careful: float
    steps: tuple[int, ...]
    episodes: tuple[int, int]
    starts: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    runs: Mapping[int, FinishedRun] = field(default_factory=dict)
    before: Cell | None = None

    def near(self, other: Cell) -> bool:
        """Whether noise alone explains the gap to the other mean: that of the episodes, or that of the seeds.

        The spread of the seeds contains the episodes' noise, but with few seeds it can come out smaller than that by chance.
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
        name: the task, or a description of the average.
        kind: ``task`` or ``average``.
        metric: ``success``, ``score`` or ``return``.
        cells: column -> cell; columns without a run are left out.
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

    @property
    def phase(self) -> str:
        """The kind of runs, as titles name it."""
        return "offline to online" if self.online else "offline"

    @property
    def reference(self) -> str | None:
        """The column that others are compared with: of the paper's own method, with the fewest settings; None without one."""
        own = [it for it in self.columns if column_name(it).partition(" (")[0] == paper_methods()[-1]]
        return min(own, key=lambda column: column_settings(column).count("="), default=None)


def make_tables(runs: Sequence[FinishedRun], *, last: int | None = None) -> list[Table]:
    """Make the table of the runs that stayed offline and that of the runs that went online, each where there are any.

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
        groups: dict[str, list[Row]] = {}
        for task in sorted({run.task for run in chosen}, key=task_order):
            own = [run for run in chosen if run.task == task]
            cells = {}
            for column in columns:
                if members := [run for run in own if run.column == column]:
                    began_offline = online and all(run.record["config"]["offline_steps"] > 0 for run in members)
                    before = make_cell(members, at="offline", last=last) if began_offline else None
                    cells[column] = replace(make_cell(members, last=last), before=before)
            row = Row(family_of(task), task, "task", own[0].record["metric"], cells)
            groups.setdefault(row.family, []).append(row)
        for family, rows in groups.items():
            if len(rows) > 1 and family != "other" and len({row.metric for row in rows}) == 1:
                rows.append(_average(rows))
        tables.append(Table(online, tuple(columns), tuple(itertools.chain(*groups.values()))))
    return tables


def make_cell(runs: Sequence[FinishedRun], *, at: str = "end", last: int | None = None) -> Cell:
    """Mean, deviation and standard error of runs that differ in their seeds only.

    Raises:
        InputError: if one has too few evaluations, or they are of other steps than another's.
    """
    scores = {run.seed: score_of(run.record, at=at, last=last) for run in sorted(runs, key=lambda run: run.seed)}
    values = {seed: score.value for seed, score in scores.items()}
    steps = {score.steps for score in scores.values()}
    if len(steps) > 1 and at != "best":
        shown = " and ".join(", ".join(map(str, one)) for one in sorted(steps))
        raise InputError(
            f"{runs[0].column} on {runs[0].task}: its seeds' scores are of evaluations at {shown}; --last 1 takes the last"
        )
    metric, episodes = runs[0].record["metric"], [it for score in scores.values() for it in score.episodes]
    error = careful = standard_error(metric, episodes)
    if metric == "success":
        careful = careful_standard_error(float(np.mean(episodes)), len(episodes))
    each = {len(score.episodes) // len(score.steps) for score in scores.values()}
    starts, by_seed = {seed: score.starts for seed, score in scores.items()}, {run.seed: run for run in runs}
    deviation = mean_and_std(list(values.values()))
    return Cell(values, *deviation, error, careful, min(steps), (min(each), max(each)), starts, by_seed)


def column_name(column: str) -> str:
    """Name a column as it is shown: by the method's title, and the settings it is run with.

    Examples:
        >>> column_name("fql"), column_name("deflow (fixed_alpha=0.3)"), column_name("mine")
        ('FQL', 'DeFlow (fixed_alpha=0.3)', 'mine')
    """
    algo, bracket, settings = column.partition(" (")
    return (ALGORITHMS[algo].title if algo in ALGORITHMS else algo) + bracket + settings


def column_settings(column: str) -> str:
    """The settings in a column's name; empty where it has none.

    Examples:
        >>> column_settings("deflow (fixed_alpha=0.3)"), column_settings("fql")
        ('fixed_alpha=0.3', '')
    """
    return column.partition(" (")[2].removesuffix(")")


def column_order(column: str) -> tuple[Any, ...]:
    """Sort key of columns: by :func:`.paper.method_order`; variants by their settings.

    Methods of other packages come behind these, names that this version does not know last.
    """
    algo, order = column.split(" ", maxsplit=1)[0], method_order()
    title = column_name(algo)
    place = order.index(title) if title in order else len(order) + (algo not in ALGORITHMS)
    return (place, algo, natural(column))


def split_variants(columns: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Part the columns of methods from those of their variants.

    Returns:
        The columns without variants, and for each method that has a column without settings beside columns with settings
        these columns. A method that has columns with settings only has no variants.
    """
    columns = list(columns)
    variants = {
        base: found
        for base in columns
        if not column_settings(base) and (found := [column for column in columns if column.startswith(f"{base} (")])
    }
    apart = set(itertools.chain(*variants.values()))
    return [column for column in columns if column not in apart], variants


def results_grid(table: Table) -> Grid:
    """Show the table: units, bold, what is inside the noise. Variants of a method have a table of their own."""
    columns, _ = split_variants(table.columns)
    return _results(table.phase.capitalize(), table, table.rows, columns, [column_name(column) for column in columns])


def variant_grids(table: Table) -> list[Grid]:
    """Show each method whose runs differ in a setting beside its usual runs: these and the variants, by value."""
    grids = []
    for base, variants in split_variants(table.columns)[1].items():
        headers = [column_name(base), *(column_settings(column).replace("=", " = ") for column in variants)]
        rows = [row for row in table.rows if any(column in row.cells for column in variants)]
        title = f"Variants of {column_name(base)}, {table.phase}"
        grids.append(_results(title, table, rows, [base, *variants], headers))
    return grids


def ranking_grid(table: Table) -> Grid | None:
    """Compare our order of the methods with the paper's, task by task; None where no task has two methods of the paper's.

    Methods with a footing of their own are compared in that alone: the paper's numbers of them are of it.
    """
    lines, left_out = [], dict[str, None]()
    for row in table.rows:
        theirs = paper_means(row.name, online=table.online) if row.kind == "task" else {}
        cells = {}
        for column in table.columns:
            title, settings = column_name(column.partition(" (")[0]), column_settings(column)
            own = has_own_footing(column.partition(" (")[0])
            if column not in row.cells or title not in theirs:
                continue
            if settings == ("footing=original" if own else ""):
                cells[title] = row.cells[column]
            elif not settings:
                left_out[title] = None
        if len(cells) < 2:
            continue
        ours = {title: cell.mean for title, cell in cells.items()}
        theirs = {title: theirs[title] for title in cells}
        tau = kendall_tau(list(ours.values()), list(theirs.values()))
        pairs = list(itertools.combinations(cells, 2))
        clear = [(one, other) for one, other in pairs if not cells[one].near(cells[other])]
        agreeing = sum((ours[one] - ours[other]) * (theirs[one] - theirs[other]) > 0 for one, other in clear)
        near = len(pairs) - len(clear)
        agreement = Entry("" if tau is None else f"{tau:+.2f}", tau)
        counts = (Entry(f"{near} of {len(pairs)}", near), Entry(f"{agreeing} of {len(clear)}", agreeing))
        lines.append(grid_row(row.name, _order(ours), _order(theirs), agreement, *counts))
    note = f". Left out, as the paper's numbers are of algo.footing=original: {', '.join(left_out)}" if left_out else ""
    return make_grid("ranking", lines, phase=table.phase, left_out=note) if lines else None


def aggregate_grid(table: Table) -> Grid | None:
    """Interquartile mean of each column, and how often the reference column beats it; None where nothing can be said.

    Tasks judged by return have no common scale and are left out.
    """
    rows = [row for row in table.rows if row.kind == "task" and row.metric != "return"]
    if not rows:
        return None
    reference, lines = table.reference, []

    def scores(column: str, beside: str) -> list[list[float]]:
        return [
            [score * METRICS[row.metric].scale for score in row.cells[column].scores.values()]
            for row in rows
            if column in row.cells and beside in row.cells
        ]

    for column in table.columns:
        mine = scores(column, column)
        if not mine:
            continue
        entries = [Entry(""), Entry("")]
        if len(set(map(len, mine))) == 1:  # else a task with more seeds would weigh more
            middle = stratified_bootstrap(mine)
            entries = [Entry(f"{middle.value:.1f}", middle.value), _range(middle.low, middle.high, ".1f")]
        if reference is not None:
            shared = [] if column == reference else scores(column, reference)
            if shared:
                odds = probability_of_improvement(scores(reference, column), shared)
                entries += [Entry(f"{odds.value:.2f}", odds.value), _range(odds.low, odds.high, ".2f")]
            else:
                entries += [Entry(""), Entry("")]
        lines.append(grid_row(column_name(column), len(mine), *entries))
    if reference is None:
        return make_grid("aggregate", lines, phase=table.phase)
    return make_grid("improvement", lines, phase=table.phase, name=column_name(reference))


def paired_grid(table: Table) -> Grid | None:
    """Differences on common starts, one by one, of the reference column to each other; None where there are none."""
    reference, lines = table.reference, []
    if reference is None:
        return None
    for row in table.rows:
        for column, cell in row.cells.items():
            pairs = _common_starts(cell, row.cells[reference]) if reference in row.cells else []
            if column == reference or not pairs:
                continue
            result, scale = paired_difference(*zip(*pairs, strict=True)), METRICS[row.metric].scale
            gap = Entry(f"{result.mean * scale:+.1f}", result.mean)
            interval = _range(result.low * scale, result.high * scale, "+.1f")
            lines.append(grid_row(row.name, column_name(column), gap, interval, result.pairs))
    units = dict.fromkeys(METRICS[row.metric].unit for row in table.rows)
    named = {"name": column_name(reference), "units": " or ".join(units), "phase": table.phase}
    return make_grid("paired", lines, **named) if lines else None


def time_grid(runs: Sequence[FinishedRun]) -> Grid:
    """Milliseconds a gradient step of each column, and the machine."""
    groups: dict[tuple[str, bool, str], list[float]] = {}
    for run in runs:
        config, hardware, stacked = run.record["config"], run.record["hardware"], run.record["stacked"]
        machine = f"{hardware['accelerator'] or hardware['cpu']}, {hardware['torch_threads']} thread(s)"
        machine += f", {len(stacked)} seeds in one process, time of all" if stacked else ""
        online_steps = max(config["online_steps"] - (config.get("warmup_steps") or 0), 0) * config.get("utd", 1.0)
        milliseconds = 1000 * run.record["time"].get("updates", math.nan) / (config["offline_steps"] + online_steps)
        groups.setdefault((run.column, run.online, machine), []).append(milliseconds)
    rows = []
    for (column, online, machine), each in sorted(groups.items(), key=lambda it: (column_order(it[0][0]), it[0][1:])):
        mean = float(np.mean(each))
        text = "" if math.isnan(mean) else f"{mean:.2f}" + (f"±{np.std(each, ddof=1):.2f}" if len(each) > 1 else "")
        rows.append(grid_row(_with_phase(column, online), machine, len(each), Entry(text, mean)))
    return make_grid("time", rows)


def _with_phase(column: str, online: bool) -> str:
    return column_name(column) + (", offline to online" if online else "")


def cost_grid(runs: Sequence[FinishedRun]) -> Grid | None:
    """Minutes of processor time of each column's runs; None where no record has it, as those of earlier versions."""
    groups: dict[tuple[str, bool], list[float]] = {}
    for run in runs:
        if (seconds := run.record["time"].get("cpu")) is not None:
            minutes = seconds / 60 / len(run.record["stacked"] or [run.seed])
            groups.setdefault((run.column, run.online), []).append(minutes)
    rows = []
    for (column, online), each in sorted(groups.items(), key=lambda item: (column_order(item[0][0]), item[0][1])):
        mean, std = mean_and_std(each)
        text = f"{mean:.1f}" + ("" if std is None else f"±{std:.1f}")
        rows.append(grid_row(_with_phase(column, online), len(each), Entry(text, mean)))
    return make_grid("cost", rows) if rows else None


def untuned_note(runs: Sequence[FinishedRun]) -> str | None:
    """Name the settings for which nobody published a value on the runs' tasks; None where there are none."""
    named: dict[str, dict[str, None]] = {}
    for run in sorted(runs, key=lambda run: column_order(run.column)):
        if names := run.record.get("untuned"):
            named.setdefault(column_name(run.record["algo"]), {}).update(dict.fromkeys(names))
    listed = "; ".join(f"{method}: {', '.join(names)}" for method, names in named.items())
    return f"Untuned: nobody published a value for these tasks of {listed}." if named else None


def unlike_notes(runs: Sequence[FinishedRun]) -> list[str]:
    """A line for each task on which the methods' runs differ in what a comparison takes to be alike (data, steps, networks)."""
    groups: dict[tuple[str, bool], dict[str, list[Mapping[str, Any]]]] = {}
    for run in sorted(runs, key=lambda run: column_order(run.column)):
        method = column_name(run.record["algo"])
        groups.setdefault((run.task, run.online), {}).setdefault(method, []).append(run.record)
    lines = []
    for (task, _), methods in groups.items():
        unlike = []
        for name in _ALIKE:
            values = {
                method: sorted({common_settings(it)[name] for it in records}) for method, records in methods.items()
            }
            if any(each != next(iter(values.values())) for each in values.values()):
                unlike.append(f"{name} " + ", ".join(f"{' and '.join(each)} of {it}" for it, each in values.items()))
        lines += [f"Not alike on {task}: {'; '.join(unlike)}."] if unlike else []
    return lines


def common_settings(record: Mapping[str, Any]) -> dict[str, str]:
    """What runs of one task must have alike for a comparison: data, steps, batch, networks, chunks, precision; as texts."""
    settings = {name: as_setting(record["config"].get(name, usual)) for name, usual in _ALIKE.items()}
    return settings | {"data": (record["data"]["sha256"] or "unknown")[:8]}


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
        config, episodes = record["config"], record["evaluations"][record["acting"]]["episodes"]
        scores = [score_of(record, at=at) for at in ("offline", "best", "end")]
        before, best, end = (score.value for score in scores)
        shown = [f"{rate:.2f} +- {success_standard_error(rate, episodes):.2f}" for rate in (before, best, end)]
        lines.append(
            f"| {'frozen' if config['freeze_prior'] else 'full'} | {config['seed']} | {config['offline_steps']} | {shown[0]} "
            f"| {shown[1]} ({scores[1].steps[0] - config['offline_steps']}) | {shown[2]} ({config['online_steps']}) "
            f"| {best - before:+.2f} | {end - before:+.2f} |"
        )
    return lines


def _average(members: Sequence[Row]) -> Row:
    """Means over a family's tasks; the deviation is over seeds of the tasks' average, as in the paper's Table 1."""
    cells = {}
    for column in dict.fromkeys(column for row in members for column in row.cells):
        own = [row.cells[column] for row in members if column in row.cells]
        if len(own) == len(members):  # an average over fewer tasks is another number
            before = [cell.before for cell in own if cell.before is not None]
            cells[column] = replace(_mean_cell(own), before=_mean_cell(before) if len(before) == len(own) else None)
    return Row(members[0].family, f"average of {len(members)} tasks", "average", members[0].metric, cells)


def _mean_cell(cells: Sequence[Cell]) -> Cell:
    scores: dict[int, float] = {}
    std = None
    if len({frozenset(cell.scores) for cell in cells}) == 1:
        scores = {seed: float(np.mean([cell.scores[seed] for cell in cells])) for seed in sorted(cells[0].scores)}
        std = mean_and_std(list(scores.values()))[1]
    error, careful = (
        math.sqrt(sum(each**2 for each in errors)) / len(cells)
        for errors in ([cell.error for cell in cells], [cell.careful for cell in cells])
    )
    mean = float(np.mean([cell.mean for cell in cells]))
    return Cell(scores, mean, std, error, careful, cells[0].steps, cells[0].episodes)


def _results(title: str, table: Table, rows: Sequence[Row], columns: Sequence[str], headers: Sequence[str]) -> Grid:
    rows = [row for row in rows if any(column in row.cells for column in columns)]
    units = dict.fromkeys(METRICS[row.metric].unit for row in rows)
    lines = []
    for row in rows:
        best = max((row.cells[column] for column in columns if column in row.cells), key=lambda cell: cell.mean)
        entries = [_entry(row, row.cells[column], best) if column in row.cells else Entry("") for column in columns]
        name = f"{row.name} ({METRICS[row.metric].unit})" if len(units) > 1 else row.name
        lines.append(grid_row(row.family, name, *entries, kind=row.kind))
    return make_grid(
        "results",
        lines,
        columns=headers,
        title=title,
        arrow="end of the offline phase → end of the run; " if table.online else "",
        units=" or ".join(units),
        seeds=_number_of_seeds(rows, columns),
        bold=BOLD_FROM,
        near=NEAR,
        evaluations=_evaluations(rows, columns),
    )


def _entry(row: Row, cell: Cell, best: Cell) -> Entry:
    scale = METRICS[row.metric].scale

    def numbers(cell: Cell) -> str:
        return f"{cell.mean * scale:.0f}" + ("" if cell.std is None else f"±{cell.std * scale:.0f}")

    # Of a negative best 95% would be a better number than the best.
    bold = cell.mean == best.mean or (best.mean > 0 and cell.mean >= BOLD_FROM * best.mean)
    before = "" if cell.before is None else f"{numbers(cell.before)} → "
    near = NEAR if cell is not best and cell.near(best) else ""
    seeds = ", ".join(f"seed {seed}: {score * scale:.1f}" for seed, score in cell.scores.items())
    return Entry(f"{before}{numbers(cell)} ({cell.error * scale:.1f}){near}", cell.mean, bold=bold, hint=seeds)


def _number_of_seeds(rows: Sequence[Row], columns: Sequence[str]) -> str:
    numbers = {len(row.cells[column].scores) for row in rows for column in columns if column in row.cells}
    text = " to ".join(map(str, sorted({min(numbers), max(numbers)})))
    return f"{text} seed{'' if text == '1' else 's'}"


def _evaluations(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Which evaluations, and how many episodes, are in the cells."""

    def evaluations(cell: Cell) -> str:
        steps = ", ".join(f"{step:,}" for step in cell.steps)
        return f"the evaluation at step {steps}" if len(cell.steps) == 1 else f"the mean of those at steps {steps}"

    groups: dict[str, dict[str, list[str]]] = {}
    for row, column in itertools.product(rows, columns):
        if row.kind == "task" and column in row.cells:
            cell = row.cells[column]
            before = "" if cell.before is None else f"{evaluations(cell.before)}, then "
            number = " to ".join(map(str, dict.fromkeys(cell.episodes)))
            contents = f"{before}{evaluations(cell)}, of {number} episodes each"
            groups.setdefault(contents, {}).setdefault(row.name, []).append(column_name(column))
    if len(groups) == 1:
        return next(iter(groups))
    words = []
    for contents, tasks in groups.items():
        places = "; ".join(f"{', '.join(names)} on {task}" for task, names in tasks.items())
        words.append(f"{contents} ({places})")
    return "; ".join(words)


def _order(means: Mapping[str, float]) -> str:
    """Methods from best to worst, level ones joined by =."""
    titles = sorted(means, key=lambda title: -means[title])
    text = titles[0]
    for one, other in itertools.pairwise(titles):
        text += f" {'=' if means[one] == means[other] else '>'} {other}"
    return text


def _range(low: float | None, high: float | None, digits: str) -> Entry:
    return Entry("" if low is None or high is None else f"{low:{digits}} to {high:{digits}}")


def _common_starts(first: Cell, second: Cell) -> list[tuple[float, float]]:
    """Outcomes of the starts that two methods share, seed by seed."""
    pairs = []
    for seed in sorted(first.starts.keys() & second.starts.keys()):
        one, other = first.starts[seed], second.starts[seed]
        if one.keys() == other.keys():
            pairs += [(one[start], other[start]) for start in one]
    return pairs
