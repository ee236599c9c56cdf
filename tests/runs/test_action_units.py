"""Actions of any bounds: mapped to [-1, 1] for training, and executed in their own units by evaluation, collection and export."""

import itertools

import numpy as np
import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("gymnasium", reason="needs the extra ogbench or minari")

from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.deploy import load_policy
from deflow_torchrl.errors import InputError
from deflow_torchrl.export import export_policy, export_run
from deflow_torchrl.runs.evaluate import load_run
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig
from deflow_torchrl.sources.files import import_files
from deflow_torchrl.trainers import Evaluator, OnlineExperience
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint
from tests.support.networks import ACTION_DIM, OBSERVATION_DIM, make_actor
from tests.support.odd_simulators import odd
from tests.support.runs import undrawn

ECHO = odd("Echo")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A file whose actions lie in [0, 255]."""
    path = tmp_path_factory.mktemp("data") / "pixels.npz"
    rng = np.random.default_rng(0)
    np.savez(
        path, observations=rng.normal(size=(40, 2)), actions=rng.uniform(0, 255, (40, 1)), rewards=np.ones(40),
        terminals=np.zeros(40), timeouts=np.arange(40) % 10 == 9,
    )  # fmt: skip
    return path


def run(out, recorded, bounds=(0, 255), **settings):
    folder = out.with_name(f"{out.name}-data")
    import_files(recorded, action_bounds=bounds).save(folder)
    config = TrainConfig(
        task=f"file:{folder}", env=ECHO, batch_size=8, hidden_dims=[8], log_interval=1, eval_interval=0, eval_episodes=1,
        eval_workers=1, offline_steps=3, out=str(out), algo=DeFlowConfig(flow_steps=2), **settings,
    )  # fmt: skip
    train(config, command="train", show_progress=False)
    return folder


@pytest.fixture(scope="module")
def trained(recorded, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        return out, run(out, recorded, online_steps=12)


def test_data_and_experience_are_in_the_units_of_the_policy_and_the_environment_in_its_own(recorded, trained):
    out, folder = trained
    given = np.load(recorded)["actions"]
    stored = TransitionDataset.load(folder)
    np.testing.assert_allclose(stored.action.numpy()[:9], given[:9] / 127.5 - 1, atol=2e-5)
    state = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    assert state["action_bounds"] == [0, 255]
    seen = []
    with Evaluator(f"gym:{ECHO}", num_envs=1) as evaluator:
        evaluator.run(
            load_run(out).learner.policy, episodes=1,
            on_step=lambda _, observations, actions: seen.append((observations[0], actions[0])),
        )  # fmt: skip
    for (_, action), (after, _) in itertools.pairwise(seen):
        assert abs(float(action[0])) <= 1
        assert after[0] == pytest.approx(127.5 * (action[0] + 1), abs=1e-3)


def test_collected_actions_are_in_the_units_of_the_policy_and_their_effects_in_the_environments(trained):
    stored = []

    def add(transition):
        stored.append(transition.clone())
        return torch.tensor([len(stored) - 1])

    policy = load_run(trained[0]).learner.online_policy
    with OnlineExperience(f"gym:{ECHO}", policy, seed=0, add=add, discard=lambda index: None) as experience:
        for _ in range(5):
            experience.step()
    collected = torch.cat(stored)
    assert collected["action"].abs().max() <= 1
    effects = collected["next", "observation"][:, :1]
    torch.testing.assert_close(effects, 127.5 * (collected["action"] + 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_the_exported_policy_acts_in_the_units_of_the_file(trained, tmp_path, format):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    out, _ = trained
    path = tmp_path / f"policy.{format}"
    manifest = export_run(out, out=path)
    assert (manifest["action_low"], manifest["action_high"]) == ([0.0], [255.0])
    observation, noise = torch.randn(50, 2), torch.randn(50, 1)
    with torch.no_grad():
        acted = load_run(out).learner.policy(TensorDict(observation=observation, noise=noise, batch_size=[50]))[
            "action"
        ]
    found = load_policy(path, trusted=True)(observation.numpy(), noise=noise.numpy())
    np.testing.assert_allclose(found, 127.5 * (acted.numpy() + 1), atol=2e-3)


def test_every_dimension_has_bounds_of_its_own_and_a_chunk_repeats_them(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    torch.manual_seed(0)
    actor = make_actor(OBSERVATION_DIM, 2 * ACTION_DIM)
    low, high = np.float32([-0.1, 0.0, -300.0]), np.float32([0.3, 255.0, 300.0])
    manifest = export_policy(
        actor, tmp_path / "policy.onnx", observation_dim=OBSERVATION_DIM, action_dim=2 * ACTION_DIM,
        action_bounds=(low.tolist(), high.tolist()), about={"chunk": 2},
    )  # fmt: skip
    assert manifest["action_high"] == pytest.approx([*high.tolist()] * 2)
    observation, noise = torch.randn(OBSERVATION_DIM), torch.randn(2 * ACTION_DIM)
    with torch.no_grad():
        acted = actor(TensorDict(observation=observation, noise=noise))["action"].numpy().reshape(2, ACTION_DIM)
    policy = load_policy(tmp_path / "policy.onnx")
    for expected in acted:
        np.testing.assert_allclose(
            policy(observation.numpy(), noise=noise.numpy()),
            low + (expected + 1) / 2 * (high - low),
            rtol=1e-5,
            atol=1e-4,
        )


def test_bounds_that_are_not_the_environments_are_refused(recorded, tmp_path):
    with pytest.raises(
        InputError, match=r"takes actions in Box\(0.0, 255.0.*mapped from \[0, 256\]: the same action would mean"
    ):
        run(tmp_path / "run", recorded, bounds=(0, 256))
