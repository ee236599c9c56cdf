"""Does bfloat16 in the matrix products change learning? Paired runs of two precisions, seed by seed.

    deflow sweep tasks=TASK algos=deflow protocol=small out=runs/medium
    deflow sweep tasks=TASK algos=deflow protocol=small precision=highest out=runs/highest
    python benchmarks/precision.py runs/highest runs/medium

Both runs of a pair have the same networks at the start, the same batches and the same noise. For success (the mean of the last
three evaluations) and for divergence, alpha, Q and the critics' loss (means over the logged rows of the last third of training)
it prints each precision's mean over seeds, the spread of seeds within a precision, and the paired difference with its standard
error. A difference well inside the spread of the seeds is no evidence of a change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.runs import FinishedRun, find_runs, score_of

LAST = 3
COLUMNS = {
    "divergence": "train/divergence",
    "alpha": "train/alpha",
    "Q of refined actions": "train/q_refined",
    "critics' loss": "train/loss_qvalue",
}


def numbers(run: FinishedRun) -> Mapping[str, float]:
    """Success and the late means of the metrics that the run has."""
    rows = [row for row in run.rows() if COLUMNS["critics' loss"] in row]
    late = rows[-max(len(rows) // 3, 1) :]
    found = {"success": score_of(run.record, last=LAST).value}
    for name, key in COLUMNS.items():
        if late and all(key in row for row in late):
            found[name] = float(np.mean([row[key] for row in late]))
    return found


def compare(first: Path, second: Path) -> list[str]:
    """Markdown lines, a row a task and number."""
    sides = [{(run.task, run.record["algo"], run.seed): run for run in find_runs([place])} for place in (first, second)]
    names = [next(iter(side.values())).record["config"].get("precision", "highest") for side in sides]
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        raise InputError(f"{first} and {second} have no run of the same task, method and seed")
    lines = [
        f"| task | method | seeds | number | {names[0]} | {names[1]} | std over seeds | paired difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, algo in dict.fromkeys(key[:2] for key in shared):
        pairs = [[numbers(side[key]) for side in sides] for key in shared if key[:2] == (task, algo)]
        for name in pairs[0][0]:
            values = np.array([[one[name] for one in pair] for pair in pairs])
            gaps = values[:, 1] - values[:, 0]
            several = len(gaps) > 1
            spread = f"{np.sqrt(values.var(axis=0, ddof=1).mean()):.3g}" if several else ""
            error = f" ± {gaps.std(ddof=1) / np.sqrt(len(gaps)):.2g}" if several else ""
            means = " | ".join(f"{mean:.4g}" for mean in values.mean(axis=0))
            lines.append(f"| {task} | {algo} | {len(gaps)} | {name} | {means} | {spread} | {gaps.mean():+.2g}{error} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="folder of runs of one precision")
    parser.add_argument("second", type=Path, help="folder of runs of the other")
    arguments = parser.parse_args()
    try:
        print("\n".join(compare(arguments.first, arguments.second)))
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
