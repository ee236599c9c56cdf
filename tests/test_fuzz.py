"""Whatever comes in either trains one step with finite losses or is refused in one line.

``DEFLOW_FUZZ_EXAMPLES=2000 python -m pytest tests/test_fuzz.py --hypothesis-show-statistics`` looks longer.
"""

import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="needs hypothesis")
pytest.importorskip("pyarrow", reason="needs the extra files")
pytest.importorskip("h5py", reason="needs the extra files")

from hypothesis import HealthCheck, event, example, given
from hypothesis import settings as how

from deflow_torchrl.algorithms import ProblemSpec, get_algorithm
from deflow_torchrl.data import TransitionDataset, TransitionReplayBuffer, import_files
from deflow_torchrl.errors import InputError
from deflow_torchrl.trainers import UpdateStep
from tests.support.arrays import arrays, with_successors
from tests.support.strategies import ENVIRONMENT, given_arrays, given_environment, given_file, overrides, write_file

EXAMPLES = int(os.environ.get("DEFLOW_FUZZ_EXAMPLES", "200"))
# The same examples in every run; the number of them is what one raises to look further.
looking = how(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def refused(make):
    """What ``make`` gives, or ``None`` where it is refused in one line."""
    message = "accepted"
    try:
        return make()
    except InputError as error:
        message = str(error)
    finally:
        event("accepted" if message == "accepted" else "refused")
    assert message
    assert "\n" not in message
    return None


def check_one_step(dataset):
    """One update of DeFlow on the set has finite losses, and leaves finite weights."""
    if dataset.observation.ndim != 2:
        assert dataset.observation.dtype == torch.uint8
        return
    algorithm = get_algorithm("deflow")
    problem = ProblemSpec(dataset.observation.shape[1], dataset.action.shape[1], hidden_dims=(8,))
    learner = algorithm.build(algorithm.config(flow_steps=2), problem)
    losses = UpdateStep(learner)(TransitionReplayBuffer(dataset, batch_size=8).sample())
    assert all(bool(torch.as_tensor(losses[name]).isfinite().all()) for name in learner.loss_names), losses


@looking
@given(given_arrays())
@example({**arrays(), "rewards": np.full(12, 1e38)})  # finite, but not its square
@example({**arrays(), "observations": np.full((12, 3), 1e30)})
@example({**with_successors(), "observations": with_successors()["observations"].astype(">f8")})
@example({**arrays(), "rewards": [torch.tensor(1.0, dtype=torch.bfloat16)] * 12})
@example({**arrays(), "terminals": torch.eye(12)[5].to_sparse()})
@example({**arrays(), "episode_ends": True})
def test_arrays_train_or_are_refused(given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = refused(lambda: TransitionDataset.from_arrays(**given))
    if dataset is not None:
        check_one_step(dataset)


@looking
@given(given_file())
def test_files_train_or_are_refused(drawn):
    layout, arrays_, options, damage = drawn
    with tempfile.TemporaryDirectory() as folder:
        path = write_file(Path(folder), layout, arrays_, damage)
        if path is None:
            return
        dataset = refused(lambda: import_files(path, **options))
        if dataset is not None:
            check_one_step(dataset)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return TransitionDataset.from_arrays(**arrays()).save(tmp_path_factory.mktemp("fuzz") / "set")


@pytest.mark.filterwarnings("ignore:Found an eps value:UserWarning")  # of torchrl, for tau above 0.5
def test_settings_train_or_are_refused(folder, tmp_path, monkeypatch):
    pytest.importorskip("hydra", reason="needs the extra cli")
    from deflow_torchrl.runs import compose_config
    from deflow_torchrl.runs.run import Run
    from deflow_torchrl.runs.settings import TrainConfig, setting_names

    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path))
    # Compiling takes minutes; threads and kernels are settings of the process.
    names = [name for name in setting_names(TrainConfig) if name not in ("compile", "threads", "kernels", "task")]

    @looking
    @given(
        overrides(
            [*names, "algo.lr", "algo.tau", "algo.gamma", "algo.target_divergence", "algo.flow_steps", "algo.x", "y"]
        )
    )
    @example(["algo.tau=1"])
    def look(settings):
        fixed = {"task": f"file:{folder}", "hidden_dims": "[8]", "batch_size": "4", "offline_steps": "1"}
        mine = [
            f"{name}={value}" for name, value in fixed.items() if not any(it.startswith(f"{name}=") for it in settings)
        ]
        config = refused(lambda: compose_config([*mine, *settings]))
        run = (
            None
            if config is None
            else refused(lambda: Run(config, tmp_path / "run", commands=["fuzz"], show_progress=False))
        )
        if run is not None:
            losses = run.update(run.buffer.sample())
            assert all(bool(torch.as_tensor(losses[name]).isfinite().all()) for name in run.learner.loss_names), (
                settings
            )

    look()


def toy(about):
    """An environment of three observations and two actions, as far as ``about`` says."""
    import gymnasium

    class Toy(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(
            0 if about["space_dtype"] in (np.uint8, np.int64) else about["low"],
            9,
            about["space_shape"],
            about["space_dtype"],
        )
        high = 1 if about["action_dtype"] == np.int64 else about["action_high"]
        action_space = gymnasium.spaces.Box(-high, high, about["action_shape"], about["action_dtype"])

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return about["observation"](), about["info"]

        def step(self, action):
            return about["observation"](), about["reward"], about["terminated"], False, about["info"]

    return Toy


SOUND = {name: values[0] for name, values in ENVIRONMENT.items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:overflow encountered in cast")  # of gymnasium, about spaces
@looking
@given(given_environment())
@example(SOUND)
@example({**SOUND, "reward": np.array([1.0])})
@example({**SOUND, "observation": lambda: np.zeros(4)})
@example({**SOUND, "observation": lambda: np.zeros(3, np.uint8), "space_dtype": np.uint8})
@example({**SOUND, "action_dtype": np.int64})
@example({**SOUND, "info": {"success": np.nan}})
def test_environments_step_or_are_refused(about):
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium")
    from deflow_torchrl.envs import make_gym_env
    from deflow_torchrl.envs.checked import check_environment

    gymnasium.register("DeflowToy-v0", entry_point=toy(about), max_episode_steps=3)

    def met():
        env = make_gym_env("gym:DeflowToy-v0")
        check_environment(env, "DeflowToy-v0", observation_shape=(3,), action_shape=(2,))
        return env

    try:
        env = met() if about is SOUND else refused(met)
        if env is not None:
            observation, _ = env.reset(seed=1)
            for _ in range(3):
                observation, reward, terminated, truncated, info = env.step(np.array([0.3, -0.3], np.float32))
                assert observation.shape == (3,)
                assert np.isfinite(observation).all()
                assert isinstance(reward, float)
                assert np.isfinite(reward)
                assert {type(terminated), type(truncated), type(info.get("success", True))} == {bool}
            env.close()
    finally:
        gymnasium.registry.pop("DeflowToy-v0")
