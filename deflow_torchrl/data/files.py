# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Anybody's own files as transitions: npz, HDF5, CSV and Parquet through a small mapping of columns."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deflow_torchrl.data.archive import NpzArchive, readable
from deflow_torchrl.data.assembly import dataset_from_arrays
from deflow_torchrl.data.columns import Column
from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.paths import file_sha256

FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
"""What a mapping may name; the first four are needed."""
_VECTORS = ("observations", "actions", "next_observations")

# Names that need no mapping: D4RL's and OGBench's, Gymnasium's, and the common short ones. "done" is not among them: it does
# not say whether the task ended or time ran out.
_ALIASES = {
    "observations": ("observations", "observation", "obs", "states", "state"),
    "actions": ("actions", "action", "act"),
    "rewards": ("rewards", "reward", "rew"),
    "terminals": ("terminals", "terminal", "terminated", "terminations"),
    "timeouts": ("timeouts", "timeout", "truncated", "truncations"),
    "next_observations": ("next_observations", "next_observation", "next_obs", "next_states", "next_state"),
}


class Table(Protocol):
    """A file's columns by name."""

    @property
    def names(self) -> list[str]:
        """Names of all columns."""

    def __getitem__(self, name: str) -> Column:
        """One column."""


def import_files(
    paths: Sequence[str | os.PathLike[str]],
    *,
    columns: Mapping[str, str] | None = None,
    ends: str = "flags",
    never_terminates: bool = False,
    final_observation_rows: bool = False,
    both: str = "refuse",
    action_bounds: tuple[float, float] | None = None,
    allow_jumps: bool = False,
    folder: Path | None = None,
) -> TransitionDataset:
    """Read files of one layout, one after another, as a validated set.

    Args:
        paths: files ending in ``.npz``, ``.h5``, ``.hdf5``, ``.csv`` or ``.parquet``.

    Keyword Args:
        columns: field (:data:`FIELDS`) -> name in the files: an array (HDF5: its path), a table's column, or, for vectors in
            CSV and Parquet, several columns by pattern (``obs_*``, in the order of their numbers) or list (``x,y,theta``).
            Fields that are not named are looked for under their usual names.
        ends: how ends of episodes are known: ``"flags"`` (terminals and timeouts mark them all), ``"file"`` (each file is an
            episode), ``"discontinuity"``, a number (rows of every episode), or ``"column:NAME"`` (an end where that column's
            value changes). See :func:`deflow_torchrl.data.assembly.dataset_from_arrays`.
        never_terminates: the task has no terminal states; no column ``terminals`` is needed.
        final_observation_rows: see :func:`~deflow_torchrl.data.assembly.dataset_from_arrays`.
        both: see :func:`~deflow_torchrl.data.assembly.dataset_from_arrays`.
        action_bounds: (low, high) of the files' actions, mapped to [-1, 1].
        allow_jumps: see :func:`~deflow_torchrl.data.assembly.dataset_from_arrays`.
        folder: see :func:`~deflow_torchrl.data.assembly.dataset_from_arrays`.

    Raises:
        InputError: on a missing, damaged or unknown file, a column that is not there, or data that fail validation.
        MissingExtraError: without the ``files`` extra, for HDF5, CSV and Parquet.
    """
    files = [Path(path).expanduser() for path in paths]
    if not files:
        raise InputError("no file to import")
    unknown = sorted(set(columns or {}) - set(FIELDS))
    if unknown:
        raise InputError(f"unknown field {unknown[0]!r} in the mapping; there are {', '.join(FIELDS)}")
    if action_bounds is not None and not action_bounds[0] < action_bounds[1]:
        raise InputError(f"action bounds {action_bounds[0]:g} and {action_bounds[1]:g}: the first must be the smaller")
    source = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    with ExitStack() as stack:
        tables = [stack.enter_context(_open(path)) for path in files]
        found = [_fields(table, path, columns or {}) for table, path in zip(tables, files, strict=True)]
        for name in FIELDS:
            if len({name in fields for fields in found}) > 1:
                raise InputError(f"{source}: some files have {name}, others do not")
        joined = {name: _joined(name, [fields[name] for fields in found], files) for name in found[0]}
        for name in FIELDS[:4]:
            if name not in joined and not (name == "terminals" and never_terminates):
                hint = ", or say that the task never terminates (--never-terminates)" if name == "terminals" else ""
                raise InputError(
                    f"{files[0]} has no {name}; name the column with {name}=NAME{hint}; there are "
                    f"{_listed(tables[0].names)}"
                )
        rows = joined["actions"].shape[0]
        if "terminals" not in joined:
            joined["terminals"] = np.zeros(rows, bool)
        if action_bounds is not None:
            joined["actions"] = Rescaled(joined["actions"], *action_bounds)
        with readable(files[0]):
            return dataset_from_arrays(
                **joined,
                episode_ends=_told(ends, tables, [fields["actions"].shape[0] for fields in found], files),
                both=both,  # type: ignore[arg-type]
                final_observation_rows=final_observation_rows,
                allow_jumps=allow_jumps,
                source=source,
                folder=folder,
                about={
                    "provenance": "own",
                    "files": {str(path): file_sha256(path) for path in files},
                    "action_bounds": None if action_bounds is None else list(action_bounds),
                },
            )


class Rescaled:
    """A column of actions mapped from [low, high] to [-1, 1].

    Attributes:
        shape: of the column.
        dtype: of the column.
    """

    def __init__(self, column: Column, low: float, high: float) -> None:
        self._column, self._low, self._high = column, low, high
        self.shape, self.dtype = column.shape, column.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows of the mapped column."""
        values = np.asarray(self._column[rows])
        if values.dtype.kind != "f":  # refused by its type later
            return values
        return (values - self._low) * (2 / (self._high - self._low)) - 1


class Joined:
    """Columns of several files, one after another.

    Attributes:
        shape: of the whole.
        dtype: of the first.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._begins = np.cumsum([0, *(column.shape[0] for column in columns)])
        self.shape = (int(self._begins[-1]), *columns[0].shape[1:])
        self.dtype = columns[0].dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Consecutive rows."""
        begin, end, _ = rows.indices(self.shape[0])
        parts = []
        for column, first in zip(self._columns, self._begins, strict=False):
            low, high = max(begin - first, 0), min(end - first, column.shape[0])
            if low < high:
                parts.append(np.asarray(column[low:high]))
        return np.concatenate(parts) if parts else np.asarray(self._columns[0][0:0])


class _Arrays:
    """Columns in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    @property
    def names(self) -> list[str]:
        return list(self._arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]


class _Hdf5:
    """Data sets of an HDF5 file by their path."""

    def __init__(self, file: Any) -> None:
        import h5py

        self._file = file
        self.names: list[str] = []
        file.visititems(lambda name, item: self.names.append(name) if isinstance(item, h5py.Dataset) else None)

    def __getitem__(self, name: str) -> Any:
        return self._file[name]


@contextmanager
def _open(path: Path) -> Iterator[Table]:
    if not path.is_file():
        raise InputError(f"no data file {path}")
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise InputError(f"{path}: files end in {', '.join(_OPENERS)}; {path.suffix or 'no ending'} is unknown")
    with ExitStack() as stack:
        with readable(path):
            table = opener(path, stack)
        yield table


def _open_npz(path: Path, stack: ExitStack) -> Table:
    return stack.enter_context(NpzArchive(path))


def _open_hdf5(path: Path, stack: ExitStack) -> Table:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise MissingExtraError("h5py", "files") from error
    return _Hdf5(stack.enter_context(h5py.File(path)))


def _open_csv(path: Path, stack: ExitStack) -> Table:
    try:
        from pyarrow import csv
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "files") from error
    return _arrow(csv.read_csv(path))


def _open_parquet(path: Path, stack: ExitStack) -> Table:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "files") from error
    return _arrow(parquet.read_table(path))


_OPENERS: dict[str, Callable[[Path, ExitStack], Table]] = {
    ".npz": _open_npz,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".csv": _open_csv,
    ".parquet": _open_parquet,
}

FILE_ENDINGS = tuple(_OPENERS)
"""Endings of the files that can be imported."""


def _arrow(table: Any) -> Table:
    """An arrow table's columns as numpy arrays; lists of equal length become vectors, missing values NaN."""
    arrays = {}
    for name in table.column_names:
        values = table.column(name).to_numpy()
        if values.dtype == object and len(values) and isinstance(values[0], np.ndarray):
            if len({np.shape(value) for value in values}) > 1:
                raise ValueError(f"column {name} holds lists of different lengths")
            values = np.stack(values)
        arrays[name] = values
    return _Arrays(arrays)


def _fields(table: Table, path: Path, columns: Mapping[str, str]) -> dict[str, Column]:
    """The fields of one file that are there."""
    fields = {}
    for name in FIELDS:
        wanted = columns.get(name)
        if wanted is None:
            wanted = next((alias for alias in _ALIASES[name] if alias in table.names), None)
        if wanted is not None:
            column = _column(table, wanted, name, path)
            # One number a row is a vector of one where a vector is meant.
            fields[name] = np.asarray(column[0 : column.shape[0]])[:, None] if _is_flat(column, name) else column
    return fields


def _is_flat(column: Column, name: str) -> bool:
    return name in _VECTORS and len(column.shape) == 1


def _column(table: Table, wanted: str, name: str, path: Path) -> Column:
    """A column, or several side by side."""
    if wanted in table.names:
        return table[wanted]
    names: list[str] = []
    for part in wanted.split(","):
        matching = sorted(fnmatch.filter(table.names, part), key=_by_number)
        if not matching:
            raise InputError(f"{path} has no column {part!r} for {name}; there are {_listed(table.names)}")
        names += matching
    parts = [table[part] for part in names]
    if any(len(part.shape) != 1 for part in parts):
        raise InputError(f"{path}: {wanted!r} are not columns of one number a row; name one array for {name}")
    return np.stack([np.asarray(part[0 : part.shape[0]]) for part in parts], axis=1)


def _by_number(name: str) -> list[Any]:
    """obs_2 before obs_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _joined(name: str, columns: Sequence[Column], files: Sequence[Path]) -> Column:
    for column, path in zip(columns, files, strict=True):
        if tuple(column.shape[1:]) != tuple(columns[0].shape[1:]):
            raise InputError(
                f"{path}: {name} has rows of shape {tuple(column.shape[1:])}, in {files[0]} {tuple(columns[0].shape[1:])}"
            )
    return columns[0] if len(columns) == 1 else Joined(columns)


def _told(ends: str, tables: Sequence[Table], lengths: Sequence[int], files: Sequence[Path]) -> Any:
    if ends == "flags":
        return None
    if ends == "discontinuity":
        return ends
    if ends == "file":
        return np.repeat(np.arange(len(lengths)), lengths)
    if ends.isdigit():
        return int(ends)
    if ends.startswith("column:"):
        name = ends.removeprefix("column:")
        numbers = []
        for number, (table, path) in enumerate(zip(tables, files, strict=True)):
            column = _column(table, name, "the episode's number", path)
            values = np.asarray(column[0 : column.shape[0]])
            changes = values[1:] != values[:-1]
            # The same number in the next file is another episode.
            numbers.append(np.concatenate([[0], np.cumsum(changes)]) + number * (1 << 40))
        return np.concatenate(numbers)
    raise InputError(
        f"ends={ends!r} is unknown; there are flags, file, discontinuity, a number of rows and column:NAME"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
