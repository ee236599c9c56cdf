# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""TorchRL's loggers, chosen by name, with their missing extras and missing keys said in one line."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deflow_torchrl.errors import MissingExtraError
from deflow_torchrl.trainers.metrics import ScalarLogger

PROJECT = "deflow_torchrl"


def make_logger(
    name: str, folder: Path, *, state: Mapping[str, str] | None = None, step: int | None = None
) -> ScalarLogger | None:
    """Make the TorchRL logger ``name`` (``none``, ``wandb``, ``tensorboard`` or ``mlflow``), writing under ``folder``.

    wandb without a key runs offline and says so on standard error; ``wandb sync`` uploads such a run later.

    Args:
        name: which one.
        folder: the run folder.

    Keyword Args:
        state: what :func:`logger_state` gave, to go on with that run of the logger; one of another logger is of no use.
        step: last step whose numbers stand; tensorboard hides later ones, which are written again.

    Raises:
        MissingExtraError: if its package is not installed.
    """
    check_logger(name)
    if name == "none":
        return None
    run_id = state["id"] if state and state["logger"] == name else None
    from torchrl.record.loggers import get_logger

    kwargs: dict[str, dict[str, str]] = {}
    if name == "wandb":
        kwargs["wandb_kwargs"] = {"project": PROJECT, **({} if run_id is None else {"id": run_id})}
        if "WANDB_MODE" not in os.environ and not _wandb_has_key():
            where = folder / "wandb"
            print(f"wandb has no key: logging offline under {where}; upload it with `wandb sync`", file=sys.stderr)
            # TorchRL's own offline=True asks for the mode "dryrun", which wandb no longer knows.
            kwargs["wandb_kwargs"]["mode"] = "offline"
    target = folder if name == "wandb" else folder / name
    target.mkdir(parents=True, exist_ok=True)
    if name == "mlflow" and run_id is not None:
        os.environ["MLFLOW_RUN_ID"] = (
            run_id  # which run to start is no argument of TorchRL's logger; mlflow reads it once
        )
    logger = get_logger(name, logger_name=str(target), experiment_name=folder.name, **kwargs)
    if name == "tensorboard" and step is not None:
        _hide_later_numbers(logger, step)
    return logger


def logger_state(name: str, logger: Any) -> dict[str, str]:
    """What a resumed run needs to go on with the same run of its logger, in plain strings.

    Args:
        name: the logger's name.
        logger: what :func:`make_logger` gave.
    """
    ids: dict[str, Callable[[], str]] = {
        "wandb": lambda: logger.experiment.id,
        "mlflow": lambda: logger.experiment.info.run_id,
        "tensorboard": lambda: "",  # known by its folder
    }
    return {"logger": name, "id": str(ids[name]()) if name in ids else ""}


def _hide_later_numbers(logger: Any, step: int) -> None:
    """Mark a restart after ``step``, as SummaryWriter's ``purge_step`` does, which TorchRL does not pass on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    logger.experiment.file_writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))


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
