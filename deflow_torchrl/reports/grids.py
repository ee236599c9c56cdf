# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A table as rows of entries, for the page and for Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A cell.

    Attributes:
        text: what is shown.
        value: what it is sorted by; its text where None.
        bold: whether it stands out.
        hint: shown when it is pointed at.
    """

    text: str
    value: float | None = None
    bold: bool = False
    hint: str = ""


@dataclass(frozen=True)
class GridRow:
    """A row: ``kind`` is ``task``, or ``average`` of the tasks before it."""

    kind: str
    entries: tuple[Entry, ...]


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
    headers: tuple[str, ...]
    rows: tuple[GridRow, ...]
    copied: bool = False

    def markdown(self) -> list[str]:
        """The table's lines, without its title."""
        lines = [_line(self.headers), "|" + "---|" * len(self.headers)]
        return lines + [
            _line([f"**{entry.text}**" if entry.bold and entry.text else entry.text for entry in row.entries])
            for row in self.rows
        ]


def _line(texts: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |"
