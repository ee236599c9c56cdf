"""Do the numbers of `deflow eval --offline` rank runs as their success does? Rank correlations over finished runs.

    python benchmarks/offline_choice.py runs/bench-cube --out benchmarks/results/small/offline_choice.json
    python benchmarks/offline_choice.py --read benchmarks/results/small/offline_choice.json

Every run below the folders is judged by held-out episodes (its checkpoint and data have to be there) and written to the file at
once, so that the same command goes on after an interruption. Success is that of the run's last evaluation, which is of the same
policy. Kendall's tau-b between each number and success is taken over the runs of a task: over all of them, and among the runs of
each method, where it is asked which of several seeds to keep. The p-value is two-sided, by shuffling success among these runs;
from 5% on a cell says "cannot tell", and no correction is made for the number of cells. Runs in chunks of actions are left out:
`--offline` reads single steps. The protocol's data have few validation episodes; `--held-out` names more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import write_text
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports.runs import find_runs, score_of
from deflow_torchrl.reports.statistics import kendall_tau
from deflow_torchrl.runs.offline import evaluate_offline

SHUFFLES = 999
NUMBERS = {
    "fitted Q": ("fitted_q", "value"),
    "ranks of Q and observed returns": ("critics", "kendall_tau", "value"),
    "- error of Q": ("critics", "root_mean_square_error"),
    "- distance to the data's actions": ("actions", "mean_square_distance_to_data"),
    "- negative log-likelihood": ("cloning", "negative_log_likelihood"),
}
"""Name -> where it stands in the result of `deflow eval --offline`; a name with a minus is turned, so that more is better."""


def judge(arguments: argparse.Namespace) -> None:
    """Add the runs that the file does not have yet."""
    out = arguments.out
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    how = {"data": arguments.held_out, "updates": arguments.fit_updates}
    runs = [run for run in find_runs(arguments.runs) if "code" not in run.record["variant"]]
    for run in progress_bar(runs, desc="judge", unit="run"):
        if run.record["config"].get("chunk") not in (None, 1):
            continue
        column = run.folder.parent.name
        name = f"{run.task}/{column}/seed{run.seed}"
        about = {"config_sha256": run.record["config_sha256"], "success": "last evaluation", **how}
        if name in known and known[name]["about"] != about:
            raise InputError(
                f"{out} has {name} of another run or judged in another way than {run.folder}; take another --out"
            )
        if name not in known:
            known[name] = {
                "task": run.task,
                "column": column,
                "seed": run.seed,
                "about": about,
                "success": score_of(run.record, last=1).value,
                "offline": evaluate_offline(run.folder, **how, show_progress=False),
            }
            write_text(out, json.dumps(known, indent=1))


def number(run: Mapping[str, Any], name: str) -> float | None:
    """One of :data:`NUMBERS`, larger for what should be better; None where the method has no such part."""
    found: Any = run["offline"]
    for key in NUMBERS[name]:
        found = None if found is None else found.get(key)
    return found if found is None or not name.startswith("-") else -found


def association(groups: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float] | None:
    """Kendall's tau-b within groups, a mean weighted by their pairs, and its p-value; None where no group can be ordered."""
    pairs = [np.asarray(group, np.float64).T for group in groups]
    able = [(number, success) for number, success in pairs if kendall_tau(number, success) is not None]
    if not able:
        return None
    generator, weights = np.random.default_rng(0), [len(number) * (len(number) - 1) / 2 for number, _ in able]

    def tau(order: Callable[[np.ndarray], np.ndarray]) -> float:
        return float(
            np.average([kendall_tau(number, order(success)) or 0.0 for number, success in able], weights=weights)
        )

    found, shuffled = tau(np.asarray), [tau(generator.permutation) for _ in range(SHUFFLES)]
    return found, float(np.mean(np.abs([found, *shuffled]) >= abs(found) - 1e-12))


def correlations(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines: a row a number and task, over all runs and within methods; then which fits cannot be trusted."""
    lines = ["| number | task | runs | tau over all runs | tau within methods |", "|---|---|---|---|---|"]

    def cell(found: tuple[float, float] | None) -> str:
        return (
            "" if found is None else f"{found[0]:+.2f} (p {found[1]:.2f}{', cannot tell' if found[1] >= 0.05 else ''})"
        )

    for name in NUMBERS:
        for task in sorted({run["task"] for run in runs}):
            by_column: dict[str, list[tuple[float, float]]] = {}
            for run in runs:
                if run["task"] == task and (value := number(run, name)) is not None:
                    by_column.setdefault(run["column"], []).append((value, run["success"]))
            groups = list(by_column.values())
            together = [pair for group in groups for pair in group]
            over, within = association([together] if together else []), association(groups)
            lines.append(f"| {name} | {task} | {len(together)} | {cell(over)} | {cell(within)} |")
    fits = [fit for run in runs if (fit := run["offline"]["fitted_q"]) is not None]
    moving = sum(not fit["low"] <= fit["halfway"] <= fit["high"] for fit in fits)
    episodes = sorted({run["offline"]["held_out"]["episodes"] for run in runs})
    held = " to ".join(map(str, dict.fromkeys([episodes[0], episodes[-1]]))) if episodes else "no"
    return [*lines, "", f"{held} held-out episodes; fitted Q evaluation still moved in {moving} of {len(fits)} runs."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("runs/offline_choice.json"), help="[default: %(default)s]")
    parser.add_argument("--read", type=Path, help="print the table of this file, and judge nothing")
    parser.add_argument("--held-out", metavar="DATA", help="as of deflow eval [default: the validation split]")
    parser.add_argument("--fit-updates", type=int, help="as of deflow eval [default: 50 / (1 - gamma)]")
    arguments = parser.parse_args()
    try:
        if arguments.read is None:
            judge(arguments)
        path = arguments.read or arguments.out
        if not path.is_file():
            raise InputError(f"{path} is missing; make it with: {sys.argv[0]} RUNS --out {path}")
        print("\n".join(correlations(list(json.loads(path.read_text(encoding="utf-8")).values()))))
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
