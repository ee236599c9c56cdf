"""``deflow`` and real signals, as terminals, schedulers and supervisors send them."""

import contextlib
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl.trainers.metrics import read_rows
from tests.support.command_line import deflow
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs

SMALL = (
    f"env={ENVIRONMENT}", "batch_size=8", "hidden_dims=[8]", "algo.flow_steps=2", "log_interval=1", "eval_interval=0",
    "eval_episodes=2", "eval_workers=1", "save_interval=0", "threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"))


def start(arguments, **options):
    options = {
        "stderr": subprocess.PIPE,
        "stdout": subprocess.DEVNULL,
        "text": True,
        "start_new_session": True,
        **options,
    }
    return subprocess.Popen([sys.executable, "-m", "deflow_torchrl.cli", *arguments], **options)


def start_script(code, arguments, marker):
    """Start Python code with the arguments of ``deflow`` and wait until it has made a file."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not marker.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def wait_for_rows(out, number, process):
    deadline = time.monotonic() + 240
    while len(read_rows(out / "metrics.jsonl")) < number:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def group_of(process):
    """Processes of its session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == process.pid and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def test_a_signal_to_all_processes_of_a_job_saves_and_leaves_nothing_behind(task, tmp_path):
    """As Slurm's and systemd's: to collectors, evaluators and the keeper of semaphores, too; twice, as by a hasty scheduler."""
    more = ("offline_steps=6", "online_steps=40", "collector_workers=2", "steps_per_collection=4")
    arguments = ("train", f"task={task}", *SMALL, *more)
    straight, out = tmp_path / "straight" / "run", tmp_path / "stopped" / "run"
    assert deflow(*arguments, "eval_interval=10", f"out={straight}").returncode == 0
    process = start([*arguments, "eval_interval=10", "eval_workers=2", f"out={out}"])
    wait_for_rows(out, 12, process)
    assert len(group_of(process)) >= 6, "run, semaphores' keeper, two collectors, two evaluators"
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"go on with: deflow resume {out}" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert "leaked" not in said
    deadline = time.monotonic() + 10  # the keeper of semaphores ends when it sees that the others have
    while group_of(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group_of(process) == []
    assert deflow("resume", str(out), "eval_workers=1").returncode == 0
    assert_equal_runs(straight, out)


def test_a_closed_terminal_saves_and_nohup_goes_on(task, tmp_path):
    arguments = ("train", f"task={task}", *SMALL)
    # The kernel sends SIGHUP to the terminal's foreground processes; writing to the terminal is an error from then on.
    hung = tmp_path / "hung"
    pid, master = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable,
            [sys.executable, "-m", "deflow_torchrl.cli", *arguments, "offline_steps=100000", f"out={hung}"],
        )
    deadline = time.monotonic() + 240
    while len(read_rows(hung / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.close(master)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert list((hung / "checkpoints").glob("step_*.pt"))
    assert not (hung / ".lock").exists()

    out = tmp_path / "nohup"
    process = start(
        [*arguments, "offline_steps=60", f"out={out}"], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_for_rows(out, 5, process)
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert (out / "record.json").exists()


def test_ctrl_c_twice_ends_at_once_and_costs_the_steps_since_the_last_checkpoint_alone(task, tmp_path):
    out, marker = tmp_path / "run", tmp_path / "saving"
    # A disk on which the first save hangs: only the second Ctrl-C ends it.
    code = (
        "import time\nfrom pathlib import Path\nfrom deflow_torchrl.trainers import checkpoint\n"
        f"def hang():\n    Path({str(marker)!r}).touch()\n    time.sleep(600)\n"
        "begin, count = checkpoint._HashingFile.__init__, []\n"
        "class Disk:\n    def write(self, data):\n        hang()\n"
        "def open_or_hang(self, file):\n"
        "    count.append(self)\n"
        "    begin(self, file if len(count) == 1 else Disk())\n"
        "checkpoint._HashingFile.__init__ = open_or_hang\n"
        "from deflow_torchrl.cli import main\nmain()\n"
    )
    arguments = ("train", f"task={task}", *SMALL, "offline_steps=100000", "save_interval=5", f"out={out}")
    process = start_script(code, arguments, marker)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None, "the checkpoint being written is not lost to an impatient scheduler"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted, saved at step 5 of 100000" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000000005.pt"]
    assert not (out / ".lock").exists()


def test_a_signal_while_it_loads_names_the_command_that_starts_again(task, tmp_path):
    out, marker = tmp_path / "run", tmp_path / "loading"
    code = (
        "import time\nfrom pathlib import Path\nfrom deflow_torchrl.runs import build\n"
        f"def load(*_):\n    Path({str(marker)!r}).touch()\n    time.sleep(600)\n"
        "build.load_data = load\nfrom deflow_torchrl.cli import main\nmain()\n"
    )
    arguments = ("train", f"task={task}", *SMALL, "offline_steps=10", f"out={out}")
    process = start_script(code, arguments, marker)
    process.send_signal(signal.SIGUSR2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.splitlines() == [
        f"deflow: interrupted, before anything was trained of 10; go on with: deflow {shlex.join(arguments)}"
    ]
    assert not out.exists()
