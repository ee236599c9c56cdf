# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""File locks between processes; the system frees a lock when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deflow_torchrl.errors import InputError, LockHeldError


@contextmanager
def hold_lock(path: Path, *, busy: str | None = None, note: str = "") -> Iterator[None]:
    """Hold the lock file ``path`` during the block; it is removed afterwards.

    Args:
        path: the lock file, in a folder that exists.

    Keyword Args:
        busy: message of the error raised where another process holds the lock; ``None`` waits for it instead.
        note: what the file says meanwhile, for others to read.

    Raises:
        LockHeldError: where it is held, with ``busy``.
        InputError: where the folder cannot hold a lock.
    """
    mode = fcntl.LOCK_EX if busy is None else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        try:
            file = path.open("a", encoding="utf-8")  # what a holder has noted stays
        except OSError as error:
            raise InputError(f"cannot write {path} ({error.strerror})") from error
        with file:
            try:
                fcntl.flock(file, mode)
            except BlockingIOError as error:
                raise LockHeldError(busy or "") from error
            except OSError as error:
                raise InputError(f"cannot lock {path} ({error.strerror}); choose a folder on another disk") from error
            # Between open and flock the holder may have removed the file: a lock on a removed file guards nothing.
            if not _is_at(file.fileno(), path):
                continue
            try:
                file.truncate(0)
                file.write(note)
                file.flush()
                yield
            finally:
                path.unlink(missing_ok=True)  # still locked: whoever opened it meanwhile finds it gone and tries again
            return


@contextmanager
def only_one_prepares(dataset: str, folder: Path) -> Iterator[None]:
    """Keep a second process from writing a data set's files in ``folder``, be they generated, downloaded or copied.

    Raises:
        InputError: where another process does so already.
    """
    with hold_lock(
        folder / f".{dataset}.lock", busy=f"another process is preparing {dataset} in {folder}; wait for it"
    ):
        yield


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
