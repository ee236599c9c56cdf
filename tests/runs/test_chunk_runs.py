"""Chunks of actions in evaluation, collection, a whole run and an exported policy: always executed open loop."""

import io

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

pytest.importorskip("gymnasium", reason="needs the extra ogbench")

from deflow_torchrl.algorithms.deflow import DeFlowConfig
from deflow_torchrl.data import TransitionBuilder
from deflow_torchrl.deploy import load_policy
from deflow_torchrl.envs.factory import make_gym_env
from deflow_torchrl.envs.online import make_online_env
from deflow_torchrl.errors import InputError
from deflow_torchrl.export import export_run
from deflow_torchrl.open_loop import OpenLoop
from deflow_torchrl.runs.evaluate import load_run
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig
from deflow_torchrl.trainers import Evaluator, OnlineExperience
from tests.support.networks import make_actor
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import go_on, rows, undrawn
from tests.support.simulators import simulator

POINT, LENGTH, GAMMA = simulator("Point"), 3, 0.9
KEYS = ("observation", "action", ("next", "observation"), ("next", "reward"), ("next", "terminated"),
        ("next", "truncated"), ("next", "done"))  # fmt: skip


def policy():
    torch.manual_seed(0)
    return make_actor(2, 2 * LENGTH)


def experience(stored, **kwargs):
    def add(chunk):
        stored.append(chunk.clone())
        return torch.tensor([len(stored) - 1])

    return OnlineExperience(
        POINT, policy(), seed=3, add=add, discard=lambda index: None, chunk=LENGTH, gamma=GAMMA, **kwargs
    )


def test_the_environment_executes_each_chunk_and_a_reset_begins_another():
    env, plain = make_gym_env(POINT, chunk=2), make_gym_env(POINT)
    assert env.action_space.shape == (4,)
    chunks = np.linspace(-0.9, 0.9, 12, dtype=np.float32).reshape(3, 4)
    env.reset(seed=0)
    plain.reset(seed=0)
    for chunk, executed in zip(chunks, (chunks[0, :2], chunks[0, 2:], chunks[2, :2]), strict=True):
        np.testing.assert_array_equal(env.step(chunk)[0], plain.step(executed)[0])
    env.reset(seed=0)
    plain.reset(seed=0)
    np.testing.assert_array_equal(env.step(chunks[1])[0], plain.step(chunks[1, :2])[0])


def test_experience_is_stored_as_the_chunks_of_its_episodes():
    """The same episodes acted by hand, kept as a data set of single steps, and chunked."""
    stored = []
    with experience(stored) as acting:
        outcomes = [acting.step() for _ in range(50)]
    ended = sum(outcome.episode_return is not None for outcome in outcomes)
    assert ended >= 2
    env, actor, episodes = make_online_env(POINT, seed=3, chunk=LENGTH), policy(), []
    for _ in range(ended):
        loop, step = OpenLoop(LENGTH), env.reset()
        episode = {"observations": [step["observation"]], "actions": [], "rewards": [], "terminated": []}
        while True:
            with torch.no_grad():
                step = env.step(actor(step))
            episode["actions"].append(torch.from_numpy(loop(step["action"].numpy())))
            episode["observations"].append(step["next", "observation"])
            episode["rewards"].append(step["next", "reward"][0])
            episode["terminated"].append(step["next", "terminated"][0])
            if step["next", "done"].item():
                break
            step = step["next"].clone()
        episodes.append({name: torch.stack(values).numpy() for name, values in episode.items()})
    count = sum(len(episode["actions"]) for episode in episodes)
    builder = TransitionBuilder(count, frames=count + ended, observation_shape=(2,), action_dim=2, source="by hand")
    for episode in episodes:
        builder.add_episode(**episode)
    expected = builder.finish().chunked(LENGTH, gamma=GAMMA)[:].select(*KEYS)
    found = torch.cat(stored[: len(expected)]).select(*KEYS)
    torch.testing.assert_close(
        found.to_dict(), expected.to_dict(), rtol=1e-5, atol=2e-5
    )  # the data's actions are clipped


def test_experience_restored_in_the_middle_of_a_chunk_goes_on_bit_for_bit():
    whole, first, rest = [], [], []
    with experience(whole) as acting:
        for _ in range(40):
            acting.step()
    with experience(first) as acting:
        for _ in range(17):  # neither a multiple of the chunk's steps nor an episode's end
            acting.step()
        file = io.BytesIO()
        torch.save(acting.state_dict(), file)
    file.seek(0)
    with experience(rest) as acting:
        acting.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(23):
            acting.step()
    assert len(first) + len(rest) == len(whole)
    for one, other in zip(whole, [*first, *rest], strict=True):
        assert (one == other).all()


def test_an_evaluation_executes_chunks():
    weights = torch.randn(2, 2 * LENGTH, generator=torch.Generator().manual_seed(0))
    actor = TensorDictModule(lambda s: (s @ weights).tanh(), in_keys=["observation"], out_keys=["action"])
    with Evaluator(POINT, num_envs=2, chunk=LENGTH) as evaluator:
        found = evaluator.run(actor, episodes=3)
    env = make_gym_env(POINT)
    for episode, seed in enumerate(found.seeds):
        loop, total, steps, done = OpenLoop(LENGTH), 0.0, 0, False
        observation, _ = env.reset(seed=int(seed))
        while not done:
            chunk = (torch.as_tensor(observation, dtype=torch.float32) @ weights).tanh().numpy()
            observation, reward, terminated, truncated, _ = env.step(loop(chunk))
            total, steps, done = total + reward, steps + 1, terminated or truncated
        assert found.episode_return[episode] == pytest.approx(total, rel=1e-5)
        assert found.length[episode] == steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Offline for 6 steps, online for 8, with chunks of three actions and a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("chunks")
    task = record_pendulum(folder, episodes=4)
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        train(
            TrainConfig(
                task=task, env=ENVIRONMENT, batch_size=8, hidden_dims=[8], log_interval=1, eval_interval=0, eval_episodes=1,
                eval_workers=1, save_interval=5, offline_steps=6, online_steps=8, chunk=LENGTH, out=str(folder / "run"),
                algo=DeFlowConfig(flow_steps=2),
            ), command="deflow train", show_progress=False,
        )  # fmt: skip
    return folder / "run"


def test_a_run_trains_on_chunks_offline_and_online_and_resumes_exactly(run, monkeypatch):
    undrawn(monkeypatch)
    before = rows(run)
    assert before[-1]["step"] == 14
    loaded = load_run(run)
    assert loaded.config.chunk == LENGTH
    assert loaded.state["action_dim"] == LENGTH
    go_on(run, step=10)
    assert rows(run) == before


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_exported_policy_gives_the_actions_of_a_chunk_one_after_another(run, format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="needs the extra export")
        pytest.importorskip("onnxscript", reason="needs the extra export")
    manifest = export_run(run, format=format, out=tmp_path / f"policy.{format}")
    assert manifest["chunk"] == LENGTH
    exported = load_policy(manifest["file"], trusted=True)
    actor = load_run(run).learner.policy
    observation, noise = np.full((2, 3), 0.5, np.float32), np.random.default_rng(0).normal(size=(2, LENGTH))
    batch = {"observation": torch.from_numpy(observation), "noise": torch.from_numpy(noise).float()}
    with torch.no_grad():
        expected = actor(TensorDict(batch, batch_size=[2]))["action"]
    assert (exported.action_dim, exported.low.shape) == (1, (1,))
    first = [exported(observation, noise=noise), exported(0 * observation), exported(observation)]
    np.testing.assert_allclose(np.concatenate(first, axis=1), expected, atol=1e-5)
    exported(observation)
    with pytest.raises(InputError, match=r"changed in the middle of a chunk; call reset\(\)"):
        exported(observation[0])
    exported.reset()
    assert exported(observation[0]).shape == (1,)


def test_a_chunk_longer_than_every_trajectory_is_one_line(tmp_path):
    task = record_pendulum(tmp_path, episodes=2)
    with pytest.raises(InputError, match="a chunk of 16 steps is longer than every trajectory") as error:
        train(
            TrainConfig(task=task, env=ENVIRONMENT, offline_steps=2, chunk=16, out=str(tmp_path / "run"), hidden_dims=[8],
                        eval_interval=0, eval_episodes=1, algo=DeFlowConfig()),
            command="deflow train", show_progress=False,
        )  # fmt: skip
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
