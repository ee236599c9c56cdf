"""Settings of published runs: sparse rewards, chunks behind a trajectory's end, coefficients that change online."""

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("hydra", reason="needs the extra cli")
pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.data import OfflineOnlineReplayBuffer, TransitionDataset
from deflow_torchrl.envs import make_gym_env
from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.runs import find_runs
from deflow_torchrl.runs.evaluate import load_run
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.run import train
from deflow_torchrl.tasks import get_task, ogbench_task_names
from deflow_torchrl.tasks.data import load_task_data
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint
from tests.support.generation import generation_in_process
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs, go_on, undrawn

PUZZLE = "puzzle-3x3-play-singletask-task1-v0"
SMALL = ["batch_size=8", "hidden_dims=[8]", "log_interval=1", "eval_interval=0", "eval_episodes=1", "eval_workers=1"]


@pytest.fixture(scope="module")
def puzzle(tmp_path_factory, short_episodes):
    from deflow_torchrl.data import generate_ogbench_dataset

    folder = tmp_path_factory.mktemp("puzzle")
    with generation_in_process():
        generate_ogbench_dataset("puzzle-3x3-play-v0", folder, episodes=2, val_episodes=1, seed=0)
    return folder


def test_a_published_run_of_qam_has_sparse_rewards_everywhere_and_says_so(puzzle, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    config = compose_config(
        [f"task={PUZZLE}", "algo=qam", "algo.footing=original", "algo.flow_steps=2", "algo.num_critics=2", *SMALL,
         "eval_max_steps=10", "offline_steps=2", "online_steps=12", "warmup_steps=0", f"data_root='{puzzle}'", "save_interval=7",
         f"out='{tmp_path / 'run'}'"]
    )  # fmt: skip
    assert (config.reward, config.chunk, config.chunk_ends) == ("sparse", 5, "valid_row")
    record = train(config, command="deflow train", show_progress=False)
    assert record["config"]["reward"] == "sparse"
    assert record["data"]["reward"] == "sparse: 0 where the task is solved, else -1, computed on s"
    assert record["success_timing"] == "pre"
    (found,) = find_runs([tmp_path / "run"])
    assert found.column == "qam (footing=original, reward=sparse)"
    state = load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1], device="cpu")
    (episode,) = record["evaluations"]["qam"]["episode_return"]
    assert episode == -10  # of the first ten steps, none solves it: -1 each, and -9 and more by the environment's own
    assert state["reward_range"] == [-1.0, -1.0]


def test_sparse_data_are_the_tasks_own_but_for_the_rewards(puzzle):
    own, sparse = (load_task_data(get_task(PUZZLE, reward=reward), root=puzzle) for reward in ("task", "sparse"))
    assert own.reward.min() < -1
    torch.testing.assert_close(sparse.reward, torch.where(own.reward == 0, 0.0, -1.0))
    assert torch.equal(own[:]["action"], sparse[:]["action"])


@pytest.mark.parametrize(
    "task", ["cube-double-play-singletask-v0", "antmaze-large-navigate-singletask-v0", "pen-human-v1"]
)
def test_sparse_rewards_of_other_tasks_are_one_line(task):
    with pytest.raises(InputError, match=rf"reward=sparse is of OGBench's scene and puzzle tasks, and {task} is none"):
        compose_config([f"task={task}", "algo=fql", "reward=sparse"])


def test_sparse_tasks_are_scene_and_puzzle_and_their_environment_gives_one_of_two_rewards():
    known = {name for name in ogbench_task_names() if get_task(name).sparse_rewards}
    assert known == {name for name in ogbench_task_names() if "scene" in name or "puzzle" in name}
    env = make_gym_env(get_task(PUZZLE, reward="sparse").environment)
    env.reset(seed=0)
    _, reward, *_ = env.step(env.action_space.sample())
    env.close()
    assert reward == -1.0


def test_replaced_rewards_of_mapped_data_survive_a_release_and_a_pickle(tmp_path):
    dataset = TransitionDataset.from_arrays(
        observations=np.arange(8.0).reshape(8, 1), actions=np.zeros((8, 1)), rewards=np.ones(8), terminals=np.zeros(8),
        timeouts=np.arange(8) % 4 == 3,
    )  # fmt: skip
    mapped = TransitionDataset.load(dataset.save(tmp_path / "set"))
    replaced = mapped.with_rewards(torch.arange(6.0), about={"reward": "numbers"})
    replaced.release()
    for one in (replaced, pickle.loads(pickle.dumps(replaced)), replaced.stacked(1), replaced.to("cpu")):
        assert one[:]["next", "reward"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
        assert one.about["reward"] == "numbers"
    assert mapped[:]["next", "reward"].unique().tolist() == [1]
    with pytest.raises(InputError, match=r"6 rewards are needed, got \[5\]"):
        mapped.with_rewards(torch.zeros(5))


def test_chunks_with_a_flag_of_the_row_are_those_with_flags_of_steps_and_join_with_experience():
    dataset = TransitionDataset.from_arrays(
        observations=np.arange(8.0).reshape(8, 1), actions=np.zeros((8, 1)), rewards=np.ones(8), terminals=np.zeros(8),
        timeouts=np.arange(8) % 4 == 3,
    )  # fmt: skip
    steps, row = (dataset.chunked(2, ends=ends) for ends in ("valid", "valid_row"))
    assert torch.equal(row[:]["valid"], steps[:]["valid"][:, -1:])
    assert row[:]["valid"].flatten().tolist() == [1, 1, 0, 1, 1]
    buffer = OfflineOnlineReplayBuffer(row, online_capacity=4)
    new = row[2:3]
    buffer.extend(new)
    assert buffer[:]["valid"].flatten().tolist() == [1, 1, 0, 1, 1, 1]


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


CHANGES = {
    "fan": ({"alpha": 10, "critic_alpha": 0.1}, {"alpha": 3, "critic_alpha": 0}),
    "trqam": ({"kl_budget": 1, "flow_steps": 2}, {"kl_budget": 0.25}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_coefficients_change_at_the_first_online_step_also_of_a_resumed_run(pendulum, tmp_path, monkeypatch, name):
    undrawn(monkeypatch)
    offline, online = CHANGES[name]
    given = {f"algo.{key}": value for key, value in offline.items()}
    given |= {f"algo.{key}_online": value for key, value in online.items()}
    for run in ("one", "other"):
        config = compose_config(
            [f"task='{pendulum}'", f"env={ENVIRONMENT}", f"algo={name}", *SMALL, "offline_steps=3", "online_steps=5",
             "save_interval=3", f"out='{tmp_path / run}'", *(f"{key}={value}" for key, value in given.items())]
        )  # fmt: skip
        train(config, command="deflow train", show_progress=False)
    kept = [load_checkpoint(path, device="cpu") for path in list_checkpoints(tmp_path / "one" / "checkpoints")]
    found = {state["step"]: {key: float(state["update"]["loss"][key]) for key in online} for state in kept}
    assert found[3] == {key: offline[key] for key in online}
    assert found[6] == found[8] == online
    go_on(tmp_path / "other", step=6)
    assert_equal_runs(tmp_path / "one", tmp_path / "other")
    loss = load_run(tmp_path / "other").learner.loss
    assert {key: float(getattr(loss, key)) for key in online} == online
