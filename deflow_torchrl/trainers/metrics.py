# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run's metrics: one row per log step, as JSONL and CSV, and to a TorchRL logger where one is asked for."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

from deflow_torchrl.errors import CheckpointNotWritten
from deflow_torchrl.paths import atomic_write, write_text

_LOG = logging.getLogger(__name__)


class ScalarLogger(Protocol):
    """The part of ``torchrl.record.loggers`` that is used."""

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Record one number."""


class MetricsLog:
    """Append rows to ``metrics.jsonl`` and ``metrics.csv``.

    A row holds ``step``, ``phase`` and numbers under names with slashes; wall-clock values stand under ``time/`` only, so
    that two equal runs differ nowhere else. The JSONL file is the record; the CSV is rewritten from it when a row brings
    a new column. A row that cannot be written, for example on a full disk, costs a warning and is written with the next
    one.

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
        self._behind = False
        self._write_csv()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and flush it."""
        self.rows.append(row)
        try:
            if self._behind:
                self._write_again()
            else:
                self._append(row)
        except OSError as error:
            if not self._behind:
                _LOG.warning("%s was not written (%s); it is tried again with the next row", self.jsonl, error.strerror)
            self._behind = True
        if self.logger is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.logger.log_scalar(name, value, step=row["step"])

    def sync(self) -> None:
        """Put every row on the disk: before a checkpoint, whose run will not write them again.

        Raises:
            CheckpointNotWritten: if that fails.
        """
        try:
            if self._behind:
                self._write_again()
            if self.jsonl.exists():
                with self.jsonl.open("rb") as file:
                    os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointNotWritten(self.jsonl, error) from error

    def _append(self, row: dict[str, Any]) -> None:
        with self.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if set(row) <= set(self._columns):
            with self.csv.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._write_csv()

    def _write_again(self) -> None:
        """Write both files whole: an append that failed may have left half a row."""
        with atomic_write(self.jsonl) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        self._write_csv()
        self._behind = False

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
