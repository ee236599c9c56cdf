"""Time of one action at batch 1 and 64: the policy as it trains, compiled, and exported as pt2 and ONNX, in turns.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 python benchmarks/latency.py --compile --against-jax PATH --jax-python PYTHON --json

An action is what a loop around an environment pays for it: observations as a numpy array in, noise drawn, actions as a numpy
array out. `--compile` adds torch.compile of the inner modules, which takes minutes for each batch size to start;
`--against-jax` adds the authors' jitted policy, see throughput.py. The kinds act in turns, each `--in-a-row` actions a turn, so
that what disturbs the machine disturbs all of them; compare the ratios. The first action of a turn, whose weights the others
have driven out of the cache as a simulator between two actions does, is reported by itself; it is no part of the medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from against_jax import JaxAgent, add_jax, check_jax
from roofline import clock, ratio
from tensordict import TensorDict
from throughput import make_update, time_updates

from deflow_torchrl.deploy import load_policy
from deflow_torchrl.export import FORMATS, export_policy
from deflow_torchrl.modules import DeFlowActor
from deflow_torchrl.processes import keep_freed_memory

Act = Callable[[np.ndarray], np.ndarray]


def eager(actor: DeFlowActor) -> Act:
    def act(observation: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return actor(TensorDict(observation=torch.from_numpy(observation)))["action"].numpy()

    return act


def compiled(actor: DeFlowActor, action_dim: int) -> Act:
    flow, refinement = actor.flow_policy.module, actor.refinement_policy.module
    inner = torch.compile(
        lambda observation, noise: refinement(observation, flow(observation, noise))[1], dynamic=False
    )

    def act(observation: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            noise = torch.randn(len(observation), action_dim)
            return inner(torch.from_numpy(observation), noise).numpy()

    return act


def make_policies(arguments: argparse.Namespace, folder: Path) -> dict[str, Act]:
    sizes = vars(arguments) | {"compile": False, "device": "cpu", "pixels": False, "encoder": ""}
    actor = make_update(argparse.Namespace(**sizes)).learner.policy
    assert isinstance(actor, DeFlowActor)
    acts = {"eager": eager(actor)}
    if arguments.compile:
        acts["compiled"] = compiled(actor, arguments.action_dim)
    for format in FORMATS:
        out = folder / f"policy.{format}"
        export_policy(actor, out, observation_dim=arguments.obs_dim, action_dim=arguments.action_dim)
        acts[format] = load_policy(out, trusted=True, threads=torch.get_num_threads())
    return acts


def run(arguments: argparse.Namespace, acts: dict[str, Act], rows: int) -> dict[str, dict[str, float]]:
    observation = np.random.default_rng(0).standard_normal((rows, arguments.obs_dim), np.float32)
    if arguments.compile:
        began = time.perf_counter()
        acts["compiled"](observation)
        print(f"batch {rows}: compiled in {time.perf_counter() - began:.0f} s")
    turns: dict[str, Callable[[], list[float]]] = {
        name: functools.partial(take_turn, functools.partial(act, observation), arguments.in_a_row)
        for name, act in acts.items()
    }
    jax = None
    if arguments.against_jax:
        jax = JaxAgent(argparse.Namespace(**(vars(arguments) | {"batch_size": rows})), latency=True)
        turns["jax"] = functools.partial(jax_turn, jax, arguments.in_a_row)
    try:
        times = time_updates(turns, steps=arguments.turns, warmup=1)
    finally:
        if jax is not None:
            jax.close()
    first = {name: [turn[0] for turn in taken] for name, taken in times.items()}
    later = {name: [statistics.median(turn[1:]) for turn in taken] for name, taken in times.items()}
    to = baseline(arguments)
    return {
        name: {
            "ms": statistics.median(later[name]),
            f"to_{to}": ratio(later[name], later[to]),
            "first_ms": statistics.median(first[name]),
            f"first_to_{to}": ratio(first[name], first[to]),
        }
        for name in times
    }


def jax_turn(jax: JaxAgent, number: int) -> list[float]:
    return [jax() for _ in range(number)]


def take_turn(act: Callable[[], np.ndarray], number: int) -> list[float]:
    return [clock(act, torch.device("cpu")) for _ in range(number)]


def baseline(arguments: argparse.Namespace) -> str:
    return "jax" if arguments.against_jax else "eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--obs-dim", type=int, default=37)
    parser.add_argument("--action-dim", type=int, default=5)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[512] * 4)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--turns", type=int, default=20, help="of each kind")
    parser.add_argument("--in-a-row", type=int, default=20, help="actions in a turn")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    add_jax(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    if arguments.turns < 1 or arguments.in_a_row < 2 or min(arguments.batch_sizes) < 1:
        parser.error("--turns and --batch-sizes must be at least 1, --in-a-row at least 2")
    check_jax(parser, arguments)
    keep_freed_memory()  # as `deflow train` does
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        acts = make_policies(arguments, Path(folder))
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"medians of {arguments.turns} turns of {arguments.in_a_row} actions"
    )
    results = {rows: run(arguments, acts, rows) for rows in arguments.batch_sizes}
    to = baseline(arguments)
    print(f"| batch | policy | ms | to {to} | first of a turn, ms | to {to} |\n|---|---|---|---|---|---|")
    for rows, result in results.items():
        for name, taken in result.items():
            figures = " | ".join(f"{value:.2f}" for value in taken.values())
            print(f"| {rows} | {name} | {figures} |")
    if arguments.json:
        print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "batch": results}))


if __name__ == "__main__":
    main()
