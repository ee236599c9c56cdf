# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Layouts of files that other packages write, each recognised by its content: robomimic, LeRobot, d3rlpy, D4RL.

A layout is a row of :data:`LAYOUTS`. It says which columns of a file are which fields, and how its episodes end. What is true of
files of any layout (types, lengths, missing values) is checked in :mod:`deflow_torchrl.sources.files`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deflow_torchrl.data.columns import Column
from deflow_torchrl.errors import InputError, did_you_mean
from deflow_torchrl.sources.tables import ArrowTable, Columns, Hdf5Table, LazyColumn, Table, joined

_LEROBOT_VERSIONS = ("v2.", "v3.")


@dataclass(frozen=True)
class Wanted:
    """What the user wants of a file.

    Attributes:
        path: the file.
        split: name of a split.
        observation_keys: the observations that are read; all vectors where it is empty.
        info: content of ``meta/info.json`` of a LeRobot folder.
    """

    path: Path
    split: str | None = None
    observation_keys: tuple[str, ...] = ()
    info: Mapping[str, Any] | None = None


class ObservationKey(NamedTuple):
    """One of several observations of a file.

    Attributes:
        name: its column.
        next_name: the column of its successors, if there is one.
        picture: whether it is no vector.
    """

    name: str
    next_name: str | None = None
    picture: bool = False


@dataclass
class Arranged:
    """How a file is read.

    Attributes:
        table: its columns.
        fields: field -> names of its columns, where the user names none.
        ends: how ends of episodes are known, as ``--ends`` says it.
        keys: name of an observation -> its columns, in a layout with several.
        splits: whether the layout has splits.
        notes: what the user should know, a line each.
        done_note: what the user should know if the layout's own flag is taken for terminals.
    """

    table: Table
    fields: dict[str, list[str]] = field(default_factory=dict)
    ends: str = "flags"
    keys: dict[str, ObservationKey] = field(default_factory=dict)
    splits: bool = False
    notes: list[str] = field(default_factory=list)
    done_note: str = ""


class Layout(NamedTuple):
    """A layout of files.

    Attributes:
        name: of the package that writes it.
        recognise: whether a file has it.
        arrange: reads such a file.
    """

    name: str
    recognise: Callable[[Table], bool]
    arrange: Callable[[Table, Wanted], Arranged]


def arrange(table: Table, wanted: Wanted) -> tuple[str | None, Arranged]:
    """Find a file's layout, by its content, and arrange its columns.

    Returns:
        The layout's name, ``None`` where no layout is recognised, and the columns.

    Raises:
        InputError: on a split or observation that does not exist, or episodes of different fields.
    """
    for layout in LAYOUTS:
        if layout.recognise(table):
            arranged = layout.arrange(table, wanted)
            break
    else:
        layout, arranged = None, Arranged(table)
    if wanted.split is not None and not arranged.splits:
        raise InputError(f"{wanted.path} has no splits (--split); robomimic's files and LeRobot's folders have")
    if arranged.keys:
        _choose_observations(arranged, wanted)
    elif wanted.observation_keys:
        raise InputError(
            f"{wanted.path} has no keys of observations (--obs-keys); name columns with --column observations=NAME"
        )
    return (None if layout is None else layout.name), arranged


def _choose_observations(arranged: Arranged, wanted: Wanted) -> None:
    """Put the observations that are wanted side by side; pictures cannot stand beside vectors."""
    keys, path = arranged.keys, wanted.path
    pictures = sorted(name for name, key in keys.items() if key.picture)
    vectors = sorted(set(keys) - set(pictures))
    for name in wanted.observation_keys:
        if name not in keys:
            raise InputError(f"{path} has no observation {name!r} (--obs-keys); {did_you_mean(name, sorted(keys))}")
    chosen = list(wanted.observation_keys) or vectors
    if not chosen:
        raise InputError(
            f"{path} has pictures for observations only; choose one with --obs-keys: {', '.join(pictures)}"
        )
    if len(chosen) > 1 and set(chosen) & set(pictures):
        raise InputError(f"{path}: {', '.join(chosen)} (--obs-keys): pictures cannot stand beside other observations")
    if skipped := [name for name in pictures if name not in chosen]:
        arranged.notes.append(f"left out: {', '.join(skipped)} (pictures)")
    arranged.fields["observations"] = [keys[name].name for name in chosen]
    following = [keys[name].next_name for name in chosen]
    if all(following):
        arranged.fields["next_observations"] = [name for name in following if name is not None]


def _episodes(path: Path, table: Table, groups: Mapping[str, Mapping[str, str]]) -> Columns:
    """Columns over all episodes of a file that has arrays for each.

    Args:
        path: the file.
        table: the file's arrays.
        groups: episode -> name of a column -> name of its array.

    Returns:
        The columns, and ``episode``, the number of each row's episode.
    """
    first = next(iter(groups))

    def array(episode: str, name: str) -> Column:
        if name not in groups[episode]:
            other = next((own for own, group in groups.items() if name in group), None)
            raise InputError(f"{path}: {episode} has no {name}" + (f", {other} has" if other else ""))
        return table[groups[episode][name]]

    def rows(episode: str) -> int:
        shape = array(episode, "actions").shape
        if not shape:
            raise InputError(f"{path}: actions of {episode} is a single value, expected a row for each step")
        return shape[0]

    def over_all(name: str) -> Column:
        parts: list[Column] = []
        for episode in groups:
            part = array(episode, name)
            if part.shape[:1] != (rows(episode),):
                raise InputError(
                    f"{path}: {name} of {episode} has shape {tuple(part.shape)}, its actions {rows(episode)} rows"
                )
            if parts and part.shape[1:] != parts[0].shape[1:]:
                raise InputError(
                    f"{path}: {name} of {episode} has rows of shape {tuple(part.shape[1:])}, those of {first} "
                    f"{tuple(parts[0].shape[1:])}"
                )
            parts.append(part)
        return joined(parts)

    names = dict.fromkeys(name for group in groups.values() for name in group)
    makers: dict[str, Callable[[], Column]] = {name: functools.partial(over_all, name) for name in names}
    makers["episode"] = lambda: np.repeat(np.arange(len(groups)), [rows(episode) for episode in groups])
    return Columns(makers)


def by_number(name: str) -> list[Any]:
    """Sort key that puts obs_2 before obs_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _flags(table: Table, name: str) -> np.ndarray:
    column = table[name]
    return np.asarray(column[0 : column.shape[0]]) != 0


def _last_rows(numbers: Column) -> np.ndarray:
    values = np.asarray(numbers[0 : numbers.shape[0]])
    return np.append(values[1:] != values[:-1], True)[: len(values)]


# -- robomimic: data/demo_N/{obs/*, next_obs/*, actions, rewards, dones}, and lists of demos in mask/* ---------------------


def _is_robomimic(table: Table) -> bool:
    return isinstance(table, Hdf5Table) and any(re.match(r"data/demo_\d+/", name) for name in table.names)


def _robomimic(table: Table, wanted: Wanted) -> Arranged:
    path = wanted.path
    demos: dict[str, dict[str, str]] = {}
    for name in table.names:
        root, demo, *inside = name.split("/", 2)
        if root == "data" and inside:
            demos.setdefault(demo, {})[inside[0]] = name
    kept = sorted(demos, key=by_number)
    if wanted.split is not None:
        splits = [name.removeprefix("mask/") for name in table.names if name.startswith("mask/")]
        if wanted.split not in splits:
            known = did_you_mean(wanted.split, splits) if splits else "the file has none (mask/*)"
            raise InputError(f"{path} has no split {wanted.split!r} (--split); {known}")
        listed = table[f"mask/{wanted.split}"]
        kept = [
            demo.decode() if isinstance(demo, bytes) else str(demo) for demo in np.asarray(listed[0 : listed.shape[0]])
        ]
        if unknown := [demo for demo in kept if demo not in demos]:
            raise InputError(f"{path}: split {wanted.split} lists {unknown[0]}, which the file does not have")
        if not kept:
            raise InputError(f"{path}: split {wanted.split} lists no demo")
    columns = _episodes(path, table, {demo: demos[demo] for demo in kept})
    keys = {}
    for name in columns.names:
        if name.startswith("obs/"):
            following = f"next_{name}" if f"next_{name}" in columns.names else None
            shape = table[next(demos[demo][name] for demo in kept if name in demos[demo])].shape
            keys[name.removeprefix("obs/")] = ObservationKey(name, following, picture=len(shape) > 2)
    if not keys:
        raise InputError(
            f"{path} has no observations (data/{kept[0]}/obs); write them with robomimic's dataset_states_to_obs"
        )
    arranged = Arranged(columns, {"actions": ["actions"]}, "column:episode", keys, splits=True)
    if "rewards" in columns.names:
        arranged.fields["rewards"] = ["rewards"]
    if "dones" in columns.names:
        _read_done_as_terminal(arranged, "dones", "robomimic")
    return arranged


def _read_done_as_terminal(arranged: Arranged, name: str, package: str) -> None:
    arranged.fields["terminals"] = [name]
    arranged.done_note = (
        f"{name} is read as the end of the task, as {package} does (no value is bootstrapped there); with --never-terminates as "
        "the end of a recording"
    )


# -- LeRobot: Parquet with observation.*, action, episode_index, next.reward, next.done; folders with meta/info.json -------


def _is_lerobot(table: Table) -> bool:
    return (
        isinstance(table, ArrowTable)
        and {"action", "episode_index"} <= set(table.names)
        and any(name.startswith("observation.") for name in table.names)
    )


def _lerobot(table: Table, wanted: Wanted) -> Arranged:
    assert isinstance(table, ArrowTable)
    if wanted.split is not None:
        low, high = _lerobot_split(wanted)
        numbers = table["episode_index"]
        table = table.keep((numbers >= low) & (numbers < high))
    prefix = "observation."
    keys = {
        name.removeprefix(prefix): ObservationKey(name, picture=not table.is_numeric(name))
        for name in table.names
        if name.startswith(prefix)
    }
    arranged = Arranged(table, {"actions": ["action"]}, "column:episode_index", keys, splits=wanted.info is not None)
    if "next.reward" in table.names:
        arranged.fields["rewards"] = ["next.reward"]
    if "next.done" in table.names:
        _read_done_as_terminal(arranged, "next.done", "LeRobot")
    return arranged


def _lerobot_split(wanted: Wanted) -> tuple[int, int]:
    """First and last + 1 episode of a split."""
    splits = (wanted.info or {}).get("splits") or {}
    if not isinstance(splits, dict):
        raise InputError(
            f"{wanted.path}: splits is {splits!r} in meta/info.json, expected {{NAME: FIRST:END}}, ranges of episodes by name"
        )
    if wanted.split not in splits:
        known = did_you_mean(str(wanted.split), splits) if splits else "there are none (meta/info.json)"
        raise InputError(f"{wanted.path} has no split {wanted.split!r} (--split); {known}")
    found = re.fullmatch(r"(\d+):(\d+)", str(splits[wanted.split]))
    if found is None:
        raise InputError(
            f"{wanted.path}: split {wanted.split} is {splits[wanted.split]!r} in meta/info.json, expected FIRST:END"
        )
    return int(found[1]), int(found[2])


def lerobot_folder(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    """Data files of a LeRobot folder, of version 2 (one an episode) or 3 (several episodes a file), and its ``info.json``.

    Raises:
        InputError: if it is no such folder, of another version, or its data files are missing.
    """
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise InputError(
            f"{folder} is a folder without meta/info.json (LeRobot); name the files in it, {folder / '*.hdf5'}"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = str(info.get("codebase_version", "unknown"))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())}); download the folder again"
        ) from error
    if not version.startswith(_LEROBOT_VERSIONS):
        raise InputError(
            f"{folder} has LeRobot's format {version}; v2.x and v3.x can be imported, convert it with lerobot"
        )
    files = sorted((folder / "data").rglob("*.parquet"), key=lambda file: by_number(str(file)))
    if not files:
        raise InputError(f"{folder} has no data/chunk-*/*.parquet; download the whole folder (videos are not needed)")
    return files, info


# -- d3rlpy: arrays observations_N, actions_N, rewards_N, terminated_N (version 2), or flat ones with episode_terminals ------


def _is_d3rlpy(table: Table) -> bool:
    return isinstance(table, Hdf5Table) and {"columns", "version", "actions_0"} <= set(table.names)


def _d3rlpy(table: Table, wanted: Wanted) -> Arranged:
    groups: dict[str, dict[str, str]] = {}
    for name in sorted(table.names, key=by_number):
        # Observations may be a tuple: observations_N_0, observations_N_1.
        if found := re.fullmatch(r"([a-z]\w*?)_(\d+)(?:_(\d+))?", name):
            column = found[1] if found[3] is None else f"{found[1]}/{found[3]}"
            groups.setdefault(f"episode {found[2]}", {})[column] = name
    # An episode that was begun and not recorded has arrays without rows.
    held = {
        name: group for name, group in groups.items() if 0 not in table[group.get("actions", "actions_0")].shape[:1]
    }
    groups = dict(sorted((held or groups).items(), key=lambda item: by_number(item[0])))
    columns = _episodes(wanted.path, table, groups)

    def terminals() -> np.ndarray:
        last, flags = _last_rows(columns["episode"]), []
        for episode, group in groups.items():
            if "terminated" not in group:
                raise InputError(f"{wanted.path}: {episode} has no terminated")
            array: Any = table[group["terminated"]]
            flags.append(bool(np.asarray(array[()] if array.shape == () else array[0 : array.shape[0]]).any()))
        last[last] = flags
        return last

    makers = {name: functools.partial(columns.__getitem__, name) for name in columns.names if name != "terminated"}
    fields = {name: [name] for name in ("actions", "rewards", "terminals")}
    fields["observations"] = [name for name in columns.names if name.split("/")[0] == "observations"]
    return Arranged(Columns({**makers, "terminals": terminals}), fields, "column:episode")


def _is_d3rlpy_1(table: Table) -> bool:
    return isinstance(table, Hdf5Table) and {"episode_terminals", "terminals"} <= set(table.names)


def _d3rlpy_1(table: Table, wanted: Wanted) -> Arranged:
    def timeouts() -> np.ndarray:
        return _flags(table, "episode_terminals") & ~_flags(table, "terminals")

    return Arranged(_with(table, "timeouts", timeouts))


# -- D4RL: flat arrays with timeouts, and groups infos and metadata; collection stopped in mid-episode ----------------------


def _is_d4rl(table: Table) -> bool:
    groups = {name.split("/")[0] for name in table.names if "/" in name}
    flat = {"observations", "actions", "rewards", "terminals", "timeouts"}
    return isinstance(table, Hdf5Table) and bool(groups & {"infos", "metadata"}) and flat <= set(table.names)


def _d4rl(table: Table, wanted: Wanted) -> Arranged:
    timeouts = _flags(table, "timeouts")
    if not len(timeouts) or (timeouts | _flags(table, "terminals"))[-1].any():
        return Arranged(table)
    timeouts[-1] = True
    note = "the last row is not marked and counts as cut: it is left out, as D4RL does, unless its next observation is given"
    return Arranged(_with(table, "timeouts", lambda: timeouts), notes=[note])


def _with(table: Table, name: str, maker: Callable[[], Column]) -> Columns:
    """The table with another column."""
    return Columns({**{own: functools.partial(table.__getitem__, own) for own in table.names}, name: maker})


LAYOUTS = (
    Layout("robomimic", _is_robomimic, _robomimic),
    Layout("LeRobot", _is_lerobot, _lerobot),
    Layout("d3rlpy", _is_d3rlpy, _d3rlpy),
    Layout("d3rlpy 1", _is_d3rlpy_1, _d3rlpy_1),
    Layout("D4RL", _is_d4rl, _d4rl),
)
"""Every layout that is recognised, in the order in which they are tried."""


def _of_steps(name: str, column: Column, path: Path) -> np.ndarray:
    """One number of each step ``[E, T]``, of a column ``[E, T]`` or ``[E, T, 1]``."""
    if tuple(column.shape[2:]) not in ((), (1,)):
        raise InputError(
            f"{path}: {name} has shape {tuple(column.shape)}, expected one number a step, [episodes, steps]"
        )
    return np.asarray(column[0 : column.shape[0]]).reshape(column.shape[:2])


def unpadded(columns: Mapping[str, Column], mask: Column | None, *, path: Path) -> tuple[dict[str, Column], np.ndarray]:
    """Padded arrays ``[E, T, ...]`` as rows.

    Args:
        columns: field -> array.
        mask: nonzero where a row is valid ``[E, T]``; without it an episode ends with its first terminal or timeout.

    Keyword Args:
        path: the file.

    Returns:
        Field -> rows ``[N, ...]``, and the number of each row's episode ``[N]``.

    Raises:
        InputError: if an array has another shape, or the mask of an episode has a gap.
    """
    episodes, steps = tuple(columns["actions"].shape[:2])
    named = columns if mask is None else {**columns, "mask": mask}
    for name, column in named.items():
        if tuple(column.shape[:2]) != (episodes, steps):
            raise InputError(
                f"{path}: {name} has shape {tuple(column.shape)}, actions {tuple(columns['actions'].shape)}; padded arrays are "
                "[episodes, steps, ...]"
            )
    begins, lengths = np.zeros(episodes, np.int64), np.full(episodes, steps)
    if mask is not None:
        flags_of_rows = _of_steps("mask", mask, path)
        if flags_of_rows.dtype.kind not in "fiub" or np.isnan(flags_of_rows).any():
            raise InputError(f"{path}: mask has values that are no numbers, expected 0 or 1 for each step")
        valid = flags_of_rows != 0
        begins, lengths = valid.argmax(1), valid.sum(1)
        gaps = (
            np.take_along_axis(valid.cumsum(1), np.maximum(begins + lengths - 1, 0)[:, None] % steps, 1)[:, 0]
            != lengths
        )
        if gaps.any():
            raise InputError(
                f"{path}: the mask of episode {int(gaps.argmax())} has a gap; an episode's rows follow one another"
            )
    else:
        flags = {name: columns[name] for name in ("terminals", "timeouts") if name in columns}
        if flags:
            ended = sum(_of_steps(name, flag, path) != 0 for name, flag in flags.items()) > 0
            lengths = np.where(ended.any(1), ended.argmax(1) + 1, steps)
    kept = np.flatnonzero(lengths)

    def flat(column: Column) -> Column:
        held: list[Any] = [None, None]  # one episode: reading goes forward

        def rows_of(episode: int, rows: slice) -> np.ndarray:
            if held[0] != episode:
                held[:] = episode, np.asarray(column[episode : episode + 1])[0]
            begin = int(begins[episode])
            return held[1][begin : begin + int(lengths[episode])][rows]

        shape = tuple(column.shape[2:])
        parts = [
            LazyColumn((int(lengths[e]), *shape), np.dtype(column.dtype), functools.partial(rows_of, int(e)))
            for e in kept
        ]
        return joined(parts) if parts else np.zeros((0, *shape), column.dtype)

    return {name: flat(column) for name, column in columns.items()}, np.repeat(kept, lengths[kept])
