# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One column of a data set: a tensor in memory or in a memory-mapped file, and arrays of any kind read a chunk at a time."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from deflow_torchrl.errors import InputError

CHUNK_BYTES = 1 << 24


class Column(Protocol):
    """What can be read as rows: numpy arrays, ``h5py`` data sets, members of an .npz archive (``data.archive``)."""

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


def map_column(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Map a file written by :func:`allocate`.

    Raises:
        InputError: if it is missing or has another size.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not path.is_file() or path.stat().st_size != max(size, 1):
        raise InputError(f"{path} is missing or damaged; delete {path.parent} to have it made again")
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8).view(dtype).view(shape)


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
