# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Folders of downloaded and generated data, files that a kill never leaves half-written, and locks between processes."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from deflow_torchrl.errors import InputError, LockHeldError


def cache_home() -> Path:
    """The cache folder: ``$DEFLOW_HOME``, else ``~/.cache/deflow_torchrl``."""
    return Path(os.environ.get("DEFLOW_HOME") or "~/.cache/deflow_torchrl").expanduser()


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of NAME.npz and NAME-val.npz files: ``root``, else ``$DEFLOW_HOME/data``."""
    return cache_home() / "data" if root is None else Path(root).expanduser()


def dataset_path(dataset: str, root: Path, split: str) -> Path:
    """Path of one split of a data set, as the ``ogbench`` package names it: ``NAME.npz`` or ``NAME-val.npz``."""
    return root / f"{dataset}{'' if split == 'train' else '-val'}.npz"


def file_name(name: str) -> str:
    """A text, such as a task's name, as a name of files and folders that every system accepts.

    Examples:
        >>> file_name("minari:D4RL/door/human-v2"), file_name("aux")
        ('minari-D4RL-door-human-v2', '_aux')
    """
    made = re.sub(r"[^\w.-]+", "-", name).strip("-").rstrip(".-")
    device = re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", made, re.IGNORECASE)  # of Windows, with any ending
    return f"_{made}" if device or not made else made


def make_writable_folder(path: Path) -> Path:
    """Create ``path`` and check that files can be written in it.

    Raises:
        InputError: if it cannot be created or is read-only.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write in {path} ({error.strerror}); choose another folder (DEFLOW_HOME, data_root=, out=)"
        ) from error
    return path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that is renamed to it if the block succeeds and removed if it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file beside and rename it.

    Raises:
        InputError: on a full disk or a folder that cannot be written.
    """
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror or error}); choose another folder") from error


@contextmanager
def hold_lock(
    path: Path, *, busy: str | None = None, note: str | None = None, distrust_hosts: bool = False
) -> Iterator[None]:
    """Hold the lock file ``path`` during the block and remove it afterwards.

    The system frees the lock when the process that holds it dies. Network file systems may not pass locks on to other hosts, and
    a few file systems have none; there the content of the file decides.

    Args:
        path: the lock file; its folder is created.

    Keyword Args:
        busy: start of the message of the error raised where another process holds the lock, which goes on with that process's
            id, host and time and the lock file's path; ``None`` waits for it instead.
        note: content of the lock file while it is held; by default the holder, for :func:`lock_holder`.
        distrust_hosts: also refuse a lock file that a process on another host has left, which may or may not have ended.

    Raises:
        LockHeldError: where another process holds the lock, if ``busy`` is given.
        InputError: where the folder cannot hold a lock.
    """
    lock = FileLock(make_writable_folder(path.parent) / path.name)
    left = lock_holder(path)
    try:
        lock.acquire(timeout=-1 if busy is None else 0)
        if sys.platform != "win32":  # where a file that is locked cannot be read
            left = lock_holder(path)  # a holder that has let go meanwhile has removed it
    except Timeout as error:
        raise LockHeldError(f"{busy}{lock_holder(path) or ''} (lock file {path})") from error
    except OSError as error:
        raise InputError(f"cannot lock {path} ({error.strerror}); choose a folder on another disk") from error
    try:
        if busy is not None and left is not None and (left.alive or (distrust_hosts and not left.here)):
            advice = "" if left.here else "; if that process has ended, remove the file and try again"
            raise LockHeldError(f"{busy}{left} (lock file {path}){advice}")
        with suppress(PermissionError):  # on Windows, as with unlink: the file is open
            path.write_text(LockHolder.current().line if note is None else note, encoding="utf-8")
        try:
            yield
        finally:
            with suppress(PermissionError):
                path.unlink(missing_ok=True)  # before the release: filelock refuses a lock on a file that was removed
    finally:
        lock.release()


@dataclass(frozen=True)
class LockHolder:
    """The process that a lock file names.

    Attributes:
        host: its host.
        pid: its id there.
        ticks: clock ticks from the host's start to its own, which tell it from a later process of the same id; 0 where unknown.
        since: when it took the lock, ISO 8601.
    """

    host: str
    pid: int
    ticks: int
    since: str

    @classmethod
    def current(cls) -> LockHolder:
        """This process, from now on."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), _start_ticks(os.getpid()), since)

    @property
    def here(self) -> bool:
        """Whether it is of this host."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether it is known to be another running process of this host."""
        return self.here and self.pid != os.getpid() and 0 < self.ticks == _start_ticks(self.pid)

    @property
    def line(self) -> str:
        """The content of a lock file."""
        return f"{self.host} {self.pid} {self.ticks} {self.since}"

    def __str__(self) -> str:
        return f": process {self.pid} on host {self.host}, since {self.since}"


def lock_holder(path: Path) -> LockHolder | None:
    """The process that a lock file of :func:`hold_lock` names; None where it names none or cannot be read."""
    try:
        host, pid, ticks, since = path.read_text(encoding="utf-8").split()
        return LockHolder(host, int(pid), int(ticks), since)
    except (OSError, ValueError):
        return None


def _start_ticks(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def only_one_prepares(dataset: str, folder: Path) -> AbstractContextManager[None]:
    """Keep a second process from writing a data set's files in ``folder`` (generated, downloaded or copied).

    Raises:
        InputError: on entry, where another process does so already.
    """
    return hold_lock(
        folder / f".{dataset}.lock", busy=f"another process is preparing {dataset} in {folder}; wait for it"
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, pattern: str) -> str:
    """SHA-256 over names and digests of the files below a folder that match, in the order of their names."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    lines = "".join(f"{file_sha256(path)}  {path.relative_to(folder)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
