# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Many runs by one command: every task with every method and seed, on this machine's cores or on a Ray cluster.

A sweep keeps no state of its own that matters: what is finished, begun or still to come is read from the run folders, so that
the same command goes on after any interruption, on any engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports

if TYPE_CHECKING:
    from deflow_torchrl.sweep.costs import estimate_costs as estimate_costs
    from deflow_torchrl.sweep.jobs import Job as Job
    from deflow_torchrl.sweep.jobs import plan_jobs as plan_jobs
    from deflow_torchrl.sweep.plan import Cell as Cell
    from deflow_torchrl.sweep.plan import SweepPlan as SweepPlan
    from deflow_torchrl.sweep.plan import Variant as Variant
    from deflow_torchrl.sweep.plan import parse_sweep as parse_sweep
    from deflow_torchrl.sweep.runner import run_sweep as run_sweep

_EXPORTS = {
    "Cell": ".plan",
    "Job": ".jobs",
    "SweepPlan": ".plan",
    "Variant": ".plan",
    "estimate_costs": ".costs",
    "parse_sweep": ".plan",
    "plan_jobs": ".jobs",
    "run_sweep": ".runner",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
