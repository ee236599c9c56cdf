# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Folders of downloaded and generated data, files that a kill never leaves half-written, and locks between processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
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
def hold_lock(path: Path, *, busy: str | None = None, note: str = "") -> Iterator[None]:
    """Hold the lock file ``path`` during the block and remove it afterwards.

    The system frees the lock when the process that holds it dies.

    Args:
        path: the lock file; its folder is created.

    Keyword Args:
        busy: message of the error raised where another process holds the lock; ``None`` waits for it instead.
        note: content of the lock file while it is held.

    Raises:
        LockHeldError: where another process holds the lock, with ``busy``.
        InputError: where the folder cannot hold a lock.
    """
    lock = FileLock(make_writable_folder(path.parent) / path.name)
    try:
        lock.acquire(timeout=-1 if busy is None else 0)
    except Timeout as error:
        raise LockHeldError(busy or "") from error
    except OSError as error:
        raise InputError(f"cannot lock {path} ({error.strerror}); choose a folder on another disk") from error
    try:
        with suppress(PermissionError):  # on Windows, as with unlink: the file is open
            path.write_text(note, encoding="utf-8")
        yield
    finally:
        with suppress(PermissionError):
            path.unlink(missing_ok=True)  # before the release: filelock refuses a lock on a file that was removed
        lock.release()


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
