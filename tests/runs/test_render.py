"""Clips: policies of a run side by side on the same starts."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="needs an environment")
pytest.importorskip("hydra", reason="needs the extra cli")
pytest.importorskip("PIL", reason="needs the extra reports")

from PIL import Image

from deflow_torchrl.envs.drawing import ActedEpisode, EpisodeDrawing, check_drawings
from deflow_torchrl.runs.evaluate import evaluate_run
from deflow_torchrl.runs.render import render_run
from tests.support.command_line import assert_one_line, deflow
from tests.support.drawn import STATES, drawn_arrays
from tests.support.killable import ROOT
from tests.support.pendulum import ENVIRONMENT
from tests.support.rendering import missing_renderer
from tests.support.runs import drawn

TINY = (
    "batch_size=8", "hidden_dims=[8]", "algo.flow_steps=2", "offline_steps=4", "eval_interval=2", "eval_episodes=3",
    "log_interval=2", "eval_workers=1",
)  # fmt: skip
GREEN = (0, 122, 77)


def frames(file):
    """Pictures ``[N, H, W, 3]`` of an animated picture."""
    with Image.open(file) as opened:
        pictures = []
        for number in range(opened.n_frames):
            opened.seek(number)
            pictures.append(np.asarray(opened.convert("RGB"), np.int64))
    return np.stack(pictures)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a point that is moved onto another, with a clip of each of its evaluations."""
    folder = tmp_path_factory.mktemp("runs")
    np.savez(folder / "point.npz", **drawn_arrays("StatePoint-v0"))
    done = deflow("data", "import", str(folder / "point.npz"), "--out", str(folder / "data"))
    assert done.returncode == 0, done.stderr
    task = (f"task=file:{folder / 'data'}", f"env={STATES}")
    with pytest.MonkeyPatch.context() as patch:
        drawn(patch)
        done = deflow("train", *task, *TINY, "video=true", f"out={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_video_writes_a_clip_of_each_evaluation_and_the_page_shows_the_last(run):
    assert sorted(path.name for path in (run / "videos").iterdir()) == ["step-00000002.webp", "step-00000004.webp"]
    one, two = (frames(path).shape[2] for path in sorted((run / "videos").iterdir()))
    assert two > 1.9 * one, "at the end the prior beside DeFlow"
    shown = re.search(
        r'<img alt="The policies prior and deflow [^>]*src="data:image/webp;base64', (run / "report.html").read_text()
    )
    assert shown


@pytest.mark.parametrize("suffix", ["webp", "gif", "mp4"])
def test_a_clip_shows_the_evaluated_episodes_side_by_side_and_marks_success(run, tmp_path, suffix):
    out = tmp_path / f"clip.{suffix}"
    result = render_run(run, out=out, policies=["prior", "deflow"], episodes=3, size=64, show_progress=False)
    assert result["evaluations"] == evaluate_run(run, episodes=3, show_progress=False)["evaluations"]
    assert result["not_repeated"] == []
    if suffix == "mp4":
        ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="needs the extra video")
        assert next(ffmpeg.read_frames(str(out)))["size"] == (134, 118)
        return
    found = frames(out)
    assert found.shape[1:] == (118, 134, 3), "two squares of 64 with 6 between, below two lines and above one"
    if suffix == "webp":
        lengths = np.array([result["evaluations"][name]["length"] for name in ("prior", "deflow")])
        assert abs(len(found) - (lengths.max(0) + 1).sum()) <= 3, "the longer of both episodes, from each start"
    for side, name in ((0, "prior"), (70, "deflow")):
        border = found[:, 37, side + 10 : side + 50].mean(1)
        marked = np.abs(border - GREEN).max(1) < 25
        assert marked.any() == any(result["evaluations"][name]["success"]), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "nobody", "--out", "x.webp"], "there are prior, deflow"),
        (["--out", "x.avi"], "a clip ends in .mp4, .gif, .webp"),
        (["--out", "taken.gif"], "--force overwrites it"),
        (["--out", "nowhere/x.gif"], "does not exist"),
        (["--out", "x.gif", "--episodes", "11"], "write an .mp4"),
    ],
)
def test_a_clip_that_cannot_be_made_is_refused_in_one_line(run, tmp_path, arguments, said):
    (tmp_path / "taken.gif").touch()
    assert_one_line(deflow("render", str(run), *arguments, cwd=tmp_path), said)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gif"]


def test_an_environment_that_cannot_be_drawn_is_refused_before_anything_is_trained(run, tmp_path):
    task = f"task=file:{run.parent / 'data'}"
    for environment, said in ((f"gym:{ENVIRONMENT}", "cannot be drawn here"), ("none", "needs an environment")):
        out = tmp_path / "run"
        result = deflow("train", task, f"env={environment.removeprefix('gym:')}", *TINY, "video=true", f"out={out}")
        assert_one_line(result, said)
        assert not out.exists()


def test_an_episode_that_ends_otherwise_than_it_was_acted_is_named():
    with EpisodeDrawing(f"gym:{STATES}", size=16) as drawing:
        check_drawings([drawing])
        actions = np.zeros((5, 2), np.float32)
        pictures = list(drawing.pictures(ActedEpisode(3, actions, success=False, episode_return=0.0), every=2))
        assert [picture.step for picture in pictures] == [0, 2, 4, 5]
        assert drawing.not_repeated == []
        list(drawing.pictures(ActedEpisode(4, actions, success=True, episode_return=0.0), every=2))
        assert drawing.not_repeated == [4]


@pytest.fixture
def without_a_display(monkeypatch):
    if (why := missing_renderer()) is not None:
        pytest.skip(f"no EGL renderer here: {why}")
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


def test_mujoco_draws_every_episode_after_the_trial(without_a_display):
    with EpisodeDrawing("gym:HalfCheetah-v5", size=64) as drawing:
        check_drawings([drawing])
        for seed in (0, 1):
            still = ActedEpisode(seed, np.zeros((1, 6), np.float32), success=False, episode_return=0.0)
            assert all(picture.pixels.std() > 10 for picture in drawing.pictures(still, every=1))


def test_mujoco_draws_without_a_display_with_shadows_and_without(without_a_display):
    still = ActedEpisode(0, np.zeros((1, 6), np.float32), success=False, episode_return=0.0)
    drawn = []
    for shadows in (True, False):
        with EpisodeDrawing("gym:HalfCheetah-v5", size=64, shadows=shadows) as drawing:
            drawn.append(np.stack([picture.pixels for picture in drawing.pictures(still, every=1)]))
    assert drawn[0].shape == (2, 64, 64, 3)
    assert drawn[0].std() > 10
    assert (drawn[0] != drawn[1]).any()


def test_a_renderer_that_does_not_exist_is_one_line(run, tmp_path):
    command = [sys.executable, "-m", "deflow_torchrl.cli", "render", str(run), "--out", str(tmp_path / "x.gif")]
    environment = os.environ | {"MUJOCO_GL": "bogus", "PYTHONPATH": str(ROOT)}
    assert_one_line(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=False), "MUJOCO_GL: bogus"
    )
