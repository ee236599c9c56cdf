# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Several observations of one step, pictures and vectors, as one row of bytes: stored, stacked and mapped like one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deflow_torchrl.data.checks import check_pictures
from deflow_torchrl.data.columns import Column, as_column
from deflow_torchrl.entries import Entries
from deflow_torchrl.errors import InputError


class PackedColumn:
    """Arrays with a row a step as one column of bytes ``[N, P]``, packed as its rows are asked for.

    Args:
        columns: name -> pictures ``[N, H, W, C]`` uint8 or vectors ``[N, O]`` of any real type.

    Keyword Args:
        source: name of the arrays, for messages.

    Raises:
        InputError: on arrays of another kind or of different lengths.
    """

    def __init__(self, columns: Mapping[str, Column], *, source: str) -> None:
        self.columns = {name: columns[name] for name in sorted(columns)}
        self.entries: dict[str, list[int]] = {}
        for name, column in self.columns.items():
            shape, dtype = tuple(column.shape), np.dtype(column.dtype)
            if len(shape) == 4:
                check_pictures(name, shape, dtype, source=source)
            elif len(shape) != 2 or dtype.kind not in "fiub":
                raise InputError(
                    f"{source}: {name} has shape {shape} and type {dtype}; each of several observations is pictures [N, H, W, C] "
                    "uint8 or vectors [N, O]"
                )
            self.entries[name] = list(shape[1:])
        lengths = {name: column.shape[0] for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"{source}: observations differ in length: {lengths}")
        self._row = _row_type(self.entries)
        self.shape = (next(iter(lengths.values())), self._row.itemsize)
        self.dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Pack consecutive rows; what is not finite stays so."""
        parts = {name: np.asarray(column[rows]) for name, column in self.columns.items()}
        packed = np.zeros(len(next(iter(parts.values()))), self._row)
        with np.errstate(over="ignore"):  # a number beyond float32's range becomes infinite, which is refused later
            for name in self.entries:
                packed[name] = parts[name]
        return packed.view(np.uint8).reshape(len(packed), -1)


def entries_of(packed: np.ndarray, entries: Entries) -> dict[str, np.ndarray]:
    """Views of the observations in rows ``[n, P]`` of a :class:`PackedColumn`, ``[n, *shape]`` each."""
    rows = packed.view(_row_type(entries)).reshape(len(packed))
    return {name: rows[name] for name in entries}


def _row_type(entries: Entries) -> np.dtype:
    kinds = {3: np.uint8, 1: np.float32}
    return np.dtype([(name, kinds[len(shape)], tuple(shape)) for name, shape in entries.items()])


def packed_columns(observations: Any, next_observations: Any, *, source: str) -> tuple[Any, Any, dict[str, list[int]]]:
    """Pack dictionaries of arrays; next observations may be missing. The last result says what is in a row.

    Raises:
        InputError: as :class:`PackedColumn`, and where the two do not hold the same.
    """
    packed = []
    for name, arrays in (("observations", observations), ("next_observations", next_observations)):
        if isinstance(arrays, Mapping):
            columns = {entry: as_column(f"{name} {entry!r}", array, source) for entry, array in arrays.items()}
            packed.append(PackedColumn(columns, source=source))
        elif arrays is not None:
            raise InputError(f"{source}: {name} are no dictionary, the others are; give both in one form")
    if packed[0].entries != packed[-1].entries:
        raise InputError(f"{source}: observations are {packed[0].entries}, next_observations {packed[-1].entries}")
    return packed[0], packed[1] if len(packed) > 1 else None, packed[0].entries


def stacked_shapes(entries: Entries, frame_stack: int) -> dict[str, list[int]]:
    """Shapes of the observations that :func:`unpack` gives."""
    return {
        name: [*shape[:-1], shape[-1] * frame_stack] if len(shape) == 3 else list(shape)
        for name, shape in entries.items()
    }
