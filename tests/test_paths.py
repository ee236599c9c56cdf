import dataclasses
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from deflow_torchrl import paths
from deflow_torchrl.errors import InputError, LockHeldError
from deflow_torchrl.paths import LockHolder, hold_lock, lock_holder


def test_a_held_lock_shows_its_note_also_to_whom_it_refuses(tmp_path):
    path = tmp_path / ".lock"
    with hold_lock(path, busy="busy", note="host 1"):
        assert path.read_text() == "host 1"
        with pytest.raises(InputError, match="busy"), hold_lock(path, busy="busy", note="host 2"):
            pass
        assert path.read_text() == "host 1"


def test_a_held_lock_is_refused_with_the_given_line_and_free_afterwards(tmp_path):
    path = tmp_path / ".lock"
    with hold_lock(path, busy="busy"), pytest.raises(InputError, match="busy"), hold_lock(path, busy="busy"):
        pass
    assert not path.exists()
    with hold_lock(path, busy="busy"):
        assert path.exists()


def test_without_a_line_it_waits(tmp_path):
    path, order = tmp_path / ".lock", []

    def second():
        with hold_lock(path):
            order.append("second")

    with hold_lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_lock_on_a_removed_file_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """The holder removes the file between another's open and flock, and a third process makes a new one."""
    path, flock, opened = tmp_path / ".lock", fcntl.flock, []

    def remove_first(file, mode):
        if not opened:
            path.unlink()
            path.touch()
        opened.append(file)
        flock(file, mode)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with hold_lock(path), path.open("w") as other:
        assert len(opened) == 2
        with pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_that_cannot_hold_a_lock_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"), hold_lock(tmp_path / "file" / ".lock"):
        pass

    def unsupported(file, mode):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(InputError, match=r"cannot lock .*not supported"), hold_lock(tmp_path / ".lock"):
        pass


def test_a_refusal_names_host_process_time_and_file(tmp_path):
    path = tmp_path / ".lock"
    with hold_lock(path, busy="busy"):
        holder = lock_holder(path)
        assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
        with pytest.raises(LockHeldError) as refused, hold_lock(path, busy="busy"):
            pass
    said = str(refused.value)
    assert (
        said == f"busy: process {os.getpid()} on host {socket.gethostname()}, since {holder.since} (lock file {path})"
    )


def leave(path, **changes):
    """Write the lock file of a process as a kill leaves it."""
    path.write_text(dataclasses.replace(LockHolder.current(), **changes).line)


def test_what_a_dead_process_has_left_is_no_obstacle_also_where_its_id_is_in_use_again(tmp_path):
    path = tmp_path / ".lock"
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    parent = LockHolder.current()
    for changes in (
        {"pid": process.pid},
        {"pid": os.getppid(), "ticks": parent.ticks + 1},
        {"pid": os.getppid(), "ticks": 0},
    ):
        leave(path, **changes)
        with hold_lock(path, busy="busy", distrust_hosts=True):
            assert lock_holder(path).pid == os.getpid()
    for garbage in ("", "a b c d", "\0" * 40, "host"):
        path.write_text(garbage)
        with hold_lock(path, busy="busy", distrust_hosts=True):
            pass


def test_a_live_process_of_this_host_is_seen_where_the_file_system_has_no_locks(tmp_path):
    path = tmp_path / ".lock"
    leave(path, pid=os.getppid(), ticks=paths._start_ticks(os.getppid()))  # nobody holds the system's lock
    with pytest.raises(LockHeldError, match=f"busy: process {os.getppid()} on host"), hold_lock(path, busy="busy"):
        pass
    assert path.exists()


def test_what_a_process_of_another_host_has_left_is_refused_where_that_is_asked_for(tmp_path):
    path = tmp_path / ".lock"
    leave(path, host="elsewhere")
    with (
        pytest.raises(LockHeldError, match=rf"busy: process \d+ on host elsewhere.*{path}\); if .* remove the file"),
        hold_lock(path, busy="busy", distrust_hosts=True),
    ):
        pass
    assert lock_holder(path).host == "elsewhere"
    with hold_lock(path, busy="busy"):
        assert lock_holder(path).here


def test_a_forked_child_does_not_keep_the_lock_of_a_dead_parent(tmp_path):
    """As an environment that forks does, when its run is killed."""
    path = tmp_path / ".lock"
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom deflow_torchrl.paths import hold_lock\n"
        "with hold_lock(Path(sys.argv[1]), busy='busy'):\n"
        "    if os.fork() == 0:\n        print(os.getpid(), flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        # The child lets go of the lock before it prints. No more is read: it holds the pipe.
        child = int(process.stdout.readline())
        process.kill()
    try:
        os.kill(child, 0)
        assert path.exists()
        with hold_lock(path, busy="busy", distrust_hosts=True):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
