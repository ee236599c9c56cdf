# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A table as rows of entries, which the page and Markdown show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A cell.

    Attributes:
        text: what is shown.
        value: what it is sorted by; its text where None.
        bold: whether it stands out.
        hint: shown under the pointer.
    """

    text: str
    value: float | None = None
    bold: bool = False
    hint: str = ""


@dataclass(frozen=True)
class GridRow:
    """A row: ``kind`` is ``task``, or ``average`` of the tasks before it."""

    kind: str
    entries: Sequence[Entry]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: heading.
        caption: what the figures are.
        headers: of the columns.
        rows: as many entries each.
        copied: whether its figures are the paper's.
    """

    title: str
    caption: str
    headers: Sequence[str]
    rows: Sequence[GridRow]
    copied: bool = False

    def markdown(self) -> list[str]:
        """The table's lines, without its title."""
        rows = [[f"**{it.text}**" if it.bold and it.text else it.text for it in row.entries] for row in self.rows]
        lines = [
            "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |" for texts in [self.headers, *rows]
        ]
        return [lines[0], "|" + "---|" * len(self.headers), *lines[1:]]


def grid_row(*cells: Entry | str | int, kind: str = "task") -> GridRow:
    """A row of entries, texts, and numbers that are shown and sorted as they are."""
    return GridRow(kind, [
        cell if isinstance(cell, Entry) else Entry(str(cell), cell if isinstance(cell, int) else None) for cell in cells
    ])  # fmt: skip
