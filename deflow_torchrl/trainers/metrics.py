# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run's metrics: one row per log step, as JSONL and CSV, and to a TorchRL logger where one is asked for."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Protocol

from deflow_torchrl.paths import atomic_write, write_text


class ScalarLogger(Protocol):
    """The part of ``torchrl.record.loggers`` that is used."""

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Record one number."""


class MetricsLog:
    """Append rows to ``metrics.jsonl`` and ``metrics.csv``.

    A row holds ``step``, ``phase`` and numbers under names with slashes; wall-clock values stand under ``time/`` only, so
    that two equal runs differ nowhere else. The JSONL file is the record; the CSV is rewritten from it when a row brings
    a new column.

    Args:
        folder: the run folder.

    Keyword Args:
        logger: also receives each number.
        resume_step: keep only the rows up to this step (a resumed run writes the later ones again); all, if None.
    """

    def __init__(self, folder: Path, *, logger: ScalarLogger | None = None, resume_step: int | None = None) -> None:
        self.jsonl = folder / "metrics.jsonl"
        self.csv = folder / "metrics.csv"
        self.logger = logger
        self.rows: list[dict[str, Any]] = read_rows(self.jsonl)
        if resume_step is not None:
            self.rows = [row for row in self.rows if row["step"] <= resume_step]
            write_text(self.jsonl, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._columns: list[str] = []
        self._write_csv()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and flush it."""
        self.rows.append(row)
        with self.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if set(row) <= set(self._columns):
            with self.csv.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._write_csv()
        if self.logger is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.logger.log_scalar(name, value, step=row["step"])

    def _write_csv(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row)) or ["step", "phase"]
        with atomic_write(self.csv) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(jsonl: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    rows = []
    if jsonl.is_file():
        for line in jsonl.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
