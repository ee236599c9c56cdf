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


def side(place: Path) -> tuple[str, dict[tuple[str, str, int], FinishedRun]]:
    """The precision of a folder's runs, and the runs by task, method and seed; the authors' beside ours are left out.

    Raises:
        InputError: if two are of one task, method and seed, or they are of several precisions.
    """
    found: dict[tuple[str, str, int], FinishedRun] = {}
    names = {}
    for run in find_runs([place]):
        if "code" in run.record["variant"]:
            continue
        other = found.setdefault((run.task, run.record["algo"], run.seed), run)
        if other is not run:
            raise InputError(f"{other.folder} and {run.folder} are of one task, method and seed; leave one out")
        names[run.record["config"].get("precision", "highest")] = run.folder
    if len(names) > 1:
        raise InputError(
            f"{' and '.join(str(folder) for folder in names.values())} are of several precisions: {', '.join(names)}"
        )
    return next(iter(names), ""), found


def compare(first: Path, second: Path) -> list[str]:
    """Markdown lines, a row a task and number."""
    names, sides = zip(side(first), side(second), strict=True)
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        raise InputError(f"{first} and {second} have no run of the same task, method and seed")
    if names[0] == names[1]:
        raise InputError(f"the runs in {first} and {second} are both of precision={names[0]}")
    lines = [
        f"| task | method | seeds | number | {names[0]} | {names[1]} | std over seeds | paired difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, algo in dict.fromkeys(key[:2] for key in shared):
        pairs = [[numbers(side[key]) for side in sides] for key in shared if key[:2] == (task, algo)]
        for name in pairs[0][0]:
            if not all(name in one for pair in pairs for one in pair):
                continue
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
