"""Keep the records of finished sweeps: what tables are made of, small enough to be committed, and a page of the tables.

    python benchmarks/collect.py runs/bench-cube --out benchmarks/results/small \
        --label "regenerated data, small protocol, not comparable with the paper's numbers"

OUT/TASK/ALGO/seedN gets a run's record.json (without this machine's folders) and metrics.jsonl, OUT/TASK the learning curves, and
OUT/README.md is begun where there is none. What stands between its markers is written anew each time; the rest is its
author's, who says what agrees with the paper and what does not. `deflow report --check` holds the page to the records. A record
of other settings than the one that is kept in its place is refused, and what the page has no marker for is named.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import write_text
from deflow_torchrl.reports import load_record, without_places
from deflow_torchrl.reports.check import check_file, write_file
from deflow_torchrl.reports.page import draw_curves
from deflow_torchrl.reports.records import RECORD_FILE
from deflow_torchrl.reports.runs import FinishedRun, find_runs
from deflow_torchrl.reports.tables import common_settings
from deflow_torchrl.runs.folder import CONFIG_FILE
from deflow_torchrl.tasks.protocols import get_protocol, protocol_names

PAGE = "README.md"
SHOWN = 5  # names in a message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of sweeps")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--label", default="", help="the first line of a new page")
    parser.add_argument("--finished", action="store_true", help="leave out runs that are not finished, and name them")
    arguments = parser.parse_args()
    try:
        collect(arguments)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def collect(arguments: argparse.Namespace) -> None:
    """Check everything first, then copy, draw and write."""
    folders = [folder for place in arguments.runs for folder in run_folders(place)]
    begun = [folder for folder in folders if not (folder / RECORD_FILE).is_file()]
    if begun and not arguments.finished:
        raise InputError(
            f"{len(begun)} of {len(folders)} runs are not finished: {listed(begun)}; finish their sweep, or leave them out with "
            "--finished"
        )
    finished = [folder for folder in folders if folder not in begun]
    if not finished:
        raise InputError(f"no finished run in {', '.join(map(str, arguments.runs))}")
    find_runs(finished)  # two runs of one cell and seed are refused
    places = targets(arguments.out, finished)
    for target, folder in places.items():
        if (target / RECORD_FILE).is_file() and not same_settings(load_record(target), load_record(folder)):
            raise InputError(f"{folder} has other settings or data than {target} that is kept; take another --out")
    for target, folder in places.items():
        target.mkdir(parents=True, exist_ok=True)
        write_text(target / RECORD_FILE, as_text(without_places(load_record(folder))))
        if (folder / "metrics.jsonl").is_file():
            shutil.copyfile(folder / "metrics.jsonl", target / "metrics.jsonl")
    runs = find_runs([arguments.out])
    figures = draw(runs, arguments.out)
    page = arguments.out / PAGE
    if not page.exists():
        write_text(page, skeleton(runs, arguments.out, figures, label=arguments.label))
    write_file(check_file(page))
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{len(places)} runs kept in {arguments.out}, {size / 1e6:.1f} MB in all")
    bare = without_table(page, runs)
    print(f"{page} has no table of {listed(bare)}; write a marker for it" if bare else f"{page} has their tables")
    if begun:
        print(f"left out, not finished: {', '.join(map(str, begun))}")


def same_settings(kept: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two records are of one run, or of one made once more."""
    return common_settings(kept) == common_settings(new) and all(
        kept[name] == new[name] for name in ("algo", "variant", "seeds")
    )


def without_table(page: Path, runs: Sequence[FinishedRun]) -> list[Path]:
    """Folders of kept runs that no marker of the page names."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if "deflow-report:" in line]
    named = {(page.parent / word).resolve() for line in lines for word in line.split()}
    return sorted({run.folder.parent for run in runs if not named & {run.folder, *run.folder.parents}})


def listed(folders: Sequence[Path]) -> str:
    more = len(folders) - SHOWN
    return ", ".join(map(str, folders[:SHOWN])) + (f" and {more} more" if more > 0 else "")


def run_folders(place: Path) -> list[Path]:
    """Every run below a folder, begun or finished."""
    if not place.is_dir():
        raise InputError(f"there is no folder {place}")
    found = []
    for folder, below, files in os.walk(place):
        below[:] = sorted(name for name in below if name != "checkpoints")
        if CONFIG_FILE in files or RECORD_FILE in files:
            found.append(Path(folder))
    return found


def targets(out: Path, folders: Sequence[Path]) -> dict[Path, Path]:
    """Where each run goes: the last three of its folders, as a sweep names them."""
    places: dict[Path, Path] = {}
    for folder in folders:
        task, cell, seed = folder.resolve().parts[-3:]
        if task != load_record(folder)["task"]:
            raise InputError(f"{folder} is no TASK/ALGO/seedN of a sweep; its task is {load_record(folder)['task']}")
        target = out / task / cell / seed
        if target in places:
            raise InputError(f"{places[target]} and {folder} would both become {target}; leave one out")
        places[target] = folder
    return places


def as_text(record: dict[str, Any]) -> str:
    """A record with a line for each of its parts: a list of episodes would be a line an episode."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    return f"{{\n{lines}\n}}\n"


def draw(runs: Sequence[FinishedRun], out: Path) -> dict[str, list[str]]:
    """Draw the curves; task -> names of its figures."""
    tasks = sorted({run.task for run in runs}, key=len, reverse=True)
    figures: dict[str, list[str]] = {task: [] for task in tasks}
    for name, png in draw_curves(runs):
        task = next(task for task in tasks if name.startswith(task))
        path = out / task / f"curves{len(figures[task]) + 1}.png"
        path.write_bytes(png)
        figures[task].append(f"{task}/{path.name}")
    return figures


def skeleton(runs: Sequence[FinishedRun], out: Path, figures: dict[str, list[str]], *, label: str) -> str:
    """A page with empty markers: for each task its methods, their variants, the paper's figures and the curves."""
    protocols = ", ".join(sorted({run.record["protocol"] or "none" for run in runs}))
    lines = ["# Results", "", *([f"**{label}.**", ""] if label else [])]
    lines += [
        f"Protocol: {protocols} (`deflow_torchrl/tasks/protocols.json`). The tables are computed from the records below this "
        "folder; `deflow report --check` compares them, and `docs/reports.md` says how each number is made.",
        "",
    ]
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        usual = sorted({folder_of(run, out) for run in own if " (" not in run.column})
        varied = sorted({folder_of(run, out) for run in own if " (" in run.column})
        bases = sorted(
            {folder_of(run, out) for run in own for other in own if other.column.startswith(f"{run.column} (")}
        )
        lines += [f"## {task}", ""]
        last = averaged(own)
        lines += block("table", usual, last) + block("paper", usual) if usual else []
        lines += [f"![Outcomes on {task} over steps]({name})\n" for name in figures[task]]
        if varied:
            lines += ["### Variants", "", *block("table", bases + varied, last), *block("paper", varied)]
    lines += [
        "## What agrees with the paper's ranking, and what does not", "",
        "<!-- The author's words: which orders are as in the paper, which are not, and which the noise leaves open. -->", "",
    ]  # fmt: skip
    lines += ["## Commands", "", "```bash", *dict.fromkeys(run.record["command"] for run in runs), "```"]
    return "\n".join(lines) + "\n"


def folder_of(run: FinishedRun, out: Path) -> str:
    return str(run.folder.parent.relative_to(out.resolve()))


def averaged(runs: Sequence[FinishedRun]) -> int | None:
    """Evaluations of a score, by the protocol that all of these runs followed."""
    names = {run.record["protocol"] for run in runs}
    return get_protocol(names.pop()).averaged if len(names) == 1 and names <= set(protocol_names()) else None


def block(kind: str, folders: Sequence[str], last: int | None = None) -> list[str]:
    words = [kind, *folders, *([] if last is None else [f"last={last}"])]
    return [f"<!-- deflow-report: {shlex.join(words)} -->", "<!-- /deflow-report -->", ""]


if __name__ == "__main__":
    main()
