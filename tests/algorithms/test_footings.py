"""algo.footing: what the methods' own publications had, from the table to the networks, and runs in it."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("hydra", reason="needs the extra cli")
pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")

from deflow_torchrl.algorithms import ALGORITHMS, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import setting_names
from deflow_torchrl.sweep import parse_sweep
from deflow_torchrl.tasks.tables import read_table
from deflow_torchrl.trainers import UpdateStep
from tests.support.command_line import deflow
from tests.support.networks import NEEDED, add_draws, make_batch
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs, go_on, rows, undrawn

FOOTED = [name for name, method in ALGORITHMS.items() if "footing" in setting_names(method.config)]
CUBE, ANT = "cube-double-play-singletask-v0", "antmaze-giant-navigate-singletask-v0"
SCENE, HUMAN = "scene-play-singletask-v0", "humanoidmaze-medium-navigate-singletask-v0"
QAM = {"batch_size": 256, "eval_interval": 50_000, "warmup_steps": 5000, "offline_steps": 1_000_000}
CASES = [
    ("idql", CUBE, {"offline_steps": 3_000_000, "batch_size": 512, "hidden_dims": [256] * 2, "expectile": 0.9}),
    ("idql", ANT, {"hidden_dims": [512] * 2, "expectile": 0.7, "eval_interval": 250_000}),
    (
        "idql",
        "pen-human-v1",
        {"offline_steps": 3_000_000, "hidden_dims": [256] * 2, "expectile": 0.7, "num_samples": 32},
    ),
    ("srpo", CUBE, {"offline_steps": 3_000_000, "policy_hidden_dims": [256] * 2, "behavior_steps": 0, "beta": 0.1}),
    ("cac", CUBE, {"offline_steps": 1_000_000, "hidden_dims": [256] * 3, "schedule_steps": 50_000, "max_q_backup": 10}),
    ("cac", "antmaze-large-play-v2", {"max_grad_norm": 10, "normalize_target": True, "reward_scale": 4, "eta": 4.5}),
    ("cac", "door-human-v1", {"standardize_rewards": True, "actor_lr": 3e-5, "max_q_backup": 1, "max_grad_norm": 5}),
    ("rlpd", CUBE, {"batch_size": 256, "hidden_dims": [512] * 4}),
    (
        "fedit",
        CUBE,
        QAM | {"chunk": 5, "chunk_ends": "valid_row", "reward": "task", "num_critics": 10, "pessimism": 0.5},
    ),
    ("dsrl", SCENE, QAM | {"chunk": 5, "reward": "sparse", "noise_scale": 0.4}),
    ("qam", HUMAN, QAM | {"chunk": 1, "pessimism": 0, "num_critics": 10, "gamma": 0.995}),
    ("qam_e", "puzzle-4x4-play-singletask-v0", {"inverse_temperature": 0.1, "edit_scale": 0.9, "reward": "sparse"}),
    ("qam_f", SCENE, {"inverse_temperature": 1, "distillation_coef": 300, "chunk": 5}),
    ("trqam", HUMAN, {"cloning_steps": 300_000, "offline_steps": 1_300_000, "gamma": 0.999}),
    ("trqam", "cube-triple-play-singletask-v0", {"hidden_dims": [1024] * 4, "flow_layer_norm": True, "chunk": 5}),
    ("fan", CUBE, {"gamma": 0.995, "alpha": 100, "critic_alpha": 0, "chunk": 1}),
]


def value_of(config, name):
    return getattr(config if hasattr(config, name) else config.algo, name)


@pytest.mark.parametrize(("name", "task", "expected"), CASES)
def test_the_original_footing_has_the_publications_settings_and_what_is_given_goes_before_them(name, task, expected):
    more = ["online_steps=10"] if name == "rlpd" else []
    config = compose_config([f"task={task}", f"algo={name}", "algo.footing=original", *more])
    assert {key: value_of(config, key) for key in expected} == expected
    common = compose_config([f"task={task}", f"algo={name}", *more])
    assert (common.batch_size, common.chunk, common.reward, common.hidden_dims) == (256, 1, "task", [512] * 4)
    given = [f"{key}=7" for key in expected if key in ("offline_steps", "batch_size", "chunk", "eval_interval")]
    given += [f"algo.{key}=3" for key in expected if key in ("num_critics", "max_grad_norm", "cloning_steps")]
    again = compose_config([f"task={task}", f"algo={name}", "algo.footing=original", *more, *given])
    for text in given:
        key, _, value = text.removeprefix("algo.").partition("=")
        assert value_of(again, key) == int(value)


def test_srpos_authors_train_one_part_after_the_other():
    config = compose_config([f"task={ANT}", "algo=srpo", "algo.footing=original", "algo.schedule=vp"])
    algo = config.algo
    assert (config.offline_steps, config.batch_size, algo.behavior_steps, algo.value_steps) == (
        4_500_000, 2048, 2_000_000, 1_500_000,
    )  # fmt: skip
    assert (algo.expectile, algo.normalize_q_gradient, algo.policy_hidden_dims) == (0.9, True, [256] * 4)


@pytest.mark.parametrize("name", FOOTED)
def test_every_entry_of_the_table_is_a_setting_and_another_footing_is_one_line(name):
    known = {
        *setting_names(type(compose_config([f"task={CUBE}"]))),
        *(f"algo.{key}" for key in setting_names(get_algorithm(name).config)),
    }
    for entry in read_table("footings.json")["original"]:
        assert name not in entry["methods"] or entry["settings"].keys() <= known
    with pytest.raises(InputError, match=r"algo.footing=own is out of range; expected common or original"):
        compose_config([f"task={CUBE}", f"algo={name}", "algo.footing=own", "online_steps=1"])


@pytest.mark.parametrize("protocol", ["tiny"])
def test_an_original_footing_under_another_protocol_than_the_papers_is_one_line(tmp_path, protocol):
    arguments = ["tasks=cube-double", "algos=idql:footing=original,deflow", f"out={tmp_path / 'out'}"]
    found = deflow("sweep", *arguments, f"protocol={protocol}", "--dry-run")
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert f"protocol={protocol}" in found.stderr
    plan = parse_sweep([*arguments, "protocol=paper"])
    assert {cell.settled.batch_size for cell in plan.cells} == {512, 256}


def learner(name, **settings):
    algorithm = get_algorithm(name)
    needed = {**NEEDED.get(name, {}), **settings, "footing": "original"}
    problem = ProblemSpec(4, 3, hidden_dims=(16, 16), num_updates=10, reward_moments=(0.5, 2.0))
    return algorithm.build(algorithm.config(**needed), problem)


def test_idqls_networks_and_optimiser_are_its_own():
    built = learner("idql")
    norm, _, activation, *_ = built.loss.value_network.module
    assert (type(norm), type(activation)) == (nn.LayerNorm, nn.ReLU)
    assert not [layer for layer in built.loss.qvalue_network.modules() if isinstance(layer, nn.LayerNorm | nn.GELU)]
    rest, score = built.param_groups
    assert (score["weight_decay"], score["decoupled_weight_decay"], score["cosine_steps"]) == (1e-4, True, 10)
    assert "weight_decay" not in rest
    update = UpdateStep(built)
    kept = [parameter.detach().clone() for parameter in score["params"]]
    batch = add_draws(make_batch(16), "idql")
    for _ in range(11):
        update(batch.clone())
    rates = [float(group["lr"]) for group in update.optimizer.param_groups]
    assert rates == [3e-4, pytest.approx(0, abs=1e-9)]
    assert not all(map(torch.equal, kept, score["params"]))


def test_trqams_flows_can_have_layer_norm():
    loss = learner("trqam", flow_layer_norm=True).loss
    for flow in (loss.flow_policy, loss.actor_network):
        assert sum(isinstance(layer, nn.LayerNorm) for layer in flow.modules()) == 2
    assert not any(isinstance(layer, nn.LayerNorm) for layer in learner("trqam").loss.flow_policy.modules())


def test_cacs_critics_are_clipped_too_and_its_rewards_are_standardised():
    built = learner("cac", max_grad_norm=0.5, actor_lr=1e-3, standardize_rewards=True)
    assert [stage.max_grad_norm for stage in built.stages] == [0.5, 0.5]
    assert [group["lr"] for group in built.param_groups] == [3e-4, 1e-3]
    assert (built.loss.reward_scale, built.loss.reward_shift) == (0.5, -0.25)
    batch = add_draws(make_batch(16), "cac")
    scaled = batch.clone()
    scaled["next", "reward"] = batch["next", "reward"] * 0.5 - 0.25
    expected = built.loss.qvalue_loss(batch)[0]
    built.loss.reward_scale, built.loss.reward_shift = 1.0, 0.0
    torch.testing.assert_close(built.loss.qvalue_loss(scaled)[0], expected)
    assert [type(layer) for layer in built.loss.qvalue_network.modules()].count(nn.Mish) == 2


def test_calqls_policy_has_a_learned_deviation_and_a_rate_of_its_own():
    built = learner("calql", policy_lr=1e-4)
    assert built.whole_episodes
    rest, policy, temperature = built.param_groups
    assert [group["lr"] for group in (rest, policy, temperature)] == [3e-4, 1e-4, 1e-4]
    assert temperature["params"] == [built.loss.log_alpha]
    names = [name for name, _ in built.loss.actor_network_params.named_parameters()]
    assert sum("log_std" in name for name in names) == 2
    assert len(rest["params"]) + len(policy["params"]) + 1 == len(
        [p for p in built.loss.parameters() if p.requires_grad]
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


PHASED = {"behavior_steps": 3, "value_steps": 3}
RUNS = {
    "idql": {},
    "srpo": {"schedule": "vp", **PHASED},
    "cac": {"standardize_rewards": True},
    "calql": {"policy_lr": 1e-4},
    "qam_e": {"flow_steps": 2},
    "trqam": {"flow_steps": 2, "cloning_steps": 3, "flow_layer_norm": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_the_original_footing_says_so_in_its_record_and_resumes_bit_for_bit(task, tmp_path, monkeypatch, name):
    undrawn(monkeypatch)
    given = [f"algo.{key}={value}" for key, value in {**NEEDED.get(name, {}), **RUNS[name]}.items()]
    found = {}
    for run in ("one", "other"):
        config = compose_config(
            [f"task='{task}'", f"env={ENVIRONMENT}", f"algo={name}", "algo.footing=original", *given, "batch_size=8",
             "hidden_dims=[8]", "offline_steps=8", "save_interval=5", "log_interval=1", "eval_interval=0", "eval_episodes=1",
             "eval_workers=1", f"out='{tmp_path / run}'"]
        )  # fmt: skip
        found = train(config, command="deflow train", show_progress=False)
    assert found["config"]["algo"]["footing"] == "original"
    assert found["variant"]["footing"] == "original"
    go_on(tmp_path / "other", step=5)
    assert_equal_runs(tmp_path / "one", tmp_path / "other")
    logged = [{key for key in row if key.startswith("train/loss_")} for row in rows(tmp_path / "one")]
    if name in ("srpo", "trqam"):
        assert logged[0] == {"train/loss_score" if name == "srpo" else "train/loss_flow"}
        assert "train/loss_actor" in logged[-1]
    assert json.loads((tmp_path / "one" / "record.json").read_text())["config"]["batch_size"] == 8


def test_phases_longer_than_the_run_are_one_line(task, tmp_path):
    config = compose_config(
        [f"task='{task}'", "env=none", "algo=trqam", "algo.footing=original", "offline_steps=8", "hidden_dims=[8]",
         f"out='{tmp_path / 'run'}'"]
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"trqam has phases, the last of which begins after 300000 updates, and the run has 8"
    ):
        train(config, command="deflow train", show_progress=False)
