"""``normalize=standard`` in whole runs: data of any unit, online experience, resume, export, and runs from before the setting."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")

from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.deploy import load_policy
from deflow_torchrl.export import export_run
from deflow_torchrl.runs.evaluate import evaluate_run, load_run
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint, read_header, save_checkpoint
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs, go_on, rows, undrawn

FACTORS, OFFSETS = np.float32([1e3, 1e-3, 255]), np.float32([5e3, -4e-3, 127])


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


def run(out, task, **settings):
    given = {
        "task": task, "batch_size": 8, "hidden_dims": [8], "log_interval": 1, "eval_interval": 0, "eval_episodes": 1,
        "eval_workers": 1, "save_interval": 3, "offline_steps": 6, "out": str(out), "algo": DeFlowConfig(flow_steps=2),
        "normalize": "standard", **settings,
    }  # fmt: skip
    train(TrainConfig(**given), command="deflow train", show_progress=False)
    return out


def test_data_scaled_by_a_thousand_trains_to_the_same_losses(task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    folder = tmp_path / "scaled"
    td = TransitionDataset.load(task.removeprefix("file:"))[:]
    scaled = {"observations": td["observation"], "next_observations": td["next", "observation"]}
    TransitionDataset.from_arrays(
        **{name: value.numpy() * FACTORS + OFFSETS for name, value in scaled.items()},
        actions=td["action"].numpy(), rewards=td["next", "reward"].numpy(),
        terminals=td["next", "terminated"].numpy(), timeouts=td["next", "truncated"].numpy(),
    ).save(folder)  # fmt: skip
    one = run(tmp_path / "one", task, offline_steps=20, save_interval=0)
    other = run(tmp_path / "other", f"file:{folder}", offline_steps=20, save_interval=0)
    for expected, found in zip(rows(one), rows(other), strict=True):
        names = [name for name in expected if name.startswith("train/loss")]
        assert {name: found[name] for name in names} == pytest.approx(
            {n: expected[n] for n in names}, rel=1e-4, abs=1e-6
        )


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """Offline for 6 steps, online for 6, with a frozen prior."""
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        return run(
            tmp_path_factory.mktemp("runs") / "run", task, env=ENVIRONMENT, online_steps=6, freeze_prior=True,
            base_actions=2,
        )  # fmt: skip


@pytest.mark.parametrize("step", [6, 9])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_stopped(finished, tmp_path, monkeypatch, step):
    undrawn(monkeypatch)
    other = shutil.copytree(finished, tmp_path / "run")
    go_on(other, step=step)
    assert_equal_runs(finished, other)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_the_exported_policy_takes_observations_in_the_datas_units(finished, tmp_path, format):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    path = tmp_path / f"policy.{format}"
    export_run(finished, out=path)
    loaded = load_run(finished)
    scale = [tensor for name, tensor in loaded.learner.loss.state_dict().items() if name.endswith("normalizer.scale")]
    assert all(not torch.equal(tensor, torch.ones_like(tensor)) for tensor in scale)
    observation, noise = torch.randn(5, 3), torch.randn(5, 1)
    with torch.no_grad():
        expected = loaded.learner.policy(TensorDict(observation=observation, noise=noise, batch_size=[5]))["action"]
    found = load_policy(path, trusted=True)(observation.numpy(), noise=noise.numpy())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_an_evaluation_of_the_checkpoint_gives_the_runs_own_numbers(finished):
    record = json.loads((finished / "record.json").read_text())
    assert evaluate_run(finished, show_progress=False)["evaluations"] == record["evaluations"]


def test_a_run_from_before_the_setting_opens_and_goes_on_without_it(task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    out = run(tmp_path / "run", task, normalize="none")
    settings = yaml.safe_load((out / "config.yaml").read_text())
    del settings["config"]["normalize"]
    (out / "config.yaml").write_text(yaml.safe_dump(settings))
    for path in list_checkpoints(out / "checkpoints"):
        header, state = read_header(path), load_checkpoint(path)
        del header["identity"]["settings"]["normalize"]
        save_checkpoint(path.parent, header["step"], state, identity=header["identity"])
    load_run(out)
    go_on(out, step=3)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
