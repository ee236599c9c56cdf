"""Seconds from a command to what the user waits for: `deflow --help`, and the first gradient step of `deflow train`.

    python benchmarks/startup.py --task cube-single-play-singletask-task2-v0 --data-root DIR --rounds 3

The data set has to be there (`deflow data generate` makes one). The first step is seen as the first row of metrics, with
log_interval=1: it is evaluated and written, so the number is an upper bound. The run is ended as soon as it has come.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEFLOW = [sys.executable, "-m", "deflow_torchrl.cli"]


def seconds_of_help() -> float:
    began = time.perf_counter()
    subprocess.run([*DEFLOW, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def seconds_to_first_step(settings: list[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.jsonl"
        command = [*DEFLOW, "train", *settings, "log_interval=1", "eval_interval=0", f"out={metrics.parent}"]
        began = time.perf_counter()
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not (metrics.is_file() and metrics.stat().st_size):
            if run.poll() is not None:
                sys.stderr.write(run.stderr.read())
                raise SystemExit(run.returncode)
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        run.send_signal(signal.SIGINT)
        run.communicate()
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="cube-single-play-singletask-task2-v0")
    parser.add_argument("--data-root", type=Path, help="folder of the data set; where `deflow` looks by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    settings = [f"task={arguments.task}", "download=false"]
    settings += [] if arguments.data_root is None else [f"data_root={arguments.data_root}"]
    times: dict[str, list[float]] = {"help": [], "train": []}
    for _ in range(arguments.rounds):
        times["help"].append(seconds_of_help())
        times["train"].append(seconds_to_first_step(settings))
    result = {name: statistics.median(values) for name, values in times.items()}
    print(f"deflow --help: {result['help']:.2f} s (from {min(times['help']):.2f} to {max(times['help']):.2f})")
    print(
        f"first step of deflow train: {result['train']:.1f} s (from {min(times['train']):.1f} to {max(times['train']):.1f})"
    )
    if arguments.json:
        print(json.dumps({"seconds": times, **result}))


if __name__ == "__main__":
    main()
