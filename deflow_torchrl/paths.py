# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Where the package keeps what it downloads and generates, and how it writes files so that a kill leaves none half-written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deflow_torchrl.errors import InputError


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, pattern: str) -> str:
    """SHA-256 over names and digests of the files below a folder that match, in the order of their names."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    lines = "".join(f"{file_sha256(path)}  {path.relative_to(folder)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
