# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One column of a data set: a tensor in memory or in a memory-mapped file, and arrays of any kind read a chunk at a time."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from deflow_torchrl.errors import InputError

CHUNK_BYTES = 1 << 24
_SMALL_BYTES = 1 << 18


class Column(Protocol):
    """What can be read as rows: numpy arrays, ``h5py`` data sets, members of an .npz archive (``sources.archive``)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and their shape."""

    @property
    def dtype(self) -> Any:
        """Type of the values, as numpy's."""

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Consecutive rows; a stream may allow forward reading only."""


def chunks(column: Column, *, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the first row, rows) over a column, some megabytes at a time."""
    length = column.shape[0]
    size = rows or rows_a_chunk(column)
    for begin in range(0, length, size):
        yield begin, np.asarray(column[begin : min(begin + size, length)])


def rows_a_chunk(column: Column) -> int:
    """Rows that fill a chunk."""
    width = int(np.prod(column.shape[1:], dtype=np.int64)) * np.dtype(column.dtype).itemsize
    return max(1, CHUNK_BYTES // max(width, 1))


def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """A zeroed column, in memory or in ``folder/NAME.bin``.

    Raises:
        InputError: if the disk is full.
    """
    if folder is None:
        return torch.zeros(shape, dtype=dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    path = folder / f"{name}.bin"
    try:
        with path.open("wb") as file:
            # Reserved now: writing through a map into a sparse file on a full disk would kill the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        raise InputError(
            f"cannot write {size / 1e6:.0f} MB in {folder} ({error.strerror}); choose another folder"
        ) from error
    return map_column(path, shape, dtype)


def map_column(path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, writable: bool = True) -> torch.Tensor:
    """Map a file written by :func:`allocate`; where it is not ``writable``, changes stay in this process.

    Raises:
        InputError: if it is missing or has another size.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not path.is_file() or path.stat().st_size != max(size, 1):
        raise InputError(f"{path} is missing or damaged; delete {path.parent} to have it made again")
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_file(str(path), shared=writable, size=size, dtype=torch.uint8).view(dtype).view(shape)


class RowFile:
    """Scattered rows of a column's file, read into memory of their own.

    A map would bring a page cache folio (up to 2 MB on recent kernels) into the process for each row it is asked for: a few
    batches and the whole set is resident. Positional reads leave nothing behind, and a file cut short is an error
    instead of a signal.

    Args:
        path: file of :func:`allocate`.
        shape: of the column.
        dtype: of the column.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path = path
        self._shape, self._dtype = shape[1:], dtype
        self._width = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Rows of each run (first row, rows) one after another.

        Raises:
            InputError: if the file has been cut short.
        """
        width = self._width
        length = sum(rows for _, rows in runs)
        if length * width <= _SMALL_BYTES:  # a batch of states: here the calls cost, not the copies
            parts = [os.pread(self._descriptor, rows * width, first * width) for first, rows in runs]
            content = torch.frombuffer(bytearray().join(parts) or bytearray(1), dtype=torch.uint8)[: length * width]
        else:
            content = torch.empty(length * width, dtype=torch.uint8)
            self._read_into(content.numpy().data, runs)
        if content.numel() != length * width:
            raise self._cut_short()
        return content.view(self._dtype).view(length, *self._shape)

    def _read_into(self, view: memoryview, runs: Sequence[tuple[int, int]]) -> None:
        begin = 0
        for first, rows in runs:
            end, at = begin + rows * self._width, first * self._width
            while begin < end:  # the system reads 2 GB at once at most
                count = os.preadv(self._descriptor, [view[begin:end]], at)
                if count == 0:
                    raise self._cut_short()
                begin, at = begin + count, at + count

    def _cut_short(self) -> InputError:
        return InputError(f"{self.path} was cut short; delete {self.path.parent} to have it made again")


def runs_of(rows: torch.Tensor) -> list[tuple[int, int]]:
    """Ascending rows as (first row, rows) of each stretch without a gap.

    Examples:
        >>> runs_of(torch.tensor([3, 4, 5, 9]))
        [(3, 3), (9, 1)]
    """
    values = rows.numpy()
    if len(values) == 0:
        return []
    begins = np.flatnonzero(np.diff(values, prepend=values[0] - 2) != 1)
    lengths = np.diff(begins, append=len(values))
    return list(zip(values[begins].tolist(), lengths.tolist(), strict=True))


def release_pages(column: torch.Tensor, folder: Path | None) -> None:
    """Give a mapped column's pages back to the system's cache, so that reading all of it does not fill this process.

    Nothing is lost: pages of a shared file map are kept in the page cache and, when written, go to the file.
    """
    if folder is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    _libc().madvise(
        ctypes.c_void_p(column.data_ptr()), ctypes.c_size_t(column.nbytes), ctypes.c_int(mmap.MADV_DONTNEED)
    )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
