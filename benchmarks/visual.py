"""The five visual tasks of the paper, by every method of a protocol.

    python benchmarks/visual.py run --protocol tiny
    python benchmarks/visual.py run --protocol paper --device cuda --dry-run
    python benchmarks/visual.py render --protocol tiny

`paper` is the paper's: 500K steps, evaluations of 50 episodes at 300K, 400K and 500K averaged, 4 seeds, the published data (about
12 GB of memory a set: every frame is kept once). `tiny` shows on two cores, in under half an hour, that everything runs: it draws
2,000 frames of visual-cube-single-play, trains the smallest encoder for 60 updates and evaluates three short episodes. No success
is to be expected of it. Drawing needs a GL driver (MUJOCO_GL, egl where there is no display).
"""

from __future__ import annotations

import argparse

from _family import Command, main, sweeps

from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.paths import dataset_path
from deflow_torchrl.sources.generation import generated_root
from deflow_torchrl.tasks.protocols import get_protocol

DRAWN = {"episodes": 9, "val_episodes": 1, "max_steps": 200, "seed": 0}


def commands(arguments: argparse.Namespace) -> list[Command]:
    protocol = get_protocol(arguments.protocol)
    if protocol.tasks is None:
        return sweeps(protocol, ["visual"], arguments.methods or protocol.methods_of("visual"), arguments)
    tasks = list(protocol.tasks.get("visual", ()))
    made: list[Command] = []
    if arguments.data_root is None:
        dataset = parse_ogbench_name(tasks[0]).dataset
        arguments.data_root = generated_root(dataset, **DRAWN)
        if not dataset_path(dataset, arguments.data_root, "train").is_file():
            options = [part for name, value in DRAWN.items() for part in (f"--{name.replace('_', '-')}", str(value))]
            made = [["data", "generate", dataset, *options]]
    print(f"{protocol.name}: {protocol.summary}")
    run = sweeps(protocol, tasks, arguments.methods or protocol.methods_of("visual"), arguments)
    return [*made, *(command for command in run if command[0] == "sweep")]


if __name__ == "__main__":
    main(__doc__, "runs/bench-visual", commands)
