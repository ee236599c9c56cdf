# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""``deflow``: the command line. Verbs import torch when they run, so that ``--help`` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from deflow_torchrl.errors import MissingExtraError
from deflow_torchrl.processes import keep_freed_memory, take_stop_signals

try:
    from deflow_torchrl.cli.shared import app
except ModuleNotFoundError as missing:
    print(f"deflow: {MissingExtraError(missing.name or 'typer', 'cli')}", file=sys.stderr)
    raise SystemExit(2) from missing

__all__ = ["app", "main"]

for _verbs in (
    "train",
    "sweep",
    "report",
    "data",
    "doctor",
):  # each adds its verbs to the application, in the order of --help
    importlib.import_module(f"{__name__}.{_verbs}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: the arguments after ``deflow``; those of the process by default.
    """
    if arguments is not None:
        sys.argv = ["deflow", *arguments]
    # OpenMP threads spin while they wait for each other. Beside any other busy process that made an update three to nine
    # times slower on two cores, while spinning briefly costs little on an idle machine. Read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_freed_memory()
    take_stop_signals()
    warnings.filterwarnings("ignore", category=FutureWarning, module="(torch|tensordict|torchrl)")
    app(prog_name="deflow")
