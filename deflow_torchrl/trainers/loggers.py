# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""TorchRL's loggers, chosen by name, with their missing extras and missing keys said in one line."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from pathlib import Path

from deflow_torchrl.errors import MissingExtraError
from deflow_torchrl.trainers.metrics import ScalarLogger

PROJECT = "deflow_torchrl"


def make_logger(name: str, folder: Path) -> ScalarLogger | None:
    """Make the TorchRL logger ``name`` (``none``, ``wandb``, ``tensorboard`` or ``mlflow``), writing under ``folder``.

    wandb without a key runs offline and says so on standard error; ``wandb sync`` uploads such a run later.

    Raises:
        MissingExtraError: if its package is not installed.
    """
    check_logger(name)
    if name == "none":
        return None
    from torchrl.record.loggers import get_logger

    kwargs: dict[str, dict[str, str]] = {}
    if name == "wandb":
        kwargs["wandb_kwargs"] = {"project": PROJECT}
        if "WANDB_MODE" not in os.environ and not _wandb_has_key():
            where = folder / "wandb"
            print(f"wandb has no key: logging offline under {where}; upload it with `wandb sync`", file=sys.stderr)
            # TorchRL's own offline=True asks for the mode "dryrun", which wandb no longer knows.
            kwargs["wandb_kwargs"]["mode"] = "offline"
    target = folder if name == "wandb" else folder / name
    target.mkdir(parents=True, exist_ok=True)
    return get_logger(name, logger_name=str(target), experiment_name=folder.name, **kwargs)


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
