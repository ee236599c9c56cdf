# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Figures of a run, drawn from its rows of metrics."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deflow_torchrl.paths import atomic_write
from deflow_torchrl.reports.extra import check_report_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OUTCOMES = {
    "success": ("eval/success", "success rate", "fraction of evaluation episodes"),
    "score": ("eval/score", "normalised score", "0: random, 100: expert"),
    "return": ("eval/return", "return", "sum of rewards of an episode"),
}
_PANELS = (
    ("train/loss_flow", "flow loss", "mean squared velocity error"),
    ("train/loss_qvalue", "critic loss", "mean squared TD error"),
    ("train/divergence", "divergence D against delta", "mean squared shift per dimension"),
    ("train/alpha", "multiplier alpha", "alpha"),
)
_POINTS_WITH_MARKERS = 30
_POINTS_WITH_BARS = 4


@dataclass(frozen=True)
class Diagnostic:
    """A panel of the run's page.

    Attributes:
        title: heading.
        reading: how to read it, in one sentence.
        curves: column of the rows -> label.
        unit: of the vertical axis.
        logarithmic: whether that axis is.
        level: label and value of a horizontal line.
    """

    title: str
    reading: str
    curves: Mapping[str, str]
    unit: str
    logarithmic: bool = False
    level: tuple[str, float] | None = None


DIAGNOSTICS = (
    Diagnostic(
        "divergence over delta",
        "How far the refinement shifts the prior's actions, squared, in units of the allowed delta: it should settle near 1; "
        "above, the trust region does not hold (yet), far below, the critics see nothing to gain.",
        {"train/divergence_ratio": "D / delta"},
        "D / delta",
        logarithmic=True,
        level=("delta", 1.0),
    ),
    Diagnostic(
        "multiplier alpha",
        "The price of shifting an action: it rises while the divergence exceeds delta, falls while it does not, and should "
        "level off.",
        {"train/alpha": "alpha"},
        "alpha",
        logarithmic=True,
    ),
    Diagnostic(
        "action dimensions at a bound",
        "Share of the refined actions' dimensions that are clipped: it should stay near the data's own share; one that climbs "
        "towards 1 means the refinement runs into the corners of the action space.",
        {"train/saturation": "refined", "train/saturation_data": "data"},
        "share",
    ),
    Diagnostic(
        "Q of base and of refined actions",
        "What the critics promise for the prior's actions and for the refined ones: refined should lie a little above base; "
        "a gap that keeps growing, or values no return can reach, means that the critics' errors are being exploited.",
        {"train/q_base": "base action", "train/q_refined": "refined action"},
        "mean Q",
    ),
    Diagnostic(
        "TD error",
        "How far the critics are from their own targets: small against the scale of Q, it should level off; a jump where the "
        "online phase begins is experience they had not seen, and should come down again.",
        {"train/td_error": "|TD error|"},
        "mean of the largest |TD error|",
        logarithmic=True,
    ),
    Diagnostic(
        "distance to the data's actions",
        "Root-mean-square difference per dimension to the nearest action that the data took in like states: the refined curve "
        "should stay within about sqrt(delta) of the base curve; a widening gap means that it leaves what the data knows.",
        {"train/action_distance": "refined action", "train/action_distance_base": "base action"},
        "action units",
    ),
    Diagnostic(
        "share of online data",
        "Share of a batch that is the run's own experience: with uniform mixing it grows with the experience, with balanced "
        "mixing it stands still.",
        {"train/online_share": "online"},
        "share of the batch",
    ),
    Diagnostic(
        "episodes while learning",
        "Mean return of the online episodes that ended since the row before: what the acting policy earned while it learned, "
        "noisier than an evaluation.",
        {"online/return": "return"},
        "sum of rewards",
    ),
)


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
    check_report_extra()
    from matplotlib.figure import Figure

    outcome = _OUTCOMES[metric]
    panels = [
        panel for panel in (outcome, *_PANELS) if (panel is outcome and final) or any(panel[0] in row for row in rows)
    ]
    columns = min(len(panels), 3)
    rows_of_panels = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows_of_panels), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows_of_panels, columns, squeeze=False).flatten()
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    for axis, (name, heading, unit) in zip(axes, panels, strict=False):
        _draw(axis, rows, {name: heading}, unit=unit)
        axis.set(title=heading)
        if name == outcome[0]:
            if metric == "success":
                axis.set_ylim(-0.03, 1.03)
            for number, (policy, rate) in enumerate(final.items()):
                axis.axhline(rate, linestyle="--", color=f"C{number + 1}", label=f"{policy}: {rate:.4g} at the end")
            if final:
                axis.legend(
                    handles=[line for line in axis.lines if "at the end" in str(line.get_label())],
                    loc="best",
                    fontsize="small",
                )
        elif name == "train/divergence":
            axis.set_yscale("log")
            if target_divergence is not None:
                axis.legend(
                    handles=[axis.axhline(target_divergence, linestyle=":", color="black", label="delta")],
                    loc="best",
                    fontsize="small",
                )
        elif name in ("train/alpha", "train/loss_qvalue"):
            axis.set_yscale("log")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def draw_diagnostics(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Diagnostic, bytes]]:
    """Draw each diagnostic that the rows have, as a PNG.

    Args:
        rows: rows of ``metrics.jsonl``.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    check_report_extra()
    from matplotlib.figure import Figure

    drawn = []
    for diagnostic in DIAGNOSTICS:
        if not any(name in row for row in rows for name in diagnostic.curves):
            continue
        figure = Figure(figsize=(5.0, 3.2), layout="constrained")
        axis = figure.subplots()
        _draw(axis, rows, diagnostic.curves, unit=diagnostic.unit)
        if diagnostic.level is not None:
            label, value = diagnostic.level
            axis.axhline(value, linestyle=":", color="black", label=label)
        if diagnostic.logarithmic and all(row.get(name, 1.0) > 0 for row in rows for name in diagnostic.curves):
            axis.set_yscale("log")
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
    check_report_extra()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.9), layout="constrained")
    axis = figure.subplots()
    # Bands of few evaluations lie over each other: their ends are marked a little apart.
    width = max(points[-1][0] for points in curves.values()) / 150
    for number, (label, points) in enumerate(curves.items()):
        steps, means, lows, highs = zip(*points, strict=True)
        (line,) = axis.plot(steps, means, marker="o", markersize=4, label=label, color=colours[label])
        if len(steps) < _POINTS_WITH_BARS:
            places = [step + width * (number - (len(curves) - 1) / 2) for step in steps]
            axis.vlines(places, lows, highs, color=line.get_color(), linewidth=1.5, alpha=0.8)
        else:
            axis.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.2, linewidth=0)
    _, heading, _ = _OUTCOMES[metric]
    if metric == "success":
        axis.set_ylim(-0.03, 1.03)
    _mark_boundary(axis, boundary)
    axis.set(xlabel=_steps(boundary is not None), ylabel=heading)
    axis.grid(alpha=0.3)
    _legend_below(figure, {str(line.get_label()): line for line in axis.lines if line.get_label() in curves})
    return _png(figure)


def draw_diagnostic_of_runs(
    diagnostic: Diagnostic, runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], *, colours: Mapping[str, Any]
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
    check_report_extra()
    from matplotlib.figure import Figure

    name = next(iter(diagnostic.curves))
    if not any(name in row for group in runs.values() for rows in group for row in rows):
        return None
    figure = Figure(figsize=(5.0, 3.9), layout="constrained")
    axis = figure.subplots()
    positive = True
    for label, group in runs.items():
        for rows in group:
            points = [(row["step"], row[name]) for row in rows if name in row]
            positive &= all(value > 0 for _, value in points)
            if points:
                axis.plot(*zip(*points, strict=True), color=colours[label], linewidth=1, label=label)
    if diagnostic.level is not None:
        axis.axhline(diagnostic.level[1], linestyle=":", color="black", label=diagnostic.level[0])
    if diagnostic.logarithmic and positive:
        axis.set_yscale("log")
    everything = [rows for group in runs.values() for rows in group]
    _mark_boundary(axis, next(filter(None, map(online_boundary, everything)), None))
    online = any(row.get("phase") == "online" for rows in everything for row in rows)
    axis.set(xlabel=_steps(online), ylabel=diagnostic.unit)
    axis.grid(alpha=0.3)
    named = {str(line.get_label()): line for line in axis.lines if not str(line.get_label()).startswith("_")}
    _legend_below(figure, named)
    return _png(figure)


def colours_of(labels: Sequence[str], order: Sequence[str]) -> dict[str, Any]:
    """A colour for each label: one of its own in every figure where it is in ``order``; others share a scale from light to dark.

    Args:
        labels: of the figure, those out of ``order`` sorted by what the scale shows.
        order: labels that keep their colour, at most ten.
    """
    from matplotlib import colormaps

    scale = colormaps["YlOrRd"]
    others = [label for label in labels if label not in order]
    colours: dict[str, Any] = {label: f"C{order.index(label)}" for label in labels if label in order}
    return colours | {label: scale(0.3 + 0.7 * place / max(len(others) - 1, 1)) for place, label in enumerate(others)}


def _legend_below(figure: Figure, lines: Mapping[str, Any]) -> None:
    columns = min(len(lines), 3 if max(map(len, lines)) < 20 else 2)
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize="small", frameon=False
    )


def online_boundary(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The last offline step of a run that went online; None where it did not, or began online."""
    if not any(row.get("phase") == "online" for row in rows):
        return None
    return max((row["step"] for row in rows if row.get("phase") == "offline"), default=None)


def _draw(axis: Axes, rows: Sequence[Mapping[str, Any]], curves: Mapping[str, str], *, unit: str) -> None:
    """Draw columns of the rows over their steps, with the boundary between the phases."""
    for name, label in curves.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            marker = "o" if len(points) < _POINTS_WITH_MARKERS else None
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=label)
    _mark_boundary(axis, online_boundary(rows))
    axis.set(xlabel=_steps(any(row.get("phase") == "online" for row in rows)), ylabel=unit)
    axis.grid(alpha=0.3)


def _mark_boundary(axis: Axes, boundary: int | None) -> None:
    if boundary is not None:
        axis.axvline(boundary, color="grey", linewidth=1)
        axis.annotate("online", (boundary, 0.98), (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                      va="top", fontsize="x-small", color="grey")  # fmt: skip


def _steps(online: bool) -> str:
    return "gradient steps offline, then environment steps" if online else "gradient steps"


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()
