"""Offline to online: DeFlow deliberately trained too short offline, then on its own experience, with and without a frozen prior.

    python benchmarks/offline_to_online.py run --out runs/offline_to_online
    python benchmarks/offline_to_online.py render --runs runs/offline_to_online --out benchmarks/results/offline_to_online
    python benchmarks/offline_to_online.py run --protocol paper --device cuda --dry-run

With `--protocol paper` the paper's 15 tasks of Table 2 are trained by every method with `deflow sweep`, and rendered with
`deflow report`. What follows is about the default, `small`.

`run` generates cube-single-play data with OGBench's oracle (100 episodes, seed 0), trains every seed with the full update and
with the frozen prior, `--jobs` runs at a time, and goes on where it was after Ctrl-C or a kill. `render` keeps the records and
rows of metrics of finished runs and writes the table and the curves from them. The data are regenerated and the protocol is
small: the numbers are not comparable with the paper's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _family import execute, names, sweeps
from _family import render as report

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import dataset_path
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports.records import load_record, without_places
from deflow_torchrl.reports.tables import online_progress
from deflow_torchrl.sources.generation import generate_ogbench_dataset, generated_root
from deflow_torchrl.tasks.protocols import get_protocol

DATASET = "cube-single-play-v0"
TASK = "cube-single-play-singletask-task2-v0"
EPISODES, VAL_EPISODES = 100, 4
# A quarter of an hour to half an hour a run on one core: small networks, a large learning rate, fast targets.
SETTINGS = {
    "offline_steps": 2_000,
    "online_steps": 10_000,
    "batch_size": 256,
    "hidden_dims": "[256,256,256]",
    "log_interval": 500,
    "eval_interval": 2_000,
    "eval_episodes": 50,
    "save_interval": 2_000,
    "mixing": "balanced",
    "algo.lr": 1e-3,
    "algo.tau": 0.02,
    "algo.gamma": 0.98,
    "algo.target_divergence": 0.005,
}
RUNS = {"small": "runs/offline_to_online", "paper": "runs/bench-offline-to-online"}
KEPT = "benchmarks/results/offline_to_online"
PRIORS = {"full": "false", "frozen": "true"}


def settings_of(prior: str, seed: int, root: str, out: Path, others: list[str]) -> list[str]:
    pairs = {"task": TASK, "data_root": root, **SETTINGS, "freeze_prior": PRIORS[prior], "seed": seed, "out": out}
    pairs |= dict(pair.split("=", 1) for pair in others)
    return [f"{name}={value}" for name, value in pairs.items()]


def run(arguments: argparse.Namespace) -> None:
    if arguments.protocol == "paper":
        arguments.seeds = None if arguments.seeds is None else ",".join(map(str, arguments.seeds))
        execute(arguments, paper)
        return
    if arguments.methods is not None or arguments.device != "cpu":
        raise InputError("--methods and --device are for --protocol paper: small compares DeFlow's two priors on a CPU")
    arguments.seeds = [0, 1] if arguments.seeds is None else arguments.seeds
    root = arguments.data_root or generated_root(DATASET, episodes=EPISODES, val_episodes=VAL_EPISODES, seed=0)
    waiting = [(prior, seed) for seed in arguments.seeds for prior in PRIORS]
    if arguments.dry_run:
        for prior, seed in waiting:
            target = folder(arguments.out, prior, seed)
            print("$", shlex.join(["deflow", "train", *settings_of(prior, seed, str(root), target, arguments.set)]))
        return
    if not dataset_path(DATASET, root, "train").is_file():
        generate_ogbench_dataset(
            DATASET,
            root,
            episodes=EPISODES,
            val_episodes=VAL_EPISODES,
            seed=0,
            progress=lambda finished, total: progress_bar(finished, total=total, desc="generate", unit="episode"),
        )
    waiting = [cell for cell in waiting if not (folder(arguments.out, *cell) / "record.json").is_file()]
    jobs = arguments.jobs or 2
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: dict[subprocess.Popen[bytes], tuple[str, int]] = {}
    bar = progress_bar(total=len(waiting), desc="runs", unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[start(arguments, *cell, str(root), threads)] = cell
            time.sleep(1)
            for process in [process for process in running if process.poll() is not None]:
                prior, seed = running.pop(process)
                if process.returncode:
                    raise SystemExit(f"{prior}, seed {seed}, failed: see {folder(arguments.out, prior, seed)}.log")
                bar.update()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def paper(arguments: argparse.Namespace) -> list[list[str]]:
    protocol = get_protocol("paper")
    return sweeps(protocol, ["o2o"], arguments.methods or protocol.online_methods, arguments)


def folder(out: Path, prior: str, seed: int) -> Path:
    return out / f"{prior}-seed{seed}"


def start(arguments: argparse.Namespace, prior: str, seed: int, root: str, threads: int) -> subprocess.Popen[bytes]:
    target = folder(arguments.out, prior, seed)
    if (target / "config.yaml").is_file():
        verb = ["resume", str(target)]
    else:
        settings = settings_of(prior, seed, root, target, arguments.set)
        verb = ["train", *settings, f"threads={threads}", f"eval_workers={threads}"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Path(f"{target}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "deflow_torchrl.cli", *verb], stdout=log, stderr=log)


def render(arguments: argparse.Namespace) -> None:
    if arguments.protocol == "paper":
        execute(arguments, report)
        return
    records = {}
    for prior in PRIORS:
        for path in sorted(arguments.runs.glob(f"{prior}-seed*/record.json")):
            seed = int(path.parent.name.rpartition("seed")[2])
            kept = folder(arguments.out, prior, seed)
            if kept.resolve() != path.parent.resolve():
                kept.mkdir(parents=True, exist_ok=True)
                record = without_places(load_record(path))
                (kept / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                shutil.copyfile(path.with_name("metrics.jsonl"), kept / "metrics.jsonl")
            records[prior, seed] = load_record(kept)
    if not records:
        raise SystemExit(f"{arguments.runs} holds no finished run; make them with: {sys.argv[0]} run")
    (arguments.out / "README.md").write_text(table(records), encoding="utf-8")
    draw(records, arguments.out / "curves.png")
    print((arguments.out / "README.md").read_text(encoding="utf-8"))


def table(records: dict[tuple[str, int], dict[str, Any]]) -> str:
    record = next(iter(records.values()))
    lines = [
        "# Offline to online on cube-single-play",
        "",
        "**Regenerated data, small networks, few steps: not comparable with the paper's numbers.** Written by",
        "`python benchmarks/offline_to_online.py render` from the records beside this file; the runs are made by",
        f"`python benchmarks/offline_to_online.py run`. Task {TASK}, {record['data']['transitions']:,} transitions of OGBench's",
        f"oracle (SHA-256 {record['data']['sha256'][:16]}...), {record['evaluations']['deflow']['episodes']} evaluation",
        "episodes from the same starts for every policy, +- one standard error of the rate. What the frozen prior saves in",
        "time is measured by `python benchmarks/throughput.py update --frozen-prior`, not by these runs.",
        "",
        "The best evaluation says how soon the gain is there; a snapshot of training is noisy, and the end may lie below it.",
        "",
        "Success, and in brackets after how many online steps:",
        "",
        "<!-- deflow-report: online . -->",
        *online_progress(list(records.values())),
        "<!-- /deflow-report -->",
    ]
    lines += ["", "![success over steps](curves.png)", "", "Commands:", "", "```bash"]
    lines += [records[cell]["command"] for cell in sorted(records)]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    hardware = record["hardware"]
    return "\n".join(
        [*lines, "```", "", f"{hardware['cpu']}, {hardware['torch_threads']} thread(s) a run. {versions}.", ""]
    )


def draw(records: dict[tuple[str, int], dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for (prior, seed), record in sorted(records.items()):
        notes = record["history"]
        rates = [(note["step"], note["policies"]["deflow"]["success_rate"]) for note in notes]
        axis.plot(
            *zip(*rates, strict=True),
            marker="o",
            color=f"C{list(PRIORS).index(prior)}",
            linestyle="-" if seed % 2 == 0 else "--",
            label=f"{prior} update, seed {seed}" if prior == "full" else f"frozen prior, seed {seed}",
        )
    axis.axvline(record["config"]["offline_steps"], color="black", linestyle=":", label="offline | online")
    axis.set(ylim=(-0.03, 1.03), xlabel="gradient steps offline, environment steps online", ylabel="success rate")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("run", help="make the runs")
    verb.add_argument("--protocol", default="small", help="paper or small [default: %(default)s]")
    verb.add_argument("--methods", type=names, help="paper: with commas [default: the protocol's]")
    verb.add_argument("--seeds", type=int, nargs="+", help="[default: 0 1; paper: 0 to 7]")
    verb.add_argument(
        "--jobs", type=int, help="runs at a time; the cores are shared out [default: 2; paper: one a core]"
    )
    verb.add_argument("--device", default="cpu", help="paper: where to train [default: %(default)s]")
    verb.add_argument("--data-root", type=Path, help="folder of the data; generated where absent (paper: downloaded)")
    verb.add_argument("--out", type=Path, help=f"folder of the runs [default: {RUNS['small']}; paper: {RUNS['paper']}]")
    verb.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of other runs than the stored ones"
    )
    verb.add_argument("--dry-run", action="store_true", help="print the commands (paper: and their cost), and run none")
    verb = verbs.add_parser("render", help="table and curves of the finished runs")
    verb.add_argument("--protocol", default="small", help="of the runs: paper or small [default: %(default)s]")
    verb.add_argument(
        "--runs", type=Path, help=f"folder of the runs [default: {RUNS['small']}; paper: {RUNS['paper']}]"
    )
    verb.add_argument("--out", type=Path, help=f"where tables go [default: {KEPT}; paper: the folder of the runs]")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))  # a polite kill ends the runs too: each saves and can go on
    try:
        runs = Path(RUNS[get_protocol(arguments.protocol).name])
        if arguments.verb == "run":
            arguments.out = arguments.out or runs
        else:
            arguments.runs = arguments.runs or runs
            arguments.out = arguments.out or (arguments.runs if arguments.protocol == "paper" else Path(KEPT))
        {"run": run, "render": render}[arguments.verb](arguments)
    except InputError as error:
        print(f"offline_to_online.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
