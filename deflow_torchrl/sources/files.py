# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Files of the user's own as transitions: npz, HDF5, CSV and Parquet, with a mapping of columns."""

from __future__ import annotations

import fnmatch
import importlib
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deflow_torchrl.data.assembly import discontinuities
from deflow_torchrl.data.columns import Column
from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.paths import file_sha256, folder_sha256
from deflow_torchrl.sources.archive import NpzArchive, readable
from deflow_torchrl.sources.base import Source

FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
"""Fields that a mapping may name; the first four are required."""
FILE_ENDINGS = (".npz", ".h5", ".hdf5", ".csv", ".parquet")
"""Endings of the files that can be imported."""
_VECTORS = ("observations", "actions", "next_observations")
_MOST_OPEN = 8  # files at once; some systems allow a hundred per process
# Raised by h5py and zipfile on damaged content, in addition to the usual errors.
_ODD_DAMAGE = (RuntimeError, LookupError, TypeError, OverflowError)

# Names that need no mapping: those of D4RL, OGBench and Gymnasium, and common short ones. "done" is not among them because it
# does not say whether the task ended or time ran out.
_ALIASES = {
    "observations": ("observations", "observation", "obs", "states", "state"),
    "actions": ("actions", "action", "act"),
    "rewards": ("rewards", "reward", "rew"),
    "terminals": ("terminals", "terminal", "terminated", "terminations"),
    "timeouts": ("timeouts", "timeout", "truncated", "truncations"),
    "next_observations": ("next_observations", "next_observation", "next_obs", "next_states", "next_state"),
}


class FileSource(Source):
    """Folders made by ``deflow data import`` or :meth:`deflow_torchrl.data.TransitionDataset.save`, by their paths."""

    def load(self, name: str, *, split: str = "train", device: Any = None, **_: Any) -> TransitionDataset | None:
        """Load a folder, whose files stay mapped where no ``device`` is given; there are no validation splits."""
        if split == "val":
            return None
        dataset = TransitionDataset.load(name)
        return dataset if device is None else dataset.to(device)

    def ensure(self, name: str, **_: Any) -> None:
        """Map the folder's files without reading them."""
        TransitionDataset.load(name)

    def digest(self, name: str, **_: Any) -> str:
        """SHA-256 over all columns."""
        return folder_sha256(Path(name), "*.bin")

    def location(self, name: str, **_: Any) -> Path:
        """The folder itself."""
        return Path(name)


SOURCE = FileSource()


def import_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
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
    """Read files of the same layout, one after another, as a validated set.

    Args:
        paths: one or several files that end in ``.npz``, ``.h5``, ``.hdf5``, ``.csv`` or ``.parquet``. No episode continues in
            the next file.

    Keyword Args:
        columns: field (:data:`FIELDS`) -> name in the files: an array (HDF5: its path), a table's column, or, for vectors in
            CSV and Parquet, several columns by pattern (``obs_*``, in the order of their numbers) or list (``x,y,theta``).
            Other fields are looked for under their usual names. ``about["columns"]`` lists the columns that were used.
        ends: how ends of episodes are known: ``"flags"`` (terminals and timeouts mark them all, a file's last row too),
            ``"file"`` (each file is an episode), ``"discontinuity"``, a number (rows of every episode, each file a multiple),
            or ``"column:NAME"`` (an end where that column's value changes). See
            :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        never_terminates: the task has no terminal states; no column ``terminals`` is needed.
        final_observation_rows: see :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        both: see :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        action_bounds: (low, high) of the files' actions, which are mapped to [-1, 1]; rounding errors beyond them are allowed.
        allow_jumps: see :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        folder: see :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.

    Raises:
        InputError: on a missing, damaged or unknown file, a missing column, or data that fail validation.
        MissingExtraError: if the ``files`` extra is not installed, for HDF5, CSV and Parquet.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    files = [Path(path).expanduser() for path in given]
    mapping = columns or {}
    _check_options(files, mapping, ends, action_bounds)
    with _OpenFiles() as opened:
        parts = [_examine(path, opened, mapping, ends, never_terminates) for path in files]
        _check_alike(parts)
        episode_ends = _told(ends, parts)
        joined = {name: _joined([part.fields[name] for part in parts]) for name in parts[0].fields}
        joined.setdefault("terminals", np.zeros(sum(part.rows for part in parts), bool))
        if action_bounds is not None:
            joined["actions"] = _rescaled(joined["actions"], *action_bounds)
        return TransitionDataset.from_arrays(
            **joined,
            episode_ends=episode_ends,
            both=both,
            final_observation_rows=final_observation_rows,
            allow_jumps=allow_jumps,
            source=str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more",
            folder=folder,
            about={
                "provenance": "own",
                "files": {str(path): file_sha256(path) for path in files},
                "columns": {name: ",".join(names) for name, names in parts[0].names.items()},
                "action_bounds": None if action_bounds is None else list(action_bounds),
            },
        )


def _check_options(
    files: Sequence[Path], columns: Mapping[str, str], ends: str, action_bounds: tuple[float, float] | None
) -> None:
    if not files:
        raise InputError("no file to import")
    if unknown := sorted(set(columns) - set(FIELDS)):
        raise InputError(f"unknown field {unknown[0]!r} in the mapping (--column); there are {', '.join(FIELDS)}")
    if action_bounds is not None:
        low, high = action_bounds
        if not (low < high and math.isfinite(high - low)):
            raise InputError(
                f"action bounds {low:g} and {high:g} (--action-bounds): both must be finite, and the first must be the smaller"
            )
    if ends not in ("flags", "file", "discontinuity") and not ends.isdecimal() and not ends.startswith("column:"):
        raise InputError(
            f"ends={ends!r} is unknown; there are flags, file, discontinuity, a number of rows and column:NAME (--ends)"
        )


# -- columns that are read when their rows are asked for -------------------------------------------------------------


@dataclass
class _Rows:
    """A column whose rows are computed when they are asked for."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[slice], np.ndarray]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read(rows)


def _rescaled(column: Column, low: float, high: float) -> Column:
    """Map a column of floating point actions from [low, high] to [-1, 1], in double precision.

    A decimal bound such as 20.3 is not exactly a float32: actions up to one float32 step beyond it count as the bound.
    """
    scale = 2 / (high - low)
    # float64 columns often hold values that were float32 before.
    kept = np.float16 if np.dtype(column.dtype) == np.float16 else np.float32
    limit = 1 + float(np.spacing(kept(max(abs(low), abs(high))))) * scale

    def read(rows: slice) -> np.ndarray:
        values = (np.asarray(column[rows], np.float64) - low) * scale - 1
        return np.where(np.abs(values) <= limit, values.clip(-1, 1), values)

    return _Rows(column.shape, np.dtype(np.float64), read)


def _joined(columns: Sequence[Column]) -> Column:
    """Columns of several files, one after another."""
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

    return _Rows((begins[-1], *columns[0].shape[1:]), np.result_type(*(column.dtype for column in columns)), read)


# -- the formats -----------------------------------------------------------------------------------------------------


class Table(Protocol):
    """A file's columns by name."""

    @property
    def names(self) -> list[str]:
        """Names of all columns."""

    def __getitem__(self, name: str) -> Column:
        """One column."""


class _Hdf5:
    """Data sets of an HDF5 file by their path."""

    def __init__(self, file: Any, dataset_type: type) -> None:
        self._file = file
        self.names: list[str] = []
        file.visititems(lambda name, item: self.names.append(name) if isinstance(item, dataset_type) else None)

    def __getitem__(self, name: str) -> Any:
        return self._file[name]


class _Arrow:
    """Columns of a CSV or Parquet file as numpy arrays, converted on access; lists become vectors.

    Args:
        names: of the columns.
        read: gives the arrow column of a name.

    Keyword Args:
        text: whether the file is text, where a column of integers may be real numbers that happen to be whole.
    """

    def __init__(self, names: list[str], read: Callable[[str], Any], *, text: bool) -> None:
        self.names, self._read, self.text = names, read, text

    def __getitem__(self, name: str) -> np.ndarray:
        return self._numpy(name, self._read(name))

    def first_missing(self, name: str) -> int | None:
        """The first row whose value, or an element of whose list, is missing."""
        from pyarrow import compute

        column = self._read(name)
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
            lengths = compute.unique(compute.list_value_length(column)).to_pylist()
            if len(lengths) > 1:
                raise ValueError(f"column {name} holds lists of different lengths")
            return self._numpy(name, compute.list_flatten(column)).reshape(len(column), *lengths)
        blank = column.null_count and types.is_boolean(column.type)
        if blank or types.is_null(column.type) or types.is_decimal(column.type):
            column = column.cast(float64())  # a missing value is NaN
        return column.to_numpy()


def _is_list(arrow_type: Any) -> bool:
    from pyarrow import types

    return types.is_list(arrow_type) or types.is_large_list(arrow_type) or types.is_fixed_size_list(arrow_type)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
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
    with _reading(path):
        if ending == ".npz":
            return stack.enter_context(NpzArchive(path))
        if ending == ".csv":
            table = _module("pyarrow.csv").read_csv(path)
            return _Arrow(table.column_names, table.column, text=True)
        if ending == ".parquet":
            file = stack.enter_context(_module("pyarrow.parquet").ParquetFile(path))
            return _Arrow(file.schema_arrow.names, lambda name: file.read(columns=[name]).column(name), text=False)
        h5py = _module("h5py")
        return _Hdf5(stack.enter_context(h5py.File(path)), h5py.Dataset)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(name.partition(".")[0], "files") from error


class _OpenFiles:
    """Files that are opened on access; the most recently used ones stay open."""

    def __init__(self) -> None:
        self._tables: OrderedDict[Path, tuple[Table, ExitStack]] = OrderedDict()

    def __enter__(self) -> _OpenFiles:
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
                self._tables[path] = table, stack.pop_all()
        self._tables.move_to_end(path)
        return self._tables[path][0]

    def column(self, path: Path, name: str) -> Column:
        """A column of a file, which is opened again if it was closed; errors name the file."""
        with _reading(path):
            column = self[path][name]

        def read(rows: slice) -> np.ndarray:
            with _reading(path):
                return np.asarray(self[path][name][rows])

        return _Rows(tuple(column.shape or ()), np.dtype(column.dtype), read)

    def _close_oldest(self) -> None:
        self._tables.popitem(last=False)[1][1].close()


# -- the fields of a file --------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """The contents of one file.

    Attributes:
        path: the file.
        fields: field -> column, for the fields that the file has.
        names: field -> names of its columns in the file.
        numbers: episode number of each row ``[N]``, if a column gives them.
    """

    path: Path
    fields: dict[str, Column] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    numbers: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return self.fields["actions"].shape[0]


def _examine(path: Path, opened: _OpenFiles, columns: Mapping[str, str], ends: str, never_terminates: bool) -> _Part:
    """Find the fields of a file, and check names, shapes and types."""
    table, part = opened[path], _Part(path)
    for name in FIELDS:
        wanted = columns.get(name) or next((alias for alias in _ALIASES[name] if alias in table.names), None)
        if wanted is not None:
            part.names[name] = _matching(table, wanted, name, path)
            part.fields[name] = _column(table, part.names[name], name, path, opened)
        elif name in FIELDS[:4] and not (name == "terminals" and never_terminates):
            hint = ", or say that the task never terminates (--never-terminates)" if name == "terminals" else ""
            raise InputError(
                f"{path} has no {name}; name the column with --column {name}=NAME{hint}; there are {_listed(table.names)}"
            )
    _check_part(part)
    if ends.startswith("column:"):
        name = "the episode's number"
        column = _column(table, _matching(table, ends.removeprefix("column:"), name, path), name, path, opened)
        if column.shape[:1] != (part.rows,):
            raise InputError(
                f"{path}: {ends} has shape {tuple(column.shape)}, expected one for each of {part.rows} rows"
            )
        values = np.asarray(column[0 : part.rows]).reshape(part.rows, -1)
        part.numbers = np.concatenate([[0], np.cumsum((values[1:] != values[:-1]).any(1))])
    return part


def _matching(table: Table, wanted: str, name: str, path: Path) -> list[str]:
    """Names of the columns that an entry of the mapping selects."""
    if wanted in table.names:
        return [wanted]
    names: list[str] = []
    for part in wanted.split(","):
        # "pos[0]" is first a name, then a pattern.
        matching = [part] if part in table.names else sorted(fnmatch.filter(table.names, part), key=_by_number)
        if not matching:
            raise InputError(f"{path} has no column {part!r} for {name}; there are {_listed(table.names)}")
        names += matching
    return names


def _by_number(name: str) -> list[Any]:
    """Sort key that puts obs_2 before obs_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _column(table: Table, names: Sequence[str], name: str, path: Path, opened: _OpenFiles) -> Column:
    """One column, or several side by side; vectors get two dimensions."""
    parts = [_single(table, part, name, path, opened) for part in names]
    if len(parts) > 1:
        if any(len(part.shape) != 1 for part in parts):
            raise InputError(
                f"{path}: {','.join(names)!r} are not columns of one number a row; name one array for {name}"
            )
        if len({part.shape for part in parts}) > 1:
            raise InputError(f"{path}: {','.join(names)!r} differ in length; name columns of one length for {name}")
        return np.stack([np.asarray(part[0 : part.shape[0]]) for part in parts], axis=1)
    column = parts[0]
    if name in _VECTORS and len(column.shape) == 1:
        return _Rows((*column.shape, 1), column.dtype, lambda rows: np.asarray(column[rows])[:, None])
    return column


def _single(table: Table, column_name: str, name: str, path: Path, opened: _OpenFiles) -> Column:
    if not isinstance(table, _Arrow):
        return opened.column(path, column_name)
    with _reading(path):
        # A next observation may be missing where it is not used.
        missing = None if name == "next_observations" else table.first_missing(column_name)
        if missing is not None:
            raise InputError(
                f"{path}: {name} (column {column_name}) has a missing value in row {missing}, which is NaN; "
                "repair or drop that trajectory"
            )
        values = table[column_name]
    return values.astype(np.float64) if table.text and name in _VECTORS and values.dtype.kind in "iu" else values


def _check_part(part: _Part) -> None:
    """Refuse a file whose fields do not fit together."""
    for name, column in part.fields.items():
        if not column.shape:
            raise InputError(f"{part.path}: {name} is a single value (shape ()), expected a row for each step")
    for name, column in part.fields.items():
        if column.shape[0] != part.rows:
            raise InputError(f"{part.path}: {name} has {column.shape[0]} rows, actions {part.rows}")
        kind = np.dtype(column.dtype).kind
        if part.rows and kind not in ("f" if name == "actions" else "fiub"):
            expected = "floating point in [-1, 1]" if name == "actions" else "real numbers"
            held = "text or objects" if kind in "OUS" else f"type {np.dtype(column.dtype)}"
            raise InputError(f"{part.path}: {name} has {held} ({','.join(part.names[name])}), expected {expected}")
    if part.rows == 0:
        raise InputError(f"{part.path} holds no transition")


def _check_alike(parts: Sequence[_Part]) -> None:
    """Refuse files of different layouts."""
    first = parts[0]
    for name in FIELDS:
        having = [part.path for part in parts if name in part.fields]
        lacking = [part.path for part in parts if name not in part.fields]
        if having and lacking:
            raise InputError(f"some files have {name} ({having[0]}), others do not ({lacking[0]})")
    for part in parts[1:]:
        for name, column in part.fields.items():
            expected = first.fields[name]
            if part.names[name] != first.names[name]:
                raise InputError(
                    f"{part.path}: {name} would be {','.join(part.names[name])}, in {first.path} "
                    f"{','.join(first.names[name])}; name columns that all files have (--column {name}=NAME)"
                )
            shape, usual = tuple(column.shape[1:]), tuple(expected.shape[1:])
            if shape != usual:
                raise InputError(f"{part.path}: {name} has rows of shape {shape}, in {first.path} {usual}")
            one, other = np.dtype(column.dtype), np.dtype(expected.dtype)
            # Pixels of 0 to 255 beside pixels of 0 to 1; flags and rewards are numbers in any type.
            if name in _VECTORS and (one.kind != other.kind or (len(column.shape) > 2 and one != other)):
                raise InputError(f"{part.path}: {name} has type {one}, in {first.path} {other}; store them as one type")


# -- where episodes end ----------------------------------------------------------------------------------------------


def _told(ends: str, parts: Sequence[_Part]) -> Any:
    """``episode_ends`` of :meth:`TransitionDataset.from_arrays`; the last row of a file always ends an episode."""
    several = len(parts) > 1
    if ends == "flags":
        for part in parts if several else ():
            if not _flagged(part, slice(part.rows - 1, part.rows)).any():
                raise InputError(
                    f"{part.path}: its last row ends no episode (neither terminal nor timeout), and no episode goes on in "
                    "another file: mark it (timeouts), or say how ends are known (ends='file', --ends file: each file is an "
                    "episode)"
                )
        return None
    if ends == "discontinuity":
        if not several or "next_observations" not in parts[0].fields:
            return ends
        last = [
            discontinuities(part.fields["observations"], part.fields["next_observations"])
            | _flagged(part, slice(0, part.rows))
            for part in parts
        ]
        return np.cumsum(np.concatenate(last)) - np.concatenate(last)
    if ends.isdecimal():
        for part in parts:
            if int(ends) < 2 or part.rows % int(ends):
                raise InputError(
                    f"{part.path}: {part.rows} rows are not whole episodes of {int(ends)} rows (--ends {ends})"
                )
        return int(ends)
    numbers = [np.zeros(part.rows, np.int64) if part.numbers is None else part.numbers for part in parts]
    # The same number in the next file is another episode.
    return np.concatenate([own + (place << 40) for place, own in enumerate(numbers)])


def _flagged(part: _Part, rows: slice) -> np.ndarray:
    """Rows that are terminal or a timeout, bool ``[rows]``."""
    flags = [np.asarray(part.fields[name][rows]) for name in ("terminals", "timeouts") if name in part.fields]
    ends = np.zeros(rows.stop - rows.start, bool)
    for flag in flags:
        ends |= (flag != 0).reshape(len(ends), -1).any(1)
    return ends


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
