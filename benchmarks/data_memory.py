# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Memory that data sets take: a large set of states trained on from memory-mapped files, and images stored once.

    python benchmarks/data_memory.py                                       # both parts
    python benchmarks/data_memory.py state --transitions 1000000 10000000 --json
    python benchmarks/data_memory.py visual --frames 50000 --json

state: a random walk of 28 numbers with 5 actions is written episode by episode into memory-mapped files; then a process of
its own opens it, trains DeFlow on it and draws further batches. Resident memory is the kernel's own count for that process
(/proc/self/status: VmRSS, its peak VmHWM, and its parts RssAnon and RssFile), "before" being everything but the set: torch,
networks, optimiser. Beside it stand TorchRL's storages with ("next", "observation") as a second copy, at the smallest size.

visual: random 64 x 64 x 3 uint8 images in memory, stored once and in TorchRL's storage with their second copy; from the former
batches of three stacked frames are drawn and cropped. What a million transitions need is calculated from it.

The system's page cache keeps pages of the files beside the process for as long as nobody else wants the memory; they belong to
no process. In a folder in memory (tmpfs) the files themselves are memory: name one on a disk with --folder. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tensordict import TensorDict
from torchrl import logger as torchrl_logger
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import RandomCrop, TransitionBuilder, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.data.dataset import prepared
from deflow_torchrl.errors import InputError
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.trainers import UpdateStep

OBSERVATION_DIM, ACTION_DIM, IMAGE = 28, 5, (64, 64, 3)
FRAME_STACK, STACKED_BATCHES = 3, 50
EPISODE = 1000
PAGE = resource.getpagesize()
MAPPED, IN_MEMORY = "memory-mapped", "in memory"
_IMPORTED_ONCE = ["deflow_torchrl.algorithms.deflow", "deflow_torchrl.data.dataset", "deflow_torchrl.trainers.update"]
_WARM_UP = 20
_LOOK_EVERY = 5
_TIMED_ROUNDS, _TIMED_BATCHES = 20, 20


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # results show as they come, in a file too
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    arguments = parse_arguments()
    try:
        with temporary_folder(arguments) as folder:
            result: dict[str, Any] = {"command": " ".join(sys.argv), "torch": torch.__version__, "threads": 1}
            if arguments.part in ("state", "both"):
                result["state"] = measure_state(arguments, folder)
            if arguments.part in ("visual", "both"):
                result["visual"] = measure_visual(arguments)
    except InputError as error:
        print(f"data_memory.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("data_memory.py: interrupted; the temporary folder is removed", file=sys.stderr)
        raise SystemExit(130) from error
    if arguments.json:
        print(json.dumps(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="both", choices=("state", "visual", "both"), help="default: both")
    parser.add_argument(
        "--transitions", type=positive, nargs="+", default=[1_000_000, 10_000_000], metavar="N",
        help="sizes of the sets of states (default: 1000000 10000000; the latter takes 1.4 GB of disk)",
    )  # fmt: skip
    parser.add_argument("--updates", type=positive, default=1000, help="DeFlow updates on each set (default: 1000)")
    parser.add_argument(
        "--batches", type=positive, default=4000, help="batches drawn after the updates (default: 4000)"
    )
    parser.add_argument("--batch-size", type=positive, default=256, help="transitions a batch (default: 256)")
    parser.add_argument(
        "--hidden-dims", type=positive, nargs="+", default=[64, 64], help="hidden layers (default: 64 64)"
    )
    parser.add_argument("--frames", type=positive, default=50_000, help="images of the visual set (default: 50000)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    arguments.transitions = sorted(set(arguments.transitions))
    return arguments


def positive(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text} is too small, expected at least 2")
    return number


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def temporary_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """A folder of its own on a disk with room for the files of the state part."""
    parent = Path(tempfile.gettempdir()) if arguments.folder is None else arguments.folder.expanduser()
    if not parent.is_dir():
        raise InputError(f"{parent} is no folder; name another with --folder")
    row = 4 * (OBSERVATION_DIM + ACTION_DIM + 1) + 1
    needed = 0
    if arguments.part != "visual":
        two_copies = (row + 4 * OBSERVATION_DIM + 2) * arguments.transitions[0]
        needed = int(1.01 * row * sum(arguments.transitions)) + two_copies + (64 << 20)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; name another disk with --folder, "
            "or smaller sets with --transitions"
        )
    try:
        folder = tempfile.mkdtemp(prefix="deflow-data-memory-", dir=parent)
    except OSError as error:
        raise InputError(f"cannot write in {parent} ({error.strerror}); name another with --folder") from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_state(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = {name: getattr(arguments, name) for name in ("updates", "batches", "batch_size", "hidden_dims")}
    sets = []
    for transitions in arguments.transitions:
        path = folder / f"state-{transitions}"
        preparing = in_fresh_process(prepare_states, path, transitions)
        training = in_fresh_process(train_mapped, path, settings)
        sets.append({"transitions": transitions, "preparing": preparing, "training": training})
        print(
            f"{transitions:>11,} transitions, {preparing['bytes'] / 1e6:.0f} MB in mapped files (written in "
            f"{preparing['seconds']:.0f} s by a process that grew by {_mb(preparing['growth'])} at most)"
        )
        print(f"{'':>13}training: {_describe(training)}; {training['pages_read']:.1%} of the observations' pages read")
    smallest = folder / f"state-{arguments.transitions[0]}"
    copies = {}
    for kind in (MAPPED, IN_MEMORY):
        copies[kind] = in_fresh_process(train_two_copies, smallest, kind, folder, settings)
        shutil.rmtree(folder / "memmap", ignore_errors=True)
        print(
            f"{arguments.transitions[0]:>11,} transitions in TorchRL's storage {kind}, two copies of the observations"
        )
        print(f"{'':>13}filling and training: {_describe(copies[kind])}")
    ratio = sets[-1]["training"]["peak"] / sets[0]["training"]["peak"]
    print(
        f"peak of training on {arguments.transitions[-1]:,} over {arguments.transitions[0]:,} transitions: {ratio:.3f}"
    )
    paths = [folder / f"state-{transitions}" for transitions in arguments.transitions]
    sampling = in_fresh_process(time_batches, paths, arguments.batch_size, folder)
    for name, cost in sampling.items():
        print(
            f"{cost['milliseconds']:8.3f} ms a batch of {arguments.batch_size}, {cost['ratio']:.2f} of the first: {name}"
        )
    return {**settings, "sets": sets, "two_copies": copies, "peak_ratio": ratio, "sampling": sampling}


def measure_visual(arguments: argparse.Namespace) -> dict[str, Any]:
    available = _kilobytes(Path("/proc/meminfo"))["MemAvailable"]
    needed = 3 * arguments.frames * int(np.prod(IMAGE))
    if available < needed:
        raise InputError(
            f"{available / 1e9:.1f} GB of memory are free, {needed / 1e9:.1f} GB are needed; take fewer --frames"
        )
    once = in_fresh_process(fill_images, arguments.frames, arguments.batch_size, False)
    twice = in_fresh_process(fill_images, arguments.frames, arguments.batch_size, True)
    drawing = once["peak"] - once["bytes"]
    million = 1_000_000 * int(np.prod(IMAGE))
    print(
        f"{STACKED_BATCHES} batches of {arguments.batch_size} with stacks of {FRAME_STACK} frames, cropped: peak resident memory "
        f"{_mb(once['peak'])} above the start, {_mb(drawing)} more than the set"
    )
    print(
        f"calculated for 1,000,000 transitions: {million / 1e9:.1f} GB of frames, {(million + drawing) / 1e9:.1f} GB with "
        f"drawing (bound: frames + 1 GB, {(million + 1e9) / 1e9:.1f} GB); the reference's two arrays and the copies it trains "
        f"from: {4 * million / 1e9:.1f} GB"
    )
    ratios = {name: once[name] / twice[name] for name in ("bytes", "growth")}
    same = once["sampled"] == twice["sampled"] and once["dtype"] == twice["dtype"] == "torch.uint8"
    for name, result in (("stored once", once), ("TorchRL's storage, two copies", twice)):
        print(
            f"{arguments.frames:,} images, {name}: {result['bytes'] / 1e6:.0f} MB, "
            f"resident memory grew by {_mb(result['growth'])}"
        )
    print(
        f"once over twice: {ratios['bytes']:.3f} of the bytes, {ratios['growth']:.3f} of the resident memory; "
        f"sampled values {'equal, uint8' if same else 'DIFFER'}"
    )
    return {
        "frames": arguments.frames,
        "once": once,
        "twice": twice,
        "bytes_ratio": ratios["bytes"],
        "growth_ratio": ratios["growth"],
        "sampled_values_equal": same,
        "drawing": drawing,
        "million": {"frames": million, "needed": million + drawing, "bound": million + 10**9, "reference": 4 * million},
    }


# Each of the following runs in a process of its own, so that its peak is its own.


def prepare_states(folder: Path, transitions: int) -> dict[str, Any]:
    before, began = memory(reset_peak=True), time.perf_counter()
    dataset = prepared(folder, {"transitions": transitions}, functools.partial(write_states, transitions))
    seconds, peak = time.perf_counter() - began, memory()["peak"]
    return {
        "bytes": dataset.nbytes,
        "seconds": seconds,
        "before": before["rss"],
        "peak": peak,
        "growth": peak - before["rss"],
    }


def write_states(transitions: int, folder: Path) -> TransitionDataset:
    lengths = [min(EPISODE, transitions - begin) for begin in range(0, transitions, EPISODE)]
    builder = TransitionBuilder(
        transitions, frames=transitions + len(lengths), observation_shape=(OBSERVATION_DIM,), action_dim=ACTION_DIM,
        source="a random walk", folder=folder,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for length in progress_bar(lengths, desc=f"write {transitions:,}", unit="episode"):
        builder.add_episode(
            observations=rng.standard_normal((length + 1, OBSERVATION_DIM), dtype=np.float32).cumsum(0),
            actions=rng.random((length, ACTION_DIM), dtype=np.float32) * 2 - 1,
            rewards=-np.ones(length, np.float32),
            terminated=np.zeros(length, bool),
        )
    return builder.finish()


def train_mapped(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    update = make_update(settings["hidden_dims"])
    before = memory(reset_peak=True)
    dataset = TransitionDataset.load(folder)
    return train(update, TransitionReplayBuffer(dataset, batch_size=settings["batch_size"]), before, settings)


def train_two_copies(folder: Path, kind: str, scratch: Path, settings: dict[str, Any]) -> dict[str, Any]:
    update = make_update(settings["hidden_dims"])
    before = memory(reset_peak=True)
    buffer = two_copies(TransitionDataset.load(folder), kind, scratch, settings["batch_size"])
    return train(update, buffer, before, settings)


def two_copies(dataset: TransitionDataset, kind: str, scratch: Path, batch_size: int) -> TensorDictReplayBuffer:
    """What a script without this package does: every transition whole in one of TorchRL's storages."""
    size = len(dataset)
    storage = LazyMemmapStorage(size, scratch_dir=scratch / "memmap") if kind == MAPPED else LazyTensorStorage(size)
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=batch_size)
    for _, part in dataset.chunks(1 << 15, doing="touch"):
        buffer.extend(part)
    return buffer


def make_update(hidden_dims: list[int]) -> UpdateStep:
    """DeFlow, with everything allocated that updates allocate."""
    torch.manual_seed(0)
    problem = ProblemSpec(
        observation_dim=OBSERVATION_DIM,
        action_dim=ACTION_DIM,
        hidden_dims=hidden_dims,
        gamma=0.99,
        q_aggregation="mean",
        target_divergence=1e-3,
        device=torch.device("cpu"),
    )
    update = UpdateStep(get_algorithm("deflow").build(DeFlowConfig(), problem))
    rng = np.random.default_rng(0)
    dataset = TransitionDataset.from_arrays(
        observations=rng.standard_normal((EPISODE, OBSERVATION_DIM), dtype=np.float32),
        actions=np.zeros((EPISODE, ACTION_DIM), np.float32),
        rewards=np.zeros(EPISODE),
        terminals=np.arange(EPISODE) == EPISODE - 1,
    )
    buffer = TransitionReplayBuffer(dataset, batch_size=256)
    for _ in range(_WARM_UP):
        update(buffer.sample())
    return update


def train(
    update: UpdateStep, buffer: TensorDictReplayBuffer, before: dict[str, int], settings: dict[str, Any]
) -> dict[str, Any]:
    row = 4 * OBSERVATION_DIM
    read = torch.zeros(-(-(len(buffer) + len(buffer) // EPISODE + 1) * row // PAGE), dtype=torch.bool)
    seen = {"rss": 0, "anonymous": 0, "file": 0}
    total = settings["updates"] + settings["batches"]
    for step in progress_bar(range(total), desc="train, then draw", unit="batch"):
        batch = buffer.sample()
        if step < settings["updates"]:
            update(batch)
        read[(batch["index"] + batch["index"] // EPISODE) * row // PAGE] = True
        if step % _LOOK_EVERY == 0 or step == total - 1:
            now = memory()
            seen = {name: max(value, now[name]) for name, value in seen.items()}
    return {
        "before": before["rss"],
        "end": now["rss"],
        "peak": now["peak"],
        "growth": now["peak"] - before["rss"],
        "anonymous_growth": seen["anonymous"] - before["anonymous"],
        "file_growth": seen["file"] - before["file"],
        "pages_read": float(read.float().mean()),
    }


def time_batches(folders: list[Path], batch_size: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Milliseconds to draw a batch, the ways taken in turns: only ratios of interleaved times mean something."""
    sets = [TransitionDataset.load(folder) for folder in folders]
    size = f"{len(sets[0]):,}"
    buffers: dict[str, TensorDictReplayBuffer] = {
        f"{size} in TorchRL's storage in memory, two copies": two_copies(sets[0], IN_MEMORY, scratch, batch_size),
        f"{size} in TorchRL's storage memory-mapped, two copies": two_copies(sets[0], MAPPED, scratch, batch_size),
        f"{size} in memory, stored once": TransitionReplayBuffer(in_memory(sets[0]), batch_size=batch_size),
    }
    buffers |= {
        f"{len(mapped):,} memory-mapped, stored once": TransitionReplayBuffer(mapped, batch_size=batch_size)
        for mapped in sets
    }
    seconds: dict[str, list[float]] = {name: [] for name in buffers}
    for _ in progress_bar(range(_TIMED_ROUNDS), desc="time batches", unit="round"):
        for name, buffer in buffers.items():
            began = time.perf_counter()
            for _ in range(_TIMED_BATCHES):
                buffer.sample()
            seconds[name].append((time.perf_counter() - began) / _TIMED_BATCHES)
    first = next(iter(seconds.values()))
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "ratio": statistics.median(value / base for value, base in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    }


def in_memory(mapped: TransitionDataset) -> TransitionDataset:
    names = ("observation", "action", "reward", "terminated")
    return TransitionDataset(
        **{name: getattr(mapped, name).clone() for name in names}, episode_starts=mapped.episode_starts
    )


def fill_images(frames: int, batch_size: int, twice: bool) -> dict[str, Any]:
    lengths = [min(EPISODE, frames - begin) - 1 for begin in range(0, frames, EPISODE)]  # transitions
    lengths = [length for length in lengths if length > 0]
    fill = _images_twice if twice else _images_once
    fill([2])  # what a first call loads and keeps is not the set's
    before = memory(reset_peak=True)
    buffer = fill(lengths)
    growth = memory()["rss"] - before["rss"]
    if not twice:
        stacked = TransitionReplayBuffer(
            buffer.dataset, batch_size=batch_size, frame_stack=FRAME_STACK, transform=RandomCrop()
        )
        for _ in range(STACKED_BATCHES):
            stacked.sample()
    peak = memory()["peak"] - before["rss"]
    rows = torch.from_numpy(np.random.default_rng(1).integers(len(buffer), size=batch_size))
    sampled = buffer[rows]
    content = [sampled[key].numpy().tobytes() for key in ("observation", "action", ("next", "observation"))]
    return {
        "bytes": buffer[:].bytes() if twice else buffer.dataset.nbytes,
        "growth": growth,
        "peak": peak,
        "dtype": str(sampled["observation"].dtype),
        "sampled": hashlib.sha256(b"".join(content)).hexdigest(),
    }


def _images_once(lengths: list[int]) -> TransitionReplayBuffer:
    builder = TransitionBuilder(
        sum(lengths), frames=sum(lengths) + len(lengths), observation_shape=IMAGE, action_dim=ACTION_DIM,
        source="random images", observation_dtype=torch.uint8,
    )  # fmt: skip
    for images, actions in _episodes(lengths, "stored once"):
        length = len(actions)
        builder.add_episode(
            observations=images, actions=actions, rewards=np.zeros(length), terminated=np.zeros(length, bool)
        )
    return TransitionReplayBuffer(builder.finish())


def _images_twice(lengths: list[int]) -> TensorDictReplayBuffer:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(sum(lengths)), batch_size=2)
    for images, actions in _episodes(lengths, "two copies"):
        last = torch.arange(len(actions))[:, None] == len(actions) - 1
        flags = {"done": last, "terminated": torch.zeros_like(last), "truncated": last}
        outcome = {"observation": torch.from_numpy(images[1:]), "reward": torch.zeros(len(actions), 1), **flags}
        buffer.extend(
            TensorDict(
                {
                    "observation": torch.from_numpy(images[:-1]),
                    "action": torch.from_numpy(actions),
                    "next": TensorDict(outcome, batch_size=[len(actions)]),
                },
                batch_size=[len(actions)],
            )
        )
    return buffer


def _episodes(lengths: list[int], description: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for length in progress_bar(lengths, desc=description, unit="episode", disable=lengths == [2]):
        yield (
            rng.integers(256, size=(length + 1, *IMAGE), dtype=np.uint8),
            rng.random((length, ACTION_DIM), dtype=np.float32) - 0.5,
        )


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``function`` in a process that has done nothing but import, and return its result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_child, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
        process.join()
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"{function.__name__} ended with exit code {process.exitcode} (-9: out of memory)"
        ) from error
    finally:
        process.terminate()
        process.join(10)
        process.kill()
    if isinstance(result, InputError):
        raise result
    return result


def _run_child(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process, which then cleans up
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    torch.set_num_threads(1)
    torchrl_logger.setLevel("WARNING")
    try:
        sender.send(function(*arguments))
    except InputError as error:
        sender.send(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def memory(*, reset_peak: bool = False) -> dict[str, int]:
    """Bytes this process has in memory, by the kernel's count."""
    if reset_peak:
        with contextlib.suppress(OSError):  # without the right to it, the peak is that since the start
            Path("/proc/self/clear_refs").write_text("5")
    status = _kilobytes(Path("/proc/self/status"))
    return {
        "rss": status["VmRSS"],
        "peak": status["VmHWM"],
        "anonymous": status["RssAnon"],
        "file": status["RssFile"],
    }


def _kilobytes(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


def _describe(training: dict[str, Any]) -> str:
    return (
        f"{_mb(training['before'])} before the set, {_mb(training['end'])} at the end, peak {_mb(training['peak'])} "
        f"(+{_mb(training['growth'])})"
    )


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
