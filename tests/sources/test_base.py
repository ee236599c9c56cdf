import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.errors import InputError
from deflow_torchrl.sources import SOURCES, Source, get_source, register_source
from deflow_torchrl.sources.base import public_name, settled_name, split_name
from deflow_torchrl.tasks import get_task
from deflow_torchrl.tasks.data import load_any, load_task_data, reference_returns


class Walks(Source):
    """Random walks; the name is their number of steps."""

    def load(self, name, *, split="train", root=None, download=True, device=None, memmap_dir=None):
        if split == "val":
            return None
        steps, rng = int(name), np.random.default_rng(0)
        actions = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
        observations = np.concatenate([np.zeros((1, 2)), actions.cumsum(0)]).astype(np.float32)
        return TransitionDataset.from_arrays(
            observations=observations[:-1],
            next_observations=observations[1:],
            actions=actions,
            rewards=np.zeros(steps),
            terminals=np.zeros(steps, bool),
            timeouts=np.arange(steps) == steps - 1,
        )


@pytest.fixture
def walks():
    register_source("walks", Walks())
    yield
    del SOURCES._loaded["walks"]  # there is no way to take a source back


def test_a_registered_source_needs_load_alone(walks):
    task = get_task("walks:30")
    assert (task.source, task.dataset, task.environment, task.metric) == ("walks", "30", None, "return")
    assert get_task("walks:30", environment="Pendulum-v1").environment == "gym:Pendulum-v1"
    assert len(load_task_data(task)) == len(load_any("walks:30")[0]) == 30
    assert load_task_data(task, split="val") is None
    assert reference_returns(task) is None
    source = get_source("walks")
    source.ensure("30")
    assert source.describe("30") == {"name": "30", "sha256": None}
    assert settled_name("walks:30") == public_name("walks:30") == "walks:30"


def test_a_prefix_is_taken_once_and_holds_a_source(walks):
    register_source("walks", get_source("walks"))
    with pytest.raises(InputError, match="there is a source 'walks' already"):
        register_source("walks", Walks())
    with pytest.raises(InputError, match="there is a source 'minari' already"):
        register_source("minari", Walks())
    with pytest.raises(InputError, match="the source 'other' is no Source but 3"):
        register_source("other", 3)


def test_an_unknown_prefix_gets_the_nearest():
    with pytest.raises(InputError, match="unknown source 'minary'; did you mean minari"):
        get_task("minary:mine/arm-v0")
    with pytest.raises(InputError, match="unknown source 'x'; there are ogbench, minari, file"):
        get_task("x:y", environment="Pendulum-v1")


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Makes a distribution that announces sources."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(SOURCES, "_loaded", dict(SOURCES._loaded))
    SOURCES.__dict__.pop("_announced", None)

    def make(name, announced):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[deflow_torchrl.sources]\n{announced}\n")

    yield make
    SOURCES.__dict__.pop("_announced", None)


def test_sources_of_installed_packages_are_found_by_entry_points(distribution, tmp_path):
    (tmp_path / "walking.py").write_text("from tests.sources.test_base import Walks\nSOURCE = Walks()\nNOTHING = 3\n")
    distribution("walking", "steps = walking:SOURCE\nnothing = walking:NOTHING\nbroken = walking:missing")
    assert len(load_task_data(get_task("steps:20"))) == 20
    assert "steps" in SOURCES
    with pytest.raises(InputError, match=r"the source 'nothing' of walking is no Source but 3"):
        get_task("nothing:x")
    with pytest.raises(InputError, match=r"the source 'broken' of walking cannot be loaded \(AttributeError: "):
        get_task("broken:x")


def test_two_entry_points_of_one_name_are_one_line_that_names_both_packages(distribution):
    distribution("strolling", "twice = nowhere:SOURCE")
    distribution("ambling", "twice = nowhere:SOURCE")
    with pytest.raises(InputError) as caught:
        get_task("twice:x")
    assert str(caught.value) == (
        "the source 'twice' is announced by ambling and by strolling (entry points deflow_torchrl.sources); "
        "uninstall all but one"
    )
    assert get_task("file:x").source == "file"


def test_the_former_prefix_of_files_works_and_is_logged_once():
    code = (
        "from deflow_torchrl.tasks import get_task\n"
        "for name in ('own:a', 'own:b'):\n    task = get_task(name)\n    print(task.source, task.dataset)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "file a\nfile b\n"
    assert result.stderr == "own:NAME is read as file:NAME, the prefix since version 0.2\n"


def test_names_that_are_places_are_settled_for_runs_and_shortened_for_others(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert settled_name("file:data/arm") == f"file:{Path.cwd() / 'data/arm'}"
    assert settled_name("own:data/arm") == f"own:{Path.cwd() / 'data/arm'}", "as checkpoints of version 0.1 have it"
    assert public_name("file:/home/me/arm") == public_name("file:arm") == "file:arm"
    for name in ("door-human-v1", "minari:mine/arm-v0", "ogbench:cube-single-play-singletask-v0"):
        assert settled_name(name) == public_name(name) == name
    assert split_name("minari:mine/arm-v0") == ("minari", "mine/arm-v0")
