"""DeFlow with a fixed multiplier alpha against the adaptive one: Table 5.

    python benchmarks/alpha_ablation.py run --protocol small --jobs 2
    python benchmarks/alpha_ablation.py run --protocol paper --device cuda --dry-run
    python benchmarks/alpha_ablation.py render

`paper` trains cube-double and puzzle-3x3 offline and then online, `small` cube-single offline, on data it generates. The variants
are `deflow:fixed_alpha=0.03` and so on, beside `deflow`. A fixed alpha multiplies the divergence once, as in the paper's
Equation 10; the authors' code multiplies by it twice, so that if Table 5 was made with it, its 0.3 is 0.09 here.
"""

from __future__ import annotations

import argparse

from _family import Command, main, sweeps

from deflow_torchrl.tasks import paper_task
from deflow_torchrl.tasks.protocols import get_protocol


def commands(arguments: argparse.Namespace) -> list[Command]:
    protocol = get_protocol(arguments.protocol)
    ablation = protocol.fixed_alpha
    methods = arguments.methods or ["deflow", *(f"deflow:fixed_alpha={alpha:g}" for alpha in ablation.values)]
    # A task that is named trains offline, unless told otherwise: as long as every task of the paper that goes online.
    online = {**protocol.online_settings, "offline_steps": _offline_steps(ablation.tasks)} if ablation.online else {}
    return sweeps(protocol, ablation.tasks, methods, arguments, settings=[f"{key}={online[key]}" for key in online])


def _offline_steps(tasks: tuple[str, ...]) -> int:
    """Steps before the online phase; those of the offline tables, which OGBench's tasks have in common."""
    (steps,) = {task.offline_steps for task in map(paper_task, tasks) if task is not None}
    return steps


if __name__ == "__main__":
    main(__doc__, "runs/bench-alpha", commands)
