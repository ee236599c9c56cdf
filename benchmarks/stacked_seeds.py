"""Time of one update of S stacked seeds against S separate updates one after another, and against one, in turns.

    python benchmarks/stacked_seeds.py --seeds 8 --steps 10 --json
    python benchmarks/stacked_seeds.py --device cuda --steps 200

On a GPU all three are timed as `deflow train` runs them there: whole updates, drawing included, in CUDA graphs, as milliseconds
of one update; `separate` is then so many times `one`. Machines are noisy: the ratios are medians over rounds of the ratio within
a round.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable

import torch
from roofline import clock, ratio
from tensordict import TensorDict
from throughput import add_sizes, make_buffer, make_update, time_updates

from deflow_torchrl.processes import keep_freed_memory
from deflow_torchrl.trainers import StackedUpdate
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.trainers.update import Update


def graphed(update: Update, transitions: TensorDict, arguments: argparse.Namespace, *shape: int) -> Callable[[], float]:
    """A call that does a row of updates in CUDA graphs and returns the milliseconds of one."""
    size, device = (*shape, arguments.batch_size), torch.device(arguments.device)
    replayed = GraphedUpdate(update, lambda: transitions[torch.randint(len(transitions), size, device=device)])
    row = 10 * replayed.updates_per_replay

    def once() -> float:
        replayed(replayed.updates_per_replay)
        return clock(lambda: replayed(row), device) / row

    return once


def run(arguments: argparse.Namespace) -> dict[str, object]:
    device, seeds = torch.device(arguments.device), range(arguments.seeds)
    separate = [make_update(arguments) for _ in seeds]
    stacked = StackedUpdate([make_update(arguments) for _ in seeds])
    buffer = make_buffer(arguments)
    batches = make_buffer(argparse.Namespace(**{**vars(arguments), "batch_size": len(seeds) * arguments.batch_size}))

    def all_separately() -> None:
        for update in separate:
            update(buffer.sample())

    def all_stacked() -> None:
        stacked(batches.sample().reshape(len(seeds), -1))

    def one() -> None:
        separate[0](buffer.sample())

    kinds = {"stacked": all_stacked, "separate": all_separately, "one": one}
    timed = {name: functools.partial(clock, kind, device) for name, kind in kinds.items()}
    if device.type == "cuda":
        transitions = buffer[:]
        single, several = (
            graphed(separate[0], transitions, arguments),
            graphed(stacked, transitions, arguments, len(seeds)),
        )
        timed = {"stacked": several, "separate": lambda: len(seeds) * single(), "one": single}
    times = time_updates(timed, steps=arguments.steps, warmup=arguments.warmup)
    result: dict[str, object] = {f"{name}_ms": statistics.median(each) for name, each in times.items()}
    result |= {
        "seeds": len(seeds),
        "to_separate": ratio(times["stacked"], times["separate"]),
        "to_one": ratio(times["stacked"], times["one"]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else arguments.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(
        f"{result['stacked_ms']:.1f} ms for {len(seeds)} stacked seeds (median of {arguments.steps}, in turns): "
        f"{result['to_separate']:.2f} of the separate updates' {result['separate_ms']:.1f} ms, {result['to_one']:.2f} times "
        f"one's {result['one_ms']:.1f} ms"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--seeds", type=int, default=8, help="how many are stacked")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    if arguments.compile:
        parser.error("--compile: stacked losses cannot be compiled")
    keep_freed_memory()
    result = run(arguments)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
