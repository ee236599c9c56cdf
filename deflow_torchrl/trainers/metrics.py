# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run's metrics: one row per log step, as JSONL and CSV, and optionally to a TorchRL logger."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from deflow_torchrl.errors import CheckpointNotWritten, MissingExtraError
from deflow_torchrl.paths import atomic_write, write_text

_LOG = logging.getLogger(__name__)
_PROJECT = "deflow_torchrl"


class ScalarLogger(Protocol):
    """Interface of the loggers in ``torchrl.record.loggers``, as far as it is used."""

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Record one number."""


class MetricsLog:
    """Append rows to ``metrics.jsonl`` and ``metrics.csv``.

    A row holds ``step``, ``phase`` and numbers under names with slashes; wall-clock values have names under ``time/`` only, so
    that two equal runs differ nowhere else. The JSONL file is the record; the CSV is rewritten from it when a row has a new
    column. If a row cannot be written, for example on a full disk, a warning is logged and the row is written with the next
    one.

    Args:
        folder: the run folder.

    Keyword Args:
        logger: also receives each number.
        resume_step: keep only the rows up to this step, because a resumed run writes the later ones again; all if None.
    """

    def __init__(self, folder: Path, *, logger: ScalarLogger | None = None, resume_step: int | None = None) -> None:
        self.jsonl = folder / "metrics.jsonl"
        self.csv = folder / "metrics.csv"
        self.logger = logger
        self.rows: list[dict[str, Any]] = read_rows(self.jsonl)
        self._columns: list[str] = []
        self._behind = False
        if resume_step is None:
            self._write_csv()
        else:
            self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Remove the rows after ``step``: a resumed run writes them again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        write_text(self.jsonl, self._text)
        self._write_csv()

    def send_to(self, logger: ScalarLogger | None) -> None:
        """Send the numbers of further rows to this logger, too."""
        self.logger = logger

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
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
        """Write every row to the disk: needed before a checkpoint, because a run resumed from it does not write them again.

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

    @property
    def _text(self) -> str:
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    def _append(self, row: dict[str, Any]) -> None:
        with self.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if set(row) <= set(self._columns):
            with self.csv.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            self._write_csv()

    def _write_again(self) -> None:
        """Write both files anew: a failed append may have left half a row."""
        with atomic_write(self.jsonl) as temporary:
            temporary.write_text(self._text, encoding="utf-8")
        self._write_csv()
        self._behind = False

    def _write_csv(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self.rows for name in row)) or ["step", "phase"]
        with atomic_write(self.csv) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self.rows)


def read_rows(jsonl: Path) -> list[dict[str, Any]]:
    """Read the rows of a ``metrics.jsonl``, without a last line that was cut short by a kill."""
    rows = []
    if jsonl.is_file():
        for line in jsonl.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def make_logger(
    name: str, folder: Path, *, state: Mapping[str, str] | None = None, step: int | None = None
) -> ScalarLogger | None:
    """Make the TorchRL logger ``name`` (``none``, ``wandb``, ``tensorboard`` or ``mlflow``), which writes under ``folder``.

    Without a key wandb runs offline, with a note on standard error; ``wandb sync`` uploads such a run later.

    Args:
        name: the logger's name.
        folder: the run folder.

    Keyword Args:
        state: result of :func:`logger_state`, to continue that run of the logger; ignored if it is another logger's.
        step: last step of the resumed run; tensorboard hides the numbers of later steps, which are written again.

    Raises:
        MissingExtraError: if its package is not installed.
    """
    check_logger(name)
    if name == "none":
        return None
    from torchrl.record.loggers import get_logger

    run_id = state["id"] if state and state["logger"] == name else None
    kwargs: dict[str, Any] = {}
    if name == "wandb":
        own = kwargs["wandb_kwargs"] = {"project": _PROJECT} | ({} if run_id is None else {"id": run_id})
        if "WANDB_MODE" not in os.environ and not _wandb_has_key():
            where = folder / "wandb"
            print(f"wandb has no key: logging offline under {where}; upload it with `wandb sync`", file=sys.stderr)
            own["mode"] = (
                "offline"  # TorchRL's own offline=True asks for the mode "dryrun", which wandb no longer knows
            )
    if name == "mlflow" and run_id is not None:
        os.environ["MLFLOW_RUN_ID"] = run_id  # mlflow reads it once; TorchRL's logger has no argument for it
    target = folder if name == "wandb" else folder / name
    target.mkdir(parents=True, exist_ok=True)
    logger = get_logger(name, logger_name=str(target), experiment_name=folder.name, **kwargs)
    if name == "tensorboard" and step is not None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # TorchRL does not pass on SummaryWriter's ``purge_step``; this is the event that it writes.
        restart = Event(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        logger.experiment.file_writer.add_event(restart)
    return logger


def logger_state(name: str, logger: Any) -> dict[str, str]:
    """Return what a resumed run needs to continue the same run of its logger, in plain strings.

    Args:
        name: the logger's name.
        logger: result of :func:`make_logger`.
    """
    run_id = ""  # tensorboard finds its run by the folder
    if name == "wandb":
        run_id = logger.experiment.id
    elif name == "mlflow":
        run_id = logger.experiment.info.run_id
    return {"logger": name, "id": str(run_id)}


def check_logger(name: str) -> None:
    """Raise MissingExtraError if the logger's package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise MissingExtraError(name, name)


def _wandb_has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)
