# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A table as rows of entries, which the page and Markdown show alike."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any


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
        kind: a key of ``grids.json``; of tables copied from the paper it begins with ``paper``.
    """

    title: str
    caption: str
    headers: Sequence[str]
    rows: Sequence[GridRow]
    kind: str

    @property
    def copied(self) -> bool:
        """Whether its figures are the paper's."""
        return self.kind.startswith("paper")

    def markdown(self) -> list[str]:
        """The table's lines, without its title."""
        rows = [[f"**{it.text}**" if it.bold and it.text else it.text for it in row.entries] for row in self.rows]
        lines = [
            "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |" for texts in [self.headers, *rows]
        ]
        return [lines[0], "|" + "---|" * len(self.headers), *lines[1:]]


@functools.cache
def _texts() -> Mapping[str, Any]:
    return json.loads(resources.files(__package__).joinpath("grids.json").read_text(encoding="utf-8"))


def make_grid(kind: str, rows: Sequence[GridRow], *, columns: Sequence[str] = (), **values: Any) -> Grid:
    """A table with the title, caption and headers that ``grids.json`` has for its kind.

    Args:
        kind: see :class:`Grid`.
        rows: of the table.

    Keyword Args:
        columns: headers after those of the file.
        **values: what the names in its texts stand for.
    """
    text = _texts()[kind]
    headers = (*(header.format(**values) for header in text["headers"]), *columns)
    title, caption = (text[name].format(**values) for name in ("title", "caption"))
    return Grid(title, caption, headers, rows, kind)


def grid_row(*cells: Entry | str | int, kind: str = "task") -> GridRow:
    """A row of entries, texts, and numbers that are shown and sorted as they are."""
    return GridRow(kind, [
        cell if isinstance(cell, Entry) else Entry(str(cell), cell if isinstance(cell, int) else None) for cell in cells
    ])  # fmt: skip
