# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Arrays with one row a step, split into episodes: where they end, which rows have a successor, which observations are stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch

from deflow_torchrl.data.checks import check_pictures
from deflow_torchrl.data.columns import Column, as_column, chunks, rows_a_chunk
from deflow_torchrl.data.packed import entries_of, packed_columns
from deflow_torchrl.entries import Entries
from deflow_torchrl.errors import InputError

# next_observations[i] and observations[i + 1] of one episode are the same number written twice; FQL's tolerance is 1e-6.
_SAME_ABSOLUTE, _SAME_RELATIVE = 1e-6, 1e-5
REWARDS = ("success-at-end", "zero")
"""Rewards that stand in where the data have none."""


def fill_from_arrays(
    make_builder: Callable[..., Any],
    *,
    observations: Any,
    actions: Column,
    rewards: Column | Literal["success-at-end", "zero"],
    terminals: Column | None,
    timeouts: Column | None = None,
    next_observations: Any = None,
    episode_ends: Literal["discontinuity"] | int | Column | None = None,
    both: Literal["refuse", "terminal", "timeout"] = "refuse",
    final_observation_rows: bool = False,
    allow_jumps: bool | float = False,
    source: str = "the data",
    about: dict[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Any:
    """Fill a builder (:class:`deflow_torchrl.data.TransitionBuilder`) from arrays with one row a step, and finish it.

    The arrays and options are those of :meth:`deflow_torchrl.data.TransitionDataset.from_arrays`.
    """
    about = dict(about or {})
    tolerance = same_relative(observations, next_observations)
    if isinstance(observations, Mapping) or isinstance(next_observations, Mapping):
        observations, next_observations, about["entries"] = packed_columns(
            observations, next_observations, source=source
        )
    entries = about.get("entries")
    observations, actions = as_column("observations", observations, source), as_column("actions", actions, source)
    if next_observations is not None:
        next_observations = as_column("next_observations", next_observations, source)
    _check_shapes(source, observations, actions, next_observations)
    length = actions.shape[0]
    reward, terminal, timeout = _outcomes(rewards, terminals, timeouts, both, length=length, source=source)
    ends = _ends(
        terminal,
        timeout,
        episode_ends,
        observations,
        next_observations,
        source=source,
        tolerance=tolerance,
        entries=entries,
    )

    if isinstance(rewards, str) and rewards == REWARDS[0]:
        reached = np.append(ends[1:], False) & ~ends if final_observation_rows else ends
        reward, terminal = reached.astype(np.float64), terminal | reached
    successor = np.ones(length, bool)  # whether the row is a transition
    if final_observation_rows:
        successor = ~ends
        if episode_ends is None:
            terminal[:-1] |= terminal[1:] & ends[1:] & ~ends[:-1]
    elif next_observations is None:
        successor = ~ends | terminal
    if not successor.any() and not final_observation_rows:
        raise InputError(
            f"{source} holds no transition: each of its {length} episodes has a single row, and what follows it is not given; "
            "give next_observations"
        )
    extra = ends & successor  # rows after which a frame of their own is stored
    numbers = np.cumsum(successor) - successor  # transition number of each row
    first_rows = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    images = np.dtype(observations.dtype) == np.uint8 and (len(observations.shape) > 2 or entries is not None)
    builder = make_builder(
        int(successor.sum()),
        frames=length + int(extra.sum()),
        observation_shape=tuple(observations.shape[1:]),
        observation_dtype=torch.uint8 if images else torch.float32,
        action_dim=actions.shape[1],
        source=source,
        folder=folder,
    )
    for own, part, final in _frames(
        observations, next_observations, ends, terminal, tolerance=tolerance, source=source, entries=entries
    ):
        after = np.flatnonzero(extra[own]) + 1
        wide = (
            part if images else part.astype(np.result_type(part, final), copy=False)
        )  # np.insert takes the first's type
        frames = np.insert(wide, after, final[extra[own]], axis=0)
        builder.add_frames(frames, rows=np.insert(own, after, own[extra[own]]))
    for begin, part in chunks(actions):
        own = np.arange(begin, begin + len(part))
        kept = successor[own]
        builder.add_actions(part[kept], rows=own[kept])
    kept_rows = np.flatnonzero(successor)
    builder.add_outcomes(reward[kept_rows], terminal[kept_rows], rows=kept_rows)
    dropped = 0 if final_observation_rows else int((~successor).sum())
    return builder.finish(
        episode_starts=numbers[first_rows],
        about={**about, "rows": length, "rows_without_successor_left_out": dropped},
        allow_jumps=allow_jumps,
    )


def _outcomes(
    rewards: Any, terminals: Any, timeouts: Any, both: str, *, length: int, source: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards and flags, each ``[N]``."""
    if both not in ("refuse", "terminal", "timeout"):
        raise InputError(f"both={both!r} is unknown; there are refuse, terminal and timeout")
    if isinstance(rewards, str):
        if rewards not in REWARDS:
            raise InputError(f"rewards={rewards!r} is unknown; there are an array, {' and '.join(REWARDS)}")
        reward = np.zeros(length)
    elif terminals is None:
        raise InputError(f"{source}: terminals are missing; give zeros if the task never ends (--never-terminates)")
    else:
        reward = _numbers("rewards", rewards, length, source)  # a NaN is refused when its transition is stored
    terminal, timeout = (
        np.zeros(length, bool) if flags is None else _flags(name, flags, length, source)
        for name, flags in (("terminals", terminals), ("timeouts", timeouts))
    )
    if (doubtful := terminal & timeout).any():
        if both == "refuse":
            raise InputError(
                f"{source}: row {int(doubtful.argmax())} is flagged both as terminal and as timeout ({int(doubtful.sum())} rows "
                "are); say which it is: both='terminal' or both='timeout' (--both terminal, --both timeout)"
            )
        if both == "timeout":
            terminal &= ~timeout
    return reward, terminal, timeout


def _frames(
    observations: Column,
    next_observations: Column | None,
    ends: np.ndarray,
    terminal: np.ndarray,
    *,
    tolerance: float,
    source: str,
    entries: Entries | None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (row numbers, s, s') some megabytes at a time; s stands in where s' is not given."""
    rows = rows_a_chunk(observations)
    followers = None if next_observations is None else chunks(next_observations, rows=rows)
    before: np.ndarray | None = None  # s' of the row before the chunk
    for begin, part in chunks(observations, rows=rows):
        own = np.arange(begin, begin + len(part))
        final = part
        for name, values in entries_of(part, entries).items() if entries else ():
            _check_finite(f"observations {name!r}", values, np.zeros(len(part), bool), own, source)
        if followers is not None:
            final = _without_placeholders(part, next(followers)[1], terminal[own], own, source=source, entries=entries)
            jumps = ~_follows(part, final, before, tolerance, entries) & ~ends[own - 1]
            if jumps.any():
                row = begin + int(jumps.argmax())
                raise InputError(
                    f"{source}: the observation jumps inside an episode: next_observations of row {row - 1} is not the "
                    f"observation of row {row}; mark the episode's end there (timeouts), or say how ends are known "
                    "(episode_ends='discontinuity', --ends discontinuity)"
                )
            before = final[-1:]
        yield own, part, final


def _without_placeholders(
    part: np.ndarray, final: np.ndarray, terminal: np.ndarray, rows: np.ndarray, *, source: str, entries: Entries | None
) -> np.ndarray:
    """Put s in the place of NaN in the s' of terminal rows, which nobody looks behind; refuse NaN elsewhere and infinity."""
    if entries:
        final = final.copy()
        own = entries_of(part, entries)
        for name, values in entries_of(final, entries).items():
            missing = _check_finite(f"next_observations {name!r}", values, terminal, rows, source)
            values[missing] = own[name][missing]
        return final
    missing = _check_finite("next_observations", final, terminal, rows, source)
    return np.where(missing.reshape(-1, *[1] * (final.ndim - 1)), part, final) if missing.any() else final


def _check_finite(name: str, values: np.ndarray, terminal: np.ndarray, rows: np.ndarray, source: str) -> np.ndarray:
    """Find the rows with a NaN, bool ``[n]``; refuse those that are not terminal, and infinity."""
    if values.dtype.kind != "f":
        return np.zeros(len(values), bool)
    flat = values.reshape(len(values), -1)
    missing = np.isnan(flat).any(1)
    if (bad := np.isinf(flat).any(1) | (missing & ~terminal)).any():
        first = bad.argmax()
        where = "" if terminal[first] or not name.startswith("next") else ", which is not terminal"
        raise InputError(
            f"{source}: {name} has a NaN or infinite value in row {rows[first]}{where}; repair or drop that trajectory"
        )
    return missing


def _check_shapes(source: str, observations: Column, actions: Column, next_observations: Column | None) -> None:
    for name, column in (
        ("observations", observations),
        ("actions", actions),
        ("next_observations", next_observations),
    ):
        if column is None:
            continue
        dtype, shape = np.dtype(column.dtype), tuple(column.shape)
        if dtype.kind not in "fiub":
            raise InputError(f"{source}: {name} has type {dtype}, expected real numbers")
        if len(shape) not in ((2,) if name == "actions" else (2, 4)) or 0 in shape[1:]:
            expected = "[N, A]" if name == "actions" else "[N, O], or [N, H, W, C] for uint8 images"
            if len(actions.shape) == 3:
                expected += (
                    "; of padded [episodes, steps, ...] keep the valid rows, array[mask], or import them with --padded"
                )
            raise InputError(f"{source}: {name} has shape {shape}, expected {expected}")
        if len(shape) == 4:
            check_pictures(name, shape, dtype, source=source)
        if shape[0] != observations.shape[0]:
            raise InputError(f"{source}: {name} has {shape[0]} rows, observations {observations.shape[0]}")
    if np.dtype(actions.dtype).kind != "f":
        raise InputError(f"{source}: actions has type {np.dtype(actions.dtype)}, expected floating point in [-1, 1]")
    if next_observations is not None and next_observations.shape != observations.shape:
        raise InputError(f"{source}: observations and next_observations differ in shape")
    if actions.shape[0] == 0:
        raise InputError(f"{source} holds no transition")


def _numbers(name: str, column: Column, length: int, source: str) -> np.ndarray:
    column = as_column(name, column, source)
    if np.dtype(column.dtype).kind not in "fiub":
        raise InputError(f"{source}: {name} has type {np.dtype(column.dtype)}, expected real numbers")
    if tuple(column.shape) not in ((length,), (length, 1)):
        raise InputError(
            f"{source}: {name} has shape {tuple(column.shape)}, expected one number for each of {length} rows"
        )
    return np.asarray(column[0:length]).reshape(length)


def _flags(name: str, column: Column, length: int, source: str) -> np.ndarray:
    values = _numbers(name, column, length, source)
    if (odd := ~np.isin(values, (0, 1))).any():
        row = int(odd.argmax())
        raise InputError(f"{source}: {name} is {values[row]:g} in row {row}, expected 0 or 1")
    return values != 0


def _ends(
    terminal: np.ndarray,
    timeout: np.ndarray,
    told: Any,
    observations: Column,
    next_observations: Column | None,
    *,
    source: str,
    tolerance: float,
    entries: Entries | None,
) -> np.ndarray:
    """Find the last rows of the episodes, bool ``[N]``."""
    length, flagged = len(terminal), terminal | timeout
    if told is None:
        if not flagged[-1]:
            raise InputError(
                f"{source}: the last row ends no episode (neither terminal nor timeout): the data are cut short or their ends "
                "are not marked; give timeouts, or say how ends are known (episode_ends, --ends)"
            )
        return flagged
    if isinstance(told, str):
        if told != "discontinuity":
            raise InputError(
                f"episode_ends={told!r} is unknown; there are 'discontinuity', a length and an array of numbers"
            )
        if next_observations is None:
            raise InputError(f"{source}: ends can be found by discontinuity only where next_observations are given")
        return discontinuities(observations, next_observations, tolerance, entries) | flagged
    if isinstance(told, (int, np.integer)) and not isinstance(told, bool):
        if told < 2 or length % told:
            raise InputError(f"{source}: {length} rows are not whole episodes of {told} rows")
        ends = np.arange(1, length + 1) % told == 0
    else:
        column = as_column("episode_ends", told, source)
        numbers = np.asarray(column[0:length]).reshape(-1) if column.shape else np.zeros(0)
        if len(numbers) != length:
            raise InputError(f"{source}: episode numbers for {len(numbers)} rows, there are {length}")
        ends = np.append(numbers[1:] != numbers[:-1], True)
        if numbers.dtype == bool or (np.isin(numbers, (0, 1)).all() and ends.sum() > 2):
            raise InputError(
                f"{source}: episode_ends are numbers of episodes, these look like flags of ends; give them as timeouts"
            )
    # A terminal row inside an episode only cuts the bootstrap (OGBench's masks); a timeout always is an end.
    if (inside := timeout & ~ends).any():
        raise InputError(f"{source}: row {int(inside.argmax())} is a timeout, but its episode goes on by episode_ends")
    return ends


def discontinuities(
    observations: Column,
    next_observations: Column,
    tolerance: float = _SAME_RELATIVE,
    entries: Entries | None = None,
) -> np.ndarray:
    """Find the rows whose s' is not the next row's s up to a relative ``tolerance``, and the last row, bool ``[N]``.

    ``entries`` are those of packed observations, which are compared one by one.
    """
    ends = np.zeros(observations.shape[0], bool)
    ends[-1] = True
    rows = rows_a_chunk(observations)
    before: np.ndarray | None = None
    for (begin, part), (_, following) in zip(
        chunks(observations, rows=rows), chunks(next_observations, rows=rows), strict=True
    ):
        ends[begin - 1 + np.flatnonzero(~_follows(part, following, before, tolerance, entries))] = True
        before = following[-1:]
    return ends


def same_relative(observations: Any, next_observations: Any) -> float:
    """The relative difference of numbers that are equal but were rounded to two types; of several observations the largest."""
    own, following = (getattr(arrays, "columns", arrays) for arrays in (observations, next_observations))
    if isinstance(own, Mapping) and isinstance(following, Mapping):
        return max((same_relative(own[name], following[name]) for name in own.keys() & following.keys()), default=0.0)
    steps = [_rounding(array) for array in (observations, next_observations)]
    return max(_SAME_RELATIVE, *steps) if steps[0] != steps[1] else _SAME_RELATIVE


def _rounding(array: Any) -> float:
    first = array[0] if isinstance(array, (list, tuple)) and array else array
    dtype = getattr(first, "dtype", None)
    if str(dtype) == "bfloat16":  # of ml_dtypes
        dtype = torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return float(np.finfo(dtype).eps) if dtype is not None and np.dtype(dtype).kind == "f" else 0.0


def _follows(
    part: np.ndarray,
    following: np.ndarray,
    before: np.ndarray | None,
    tolerance: float,
    entries: Entries | None = None,
) -> np.ndarray:
    """Compare each row's s with the s' of the row before it, bool ``[n]``; a row without one (``before``) counts as equal."""
    previous = np.concatenate([part[:1] if before is None else before, following[:-1]])
    if not entries:
        return ~_differ(previous, part, tolerance)
    pairs = zip(entries_of(previous, entries).values(), entries_of(part, entries).values(), strict=True)
    return ~np.any([_differ(one, other, tolerance) for one, other in pairs], axis=0)


def _differ(previous: np.ndarray, part: np.ndarray, tolerance: float) -> np.ndarray:
    if previous.dtype == part.dtype == np.uint8:
        return (previous != part).reshape(len(part), -1).any(1)
    dtype = part.dtype.newbyteorder("=") if part.dtype.kind == "f" else np.dtype(np.float32)
    # A NaN is no jump: it is refused by its own name when it is stored.
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(np.subtract(previous, part, dtype=dtype))
        jumps = difference > _SAME_ABSOLUTE + tolerance * np.abs(part)
    return jumps.reshape(len(part), -1).any(1)
