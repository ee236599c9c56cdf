# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Whether reports can be written here."""

from __future__ import annotations

import importlib.util

from deflow_torchrl.errors import MissingExtraError


def check_report_extra() -> None:
    """Raise MissingExtraError unless matplotlib and jinja2 are installed; asked before hours of training, not after."""
    for module in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(module, "reports")
