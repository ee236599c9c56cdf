"""BC, IQL, IFQL, ReBRAC and RLPD as runs: offline, online, several seeds, killed and resumed, evaluated and exported."""

import signal

import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl import export
from deflow_torchrl.algorithms import (
    BCConfig,
    CACConfig,
    CalQLConfig,
    IDQLConfig,
    IFQLConfig,
    IQLConfig,
    ReBRACConfig,
    RLPDConfig,
    SRPOConfig,
    get_algorithm,
)
from deflow_torchrl.deploy import load_policy
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.evaluate import evaluate_run, load_run
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig, config_to_dict
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint, step_of
from tests.support.killable import Children
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs, rows, undrawn
from tests.support.updates import PROBLEM

METHODS = {
    "bc": BCConfig(),
    "iql": IQLConfig(temperature=2.0),
    "ifql": IFQLConfig(num_samples=4, flow_steps=2),
    "rebrac": ReBRACConfig(actor_bc_coef=0.3, critic_bc_coef=0.2),
    "rlpd": RLPDConfig(),
    "calql": CalQLConfig(target_gap=0.8, num_actions=3),
    "idql": IDQLConfig(num_samples=4),
    "srpo": SRPOConfig(beta=0.1),
    "cac": CACConfig(eta=0.1, num_candidates=4),
}
TERMS = {
    "bc": {"actor"},
    "iql": {"value", "qvalue", "actor"},
    "ifql": {"value", "qvalue", "flow"},
    "rebrac": {"qvalue", "actor"},
    "rlpd": {"qvalue", "actor", "alpha"},
    "calql": {"qvalue", "actor", "alpha", "alpha_prime"},
    "idql": {"score", "value", "qvalue"},
    "srpo": {"score", "value", "qvalue", "actor"},
    "cac": {"consistency", "actor", "qvalue"},
}
OFFLINE = [name for name in METHODS if name != "rlpd"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


def settings(task, out, name, **changes):
    return TrainConfig(
        **{
            "task": task, "env": ENVIRONMENT, "batch_size": 8, "hidden_dims": [8], "log_interval": 1, "eval_interval": 0,
            "eval_episodes": 2, "eval_workers": 1, "save_interval": 7, "offline_steps": 8, "online_steps": 18, "out": str(out),
            "algo": METHODS[name], **({} if name in OFFLINE else {"offline_steps": None}), **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """A run of each method: 8 steps offline, 18 online, which is more than an episode."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        records = {name: train(settings(task, out / name, name), command="t", show_progress=False) for name in METHODS}
    return out, records


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_every_term_acts_online_and_is_evaluated_under_its_name(finished, name):
    out, records = finished
    assert list(records[name]["evaluations"]) == [name]
    assert records[name]["online"]["env_steps"] == 18
    last = rows(out / name)[-1]
    losses = {key.removeprefix("train/loss_") for key in last if key.startswith("train/loss_")}
    assert losses == TERMS[name]
    state = load_checkpoint(list_checkpoints(out / name / "checkpoints")[-1])
    actions = state["online"]["buffer"]["_storage"]["online"]["action"]
    # A policy that has hardly learned acts near 0. Exploring, BC and IQL are at a bound a third of the time, ReBRAC adds at most
    # 0.5 to it, with a standard deviation of 0.2; IFQL's flow starts from noise.
    assert actions.std() > (0.12 if name != "srpo" else 0.0)
    if name in ("bc", "iql", "ifql"):
        assert (actions.abs() == 1).any().item()
    elif name in ("rebrac", "rlpd", "calql", "srpo"):
        assert not (actions.abs() == 1).any()
    repeated = evaluate_run(out / name, episodes=2, show_progress=False)["evaluations"]
    assert repeated == records[name]["evaluations"], "eval repeats the run's own numbers"


def test_the_best_of_n_is_evaluated_the_same_by_any_number_of_processes(finished):
    first, second = (
        evaluate_run(finished[0] / "ifql", episodes=3, workers=workers, show_progress=False)["evaluations"]
        for workers in (1, 2)
    )
    assert first == second
    other = evaluate_run(finished[0] / "ifql", episodes=3, workers=1, seed=5, show_progress=False)["evaluations"]
    assert other != first


def test_rlpd_has_no_offline_phase_and_batches_that_are_half_data(finished, task, tmp_path):
    config = yaml.safe_load((finished[0] / "rlpd" / "config.yaml").read_text())["config"]
    assert (config["offline_steps"], config["mixing"], config["offline_fraction"]) == (0, "balanced", 0.5)
    assert rows(finished[0] / "rlpd")[0]["phase"] == "online"
    for steps in ({"offline_steps": 5}, {"online_steps": 0}):
        with pytest.raises(InputError, match=r"algo=rlpd .* no offline phase; set online_steps"):
            compose_config([f"task={task}", f"env={ENVIRONMENT}", "algo=rlpd", *(f"{k}={v}" for k, v in steps.items())])


@pytest.mark.parametrize("name", OFFLINE)
def test_seeds_are_trained_together(task, tmp_path, name, monkeypatch):
    undrawn(monkeypatch)
    config = settings(task, tmp_path / "group", name, online_steps=0, seeds=[3, 1], eval_episodes=1)
    summary = train(config, command="t", show_progress=False)
    assert list(summary["mean"]) == [name]
    one, other = (rows(tmp_path / "group" / f"seed{seed}")[-1] for seed in (3, 1))
    assert {key for key in one if "loss" in key} == {f"train/loss_{term}" for term in TERMS[name]}
    assert all(one[key] != other[key] for key in one if "loss" in key)


def test_rebrac_killed_between_an_odd_and_an_even_update_is_bit_for_bit_the_uninterrupted_run(task, tmp_path):
    config = config_to_dict(settings(task, "", "rebrac", save_interval=5))
    with Children(tmp_path / "log") as children:
        straight, killed = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
        assert children.run(straight, config) == 0, children.log.read_text()
        for number, kept in ((2, 5), (4, 15)):  # in the writing of step 8, where a phase ends; then of step 20
            die = ("written", number)
            assert children.run(killed, config if number == 2 else None, die=die) == -signal.SIGKILL
            assert step_of(list_checkpoints(killed / "checkpoints")[-1]) == kept
        assert children.run(killed) == 0, children.log.read_text()
    assert_equal_runs(straight, killed)
    moves = [row["train/loss_actor"] for row in rows(straight)]
    assert len(set(moves)) > 10


@pytest.mark.parametrize("name", ["bc", "iql", "rebrac", "rlpd", "calql", "srpo"])
def test_policies_without_noise_are_exported(finished, name, tmp_path):
    out = tmp_path / "policy.pt2"
    manifest = export.export_run(finished[0] / name, out=out)
    assert list(manifest["inputs"]) == ["observation"]
    assert manifest["action_low"] == [-1.0]
    observation = np.random.default_rng(0).standard_normal((5, 3), np.float32)
    with torch.no_grad():
        batch = TensorDict(observation=torch.from_numpy(observation), batch_size=[5])
        expected = load_run(finished[0] / name).learner.policy(batch)["action"]
    np.testing.assert_allclose(load_policy(out, trusted=True)(observation), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["idql", "cac"])
def test_candidates_chosen_by_value_are_not_exported_and_the_line_says_so(finished, name, tmp_path):
    with pytest.raises(InputError, match="ValueChosenPolicy cannot be exported"):
        export.export_run(finished[0] / name, out=tmp_path / "policy.pt2")


@pytest.mark.parametrize("name", ["calql", "idql", "cac"])
def test_staged_methods_killed_and_resumed_are_bit_for_bit_the_uninterrupted_run(task, tmp_path, name):
    config = config_to_dict(settings(task, "", name, save_interval=5))
    with Children(tmp_path / "log") as children:
        straight, killed = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
        assert children.run(straight, config) == 0, children.log.read_text()
        assert children.run(killed, config, die=("written", 3)) == -signal.SIGKILL
        assert children.run(killed) == 0, children.log.read_text()
    assert_equal_runs(straight, killed)


def test_calql_wants_one_of_its_alternatives(task, tmp_path):
    with pytest.raises(InputError, match=r"give algo.alpha or algo.target_gap; this task names none"):
        train(settings(task, tmp_path / "run", "calql", algo=CalQLConfig()), command="t", show_progress=False)
    both = CalQLConfig(alpha=1.0, target_gap=1.0)
    with pytest.raises(InputError, match=r"only one of them"):
        train(settings(task, tmp_path / "run", "calql", algo=both), command="t", show_progress=False)


def test_a_best_of_n_cannot_be_exported_and_says_so(finished, tmp_path):
    with pytest.raises(InputError, match="BestOfNPolicy cannot be exported"):
        export.export_run(finished[0] / "ifql", out=tmp_path / "policy.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "setting"), [("iql", "temperature"), ("ifql", "num_samples"), ("rebrac", "actor_bc_coef")]
)
def test_what_only_the_task_can_know_is_asked_for_by_name(name, setting):
    algorithm = get_algorithm(name)
    with pytest.raises(InputError, match=f"algo.{setting}"):
        algorithm.build(algorithm.config(), PROBLEM)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("algo=iql algo.expectile=1", "algo.expectile=1.0"),
        ("algo=iql algo.temperature=-1", "algo.temperature=-1.0"),
        ("algo=ifql algo.num_samples=0", "algo.num_samples=0"),
        ("algo=ifql algo.flow_steps=0", "algo.flow_steps=0"),
        ("algo=rebrac algo.critic_bc_coef=-0.1", "algo.critic_bc_coef=-0.1"),
        ("algo=rebrac algo.period=0", "algo.period=0"),
        ("algo=rebrac algo.q_aggregation=mean", "unknown setting 'algo.q_aggregation'"),
        ("algo=bc algo.tau=0.1", "unknown setting 'algo.tau'"),
    ],
)
def test_settings_out_of_range_are_one_line(override, part):
    with pytest.raises(InputError, match=part.replace(".", r"\.")):
        compose_config(["task=file:data", *override.split()])
