"""What only a GPU can show, in under nine minutes: update times, stacked seeds, pictures, JAX, the `gpu` tests and a real run.

    python benchmarks/gpu.py --out gpu.json [--against-jax PATH --jax-python PYTHON]
    python benchmarks/gpu.py --show gpu.json
    python benchmarks/gpu.py --tiny --device cpu --out tiny.json     # seconds: whether the script itself works

It needs a checkout and a torch of 2.9 or newer that sees the GPU. A machine without a package registry takes the rest from a
folder that `make wheelhouse PYTHON=3.12 EXTRAS=cli ALSO="gymnasium pytest hypothesis"` fills elsewhere (under 50 MiB):

    pip install --no-index --find-links wheelhouse 'deflow-torchrl[cli]' gymnasium pytest hypothesis

Each part runs in a process of its own, with a time limit. FILE is written anew after every figure, so a kill loses none; a part
that fails or is cut off is noted with its error, and the rest goes on. `--only` chooses parts. Times are medians in turns. JAX
is timed where PATH is a checkout of the authors' code and PYTHON an interpreter that runs it. The real run trains DeFlow with
the paper's networks, batch and learning rate on random actions in Pendulum for as long as is left, and evaluates prior and
DeFlow on the way.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from against_jax import JaxAgent, add_jax, check_jax
from roofline import ratio
from throughput import graphed, make_buffer, make_update, stopwatch, time_updates

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.envs import make_gym_env
from deflow_torchrl.paths import write_text
from deflow_torchrl.processes import die_with_parent, interruptible, keep_freed_memory
from deflow_torchrl.reports.records import git_commit, hardware
from deflow_torchrl.trainers import Evaluator, StackedUpdate, UpdateStep
from deflow_torchrl.trainers.graphed import GraphedUpdate
from deflow_torchrl.versions import package_versions

ROOT = Path(__file__).parents[1]
GPU_TESTS = ("tests/trainers/test_checkpoint.py", "tests/data/test_union_buffer.py", "tests/trainers/test_graphed.py")
# A kind of update: in a graph or one by one, the precision of all its products, that of the sampler's.
KINDS = {
    "eager": (False, "highest", "highest"),
    "graph": (True, "highest", "highest"),
    "graph, sampler in bfloat16": (True, "highest", "bfloat16"),
    "graph, TF32": (True, "high", "highest"),
    "graph, TF32, sampler in bfloat16": (True, "high", "bfloat16"),
}
SIZES = (
    "obs_dim", "action_dim", "batch_size", "hidden_dims", "image_shape", "encoder", "in_a_row", "updates_per_replay",
)  # fmt: skip
PENDULUM = "gym:Pendulum-v1"
Emit = Callable[[str, Any], None]
"""``emit(name, value)`` keeps a figure of a part at once."""


@dataclass(frozen=True)
class Scale:
    """Sizes of everything: the paper's, or those that try the script."""

    obs_dim: int = 37
    action_dim: int = 5
    batch_size: int = 256
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    image_shape: tuple[int, ...] = (64, 64, 9)
    encoder: str = "impala_small"
    seeds: tuple[int, ...] = (1, 4, 8)
    rounds: int = 20
    in_a_row: int = 5
    updates_per_replay: int = 10
    tests: tuple[str, ...] = GPU_TESTS
    transitions: int = 50_000
    episodes: int = 20
    episode_steps: int = 200
    evaluations: int = 8
    run_seconds: float = math.inf


PAPER = Scale()
TINY = Scale(
    obs_dim=4,
    action_dim=2,
    batch_size=8,
    hidden_dims=(8, 8),
    image_shape=(6, 6, 2),
    encoder="impala_debug",
    seeds=(1, 2),
    rounds=1,
    in_a_row=1,
    updates_per_replay=2,
    tests=GPU_TESTS[:1],
    transitions=400,
    episodes=2,
    episode_steps=20,
    evaluations=1,
    run_seconds=0.5,
)


@dataclass(frozen=True)
class Task:
    """What a part is given."""

    scale: Scale
    device: str
    seconds: float
    against_jax: Path | None
    jax_python: str

    def sizes(self, **others: Any) -> argparse.Namespace:
        """Arguments as throughput.py has them."""
        sizes = {name: getattr(self.scale, name) for name in SIZES}
        sizes |= {"device": self.device, "compile": False, "pixels": False}
        sizes |= {"against_jax": self.against_jax, "jax_python": self.jax_python}
        return argparse.Namespace(**{**sizes, **others})


def machine(task: Task, emit: Emit) -> None:
    """The device, the versions and the commit."""
    torch.ones(1, device=task.device).sum().item()
    emit("versions", package_versions("jax", "flax", "optax"))
    emit("hardware", hardware())
    emit("commit", git_commit())
    emit("cuda", torch.version.cuda)
    if torch.device(task.device).type == "cuda":
        properties = torch.cuda.get_device_properties(task.device)
        emit("memory_gb", properties.total_memory / 1e9)
        emit("capability", f"{properties.major}.{properties.minor}")


def kinds_of_updates(task: Task, emit: Emit, names: list[str], **others: Any) -> dict[str, Callable[[], float]]:
    """Clocks of these kinds of updates, each tried once: one that fails is noted and left out."""
    clocks: dict[str, Callable[[], float]] = {}
    for name in names:
        in_graph, precision, sampler = KINDS[name]
        sizes = task.sizes(precision=precision, **others)
        try:
            update, buffer = make_update(sizes), make_buffer(sizes)
            update.learner.loss.sampler_precision = sampler
            if in_graph:
                once = graphed(update, buffer[:], sizes)
            else:
                once = stopwatch(update, buffer, torch.device(task.device), in_a_row=sizes.in_a_row)
            once()
        except RuntimeError as error:
            emit(name, {"error": str(error)})
        else:
            clocks[name] = once
    return clocks


def time_in_turns(task: Task, emit: Emit, clocks: dict[str, Callable[[], float]], *, to: str) -> None:
    """Milliseconds of an update of each kind, and the ratio to one of them within a round; written after every round."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for number in range(task.scale.rounds):
        for name, taken in time_updates(clocks, steps=1, warmup=int(number == 0)).items():
            times[name] += taken
        for name, taken in times.items():
            relative = {} if to not in times else {f"to {to}": ratio(taken, times[to])}
            emit(name, {"ms": statistics.median(taken), "ms_min": min(taken), "ms_max": max(taken), **relative})


def updates(task: Task, emit: Emit) -> None:
    """A full update: one by one, in graphs, and in graphs with fewer digits."""
    time_in_turns(task, emit, kinds_of_updates(task, emit, list(KINDS)), to="eager")


def seeds(task: Task, emit: Emit) -> None:
    """Updates of stacked seeds in graphs: milliseconds of one update of all seeds."""
    clocks, sizes = {}, task.sizes()
    for count in task.scale.seeds:
        try:
            stacked = StackedUpdate([make_update(sizes) for _ in range(count)])
            once = graphed(stacked, make_buffer(sizes)[:], sizes, count)
            once()
        except RuntimeError as error:
            emit(f"{count} stacked", {"error": str(error)})
        else:
            clocks[f"{count} stacked"] = once
    time_in_turns(task, emit, clocks, to=f"{task.scale.seeds[0]} stacked")


def pixels(task: Task, emit: Emit) -> None:
    """Updates on pictures."""
    names = ["eager", "graph", "graph, TF32, sampler in bfloat16"]
    clocks = kinds_of_updates(task, emit, names, pixels=True, in_a_row=1, updates_per_replay=2)
    time_in_turns(task, emit, clocks, to="eager")


def beside_jax(task: Task, emit: Emit) -> None:
    """Updates in turns with the authors' agent."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the memory that is free
    sizes = task.sizes()
    agent = JaxAgent(sizes)
    emit("about", agent.about)
    clocks = kinds_of_updates(task, emit, ["graph", "graph, TF32"])
    clocks["authors' JAX"] = partial(agent, sizes.in_a_row)
    time_in_turns(task, emit, clocks, to="authors' JAX")
    agent.close()


class _Outcomes:
    """A plugin of pytest that keeps the outcome of each test as soon as it is known."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.counts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        self.emit("outcomes", dict(self.counts))
        if report.outcome == "failed":
            self.failed[report.nodeid] = str(report.longrepr)[-1_500:]
            self.emit("failed", self.failed)


def gpu_tests(task: Task, emit: Emit) -> None:
    """The tests that are marked `gpu`."""
    import pytest

    os.chdir(ROOT)
    outcomes = _Outcomes(emit)
    code = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", *task.scale.tests], plugins=[outcomes])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {code!s}; {len(outcomes.failed)} tests failed")


def random_swings(scale: Scale) -> TransitionDataset:
    """Transitions of random actions in the pendulum's simulator."""
    rng = np.random.default_rng(0)
    env = make_gym_env(PENDULUM, max_episode_steps=scale.episode_steps)
    columns: dict[str, list[Any]] = {
        "observations": [],
        "actions": [],
        "rewards": [],
        "next_observations": [],
        "timeouts": [],
    }
    observation, _ = env.reset(seed=0)
    for _ in range(scale.transitions):
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        following, reward, _, truncated, _ = env.step(action)
        for name, value in zip(columns, (observation, action, reward, following, truncated), strict=True):
            columns[name].append(value)
        observation = env.reset()[0] if truncated else following
    env.close()
    arrays = {name: np.asarray(values, np.float32) for name, values in columns.items()}
    return TransitionDataset.from_arrays(terminals=np.zeros(scale.transitions), **arrays)


def real_run(task: Task, emit: Emit) -> None:
    """DeFlow on the pendulum, for the seconds there are; returns of prior and DeFlow on the way."""
    began, scale = time.monotonic(), task.scale
    dataset = random_swings(scale).to(task.device)
    problem = ProblemSpec(
        observation_dim=dataset.observation_shape[-1], action_dim=1, hidden_dims=list(scale.hidden_dims), gamma=0.98,
        q_aggregation="mean", target_divergence=0.3, device=torch.device(task.device),
    )  # fmt: skip
    torch.manual_seed(0)
    learner = get_algorithm("deflow").build(DeFlowConfig(), problem)
    draw = partial(dataset.draw, scale.batch_size)
    graphs = GraphedUpdate(UpdateStep(learner), draw, updates_per_replay=scale.updates_per_replay)
    curve: list[dict[str, Any]] = []
    step, trained, row = 0, 0.0, 10 * scale.updates_per_replay

    def evaluate(evaluator: Evaluator, losses: Mapping[str, float]) -> None:
        returns = {
            name: float(evaluator.run(policy, episodes=scale.episodes).episode_return.mean())
            for name, policy in learner.evaluated_policies.items()
        }
        curve.append({"step": step, "training_seconds": trained, **losses, **returns})
        emit("curve", curve)

    with Evaluator(PENDULUM, num_envs=scale.episodes, device=task.device, max_steps=scale.episode_steps) as evaluator:
        asked = time.monotonic()
        evaluate(evaluator, {})
        evaluation = time.monotonic() - asked  # what must be left for the last one, and more
        ends = min(began + task.seconds - 2 * evaluation - 5, time.monotonic() + scale.run_seconds)
        each = (ends - time.monotonic()) / scale.evaluations
        while True:
            until = min(ends, time.monotonic() + max(each - evaluation, 0))
            started = time.monotonic()
            while True:
                out, _ = graphs(row)
                step += row
                losses = {name: float(value.mean()) for name, value in out.items()}  # waits for the device
                if time.monotonic() >= until:
                    break
            trained += time.monotonic() - started
            if not all(map(math.isfinite, losses.values())):
                raise RuntimeError(f"a loss is not finite at step {step}: {losses}")
            evaluate(evaluator, losses)
            emit("ms_per_update", 1e3 * trained / step)
            emit("in_graphs", graphs.fell_back or torch.device(task.device).type == "cuda")
            if time.monotonic() + evaluation >= ends:
                return


@dataclass(frozen=True)
class Part:
    """A part, and how many seconds it may take."""

    work: Callable[[Task, Emit], None]
    seconds: float


PARTS = {
    "machine": Part(machine, 30),
    "updates": Part(updates, 100),
    "seeds": Part(seeds, 70),
    "pixels": Part(pixels, 60),
    "jax": Part(beside_jax, 80),
    "tests": Part(gpu_tests, 120),
    "run": Part(real_run, 530),
}


def child(work: Callable[[Task, Emit], None], task: Task, pipe: Connection, log: Path) -> None:
    os.setsid()
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout = sys.stderr = stream = log.open("w", buffering=1, encoding="utf-8")
    for descriptor in (1, 2):  # of what it starts, and of a crash
        os.dup2(stream.fileno(), descriptor)
    keep_freed_memory()
    torch.manual_seed(0)
    work(task, lambda name, value: pipe.send((name, value)))
    pipe.send(None)


def run_part(part: Part, task: Task, start: str, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run a part in a process of its own; ``keep`` is called with every new figure."""
    context: Any = multiprocessing.get_context(start)
    reader, writer = context.Pipe(duplex=False)
    began = time.monotonic()
    found: dict[str, Any] = {"status": "begun", "figures": {}}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = context.Process(target=child, args=(part.work, task, writer, log))
        process.start()
        writer.close()
        try:
            found["status"] = f"cut off after {task.seconds:.3g} s"
            while (left := began + task.seconds - time.monotonic()) > 0 and reader.poll(left):
                message = reader.recv()
                if message is None:
                    found["status"] = "done"
                    break
                found["figures"][message[0]] = message[1]
                keep(found)
        except EOFError:
            found["status"] = "failed"
        finally:
            if found["status"] == "done":
                process.join(2)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it and what it started
            process.join()
            reader.close()
        if found["status"] != "done":
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            lines = [line.rstrip() for line in text.splitlines() if line.strip()]
            found |= {"error": lines[-1] if lines else f"exit code {process.exitcode}", "log": lines[-40:]}
    return found | {"seconds": time.monotonic() - began}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the parts; the result, which is in the file too."""
    began, start = time.monotonic(), arguments.start
    result: dict[str, Any] = {"command": sys.argv[1:], "device": arguments.device, "tiny": arguments.tiny, "parts": {}}

    def keep(name: str, found: dict[str, Any]) -> None:
        result["parts"][name] = found
        write_text(arguments.out, json.dumps(result, indent=1) + "\n")

    def make(name: str, start: str) -> dict[str, Any]:
        part, left = PARTS[name], began + arguments.seconds - time.monotonic()
        if left < 1:
            return {"status": "left out", "error": "no time was left", "figures": {}}
        if name == "jax" and arguments.against_jax is None:
            return {"status": "left out", "error": "no --against-jax PATH was given", "figures": {}}
        scale, limit = TINY if arguments.tiny else PAPER, min(part.seconds, left)
        task = Task(scale, arguments.device, limit, arguments.against_jax, arguments.jax_python)
        return run_part(part, task, start, partial(keep, name))

    for name in dict.fromkeys(["machine", *arguments.only]):
        found = make(name, start)
        if name == "machine" and found["status"] != "done" and start == "fork":
            start = "spawn"  # a library that looked for devices when it was imported keeps forked processes from them
            found = make(name, start)
        keep(name, found)
        seconds = f", {found['seconds']:.0f} s" if "seconds" in found else ""
        error = f": {found['error']}" if "error" in found else ""
        print(f"{name}: {found['status']}{seconds}{error}", file=sys.stderr, flush=True)
    return result


def show(result: Mapping[str, Any]) -> str:
    """The tables of a result, in Markdown."""
    parts = result["parts"]
    figures = {name: part["figures"] for name, part in parts.items()}
    about = figures.get("machine", {})
    versions = about.get("versions", {})
    named = [about.get("hardware", {}).get("accelerator") or result["device"], f"CUDA {about.get('cuda')}"]
    named += [f"{name} {versions[name]}" for name in ("torch", "torchrl", "jax", "python") if name in versions]
    lines = [f"{', '.join(named)}; commit {(about.get('commit') or 'unknown')[:12]}"]
    lines += ["", "sizes that try the script: these figures say nothing"] if result["tiny"] else []
    timed = [name for name in ("updates", "seeds", "pixels", "jax") if figures.get(name)]
    lines += ["", "| what | update | ms | smallest to largest | ratio |", "|---|---|---|---|---|"] if timed else []
    for name in timed:
        for kind, row in figures.get(name, {}).items():
            if "ms" in row:
                relative = [f"{value:.2f} {what}" for what, value in row.items() if what.startswith("to ")]
                spread = f"{row['ms_min']:.3f} to {row['ms_max']:.3f}"
                lines.append(f"| {name} | {kind} | {row['ms']:.3f} | {spread} | {''.join(relative)} |")
            elif "error" in row:
                lines.append(f"| {name} | {kind} | {row['error']} | | |")
    if outcomes := figures.get("tests", {}).get("outcomes"):
        lines += ["", f"gpu tests: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}"]
        lines += [f"* {name} failed" for name in figures["tests"].get("failed", {})]
    if curve := figures.get("run", {}).get("curve"):
        per_update = figures["run"].get("ms_per_update")
        lines += ["", f"the run: {curve[-1]['step']:,} updates" + (f", {per_update:.2f} ms each" if per_update else "")]
        lines += ["", "| updates | seconds | return of the prior | of DeFlow |", "|---|---|---|---|"]
        for row in curve:
            returns = f"{row['prior']:.0f} | {row['deflow']:.0f}"
            lines.append(f"| {row['step']:,} | {row['training_seconds']:.0f} | {returns} |")
    lines += ["", "| part | outcome | seconds |", "|---|---|---|"]
    for name, part in parts.items():
        error = f": {part['error']}" if "error" in part else ""
        lines.append(f"| {name} | {part['status']}{error} | {part.get('seconds', 0):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("gpu.json"), help="[default: %(default)s]")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of this FILE and measure nothing")
    parser.add_argument(
        "--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run [default: all]"
    )
    parser.add_argument("--device", default="cuda", help="[default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=530, help="of all parts together [default: %(default)s]")
    parser.add_argument(
        "--start", choices=["fork", "spawn"], default="fork", help="how processes begin; spawn imports all for each"
    )
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the script")
    add_jax(parser)
    arguments = parser.parse_args()
    if arguments.show:
        try:
            text = show(json.loads(arguments.show.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            parser.error(f"{arguments.show} is no file of this script: {error}")
        print(text)
        return
    check_jax(parser, arguments)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is for --tiny: the paper's sizes take hours there; throughput.py times a CPU")
    if importlib.util.find_spec("gymnasium") is None:
        print("gpu.py: gymnasium is not installed: the real run will be missing", file=sys.stderr)
    if not arguments.out.parent.is_dir():
        parser.error(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    with interruptible():
        print(show(run(arguments)))


if __name__ == "__main__":
    main()
