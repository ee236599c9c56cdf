"""Time of a full DeFlow update: sampled batch in, all four losses, backward, one optimiser step, target update.

    python benchmarks/throughput.py update --obs-dim 37 --action-dim 5 --batch-size 256 --steps 40 --json
    python benchmarks/throughput.py update --frozen-prior

With a frozen prior there are three losses, and the base actions come from a bank, whose lookup is part of the time. The full
update is then timed too, the two in turns. Machines are noisy: compare figures of interleaved runs as ratios, never single
numbers across machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import BaseActionBank
from deflow_torchrl.trainers import UpdateStep

Update = Callable[[TensorDict], object]


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


def make_frozen_update(arguments: argparse.Namespace, buffer: TensorDictReplayBuffer) -> Update:
    update = make_update(arguments)
    update.freeze_prior()
    bank = BaseActionBank(update.learner.prior, buffer)
    bank.fill()
    return lambda batch: update(bank(batch))


def make_transitions(arguments: argparse.Namespace, rows: int) -> TensorDict:
    device = torch.device(arguments.device)
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


def time_updates(
    updates: dict[str, Update], buffer: TensorDictReplayBuffer, *, steps: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of each update of each kind, in turns, the device synchronised at both ends."""
    milliseconds: dict[str, list[float]] = {name: [] for name in updates}
    for step in range(warmup + steps):
        for name, update in updates.items():
            batch = buffer.sample()
            cuda = batch.device is not None and batch.device.type == "cuda"
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            update(batch)
            if cuda:
                torch.cuda.synchronize()
            if step >= warmup:
                milliseconds[name].append((time.perf_counter() - began) * 1e3)
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
    verb.add_argument("--frozen-prior", action="store_true", help="a frozen prior and a bank of its base actions")
    verb.add_argument("--compile", action="store_true", help="torch.compile the losses (a minute or more at the start)")
    verb.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    transitions = make_transitions(arguments, 4 * arguments.batch_size)
    storage = LazyTensorStorage(len(transitions), device=arguments.device)
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=arguments.batch_size)
    buffer.extend(transitions)
    updates: dict[str, Update] = {"full": make_update(arguments)}
    if arguments.frozen_prior:
        updates["frozen"] = make_frozen_update(arguments, buffer)
    times = time_updates(updates, buffer, steps=arguments.steps, warmup=arguments.warmup)
    kind = "frozen" if arguments.frozen_prior else "full"
    medians = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
    result = {
        "ms_per_update": medians[kind],
        "ms_min": min(times[kind]),
        "ms_max": max(times[kind]),
        "steps": arguments.steps,
        "compile": arguments.compile,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(f"{result['ms_per_update']:.1f} ms per update (median of {arguments.steps}), {result['threads']} threads")
    if arguments.frozen_prior:
        # The median over rounds of the ratio within a round: what else the machine does then slows both.
        rounds = zip(times["full"], times["frozen"], strict=True)
        speedup = statistics.median(full / frozen for full, frozen in rounds)
        result |= {"full_ms_per_update": medians["full"], "speedup": speedup}
        print(f"{medians['full']:.1f} ms with a prior that learns: the frozen one is {speedup:.2f} times faster")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
