import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="needs the extra ogbench or minari")

import gymnasium

from deflow_torchrl.envs import make_gym_env
from deflow_torchrl.envs.factory import register_robotics
from deflow_torchrl.errors import InputError


class Point(gymnasium.Env):
    """A point that is pushed about."""

    def __init__(self, goals=False):
        box = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        names = ("achieved_goal", "observation")
        self.observation_space = gymnasium.spaces.Dict(dict.fromkeys(names, box)) if goals else box
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)


@pytest.fixture
def registered():
    names = {"PointEndless-v0": {}, "PointGoals-v0": {"max_episode_steps": 5, "kwargs": {"goals": True}}}
    for name, options in names.items():
        gymnasium.register(name, Point, **options)
    yield
    for name in names:
        del gymnasium.registry[name]


def test_robotics_environments_are_known_in_a_process_that_imported_nothing_else():
    pytest.importorskip("gymnasium_robotics", reason="needs the extra minari")
    code = (
        "from deflow_torchrl.envs import make_gym_env\n"
        "if __name__ == '__main__':\n    print(make_gym_env('gym:AdroitHandDoor-v1').spec.id)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "AdroitHandDoor-v1\n", "")


@pytest.mark.parametrize("failure", ["not installed", "cannot register"])
def test_robotics_is_not_needed_for_others(monkeypatch, failure):
    from types import SimpleNamespace

    def refuse(module):
        raise gymnasium.error.RegistrationError("twice")

    absent = failure == "not installed"
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None if absent else SimpleNamespace())
    monkeypatch.setattr(gymnasium, "register_envs", refuse)
    register_robotics.cache_clear()
    try:
        assert make_gym_env("gym:Pendulum-v1").action_space.high == 1
    finally:
        register_robotics.cache_clear()


def test_dictionaries_are_refused(registered):
    with pytest.raises(
        InputError, match=r"PointGoals-v0: observations are a dictionary of achieved_goal, observation; n"
    ):
        make_gym_env("gym:PointGoals-v0")


def test_an_environment_without_a_time_limit_is_refused(registered):
    with pytest.raises(InputError, match="env=PointEndless-v0 has no time limit"):
        make_gym_env("gym:PointEndless-v0")
    assert make_gym_env("gym:PointEndless-v0", max_episode_steps=5).spec.max_episode_steps == 5
