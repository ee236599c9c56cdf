# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Figures of a run, drawn from its rows of metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deflow_torchrl.paths import atomic_write
from deflow_torchrl.reports.extra import check_report_extra

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
        rows: rows of ``metrics.jsonl``.
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
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=4)
        axis.set(title=heading, xlabel="gradient steps", ylabel=unit)
        axis.grid(alpha=0.3)
        if name == outcome[0]:
            if metric == "success":
                axis.set_ylim(-0.03, 1.03)
            for number, (policy, rate) in enumerate(final.items()):
                axis.axhline(rate, linestyle="--", color=f"C{number + 1}", label=f"{policy}: {rate:.4g} at the end")
            if final:
                axis.legend(loc="best", fontsize="small")
        elif name == "train/divergence":
            axis.set_yscale("log")
            if target_divergence is not None:
                axis.axhline(target_divergence, linestyle=":", color="black", label="delta")
                axis.legend(loc="best", fontsize="small")
        elif name in ("train/alpha", "train/loss_qvalue"):
            axis.set_yscale("log")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path
