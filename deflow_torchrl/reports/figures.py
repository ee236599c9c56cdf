# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Figures of runs, drawn from their rows of metrics and evaluations, and of action landscapes (Figure 2)."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deflow_torchrl.algorithms.panels import Panel
from deflow_torchrl.errors import MissingExtraError
from deflow_torchrl.paths import atomic_write
from deflow_torchrl.reports.records import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")  # of a landscape
_POINTS_WITH_MARKERS = 30
_POINTS_WITH_BARS = 4
_ARROWS = 64
# Okabe and Ito's colours, which colour-blind readers tell apart, each with a marker of its own; Q behind them is grey.
_STYLES: dict[str, dict[str, Any]] = {
    "data": {"marker": "x", "color": "black", "s": 26, "linewidths": 1.2, "zorder": 6},
    "base": {"marker": "o", "facecolors": "#F0E442", "edgecolors": "black", "s": 13, "linewidths": 0.4, "zorder": 3},
    "policy": {"marker": "^", "facecolors": "#D55E00", "edgecolors": "white", "s": 15, "linewidths": 0.3, "zorder": 5},
    "second": {"marker": "s", "facecolors": "#0072B2", "edgecolors": "white", "s": 13, "linewidths": 0.3, "zorder": 4},
}


DIAGNOSTICS = tuple(
    Panel(**row) for row in json.loads(resources.files(__package__).joinpath("panels.json").read_text(encoding="utf-8"))
)
"""The panels of every run, drawn where its rows have their columns."""


def check_report_extra(*modules: str) -> None:
    """Raise MissingExtraError unless ``modules`` are installed; by default matplotlib and jinja2.

    Called before hours of training or evaluation, not after.
    """
    for module in modules or ("matplotlib", "jinja2"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "reports")


def plot_learning_curve(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    final: Mapping[str, float],
    metric: str = "success",
    target_divergence: float | None = None,
) -> Path:
    """Draw a run's curves as one PNG: outcome, flow and critic losses, divergence and alpha.

    Args:
        rows: rows of ``metrics.jsonl``; a vertical line stands where their phase changes from offline to online.
        path: PNG to write, beside and renamed.

    Keyword Args:
        title: the figure's title.
        final: policy name -> outcome of the final evaluation, drawn as horizontal lines.
        metric: what the outcome is: ``success``, ``score`` or ``return``.
        target_divergence: delta, drawn as a horizontal line.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    figure = _learning_curve(rows, final, metric, target_divergence, columns=3)
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def draw_learning_curve(
    rows: Sequence[Mapping[str, Any]],
    *,
    final: Mapping[str, float],
    metric: str,
    target_divergence: float | None = None,
    columns: int = 3,
) -> bytes:
    """The panels of :func:`plot_learning_curve` in so many columns as a PNG: in one column for a narrow screen.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    return _png(_learning_curve(rows, final, metric, target_divergence, columns=columns))


def _learning_curve(
    rows: Sequence[Mapping[str, Any]],
    final: Mapping[str, float],
    metric: str,
    target_divergence: float | None,
    *,
    columns: int,
) -> Figure:
    outcome = Panel(METRICS[metric].title, "", {f"eval/{metric}": ""}, METRICS[metric].axis)
    delta = None if target_divergence is None else ("delta", target_divergence)
    divergence = {"train/divergence": "divergence"}
    panels = [
        outcome,
        Panel("flow loss", "", {"train/loss_flow": "flow loss"}, "mean squared velocity error"),
        Panel("critic loss", "", {"train/loss_qvalue": "critic loss"}, "mean squared TD error", True),
        Panel("divergence D against delta", "", divergence, "mean squared shift per dimension", True, delta),
        Panel("multiplier alpha", "", {"train/alpha": "multiplier alpha"}, "alpha", True),
    ]
    panels = [it for it in panels if (it is outcome and final) or any(it.name in row for row in rows)] or [outcome]
    columns = min(len(panels), columns)
    lines = math.ceil(len(panels) / columns)
    figure, axes = _figure((4.2 * columns, 3.6 * lines), lines, columns)
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, rows, panel)
        axis.set(title=panel.title)
        if panel is outcome:
            if metric == "success":
                axis.set_ylim(-0.03, 1.03)
            for number, (policy, rate) in enumerate(final.items()):
                axis.axhline(rate, linestyle="--", color=f"C{number + 1}", label=f"{policy}: {rate:.4g} at the end")
        shown = [line for line in axis.lines if line.get_linestyle() in ("--", ":")]
        if shown:
            axis.legend(handles=shown, loc="best", fontsize="small")
    return figure


def draw_diagnostics(rows: Sequence[Mapping[str, Any]], own: Sequence[Panel] = ()) -> list[tuple[Panel, bytes]]:
    """Draw each panel that the rows have columns of, as a PNG.

    Args:
        rows: rows of ``metrics.jsonl``.
        own: panels of the run's method (``Algorithm.panels``), drawn after :data:`DIAGNOSTICS`.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    drawn = []
    for diagnostic in (*DIAGNOSTICS, *own):
        if any(name in row for row in rows for name in diagnostic.curves):
            figure, (axis,) = _figure((5.0, 3.2))
            _draw(axis, rows, diagnostic)
            if len(diagnostic.curves) > 1 or diagnostic.level is not None:
                axis.legend(loc="best", fontsize="small")
            drawn.append((diagnostic, _png(figure)))
    return drawn


def draw_outcomes(
    curves: Mapping[str, Sequence[tuple[int, float, float, float]]],
    *,
    metric: str,
    colours: Mapping[str, Any],
    boundary: int | None = None,
) -> bytes:
    """Draw the outcomes of several methods on one task with their intervals, as a PNG.

    Args:
        curves: label -> ``(step, mean, low, high)`` of each evaluation.

    Keyword Args:
        metric: ``success``, ``score`` or ``return``.
        colours: label -> colour, as matplotlib takes them.
        boundary: last offline step of runs that went online.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    figure, (axis,) = _figure((5.0, 3.9))
    # Bands of few evaluations would lie over each other: bars a little apart instead.
    width = max(points[-1][0] for points in curves.values()) / 150
    for number, (label, points) in enumerate(curves.items()):
        steps, means, lows, highs = zip(*points, strict=True)
        axis.plot(steps, means, marker="o", markersize=4, label=label, color=colours[label])
        if len(steps) < _POINTS_WITH_BARS:
            places = [step + width * (number - (len(curves) - 1) / 2) for step in steps]
            axis.vlines(places, lows, highs, color=colours[label], linewidth=1.5, alpha=0.8)
        else:
            axis.fill_between(steps, lows, highs, color=colours[label], alpha=0.2, linewidth=0)
    if metric == "success":
        axis.set_ylim(-0.03, 1.03)
    _label(axis, METRICS[metric].title, boundary, online=boundary is not None)
    return _png(figure, axis)


def draw_diagnostic_of_runs(
    diagnostic: Panel, runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], *, colours: Mapping[str, Any]
) -> bytes | None:
    """Draw a diagnostic's first curve, a line a run and a colour a label, as a PNG; None where no run has it.

    Args:
        diagnostic: one of :data:`DIAGNOSTICS`.
        runs: label -> rows of each of its runs.

    Keyword Args:
        colours: label -> colour, as matplotlib takes them.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    name, everything = diagnostic.name, [rows for group in runs.values() for rows in group]
    if not any(name in row for rows in everything for row in rows):
        return None
    figure, (axis,) = _figure((5.0, 3.9))
    for label, group in runs.items():
        for rows in group:
            if points := [(row["step"], row[name]) for row in rows if name in row]:
                axis.plot(*zip(*points, strict=True), color=colours[label], linewidth=1, label=label)
    _finish(axis, diagnostic, [row.get(name, 1.0) for rows in everything for row in rows])
    boundary = next(filter(None, map(online_boundary, everything)), None)
    _label(axis, diagnostic.unit, boundary, online=any(map(_is_online, everything)))
    return _png(figure, axis)


def colours_of(labels: Sequence[str], order: Sequence[str]) -> dict[str, Any]:
    """Give labels in ``order`` the same colour in every figure, and the others colours of a scale from light to dark.

    Args:
        labels: of the figure; those not in ``order`` are sorted by the setting that the scale shows.
        order: labels with a colour of their own, at most twenty.
    """
    from matplotlib import colormaps

    scale, own = colormaps["YlOrRd"], colormaps["tab10" if len(order) <= 10 else "tab20"]
    others = [label for label in labels if label not in order]
    colours: dict[str, Any] = {label: own(order.index(label) % own.N) for label in labels if label in order}
    return colours | {label: scale(0.3 + 0.7 * place / max(len(others) - 1, 1)) for place, label in enumerate(others)}


def online_boundary(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The last offline step of a run that went online; None for a run without both phases."""
    return (
        max((row["step"] for row in rows if row.get("phase") == "offline"), default=None) if _is_online(rows) else None
    )


@dataclass(frozen=True, eq=False)
class Points:
    """Actions as a landscape shows them.

    Attributes:
        role: ``data``, ``base``, ``policy`` or ``second``.
        label: their name in the legend.
        coordinates: on the slice, ``[n, 2]``, in action units.
    """

    role: str
    label: str
    coordinates: np.ndarray


def plot_landscape(
    path: Path,
    *,
    title: str,
    labels: tuple[str, str],
    grid: tuple[np.ndarray, np.ndarray],
    qvalues: np.ndarray,
    points: Sequence[Points],
    arrows: tuple[np.ndarray, np.ndarray] | None = None,
) -> Path:
    """Draw Q over a slice of actions with samples on top.

    Args:
        path: ``.png`` or ``.svg`` to write, beside and renamed.

    Keyword Args:
        title: the figure's title.
        labels: of the two axes, with their unit.
        grid: coordinates of the grid's columns ``[W]`` and rows ``[H]``.
        qvalues: Q on the grid ``[H, W]``; NaN where the slice has left the action space, which stays white.
        points: the samples.
        arrows: starts and ends ``[n, 2]`` of the refinement's arrows, of which 64 evenly spaced ones are drawn.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    figure, (axis,) = _figure((6.4, 6.4))
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    # Greys of medium lightness, in which neither black crosses nor white edges vanish.
    greys = LinearSegmentedColormap.from_list("greys", ["#707070", "#f2f2f2"])
    shown = np.ma.masked_invalid(qvalues)
    filled: Any
    if shown.max() > shown.min():
        filled = axis.contourf(*grid, shown, levels=24, cmap=greys)
        axis.contour(*grid, shown, levels=8, colors="#555555", linewidths=0.5, linestyles="solid")
    else:  # a constant Q has no contours
        filled = axis.pcolormesh(*grid, shown, cmap=greys, shading="nearest")
    figure.colorbar(filled, ax=axis, label="Q (mean of the critics)", shrink=0.8)
    if arrows is not None and len(arrows[0]):
        rows = np.linspace(0, len(arrows[0]) - 1, min(len(arrows[0]), _ARROWS)).round().astype(int)
        starts, shifts = arrows[0][rows], (arrows[1] - arrows[0])[rows]
        axis.quiver(
            *starts.T, *shifts.T, angles="xy", scale_units="xy", scale=1, width=0.003, color="#8B3A00", zorder=5.5
        )
    for group in points:
        axis.scatter(*group.coordinates.T, label=group.label, **_STYLES[group.role])
    axis.set(title=title, xlabel=labels[0], ylabel=labels[1], xlim=grid[0][[0, -1]], ylim=grid[1][[0, -1]])
    axis.set_aspect("equal")
    figure.legend(loc="outside lower center", fontsize="small", framealpha=1.0)
    # The same numbers give the same file: no dates, and no random names of the SVG's parts.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "deflow"}), atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=130, metadata=metadata)
    return path


def _figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    check_report_extra()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _draw(axis: Axes, rows: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    """Draw a panel's curves over the rows' steps, with the boundary between the phases."""
    for name, label in panel.curves.items():
        if points := [(row["step"], row[name]) for row in rows if name in row]:
            marker = "o" if len(points) < _POINTS_WITH_MARKERS else None
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label)
    _label(axis, panel.unit, online_boundary(rows), online=_is_online(rows))
    _finish(axis, panel, [row.get(name, 1.0) for row in rows for name in panel.curves])


def _finish(axis: Axes, panel: Panel, values: Iterable[float]) -> None:
    if panel.level is not None:
        axis.axhline(panel.level[1], linestyle=":", color="black", label=panel.level[0])
    if panel.logarithmic and min(values, default=1.0) > 0:
        axis.set_yscale("log")


def _label(axis: Axes, unit: str, boundary: int | None, *, online: bool) -> None:
    if boundary is not None:
        axis.axvline(boundary, color="grey", linewidth=1)
        axis.annotate("online", (boundary, 0.98), (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="top", fontsize="x-small", color="grey")  # fmt: skip
    steps = "gradient steps offline, then environment steps" if online else "gradient steps"
    axis.set(xlabel=steps, ylabel=unit)
    axis.grid(alpha=0.3)


def _is_online(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any(row.get("phase") == "online" for row in rows)


def _png(figure: Figure, legend_of: Axes | None = None) -> bytes:
    """The figure as a PNG, with the axis' legend below it."""
    if legend_of is not None:
        named = {str(line.get_label()): line for line in legend_of.lines if not str(line.get_label()).startswith("_")}
        columns = min(len(named), 3 if max(map(len, named)) < 20 else 2)
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", ncols=columns, fontsize="small", frameon=False
        )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()
