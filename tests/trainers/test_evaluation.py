import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.trainers import Evaluator
from tests.support.generation import TASK
from tests.support.networks import make_actor

POINTMAZE = "pointmaze-medium-navigate-singletask-task1-v0"


def record(evaluator, policy, **kwargs):
    """Every episode's observations and actions, by episode."""
    seen = {}

    def on_step(episodes, observations, actions):
        for episode, observation, action in zip(episodes, observations, actions, strict=True):
            seen.setdefault(int(episode), []).append((observation.copy(), action.copy()))

    result = evaluator.run(policy, on_step=on_step, **kwargs)
    return result, seen


def assert_same(first, second):
    assert first.keys() == second.keys()
    for episode in first:
        for (s, a), (t, b) in zip(first[episode], second[episode], strict=True):
            np.testing.assert_array_equal(s, t)
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def short(monkeypatch):
    """Episodes of 25 steps."""
    from deflow_torchrl.trainers import evaluation

    real = evaluation.make_gym_env
    monkeypatch.setattr(evaluation, "make_gym_env", lambda task, **options: real(task, max_episode_steps=25, **options))


@pytest.mark.parametrize(("task", "sizes"), [(TASK, (28, 5)), (POINTMAZE, (2, 2))])
def test_evaluating_twice_gives_identical_trajectories(task, sizes, short):
    policy = make_actor(*sizes)
    with Evaluator(task, num_envs=3) as evaluator:
        first, second = (record(evaluator, policy, episodes=5) for _ in range(2))
    assert_same(first[1], second[1])
    assert first[0].as_dict() == second[0].as_dict()
    assert len(first[1]) == 5
    starts = [tuple(steps[0][0]) for steps in first[1].values()]
    assert len(set(starts)) == 5, "each episode has a start of its own"


def test_two_policies_meet_the_same_starts_and_the_same_noise(short):
    actor = make_actor(28, 5)
    # A refinement that shifts nothing: with equal noise it acts as its own prior.
    with torch.no_grad():
        for parameter in actor.refinement_policy.parameters():
            parameter.zero_()
    with Evaluator(TASK, num_envs=3) as evaluator:
        prior = record(evaluator, actor.prior_policy(), episodes=4)[1]
        refined = record(evaluator, actor, episodes=4)[1]
    assert_same(prior, refined)


def test_processes_and_one_process_give_the_same_outcome():
    policy = make_actor(28, 5)
    outcomes = []
    for workers in (1, 2):
        with Evaluator(TASK, num_envs=2, workers=workers, max_steps=25) as evaluator:
            outcomes.append(evaluator.run(policy, episodes=2).as_dict())
    assert outcomes[0] == outcomes[1]


def test_the_global_generators_are_left_alone(short):
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    draws_its_own = TensorDictModule(
        lambda s: torch.rand(*s.shape[:-1], 5) * 2 - 1, in_keys=["observation"], out_keys=["action"]
    )
    with Evaluator(TASK, num_envs=2) as evaluator:
        first = record(evaluator, draws_its_own, episodes=2)[1]
        assert_same(first, record(evaluator, draws_its_own, episodes=2)[1])
    assert (torch.rand(1), np.random.rand()) == expected


def test_one_policy_call_serves_all_environments(short):
    calls = []

    def act(observation):
        calls.append(len(observation))
        return torch.zeros(len(observation), 5)

    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    with Evaluator(TASK, num_envs=4) as evaluator:
        result = evaluator.run(policy, episodes=4)
    assert calls == [4] * int(result.length.max())


def test_success_is_counted_from_the_last_step(short):
    # The cube is put on its goal before each episode: every episode ends in success at once.
    from deflow_torchrl.trainers import evaluation

    class Solved:
        def __init__(self, env):
            self.env = env
            self.action_space = env.action_space

        def reset(self, **kwargs):
            out = self.env.reset(**kwargs)
            base = self.env.unwrapped
            base._data.joint("object_joint_0").qpos[:3] = base._data.mocap_pos[base._cube_target_mocap_ids[0]]
            return out

        def __getattr__(self, name):
            return getattr(self.env, name)

    with Evaluator(TASK, num_envs=2) as evaluator:
        group = evaluator._groups[0]
        assert isinstance(group, evaluation._LocalGroup)
        group._envs = {slot: Solved(group._make()) for slot in group.slots}
        policy = TensorDictModule(lambda s: torch.zeros(len(s), 5), in_keys=["observation"], out_keys=["action"])
        result = evaluator.run(policy, episodes=3)
    assert result.success.all()
    assert (result.length < 5).all()
    assert result.success_rate == 1.0


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        Evaluator(TASK, num_envs=0)
