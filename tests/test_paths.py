import fcntl
import threading

import pytest

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import hold_lock


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
