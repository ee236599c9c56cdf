# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Alarms of a run: a method's rules, looked at with each row of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

from deflow_torchrl.algorithms.alarms import DEFLOW_ALARMS, AlarmRule

_KEPT_ROWS = 3


@dataclass(frozen=True)
class Alarm:
    """An alarm that was raised.

    Attributes:
        name: of its rule.
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

    A row without the numbers of a rule neither raises nor clears its alarm.

    Args:
        gamma: the discount.
        reward_bound: max|r| of the data; :meth:`see_reward` widens it by rewards from online steps. With 0 nothing is said
            about the size of values.
        rules: the method's (``Algorithm.alarms``).
    """

    def __init__(self, *, gamma: float, reward_bound: float, rules: Sequence[AlarmRule] = DEFLOW_ALARMS) -> None:
        self.gamma = gamma
        self.reward_bound = float(reward_bound)
        self.rules = tuple(rules)
        self._rows: list[dict[str, float]] = []
        # Watched number and threshold -> for how many rows it has stayed above it, and the first of them.
        self._above: dict[str, dict[str, Any]] = {}
        self._raised: list[dict[str, Any]] = []

    @property
    def raised(self) -> list[Alarm]:
        """Every alarm so far, oldest first."""
        return [Alarm(**values) for values in self._raised]

    @property
    def newest(self) -> list[dict[str, float]]:
        """The last rows that hold a number of a rule, three at most, newest last."""
        return self._rows

    def above(self, name: str, threshold: float) -> tuple[int, dict[str, float]]:
        """See :meth:`deflow_torchrl.algorithms.alarms.SeenRows.above`."""
        stay = self._above.get(_watch(name, threshold))
        return (0, self._rows[-1]) if stay is None else (stay["rows"], stay["first"])

    def see_reward(self, reward: float) -> None:
        """Widen the bound of rewards by one that the data may not have held."""
        self.reward_bound = max(self.reward_bound, abs(reward))

    def check(self, row: Mapping[str, Any]) -> list[Alarm]:
        """Take the next row of metrics (names as in ``metrics.jsonl``) and return the alarms it raises."""
        names = [name for rule in self.rules for name in rule.reads]
        seen = {name: float(row[f"train/{name}"]) for name in names if f"train/{name}" in row}
        if not seen:
            return []
        self._rows = [*self._rows, seen][-_KEPT_ROWS:]
        for name, threshold in dict.fromkeys(watch for rule in self.rules for watch in rule.watches):
            if name in seen and seen[name] <= threshold:
                self._above.pop(_watch(name, threshold), None)
            elif name in seen:
                self._above.setdefault(_watch(name, threshold), {"rows": 0, "first": seen})["rows"] += 1
        new = []
        for rule in self.rules:
            message = rule.look(self)
            running = [it for it in self._raised if it["name"] == rule.name and it["cleared"] is None]
            if message and not running:
                new.append(Alarm(rule.name, int(row["step"]), message))
                self._raised.append(asdict(new[-1]))
            elif message == "" and running:
                running[0]["cleared"] = int(row["step"])
        return new

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries and numbers."""
        return deepcopy(
            {"reward_bound": self.reward_bound, "rows": self._rows, "above": self._above, "raised": self._raised}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the result of :meth:`state_dict`."""
        state = deepcopy(dict(state))
        self.reward_bound = state["reward_bound"]
        self._rows, self._above, self._raised = state["rows"], state["above"], state["raised"]


def _watch(name: str, threshold: float) -> str:
    return f"{name} > {threshold:g}"
