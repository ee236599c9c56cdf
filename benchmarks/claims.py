"""The paper's claims, each tested on runs of our own tasks: what the runs say, with an interval, and a verdict.

    python benchmarks/claims.py run --delta-iav 0.01 --dry-run    # the sweeps that it takes, and their cost
    python benchmarks/claims.py run --delta-iav 0.01 --out runs/claims
    python benchmarks/claims.py render --delta-iav 0.01 --runs benchmarks/results/small runs/claims

A claim of the form "A is better than B" is tested by the differences of their scores on the same task with the same seed of
training; a score is the mean of the protocol's last evaluations. The interval is Student's, 95%, over seeds, so that it holds the
noise of training. It is at least as wide as the noise of the episodes alone makes it. Over several tasks a seed's difference is
its mean over the tasks, for these tasks and no others: a seed's runs share data and draws, so tasks are no independent samples.
The verdict is "holds" or "the opposite" where the interval excludes 0, and "cannot tell" where it does not. The claim that
something hardly helps holds where the whole interval lies below 5 points; where it lies above, the verdict is "the opposite". No
correction is made for the number of claims.

What more computation at test time does is measured with `benchmarks/test_time.py`, how many modes a policy keeps with the numbers
of `deflow landscape`, at the states whose neighbours in the data have the most modes: one half of the neighbours chooses the
states, the other is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _family import Command, add_run, execute, sweeps

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import write_text
from deflow_torchrl.reports.records import METRICS
from deflow_torchrl.reports.runs import FinishedRun, find_runs, score_of, standard_error
from deflow_torchrl.reports.statistics import careful_standard_error
from deflow_torchrl.reports.tables import common_settings
from deflow_torchrl.runs.evaluate import ACTING, load_run
from deflow_torchrl.runs.landscape import effective_modes, nearest_states, sample_actions
from deflow_torchrl.tasks.data import load_task_data
from deflow_torchrl.tasks.protocols import get_protocol

ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0)  # Table 5
STATES, CANDIDATES, ACTIONS = 20, 1000, 64
TITLE = "# The paper's claims on our tasks"
HARDLY = 5.0  # points
NORMAL = 1.96  # standard errors on each side of a 95% interval
HEADER = ("| claim | task | what we see | 95% interval | seeds | verdict |", "|---|---|---|---|---|---|")


@dataclass(frozen=True)
class Claim:
    """The score of ``ours`` is above that of ``other``, both as ``algos=`` takes them."""

    said: str
    ours: str
    other: str


CLAIMS = (
    Claim("DeFlow is better than FQL (Tables 1 and 7)", "deflow", "fql"),
    *(
        Claim(f"the multiplier that tunes itself is better than alpha = {alpha:g}{how} (Table 5)", "deflow", name)
        for alpha in ALPHAS
        for how, name in (
            ("", f"deflow:fixed_alpha={alpha:g}"),
            (", squared as in the released code", f"deflow:fixed_alpha={alpha:g}:square_fixed_alpha=true"),
        )
        if alpha != 1 or not how  # 1 squared is 1
    ),
    Claim(
        "bounding the shift's mean over dimensions is better than bounding its sum by the same delta",
        "deflow",
        "deflow:divergence_reduction=sum",
    ),
    Claim(
        "delta by the IAV rule is better than the protocol's (from Table 6)", "deflow:target_divergence={iav}", "deflow"
    ),
    Claim("normalising Q is better than not", "deflow", "deflow:normalize_q_loss=false"),
)
ONLINE = "online, a prior that goes on learning is better than a frozen one"


def columns(delta: float | None) -> list[tuple[str, str, str]]:
    """What is said, and the columns that it compares; without a delta by the IAV rule not the claim about it."""
    found = [(it.said, it.ours.format(iav=delta), it.other.format(iav=delta)) for it in CLAIMS]
    return [it for it in found if delta is not None or "=None" not in it[1]]


def commands(arguments: argparse.Namespace) -> list[Command]:
    """The offline sweep of the columns that the protocol's own runs do not have, then the two online ones."""
    if arguments.methods:
        raise InputError("--methods is not for claims: each says what it compares")
    protocol, out = get_protocol(arguments.protocol), arguments.out
    tasks = arguments.tasks or protocol.fixed_alpha.tasks
    compared = dict.fromkeys(name for _, *both in columns(arguments.delta_iav) for name in both)
    made = sweeps(protocol, tasks, [name for name in compared if name not in protocol.methods], arguments)
    online = [f"{key}={value}" for key, value in protocol.online_settings.items()]
    for frozen in ("false", "true"):
        arguments.out = out / f"freeze_prior={frozen}"
        made += sweeps(protocol, tasks, ["deflow"], arguments, settings=[*online, f"freeze_prior={frozen}"])
    return list(map(list, dict.fromkeys(map(tuple, made))))


@dataclass(frozen=True)
class Gap:
    """Difference of two scores in the unit of a table, and its variance by the noise of the episodes."""

    value: float
    variance: float = 0.0


def score_rows(runs: Sequence[FinishedRun], delta: float | None, last: int | None) -> Iterator[list[str]]:
    """A row for each claim about scores and each task; "not run" where one side is missing."""
    cells: dict[tuple[str, str], dict[int, FinishedRun]] = {}
    for run in runs:
        column = run.folder.parent.name
        if "code" in run.record["variant"] or (run.online and column != "deflow"):
            continue  # the authors' code, and online runs of other claims than the one about the prior
        if run.online:
            column = f"online {run.record['config']['freeze_prior']}"
        other = cells.setdefault((run.task, column), {}).setdefault(run.seed, run)
        first = next(iter(cells[run.task, column].values()))
        if other is not run or common_settings(first.record) != common_settings(run.record):
            raise InputError(
                f"{first.folder} and {run.folder} are both {column} on {run.task}, of one seed or other settings; leave one out"
            )
    for said, ours, other in [*columns(delta), (ONLINE, "online False", "online True")]:
        sides = ours.replace(":", "-"), other.replace(":", "-")
        gaps: dict[str, dict[int, Gap]] = {}
        for task in sorted({task for task, _ in cells}):
            both = [cells.get((task, side), {}) for side in sides]
            if both[0].keys() & both[1].keys():
                gaps[task] = paired(*both, last=last)
                yield [said, task, *judged([*gaps[task].values()])]
        if not gaps:
            yield [said, "", "not run", "", "0", ""]
        units = {
            METRICS[run.record["metric"]].unit
            for task, _ in cells
            if task in gaps
            for run in cells[task, sides[0]].values()
        }
        if len(gaps) > 1 and len(units) == 1:
            shared = sorted(set.intersection(*map(set, gaps.values())))
            means = [mean_gap([of_task[seed] for of_task in gaps.values()]) for seed in shared]
            if means:
                yield [said, f"mean of {len(gaps)} tasks", *judged(means)]


def paired(ours: Mapping[int, FinishedRun], other: Mapping[int, FinishedRun], *, last: int | None) -> dict[int, Gap]:
    """Differences of the seeds that both have.

    Raises:
        InputError: if the two differ in what a comparison takes to be alike.
    """
    found = {}
    for seed in sorted(ours.keys() & other.keys()):
        first, second = ours[seed], other[seed]
        settings, others = (common_settings(run.record) for run in (first, second))
        if settings != others:
            unlike = ", ".join(name for name, it in settings.items() if it != others[name])
            raise InputError(f"{first.folder} and {second.folder} cannot be compared: they differ in {unlike}")
        metric = METRICS[first.record["metric"]]
        scores = [score_of(run.record, last=last) for run in (first, second)]
        variance = 0.0
        for score in scores:
            error = standard_error(first.record["metric"], score.episodes)
            if first.record["metric"] == "success":
                error = careful_standard_error(score.value, len(score.episodes))
            variance += (metric.scale * error) ** 2
        found[seed] = Gap(metric.scale * (scores[0].value - scores[1].value), variance)
    return found


def mean_gap(gaps: Sequence[Gap]) -> Gap:
    return Gap(sum(it.value for it in gaps) / len(gaps), sum(it.variance for it in gaps) / len(gaps) ** 2)


def judged(gaps: Sequence[Gap], *, threshold: float = 0.0, hardly: bool = False) -> list[str]:
    """Mean difference, 95% interval, number of differences, and the verdict on "is above the threshold", or "is hardly above"."""
    from scipy import stats

    values, mean = np.array([it.value for it in gaps]), mean_gap(gaps)
    said = f"{mean.value:+.1f}"
    if len(values) < 2:
        return [said, "", str(len(values)), "cannot tell"]
    spread = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    half = max(spread, NORMAL * mean.variance**0.5)
    low, high = mean.value - half, mean.value + half
    above, below = ("the opposite", "holds") if hardly else ("holds", "the opposite")
    verdict = above if low > threshold else below if high < threshold else "cannot tell"
    return [said, f"{low:+.1f} to {high:+.1f}", str(len(values)), verdict]


def modes(run: Path) -> tuple[float, float, float | None]:
    """Effective modes of the data's actions, a policy's and its prior's: means over the states with most in the data."""
    loaded = load_run(run, policy=ACTING)
    config = loaded.config
    dataset = load_task_data(loaded.task, root=config.data_root, download=False)
    assert dataset is not None
    states = dataset.states()
    drawn = np.random.default_rng(0).choice(len(states), CANDIDATES, replace=False)
    near = {int(it): dataset.action[nearest_states(states, int(it), 2 * ACTIONS)].numpy() for it in drawn}
    chosen = sorted(near, key=lambda state: -effective_modes(near[state][::2]))[:STATES]
    of_data = [effective_modes(near[state][1::2]) for state in chosen]
    found: dict[str, list[float]] = {}
    for state in chosen:
        samples = sample_actions(loaded.learner, states[state], ACTIONS, action_dim=dataset.action.shape[-1], seed=0)
        for name, actions in samples.items():
            found.setdefault(name, []).append(effective_modes(actions.numpy()))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return float(np.mean(of_data)), means["policy"], means.get("base")


def mode_rows(folders: Sequence[Path]) -> Iterator[list[str]]:
    """Modes that DeFlow keeps of its prior's, and FQL's beside DeFlow's, seed by seed."""
    found: dict[str, dict[int, tuple[float, float, float | None]]] = {"deflow": {}, "fql": {}}
    task = ""
    runs = [run for run in find_runs(folders) if "code" not in run.record["variant"]] if folders else []
    if len({run.task for run in runs}) > 1 or any(run.record["config"].get("chunk") not in (None, 1) for run in runs):
        raise InputError("--modes takes runs of one task that act in single steps")
    for run in runs:
        own = found.get(run.record["algo"], {})
        if run.seed in own:
            raise InputError(
                f"{run.folder}: --modes has another run of {run.record['algo']} with seed {run.seed}; leave one out"
            )
        if run.record["algo"] in found:
            own[run.seed], task = modes(run.folder), run.task
    shared = sorted(found["deflow"].keys() & found["fql"].keys())
    deflow, fql = ([found[name][seed] for seed in shared] for name in ("deflow", "fql"))
    if shared:
        means = {"data": deflow, "prior": deflow, "DeFlow": deflow, "FQL": fql}
        places = {"data": 0, "prior": 2, "DeFlow": 1, "FQL": 1}
        seen = ", ".join(f"{name} {np.mean([it[places[name]] for it in rows]):.2f}" for name, rows in means.items())
        gaps = [Gap(ours[1] - other[1]) for ours, other in zip(deflow, fql, strict=True)]
        _, *rest = judged(gaps)
        yield ["DeFlow keeps modes that FQL loses (Figure 2)", task, f"effective modes: {seen}", *rest]


def test_time_rows(files: Sequence[Path]) -> Iterator[list[str]]:
    """What `benchmarks/test_time.py --json` wrote, a line of JSON a run, without the released choice of the worst."""
    gains: dict[tuple[str, str], list[Gap]] = {}
    read: set[str] = set()
    for file in files:
        run = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
        if run["run"] in read:
            raise InputError(f"{file} is of {run['run']}, as another file is; leave one out")
        read.add(run["run"])
        scale = METRICS[run["metric"]].scale
        for name, difference in run["differences"].items():
            how = name.removeprefix(f"{run['plain']}, ")
            if how.startswith("worst of"):
                continue
            error = scale * (difference["high"] - difference["low"]) / (2 * NORMAL)
            gains.setdefault((how, run["task"]), []).append(Gap(scale * difference["mean"], error**2))
    for (how, task), each in gains.items():
        row = judged(each, threshold=HARDLY, hardly=True)
        yield [f"more computation where it acts hardly helps: {how}", task, *row]


def render(arguments: argparse.Namespace) -> list[Command]:
    last = get_protocol(arguments.protocol).averaged
    rows = [
        *score_rows(find_runs(arguments.runs), arguments.delta_iav, last),
        *mode_rows(arguments.modes),
        *test_time_rows(arguments.test_time),
    ]
    lines = [*HEADER, *(f"| {' | '.join(row)} |" for row in rows)]
    print("\n".join(lines))
    if arguments.out:
        old = arguments.out.read_text(encoding="utf-8") if arguments.out.is_file() else ""
        head, begin, rest = old.partition("<!-- claims -->\n")
        _, end, tail = rest.partition("<!-- /claims -->")
        if begin and end:
            made = "".join(f"{line}\n" for line in lines if "| not run |" not in line)
            text = f"{head}{begin}{made}{end}{tail}"
        elif old and not old.startswith(TITLE):
            raise InputError(f"{arguments.out} has no <!-- claims --> and <!-- /claims -->; take another --out")
        else:
            command = " ".join(["python", "benchmarks/claims.py", *sys.argv[1:]])
            about = __doc__.split("\n\n")[2:]
            text = "\n".join([TITLE, "", *about, f"`{command}`", "", *lines, ""])
        write_text(arguments.out, text)
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="make the runs; the same command goes on with them after an interruption")
    add_run(run, "runs/claims")
    run.add_argument("--tasks", nargs="*", help="[default: the protocol's for the fixed alpha]")
    table = verbs.add_parser("render", help="the table of the finished runs")
    table.add_argument("--protocol", default="small", help="of the runs [default: %(default)s]")
    table.add_argument("--runs", type=Path, nargs="+", default=[Path("runs/claims")], help="folders of runs")
    table.add_argument(
        "--modes", type=Path, nargs="*", default=[], help="runs of deflow and fql, with checkpoints and data"
    )
    table.add_argument(
        "--test-time", type=Path, nargs="*", default=[], help="outputs of benchmarks/test_time.py --json"
    )
    table.add_argument(
        "--out", type=Path, help="Markdown file: a new one, or the text between <!-- claims --> and <!-- /claims -->"
    )
    for verb in (run, table):
        verb.add_argument(
            "--delta-iav",
            type=float,
            help="what `deflow iav TASK` suggests, where it is not the protocol's delta already",
        )
    arguments = parser.parse_args()
    execute(arguments, render if arguments.verb == "render" else commands)


if __name__ == "__main__":
    main()
