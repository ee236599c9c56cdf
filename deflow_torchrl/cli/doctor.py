# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The verb ``doctor``."""

from __future__ import annotations

import json
from dataclasses import asdict

from deflow_torchrl.cli.shared import EXIT_FAILED, JSON, app, verb


@verb(app)
def doctor(*, json_: JSON = False) -> None:
    """Examine this installation: versions, GPU, cores, memory, disk, drawing and every extra, each tried for real.

    note: works with a limit, or is not installed. fault: is installed and cannot work; then the exit code is 1.

    Example: deflow doctor --json | tail -1
    """
    from rich.console import Console
    from rich.table import Column, Table

    from deflow_torchrl.doctor import examine

    findings = examine()
    table = Table("check", "", Column("found, and what to do", overflow="fold"))
    for finding in findings:
        table.add_row(finding.check, finding.status, f"{finding.found}\n{finding.advice}".strip())
    Console(highlight=False, markup=False).print(table)
    ok = all(finding.status != "fault" for finding in findings)
    if json_:
        print(json.dumps({"ok": ok, "findings": [asdict(finding) for finding in findings]}))
    if not ok:
        raise SystemExit(EXIT_FAILED)
