# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Files of arrays and tables as columns by name: npz, HDF5, CSV and Parquet, read when rows are asked for."""

from __future__ import annotations

import importlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from deflow_torchrl.data.columns import Column
from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.sources.archive import NpzArchive, readable

FILE_ENDINGS = (".npz", ".h5", ".hdf5", ".csv", ".parquet")
"""Endings of the files that can be imported."""
_MOST_OPEN = 8  # files at once; some systems allow a hundred per process
# Raised by h5py and zipfile on damaged content, in addition to the usual errors.
_ODD_DAMAGE = (RuntimeError, LookupError, TypeError, OverflowError)
_DECIMAL_COMMA = r"^\s*[+-]?\d+,\d+([eE][+-]?\d+)?\s*$"


@dataclass
class LazyColumn:
    """A column whose rows are computed when they are asked for."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[slice], np.ndarray]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read(rows)


def joined(columns: Sequence[Column]) -> Column:
    """Columns one after another."""
    if len(columns) == 1:
        return columns[0]
    begins = np.cumsum([0, *(column.shape[0] for column in columns)]).tolist()

    def read(rows: slice) -> np.ndarray:
        begin, end, _ = rows.indices(begins[-1])
        parts = [np.asarray(columns[0][0:0])]
        for column, first in zip(columns, begins, strict=False):
            low, high = max(begin - first, 0), min(end - first, column.shape[0])
            if low < high:
                parts.append(np.asarray(column[low:high]))
        return np.concatenate(parts[1:] or parts)

    return LazyColumn((begins[-1], *columns[0].shape[1:]), np.result_type(*(column.dtype for column in columns)), read)


def side_by_side(columns: Sequence[Column]) -> Column:
    """Numbers and vectors of the same rows as one vector."""
    width = sum(column.shape[1] if len(column.shape) > 1 else 1 for column in columns)

    def read(rows: slice) -> np.ndarray:
        parts = [np.asarray(column[rows]) for column in columns]
        return np.concatenate([part[:, None] if part.ndim == 1 else part for part in parts], axis=1)

    dtype = np.result_type(*(column.dtype for column in columns))
    return LazyColumn((columns[0].shape[0], width), dtype, read)


class Table(Protocol):
    """A file's columns by name."""

    @property
    def names(self) -> list[str]:
        """Names of all columns."""

    def __getitem__(self, name: str) -> Column:
        """One column."""


class Columns:
    """A table put together from columns, each made when it is first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Column]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, Column] = {}
        self.names = list(makers)

    def __getitem__(self, name: str) -> Column:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]


class Hdf5Table:
    """Data sets of an HDF5 file by their path."""

    def __init__(self, file: Any, dataset_type: type) -> None:
        self._file = file
        self.names: list[str] = []
        file.visititems(lambda name, item: self.names.append(name) if isinstance(item, dataset_type) else None)

    def __getitem__(self, name: str) -> Any:
        return self._file[name]


class ArrowTable:
    """Columns of a CSV or Parquet file as numpy arrays, converted on access; lists become vectors.

    Args:
        schema: the file's schema.
        read: gives the arrow column of a name.

    Keyword Args:
        text: whether the file is text, where a column of integers may be real numbers that happen to be whole.
    """

    def __init__(self, schema: Any, read: Callable[[str], Any], *, text: bool) -> None:
        self.schema, self.read, self.text = schema, read, text
        self.names: list[str] = schema.names

    def __getitem__(self, name: str) -> np.ndarray:
        return self._numpy(name, self.read(name))

    def keep(self, rows: np.ndarray) -> ArrowTable:
        """The rows of a mask ``[N]``."""
        return ArrowTable(self.schema, lambda name: self.read(name).filter(rows), text=self.text)

    def is_numeric(self, name: str) -> bool:
        """Whether a column holds numbers or vectors of numbers."""
        from pyarrow import types

        kind = self.schema.field(name).type
        kind = kind.value_type if _is_list(kind) else kind
        return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)

    def first_missing(self, name: str) -> int | None:
        """The first row whose value, or an element of whose list, is missing."""
        from pyarrow import compute

        column = self.read(name)
        while column.null_count == 0:
            if not _is_list(column.type) or len(column) == 0:
                return None
            parents, column = compute.list_parent_indices(column), compute.list_flatten(column)
            if column.null_count:
                return int(parents.to_numpy()[column.is_null().to_numpy().argmax()])
        return int(column.is_null().to_numpy().argmax())

    def _numpy(self, name: str, column: Any) -> np.ndarray:
        from pyarrow import compute, float64, types

        if _is_list(column.type):
            present = column.is_valid().to_numpy()
            lengths = compute.unique(compute.list_value_length(column.drop_null())).to_pylist()
            if len(lengths) > 1:
                raise ValueError(f"column {name} holds lists of different lengths")
            values = self._numpy(name, compute.list_flatten(column)).reshape(int(present.sum()), *lengths)
            if present.all():
                return values
            whole = np.full((len(present), *values.shape[1:]), np.nan)
            whole[present] = values
            return whole
        blank = column.null_count and types.is_boolean(column.type)
        if blank or types.is_null(column.type) or types.is_decimal(column.type):
            column = column.cast(float64())  # a missing value is NaN
        return column.to_numpy()


def _is_list(arrow_type: Any) -> bool:
    from pyarrow import types

    return types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of any reader into one line that names the file."""
    with readable(path, also=_ODD_DAMAGE):
        yield


def _open(path: Path, stack: ExitStack) -> Table:
    """Open a file; ``stack`` closes it."""
    if not path.is_file():
        raise InputError(f"no data file {path}")
    ending = path.suffix.lower()
    if ending not in FILE_ENDINGS:
        raise InputError(f"{path}: files end in {', '.join(FILE_ENDINGS)}; {path.suffix or 'no ending'} is unknown")
    with reading(path):
        if ending == ".npz":
            return stack.enter_context(NpzArchive(path))
        if ending == ".csv":
            table = _read_csv(path)
            return ArrowTable(table.schema, table.column, text=True)
        if ending == ".parquet":
            file = stack.enter_context(_module("pyarrow.parquet").ParquetFile(path))
            return ArrowTable(file.schema_arrow, lambda name: file.read(columns=[name]).column(name), text=False)
        h5py = _module("h5py")
        return Hdf5Table(stack.enter_context(h5py.File(path)), h5py.Dataset)


def _read_csv(path: Path) -> Any:
    """Read a CSV file, also with semicolons or tabs and with decimal commas, as many spreadsheets write it."""
    csv, types = _module("pyarrow.csv"), _module("pyarrow.types")
    with path.open(encoding="utf-8", errors="replace") as file:
        header = re.sub(r'"[^"]*"', "", file.readline())
    delimiter = max((",", ";", "\t"), key=header.count)

    def read(point: str) -> Any:
        options = csv.ConvertOptions(decimal_point=point)
        try:
            return csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter), convert_options=options)
        except ValueError as error:
            if "Expected" not in str(error):
                raise
            shown = str(error).splitlines()[0]
            raise InputError(
                f"{path}: {shown}; a text that holds the delimiter {delimiter!r} must be quoted"
            ) from error

    table = read(".")
    if delimiter != "," and any(_has_decimal_comma(column) for column in table.columns):
        # A text may look like a decimal comma: the reading counts that finds more numbers.
        table = max(table, read(","), key=lambda it: sum(not types.is_string(column.type) for column in it.columns))
    return table


def _has_decimal_comma(column: Any) -> bool:
    from pyarrow import compute, types

    if not types.is_string(column.type):
        return False
    return bool(compute.any(compute.match_substring_regex(column, _DECIMAL_COMMA)).as_py())


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(name.partition(".")[0], "files") from error


class OpenFiles:
    """Files that are opened on access; the most recently used ones stay open.

    Args:
        arrange: turns an opened file into the table that is read.
    """

    def __init__(self, arrange: Callable[[Path, Table], Table]) -> None:
        self._arrange = arrange
        self._tables: OrderedDict[Path, tuple[Table, ExitStack]] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        while self._tables:
            self._close_oldest()

    def __getitem__(self, path: Path) -> Table:
        if path not in self._tables:
            if len(self._tables) >= _MOST_OPEN:
                self._close_oldest()
            with ExitStack() as stack:
                table = _open(path, stack)
                with reading(path):
                    self._tables[path] = self._arrange(path, table), stack.pop_all()
        self._tables.move_to_end(path)
        return self._tables[path][0]

    def column(self, path: Path, name: str) -> Column:
        """A column of a file, which is opened again if it was closed; errors name the file."""
        with reading(path):
            column = self[path][name]

        def read(rows: slice) -> np.ndarray:
            with reading(path):
                return np.asarray(self[path][name][rows])

        return LazyColumn(tuple(column.shape or ()), np.dtype(column.dtype), read)

    def _close_oldest(self) -> None:
        self._tables.popitem(last=False)[1][1].close()
