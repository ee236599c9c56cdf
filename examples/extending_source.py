"""Add a source of data of one's own: a class that reads it, registered under a prefix.

The data are a machine's logbook: a folder with a text file an episode, in it a line a step, as

    angle=-0.52 speed=1.10 torque=0.73 cost=0.41

    python examples/extending_source.py

After `register_source("logbook", Logbook())` every task name `logbook:FOLDER` is such a folder. A package that is installed needs
no call: it announces the instance as an entry point in the group `deflow_torchrl.sources`.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs import TrainConfig, train
from deflow_torchrl.sources import Source, register_source


class Logbook(Source):
    """Folders of text files, `logbook:FOLDER`; their policies are evaluated in gymnasium's pendulum."""

    def load(self, name: str, *, split: str = "train", device: Any = None, **options: Any) -> TransitionDataset | None:
        if split == "val":
            return None  # a logbook has no validation split
        if options.get("memmap_dir") is not None:
            raise InputError("a logbook is kept in memory: leave storage=memmap away")
        observations, actions, rewards, ends = [], [], [], []
        for file in self._files(name):
            for line in file.read_text(encoding="utf-8").splitlines():
                step = {key: float(value) for key, value in (entry.split("=") for entry in line.split())}
                observations.append([np.cos(step["angle"]), np.sin(step["angle"]), step["speed"]])
                actions.append([step["torque"] / 2])  # torques go from -2 to 2, actions from -1 to 1
                rewards.append(-step["cost"])
                ends.append(0)
            ends[-1] = 1
        never = np.zeros(len(ends))
        dataset = TransitionDataset.from_arrays(observations, actions, rewards, never, ends, source=f"logbook {name}")
        return dataset.to(device or "cpu")

    def digest(self, name: str, *, root: Any = None) -> str:
        return hashlib.sha256(b"".join(file.read_bytes() for file in self._files(name))).hexdigest()

    def environment(self, name: str) -> str:
        return "gym:Pendulum-v1"

    def location(self, name: str, *, root: Any = None) -> Path:
        return Path(name)  # records keep the folder's name without its place on this machine

    def _files(self, name: str) -> list[Path]:
        files = sorted(Path(name).glob("*.txt"))
        if not files:
            raise InputError(f"{name} has no .txt file; a logbook is a folder with a text file for each episode")
        return files


def write_logbook(folder: Path, episodes: int) -> None:
    """Random torques, logged."""
    env, rng = gymnasium.make("Pendulum-v1"), np.random.default_rng(0)
    for episode in range(episodes):
        (cos, sin, speed), _ = env.reset(seed=episode)
        lines, end = [], False
        while not end:
            torque = rng.uniform(-2, 2)
            after, reward, _, end, _ = env.step(np.array([torque], np.float32))
            lines.append(f"angle={np.arctan2(sin, cos):.4f} speed={speed:.4f} torque={torque:.4f} cost={-reward:.4f}")
            cos, sin, speed = after
        (folder / f"{episode:03d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=20, help="logged episodes")
    arguments = parser.parse_args()
    register_source("logbook", Logbook())
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder) / "night-shift"
        book.mkdir()
        write_logbook(book, arguments.episodes)
        config = TrainConfig(
            task=f"logbook:{book}", offline_steps=arguments.steps, hidden_dims=[64, 64], eval_interval=0, eval_episodes=5,
            eval_workers=1, log_interval=max(arguments.steps // 5, 1), out=f"{folder}/run", algo=DeFlowConfig(),
        )  # fmt: skip
        record = train(config, command="examples/extending_source.py", show_progress=False)
    learned = record["evaluations"]["deflow"]["mean_return"]
    print(f"{record['data']['name']}: {record['data']['transitions']} transitions; DeFlow's mean return {learned:.0f}")
    return record


if __name__ == "__main__":
    main()
