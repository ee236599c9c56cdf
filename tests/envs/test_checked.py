"""Environments that are slightly off: taken, or refused in one line before anything is trained."""

import json
import logging

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="needs the extra ogbench or minari")

import gymnasium
from tensordict.nn import TensorDictModule

from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.envs import make_gym_env
from deflow_torchrl.envs.checked import CheckedSteps, check_environment
from deflow_torchrl.envs.online import check_online_environment, is_replayable
from deflow_torchrl.errors import EnvironmentFaultError, InputError
from deflow_torchrl.runs import build
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig
from deflow_torchrl.trainers import Evaluator
from tests.support.command_line import assert_one_line, deflow
from tests.support.odd_simulators import FINE, LATE, REFUSED, odd
from tests.support.runs import undrawn

SHAPES = {"observation_shape": (2,), "action_shape": (1,)}


def check(name):
    task = f"gym:{odd(name)}"
    check_environment(make_gym_env(task), task, **SHAPES)
    check_online_environment(task)
    return task


def idle():
    return TensorDictModule(lambda s: torch.zeros(len(s), 1), in_keys=["observation"], out_keys=["action"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of two numbers and one action."""
    folder = tmp_path_factory.mktemp("data") / "odd"
    rng = np.random.default_rng(0)
    TransitionDataset.from_arrays(
        observations=rng.normal(size=(40, 2)), actions=rng.uniform(-1, 1, (40, 1)), rewards=np.ones(40),
        terminals=np.zeros(40), timeouts=np.arange(40) % 10 == 9,
    ).save(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("name", FINE)
def test_numbers_of_any_type_and_shape_are_taken_by_evaluation_and_collection(name):
    task = check(name)
    with Evaluator(task, num_envs=2) as evaluator:
        result = evaluator.run(idle(), episodes=2)
    assert result.episode_return.tolist() == [10.0, 10.0]
    assert result.success.tolist() == [name.startswith("Success")] * 2


@pytest.mark.parametrize("name", REFUSED)
def test_an_environment_that_cannot_be_used_is_refused_in_one_line(name):
    with pytest.raises(InputError) as error:
        check(name)
    line = str(error.value)
    assert REFUSED[name][1] in line
    assert odd(name) in line
    assert "\n" not in line


def test_an_observation_outside_its_declared_bounds_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check("OutsideBounds")
        check("Doubles")
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "entry 1 of an observation is 40, outside its declared bounds [-10, 10], which are not used"
    ] * 2  # of the reset and of the step


def test_actions_mean_the_same_in_data_and_environment():
    task = f"gym:{odd('PixelActions')}"
    env = make_gym_env(task)
    check_environment(env, task, **SHAPES, action_bounds=(0, 255))
    check_environment(env, task, **SHAPES, action_bounds=([0.0], [255.0]))
    with pytest.raises(
        InputError, match=r"mapped from \[0, 1\]: the same action would mean another one; import the data"
    ):
        check_environment(env, task, **SHAPES, action_bounds=(0, 1))


def test_a_simulator_is_asked_for_its_space_once_and_not_by_its_steps():
    asked = []

    class Asked(gymnasium.Wrapper):
        @property
        def observation_space(self):
            asked.append(True)
            return gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8)

        def reset(self, **options):
            return np.zeros((4, 4, 3), np.uint8), {}

        def step(self, action):
            return np.ones((4, 4, 3), np.uint8), 0.0, False, False, {}

    env = CheckedSteps(Asked(gymnasium.make(odd("List"))))
    env.reset()
    assert env.step(np.zeros(1))[0].dtype == np.uint8
    assert asked == []
    assert env.observation_space == env.observation_space == env.declared_space
    assert asked == [True]


@pytest.mark.parametrize("name", ["RewardNan", "WideInStep", "IntegerActions"])
@pytest.mark.parametrize("phase", [[], ["online_steps=5"]], ids=["offline", "online"])
def test_train_refuses_it_before_anything_is_written(folder, name, phase, tmp_path):
    out = tmp_path / "run"
    done = deflow("train", f"task=file:{folder}", f"env={odd(name)}", f"out={out}", "offline_steps=5", *phase)
    assert done.returncode == 2
    assert_one_line(done, REFUSED[name][1], odd(name), "env=none trains without evaluating")
    assert not out.exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "cause"), [("NanAtThree", "the observation is not finite"), ("RewardAtThree", "not a number")]
)
def test_a_fault_in_an_evaluation_is_named_by_step_and_seed(name, cause, workers):
    assert name in LATE
    with (
        Evaluator(check(name), num_envs=2, workers=workers) as evaluator,
        pytest.raises(EnvironmentFaultError) as error,
    ):
        evaluator.run(idle(), episodes=2, seed=7)
    assert str(error.value).startswith("the environment failed in step 3 of the evaluation's episode of seed 7 (")
    assert cause in str(error.value)


def test_a_fault_in_a_runs_evaluation_ends_it_in_one_line_that_says_how_to_go_on(folder, tmp_path):
    out = tmp_path / "run"
    done = deflow(
        "train", f"task=file:{folder}", f"env={odd('NanAtThree')}", f"out={out}", "offline_steps=5", "hidden_dims=[8]",
        "eval_episodes=1", "eval_workers=1", "algo.flow_steps=2",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert "failed in step 3 of the evaluation's episode" in line
    assert f"deflow resume {out}" in line


def test_the_check_changes_no_number_of_a_run(folder, tmp_path, monkeypatch):
    undrawn(monkeypatch)

    def run(name):
        config = TrainConfig(
            task=f"file:{folder}", env=odd("Drawing"), batch_size=8, hidden_dims=[8], log_interval=1,
            eval_interval=0, eval_episodes=2, eval_workers=1, offline_steps=4, online_steps=4, out=str(tmp_path / name),
            algo=DeFlowConfig(flow_steps=2),
        )  # fmt: skip
        is_replayable.cache_clear()  # its measurement steps the environment, once in a process
        record = train(config, command="train", show_progress=False)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return record["evaluations"], [{k: v for k, v in row.items() if "time/" not in k} for row in rows]

    checked = run("checked")
    monkeypatch.setattr(build, "_check_environment", lambda *_: None)
    assert run("unchecked") == checked
