import numpy as np
import pytest
import torch

pytest.importorskip("minari", reason="needs the extra minari")
pytest.importorskip("gymnasium_robotics", reason="needs the extra minari")

import gymnasium
from minari.serialization import serialize_space

from deflow_torchrl.data import load_minari_dataset
from deflow_torchrl.envs import D4RLAdroitReward, make_minari_env
from deflow_torchrl.envs.adroit import environment_sign
from deflow_torchrl.errors import InputError
from deflow_torchrl.sources.minari_sets import import_minari, open_minari_dataset
from tests.support.minari_sets import edit_metadata, record

pytestmark = pytest.mark.filterwarnings("ignore:.*AntMaze_UMaze-v4 is out of date:DeprecationWarning")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    import_minari()


def adroit_set(task, dataset_id, *wrappers, steps=25, amplitude=1.0):
    env = plain = gymnasium.make(f"AdroitHand{task.capitalize()}-v1", max_episode_steps=steps)
    for wrapper in wrappers:
        env = wrapper(env)
    record(env, dataset_id, 2, low=-amplitude, high=amplitude)
    edit_metadata(dataset_id, env_spec=plain.spec.to_json())


def wrappers_of(env):
    names = []
    while env is not env.unwrapped:
        names.append(type(env).__name__)
        env = env.env
    return names


@pytest.mark.parametrize(
    ("dataset_id", "environment", "options"),
    [
        ("door/random-v0", "AdroitHandDoor-v1", {}),
        ("maze/point-v0", "PointMaze_UMazeDense-v3", {}),
        ("maze/part-v0", "PointMaze_UMazeDense-v3", {"observation_keys": ["observation", "desired_goal"]}),
        ("D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4", {}),
    ],
)
def test_a_recorded_episode_replayed_in_the_environment_gives_the_datas_rows(dataset_id, environment, options):
    dataset = record(gymnasium.make(environment, max_episode_steps=8), dataset_id, 2)
    data = load_minari_dataset(dataset_id, download=False, reward_shift=0.0, **options)[:8]
    env = make_minari_env(dataset_id, download=False, max_episode_steps=8, **options)
    observation, info = env.reset(seed=0)
    assert info["success"] is False
    for row, action in enumerate(next(iter(dataset.iterate_episodes())).actions):
        assert observation.dtype == np.float32
        assert observation.shape == env.observation_space.shape
        np.testing.assert_allclose(data["observation"][row], observation, atol=1e-5)
        observation, reward, terminated, truncated, info = env.step(action)
        np.testing.assert_allclose(data["next", "observation"][row], observation, atol=1e-5)
        np.testing.assert_allclose(data["next", "reward"][row], [reward], atol=1e-5)
        assert type(info["success"]) is bool
    assert truncated
    assert not terminated


def test_the_environment_gets_the_datas_reward_and_the_log_says_so_once(caplog):
    adroit_set("door", "door/d4rl-v0", D4RLAdroitReward)
    env = make_minari_env("door/d4rl-v0", download=False)
    assert "D4RLAdroitReward" in wrappers_of(env)
    make_minari_env("door/d4rl-v0", download=False)
    assert caplog.text.count("D4RLAdroitReward corrects the environment") == 1
    adroit_set("door", "door/own-v0")
    assert "D4RLAdroitReward" not in wrappers_of(make_minari_env("door/own-v0", download=False))
    assert "corrects" not in caplog.text.partition("door/own-v0")[2]


def test_d4rls_sets_have_d4rls_sign_where_the_data_do_not_tell():
    adroit_set("relocate", "D4RL/relocate/short-v0", steps=3)
    assert "D4RLAdroitReward" in wrappers_of(make_minari_env("D4RL/relocate/short-v0", download=False))


def test_a_d4rl_set_with_the_other_sign_is_reported(caplog):
    adroit_set("hammer", "D4RL/hammer/other-v0", steps=80, amplitude=0.02)
    assert "D4RLAdroitReward" not in wrappers_of(make_minari_env("D4RL/hammer/other-v0", download=False))
    assert "a little too high" in caplog.text


def test_an_own_set_with_the_other_sign_is_reported_as_it_has_d4rls_scores(caplog):
    adroit_set("door", "own/other-v0")
    make_minari_env("own/other-v0", download=False)
    assert "own/other-v0: data and environment reward" in caplog.text
    adroit_set("door", "own/untold-v0", steps=3)
    make_minari_env("own/untold-v0", download=False)
    assert "own/untold-v0: the environment rewards" in caplog.text
    assert caplog.text.count("a little too high") == 2


def test_a_set_recorded_in_the_corrected_environment_names_it():
    record(D4RLAdroitReward(gymnasium.make("AdroitHandDoor-v1", max_episode_steps=25)), "door/wrapped-v0", 2)
    env = make_minari_env("door/wrapped-v0", download=False)
    assert wrappers_of(env).count("D4RLAdroitReward") == 1
    assert environment_sign(open_minari_dataset("door/wrapped-v0").recover_environment()) == -1


def test_pen_ends_when_dropped_for_d4rls_sets_and_those_that_end_there(caplog):
    from deflow_torchrl.envs import PenDrop

    adroit_set("pen", "pen/goes-on-v0", steps=60)
    adroit_set("pen", "pen/ends-v0", PenDrop, steps=60)
    adroit_set("pen", "D4RL/pen/human-v2", steps=60)
    assert "PenDrop" not in wrappers_of(make_minari_env("pen/goes-on-v0", download=False))
    assert "PenDrop" in wrappers_of(make_minari_env("pen/ends-v0", download=False))
    assert "PenDrop" in wrappers_of(make_minari_env("D4RL/pen/human-v2", download=False))
    assert "though the data's are not" in caplog.text


def test_d4rl_antmaze_ends_at_the_goal(caplog):
    record(gymnasium.make("AntMaze_UMaze-v4", max_episode_steps=4), "D4RL/antmaze/umaze-v1", 1)
    env = make_minari_env("D4RL/antmaze/umaze-v1", download=False)
    env.reset(seed=0)
    env.unwrapped.goal = env.unwrapped.data.qpos[:2].copy()
    _, reward, terminated, _, info = env.step(np.zeros(8, np.float32))
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert "the environment goes on at the goal" in caplog.text


def test_actions_are_rescaled_in_the_environment_as_in_the_data():
    record(gymnasium.make("Pendulum-v1", max_episode_steps=10), "pendulum/random-v0", 1, low=-2.0, high=2.0)
    with pytest.raises(InputError, match="rescale_actions=True"):
        make_minari_env("pendulum/random-v0", download=False)
    data = load_minari_dataset("pendulum/random-v0", download=False, rescale_actions=True)[:]
    env = make_minari_env("pendulum/random-v0", download=False, rescale_actions=True)
    assert (env.action_space.low, env.action_space.high) == (-1, 1)
    env.reset(seed=0)
    for row in range(10):
        observation, reward, *_, info = env.step(data["action"][row].numpy())
        np.testing.assert_allclose(data["next", "observation"][row], observation, atol=1e-4)
        np.testing.assert_allclose(data["next", "reward"][row], [reward], atol=1e-3)
    assert info["success"] is False, "the pendulum knows no success"


@pytest.mark.parametrize(("bound", "fits"), [(2.0, True), (2.0000005, True), (1.0, False), (2.1, False)])
def test_data_and_environment_have_the_same_action_bounds(bound, fits):
    dataset = record(gymnasium.make("Pendulum-v1", max_episode_steps=5), "pendulum/random-v0", 1)
    space = gymnasium.spaces.Box(-bound, bound, (1,), np.float64)
    edit_metadata("pendulum/random-v0", action_space=serialize_space(space))
    if fits:
        make_minari_env("pendulum/random-v0", download=False, rescale_actions=True)
        return
    for use in (make_minari_env, load_minari_dataset):
        with pytest.raises(InputError, match=r"actions are Box.* in the data, Box.* in Pendulum-v1") as caught:
            use(dataset.id, download=False, rescale_actions=True)
        assert "\n" not in str(caught.value)


def test_the_evaluation_environment_is_the_one_the_set_names():
    env = gymnasium.make("AdroitHandDoor-v1", max_episode_steps=25)
    record(env, "door/random-v0", 1, eval_env=gymnasium.make("AdroitHandDoor-v1", max_episode_steps=7))
    assert make_minari_env("door/random-v0", download=False).spec.max_episode_steps == 7
    assert make_minari_env("door/random-v0", eval_env=False, download=False).spec.max_episode_steps == 25


def test_episodes_of_d4rls_sets_are_as_long_as_d4rls(caplog):
    adroit_set("pen", "D4RL/pen/expert-v2", steps=7)
    assert make_minari_env("D4RL/pen/expert-v2", download=False).spec.max_episode_steps == 100
    env = make_minari_env("D4RL/pen/expert-v2", download=False)
    assert env.spec.max_episode_steps == 100
    assert caplog.text.count("after 7 steps, D4RL after 100") == 1
    assert make_minari_env("D4RL/pen/expert-v2", download=False, max_episode_steps=9).spec.max_episode_steps == 9


def test_an_own_set_with_d4rls_scores_keeps_its_limit_and_says_so(caplog):
    adroit_set("door", "own/short-v0", steps=6)
    adroit_set("door", "own/right-v0", steps=200)
    assert make_minari_env("own/short-v0", download=False).spec.max_episode_steps == 6
    make_minari_env("own/right-v0", download=False)
    assert "own/short-v0: episodes of its environment have 6 steps, D4RL's have 200" in caplog.text
    assert "own/right-v0: episodes" not in caplog.text


def test_torchrl_drives_it():
    from torchrl.envs import GymWrapper, check_env_specs

    from deflow_torchrl.envs.info import SuccessReader

    record(gymnasium.make("AdroitHandDoor-v1", max_episode_steps=25), "door/random-v0", 1)
    env = GymWrapper(make_minari_env("door/random-v0", download=False)).set_info_dict_reader(SuccessReader("cpu"))
    check_env_specs(env)
    step = env.rollout(3)["next"]
    assert step["observation"].dtype == torch.float32
    assert step["success"].shape == (3, 1)
    starts = []
    for _ in range(2):
        env.set_seed(3)
        starts.append(torch.stack([env.reset()["observation"] for _ in range(3)]))
    assert torch.equal(*starts)


def test_a_set_without_an_environment_says_so():
    record(gymnasium.make("AdroitHandDoor-v1", max_episode_steps=5), "door/random-v0", 1)
    edit_metadata("door/random-v0", env_spec=None)
    with pytest.raises(InputError, match=r"cannot be made.*recorded without one"):
        make_minari_env("door/random-v0", download=False)


def test_references_are_the_evaluating_environments():
    from deflow_torchrl.tasks import get_task
    from deflow_torchrl.tasks.data import reference_returns

    adroit_set("door", "D4RL/door/human-v2")
    own = reference_returns(get_task("minari:D4RL/door/human-v2"))
    assert own == (-56.512833, 2880.5693087298737)
    for environment, expected in (
        ("AdroitHandDoor-v1", own),
        ("gymnasium_robotics:AdroitHandDoor-v1", own),
        ("AdroitHandHammer-v1", (-274.856578, 12794.134825156867)),
        ("AdroitHandDoorSparse-v1", None),
        ("Pendulum-v1", None),
        ("none", None),
    ):
        assert reference_returns(get_task("minari:D4RL/door/human-v2", environment=environment)) == expected
