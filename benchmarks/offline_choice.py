"""Do the numbers of `deflow eval --offline` rank runs as their success does? Rank correlations over finished runs.

    python benchmarks/offline_choice.py runs/bench-cube --out benchmarks/results/small/offline_choice.json
    python benchmarks/offline_choice.py --read benchmarks/results/small/offline_choice.json

Every run below the folders is judged by held-out episodes (its checkpoint and data have to be there) and written to the file at
once, so that the same command goes on after an interruption; success is the mean of the protocol's last evaluations. Kendall's
tau-b between each number and success is taken over the runs of a task: over all of them, and among the runs of each method,
where it is asked which of several seeds to keep. Runs in chunks of actions are left out: `--offline` reads single steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import write_text
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports.runs import find_runs, score_of
from deflow_torchrl.reports.statistics import kendall_tau
from deflow_torchrl.runs.offline import evaluate_offline
from deflow_torchrl.tasks.protocols import get_protocol

NUMBERS = {
    "fitted Q": ("fitted_q", "value"),
    "ranks of Q and observed returns": ("critics", "kendall_tau", "value"),
    "- error of Q": ("critics", "root_mean_square_error"),
    "- distance to the data's actions": ("actions", "mean_square_distance_to_data"),
    "- negative log-likelihood": ("cloning", "negative_log_likelihood"),
}
"""Name -> where it stands in the result of `deflow eval --offline`; a name with a minus is turned, so that more is better."""


def judge(folders: Sequence[Path], out: Path, updates: int, last: int | None) -> None:
    """Add the runs that the file does not have yet."""
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    runs = [run for run in find_runs(folders) if run.record["config"].get("chunk") in (None, 1)]
    for run in progress_bar(runs, desc="judge", unit="run"):
        name = f"{run.task}/{run.column}/seed{run.seed}"
        if name not in known:
            result = evaluate_offline(run.folder, updates=updates, show_progress=False)
            success = score_of(run.record, last=last).value
            known[name] = {
                "task": run.task,
                "column": run.column,
                "seed": run.seed,
                "success": success,
                "offline": result,
            }
            write_text(out, json.dumps(known, indent=1))


def number(run: Mapping[str, Any], name: str) -> float | None:
    """One of :data:`NUMBERS`, larger for what should be better; None where the method has no such part."""
    found: Any = run["offline"]
    for key in NUMBERS[name]:
        found = None if found is None else found.get(key)
    return found if found is None or not name.startswith("-") else -found


def correlations(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown lines: a row a number and task, over all runs and within methods (a mean weighted by their pairs)."""
    lines = ["| number | task | runs | tau over all runs | tau within methods |", "|---|---|---|---|---|"]
    for name in NUMBERS:
        for task in sorted({run["task"] for run in runs}):
            here = [
                (run["column"], value, run["success"])
                for run in runs
                if run["task"] == task and (value := number(run, name)) is not None
            ]
            taus, weights = [], []
            for column in {it[0] for it in here}:
                own = [it[1:] for it in here if it[0] == column]
                if len(own) > 1 and (tau := kendall_tau(*zip(*own, strict=True))) is not None:
                    taus.append(tau)
                    weights.append(len(own) * (len(own) - 1) / 2)
            over = kendall_tau([it[1] for it in here], [it[2] for it in here]) if len(here) > 1 else None
            within = f"{np.average(taus, weights=weights):+.2f}" if taus else ""
            lines.append(f"| {name} | {task} | {len(here)} | {'' if over is None else f'{over:+.2f}'} | {within} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("runs/offline_choice.json"), help="[default: %(default)s]")
    parser.add_argument("--read", type=Path, help="print the table of this file, and judge nothing")
    parser.add_argument("--protocol", default="small", help="of the runs [default: %(default)s]")
    parser.add_argument("--fit-updates", type=int, default=3_000, help="as of deflow eval [default: %(default)s]")
    arguments = parser.parse_args()
    try:
        if arguments.read is None:
            judge(arguments.runs, arguments.out, arguments.fit_updates, get_protocol(arguments.protocol).averaged)
        path = arguments.read or arguments.out
        if not path.is_file():
            raise InputError(f"{path} is missing; make it with: {sys.argv[0]} RUNS --out {path}")
        print("\n".join(correlations(list(json.loads(path.read_text(encoding="utf-8")).values()))))
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
