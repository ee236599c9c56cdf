"""Paired evaluation of real runs, trained for a few steps."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")

from deflow_torchrl.envs import normalized_score, reference_returns
from deflow_torchrl.reports import paired_difference, sign_test
from deflow_torchrl.runs import comparison
from deflow_torchrl.runs.comparison import compare_runs
from deflow_torchrl.runs.evaluate import evaluate_run
from deflow_torchrl.runs.folder import read_run_settings
from deflow_torchrl.tasks import get_task
from tests.support.command_line import assert_one_line, deflow
from tests.support.pendulum import ENVIRONMENT, record_pendulum


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on a pendulum of 15 steps, with different seeds and networks."""
    folder = tmp_path_factory.mktemp("runs")
    task = record_pendulum(folder, episodes=2)
    for name, more in (("a", ["seed=0"]), ("b", ["seed=1", "hidden_dims=[8]"])):
        done = deflow(
            "train", f"task={task}", f"env={ENVIRONMENT}", f"out={folder / name}", "hidden_dims=[16]", "batch_size=8",
            "offline_steps=2", "eval_interval=0", "eval_episodes=2", "eval_workers=1", "threads=1", *more,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder


def test_the_comparison_is_of_each_runs_acting_policy_on_common_starts(runs):
    compared = compare_runs(runs / "a", runs / "b", episodes=3, workers=1, seed=7, show_progress=False)
    for label, run in (("A", "a"), ("B", "b")):
        alone = evaluate_run(runs / run, episodes=3, workers=1, seed=7, show_progress=False)
        assert compared["runs"][label]["outcome"] == alone["evaluations"]["deflow"]
        assert compared["runs"][label]["policy"] == "deflow"
        assert compared["runs"][label]["step"] == 2
        assert compared["runs"][label]["outcome"]["seeds"] == [7, 8, 9]
    returns = [compared["runs"][label]["outcome"]["episode_return"] for label in "AB"]
    assert compared["metric"] == "return"
    assert compared["difference"] == asdict(paired_difference(*returns))
    assert len({tuple(of_one) for of_one in returns}) == 2, "the runs differ"
    assert not {"counts", "p_value"} & set(compared), "this environment knows no success"


@pytest.mark.slow  # of evaluations the same is tested in CI
def test_the_comparison_is_the_same_however_many_processes_share_the_work(runs):
    alone, shared = (
        compare_runs(runs / "a", runs / "b", episodes=3, workers=workers, seed=7, show_progress=False)
        for workers in (1, 2)
    )
    assert alone == shared


def test_difference_counts_and_p_value_are_b_minus_a(runs, monkeypatch):
    success = {"a": [1, 1, 0, 0, 0, 0, 0, 1], "b": [1, 0, 1, 1, 1, 1, 1, 0]}

    def evaluated(run, **options):
        outcome = {"success": success[run.name], "episode_return": [0.0] * 8}
        return {"step": 2, "evaluations": {"deflow": outcome}}

    # The pendulum knows no success: what the two runs would have had in a task that does.
    monkeypatch.setattr(comparison, "evaluate_run", evaluated)
    task = replace(
        comparison._common_task(runs / "a", runs / "b", [read_run_settings(runs / "a")] * 2), metric="success"
    )
    monkeypatch.setattr(comparison, "_common_task", lambda *arguments: task)
    compared = compare_runs(runs / "a", runs / "b", episodes=8, workers=1, show_progress=False)
    assert compared["counts"] == {"both": 1, "only_a": 2, "only_b": 5, "neither": 0}
    assert compared["p_value"] == sign_test(5, 2)
    expected = paired_difference(success["a"], success["b"])
    assert compared["difference"]["mean"] == expected.mean == 3 / 8
    assert (compared["difference"]["low"], compared["difference"]["high"]) == (expected.low, expected.high)


def test_a_run_compared_with_itself_differs_in_nothing(runs):
    compared = compare_runs(runs / "a", runs / "a", episodes=2, workers=1, show_progress=False)
    assert compared["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "confidence": 0.95, "pairs": 2}


def test_the_command_line_says_the_difference_in_words_and_in_json(runs):
    a, b = str(runs / "a"), str(runs / "b")
    result = deflow("eval", a, b, "--paired", "--episodes", "2", "--workers", "1", "--json")
    assert result.returncode == 0, result.stderr
    *text, last = result.stdout.splitlines()
    compared = json.loads(last)
    assert compared["difference"]["pairs"] == 2
    assert text[0] == f"A: {a}, step 2"
    assert text[4].startswith(f"B - A: return {compared['difference']['mean']:+.1f}, 95% interval ")
    assert len(text) == 5
    assert "evaluate deflow" in result.stderr, "a bar"
    alone = deflow("eval", a, "--policy", "prior", "--episodes", "1", "--workers", "1", "--seed", "5", "--json")
    summary = json.loads(alone.stdout.splitlines()[-1])
    assert list(summary["evaluations"]) == ["prior"]
    assert summary["evaluations"]["prior"]["seeds"] == [5]


def test_two_runs_without_paired_are_each_evaluated_and_the_way_on_is_said(runs):
    a, b = str(runs / "a"), str(runs / "b")
    result = deflow("eval", a, b, "--policy", "deflow", "--episodes", "1", "--workers", "1", "--json")
    assert result.returncode == 0, result.stderr
    *text, hint, last = result.stdout.splitlines()
    assert [line.startswith(f"{run}, step 2") for line, run in zip(text[::2], (a, b), strict=True)] == [True, True]
    assert "--paired" in hint
    assert [run["run"] for run in json.loads(last)["runs"]] == [a, b]


def test_what_cannot_be_compared_is_one_line(runs, tmp_path):
    a, b = str(runs / "a"), str(runs / "b")
    assert_one_line(deflow("eval", a, "--paired"), "compares two runs, 1 given")
    assert_one_line(deflow("eval", a, b, a, "--paired"), "compares two runs, 3 given")
    assert_one_line(
        deflow("eval", a, b, "--paired", "--policy", "teacher"), "no policy 'teacher'; there are prior, deflow"
    )
    assert_one_line(deflow("eval", a, str(tmp_path), "--paired"), "not a run folder")
    other = tmp_path / "other"
    shutil.copytree(runs / "b", other)
    values = yaml.safe_load((other / "config.yaml").read_text())
    values["config"]["env"] = "Pendulum-v1"
    (other / "config.yaml").write_text(yaml.safe_dump(values))
    assert_one_line(deflow("eval", a, str(other), "--paired"), ENVIRONMENT, "Pendulum-v1", "only runs of one task")


def test_scores_and_returns_are_compared_in_their_own_unit(monkeypatch):
    outcome = {"success": [0, 1], "episode_return": [10.0, 20.0]}
    references = reference_returns("door-human-v1")
    monkeypatch.setattr(comparison, "reference_returns", lambda task: references)
    task = get_task("door-human-v1")
    values = {
        metric: comparison.values_of(outcome, replace(task, metric=metric)) for metric in ("success", "score", "return")
    }
    np.testing.assert_array_equal(values["success"], [0, 1])
    np.testing.assert_array_equal(values["return"], [10, 20])
    np.testing.assert_allclose(values["score"], normalized_score(np.array([10.0, 20.0]), *references))


def test_successes_are_said_in_words(capsys):
    from deflow_torchrl.cli.train import _print_comparison

    outcome = {"success_rate": 0.5, "episodes": 4}
    _print_comparison(
        {
            "metric": "success", "seed": 3,
            "runs": {label: {"run": label.lower(), "step": 9, "policy": "deflow", "outcome": outcome} for label in "AB"},
            "difference": {"mean": 0.25, "low": -0.5, "high": 1.0, "confidence": 0.95, "pairs": 4},
            "counts": {"both": 1, "only_a": 1, "only_b": 2, "neither": 0}, "p_value": 1.0,
        }
    )  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "B - A: success +0.250, 95% interval -0.500 to +1.000 (paired bootstrap over 4 episodes, seed 3)",
        "both succeed 1, only A 1, only B 2, neither 0; exact two-sided p-value of only A against only B: 1",
    ]
