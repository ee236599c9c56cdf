# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Files of the user's own as transitions: layouts that are recognised, or any file with a mapping of columns."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.data.assembly import REWARDS, discontinuities, same_relative
from deflow_torchrl.data.columns import Column
from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.data.packed import PackedColumn
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import file_sha256, folder_sha256
from deflow_torchrl.sources.base import Source
from deflow_torchrl.sources.layouts import Arranged, Wanted, arrange, by_number, lerobot_folder, unpadded
from deflow_torchrl.sources.tables import ArrowTable, LazyColumn, OpenFiles, Table, joined, reading, side_by_side

FIELDS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "mask")
"""Fields that a mapping may name; the first four are required."""
_VECTORS = ("observations", "actions", "next_observations")
_OBSERVATIONS = ("observations", "next_observations")

# Names that need no mapping: those of D4RL, OGBench and Gymnasium, and common short ones, each also numbered (obs_0, obs_1...).
# "done" is not among them because it does not say whether the task ended or time ran out.
_ALIASES = {
    "observations": ("observations", "observation", "obs", "states", "state", "o", "s"),
    "actions": ("actions", "action", "act", "a"),
    "rewards": ("rewards", "reward", "rew"),
    "terminals": ("terminals", "terminal", "terminated", "terminations"),
    "timeouts": ("timeouts", "timeout", "truncated", "truncations"),
    "next_observations": ("next_observations", "next_observation", "next_obs", "next_states", "next_state"),
    "mask": ("mask", "valid"),
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
    ends: str | None = None,
    never_terminates: bool = False,
    final_observation_rows: bool = False,
    both: str = "refuse",
    action_bounds: tuple[Any, Any] | None = None,
    allow_jumps: bool = False,
    split: str | None = None,
    observation_keys: Sequence[str] = (),
    reward: str | None = None,
    padded: bool = False,
    folder: Path | None = None,
) -> TransitionDataset:
    """Read files of the same layout, one after another, as a validated set.

    Args:
        paths: one or several files that end in ``.npz``, ``.h5``, ``.hdf5``, ``.csv`` or ``.parquet``, or LeRobot folders. No
            episode continues in the next file.

    Keyword Args:
        columns: field (:data:`FIELDS`) -> name in the files: an array (HDF5: its path), a table's column, or, for vectors in
            CSV and Parquet, several columns by pattern (``obs_*``, in the order of their numbers) or list (``x,y,theta``).
            Several cameras and vectors in npz and HDF5 are a list too (``front,wrist,joints``); each is an observation of its
            own. Other fields are those of the file's layout (:data:`deflow_torchrl.sources.layouts.LAYOUTS`), or are looked for
            under their usual names. ``about["columns"]`` lists the columns that were used.
        ends: how ends of episodes are known: ``"flags"`` (terminals and timeouts mark them all, a file's last row too),
            ``"file"`` (each file is an episode), ``"discontinuity"``, a number (rows of every episode, each file a multiple),
            or ``"column:NAME"`` (an end where that column's value changes). By default as the layout has it, else flags. See
            :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        never_terminates: the task has no terminal states; no column ``terminals`` is needed, and a layout's ``done`` flags are
            the ends of recordings.
        final_observation_rows: see :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        both: see :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        action_bounds: (low, high) of the files' actions, numbers or one for each dimension, which are mapped to [-1, 1]; rounding
            errors beyond them are allowed. By default the arrays ``action_low`` and ``action_high [A]`` of the files, if they
            have them. Exported policies act in these units.
        allow_jumps: see :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        split: a list of episodes that the files name (robomimic's ``mask/NAME``, LeRobot's ``splits``); all by default.
        observation_keys: which observations of a layout with several are put side by side, in this order; by default all
            vectors, in the order of their names.
        reward: ``"success-at-end"`` or ``"zero"`` in the place of rewards that the files do not have, see
            :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.
        padded: arrays are ``[episodes, steps, ...]``, and an episode ends with its first terminal or timeout. A field ``mask``
            ``[episodes, steps]`` says instead which rows are valid; where there is one, arrays are known to be padded.
        folder: see :meth:`~deflow_torchrl.data.TransitionDataset.from_arrays`.

    Raises:
        InputError: on a missing, damaged or unknown file, a missing column, or data that fail validation.
        MissingExtraError: if the ``files`` extra is not installed, for HDF5, CSV and Parquet.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    mapping = columns or {}
    wanted, folders = _expanded(given, split, tuple(observation_keys))
    _check_options(mapping, ends, action_bounds, reward)
    if reward == "success-at-end" and never_terminates:
        raise InputError(
            "--reward success-at-end makes each episode's last row terminal; leave one of them out (--never-terminates)"
        )
    options = _Options(mapping, ends, never_terminates=never_terminates, reward=reward, padded=padded)
    with _Files(wanted) as opened:
        parts = [_examine(path, opened, options) for path in wanted]
        _check_lerobot(folders, parts, whole=split is None)
        parts = [part for part in parts if part.rows] if split is not None else parts
        for part in parts:
            if part.rows == 0:
                raise InputError(f"{part.path} holds no transition")
        if not parts:
            raise InputError(f"{', '.join(map(str, given))}: split {split} holds no transition")
        _check_alike(parts)
        episode_ends = _told(parts)
        fields = {name: joined([part.fields[name] for part in parts]) for name in parts[0].fields}
        fields.setdefault("terminals", np.zeros(sum(part.rows for part in parts), bool))
        if action_bounds is None:
            action_bounds = _stated_bounds(parts, opened)
        if action_bounds is not None:
            fields["actions"] = _rescaled(fields["actions"], *action_bounds)
        about: dict[str, Any] = {
            "provenance": "own",
            "files": _digests([path for path in wanted if wanted[path].info is None], folders),
            "columns": {name: ",".join(names) for name, names in parts[0].names.items()},
            "action_bounds": None if action_bounds is None else [np.asarray(bound).tolist() for bound in action_bounds],
        }
        about |= {"layout": parts[0].layout} if parts[0].layout else {}
        about |= {"split": split} if split else {}
        about |= (
            {"notes": notes} if (notes := list(dict.fromkeys(note for part in parts for note in part.notes))) else {}
        )
        about |= {} if reward is None else _REWARD_FACTS[reward]
        about |= _entries(parts)
        return TransitionDataset.from_arrays(
            **{"rewards": reward, **fields},
            episode_ends=episode_ends,
            both=both,
            final_observation_rows=final_observation_rows,
            allow_jumps=allow_jumps,
            source=str(given[0]) if len(given) == 1 else f"{given[0]} and {len(given) - 1} more",
            folder=folder,
            about=about,
        )


def _entries(parts: Sequence[_Part]) -> dict[str, Any]:
    """What the bytes of several observations hold, alike in all files; nothing where there is one."""
    found = [
        getattr(part.fields[name], "entries", None) for part in parts for name in _OBSERVATIONS if name in part.fields
    ]
    if any(entries != found[0] for entries in found):
        raise InputError(f"observations differ between files or between observations and next observations: {found}")
    return {} if found[0] is None else {"entries": found[0]}


_REWARD_FACTS = {
    "success-at-end": {
        "reward": "success-at-end: 1 on the last row of each episode, which is terminal; none in the files"
    },
    "zero": {"rewards": "none in the files; zeros stand in, for methods that read no rewards"},
}


def _expanded(
    given: Sequence[str | os.PathLike[str]], split: str | None, observation_keys: tuple[str, ...]
) -> tuple[dict[Path, Wanted], dict[Path, dict[str, Any]]]:
    """Files in order, with what is wanted of each; and the LeRobot folders among ``given``, with their ``info.json``."""
    if not given:
        raise InputError("no file to import")
    wanted: dict[Path, Wanted] = {}
    folders: dict[Path, dict[str, Any]] = {}
    for path in (Path(item).expanduser() for item in given):
        files, info = [path], None
        if path.is_dir():
            files, info = lerobot_folder(path)
            folders[path] = info
        for file in files:
            if file in wanted:
                raise InputError(f"{file} is given twice")
            wanted[file] = Wanted(file, split, observation_keys, info)
    return wanted, folders


def _digests(files: Sequence[Path], folders: Mapping[Path, Any]) -> dict[str, str]:
    return {str(path): file_sha256(path) for path in files} | {
        str(path): folder_sha256(path / "data", "*.parquet") for path in folders
    }


def _check_lerobot(folders: Mapping[Path, Mapping[str, Any]], parts: Sequence[_Part], *, whole: bool) -> None:
    """Refuse folders that hold fewer rows than they say."""
    for folder, info in folders.items():
        rows = sum(part.rows for part in parts if folder in part.path.parents)
        if whole and info.get("total_frames") not in (None, rows):
            raise InputError(
                f"{folder} holds {rows} rows, meta/info.json says {info['total_frames']}; download the whole folder again"
            )


def _check_options(
    columns: Mapping[str, str],
    ends: str | None,
    action_bounds: tuple[Any, Any] | None,
    reward: str | None,
) -> None:
    if unknown := sorted(set(columns) - set(FIELDS)):
        raise InputError(f"unknown field {unknown[0]!r} in the mapping (--column); there are {', '.join(FIELDS)}")
    if action_bounds is not None:
        _check_bounds(action_bounds, "--action-bounds")
    known = ends is None or ends in ("flags", "file", "discontinuity") or ends.isdecimal() or ends.startswith("column:")
    if not known:
        raise InputError(
            f"ends={ends!r} is unknown; there are flags, file, discontinuity, a number of rows and column:NAME (--ends)"
        )
    if reward is not None and reward not in REWARDS:
        raise InputError(f"reward={reward!r} is unknown; there are {' and '.join(REWARDS)} (--reward)")


def _check_bounds(bounds: tuple[Any, Any], where: str) -> None:
    """Refuse bounds of actions that are no pair of finite numbers, or of vectors of them, the lower ones first."""
    low, high = (np.asarray(bound, np.float64) for bound in bounds)
    if max(low.ndim, high.ndim) > 1:
        raise InputError(
            f"action bounds of shape {low.shape} and {high.shape} ({where}): give a number, or one a dimension"
        )
    if low.shape != high.shape or not (np.isfinite(high - low).all() and (low < high).all()):
        shown = f"{low:g} and {high:g}" if low.ndim == high.ndim == 0 else f"{low.tolist()} and {high.tolist()}"
        raise InputError(f"action bounds {shown} ({where}): both must be finite, and the first must be the smaller")


def _stated_bounds(parts: Sequence[_Part], opened: _Files) -> tuple[Any, Any] | None:
    """The bounds that files state beside their rows; None if they state none."""
    stated = {}
    for part in parts:
        if {"action_low", "action_high"} <= set(opened[part.path].names):
            columns: list[Any] = [opened.column(part.path, name) for name in ("action_low", "action_high")]
            if any(column.dtype.kind not in "fiu" for column in columns):
                raise InputError(
                    f"{part.path}: action_low and action_high are no numbers; give them with --action-bounds"
                )
            with reading(part.path):
                bounds = (np.asarray(column[slice(None) if column.shape else ()], np.float64) for column in columns)
                stated[part.path] = np.broadcast_arrays(*bounds)  # one number bounds every dimension
    if not stated:
        return None
    first, (low, high) = next(iter(stated.items()))
    _check_bounds((low, high), f"action_low and action_high of {first}")
    for part in parts:
        if part.path not in stated or not np.array_equal(stated[part.path], [low, high]):
            raise InputError(
                f"{part.path} does not state the bounds of actions that {first} states; give those of all files (--action-bounds)"
            )
    return low, high


def _rescaled(column: Column, low: Any, high: Any) -> Column:
    """Map a column of floating point actions from [low, high], numbers or ``[A]``, to [-1, 1], in double precision.

    A decimal bound such as 20.3 is not exactly a float32: actions up to one float32 step beyond it count as the bound.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if low.ndim and low.shape != column.shape[1:]:
        raise InputError(f"action bounds of {len(low)} dimensions for actions of shape {tuple(column.shape[1:])}")
    scale = 2 / (high - low)
    # float64 columns often hold values that were float32 before.
    kept = np.float16 if np.dtype(column.dtype) == np.float16 else np.float32
    limit = 1 + np.spacing(np.maximum(abs(low), abs(high)).astype(kept)).astype(np.float64) * scale

    def read(rows: slice) -> np.ndarray:
        values = (np.asarray(column[rows], np.float64) - low) * scale - 1
        return np.where(np.abs(values) <= limit, values.clip(-1, 1), values)

    return LazyColumn(column.shape, np.dtype(np.float64), read)


# -- the fields of a file --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """What the user says about the fields."""

    columns: Mapping[str, str]
    ends: str | None
    never_terminates: bool
    reward: str | None
    padded: bool


class _Files(OpenFiles):
    """Opened files, arranged by their layouts."""

    def __init__(self, wanted: Mapping[Path, Wanted]) -> None:
        super().__init__(self._arranged)
        self._wanted = wanted
        self.found: dict[Path, tuple[str | None, Arranged]] = {}

    def _arranged(self, path: Path, table: Table) -> Table:
        layout, arranged = arrange(table, self._wanted[path])
        self.found[path] = layout, arranged
        return arranged.table


@dataclass
class _Part:
    """The contents of one file.

    Attributes:
        path: the file.
        ends: how ends of episodes are known.
        layout: name of its layout.
        notes: what the user should know about it.
        fields: field -> column, for the fields that the file has.
        names: field -> names of its columns in the file.
        numbers: episode number of each row ``[N]``, if a column gives them.
    """

    path: Path
    ends: str
    layout: str | None
    notes: list[str]
    fields: dict[str, Column] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    numbers: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return self.fields["actions"].shape[0]


def _examine(path: Path, opened: _Files, options: _Options) -> _Part:
    """Find the fields of a file, and check names, shapes and types."""
    table = opened[path]
    layout, arranged = opened.found[path]
    part = _Part(path, options.ends or arranged.ends, layout, arranged.notes)
    for name in FIELDS:
        if name == "mask" and name not in options.columns and len(part.fields["actions"].shape) < 3:
            continue  # "valid" may mean anything beside rows
        names = _names_of(name, table, arranged, options, path)
        if names:
            if name == "rewards" and options.reward is not None:
                raise InputError(f"{path} has rewards ({','.join(names)}); --reward is for files without")
            part.names[name] = names
            part.fields[name] = _column(table, names, name, path, opened)
        elif name in _required(options):
            hint = {
                "rewards": ", or say what stands in for them: --reward success-at-end, --reward zero (for cloning)",
                "terminals": ", or say that the task never terminates (--never-terminates)",
            }.get(name, "")
            raise InputError(
                f"{path} has no {name}; name the column with --column {name}=NAME{hint}; there are {_listed(table.names)}"
            )
    if arranged.done_note and part.names.get("terminals") == arranged.fields.get("terminals"):
        part.notes.append(arranged.done_note)
    mask = part.fields.pop("mask", None)
    _check_part(part)
    if options.padded or mask is not None:
        if len(part.fields["actions"].shape) < 3:
            raise InputError(
                f"{path}: actions has shape {tuple(part.fields['actions'].shape)}; padded arrays are [episodes, steps, A]"
            )
        with reading(path):
            part.fields, part.numbers = unpadded(part.fields, mask, path=path)
    elif part.ends.startswith("column:"):
        name, wanted = "the episode's number", part.ends.removeprefix("column:")
        column = _column(table, _matching(table, wanted, name, path), name, path, opened)
        if column.shape[:1] != (part.rows,):
            raise InputError(
                f"{path}: {part.ends} has shape {tuple(column.shape)}, expected one for each of {part.rows} rows"
            )
        values = np.asarray(column[0 : part.rows]).reshape(part.rows, *column.shape[1:] or [1])
        part.numbers = np.concatenate([[0], np.cumsum((values[1:] != values[:-1]).any(1))])[: part.rows]
    return part


def _required(options: _Options) -> tuple[str, ...]:
    """Fields that a file must have."""
    if options.reward is not None:
        return FIELDS[:2]
    return FIELDS[:3] if options.never_terminates else FIELDS[:4]


def _names_of(name: str, table: Table, arranged: Arranged, options: _Options, path: Path) -> list[str]:
    """Names of a field's columns: the user's, the layout's, or usual ones; none if the file does not have it."""
    if name in options.columns:
        return _matching(table, options.columns[name], name, path)
    if name in arranged.fields:
        return [] if name == "terminals" and options.never_terminates else arranged.fields[name]
    for alias in _ALIASES[name]:
        if alias in table.names:
            return [alias]
    for alias in _ALIASES[name]:
        if numbered := [own for own in table.names if re.fullmatch(rf"{alias}_\d+", own)]:
            return sorted(numbered, key=by_number)
    return []


def _matching(table: Table, wanted: str, name: str, path: Path) -> list[str]:
    """Names of the columns that an entry of the mapping selects."""
    if wanted in table.names:
        return [wanted]
    names: list[str] = []
    for part in wanted.split(","):
        # "pos[0]" is first a name, then a pattern.
        matching = [part] if part in table.names else sorted(fnmatch.filter(table.names, part), key=by_number)
        if not matching:
            raise InputError(f"{path} has no column {part!r} for {name}; there are {_listed(table.names)}")
        names += matching
    return names


def _column(table: Table, names: Sequence[str], name: str, path: Path, opened: _Files) -> Column:
    """One column, or several side by side; vectors get two dimensions."""
    parts = [_single(table, part, name, path, opened) for part in names]
    if len(parts) > 1:
        if name in _OBSERVATIONS and any(len(part.shape) == 4 for part in parts):
            own = [column.rpartition("/")[2].removeprefix("next_") for column in names]
            return PackedColumn(dict(zip(own, parts, strict=True)), source=str(path))
        if any(len(part.shape) not in (1, 2) for part in parts):
            raise InputError(
                f"{path}: {','.join(names)!r} are not columns of one number a row, nor vectors; name one array for {name}"
            )
        if len({part.shape[0] for part in parts}) > 1:
            raise InputError(f"{path}: {','.join(names)!r} differ in length; name columns of one length for {name}")
        return side_by_side(parts)
    column = parts[0]
    if name in _VECTORS and len(column.shape) == 1:
        return LazyColumn((*column.shape, 1), column.dtype, lambda rows: np.asarray(column[rows])[:, None])
    return column


def _single(table: Table, column_name: str, name: str, path: Path, opened: _Files) -> Column:
    if not isinstance(table, ArrowTable):
        return opened.column(path, column_name)
    with reading(path):
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


def _check_alike(parts: Sequence[_Part]) -> None:
    """Refuse files of different layouts."""
    first = parts[0]
    for part in parts:
        if part.layout != first.layout:
            kinds = [f"{own.path} is {own.layout or 'of no known layout'}" for own in (part, first)]
            raise InputError(f"{', '.join(kinds)}; import files of one layout at a time")
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


def _told(parts: Sequence[_Part]) -> Any:
    """``episode_ends`` of :meth:`TransitionDataset.from_arrays`; the last row of a file always ends an episode."""
    several, ends = len(parts) > 1, parts[0].ends
    if parts[0].numbers is not None:
        ends = "numbers"
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
        last = []
        for part in parts:
            states = part.fields["observations"], part.fields["next_observations"]
            entries = getattr(states[0], "entries", None)
            jumps = discontinuities(*states, same_relative(*states), entries)
            last.append(jumps | _flagged(part, slice(0, part.rows)))
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
