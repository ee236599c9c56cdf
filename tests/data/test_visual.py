"""Images: one process with a renderer makes a small set in OGBench's layout and reads it with OGBench's own loader."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

ogbench = pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.data import OGBenchExperienceReplay, load_ogbench_dataset  # noqa: E402
from deflow_torchrl.envs import make_env  # noqa: E402
from deflow_torchrl.errors import InputError  # noqa: E402
from tests.support.command_line import assert_one_line, deflow  # noqa: E402

VISUAL = "visual-cube-single-play-singletask-task1-v0"
SPLITS = {"train": (2, ""), "val": (1, "-val")}

MAKE = """
import sys
from pathlib import Path
import numpy as np
import torch
from deflow_torchrl.envs import make_env
name, folder = sys.argv[1], Path(sys.argv[2])
env = make_env(name)
gym = env.base_env._env
rng = np.random.default_rng(0)
for split, suffix, episodes in (("train", "", 2), ("val", "-val", 1)):
    rows = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
    for episode in range(episodes):
        observation, _ = gym.reset(seed=episode)
        for step in range(4):
            action = rng.uniform(-1, 1, 5).astype(np.float32)
            rows["observations"].append(observation.copy())
            observation, _, _, _, info = gym.step(action)
            for key, value in (("actions", action), ("terminals", step == 3), ("qpos", info["prev_qpos"]),
                               ("qvel", info["prev_qvel"])):
                rows[key].append(value)
    arrays = {key: np.array(values) for key, values in rows.items()}
    arrays |= {key: arrays[key].astype(np.float32) for key in ("qpos", "qvel")}
    arrays["qpos"][2, 14:17] = (0.425, -0.1, 0.02)  # where task 1 wants the cube
    np.savez(folder / f"visual-cube-single-play-v0{suffix}.npz", **arrays)
import ogbench
sets = ogbench.make_env_and_datasets(name, dataset_dir=str(folder), dataset_only=True, cur_env=gym)
for split, values in zip(("train", "val"), sets):
    np.savez(folder / f"ogbench-{split}.npz", **values)
assert (gym.reset(seed=0)[0] == arrays["observations"][0]).all(), "a seed fixes the pictures"
torch.save(env.rollout(2).to_dict(), folder / "rollout.pt")
"""


@pytest.fixture(scope="session")
def visual(tmp_path_factory):
    """A folder with the set, what OGBench reads from it, and steps of the TorchRL environment."""
    folder = tmp_path_factory.mktemp("visual")
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    probe = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8)"
    found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"no EGL renderer here: {found.stderr.strip().splitlines()[-1]}")
    made = subprocess.run(
        [sys.executable, "-c", MAKE, VISUAL, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mapped", [False, True])
def test_every_value_of_a_visual_set_equals_what_the_ogbench_package_loads(visual, split, mapped, tmp_path):
    with np.load(visual / f"ogbench-{split}.npz") as file:
        expected = dict(file)
    where = {"memmap_dir": tmp_path} if mapped else {}
    buffer = OGBenchExperienceReplay(VISUAL, root=visual, split=split, **where)
    td = buffer[:]
    assert len(td) == len(expected["actions"]) == 3 * SPLITS[split][0]
    assert td["observation"].dtype == td["next", "observation"].dtype == torch.uint8
    assert td["observation"].shape[1:] == (64, 64, 3)
    np.testing.assert_array_equal(td["observation"], expected["observations"])
    np.testing.assert_array_equal(td["next", "observation"], expected["next_observations"])
    np.testing.assert_array_equal(td["action"], np.clip(expected["actions"], -1 + 1e-5, 1 - 1e-5))
    np.testing.assert_array_equal(td["next", "reward"].squeeze(-1), expected["rewards"])
    np.testing.assert_array_equal(td["next", "terminated"].squeeze(-1), expected["masks"] == 0)
    assert td["next", "terminated"].sum() == 1
    assert expected["observations"].dtype == np.uint8
    # One picture more an episode than transitions, instead of two for each.
    assert buffer.dataset.observation.nbytes == 64 * 64 * 3 * 4 * SPLITS[split][0]


def test_the_environment_gives_pictures_under_the_data_sets_name(visual):
    rollout = torch.load(visual / "rollout.pt")
    for step in (rollout, rollout["next"]):
        assert step["observation"].shape == (2, 64, 64, 3)
        assert step["observation"].dtype == torch.uint8
        assert "pixels" not in step
    assert rollout["next"]["success"].shape == (2, 1)


def test_a_set_of_states_is_no_set_of_pictures(visual, tmp_path):
    with np.load(visual / "visual-cube-single-play-v0.npz") as file:
        content = dict(file)
    content["observations"] = content["observations"].reshape(8, -1)[:, :28].astype(np.float32)
    np.savez(tmp_path / "visual-cube-single-play-v0.npz", **content)
    with pytest.raises(InputError, match="must be uint8 images"):
        load_ogbench_dataset(VISUAL, root=tmp_path)


def test_without_a_display_the_environment_says_how_to_draw(monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="MUJOCO_GL=egl"):
        make_env(VISUAL)


def test_the_action_variance_of_pictures_is_refused_before_any_work(tmp_path):
    assert_one_line(deflow("iav", VISUAL, "--data-root", str(tmp_path)), "images", "states")
    assert not any(tmp_path.iterdir())
