# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Panels of a run's report, as methods describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """Curves over a run's steps.

    Attributes:
        title: heading.
        reading: how to read it, in one sentence.
        curves: column of the rows -> label.
        unit: of the vertical axis.
        logarithmic: whether that axis is.
        level: label and value of a horizontal line.
        compared: whether a report of several runs shows its first curve, a line a run.
    """

    title: str
    reading: str
    curves: Mapping[str, str]
    unit: str
    logarithmic: bool = False
    level: tuple[str, float] | None = None
    compared: bool = False

    @property
    def name(self) -> str:
        """The column of its first curve."""
        return next(iter(self.curves))
