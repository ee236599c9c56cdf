"""Milliseconds a step of FQL and DeFlow, offline, online and acting, on this machine and in turns: Table 4.

    python benchmarks/runtime.py --protocol paper --steps 40 --json
    python benchmarks/runtime.py --protocol small

* offline: a batch is drawn and the method updated by it, critics, actor, optimiser and targets;
* online: one action in the task's simulator, its transition stored, then the same with a batch of the union;
* inference: one action of one state.

`paper` has the paper's networks and batch on cube-double, `small` those of deflow_torchrl/tasks/protocols.json on cube-single.
Data are random numbers of the task's sizes: what is computed does not depend on them. On a GPU updates run one by one here, not
in the CUDA graphs that `deflow train` captures (see throughput.py). The paper does not say whether its online step includes the
simulator's; here it does. Its numbers, of another machine and another framework, are printed beside ours, marked as copied: only
the ratios can be compared. Ours are medians over rounds in which the kinds take turns, the ratios medians of the ratio within a
round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from roofline import clock, ratio
from tensordict import TensorDict
from throughput import time_updates

from deflow_torchrl.algorithms import Learner, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import OfflineOnlineReplayBuffer, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.data.base_actions import BaseActionBank
from deflow_torchrl.envs.factory import make_gym_env
from deflow_torchrl.errors import InputError
from deflow_torchrl.processes import keep_freed_memory
from deflow_torchrl.tasks.protocols import get_protocol
from deflow_torchrl.trainers import UpdateStep
from deflow_torchrl.trainers.collection import OnlineExperience
from deflow_torchrl.trainers.online import OnlinePhase

TASKS = {"paper": "cube-double-play-singletask-v0", "small": "cube-single-noisy-singletask-task2-v0"}
HIDDEN_DIMS, BATCH_SIZE = [512] * 4, 256  # where a protocol leaves them to the paper
SETTINGS = {"fql": {"alpha": 300.0}, "deflow": {}}  # FQL's has no default; its value does not change the time
FROZEN = "deflow, frozen prior"
# Table 4 of the paper: milliseconds on an RTX 3090, in JAX.
COPIED = {
    "offline": {"fql": 2.2, "deflow": 2.4},
    "online": {"fql": 5.1, "deflow": 9.3, FROZEN: 5.2},
    "inference": {"fql": 4.2, "deflow": 4.5},
}


class Sizes:
    """The task's and the protocol's."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        protocol = get_protocol(arguments.protocol)
        if protocol.name not in TASKS:
            raise InputError(f"Table 4 has no task for protocol {protocol.name}; there are {', '.join(TASKS)}")
        self.task, self.device = TASKS[protocol.name], torch.device(arguments.device)
        self.hidden_dims = arguments.hidden_dims or protocol.settings.get("hidden_dims", HIDDEN_DIMS)
        self.batch_size = protocol.settings.get("batch_size", BATCH_SIZE)
        env = make_gym_env(self.task)
        (self.observation_dim,), (self.action_dim,) = env.observation_space.shape, env.action_space.shape
        env.close()
        self.dataset = self.random_data(arguments.transitions)

    def random_data(self, rows: int) -> TransitionDataset:
        rng = np.random.default_rng(0)
        states = rng.standard_normal((rows + 1, self.observation_dim), np.float32)
        ends = np.arange(1, rows + 1) == rows
        return TransitionDataset.from_arrays(
            states[:-1],
            rng.uniform(-1, 1, (rows, self.action_dim)).astype(np.float32),
            -np.ones(rows, np.float32),
            np.zeros(rows),
            ends,
            next_observations=states[1:],
        )

    def learner(self, method: str) -> Learner:
        algorithm = get_algorithm(method)
        problem = ProblemSpec(
            observation_dim=self.observation_dim,
            action_dim=self.action_dim,
            hidden_dims=self.hidden_dims,
            gamma=0.99,
            q_aggregation="mean",
            target_divergence=1e-3,
            device=self.device,
        )
        return algorithm.build(algorithm.config(**SETTINGS[method]), problem)


def offline(sizes: Sizes, method: str) -> Callable[[], float]:
    buffer = TransitionReplayBuffer(sizes.dataset.to(sizes.device), batch_size=sizes.batch_size)
    update = UpdateStep(sizes.learner(method))

    def step() -> None:
        update(buffer.sample())

    return lambda: clock(step, sizes.device)


def inference(sizes: Sizes, method: str) -> Callable[[], float]:
    policy = sizes.learner(method).policy
    observation = np.random.default_rng(0).standard_normal((1, sizes.observation_dim), np.float32)

    def act() -> np.ndarray:
        with torch.no_grad():
            state = torch.from_numpy(observation).to(sizes.device)
            return policy(TensorDict(observation=state, batch_size=[1]))["action"].cpu().numpy()

    return lambda: clock(act, sizes.device)


def online(sizes: Sizes, name: str, steps: int, stack: ExitStack) -> Callable[[], float]:
    method = name.partition(",")[0]
    learner = sizes.learner(method)
    update = UpdateStep(learner)
    buffer = OfflineOnlineReplayBuffer(
        sizes.dataset, online_capacity=steps, batch_size=sizes.batch_size, device=sizes.device
    )
    bank = BaseActionBank(learner.prior, buffer) if name == FROZEN else None

    def experience(add: Callable, discard: Callable) -> OnlineExperience:
        return OnlineExperience(
            sizes.task, learner.online_policy, seed=0, add=add, discard=discard, device=sizes.device
        )

    phase = OnlinePhase(buffer, experience, bank=bank)
    stack.callback(phase.close)
    phase.begin(update)

    def step() -> None:
        phase.step()
        update(phase.sample())

    return lambda: clock(step, sizes.device)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    sizes = Sizes(arguments)
    milliseconds, to_fql = {}, {}
    with ExitStack() as stack:
        makers = {
            "offline": lambda name: offline(sizes, name),
            "online": lambda name: online(sizes, name, arguments.warmup + arguments.steps, stack),
            "inference": lambda name: inference(sizes, name),
        }
        for phase, copied in COPIED.items():
            timed = {name: makers[phase](name) for name in copied}
            times = time_updates(timed, steps=arguments.steps, warmup=arguments.warmup)
            milliseconds[phase] = {name: statistics.median(taken) for name, taken in times.items()}
            to_fql[phase] = {name: ratio(taken, times["fql"]) for name, taken in times.items()}
    cuda = sizes.device.type == "cuda"
    return {
        "protocol": arguments.protocol,
        "task": sizes.task,
        "hidden_dims": list(sizes.hidden_dims),
        "batch_size": sizes.batch_size,
        "device": torch.cuda.get_device_name(sizes.device) if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": arguments.steps,
        "ms": milliseconds,
        "to_fql": to_fql,
        "copied_ms": COPIED,
    }


def describe(result: dict) -> str:
    lines = [
        f"{result['task']}, networks {result['hidden_dims']}, batches of {result['batch_size']}; {result['device']}, "
        f"{result['threads']} thread(s), torch {result['torch']}; medians of {result['steps']} rounds",
        "",
        "| step | method | ms | to FQL | ms, copied from the paper | to FQL, of the copied |",
        "|---|---|---|---|---|---|",
    ]
    for phase, copied in COPIED.items():
        for name, of_paper in copied.items():
            figures = f"{result['ms'][phase][name]:.2f} | {result['to_fql'][phase][name]:.2f}"
            lines.append(f"| {phase} | {name} | {figures} | {of_paper} | {of_paper / copied['fql']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="paper", help="paper or small [default: %(default)s]")
    parser.add_argument("--device", default="cpu", help="[default: %(default)s]")
    parser.add_argument("--steps", type=int, default=40, help="rounds that are timed [default: %(default)s]")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them [default: %(default)s]")
    parser.add_argument("--transitions", type=int, default=2_000, help="of random data [default: %(default)s]")
    parser.add_argument("--hidden-dims", type=int, nargs="+", help="[default: the protocol's]")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.transitions) < 1 or arguments.warmup < 0:
        parser.error("--steps and --transitions must be at least 1, --warmup at least 0")
    keep_freed_memory()  # as `deflow train` does
    torch.manual_seed(0)
    try:
        result = run(arguments)
    except InputError as error:
        print(f"runtime.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(describe(result))
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
