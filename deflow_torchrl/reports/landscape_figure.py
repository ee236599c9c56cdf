# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The picture of an action landscape (Figure 2): Q over a slice of actions, and where samples lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.paths import atomic_write
from deflow_torchrl.reports.extra import check_report_extra

FORMATS = (".png", ".svg")
# Okabe and Ito's colours, which colour-blind readers tell apart, each with a marker of its own; Q behind them is grey.
_STYLES: dict[str, dict[str, Any]] = {
    "data": {"marker": "x", "color": "black", "s": 26, "linewidths": 1.2, "zorder": 6},
    "base": {"marker": "o", "facecolors": "#F0E442", "edgecolors": "black", "s": 13, "linewidths": 0.4, "zorder": 3},
    "policy": {"marker": "^", "facecolors": "#D55E00", "edgecolors": "white", "s": 15, "linewidths": 0.3, "zorder": 5},
    "second": {"marker": "s", "facecolors": "#0072B2", "edgecolors": "white", "s": 13, "linewidths": 0.3, "zorder": 4},
}
_ARROWS = 64


@dataclass(frozen=True, eq=False)
class Points:
    """Actions as they are drawn.

    Attributes:
        role: ``data``, ``base``, ``policy`` or ``second``.
        label: the legend's words.
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
        arrows: starts and ends ``[n, 2]`` of the refinement's arrows; every so many are drawn, 64 at most.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    check_report_extra()
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axis = figure.subplots()
    # The middle of the greys: neither black crosses nor white edges vanish in them.
    greys = LinearSegmentedColormap.from_list("greys", ["#707070", "#f2f2f2"])
    shown = np.ma.masked_invalid(qvalues)
    spread = float(shown.max() - shown.min())
    filled: Any
    if spread > 0:
        filled = axis.contourf(*grid, shown, levels=24, cmap=greys)
        axis.contour(*grid, shown, levels=8, colors="#555555", linewidths=0.5, linestyles="solid")
    else:  # a critic that knows no difference has no contours
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
    # The same numbers give the same file: no dates, and names of SVG's parts that are no random numbers.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "deflow"}), atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=130, metadata=metadata)
    return path
