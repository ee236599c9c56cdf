# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Read the arrays of an .npz archive as streams, so that a set larger than memory can be checked and stored."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError

_DAMAGE: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    OSError,
    KeyError,
    NotImplementedError,
)


class NpzArchive:
    """The arrays of an .npz file by name, each a column of :mod:`deflow_torchrl.data.columns`; never unpickled.

    Args:
        path: the file.

    Raises:
        InputError: if it is missing or no archive. Damage inside is found when the columns are read, within :func:`readable`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise InputError(f"no data file {self.path}")
        with readable(self.path):
            self._zip = zipfile.ZipFile(self.path)
            try:
                if any(info.flag_bits & 1 for info in self._zip.infolist()):
                    raise ValueError("it is encrypted")
                members = [name for name in self._zip.namelist() if name.endswith(".npy")]
                self._columns = {name.removesuffix(".npy"): NpzColumn(self._zip, name) for name in members}
            except BaseException:
                self._zip.close()
                raise

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return list(self._columns)

    def __contains__(self, name: str) -> bool:
        """Whether there is an array ``name``."""
        return name in self._columns

    def __getitem__(self, name: str) -> NpzColumn:
        """The array ``name``."""
        return self._columns[name]

    def close(self) -> None:
        """Close the file."""
        for column in self._columns.values():
            column.close()  # an open stream would keep the file open
        self._zip.close()

    def __enter__(self) -> NpzArchive:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class NpzColumn:
    """One array of an archive, decompressed row by row; a step back starts again from the beginning.

    Attributes:
        shape: shape of the array.
        dtype: data type of the array.
    """

    def __init__(self, archive: zipfile.ZipFile, member: str) -> None:
        self._archive, self._member = archive, member
        self._stream: Any = None
        self._row = 0
        with archive.open(member) as stream:
            self.shape, self._fortran, self.dtype = _read_header(stream)
        if self.dtype.hasobject:
            raise ValueError(f"{member} holds pickled objects, which are never loaded")

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read consecutive rows (step 1); of a single value the value."""
        if not self.shape:
            return self._whole()
        begin, end, _ = rows.indices(self.shape[0])
        if self._fortran and len(self.shape) > 1:
            return self._whole()[begin:end]
        if self._stream is None or begin < self._row:
            self._open()
        width = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        while self._row < begin:
            step = min(begin - self._row, max(1, (1 << 24) // max(width, 1)))
            self._read(step * width)
            self._row += step
        content = self._read((end - begin) * width)
        self._row = end
        return np.frombuffer(content, self.dtype).reshape(end - begin, *self.shape[1:])

    def close(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self) -> None:
        self.close()
        self._stream = self._archive.open(self._member)
        _read_header(self._stream)
        self._row = 0

    def _read(self, size: int) -> bytes:
        content = self._stream.read(size)
        if len(content) != size:
            raise EOFError(f"{self._member} ends too early")
        return content

    def _whole(self) -> np.ndarray:
        with self._archive.open(self._member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"array format {version} is unknown")
    return read(stream)


@contextmanager
def readable(path: Path, *, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn the errors that a damaged file causes into one line that names it.

    Args:
        path: the file.

    Keyword Args:
        also: further exceptions that reading its format may raise.

    Raises:
        InputError: where the block raises one of the errors of a damaged file.
    """
    try:
        yield
    except _DAMAGE + also as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} cannot be read ({reason}); put an intact copy in its place: record, download or generate it again"
        ) from error
