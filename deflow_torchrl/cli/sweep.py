# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The verb ``sweep``."""

from __future__ import annotations

import json
from typing import Any

from deflow_torchrl.cli.shared import EXIT_FAILED, JSON, app, command_line, verb


@verb(app)
def sweep(
    settings: list[str] | None = None,
    *,
    dry_run: bool = False,
    json_: JSON = False,
) -> dict[str, Any]:
    """Train every task with every method and seed: deflow sweep tasks=A,B algos=deflow,fql seeds=0..7 out=DIR [KEY=VALUE...]

    tasks: names, families (deflow tasks lists them), all (the paper's 73 offline tasks) or o2o (its 15 offline to online).
    algos: methods, or all; deflow:fixed_alpha=0.3 is one with settings of its own. seeds: 0..7 or 0,1,2.

    A run's folder is OUT/TASK/ALGO/seedN. Finished runs are never run again, interrupted ones go on from their
    checkpoints: after Ctrl-C or a kill the same command goes on, on another machine once OUT/.sweep.lock is removed. A job
    that failed is tried once more (retries=1); the others go on, and at the end the exit code is 1.

    engine: local (this machine; jobs=N at once, one a core by default) or ray (ray_address=HOST:PORT, auto or ray://HOST:PORT;
    num_cpus=1 and num_gpus= of a job; OUT in a folder that all nodes share). stacked=auto|true|false: whether the seeds of a
    task and method train together in one process; auto does so on a GPU and on Ray. protocol=paper|small sets steps, networks
    and seeds. All other settings are those of deflow train.

    Example: deflow sweep tasks=cube-single,puzzle-3x3 algos=deflow,fql seeds=0..2 protocol=small out=runs/small --dry-run

    Args:
        settings KEY=VALUE...: The sweep's settings, then those of its runs.
        dry_run: Print the jobs, their cost, by steps/s measured here, and why cells are left out; out= may be missing.
    """
    from deflow_torchrl.sweep import parse_sweep

    settings = settings or []
    if dry_run and not any(text.startswith("out=") for text in settings):
        settings = [*settings, "out=OUT"]
    plan = parse_sweep(settings, command=command_line())
    if dry_run:
        from deflow_torchrl.sweep.costs import describe_costs, estimate_costs

        estimate = estimate_costs(plan)
        print(describe_costs(estimate))
        return estimate
    from deflow_torchrl.sweep import run_sweep

    summary = run_sweep(plan)
    print(
        f"{summary['out']}: {summary['done']} of {len(summary['jobs'])} jobs are done, {summary['ran']} of them by this command"
    )
    for name in summary["failed"]:
        job = summary["jobs"][name]
        log = f" ({job['log']})" if job["log"] else ""
        print(f"failed: {name} after {job['attempts']} attempts: {job['message']}{log}")
    if not summary["failed"]:
        return summary
    if json_:
        print(json.dumps(summary))
    raise SystemExit(EXIT_FAILED)
