# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Alarms: what in the rows of metrics says that a run is going wrong, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_ALPHA_RANGE = (1e-4, 1e6)
_ABOVE_DELTA, _FAR_ABOVE_DELTA = 2.0, 10.0
_ALPHA_GROWTH = 10.0
_MANY_ROWS = 10
_Q_MARGIN = 2.0
_SATURATED_ROWS = 3
_SATURATION = 0.5
_SATURATION_OVER_DATA = 0.25
_READ = ("alpha", "divergence_ratio", "saturation", "saturation_data", "q_base", "q_refined")


@dataclass(frozen=True)
class Alarm:
    """Something to look at.

    Attributes:
        name: ``alpha``, ``q`` or ``saturation``.
        step: step of the row that raised it.
        message: what was seen, what it means and what to try.
        cleared: step of the row at which it was over; None while it goes on.
    """

    name: str
    step: int
    message: str
    cleared: int | None = None


class Alarms:
    """Looks at each row of metrics; an alarm is raised once, and again only after a row in which it was over.

    * ``alpha``: the multiplier moves outside [1e-4, 1e6]; or it grew tenfold while the divergence stayed above twice delta
      and did not fall to a third: the price rises and the refinement does not yield. (Where it does yield the divergence
      goes with 1 / alpha^2.)
    * ``q``: |``q_base``| or |``q_refined``| exceeds twice max|r| / (1 - gamma), which no return can exceed.
    * ``saturation``: at each of the last 3 rows more than half of the refined action dimensions lay at a bound, and a
      quarter of them more than of the data's; or the divergence stayed above 10 delta for 10 rows without falling to half,
      while alpha was fixed or has doubled.

    A row without the numbers of an alarm neither raises nor clears it.

    Args:
        gamma: the discount.
        reward_bound: max|r| of the data; :meth:`see_reward` widens it by what comes online. 0 leaves ``q`` out.
    """

    def __init__(self, *, gamma: float, reward_bound: float) -> None:
        self.gamma = gamma
        self.reward_bound = float(reward_bound)
        self._rows: list[dict[str, float]] = []
        # Multiple of delta -> the row at which the divergence went above it, and for how many rows it has stayed there.
        self._above: dict[str, dict[str, float]] = {}
        self._raised: list[dict[str, Any]] = []

    @property
    def raised(self) -> list[Alarm]:
        """Every alarm so far, oldest first."""
        return [Alarm(**values) for values in self._raised]

    def see_reward(self, reward: float) -> None:
        """Take note of a reward that the data may not have held."""
        self.reward_bound = max(self.reward_bound, abs(reward))

    def check(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Take the next row of metrics (names as in ``metrics.jsonl``) and return the alarms it raises."""
        seen = {name: float(row[f"train/{name}"]) for name in _READ if f"train/{name}" in row}
        if not seen:
            return []
        self._rows = [*self._rows, seen][-_SATURATED_ROWS:]
        for above in (_ABOVE_DELTA, _FAR_ABOVE_DELTA):
            self._note_excursion(above, seen)
        new = []
        for name, look in (("alpha", self._alpha), ("q", self._q), ("saturation", self._saturation)):
            message = look()
            if message is None:
                continue
            going_on = next(
                (alarm for alarm in self._raised if alarm["name"] == name and alarm["cleared"] is None), None
            )
            if message and going_on is None:
                alarm = Alarm(name, int(row["step"]), message)
                self._raised.append(asdict(alarm))
                new.append(alarm)
            elif not message and going_on is not None:
                going_on["cleared"] = int(row["step"])
        return new

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries and numbers."""
        return {
            "reward_bound": self.reward_bound,
            "rows": [dict(row) for row in self._rows],
            "above": {name: dict(start) for name, start in self._above.items()},
            "raised": [dict(alarm) for alarm in self._raised],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.reward_bound = state["reward_bound"]
        self._rows = [dict(row) for row in state["rows"]]
        self._above = {name: dict(start) for name, start in state["above"].items()}
        self._raised = [dict(alarm) for alarm in state["raised"]]

    def _note_excursion(self, above: float, seen: dict[str, float]) -> None:
        if "divergence_ratio" not in seen or "alpha" not in seen:
            return
        if seen["divergence_ratio"] <= above:
            self._above.pop(f"{above:g}", None)
        else:
            start = self._above.setdefault(f"{above:g}", {**seen, "rows": 0})
            start["rows"] += 1

    def _change_above(self, above: float) -> tuple[float, float, float]:
        """Rows for which the divergence has stayed above this multiple of delta, and by what alpha and it grew since."""
        start = self._above.get(f"{above:g}")
        if start is None:
            return 0, 1.0, 1.0
        last = self._rows[-1]
        growth = last["alpha"] / start["alpha"] if start["alpha"] > 0 else 1.0
        return start["rows"], growth, last["divergence_ratio"] / start["divergence_ratio"]

    def _alpha_stands(self) -> bool:
        """Whether alpha is fixed, or at a bound of its own (or only one row has been seen)."""
        alphas = [row["alpha"] for row in self._rows if "alpha" in row]
        return alphas[-1] == (alphas[-2] if len(alphas) > 1 else alphas[-1])

    # Each looks at the rows so far: a message raises its alarm, "" clears it, None leaves it as it is.

    def _alpha(self) -> str | None:
        last = self._rows[-1]
        if "alpha" not in last:
            return None
        alpha, (low, high) = last["alpha"], _ALPHA_RANGE
        if self._alpha_stands():
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
        _, growth, change = self._change_above(_ABOVE_DELTA)
        if growth > _ALPHA_GROWTH and change > 1 / 3:
            return (
                f"alpha grew {growth:.3g}-fold to {alpha:.3g} while the divergence stayed above {_ABOVE_DELTA:g} delta: the "
                "refinement does not yield to its price; try a larger algo.target_divergence or a smaller algo.lr"
            )
        return ""

    def _q(self) -> str | None:
        values = [self._rows[-1][name] for name in ("q_base", "q_refined") if name in self._rows[-1]]
        if not values or self.reward_bound == 0:
            return None
        largest, bound = max(values, key=abs), self.reward_bound / (1 - self.gamma)
        if abs(largest) <= _Q_MARGIN * bound:
            return ""
        return (
            f"Q is {largest:.3g} where rewards up to {self.reward_bound:.3g} and gamma {self.gamma:g} allow {bound:.3g} at "
            "most: the critics bootstrap from their own errors; try algo.q_aggregation=min, a smaller algo.tau or algo.lr, "
            "or a smaller algo.target_divergence"
        )

    def _saturation(self) -> str | None:
        last = self._rows[-1]
        if not all(name in last for name in ("saturation", "saturation_data", "divergence_ratio", "alpha")):
            return None
        corners = [_in_the_corners(row) for row in self._rows]
        if len(corners) == _SATURATED_ROWS and all(corners):
            return (
                f"{last['saturation']:.0%} of the refined action dimensions lie at a bound ({last['saturation_data']:.0%} of "
                "the data's): the refinement pushes into the corners of the action space, where the critics have seen little; "
                "try a smaller algo.target_divergence, or a larger algo.fixed_alpha where that is set"
            )
        rows, growth, change = self._change_above(_FAR_ABOVE_DELTA)
        if rows >= _MANY_ROWS and change > 0.5 and (growth > 2 or self._alpha_stands()):
            return (
                f"the divergence has been above {_FAR_ABOVE_DELTA:g} delta for {rows:g} rows and does not fall: the trust "
                "region does not hold the refinement; try a larger algo.log_alpha_init, a smaller algo.lr, or a larger "
                "algo.fixed_alpha where that is set"
            )
        # Over when the last row shows neither.
        return None if corners[-1] or rows else ""


def _in_the_corners(row: Mapping[str, float]) -> bool:
    if "saturation" not in row or "saturation_data" not in row:
        return False
    return row["saturation"] > max(_SATURATION, row["saturation_data"] + _SATURATION_OVER_DATA)
