"""The paper's claims, each held against runs on our own tasks: what the runs say, with an interval, and a verdict.

    python benchmarks/claims.py run --delta-iav 0.01 --delta-paper 0.001 --dry-run    # the sweeps that it takes, and their cost
    python benchmarks/claims.py run --delta-iav 0.01 --delta-paper 0.001 --out runs/claims
    python benchmarks/claims.py render --delta-iav 0.01 --delta-paper 0.001 --runs runs/small runs/claims

A claim of the form "A is better than B" is held against the differences of their scores on the same task with the same seed of
training; a score is the mean of the protocol's last evaluations. The interval is Student's, 95%, over these differences, so that
it holds the noise of training as well as that of the episodes. The verdict is "holds" or "the opposite" where the interval leaves
out 0, and "cannot tell" where it does not. No correction is made for the number of claims.

What more computation at test time does is measured with `benchmarks/test_time.py`, how many modes a policy keeps with the numbers
of `deflow landscape`, at the states whose neighbours in the data have the most modes.
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
from deflow_torchrl.reports.runs import FinishedRun, find_runs, score_of
from deflow_torchrl.runs.evaluate import ACTING, load_run
from deflow_torchrl.runs.landscape import effective_modes, nearest_states, sample_actions
from deflow_torchrl.tasks.data import load_task_data
from deflow_torchrl.tasks.protocols import get_protocol

ALPHAS = (0.03, 0.1, 0.3, 1.0, 3.0)  # Table 5
STATES, CANDIDATES, NEIGHBOURS, SAMPLES = 20, 1000, 64, 256
HEADER = ("| claim | task | what we see | 95% interval | runs | verdict |", "|---|---|---|---|---|---|")


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
    ),
    Claim("the shift's mean over dimensions, not its sum, is bounded", "deflow", "deflow:divergence_reduction=sum"),
    Claim(
        "delta by the IAV rule is better than Table 6's",
        "deflow:target_divergence={iav}",
        "deflow:target_divergence={paper}",
    ),
    Claim("Q is normalised", "deflow", "deflow:normalize_q_loss=false"),
)
ONLINE = "online, a prior that goes on learning is better than a frozen one"


def commands(arguments: argparse.Namespace) -> list[Command]:
    """The offline sweep of the columns that the protocol's own runs do not have, then the two online ones."""
    protocol, out = get_protocol(arguments.protocol), arguments.out
    tasks = arguments.tasks or protocol.fixed_alpha.tasks
    values = {"iav": arguments.delta_iav, "paper": arguments.delta_paper}
    columns = dict.fromkeys(name.format(**values) for claim in CLAIMS for name in (claim.ours, claim.other))
    made = sweeps(protocol, tasks, [name for name in columns if name not in protocol.methods], arguments)
    online = [f"{key}={value}" for key, value in protocol.online_settings.items()]
    for frozen in ("false", "true"):
        arguments.out = out / f"freeze_prior={frozen}"
        made += sweeps(protocol, tasks, ["deflow"], arguments, settings=[*online, f"freeze_prior={frozen}"])
    return list(map(list, dict.fromkeys(map(tuple, made))))


def score_rows(runs: Sequence[FinishedRun], deltas: Mapping[str, float], last: int | None) -> Iterator[list[str]]:
    """A row for each claim about scores and each task; "not run" where one side is missing."""
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        column = run.folder.parent.name
        if run.online and run.record["algo"] == "deflow":
            column = f"online {run.record['config']['freeze_prior']}"
        elif run.online:
            continue
        score = score_of(run.record, last=last).value
        scores.setdefault((run.task, column), {})[run.seed] = score
    claims = [
        (claim.said, *(name.format(**deltas).replace(":", "-") for name in (claim.ours, claim.other)))
        for claim in CLAIMS
    ]
    for said, ours, other in [*claims, (ONLINE, "online False", "online True")]:
        tasks = sorted(
            {task for task, column in scores if column == ours} & {task for task, column in scores if column == other}
        )
        pairs = {task: paired(scores[task, ours], scores[task, other]) for task in tasks}
        if not any(map(len, pairs.values())):
            yield [said, "", "not run", "", "0", ""]
        for task, gaps in pairs.items():
            if len(gaps):
                yield [said, task, *judged(gaps)]
        if sum(map(len, pairs.values())) and len(pairs) > 1:
            yield [said, f"all {len(pairs)}", *judged(np.concatenate(list(pairs.values())))]


def paired(ours: Mapping[int, float], other: Mapping[int, float]) -> np.ndarray:
    """Differences of the seeds that both have."""
    return np.array([ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())])


def judged(gaps: np.ndarray, unit: float = 100.0) -> list[str]:
    """Mean difference, Student's 95% interval, number of pairs and verdict."""
    from scipy import stats

    mean = f"{unit * gaps.mean():+.1f}"
    if len(gaps) < 2:
        return [mean, "", str(len(gaps)), "cannot tell"]
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
    low, high = gaps.mean() - half, gaps.mean() + half
    verdict = "holds" if low > 0 else "the opposite" if high < 0 else "cannot tell"
    return [mean, f"{unit * low:+.1f} to {unit * high:+.1f}", str(len(gaps)), verdict]


def modes(run: Path) -> tuple[float, float, float | None]:
    """Effective modes of the data's actions, a policy's and its prior's: means over the states with most in the data."""
    loaded = load_run(run, policy=ACTING)
    config = loaded.config
    dataset = load_task_data(loaded.task, root=config.data_root, download=False)
    assert dataset is not None
    states = dataset.states()
    drawn = np.random.default_rng(0).choice(len(states), CANDIDATES, replace=False)
    near = {int(it): dataset.action[nearest_states(states, int(it), NEIGHBOURS)].numpy() for it in drawn}
    of_data = {state: effective_modes(actions) for state, actions in near.items()}
    chosen = sorted(of_data, key=lambda state: -of_data[state])[:STATES]
    found: dict[str, list[float]] = {}
    for state in chosen:
        samples = sample_actions(loaded.learner, states[state], SAMPLES, action_dim=dataset.action.shape[-1], seed=0)
        for name, actions in samples.items():
            found.setdefault(name, []).append(effective_modes(actions.numpy()))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return float(np.mean([of_data[state] for state in chosen])), means["policy"], means.get("base")


def mode_rows(folders: Sequence[Path]) -> Iterator[list[str]]:
    """Modes that DeFlow keeps of its prior's, and FQL's beside DeFlow's, seed by seed."""
    found: dict[str, dict[int, tuple[float, float, float | None]]] = {"deflow": {}, "fql": {}}
    task = ""
    runs = find_runs(folders) if folders else []
    if len({run.task for run in runs}) > 1 or any(run.record["config"].get("chunk") not in (None, 1) for run in runs):
        raise InputError("--modes takes runs of one task that act in single steps")
    for run in runs:
        if run.record["algo"] in found:
            found[run.record["algo"]][run.seed], task = modes(run.folder), run.task
    shared = sorted(found["deflow"].keys() & found["fql"].keys())
    deflow, fql = ([found[name][seed] for seed in shared] for name in ("deflow", "fql"))
    if shared:
        means = {"data": deflow, "prior": deflow, "DeFlow": deflow, "FQL": fql}
        places = {"data": 0, "prior": 2, "DeFlow": 1, "FQL": 1}
        seen = ", ".join(f"{name} {np.mean([it[places[name]] for it in rows]):.2f}" for name, rows in means.items())
        gaps = np.array([ours[1] - other[1] for ours, other in zip(deflow, fql, strict=True)])
        _, *rest = judged(gaps, unit=1.0)
        yield ["DeFlow keeps modes that FQL loses (Figure 2)", task, f"effective modes: {seen}", *rest]


def test_time_rows(files: Sequence[Path]) -> Iterator[list[str]]:
    """What `benchmarks/test_time.py --json` wrote: a line of JSON a run."""
    runs = [json.loads(file.read_text(encoding="utf-8").splitlines()[-1]) for file in files]
    for name in runs[0]["differences"] if runs else ():
        gaps = np.array([run["differences"][name]["mean"] for run in runs])
        how = name.removeprefix(f"{runs[0]['plain']}, ")
        yield [f"acting with more computation is better (the paper: it hardly helps): {how}", "", *judged(gaps)]


def render(arguments: argparse.Namespace) -> list[Command]:
    last = get_protocol(arguments.protocol).averaged
    deltas = {"iav": arguments.delta_iav, "paper": arguments.delta_paper}
    rows = [
        *score_rows(find_runs(arguments.runs), deltas, last),
        *mode_rows(arguments.modes),
        *test_time_rows(arguments.test_time),
    ]
    lines = [*HEADER, *(f"| {' | '.join(row)} |" for row in rows)]
    print("\n".join(lines))
    if arguments.out:
        command = " ".join(["python", "benchmarks/claims.py", *sys.argv[1:]])
        text = "\n".join(
            ["# The paper's claims on our tasks", "", *__doc__.split("\n\n")[2:], f"`{command}`", "", *lines, ""]
        )
        arguments.out.write_text(text, encoding="utf-8")
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
    table.add_argument("--out", type=Path, help="Markdown file")
    for verb in (run, table):
        verb.add_argument("--delta-iav", type=float, required=True, help="what `deflow iav TASK` suggests")
        verb.add_argument("--delta-paper", type=float, required=True, help="Table 6's value of the like task")
    arguments = parser.parse_args()
    execute(arguments, render if arguments.verb == "render" else commands)


if __name__ == "__main__":
    main()
