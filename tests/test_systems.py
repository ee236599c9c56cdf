"""macOS and Windows lack some of Linux's system calls: without them the package imports and trains."""

import subprocess
import sys

import pytest

from tests.support.generation import TASK

# Third-party packages are imported first: those for this system need its names.
HIDE = """
import contextlib, importlib, mmap, multiprocessing.forkserver, os, pkgutil, shutil, signal, subprocess, sys, tempfile

for name in (
    "torch", "tensordict", "torchrl.collectors", "torchrl.data", "torchrl.envs", "torchrl.objectives", "torchrl.record",
    "numpy", "tqdm", "filelock", "lazy_loader", "scipy.stats", "typer", "rich.progress", "hydra", "gymnasium", "ogbench",
    "mujoco", "minari", "gymnasium_robotics", "h5py", "pyarrow", "matplotlib.pyplot", "jinja2", "jsonschema", "ray",
    "onnxruntime", "requests",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
missing = {
    os: ["posix_fallocate", "posix_fadvise", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity",
         "sched_setaffinity", "fork", "setsid", "setpgid", "killpg", "getpgid", "getuid", "O_CLOEXEC"],
    signal: ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGCHLD", "SIGALRM"],
    mmap: [name for name in dir(mmap) if name.startswith("MADV_")],
}
for module, names in missing.items():
    for name in names:
        vars(module).pop(name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
"""
IMPORT = """
import deflow_torchrl

for module in pkgutil.walk_packages(deflow_torchrl.__path__, "deflow_torchrl."):
    importlib.import_module(module.name)
"""
TRAIN = """
from deflow_torchrl.cli import main

main(sys.argv[1:])
"""


def run(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", HIDE + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("storage", ["device", "memmap"])
def test_every_module_imports_and_an_offline_run_trains_without_linuxs_own_names(storage, generated, tmp_path):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    pytest.importorskip("hydra", reason="needs the extra cli")
    out = tmp_path / "run"
    settings = [f"task={TASK}", f"data_root={generated}", "hidden_dims=[16,16]", "batch_size=16", "offline_steps=20"]
    settings += ["eval_episodes=1", "eval_workers=1", "log_interval=10", f"storage={storage}", f"out={out}"]
    result = run(IMPORT + TRAIN, "train", *settings)
    assert result.returncode == 0, result.stderr
    assert (out / "record.json").is_file()
