"""FQL, floq, DeFlow and DeFlow with floq's critics: Table 3.

    python benchmarks/floq.py run --protocol small --jobs 2
    python benchmarks/floq.py run --protocol paper --device cuda --dry-run
    python benchmarks/floq.py render

`paper` trains the five tasks of cube-double and of puzzle-3x3, `small` a task of cube and of puzzle, on data it generates. The
paper's table compares unequal budgets: its FQL and floq have 2M steps and 3 seeds, as floq's authors report them, its DeFlow 1M
steps and 8 seeds, and of DeFlow with floq neither steps nor seeds, delta or depth of the critic are known. Here all have the
protocol's; `--set offline_steps=2000000` gives floq's.
"""

from __future__ import annotations

import argparse

from _family import Command, main, sweeps

from deflow_torchrl.tasks.protocols import get_protocol

METHODS = ("fql", "floq", "deflow", "deflow_floq")
FAMILIES = ("cube-double", "puzzle-3x3")


def commands(arguments: argparse.Namespace) -> list[Command]:
    protocol = get_protocol(arguments.protocol)
    tasks = FAMILIES if protocol.tasks is None else [*protocol.tasks["cube"], *protocol.tasks["puzzle"]]
    return sweeps(protocol, tasks, arguments.methods or METHODS, arguments)


if __name__ == "__main__":
    main(__doc__, "runs/bench-floq", commands)
