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

from deflow_torchrl.errors import CheckpointNotWritten, InputError, MissingExtraError, one_line
from deflow_torchrl.paths import atomic_write, write_text
from deflow_torchrl.processes import children_ignore_signals

_LOG = logging.getLogger(__name__)
_PROJECT = "deflow_torchrl"
LOGGER_FILE = "logger.json"  # in the run folder


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
        self.found_step: int = self.rows[-1]["step"] if self.rows else 0
        """Step of the last row that an earlier process has written."""
        self._sent_step = 0
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

    def send_to(self, logger: ScalarLogger | None, *, after: int = 0) -> None:
        """Send the numbers of further rows to this logger, too, but only those of steps ``after`` this one."""
        self.logger, self._sent_step = logger, after

    def close(self) -> None:
        """End the logger's run."""
        if self.logger is not None and hasattr(self.logger, "close"):
            self.logger.close()

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
        if self.logger is not None and row["step"] > self._sent_step:
            _send(self.logger, row["step"], row)

    def send_clip(self, path: Path, *, step: int) -> None:
        """Send an animated GIF to the logger, if it is wandb."""
        if _is_wandb(self.logger) and step > self._sent_step:
            import wandb

            # With the row of this step, which follows.
            self.logger.experiment.log({"eval/clip": wandb.Video(str(path), format="gif")}, step=step, commit=False)  # type: ignore[union-attr]

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


def _send(logger: Any, step: int, row: Mapping[str, Any]) -> None:
    numbers = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
    if _is_wandb(logger):
        # One row of its history, complete at once: TorchRL would send as many as there are numbers, and wandb's own count of
        # them begins again after a resume.
        logger.experiment.log(numbers, step=step, commit=True)
        return
    for name, value in numbers.items():
        logger.log_scalar(name, value, step=step)


def _is_wandb(logger: Any) -> bool:
    return type(logger).__name__ == "WandbLogger"


def open_logger(
    name: str, folder: Path, *, metrics: MetricsLog, state: Mapping[str, Any] | None, step: int | None
) -> None:
    """Make a run's logger, the one of the run's earlier processes where there is one, and send it the metrics.

    wandb and mlflow keep what they have: of a resumed run they are sent the steps that no earlier process has sent, so that no
    step comes twice. ``logger.json`` remembers their run and its last step.

    Args:
        name: the logger's name.
        folder: the run folder.

    Keyword Args:
        metrics: the run's metrics.
        state: of the logger in a checkpoint of earlier versions.
        step: last step of the resumed run; None of a new one.

    Raises:
        MissingExtraError: if its package is not installed.
        InputError: if it cannot be used.
    """
    note = folder / LOGGER_FILE
    if note.is_file():
        try:
            state = json.loads(note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{note} is damaged; remove it, and the logger begins another run") from error
    logger = make_logger(name, folder, state=state, step=step)
    sent = 0
    if step is not None and state and state.get("logger") == name != "tensorboard":
        sent = max(metrics.found_step, int(state.get("step", 0)))
    if logger is not None:
        write_text(note, json.dumps({**logger_state(name, logger), "step": sent}) + "\n")
    metrics.send_to(logger, after=sent)


def make_logger(
    name: str, folder: Path, *, state: Mapping[str, str] | None = None, step: int | None = None
) -> ScalarLogger | None:
    """Make the TorchRL logger ``name`` (``none``, ``wandb``, ``tensorboard`` or ``mlflow``), which writes under ``folder``.

    Without a key wandb runs offline, with a note on standard error, and asks for none; ``wandb sync`` uploads such a run later.

    Args:
        name: the logger's name.
        folder: the run folder.

    Keyword Args:
        state: result of :func:`logger_state`, to continue that run of the logger; ignored if it is another logger's.
        step: last step of the resumed run; tensorboard hides the numbers of later steps, which are written again.

    Raises:
        MissingExtraError: if its package is not installed.
        InputError: if wandb cannot begin, for example without a network.
    """
    check_logger(name)
    if name == "none":
        return None
    from torchrl.record.loggers import get_logger

    run_id = state["id"] if state and state["logger"] == name else None
    kwargs: dict[str, Any] = {}
    if name == "wandb":
        own = kwargs["wandb_kwargs"] = {"project": _PROJECT} | ({} if run_id is None else {"id": run_id})
        if os.environ.get("WANDB_MODE", "online") == "online" and not _wandb_has_key():
            where = folder / "wandb"
            print(f"wandb has no key: logging offline under {where}; upload it with `wandb sync`", file=sys.stderr)
            own["mode"] = (
                "offline"  # TorchRL's own offline=True asks for the mode "dryrun", which wandb no longer knows
            )
    if name == "mlflow" and run_id is not None:
        os.environ["MLFLOW_RUN_ID"] = run_id  # mlflow reads it once; TorchRL's logger has no argument for it
    target = folder if name == "wandb" else folder / name
    target.mkdir(parents=True, exist_ok=True)
    try:
        with children_ignore_signals():  # wandb's process, too, ends with the run
            logger = get_logger(name, logger_name=str(target), experiment_name=folder.name, **kwargs)
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        raise InputError(f"wandb cannot begin ({one_line(error)}); set WANDB_MODE=offline, or logger=none") from error
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
