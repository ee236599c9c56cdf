# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Checkpoints: plain tensors and numbers in one file, written beside and renamed, loaded without running code from it.

A checkpoint is the zip archive of ``torch.save``. The archive's comment holds a header in JSON (format, step, score, the
run's identity), which is read without unpickling anything, and the SHA-256 of archive and header, which is compared
before anything is unpickled: a file with one changed byte is refused. The digest finds damage and manual changes; it is no
signature, so loading uses ``weights_only=True`` against forged files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shlex
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from deflow_torchrl.errors import CheckpointNotWritten, InputError
from deflow_torchrl.paths import atomic_write

FORMAT = 2
_HEX = 64
_COMMENT_LIMIT = 65_535
_BLOCK = 1 << 22
_FIXED = ("task", "algo", "version", "data_sha256")
_SAME_NUMBERS = {"0.1": "0.2"}  # a minor version, and a later one with the same checkpoints and numbers


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    *,
    identity: Mapping[str, Any] | None = None,
    keep_last: int = 3,
    score: float | None = None,
) -> Path:
    """Write ``folder/step_NNNNNNNNN.pt`` and drop all but the last few and the best.

    The complete file is on the disk before it gets its name: a kill or a power cut at any moment leaves the old
    checkpoints and, at worst, a hidden ``.part`` file, which the next checkpoint removes.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: steps done.
        state: nested dictionaries and lists of tensors, numbers and strings. Of a view, only the elements it shows are
            written.

    Keyword Args:
        identity: what the checkpoint belongs to, in plain values; see :func:`~.resume.run_identity`.
        keep_last: newest checkpoints to keep.
        score: result of the evaluation at this step, larger is better; the checkpoint with the best score is kept (of
            equal scores the later one). None or NaN: not evaluated.

    Raises:
        CheckpointNotWritten: on a full disk or another system error; the old checkpoints stay as they were.
        TypeError: if ``state`` holds anything that would have to be pickled.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    path = folder / f"step_{step:09d}.pt"
    scored = score is not None and math.isfinite(score)
    header = {"format": FORMAT, "step": step, "score": score if scored else None, "identity": dict(identity or {})}
    plain = _plain(state, "state")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step_*.part"):  # from a process that was killed while writing
            left.unlink(missing_ok=True)
        with atomic_write(path) as temporary, temporary.open("w+b") as file:
            _write(file, plain, header)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(folder)
        best = best_checkpoint(folder)
        for old in list_checkpoints(folder)[:-keep_last]:
            if old != best:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointNotWritten(path, error) from error
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def best_checkpoint(folder: Path) -> Path | None:
    """Find the checkpoint with the highest score, of equal scores the later one; None if none has a score."""
    scores = {}
    for path in list_checkpoints(folder):
        try:
            score = _read_comment(path)[0]["score"]
        except InputError:
            continue  # damaged: refused when it is loaded
        if score is not None:
            scores[path] = score
    return max(scores, key=lambda path: (scores[path], path.name), default=None)


def step_of(path: Path) -> int:
    """Return the step at which a checkpoint was written."""
    return int(path.stem.removeprefix("step_"))


def read_header(path: Path) -> dict[str, Any]:
    """Read ``format``, ``step``, ``score`` and ``identity`` of a checkpoint, without its state, without unpickling.

    Raises:
        InputError: if the file is missing, is no checkpoint or has another format.
    """
    with _advising(path):
        return _read_comment(path)[0]


def load_checkpoint(
    path: Path, *, device: torch.device | str = "cpu", identity: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Load a checkpoint's state; a pickled object in it is refused, never executed.

    Args:
        path: the file.

    Keyword Args:
        device: where its tensors go.
        identity: identity of this run; a checkpoint of another run is refused.

    Raises:
        InputError: if the file is missing, damaged, altered or of another format, if it belongs to another task, method,
            version or data set (the message names what differs), or if it holds anything but data.
    """
    with _advising(path):
        header = _read_whole(path)
    if identity is not None:
        check_identity(path, header["identity"], identity)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} holds something else than tensors, numbers and strings, or is damaged; it was not loaded"
        ) from error
    if not isinstance(state, dict):
        raise InputError(
            f"{path} holds a {type(state).__name__} where a checkpoint has a dictionary; it was not loaded"
        )
    return state


def is_whole(path: Path) -> bool:
    """Return whether every byte of a checkpoint is as it was written."""
    try:
        _read_whole(path)
    except InputError:
        return False
    return True


def check_identity(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise InputError if a checkpoint belongs to another task, method, version or data set, listing what differs.

    Versions of this package are compared up to what changed the contents of a checkpoint or the numbers computed from it: no
    patch number ever, and 0.1 is as 0.2. Settings are compared by :func:`~.resume.changed_settings`.

    Args:
        path: the checkpoint, for the message.
        theirs: the checkpoint's identity.
        ours: this run's identity; entries that are missing or None are not compared.
    """
    compared = [key for key in _FIXED if ours.get(key) is not None]
    differing = [key for key in compared if _comparable(key, theirs.get(key)) != _comparable(key, ours[key])]
    if differing:
        lines = [f"{key} {theirs.get(key, 'unknown')} there, {ours[key]} here" for key in differing]
        raise InputError(f"{path} is of another run ({'; '.join(lines)}); it was not loaded")


class _HashingFile:
    """File for ``torch.save`` that hashes the bytes and keeps the first error until the writing is over.

    torch's writer would replace an exception by one of its own, without the system's message.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.hash.update(data)
                self.file.write(data)
            except BaseException as error:  # a second Ctrl-C, too
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: the file is flushed at the end."""


def _write(file: BinaryIO, state: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    hashing = _HashingFile(file)
    torch.save(state, cast("BinaryIO", hashing))
    if hashing.error is not None:
        raise hashing.error
    text = json.dumps(header, allow_nan=False).encode()
    hashing.hash.update(text)
    comment = text + hashing.hash.hexdigest().encode()
    if len(comment) > _COMMENT_LIMIT:
        raise ValueError(f"the header of a checkpoint has {len(comment)} bytes; {_COMMENT_LIMIT} fit")
    file.seek(-2, os.SEEK_END)  # the last two bytes of the archive are the length of the comment, 0 so far
    file.write(len(comment).to_bytes(2, "little") + comment)


def _read_comment(path: Path) -> tuple[dict[str, Any], bytes]:
    damaged = InputError(f"{path} is damaged or altered; it was not loaded")
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
        header = json.loads(comment[:-_HEX]) if comment else {"format": None}
        found, whole = header["format"], {"step", "score", "identity"} <= set(header)
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint {path}") from error
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, TypeError, RuntimeError, struct.error) as error:
        raise damaged from error
    if not comment:
        raise InputError(
            f"{path} has no digest: it was altered, or written by an earlier version (checkpoint format 1; this version "
            f"reads {FORMAT}); it was not loaded"
        )
    if found != FORMAT:
        raise InputError(f"{path} has checkpoint format {found}, this version reads {FORMAT}")
    if not whole:
        raise damaged
    return header, comment


def _read_whole(path: Path) -> dict[str, Any]:
    """Read the header, and raise InputError unless archive and header have the digest they were written with."""
    header, comment = _read_comment(path)
    digest = hashlib.sha256()
    remaining = path.stat().st_size - len(comment) - 2
    with path.open("rb") as file:
        while remaining > 0 and (block := file.read(min(_BLOCK, remaining))):
            digest.update(block)
            remaining -= len(block)
        length = int.from_bytes(file.read(2), "little")
    # The archive was hashed before it had a comment, with a comment length of 0.
    digest.update(b"\0\0" + comment[:-_HEX])
    if length != len(comment) or digest.hexdigest().encode() != comment[-_HEX:]:
        raise InputError(f"{path} is damaged or altered; it was not loaded")
    return header


def _sync_folder(folder: Path) -> None:
    """Write the folder's entries to the disk: without it a power cut can undo the rename."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows cannot open a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _advising(path: Path) -> Iterator[None]:
    """Add to an InputError about ``path`` the newest undamaged checkpoint and the command that resumes from it."""
    try:
        yield
    except InputError as error:
        others = [other for other in list_checkpoints(path.parent) if other != path]
        whole = next((other for other in reversed(others) if is_whole(other)), None)
        if whole is None:
            raise
        step, run = step_of(whole), shlex.quote(str(path.parent.parent))
        raise InputError(
            f"{error}; the newest whole one is of step {step}: deflow resume {run} --step {step}"
        ) from error


def _plain(value: Any, where: str) -> Any:
    """Convert to types that load with ``weights_only=True``: plain tensors, and copies of views."""
    if isinstance(value, Tensor):
        tensor = value.detach().as_subclass(Tensor)
        is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        return tensor.cpu().clone() if is_part else tensor  # torch.save would write the whole storage
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where} has the key {key!r}; the keys of a checkpoint are strings and whole numbers")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, (bool, bytes, torch.Size, torch.device, torch.dtype)):
        return value
    for kind in (int, float, str):  # subclasses such as NumPy's float64 and str_ would be pickled
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and lists of them"
    )


def _comparable(key: str, value: Any) -> Any:
    if key != "version":
        return value
    minor = ".".join(str(value).split(".")[:2])
    return _SAME_NUMBERS.get(minor, minor)
