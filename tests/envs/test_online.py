import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="needs the extra ogbench")

from deflow_torchrl.envs import EpisodeStart, OnlineEpisodes, is_replayable, make_online_env
from deflow_torchrl.envs.online import CAUSE_BYTES, decode_cause, encode_cause, reset_seed
from deflow_torchrl.errors import InputError
from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED
from tests.support.generation import TASK
from tests.support.simulators import EPISODE_STEPS, simulator

POINT = simulator("Point")
POINTMAZE = "pointmaze-medium-navigate-singletask-task1-v0"


def run(env, steps):
    """Steps with the clipped noise as action: every observation, reward, end and info, those of resets included."""
    seen = [(*_reset(env),)]
    for _ in range(steps):
        observation, reward, terminated, truncated, info = env.step(action_of(seen[-1]))
        seen.append((observation, reward, terminated or truncated, info))
        if terminated or truncated:
            seen.append(_reset(env))
    return seen


def _reset(env):
    observation, info = env.reset()
    return observation, None, False, info


def action_of(row):
    return np.clip(row[-1]["noise"], -1, 1)


def assert_same(first, second):
    assert len(first) == len(second)
    for (s, r, end, info), (t, q, finish, other) in zip(first, second, strict=True):
        np.testing.assert_array_equal(s, t)
        assert (r, end, info.keys()) == (q, finish, other.keys())
        assert all(np.array_equal(info[name], other[name]) for name in info)


def test_workers_share_the_episodes_of_one():
    alone = run(OnlineEpisodes(POINT, seed=5), 4 * EPISODE_STEPS)
    length = EPISODE_STEPS + 1
    for worker in range(2):
        shared = run(OnlineEpisodes(POINT, seed=5, first=worker, stride=2), 2 * EPISODE_STEPS)
        for number in range(2):
            episode = 2 * number + worker
            mine, theirs = shared[number * length :][:length], alone[episode * length :][:length]
            assert {info["episode"] for *_, info in mine} == {episode}
            assert_same(mine, theirs)


def test_another_seed_gives_other_starts_and_another_noise():
    (first, one), (second, other) = (OnlineEpisodes(POINT, seed=seed).reset() for seed in (1, 2))
    assert (first != second).all()
    assert (one["noise"] != other["noise"]).all()


def test_acting_and_evaluation_never_share_a_seed():
    seeds = {reset_seed(seed, episode) for seed in range(3) for episode in range(1000)}
    assert len(seeds) == 3000
    assert DEFAULT_EVALUATION_SEED + 10**6 < min(seeds) <= max(seeds) < 2**31


@pytest.mark.parametrize("task", [POINT, POINTMAZE, TASK])
def test_a_running_episode_is_restored_bit_for_bit(task):
    if task != POINT:
        pytest.importorskip("ogbench", reason="needs the extra ogbench")
    limit = 40

    def make(**kwargs):
        return OnlineEpisodes(task, seed=0, stride=3, max_episode_steps=limit, **kwargs)

    env = make(first=7)
    expected = run(env, limit + 20)
    actions = np.stack([action_of(row) for row in expected[:limit]])
    env.close()
    for played in (0, 1, limit - 1):
        env = make(start=EpisodeStart(7, actions[:played]))
        restored = run(env, limit + 20 - played)
        env.close()
        assert_same(restored[1:], expected[played + 1 :])
        np.testing.assert_array_equal(restored[0][0], expected[played][0])
        np.testing.assert_array_equal(restored[0][3]["noise"], expected[played][3]["noise"])
        assert restored[limit - played][2], "the time limit falls at the right step"
        assert restored[limit - played + 1][3]["episode"] == 10


def test_no_global_generator_is_touched():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    run(OnlineEpisodes(POINT, seed=0), 3 * EPISODE_STEPS)
    is_replayable.__wrapped__(POINT)
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("Raise", "step: RuntimeError: the simulator broke at"),
        ("Nan", "step: FloatingPointError: the observation is not finite"),
        ("Reward", "step: FloatingPointError: the reward is inf"),
    ],
)
def test_a_fault_ends_the_episode_at_the_last_good_observation(fault, says):
    env = OnlineEpisodes(simulator(f"PointAlways{fault}"), seed=0)
    simulated = env.unwrapped
    rows = run(env, 10)
    for first in (0, 6):
        episode = rows[first : first + 6]
        assert [row[2] for row in episode] == [False] * 5 + [True]
        assert [row[3]["fault"] for row in episode] == [False] * 5 + [True]
        np.testing.assert_array_equal(episode[5][0], episode[4][0])
        assert episode[5][1] == 0.0
        assert episode[5][3]["cause"].startswith(says)
    assert simulated.closed, "a simulator that failed is not used again"
    assert env.unwrapped is not simulated


def test_a_faulty_episode_leaves_the_others_as_they_were():
    sometimes = run(OnlineEpisodes(simulator("PointSometimesRaise"), seed=0), 100)
    never = run(OnlineEpisodes(POINT, seed=0), 200)
    faulty = {row[3]["episode"] for row in sometimes if row[3]["fault"]}
    last = max(row[3]["episode"] for row in sometimes)
    assert 0 < len(faulty) < last
    for episode in set(range(last)) - faulty:
        assert_same(*([row for row in rows if row[3]["episode"] == episode] for rows in (sometimes, never)))


def test_a_reset_that_fails_is_a_fault_of_its_episode():
    env = OnlineEpisodes(simulator("PointAlwaysReset"), seed=0)
    rows = run(env, 3)
    assert [row[3]["episode"] for row in rows] == [0, 0, 1, 1, 2, 2, 3]
    assert [row[2] for row in rows] == [False, True, False, True, False, True, False]
    assert rows[1][3]["cause"] == "reset: ValueError: the simulator does not start"
    np.testing.assert_array_equal(rows[1][0], np.zeros(2))


def test_an_episode_that_ends_within_its_replay_is_a_fault():
    env = OnlineEpisodes(POINT, seed=0, start=EpisodeStart(0, np.zeros((EPISODE_STEPS, 2), np.float32)))
    env.reset()
    assert "ended before its last recorded action" in env.step(np.zeros(2))[-1]["cause"]


@pytest.mark.parametrize(("name", "repeats"), [("Point", True), ("PointUnsteady", False), ("PointAlwaysRaise", True)])
def test_environments_that_do_not_repeat_themselves_are_found_out(name, repeats):
    assert is_replayable(simulator(name)) is repeats


def test_step_data_keep_to_their_specs_and_carry_the_next_steps_noise():
    from torchrl.envs.utils import check_env_specs

    env = make_online_env(simulator("PointSometimesRaise"), seed=0)
    check_env_specs(env)
    data = env.rollout(
        8 * EPISODE_STEPS, lambda td: td.set("action", td["noise"].clamp(-1, 1)), break_when_any_done=False
    )
    assert data["observation"].dtype == data["next", "reward"].dtype == data["noise"].dtype == torch.float32
    running = ~data["next", "done"][:-1, 0]
    assert torch.equal(data["next", "noise"][:-1][running], data["noise"][1:][running])
    fault = data["next", "fault"]
    assert fault.any()
    assert torch.equal(data["next", "cause"].any(-1, keepdim=True), fault)
    assert (data["next", "truncated"] | ~fault).all()
    assert not (data["next", "terminated"] & fault).any()
    env.close()


def test_causes_travel_as_bytes():
    for cause in ("", "step: ValueError: no", "é" * CAUSE_BYTES):
        assert cause.startswith(decode_cause(encode_cause(cause)))
        assert encode_cause(cause).shape == (CAUSE_BYTES,)
    assert decode_cause(encode_cause("step: é")) == "step: é"


def test_an_unknown_environment_is_refused():
    with pytest.raises(InputError, match="NoSuch"):
        OnlineEpisodes("gym:NoSuch-v0", seed=0)
