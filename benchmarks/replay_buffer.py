"""Time of a batch from OfflineOnlineReplayBuffer against one TorchRL storage that holds the same transitions.

    python benchmarks/replay_buffer.py --offline 1000000 --online 1000000 --batch-size 256 --json

Each round samples both in turn, so that a busy machine slows both; the ratio of their medians is the result. Timed are the
union in memory (or on ``--device``) and, on the CPU, both sides in memory-mapped files below ``--folder``. TorchRL's side
is TensorDictReplayBuffer over LazyTensorStorage or LazyMemmapStorage, which keep s' a second time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

from deflow_torchrl.data import OfflineOnlineReplayBuffer, TransitionDataset

CHUNK = 50_000


def random_walks(rows: int, arguments: argparse.Namespace) -> TensorDict:
    """Episodes of ``arguments.episode`` transitions in TED, the last of each truncated."""
    observation = torch.randn(rows + 1, arguments.obs_dim)
    truncated = ((torch.arange(rows) + 1) % arguments.episode == 0).unsqueeze(1)
    return TensorDict(
        observation=observation[:-1],
        action=torch.rand(rows, arguments.action_dim) * 1.9 - 0.95,
        next=TensorDict(
            observation=observation[1:],
            reward=-torch.ones(rows, 1),
            terminated=torch.zeros_like(truncated),
            truncated=truncated,
            done=truncated,
            batch_size=[rows],
        ),
        batch_size=[rows],
    )


def make_dataset(arguments: argparse.Namespace) -> TransitionDataset:
    """Walks of ``arguments.episode`` transitions; the columns are made directly, values do not matter here."""
    rows = arguments.offline
    starts = torch.arange(0, rows, arguments.episode)
    return TransitionDataset(
        observation=torch.randn(rows + len(starts), arguments.obs_dim),
        action=torch.rand(rows, arguments.action_dim) * 1.9 - 0.95,
        reward=-torch.ones(rows),
        terminated=torch.zeros(rows, dtype=torch.bool),
        episode_starts=starts,
    )


def fill(buffer: TensorDictReplayBuffer, rows: int, arguments: argparse.Namespace) -> None:
    for begin in range(0, rows, CHUNK):
        buffer.extend(random_walks(min(CHUNK, rows - begin), arguments))


def times(one: Callable[[], object], other: Callable[[], object], arguments: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each, called in turn, the device synchronised around each call."""
    wait = torch.cuda.synchronize if arguments.device.startswith("cuda") else lambda: None
    taken: tuple[list[float], list[float]] = [], []
    for repeat in range(arguments.warmup + arguments.repeats):
        for call, into in zip((one, other), taken, strict=True):
            wait()
            began = time.perf_counter()
            call()
            wait()
            if repeat >= arguments.warmup:
                into.append((time.perf_counter() - began) * 1e3)
    ours, torchrls = (statistics.median(milliseconds) for milliseconds in taken)
    return {"ms": ours, "torchrl_ms": torchrls, "ratio": ours / torchrls}


def compare(name: str, dataset: TransitionDataset, folder: Path | None, arguments: argparse.Namespace) -> dict:
    total = arguments.offline + arguments.online
    union = OfflineOnlineReplayBuffer(
        dataset,
        online_capacity=arguments.online,
        mode=arguments.mode,
        batch_size=arguments.batch_size,
        device=None if folder else arguments.device,
        online_dir=folder and folder / "online",
    )
    fill(union, arguments.online, arguments)
    storage = (
        LazyMemmapStorage(total, scratch_dir=str(folder / "torchrl"))
        if folder
        else LazyTensorStorage(total, device=arguments.device)
    )
    single = TensorDictReplayBuffer(storage=storage, batch_size=arguments.batch_size)
    fill(single, total, arguments)
    result = times(union.sample, single.sample, arguments)
    print(f"{name}: {result['ms']:.3f} ms, TorchRL {result['torchrl_ms']:.3f} ms, ratio {result['ratio']:.2f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", type=int, default=1_000_000, help="offline transitions")
    parser.add_argument("--online", type=int, default=1_000_000, help="online transitions")
    parser.add_argument("--episode", type=int, default=1000, help="transitions of an episode")
    parser.add_argument("--obs-dim", type=int, default=37)
    parser.add_argument("--action-dim", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--mode", choices=("uniform", "balanced"), default="uniform")
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where files go (default: the system's temporary one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dataset = make_dataset(arguments)
    results = {"memory": compare(f"on {arguments.device}", dataset, None, arguments)}
    if arguments.device == "cpu":
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="replay_buffer.") as scratch:
            mapped = TransitionDataset.load(dataset.save(Path(scratch) / "offline"))
            results["files"] = compare("memory-mapped", mapped, Path(scratch), arguments)
    if arguments.json:
        sizes = {name: getattr(arguments, name) for name in ("offline", "online", "batch_size", "mode", "device")}
        print(json.dumps({**results, **sizes, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
