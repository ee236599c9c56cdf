"""Time of a full DeFlow update: sampled batch in, all four losses, backward, one optimiser step, target update.

    python benchmarks/throughput.py update --obs-dim 37 --action-dim 5 --batch-size 256 --steps 40 --json

Machines are noisy: compare figures of interleaved runs as ratios, never single numbers across machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from tensordict import TensorDict

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.trainers import UpdateStep


def make_update(arguments: argparse.Namespace) -> UpdateStep:
    problem = ProblemSpec(
        observation_dim=arguments.obs_dim,
        action_dim=arguments.action_dim,
        hidden_dims=arguments.hidden_dims,
        gamma=0.99,
        q_aggregation="mean",
        target_divergence=1e-3,
        device=torch.device(arguments.device),
    )
    return UpdateStep(get_algorithm("deflow").build(DeFlowConfig(), problem), compile_loss=arguments.compile)


def make_batch(arguments: argparse.Namespace) -> TensorDict:
    rows, device = arguments.batch_size, torch.device(arguments.device)
    flags = {name: torch.rand(rows, 1, device=device) < 0.01 for name in ("terminated", "truncated")}
    return TensorDict(
        {
            "observation": torch.randn(rows, arguments.obs_dim, device=device),
            "action": torch.rand(rows, arguments.action_dim, device=device) * 2 - 1,
            "next": {
                "observation": torch.randn(rows, arguments.obs_dim, device=device),
                "reward": -torch.ones(rows, 1, device=device),
                "done": flags["terminated"] | flags["truncated"],
                **flags,
            },
        },
        batch_size=[rows],
        device=device,
    )


def time_updates(update: UpdateStep, batch: TensorDict, *, steps: int, warmup: int) -> list[float]:
    """Milliseconds of each update, the device synchronised at both ends."""
    cuda = batch.device is not None and batch.device.type == "cuda"
    milliseconds = []
    for step in range(warmup + steps):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        update(batch)
        if cuda:
            torch.cuda.synchronize()
        if step >= warmup:
            milliseconds.append((time.perf_counter() - began) * 1e3)
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("update", help="a full update at the given sizes (default: the paper's)")
    verb.add_argument("--obs-dim", type=int, default=37)
    verb.add_argument("--action-dim", type=int, default=5)
    verb.add_argument("--batch-size", type=int, default=256)
    verb.add_argument("--hidden-dims", type=int, nargs="+", default=[512] * 4)
    verb.add_argument("--steps", type=int, default=40)
    verb.add_argument("--warmup", type=int, default=5)
    verb.add_argument("--device", default="cpu")
    verb.add_argument("--compile", action="store_true", help="torch.compile the losses (a minute or more at the start)")
    verb.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    milliseconds = time_updates(
        make_update(arguments), make_batch(arguments), steps=arguments.steps, warmup=arguments.warmup
    )
    result = {
        "ms_per_update": statistics.median(milliseconds),
        "ms_min": min(milliseconds),
        "ms_max": max(milliseconds),
        "steps": arguments.steps,
        "compile": arguments.compile,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(f"{result['ms_per_update']:.1f} ms per update (median of {arguments.steps}), {result['threads']} threads")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
