"""Environment steps a second, and how long the learner waits for them: TorchRL's collector in the learner's process or beside it.

    python benchmarks/collectors.py --task pointmaze-medium-navigate-singletask-task1-v0 --workers 2 --json

The loop is the online phase's: a step in the environment, its transition into the buffer, one DeFlow update on a batch
(utd 1). `Collector` acts in the learner's process, so the learner waits for every step. `MultiSyncCollector` collects the next
chunk while the learner is busy with the last one; its policy is older by one to two chunks of updates. The arms take turns,
so that all meet the same noise of the machine. Without a spare core for the workers, they take the learner's time instead.
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
from deflow_torchrl.envs import make_gym_env
from deflow_torchrl.processes import available_cores
from deflow_torchrl.trainers import OnlineExperience, UpdateStep


class Arm:
    """A run of its own: networks, buffer, environments.

    Args:
        arguments: the script's.
        workers: processes; 0 acts here.
        chunk: steps per collection.
    """

    def __init__(self, arguments: argparse.Namespace, workers: int, chunk: int) -> None:
        torch.manual_seed(0)
        env = make_gym_env(arguments.task)
        sizes = env.observation_space.shape[-1], env.action_space.shape[-1]
        env.close()
        problem = ProblemSpec(
            observation_dim=sizes[0],
            action_dim=sizes[1],
            hidden_dims=arguments.hidden_dims,
            gamma=0.99,
            q_aggregation="mean",
            target_divergence=1e-3,
            device=torch.device(arguments.device),
        )
        self.update = UpdateStep(get_algorithm("deflow").build(DeFlowConfig(), problem))
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(arguments.rows + 10**5, device=arguments.device), batch_size=arguments.batch_size
        )
        self.buffer.extend(random_transitions(arguments.rows, *sizes))
        self.experience = OnlineExperience(
            arguments.task,
            self.update.learner.policy,
            seed=0,
            add=self.add,
            discard=lambda index: None,
            device=arguments.device,
            workers=workers,
            steps_per_collection=chunk,
        )
        self.collector = "MultiSyncCollector" if workers else "Collector"
        self.workers, self.chunk = workers, chunk
        self.rates: list[float] = []
        self.waiting: list[float] = []

    def add(self, transition: TensorDict) -> torch.Tensor:
        return self.buffer.extend(transition)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.experience.step()
            self.update(self.buffer.sample())

    def measure(self, steps: int, synchronize: Callable[[], None]) -> None:
        synchronize()
        waited, began = self.experience.waiting_seconds, time.perf_counter()
        self.run(steps)
        synchronize()
        seconds = time.perf_counter() - began
        self.rates.append(steps / seconds)
        self.waiting.append((self.experience.waiting_seconds - waited) / seconds)
        self.experience.state_dict()  # waits for the chunk under way, so that no other arm is measured beside it

    def result(self) -> dict[str, object]:
        return {
            "collector": self.collector,
            "workers": self.workers,
            "steps_per_collection": self.chunk,
            "steps_per_second": statistics.median(self.rates),
            "steps_per_second_all": self.rates,
            "waiting_share": statistics.median(self.waiting),
            "waiting_share_all": self.waiting,
        }


def random_transitions(rows: int, observation_dim: int, action_dim: int) -> TensorDict:
    flags = {name: torch.zeros(rows, 1, dtype=torch.bool) for name in ("terminated", "truncated", "done")}
    return TensorDict(
        {
            "observation": torch.randn(rows, observation_dim),
            "action": torch.rand(rows, action_dim) * 2 - 1,
            "next": {
                "observation": torch.randn(rows, observation_dim),
                "reward": -torch.ones(rows, 1),
                **flags,
            },
        },
        batch_size=[rows],
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="pointmaze-medium-navigate-singletask-task1-v0")
    parser.add_argument("--workers", type=int, default=2, help="processes of MultiSyncCollector")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 16], help="steps per collection, over all workers")
    parser.add_argument("--steps", type=int, default=320, help="environment steps of an arm in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rows", type=int, default=10_000, help="transitions in the buffer at the start")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    if min(arguments.workers, arguments.steps, arguments.rounds, *arguments.chunks) < 1:
        parser.error("--workers, --chunks, --steps and --rounds must be positive")
    return arguments


def main() -> None:
    arguments = parse()
    synchronize = torch.cuda.synchronize if torch.device(arguments.device).type == "cuda" else lambda: None
    # A chunk is at least one step of each worker.
    chunks = dict.fromkeys(-(-chunk // arguments.workers) * arguments.workers for chunk in arguments.chunks)
    arms = [Arm(arguments, 0, chunk) for chunk in dict.fromkeys(arguments.chunks)]
    arms += [Arm(arguments, arguments.workers, chunk) for chunk in chunks]
    try:
        for arm in arms:
            arm.run(2 * arm.chunk + 8)  # the processes start, the optimiser's state is made
            arm.experience.state_dict()
        for _ in range(arguments.rounds):
            for arm in arms:
                arm.measure(arguments.steps, synchronize)
    finally:
        for arm in arms:
            arm.experience.close()
    print(f"{'collector':20} {'workers':>7} {'steps per collection':>21} {'steps/s':>8} {'learner waits':>14}")
    for arm in arms:
        rate, share = statistics.median(arm.rates), statistics.median(arm.waiting)
        print(f"{arm.collector:20} {arm.workers:7} {arm.chunk:21} {rate:8.1f} {share:14.1%}")
    print(
        f"medians of {arguments.rounds} rounds of {arguments.steps} steps; {torch.get_num_threads()} threads of the learner's"
    )
    if arguments.json:
        facts = {
            "task": arguments.task,
            "hidden_dims": arguments.hidden_dims,
            "batch_size": arguments.batch_size,
            "steps": arguments.steps,
            "rounds": arguments.rounds,
            "device": arguments.device,
            "threads": torch.get_num_threads(),
            "cores": available_cores(),
            "torch": torch.__version__,
        }
        print(json.dumps({**facts, "arms": [arm.result() for arm in arms]}))


if __name__ == "__main__":
    main()
