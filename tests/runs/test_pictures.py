"""Runs on pictures from data to policy, in a small environment that draws itself."""

import json

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

pytest.importorskip("gymnasium", reason="needs an environment")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl.algorithms import FQLConfig
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.envs import make_env, make_gym_env
from deflow_torchrl.runs.evaluate import evaluate_run
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig, config_to_dict
from deflow_torchrl.sources.files import import_files
from tests.support.command_line import assert_one_line, deflow
from tests.support.drawn import ID, TWO_CAMERAS, drawn_arrays, two_camera_arrays
from tests.support.killable import Children
from tests.support.runs import assert_equal_runs, rows, undrawn

VISUAL = "visual-cube-single-play-singletask-task1-v0"
SETTINGS = {
    "encoder": "impala_debug", "frame_stack": 3, "p_aug": 0.5, "offline_steps": 8, "batch_size": 6, "hidden_dims": [16],
    "eval_interval": 4, "eval_episodes": 2, "save_interval": 3, "log_interval": 2, "eval_workers": 1, "eval_max_steps": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    np.savez(folder / "drawn.npz", **drawn_arrays())
    done = deflow("data", "import", str(folder / "drawn.npz"), "--out", str(folder / "data"))
    assert done.returncode == 0, done.stderr
    return f"file:{folder / 'data'}"


def settings(task, **changes):
    own = {"task": task, "env": ID, "algo": FQLConfig(flow_steps=2, alpha=10.0)}
    return TrainConfig(**{**SETTINGS, **own, **changes})


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with Children(tmp_path_factory.mktemp("children") / "log") as children:
        assert children.run(folder, config_to_dict(settings(task))) == 0, children.log.read_text()
    return folder


def test_a_run_on_pictures_killed_and_resumed_is_bit_for_bit_the_uninterrupted_one(run, task, tmp_path):
    with Children(tmp_path / "log") as children:
        for moment in (("offline", 5), ("renamed", 2)):
            out = tmp_path / moment[0] / run.name
            assert children.run(out, config_to_dict(settings(task)), die=moment) != 0
            assert children.run(out) == 0, children.log.read_text()
            assert_equal_runs(run, out)


def test_the_same_checkpoint_gives_the_same_actions_twice(run):
    once, again = (evaluate_run(run, episodes=3, show_progress=False) for _ in range(2))
    assert once == again
    assert once["evaluations"]["fql"]["length"] == [5, 5, 5], "eval_max_steps ends an episode"


@pytest.mark.slow  # of evaluations on states the same is tested in CI
def test_the_same_checkpoint_gives_the_same_actions_in_two_processes(run):
    once, again = (evaluate_run(run, episodes=3, workers=workers, show_progress=False) for workers in (1, 2))
    assert once == again


def test_frame_stack_crop_and_encoder_are_settings_of_the_run(run, task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    state = torch.load(next((run / "checkpoints").glob("*8*")), weights_only=True)
    assert state["observation_dim"] == [16, 16, 9]
    for name, value in {"p_aug": 0.0, "frame_stack": 1}.items():
        out = tmp_path / name
        train(settings(task, out=str(out), **{name: value}), command="test", show_progress=False)
        assert rows(out) != rows(run)


@pytest.mark.parametrize("k", [2, 3])
def test_an_environment_stacks_frames_as_the_data_do(k):
    arrays = drawn_arrays(episodes=2)
    dataset = TransitionDataset.from_arrays(**arrays, frame_stack=k)[:]
    env, row = make_gym_env(f"gym:{ID}", frame_stack=k), 0
    for episode in range(2):
        observation, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            np.testing.assert_array_equal(observation, dataset["observation"][row])
            observation, _, terminated, truncated, _ = env.step(arrays["actions"][row])
            np.testing.assert_array_equal(observation, dataset["next", "observation"][row])
            ended, row = terminated or truncated, row + 1
    assert row == len(dataset)
    assert env.observation_space.shape == (16, 16, 3 * k)


@pytest.mark.parametrize("k", [1, 2])
def test_torchrls_environment_gives_several_observations_as_a_set_does(k):
    env = make_env(f"gym:{TWO_CAMERAS}", frame_stack=k)
    check_env_specs(env)
    steps = env.rollout(4)
    seen = steps["observation"]
    assert {name: list(entry.shape[1:]) for name, entry in seen.items()} == {
        "front": [16, 16, 3 * k], "joints": [2], "wrist": [8, 8, 3 * k],
    }  # fmt: skip
    assert torch.equal(seen["wrist"], seen["front"][:, ::2, ::2])
    assert ((seen["joints"] >= 0) & (seen["joints"] <= 1)).all()
    for name, entry in steps["next", "observation"].items():
        assert torch.equal(entry[:-1], seen[name][1:])


def test_seeds_of_pictures_train_together(task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    config = settings(task, seeds=[0, 1], out=str(tmp_path / "seeds"), offline_steps=2, eval_interval=0)
    summary = train(config, command="test", show_progress=False)
    assert set(summary["seeds"]) == {"0", "1"}


def test_several_cameras_and_a_vector_are_trained_on_together(tmp_path, monkeypatch):
    undrawn(monkeypatch)
    arrays = two_camera_arrays()
    np.savez(tmp_path / "two.npz", **arrays)
    columns = [f"--column={field}={prefix}front,{prefix}wrist,{prefix}joints" for field, prefix in
               (("observations", ""), ("next_observations", "next_"))]  # fmt: skip
    done = deflow("data", "import", str(tmp_path / "two.npz"), "--out", str(tmp_path / "data"), *columns)
    assert done.returncode == 0, done.stderr
    dataset = TransitionDataset.load(tmp_path / "data").stacked(2)
    row = dataset[:]
    np.testing.assert_array_equal(row["observation", "joints"], arrays["joints"])
    np.testing.assert_array_equal(row["next", "observation", "wrist"][..., 3:], arrays["next_wrist"])
    np.testing.assert_array_equal(row["next", "observation", "wrist"][..., :3], arrays["wrist"])
    config = settings(
        f"file:{tmp_path / 'data'}", env=TWO_CAMERAS, frame_stack=2, out=str(tmp_path / "run"), offline_steps=3
    )
    record = train(config, command="test", show_progress=False)
    assert record["evaluations"]["fql"]["length"] == [5, 5]
    state = torch.load(max((tmp_path / "run" / "checkpoints").glob("*")), weights_only=True)
    assert state["observation_dim"] == {"front": [16, 16, 6], "joints": [2], "wrist": [8, 8, 6]}


def test_cameras_and_a_vector_are_read_from_groups_of_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the extra files")
    arrays = two_camera_arrays()
    with h5py.File(tmp_path / "two.h5", "w") as file:
        for name, array in arrays.items():
            group = "next_obs/" if name.startswith("next_") else "obs/" if name in ("front", "wrist", "joints") else ""
            file[group + name.removeprefix("next_")] = array
    names = ("front", "joints", "wrist")
    columns = {
        field: ",".join(f"{group}/{name}" for name in names)
        for field, group in (("observations", "obs"), ("next_observations", "next_obs"))
    }
    row = import_files(tmp_path / "two.h5", columns=columns)[:]
    for name in names:
        np.testing.assert_array_equal(row["observation", name], arrays[name])
        np.testing.assert_array_equal(row["next", "observation", name], arrays[f"next_{name}"])


def test_the_papers_visual_tasks_have_its_protocol():
    config = compose_config([f"task={VISUAL}", "algo=fql"])
    assert (config.encoder, config.p_aug, config.frame_stack) == ("impala_small", 0.5, 3)
    assert (config.offline_steps, config.eval_interval, config.eval_episodes) == (500_000, 100_000, 50)
    assert (config.algo.alpha, config.hidden_dims) == (300, [512] * 4)
    assert compose_config([f"task={VISUAL}"]).algo.target_divergence == 0.001
    states = compose_config(["task=cube-single-play-singletask-task2-v0"])
    assert (states.encoder, states.p_aug, states.frame_stack) == ("impala_small", 0.0, 1)
    outside = compose_config(["task=visual-cube-triple-play-singletask-task1-v0"])
    assert (outside.p_aug, outside.frame_stack, outside.offline_steps) == (0.5, 3, 500_000)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["online_steps=5"], ["pictures", "offline only"]),
        (["normalize=standard"], ["normalize=standard", "encoder"]),
        (["encoder=impala_tiny"], ["encoder=impala_tiny", "impala_small"]),
        (["p_aug=2"], ["p_aug=2", "probability"]),
        (["frame_stack=0"], ["frame_stack=0", "at least 1"]),
        (["env=tests.support.drawn:LargePoint-v0"], ["(16, 16, 3)", "(24, 24, 3)", "another environment"]),
        (["env=Pendulum-v1"], ["(16, 16, 3)", "(3,)"]),
    ],
)
def test_bad_input_is_one_line(task, tmp_path, arguments, parts):
    given = [f"{name}={str(value).replace(' ', '')}" for name, value in SETTINGS.items()]
    result = deflow("train", f"task={task}", f"env={ID}", *given, *arguments, f"out={tmp_path / 'run'}")
    assert_one_line(result, *parts)
    assert not (tmp_path / "run").exists()


def test_a_truncated_picture_file_is_one_line(tmp_path):
    np.savez_compressed(tmp_path / "drawn.npz", **drawn_arrays(episodes=2))
    data = (tmp_path / "drawn.npz").read_bytes()
    for cut in (len(data) // 2, len(data) - 10):
        (tmp_path / "cut.npz").write_bytes(data[:cut])
        assert_one_line(deflow("data", "import", str(tmp_path / "cut.npz"), "--out", str(tmp_path / "out")), "cut.npz")
    broken = bytearray(data)
    broken[300:340] = bytes(40)
    (tmp_path / "broken.npz").write_bytes(broken)
    assert_one_line(
        deflow("data", "import", str(tmp_path / "broken.npz"), "--out", str(tmp_path / "out")), "broken.npz"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_exported_policy_acts_on_stacked_pictures(run, tmp_path, format):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    from deflow_torchrl.deploy import load_policy

    file = tmp_path / f"policy.{format}"
    result = deflow("export", str(run), "--out", str(file))
    assert result.returncode == 0, result.stderr
    policy = load_policy(file, trusted=True)
    assert policy(np.zeros((16, 16, 9), np.uint8)).shape == (2,)


def test_a_run_is_reported(run, tmp_path):
    result = deflow("report", str(run), "--html", str(tmp_path / "report.html"), "--md", str(tmp_path / "report.md"))
    assert result.returncode == 0, result.stderr
    assert "fql" in (tmp_path / "report.md").read_text().lower()
    assert json.loads((run / "record.json").read_text())["config"]["frame_stack"] == 3
