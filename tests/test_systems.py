"""Windows and macOS lack some of Linux's names and forbid some of its file names: the package imports, trains and resumes."""

import json
import subprocess
import sys

import pytest

from deflow_torchrl.paths import file_name
from tests.support.generation import TASK
from tests.support.other_systems import pretend

IMPORT = """
import importlib, os, pkgutil, sys
import deflow_torchrl

for module in pkgutil.walk_packages(deflow_torchrl.__path__, "deflow_torchrl."):
    importlib.import_module(module.name)
from deflow_torchrl import paths
assert not hasattr(paths.os, "posix_fallocate") and hasattr(os, "posix_fallocate")
"""


def run(environment, *command):
    arguments = [sys.executable, "-W", "ignore", *command]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture
def settings(generated):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    pytest.importorskip("hydra", reason="needs the extra cli")
    small = ["hidden_dims=[16,16]", "batch_size=16", "offline_steps=20", "eval_episodes=2", "eval_max_steps=5"]
    return [f"data_root={generated}", *small, "log_interval=10", "save_interval=10", "storage=memmap"]


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_every_module_imports_without_linuxs_own_names(system, tmp_path):
    run(pretend(system, tmp_path / "system"), "-c", IMPORT)


@pytest.mark.slow
def test_a_sweep_trains_where_processes_cannot_be_forked(settings, tmp_path):
    out = tmp_path / "sweep"
    sweep = ("sweep", "eval_workers=1", f"tasks={TASK}", "algos=deflow:fixed_alpha=0.3", "seeds=0", f"out={out}")
    run(pretend("win32", tmp_path / "system"), "-m", "deflow_torchrl.cli", *sweep, *settings)
    assert len(list(out.rglob("record.json"))) == 1


@pytest.mark.slow
def test_a_run_trains_and_is_resumed_where_open_files_cannot_be_replaced(settings, tmp_path):
    deflow, out = (pretend("win32", tmp_path / "system"), "-m", "deflow_torchrl.cli"), tmp_path / "run"
    run(*deflow, "train", f"task={TASK}", *settings, "eval_workers=2", f"out={out}")
    run(*deflow, "resume", str(out), "online_steps=20", "--force")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(row["step"] for row in rows) == 40
    assert (out / "record.json").is_file()


@pytest.mark.parametrize(
    "name", ["minari:D4RL/door/human-v2", r"file:C:\data\arm", "file:../a b", "con", 'a?b*|<>"', "file:.", "LPT1.v0"]
)
def test_names_of_run_folders_are_valid_on_every_system(name):
    made = file_name(name)
    assert made
    assert not set(made) & set('<>:"/\\|?* ')
    assert not made.endswith(".")
    assert made.partition(".")[0].lower() not in {"con", "prn", "aux", "nul", "lpt1"}
