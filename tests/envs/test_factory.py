import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.envs import make_env, make_gym_env
from deflow_torchrl.envs.factory import success_timing
from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError
from tests.support.generation import TASK


def trajectory(env, seed, steps=40):
    rng = np.random.default_rng(0)
    observations = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        observations.append(env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))[0])
    return np.stack(observations)


@pytest.mark.parametrize(
    "task", [TASK, "pointmaze-medium-navigate-singletask-task1-v0", "puzzle-3x3-play-singletask-v0"]
)
def test_the_same_seed_gives_the_same_episode_whatever_came_before(task):
    env = make_gym_env(task)
    first = trajectory(env, 5)
    np.random.seed(123)
    trajectory(env, 6, steps=7)
    np.testing.assert_array_equal(trajectory(env, 5), first)
    np.testing.assert_array_equal(trajectory(make_gym_env(task), 5), first)
    assert not np.array_equal(trajectory(env, 6), first)


def test_a_seeded_reset_leaves_numpys_global_generator_alone():
    env = make_gym_env("pointmaze-medium-navigate-singletask-task1-v0")
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    env.reset(seed=9)
    assert np.random.rand() == expected


@pytest.mark.parametrize("task", [TASK, "pointmaze-medium-navigate-singletask-v0", "scene-play-singletask-v0"])
def test_the_timing_of_success_is_the_environments_own(task):
    env = make_gym_env(task)
    assert success_timing(task) == env.unwrapped._success_timing == "pre"
    env.close()


def test_an_ogbench_environment_that_is_told_nothing_judges_after_the_step(monkeypatch):
    gymnasium = pytest.importorskip("gymnasium")
    spec = gymnasium.spec(parse_ogbench_name(TASK).environment_id)
    monkeypatch.setitem(spec.kwargs, "success_timing", "post")
    assert success_timing(TASK) == "post"
    monkeypatch.delitem(spec.kwargs, "success_timing")  # ogbench before 1.2
    assert success_timing(TASK) == "post"
    assert success_timing("gym:Pendulum-v1") is success_timing("minari:D4RL/door/human-v2") is None


@pytest.mark.parametrize("task", [TASK, "pointmaze-medium-navigate-singletask-v0"])
def test_the_torchrl_environment_has_success_in_its_step_data(task):
    from torchrl.envs import check_env_specs

    env = make_env(task)
    check_env_specs(env)
    step = env.rollout(3)["next"]
    assert step["success"].shape == (3, 1)
    assert step["success"].dtype == torch.bool
    assert step["observation"].dtype == torch.float32
    assert step["reward"].shape == (3, 1)


@pytest.mark.parametrize("task", [TASK, "pointmaze-medium-navigate-singletask-v0"])
def test_set_seed_fixes_the_resets_that_follow(task):
    starts = []
    for _ in range(2):
        env = make_env(task)
        env.reset()
        env.set_seed(3)
        starts.append(torch.stack([env.reset()["observation"] for _ in range(3)]))
    assert torch.equal(*starts)
    assert len(starts[0].unique(dim=0)) == 3


def test_success_is_reported_when_the_goal_is_reached():
    env = make_env(TASK)
    env.set_seed(0)
    td = env.reset()
    base = env.base_env._env.unwrapped
    base._data.joint("object_joint_0").qpos[:3] = base._data.mocap_pos[base._cube_target_mocap_ids[0]]
    for _ in range(3):
        td["action"] = torch.zeros(5)
        td = env.step(td)["next"]
        if td["terminated"]:
            break
    assert td["success"].item()
    assert td["terminated"].item()


@pytest.mark.parametrize(
    ("name", "environment", "dataset"),
    [
        ("cube-single-play-singletask-task2-v0", "cube-single-singletask-task2-v0", "cube-single-play-v0"),
        (
            "humanoidmaze-large-navigate-singletask-v0",
            "humanoidmaze-large-singletask-v0",
            "humanoidmaze-large-navigate-v0",
        ),
        ("puzzle-4x4-noisy-singletask-task5-v0", "puzzle-4x4-singletask-task5-v0", "puzzle-4x4-noisy-v0"),
    ],
)
def test_names_are_split_as_ogbench_splits_them(name, environment, dataset):
    parsed = parse_ogbench_name(name)
    assert (parsed.environment_id, parsed.dataset) == (environment, dataset)


@pytest.mark.parametrize(
    "name", ["", "cube-single-play-v0", "cube-single-singletask-task2", "../x-singletask-v0", "a b"]
)
def test_other_names_are_refused(name):
    with pytest.raises(InputError, match="single-task name"):
        parse_ogbench_name(name)


def test_an_unknown_environment_gets_the_nearest_names():
    with pytest.raises(InputError, match="cube-single-singletask-task2-v0"):
        make_gym_env("cube-sinlge-play-singletask-task2-v0")


def test_a_missing_extra_is_one_line_with_the_command_to_install_it():
    code = (
        "import sys; sys.modules['ogbench'] = None\n"
        "from deflow_torchrl.envs import make_gym_env\n"
        "try:\n    make_gym_env('cube-single-play-singletask-task2-v0')\n"
        "except ImportError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "ogbench is not installed; install it with: pip install 'deflow-torchrl[ogbench]'\n"
