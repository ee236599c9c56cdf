# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Alarms that a method describes: what in the rows of metrics says that a run is going wrong, and what to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class SeenRows(Protocol):
    """The rows of metrics so far, as an :class:`AlarmRule` sees them; ``NAME`` stands for ``train/NAME``.

    Attributes:
        gamma: the discount.
        reward_bound: max|r| so far.
    """

    gamma: float
    reward_bound: float

    @property
    def newest(self) -> Sequence[Mapping[str, float]]:
        """The last rows, three at most, newest last."""

    def above(self, name: str, threshold: float) -> tuple[int, Mapping[str, float]]:
        """For how many rows a watched number has stayed above a threshold, and the first of them; 0 and the last row if none."""


@dataclass(frozen=True)
class AlarmRule:
    """One way in which a run of a method goes wrong.

    Attributes:
        name: short name, as records hold it.
        reads: names of the numbers it looks at, without ``train/``.
        look: a message raises the alarm, an empty one clears it, None leaves it as it is.
        watches: the numbers and thresholds it asks :meth:`SeenRows.above` for.
    """

    name: str
    reads: tuple[str, ...]
    look: Callable[[SeenRows], str | None]
    watches: tuple[tuple[str, float], ...] = ()


_ALPHA_RANGE = (1e-4, 1e6)
_ABOVE_DELTA, _FAR_ABOVE_DELTA = 2.0, 10.0
_ALPHA_GROWTH = 10.0
_MANY_ROWS = 10
_Q_MARGIN = 2.0
_SATURATED_ROWS = 3
_SATURATION = 0.5
_SATURATION_OVER_DATA = 0.25


def _change_above(seen: SeenRows, threshold: float) -> tuple[int, float, float]:
    """Rows for which D / delta has stayed above a threshold, and the factors by which alpha and it have grown since."""
    rows, first = seen.above("divergence_ratio", threshold)
    last = seen.newest[-1]
    if rows == 0:
        return 0, 1.0, 1.0
    growth = last["alpha"] / first["alpha"] if first["alpha"] > 0 else 1.0
    return rows, growth, last["divergence_ratio"] / first["divergence_ratio"]


def _alpha_stands(seen: SeenRows) -> bool:
    """Whether alpha is fixed, or at a bound of its own (or only one row has been seen)."""
    alphas = [row["alpha"] for row in seen.newest if "alpha" in row]
    return alphas[-1] == alphas[max(len(alphas) - 2, 0)]


def _alpha(seen: SeenRows) -> str | None:
    last = seen.newest[-1]
    if "alpha" not in last:
        return None
    alpha, (low, high) = last["alpha"], _ALPHA_RANGE
    if _alpha_stands(seen):
        return ""
    if alpha < low:
        return (
            f"alpha fell to {alpha:.3g}: the divergence stays below delta, so nothing will hold the refinement when values "
            "grow; try a smaller algo.target_divergence, or bound alpha with algo.min_alpha"
        )
    if alpha > high:
        return (
            f"alpha rose to {alpha:.3g}: the refinement does not keep to delta at any price; try a larger "
            "algo.target_divergence (deflow iav measures one), or bound alpha with algo.max_alpha"
        )
    _, growth, change = _change_above(seen, _ABOVE_DELTA)
    if growth > _ALPHA_GROWTH and change > 1 / 3:
        return (
            f"alpha grew {growth:.3g}-fold to {alpha:.3g} while the divergence stayed above {_ABOVE_DELTA:g} delta: the "
            "refinement does not yield to its price; try a larger algo.target_divergence or a smaller algo.lr"
        )
    return ""


def _q(seen: SeenRows) -> str | None:
    values = [seen.newest[-1][name] for name in ("q_base", "q_refined") if name in seen.newest[-1]]
    if not values or seen.reward_bound == 0:
        return None
    largest, bound = max(values, key=abs), seen.reward_bound / (1 - seen.gamma)
    if abs(largest) <= _Q_MARGIN * bound:
        return ""
    return (
        f"Q is {largest:.3g} where rewards up to {seen.reward_bound:.3g} and gamma {seen.gamma:g} allow {bound:.3g} at "
        "most: the critics bootstrap from their own errors; try algo.q_aggregation=min, a smaller algo.tau or algo.lr, "
        "or a smaller algo.target_divergence"
    )


def _saturation(seen: SeenRows) -> str | None:
    last = seen.newest[-1]
    if not all(name in last for name in ("saturation", "saturation_data", "divergence_ratio", "alpha")):
        return None
    corners = [_in_the_corners(row) for row in seen.newest]
    if len(corners) == _SATURATED_ROWS and all(corners):
        return (
            f"{last['saturation']:.0%} of the refined action dimensions lie at a bound ({last['saturation_data']:.0%} of "
            "the data's): the refinement pushes into the corners of the action space, where the critics have seen little; "
            "try a smaller algo.target_divergence, or a larger algo.fixed_alpha where that is set"
        )
    rows, growth, change = _change_above(seen, _FAR_ABOVE_DELTA)
    if rows >= _MANY_ROWS and change > 0.5 and (growth > 2 or _alpha_stands(seen)):
        return (
            f"the divergence has been above {_FAR_ABOVE_DELTA:g} delta for {rows} rows and does not fall: the trust "
            "region does not hold the refinement; try a larger algo.log_alpha_init, a smaller algo.lr, or a larger "
            "algo.fixed_alpha where that is set"
        )
    # Over when the last row shows neither.
    return None if corners[-1] or rows else ""


def _in_the_corners(row: Mapping[str, float]) -> bool:
    if "saturation" not in row or "saturation_data" not in row:
        return False
    return row["saturation"] > max(_SATURATION, row["saturation_data"] + _SATURATION_OVER_DATA)


DEFLOW_ALARMS = (
    AlarmRule("alpha", ("alpha", "divergence_ratio"), _alpha, (("divergence_ratio", _ABOVE_DELTA),)),
    AlarmRule("q", ("q_base", "q_refined"), _q),
    AlarmRule(
        "saturation",
        ("saturation", "saturation_data", "divergence_ratio", "alpha"),
        _saturation,
        (("divergence_ratio", _FAR_ABOVE_DELTA),),
    ),
)
"""The alarms of DeFlow.

* ``alpha``: the multiplier moves outside [1e-4, 1e6]; or it grew tenfold while the divergence stayed above twice delta and did
  not fall to a third: the price rises and the refinement does not yield. (Where it does yield the divergence goes with
  1 / alpha^2.)
* ``q``: |``q_base``| or |``q_refined``| exceeds twice max|r| / (1 - gamma), which no return can exceed.
* ``saturation``: at each of the last 3 rows more than half of the refined action dimensions lay at a bound, and a quarter of
  them more than of the data's; or the divergence stayed above 10 delta for 10 rows without falling to half, while alpha was
  fixed or has doubled.
"""
