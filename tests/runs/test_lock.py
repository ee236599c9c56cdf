"""One process on a run folder."""

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl.errors import InputError, LockHeldError
from deflow_torchrl.paths import LockHolder, lock_holder
from deflow_torchrl.runs.folder import LOCK_FILE, hold_folders
from tests.support.command_line import assert_one_line, deflow
from tests.support.pendulum import ENVIRONMENT, record_pendulum

TINY = (
    f"env={ENVIRONMENT}", "offline_steps=4", "eval_interval=0", "eval_episodes=1", "eval_workers=1", "save_interval=2",
    "batch_size=4", "hidden_dims=[4]", "algo.flow_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(task, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert deflow("train", f"task={task}", *TINY, f"out={out}").returncode == 0
    return out


def held_elsewhere(out):
    """Another process that works in the folder until its input ends."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom deflow_torchrl.runs.folder import hold_folders\n"
        "with hold_folders([Path(sys.argv[1])]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_at_once_with_holder_and_file_and_readers_are_not(task, run):
    process = held_elsewhere(run)
    try:
        holder = lock_holder(run / LOCK_FILE)
        assert (holder.host, holder.pid) == (socket.gethostname(), process.pid)
        parts = f"process {process.pid} on host {socket.gethostname()}, since {holder.since}", str(run / LOCK_FILE)
        before = sorted(path for path in run.rglob("*"))
        for arguments in (("resume", str(run)), ("train", f"task={task}", *TINY, f"out={run}")):
            began = time.monotonic()
            assert_one_line(deflow(*arguments), f"another process works in {run}: ", *parts)
            assert time.monotonic() - began < 5
        assert deflow("eval", str(run), "--episodes=1").returncode == 0
        assert deflow("report", str(run)).returncode == 0
        assert sorted(path for path in run.rglob("*")) == before
    finally:
        process.communicate("")
    assert deflow("resume", str(run)).returncode == 0
    assert not (run / LOCK_FILE).exists()


def test_two_that_begin_a_run_at_once_are_one_run_and_one_refusal(task, tmp_path):
    out = tmp_path / "new" / "run"
    command = [sys.executable, "-m", "deflow_torchrl.cli", "train", f"task={task}", *TINY, f"out={out}"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    refused = said[codes.index(2)].strip()
    assert "\n" not in refused
    assert (
        f"another process works in {out}: process {both[codes.index(0)].pid}" in refused or "already holds" in refused
    )
    assert (out / "record.json").exists()


def test_what_another_host_has_left_is_refused_with_the_file_and_its_removal_helps(run):
    path = run / LOCK_FILE
    path.write_text(dataclasses.replace(LockHolder.current(), host="elsewhere").line)
    assert_one_line(deflow("resume", str(run)), "on host elsewhere", str(path), "remove the file")
    assert path.exists()
    path.unlink()
    assert deflow("resume", str(run)).returncode == 0


def test_a_group_and_the_run_of_one_of_its_seeds_exclude_each_other(task, tmp_path):
    out = tmp_path / "group"
    assert deflow("train", f"task={task}", *TINY, "seeds=[0,1]", f"out={out}").returncode == 0
    for held, refused in ([out / "seed1"], out), ([out, out / "seed0", out / "seed1"], out / "seed1"):
        with hold_folders(held):
            assert f"another process works in {out / 'seed1'}" in refusal_in_a_thread(refused)


def refusal_in_a_thread(out):
    from deflow_torchrl.runs import resume

    said = []

    def work():
        with pytest.raises(LockHeldError) as refused:
            resume(out, command="resume", show_progress=False)
        said.append(str(refused.value))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return said[0]


def test_bad_input_leaves_no_folder_behind(task, tmp_path):
    out = tmp_path / "a" / "b"
    assert_one_line(deflow("train", f"task={task}", *TINY, "device=nowhere", f"out={out}"))
    assert_one_line(deflow("resume", str(out)), "is not a run folder")
    assert list(tmp_path.iterdir()) == []


def test_the_holders_thread_may_hold_a_folder_again_and_a_link_is_the_same_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with hold_folders([tmp_path / "run"]):
        with hold_folders([tmp_path / "link"]):
            pass
        assert (tmp_path / "run" / LOCK_FILE).exists()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_refused_in_a_line(run):
    run.chmod(0o555)
    try:
        with pytest.raises(InputError, match="cannot write"), hold_folders([run]):
            pass
    finally:
        run.chmod(0o755)
