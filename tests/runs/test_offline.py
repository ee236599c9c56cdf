"""`deflow eval --offline`: a run judged by held-out data alone."""

import json
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.modules import FlowMatchingPolicy
from deflow_torchrl.runs.offline import fit_q, flow_likelihood, settling_updates
from tests.support.command_line import assert_one_line, deflow
from tests.support.generation import DATASET
from tests.support.networks import ACTION_DIM, OBSERVATION_DIM
from tests.support.updates import PROBLEM

OBSERVATION = 3
TASK = DATASET.replace("-v0", "-singletask-task2-v0")


@pytest.fixture(scope="module")
def runs(generated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    for name, *more in (["deflow"], ["iql", "algo.temperature=1"], ["bc"]):
        settings = [
            f"task={TASK}",
            f"algo={name}",
            *more,
            "offline_steps=4",
            "batch_size=8",
            "hidden_dims=[8]",
            "eval_episodes=1",
            "eval_max_steps=2",
        ]
        settings += [f"data_root={generated}", f"out={folder / name}", "eval_workers=1", "threads=1"]
        trained = deflow("train", *settings)
        assert trained.returncode == 0, trained.stderr
    return folder


@pytest.mark.parametrize("method", ["deflow", "iql", "bc"])
def test_a_run_is_judged_without_a_simulator_and_twice_alike(method, runs, monkeypatch):
    monkeypatch.setattr("deflow_torchrl.runs.evaluate.Evaluator", None)
    results = [deflow("eval", str(runs / method), "--offline", "--fit-updates", "4", "--json") for _ in range(2)]
    assert results[0].returncode == 0, results[0].stderr
    first, second = (json.loads(result.stdout.splitlines()[-1]) for result in results)
    assert first == second
    assert (first["step"], first["held_out"]["episodes"]) == (4, 1)
    assert first["cloning"]["kind"] == {"iql": "gaussian", "bc": "gaussian"}.get(method, "flow")
    assert math.isfinite(first["cloning"]["negative_log_likelihood"])
    assert 0 <= first["actions"]["at_bounds"] <= 1
    assert (first["actions"]["mean_square_shift"] is None) == (method in ("iql", "bc"))
    assert (first["critics"] is None) == (method == "bc")
    fitted = first["fitted_q"]
    assert fitted["low"] <= fitted["value"] <= fitted["high"]
    assert fitted["observed"] < 0, "rewards of this task are 0 or negative"


def test_what_cannot_be_judged_is_one_line(runs):
    assert_one_line(deflow("eval", str(runs / "bc"), "--offline", "--episodes", "2"), "--offline goes with --held-out")
    assert_one_line(deflow("eval", str(runs / "bc"), "--held-out", TASK), "are for --offline")
    assert_one_line(deflow("eval", str(runs / "bc"), "--offline", "--held-out", "file:none"), "none")


class _Scaled(torch.nn.Module):
    def forward(self, x):
        """Velocity log(2) x: the flow doubles its noise."""
        return math.log(2.0) * x[..., OBSERVATION : OBSERVATION + 2]


def test_the_likelihood_of_a_flow_that_scales_its_noise_is_a_gaussians():
    policy = FlowMatchingPolicy(_Scaled(), 2)
    action = torch.tensor([[0.5, -0.25], [0.0, 1.0]])
    data = TensorDict(observation=torch.zeros(2, OBSERVATION), action=action, batch_size=[2])
    expected = -torch.distributions.Normal(0.0, 2.0).log_prob(action).mean()
    found = flow_likelihood(policy, data)["negative_log_likelihood"]
    assert found == pytest.approx(float(expected), abs=1e-4)


def test_fitted_q_evaluation_settles_at_the_value_by_default_and_its_interval_grows_with_the_episodes_spread():
    """Reward 1, or 0 or 2 by episode, for ever: worth 5 at a discount of 0.8."""
    gamma, episodes, length = 0.8, 40, 10
    policy = TensorDictModule(
        lambda observation: torch.zeros(len(observation), 1), in_keys=["observation"], out_keys=["action"]
    )
    torch.manual_seed(0)
    found = {}
    for spread in (0.0, 1.0):
        reward = 1 + spread * torch.tensor([-1.0, 1.0]).repeat(episodes // 2).repeat_interleave(length)
        rows = episodes * length
        data = TransitionDataset.from_arrays(
            observations=torch.zeros(rows, 1).numpy(),
            actions=(torch.rand(rows, 1) - 0.5).numpy(),
            rewards=reward.numpy(),
            terminals=torch.zeros(rows).numpy(),
            timeouts=(torch.arange(rows) % length == length - 1).numpy(),
        )
        problem = ProblemSpec(observation_dim=1, action_dim=1, hidden_dims=(64, 64), gamma=gamma)
        updates = settling_updates(gamma)
        found[spread] = fit_q(policy, problem, data, data, gamma=gamma, updates=updates, show_progress=False)
    assert found[0.0]["value"] == pytest.approx(5, rel=0.03)
    assert found[0.0]["low"] < 5 < found[0.0]["high"]
    # A mean of 40 episodes with deviation 1 has the error 0.16, its value five times that, the interval 2.4 of these each way.
    assert 1.5 < found[1.0]["high"] - found[1.0]["low"] < 10
    assert found[0.0]["high"] - found[0.0]["low"] < 0.75


def test_held_out_episodes_of_one_observation_are_passed_over():
    flags = {
        "terminals": np.zeros(6),
        "timeouts": np.array([0, 0, 1, 0, 1, 1]),
    }  # the last row is an episode of its own
    places = np.arange(6.0)[:, None] * np.ones((1, OBSERVATION_DIM))
    held = TransitionDataset.from_arrays(places, np.zeros((6, ACTION_DIM)), np.ones(6), **flags)
    assert held.num_episodes == 3
    policy = (algorithm := get_algorithm("bc")).build(algorithm.config(), PROBLEM).policy
    found = fit_q(policy, PROBLEM, held, held, gamma=0.9, updates=1, show_progress=False)
    assert math.isfinite(found["value"])
