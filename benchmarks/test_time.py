"""More computation where a trained DeFlow acts: candidates chosen by the critics, and repeated refinement.

    python benchmarks/test_time.py runs/cube --episodes 200
    python benchmarks/test_time.py runs/cube --candidates 4 16 --iterations 5 --json

Every variant meets the same starts and noise as the policy as it was trained, and is compared with it episode by episode, with a
95% interval. The paper says that rejection sampling hardly helps; the released function for it takes the *smallest* Q of ten base
actions, not the largest, so that it cannot show that. It is here as `worst of N by base Q (released)`, and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from deflow_torchrl.algorithms import Learner
from deflow_torchrl.errors import InputError
from deflow_torchrl.modules.best_of_n import BestOfNModel, BestOfNPolicy
from deflow_torchrl.reports.statistics import paired_difference
from deflow_torchrl.runs.comparison import values_of
from deflow_torchrl.runs.evaluate import ACTING, TestTime, evaluate_policies, load_run, open_evaluator, outcomes
from deflow_torchrl.tasks.data import reference_returns
from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED


class WorstOfN(BestOfNModel):
    """The released choice: the candidate with the smallest mean Q."""

    def rank(self, values: Tensor) -> Tensor:
        return -super().rank(values)


def variants(learner: Learner, candidates: list[int], iterations: list[int]) -> dict[str, TensorDictModuleBase]:
    found = dict(learner.evaluated_policies)
    (name,) = found
    settings = [TestTime(count, selection) for count in candidates for selection in ("final", "base")]
    settings += [TestTime(iterations=count) for count in iterations]
    for setting in settings:
        found |= setting.apply(learner)
    for count in candidates:
        ((_, policy),) = TestTime(count, "base").apply(learner).items()
        assert isinstance(policy, BestOfNPolicy)
        policy.module.__class__ = WorstOfN
        found[f"{name}, worst of {count} by base Q (released)"] = policy
    return found


def compare(arguments: argparse.Namespace) -> dict[str, object]:
    loaded = load_run(arguments.run, policy=ACTING, device=arguments.device)
    config = replace(loaded.config, eval_workers=arguments.workers or loaded.config.eval_workers)
    policies = variants(loaded.learner, arguments.candidates, arguments.iterations)
    references = reference_returns(loaded.task)
    with open_evaluator(loaded.task, config, loaded.device) as evaluator:
        if evaluator is None:
            raise InputError(f"{arguments.run} was trained without an environment (env=)")
        results = evaluate_policies(evaluator, policies, arguments.episodes, seed=arguments.seed)
    evaluated = outcomes(results, references)
    plain, *others = evaluated
    differences = {
        name: asdict(paired_difference(*(values_of(evaluated[it], loaded.task) for it in (plain, name))))
        for name in others
    }
    return {
        "run": str(arguments.run), "task": loaded.task.name, "step": loaded.state["step"], "seed": arguments.seed,
        "metric": loaded.task.metric, "plain": plain, "evaluations": evaluated, "differences": differences,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of DeFlow")
    parser.add_argument("--candidates", type=int, nargs="*", default=[10], help="numbers of candidates [default: 10]")
    parser.add_argument("--iterations", type=int, nargs="*", default=[5], help="numbers of refinements [default: 5]")
    parser.add_argument("--episodes", type=int, default=50, help="of each variant [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=DEFAULT_EVALUATION_SEED, help="of starts and noise")
    parser.add_argument("--workers", type=int, help="processes that step environments [default: the run's]")
    parser.add_argument("--device", help="of the policies [default: the run's]")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    arguments = parser.parse_args()
    try:
        found = compare(arguments)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(
        f"{found['plain']}, step {found['step']}, {arguments.episodes} episodes; difference in {found['metric']}, 95% interval:"
    )
    for name, difference in found["differences"].items():
        print(f"{name}: {difference['mean']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
