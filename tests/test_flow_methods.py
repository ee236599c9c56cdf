"""Methods whose policy is a flow or distilled from one: trained, evaluated and taken online as any other."""

import json

import pytest
import torch

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl import cli
from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.evaluate import load_run
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig
from deflow_torchrl.trainers import UpdateStep
from tests.support.command_line import benchmark, benchmark_apart
from tests.support.networks import NEEDED, make_batch
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.updates import PROBLEM

TERMS = {
    "floq": {"loss_flow", "loss_actor", "loss_flow_critic", "loss_qvalue", "return_std", "distillation"},
    "flow_bc": {"loss_flow"},
    "fql": {"loss_flow", "loss_actor", "loss_qvalue", "distillation", "q"},
    "fbrac": {"loss_flow", "loss_actor", "loss_qvalue", "flow_matching", "q"},
    "fawac": {"loss_flow", "loss_qvalue", "weight"},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


@pytest.mark.parametrize("name", list(TERMS))
def test_a_run_trains_offline_and_online_and_evaluates_the_method_alone(name, task, tmp_path, monkeypatch):
    for drawn in ("plot_learning_curve", "write_html_report"):
        monkeypatch.setattr(f"deflow_torchrl.runs.run.{drawn}", lambda *_, **__: None)
    algo = get_algorithm(name).config(flow_steps=2, **NEEDED.get(name, {}))
    out = tmp_path / "run"
    record = train(
        TrainConfig(
            task=task, env=ENVIRONMENT, batch_size=8, hidden_dims=[8], log_interval=1, eval_interval=0, eval_episodes=1,
            eval_workers=1, save_interval=4, offline_steps=4, online_steps=4, out=str(out), algo=algo,
        ), command="deflow train", show_progress=False,
    )  # fmt: skip
    assert set(record["evaluations"]) == {name}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = {key.removeprefix("train/") for row in rows for key in row if key.startswith("train/")}
    assert TERMS[name] <= logged
    assert max(row["step"] for row in rows) == 8
    learner = load_run(out, device="cpu").learner
    torch.manual_seed(0)
    fresh = get_algorithm(name).build(algo, PROBLEM)
    assert type(learner.policy) is type(fresh.policy)
    assert learner.acting_policy == name


@pytest.mark.parametrize("name", list(TERMS))
def test_what_is_trained_is_what_acts(name):
    torch.manual_seed(0)
    learner = get_algorithm(name).build(get_algorithm(name).config(**NEEDED.get(name, {})), PROBLEM)
    update = UpdateStep(learner)
    observation = make_batch(5).select("observation", "noise")
    before = learner.policy(observation.clone())["action"].detach()
    for _ in range(3):
        update(make_batch(16))
    assert not torch.equal(learner.policy(observation.clone())["action"], before)
    assert {id(p) for p in learner.policy.parameters()} <= {id(p) for g in learner.param_groups for p in g["params"]}


@pytest.mark.parametrize(("name", "setting"), [("fql", "alpha"), ("fbrac", "alpha"), ("fawac", "temperature")])
def test_a_coefficient_that_nobody_gave_is_asked_for(name, setting):
    with pytest.raises(InputError, match=rf"algo\.{setting} has no value"):
        get_algorithm(name).build(get_algorithm(name).config(), PROBLEM)


@pytest.mark.parametrize(
    "override",
    ["fql algo.alpha=-1", "fbrac algo.alpha=-1", "fawac algo.temperature=-1", "fawac algo.max_weight=0"]
    + [f"{name} algo.flow_steps=0" for name in TERMS],
)
def test_settings_out_of_range_are_refused(override):
    name, wrong = override.split()
    with pytest.raises(InputError, match=wrong.split("=")[0].replace(".", r"\.")):
        compose_config(["task=x", f"algo={name}", wrong])


def test_the_command_line_asks_in_one_line(task, tmp_path, capsys):
    arguments = ["train", f"task={task}", f"env={ENVIRONMENT}", "algo=fql", f"out={tmp_path / 'run'}"]
    arguments += ["hidden_dims=[8]", "offline_steps=1", "eval_episodes=1"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "algo.alpha has no value" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_one_step_policy_is_exported(tmp_path):
    from deflow_torchrl.export import export_policy

    learner = get_algorithm("fql").build(get_algorithm("fql").config(alpha=1.0), PROBLEM)
    sizes = {"observation_dim": PROBLEM.observation_dim, "action_dim": PROBLEM.action_dim}
    manifest = export_policy(learner.policy, tmp_path / "fql.pt2", **sizes)
    assert (tmp_path / "fql.pt2").is_file()
    assert manifest["inputs"]["noise"]["shape"] == ["batch", PROBLEM.action_dim]
    assert manifest["action_low"] == [-1.0] * PROBLEM.action_dim


@pytest.mark.parametrize("method", ["fql", "deflow"])
def test_a_comparison_with_the_authors_code_that_cannot_be_made_is_refused_in_one_line(
    method, tmp_path, monkeypatch, capsys
):
    arguments = ("losses", method, "--against-jax", tmp_path)

    def refused(result):
        code, _, err = result
        assert code == 2
        assert "Traceback" not in err
        return err.splitlines()[-1]

    nothing = refused(benchmark(monkeypatch, capsys, "against_jax", *arguments))
    assert nothing.endswith(f"is no checkout of the authors' repository: no agents/{method}.py")
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / f"{method}.py").write_text("import a_module_that_is_not_there\n")
    assert refused(benchmark_apart("against_jax", *arguments)).endswith("give one that can with --jax-python")
