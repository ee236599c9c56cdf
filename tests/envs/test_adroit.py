import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="needs the extra minari")

import gymnasium

from deflow_torchrl.envs.adroit import (
    ADROIT_TASKS,
    HAND_SIGNS,
    D4RLAdroitReward,
    PenDrop,
    environment_sign,
    hand_to_object_distance,
    hand_to_object_sign,
)
from deflow_torchrl.errors import InputError
from deflow_torchrl.sources.minari_sets import import_minari

import_minari()  # registers the environments
WITH_TERM = [task for task in ADROIT_TASKS.values() if task.has_hand_term]


def make(task, version="v1"):
    return gymnasium.make(f"{task.environment}-{version}", disable_env_checker=True)


def rollout(env, steps, amplitude, seed=0):
    generator = np.random.default_rng(seed)
    observations, rewards = [env.reset(seed=seed)[0]], []
    for _ in range(steps):
        action = generator.uniform(-amplitude, amplitude, env.action_space.shape).astype(np.float32)
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    return np.stack(observations), np.array(rewards)


def flipped(task, observations, rewards, sign):
    return rewards + sign * 0.2 * hand_to_object_distance(task, observations[1:])


@pytest.mark.parametrize("task", ADROIT_TASKS.values(), ids=ADROIT_TASKS)
def test_the_facts_are_the_simulators(task):
    env = make(task)
    assert env.observation_space.shape == (task.observation_dim,)
    assert env.action_space.shape == (task.action_dim,)


def measured_sign(task, env):
    """The sign in the rewards of a short, slow, random rollout."""
    return hand_to_object_sign(task, [rollout(env, 60, 0.02)])


@pytest.mark.parametrize("task", WITH_TERM, ids=lambda task: task.name)
def test_the_table_of_signs_is_what_the_installed_environments_pay(task):
    versions = [version for version in HAND_SIGNS if f"{task.environment}-v{version}" in gymnasium.registry]
    assert versions
    for version in versions:
        env = make(task, f"v{version}")
        assert environment_sign(env) == measured_sign(task, env) == HAND_SIGNS[version]


@pytest.mark.parametrize("task", WITH_TERM, ids=lambda task: task.name)
def test_the_wrapper_pays_minus_a_tenth_of_the_distance_and_changes_nothing_else(task):
    own, wrapped = make(task), D4RLAdroitReward(make(task))
    assert environment_sign(own) == 1, "gymnasium-robotics 1.4.2; newer -v2 environments need no wrapper"
    assert environment_sign(wrapped) == measured_sign(task, wrapped) == -1
    observations, rewards = rollout(own, 30, 1.0)
    same, corrected = rollout(wrapped, 30, 1.0)
    np.testing.assert_array_equal(observations, same)
    np.testing.assert_allclose(corrected, flipped(task, observations, rewards, -1), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="D4RL's sign already"):
        D4RLAdroitReward(wrapped)


@pytest.mark.parametrize("task", WITH_TERM, ids=lambda task: task.name)
@pytest.mark.parametrize("amplitude", [0.1, 1.0])
def test_the_sign_is_measured_from_recorded_rewards(task, amplitude):
    env = make(task)
    episodes = [rollout(env, 190, amplitude, seed) for seed in range(3)]
    d4rl = [(observations, flipped(task, observations, rewards, -1)) for observations, rewards in episodes]
    assert hand_to_object_sign(task, episodes) == 1
    assert hand_to_object_sign(task, d4rl) == -1
    single = [(o.astype(np.float32), r.astype(np.float32)) for o, r in d4rl]
    assert hand_to_object_sign(task, single) == -1


def test_the_sign_is_not_told_where_it_cannot_be():
    task = ADROIT_TASKS["door"]
    observations, rewards = rollout(make(task), 60, 1.0)
    assert hand_to_object_sign(task, [(observations[:11], rewards[:10])]) is None, "too few steps"
    assert hand_to_object_sign(task, [(observations, np.full(60, -0.1))]) is None, "sparse rewards"
    assert hand_to_object_sign(task, [(observations, 10 * rewards + 3)]) is None, "shifted and scaled"
    assert hand_to_object_sign(task, []) is None
    assert hand_to_object_sign(ADROIT_TASKS["pen"], [(np.zeros((61, 45)), rewards)]) is None
    sparse = gymnasium.make("AdroitHandDoor-v1", reward_type="sparse", disable_env_checker=True)
    assert environment_sign(sparse) is None
    assert environment_sign(gymnasium.make("AdroitHandDoorSparse-v1", disable_env_checker=True)) is None


def test_looking_the_sign_up_takes_no_step_and_no_random_number(monkeypatch):
    env = make(ADROIT_TASKS["door"])
    monkeypatch.setattr(env.unwrapped, "step", None)
    monkeypatch.setattr(env.unwrapped, "reset", None)
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    assert environment_sign(env) == 1
    assert np.random.rand() == expected


def test_the_pen_ends_when_it_is_dropped():
    env, plain = PenDrop(make(ADROIT_TASKS["pen"])), make(ADROIT_TASKS["pen"])
    env.reset(seed=0)
    plain.reset(seed=0)
    generator = np.random.default_rng(0)
    for _ in range(100):
        action = generator.uniform(-1, 1, 24).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        same, own, *_ = plain.step(action)
        np.testing.assert_array_equal(observation, same)
        assert reward == own
        assert terminated == (env.unwrapped.data.body("Object").xpos[2] < 0.075)
        if terminated:
            break
    assert terminated
    assert not truncated


def test_wrappers_refuse_other_environments():
    with pytest.raises(InputError, match="no hand-to-object term"):
        D4RLAdroitReward(make(ADROIT_TASKS["pen"]))
    with pytest.raises(InputError, match="no pen"):
        PenDrop(make(ADROIT_TASKS["door"]))
    with pytest.raises(InputError, match="no hand-to-object term"):
        hand_to_object_distance(ADROIT_TASKS["pen"], np.zeros((2, 45)))
