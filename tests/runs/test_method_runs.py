"""Tiny runs of methods with chunks of actions: offline, online, resumed bit for bit, exported, and by more at test time."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("gymnasium", reason="needs the extra ogbench")

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.deploy import load_policy
from deflow_torchrl.errors import InputError
from deflow_torchrl.export import export_run
from deflow_torchrl.runs.evaluate import ACTING, TestTime, evaluate_run, load_run
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig
from tests.support.networks import NEEDED
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs, go_on, rows, undrawn

LENGTH = 3
METHODS = {
    "dsrl": {"flow_steps": 2, "best_of_n": 2, "pessimism": 0.5},
    "fan": {"q_aggregation": "min"},
    "qam_e": {"flow_steps": 2},
    "qam_f": {"flow_steps": 2},
    "trqam": {"flow_steps": 2, "num_critics": 3, "cloning_steps": 2, "horizon": LENGTH},
    "deflow_floq": {"flow_steps": 2, "noise_samples": 2, "critic_steps": 2, "critic_hidden_dims": [8]},
    "fedit": {"flow_steps": 2, "best_of_n": 2, "num_critics": 3, "pessimism": 0.5},
    "floq": {"flow_steps": 2, "noise_samples": 2, "critic_steps": 2, "critic_hidden_dims": [8], "q_aggregation": "min"},
    "flow_bc": {"flow_steps": 2},
    "fql": {"flow_steps": 2},
}


def make_config(task, out, name, **settings):
    algo = get_algorithm(name).config(**METHODS[name], **NEEDED.get(name, {}))
    return TrainConfig(
        task=task, env=ENVIRONMENT, batch_size=8, hidden_dims=[8], log_interval=1, eval_interval=0, eval_episodes=2,
        eval_workers=1, save_interval=3, offline_steps=4, online_steps=6, chunk=LENGTH, out=str(out), algo=algo, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


@pytest.fixture(scope="module", params=list(METHODS))
def run(request, task, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        train(make_config(task, out, request.param), command="deflow train", show_progress=False)
    return out


def test_a_run_on_chunks_goes_online_and_resumes_bit_for_bit(run, task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    found = rows(run)
    assert found[-1]["step"] == 10
    assert load_run(run).state["action_dim"] == LENGTH
    again = tmp_path / "run"
    train(make_config(task, again, run.parent.name.rstrip("0123456789")), command="deflow train", show_progress=False)
    go_on(again, step=6)
    assert_equal_runs(run, again)


def test_its_policy_is_exported_with_the_width_of_its_noise(run, tmp_path):
    loaded = load_run(run)
    if len(getattr(loaded.learner.policy, "noise_shape", ())) > 1:
        pytest.skip("a best of N chooses by its critics, which are not exported")
    manifest = export_run(run, format="pt2", out=tmp_path / "policy.pt2")
    exported, policy = load_policy(manifest["file"], trusted=True), loaded.learner.policy
    width = manifest["inputs"]["noise"]["shape"][-1]
    observation = np.full((2, 3), 0.5, np.float32)
    noise = np.random.default_rng(0).normal(size=(2, width)).astype(np.float32)
    batch = {"observation": torch.from_numpy(observation), "noise": torch.from_numpy(noise)}
    with torch.no_grad():
        expected = policy(TensorDict(batch, batch_size=[2]))["action"].numpy()
    bounds = loaded.state.get("action_bounds") or [[-1.0], [1.0]]
    low, high = (np.asarray(bound) for bound in bounds)
    chosen = [exported(observation, noise=noise), exported(observation), exported(observation)]
    np.testing.assert_allclose(np.concatenate(chosen, axis=1), low + (expected + 1) * (high - low) / 2, atol=1e-4)


def test_an_edit_alone_is_exported(task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    config = make_config(task, tmp_path / "run", "fedit")
    config.algo.best_of_n, config.online_steps = 1, 0
    train(config, command="deflow train", show_progress=False)
    manifest = export_run(tmp_path / "run", format="pt2", out=tmp_path / "policy.pt2")
    assert manifest["inputs"]["noise"]["shape"][-1] == 2 * LENGTH
    assert load_policy(manifest["file"], trusted=True)(np.zeros(3, np.float32)).shape == (1,)


def test_the_range_of_rewards_is_the_datas_padded_with_zero_and_kept_in_the_checkpoint(task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    found = {}
    for padded in (True, False):
        config = make_config(task, tmp_path / str(padded), "floq")
        config.online_steps, config.algo.pad_reward_range, config.chunk = 0, padded, 1
        record = train(config, command="deflow train", show_progress=False)
        assert "loss_flow_critic" in json.dumps(rows(tmp_path / str(padded)))
        loaded = load_run(tmp_path / str(padded))
        low, high = loaded.state["reward_range"]
        assert low < high < 0  # a pendulum's rewards are negative
        model, horizon = loaded.learner.loss.flow_critic_network.module, 1 / (1 - 0.99)
        assert model.support == pytest.approx(((low - 0.01) * horizon, ((0.0 if padded else high) + 0.01) * horizon))
        found[padded] = record
    assert found[True]["evaluations"].keys() == {"floq"}


@pytest.fixture(scope="module")
def deflow_run(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("deflow") / "run"
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        config = make_config(task, out, "deflow_floq")
        config.online_steps = 0
        train(config, command="deflow train", show_progress=False)
    return out


@pytest.mark.parametrize(
    ("test_time", "name"),
    [
        (TestTime(candidates=4), "deflow_floq, best of 4 by final Q"),
        (TestTime(candidates=4, selection="base"), "deflow_floq, best of 4 by base Q"),
        (TestTime(iterations=3), "deflow_floq, 3 refinements"),
        (TestTime(4, "final", 3), "deflow_floq, 3 refinements, best of 4 by final Q"),
    ],
)
def test_a_trained_run_is_evaluated_with_more_computation_under_a_name_that_says_so(deflow_run, test_time, name):
    found = evaluate_run(deflow_run, policy=ACTING, test_time=test_time, show_progress=False)
    again = evaluate_run(deflow_run, policy=ACTING, test_time=test_time, show_progress=False)
    plain = evaluate_run(deflow_run, policy=ACTING, show_progress=False)
    assert list(found["evaluations"]) == [name]
    assert found == again
    assert found["evaluations"][name]["episode_return"] != plain["evaluations"]["deflow_floq"]["episode_return"]


def test_one_refinement_is_the_policy_as_trained(deflow_run):
    once = evaluate_run(deflow_run, policy=ACTING, test_time=TestTime(iterations=1), show_progress=False)
    plain = evaluate_run(deflow_run, policy=ACTING, show_progress=False)
    assert list(once["evaluations"].values()) == list(plain["evaluations"].values())


def test_policies_that_cannot_be_scaled_are_one_line(task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    config = make_config(task, tmp_path / "run", "flow_bc")
    config.online_steps = 0
    train(config, command="deflow train", show_progress=False)
    with pytest.raises(InputError, match="flow_bc cannot be chosen among candidates: its method has no critics"):
        evaluate_run(tmp_path / "run", test_time=TestTime(candidates=2), show_progress=False)
    with pytest.raises(InputError, match="flow_bc: only a DeFlowActor can be refined again"):
        evaluate_run(tmp_path / "run", test_time=TestTime(iterations=2), show_progress=False)


def test_the_script_of_test_time_compares_every_variant_in_pairs(deflow_run, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "benchmarks" / "test_time.py"
    options = ["--candidates", "3", "--iterations", "2", "--episodes", "3", "--json"]
    monkeypatch.setattr(sys, "argv", ["test_time.py", str(deflow_run), *options])
    runpy.run_path(str(script), run_name="__main__")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    plain = "deflow_floq"
    variants = ["best of 3 by final Q", "best of 3 by base Q", "2 refinements", "worst of 3 by base Q (released)"]
    assert list(found["differences"]) == [f"{plain}, {variant}" for variant in variants]
    returns = {name: np.mean(outcome["episode_return"]) for name, outcome in found["evaluations"].items()}
    for name, difference in found["differences"].items():
        assert difference["pairs"] == 3
        assert difference["mean"] == pytest.approx(returns[name] - returns[plain], abs=1e-4)
    best, worst = (f"{plain}, {which} of 3 by base Q{said}" for which, said in (("best", ""), ("worst", " (released)")))
    assert found["evaluations"][best]["episode_return"] != found["evaluations"][worst]["episode_return"]
