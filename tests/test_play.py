"""Exported policies in their environment: clips, windows, and what does not fit."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

pytest.importorskip("gymnasium", reason="needs an environment")
pytest.importorskip("PIL", reason="needs the extra reports")
pytest.importorskip("onnxruntime", reason="needs the extra export")
pytest.importorskip("onnxscript", reason="needs the extra export")

import gymnasium
from PIL import Image

from deflow_torchrl.export import export_policy
from tests.support.command_line import assert_one_line, deflow
from tests.support.drawn import STATES, StatePoint
from tests.support.killable import ROOT
from tests.support.pendulum import ENVIRONMENT


class Hidden(StatePoint):
    """No window and no pictures."""

    metadata = {"render_modes": []}


class Narrow(Hidden):
    """Another width of actions."""

    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)


for _kind in (Hidden, Narrow):
    gymnasium.register(f"{_kind.__name__}-v0", _kind, max_episode_steps=12)


class TowardsGoal(torch.nn.Module):
    """Moves the point ``[:2]`` to the goal ``[2:]``: the optimal policy of the drawn point."""

    def forward(self, observation):
        return (10 * (observation[..., 2:] - observation[..., :2])).clamp(-1, 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The optimal policy of the drawn point, its actions in [0, 40]."""
    out = tmp_path_factory.mktemp("play") / "point.onnx"
    policy = TensorDictModule(TowardsGoal(), ["observation"], ["action"])
    policy.register_buffer("low", torch.tensor(-1.0))
    policy.register_buffer("high", torch.tensor(1.0))
    about = {"environment": f"gym:{STATES}", "policy": "towards goal"}
    export_policy(policy, out, observation_dim=4, action_dim=2, about=about, action_bounds=(0, 40))
    return out


def test_a_policy_reaches_its_goals_and_the_clip_shows_them(file, tmp_path):
    clip = tmp_path / "clip.gif"
    arguments = ("play", str(file), "--episodes", "4", "--seed", "5", "--out", str(clip), "--json")
    done = deflow(*arguments)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["success"] == [True] * 4, "the actions were mapped to the environment's bounds"
    assert result["seeds"] == [5, 6, 7, 8]
    assert said[0] == f"start 1 of 4: success after {result['length'][0]} steps"
    assert result["not_repeated"] == []
    with Image.open(clip) as opened:
        assert opened.n_frames == sum(result["length"]) + 4, "the start and each step of every episode"
    assert_one_line(deflow(*arguments), "--force")


@pytest.fixture
def screen(monkeypatch):
    """Something that answers as a display does: the drawn point opens no window on it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("DISPLAY", f"127.0.0.1:{server.getsockname()[1] - 6000}.0")
        yield


def test_a_window_shows_every_step(file, screen, monkeypatch):
    monkeypatch.setattr(StatePoint, "shown", 0)
    done = deflow("play", str(file), "--episodes", "2", "--env", STATES, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert StatePoint.shown == sum(result["length"]) + 2
    assert "file" not in result


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--env", ENVIRONMENT, "--out", "x.gif"], ["reads observations of shape [4]", "gives [3]"]),
        (["--env", "Narrow-v0", "--out", "x.gif"], ["actions of shape [2]", "takes [1]"]),
        (["--env", "Nothing-v0", "--out", "x.gif"], ["env=Nothing-v0 cannot be made"]),
        (["--out", "x.avi"], ["a clip ends in"]),
        (["--out", "x.gif", "--episodes", "11"], ["write an .mp4"]),
        ([], ["no display", "--out FILE"]),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(file, tmp_path, monkeypatch, arguments, said):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert_one_line(deflow("play", str(file), *arguments, cwd=tmp_path), *said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("display", [":5555", "localhost:5555.0", "unix:5555", "x", ":", "::1:5555"])
def test_a_display_that_does_not_answer_is_none(file, monkeypatch, display):
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-5555")
    assert_one_line(deflow("play", str(file)), "no display", "--out FILE")


def test_a_pt2_file_is_refused(tmp_path):
    assert_one_line(
        deflow("play", str(tmp_path / "x.pt2"), "--out", str(tmp_path / "x.gif")), "no ONNX file", "deflow export"
    )


def test_an_environment_without_a_window_is_refused(file, screen):
    assert_one_line(deflow("play", str(file), "--env", "Hidden-v0"), "has no window", "--out FILE")


def test_no_torch_is_imported(file, tmp_path):
    code = "import sys\nfor name in ('torch', 'torchrl', 'tensordict', 'onnx'):\n    sys.modules[name] = None\n"
    code += f"from deflow_torchrl.cli import main\nmain(['play', {str(file)!r}, '--episodes', '1', '--out', 'x.webp'])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.webp").stat().st_size > 0
    assert np.char.count(done.stdout, "start 1 of 1") == 1


@pytest.fixture
def display(monkeypatch):
    """A screen in memory."""
    if shutil.which("Xvfb") is None:
        pytest.skip("no Xvfb: a window needs a screen")
    reading, writing = os.pipe()
    with subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "320x240x24"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    ) as server:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            number = pipe.readline().strip()
        if not number:
            pytest.skip("Xvfb does not start here")
        monkeypatch.setenv("DISPLAY", f":{number}")
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        yield
        server.terminate()


@pytest.mark.parametrize("kind", ["MuJoCo's viewer", "gymnasium's window"])
def test_a_window_opens_and_an_interruption_closes_it(display, tmp_path, kind):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    name, observation_dim, action_dim = {
        "MuJoCo's viewer": ("cube-single-play-singletask-task1-v0", 28, 5),
        "gymnasium's window": ("pointmaze-medium-navigate-singletask-task1-v0", 2, 2),
    }[kind]
    linear = TensorDictModule(torch.nn.Linear(observation_dim, action_dim), ["observation"], ["action"])
    file = tmp_path / "linear.onnx"
    export_policy(linear, file, observation_dim=observation_dim, action_dim=action_dim, about={"environment": name})
    code = (
        "import os, signal\nfrom deflow_torchrl import cli, play\nunit, steps = play._unit, []\n"
        "def counting(*arguments):\n    steps.append(1)\n    if len(steps) == 9:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        f"    return unit(*arguments)\nplay._unit = counting\ncli.main(['play', {str(file)!r}, '--episodes', '1'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 130, done.stderr  # not a crash of the interpreter at its end
    assert "interrupted" in done.stderr.splitlines()[-1]
