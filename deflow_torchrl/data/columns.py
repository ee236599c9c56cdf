# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Columns of a data set: a tensor in memory or in a memory-mapped file, and arrays that are read some megabytes at a time."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from deflow_torchrl.errors import InputError, one_line

CHUNK_BYTES = 1 << 24

POSITIONAL_READS = hasattr(os, "preadv")
"""Whether the system reads files at a position (Linux, macOS); elsewhere rows are read through the map."""


class Column(Protocol):
    """An array that gives consecutive rows: numpy arrays, ``h5py`` data sets, members of an .npz archive."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, then the shape of a row."""

    @property
    def dtype(self) -> Any:
        """Type of the values, as numpy's."""

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Consecutive rows; a stream may allow forward reading only."""


def as_column(name: str, values: Any, source: str) -> Any:
    """Tensors, lists, data frames and foreign arrays as numpy arrays; columns as they are.

    Args:
        name: of the field, for messages.
        values: the array.
        source: name of the data, for messages.

    Raises:
        InputError: if it is no array.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise InputError(f"{source}: {name} are a masked array; fill or drop what is masked")
    try:
        if isinstance(values, (list, tuple)) and values and isinstance(values[0], torch.Tensor):
            values = torch.stack(tuple(values))
        if isinstance(values, torch.Tensor):
            values = values.detach().to_dense() if values.layout != torch.strided else values.detach()
            values = values.cpu().resolve_conj().resolve_neg()
            return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # numpy has no bfloat16
        if hasattr(values, "to_numpy"):  # data frames
            values = values.to_numpy()
        if not hasattr(values, "dtype") or not hasattr(values, "shape"):
            return np.asarray(values)
        if np.dtype(values.dtype).name == "bfloat16":  # of ml_dtypes, which JAX uses
            return np.asarray(values).astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{source}: {name} are no array ({one_line(error)})") from error
    return values


def chunks(column: Column, *, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the first row, rows) over a column, some megabytes at a time."""
    length = column.shape[0]
    size = rows or rows_a_chunk(column)
    for begin in range(0, length, size):
        yield begin, np.asarray(column[begin : min(begin + size, length)])


def rows_a_chunk(column: Column) -> int:
    """Number of rows in a chunk."""
    return max(1, CHUNK_BYTES // max(1, math.prod(column.shape[1:]) * np.dtype(column.dtype).itemsize))


def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """Make a zeroed column, in memory or in ``folder/NAME.bin``.

    Raises:
        InputError: if the disk is full.
    """
    if folder is None:
        return torch.zeros(shape, dtype=dtype)
    size = max(1, math.prod(shape) * dtype.itemsize)
    path = folder / f"{name}.bin"
    try:
        with path.open("wb") as file:
            # Reserved now: on a full disk, writing through a map into a sparse file kills the process (SIGBUS).
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for begin in range(0, size, CHUNK_BYTES):
                    file.write(bytes(min(CHUNK_BYTES, size - begin)))
    except OSError as error:
        raise InputError(
            f"cannot write {size / 1e6:.0f} MB in {folder} ({error.strerror}); choose another folder"
        ) from error
    return map_column(path, shape, dtype)


def map_column(path: Path, shape: tuple[int, ...], dtype: torch.dtype, *, writable: bool = True) -> torch.Tensor:
    """Map a file written by :func:`allocate`; unless it is ``writable``, changes stay in this process.

    Raises:
        InputError: if it is missing or has another size.
    """
    size = math.prod(shape) * dtype.itemsize
    if not path.is_file() or path.stat().st_size != max(size, 1):
        raise InputError(f"{path} is missing or damaged; delete {path.parent} to have it made again")
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_file(str(path), shared=writable, size=size, dtype=torch.uint8).view(dtype).view(shape)


class RowFile:
    """Reads scattered rows of a column's file into memory of their own.

    Reading through a map would bring a page cache folio (up to 2 MB on recent kernels) into the process for each row: after
    a few batches the whole set would be resident. Positional reads leave nothing behind, and a file that was cut short is an
    error instead of a signal.

    Args:
        path: file of :func:`allocate`.
        shape: of the column.
        dtype: of the column.
    """

    def __init__(self, path: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.path = path
        self._shape, self._dtype = shape[1:], dtype
        self._width = math.prod(shape[1:]) * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Read rows, int64 of any shape; each is read once, in the order of the file.

        Raises:
            InputError: if the file has been cut short.
        """
        own, place = torch.unique(rows, return_inverse=True)
        content = torch.empty(len(own) * self._width, dtype=torch.uint8)
        view, begin = content.numpy().data, 0
        for first, count in runs_of(own):
            position, end = first * self._width, begin + count * self._width
            while begin < end:  # the system reads 2 GB at once at most
                size = os.preadv(self._descriptor, [view[begin:end]], position)
                if size == 0:
                    raise InputError(f"{self.path} was cut short; delete {self.path.parent} to have it made again")
                begin, position = begin + size, position + size
        return content.view(self._dtype).view(len(own), *self._shape)[place]


def runs_of(rows: torch.Tensor) -> list[tuple[int, int]]:
    """Split ascending rows into stretches without a gap: (first row, number of rows).

    Examples:
        >>> runs_of(torch.tensor([3, 4, 5, 9]))
        [(3, 3), (9, 1)]
    """
    values = rows.numpy()
    begins = np.flatnonzero(np.diff(values, prepend=-2) != 1)
    lengths = np.diff(begins, append=len(values))
    return list(zip(values[begins].tolist(), lengths.tolist(), strict=True))


def release_pages(column: torch.Tensor, folder: Path | None) -> None:
    """Remove a mapped column's pages from this process, so that reading all of it does not fill its memory.

    Nothing is lost: pages of a shared file map stay in the page cache and, when written, go to the file.
    """
    if folder is not None and hasattr(mmap, "MADV_DONTNEED"):
        address, size = ctypes.c_void_p(column.data_ptr()), ctypes.c_size_t(column.nbytes)
        ctypes.CDLL(None).madvise(address, size, ctypes.c_int(mmap.MADV_DONTNEED))
