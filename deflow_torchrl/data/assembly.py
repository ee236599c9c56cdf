# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Rows of anybody's arrays as episodes: where they end, which rows have a successor, which observations are stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from deflow_torchrl.data.builder import TransitionBuilder
from deflow_torchrl.data.columns import Column, chunks, rows_a_chunk
from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.errors import InputError

# next_observations[i] and observations[i + 1] of one episode are the same number written twice; FQL's tolerance is 1e-6.
_SAME_ABSOLUTE, _SAME_RELATIVE = 1e-6, 1e-5


def dataset_from_arrays(
    *,
    observations: Column,
    actions: Column,
    rewards: Column,
    terminals: Column | None,
    timeouts: Column | None = None,
    next_observations: Column | None = None,
    episode_ends: Literal["discontinuity"] | int | Column | None = None,
    both: Literal["refuse", "terminal", "timeout"] = "refuse",
    final_observation_rows: bool = False,
    allow_jumps: bool | float = False,
    source: str = "the data",
    about: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> TransitionDataset:
    """Build and validate a :class:`TransitionDataset` from arrays with one row a step, episodes one after another.

    Arrays may be tensors, lists, or anything with a shape that gives consecutive rows for a slice (numpy, ``h5py``): vector and
    image columns are read a chunk at a time.

    Keyword Args:
        observations: s, ``[N, O]`` of any real type (float32 inside) or ``[N, H, W, C]`` uint8.
        actions: a, ``[N, A]`` floating point inside [-1, 1]; clipped to +-(1 - 1e-5).
        rewards: r, ``[N]`` or ``[N, 1]``.
        terminals: nonzero where the task ended (no bootstrap behind it), ``[N]``.
        timeouts: nonzero on the last row of an episode that was cut without an end of the task, ``[N]``.
        next_observations: s', like ``observations``. Without it s' is the next row's s; an episode's last row then has no
            successor: it is left out, except where it is terminal: its s' is never looked at, and s stands in for it.
        episode_ends: how ends are known that ``terminals`` and ``timeouts`` do not mark: an array ``[N]`` of episode numbers
            (an end where the number changes), an integer (every episode has that many rows), or ``"discontinuity"`` (an end
            where s' is not the next row's s; needs ``next_observations``). Never guessed: with ``None`` the flags mark them all.
        both: what a row flagged as terminal and as timeout is.
        final_observation_rows: each episode's last row holds its final observation only, and no action (OGBench's layout). Where
            ``terminals`` mark the ends, a terminal last row says that the transition into it terminates.
        allow_jumps: accept observations that jump inside an episode (:mod:`deflow_torchrl.data.continuity`: teleporters, wrapped
            angles, objects put back): all, or those up to a ratio.
        source: what the arrays are, for messages.
        about: what is known of the source, kept with the set.
        folder: existing folder for memory-mapped columns; in memory where ``None``.

    Returns:
        The set; what was clipped, left out or found twice stands in its ``report`` and ``about``.

    Raises:
        InputError: on fewer than two transitions, wrong shapes, lengths or types, NaN or infinity, actions out of bounds,
            episodes whose end is not marked, flags that contradict one another, or a jump inside an episode.
    """
    if both not in ("refuse", "terminal", "timeout"):
        raise InputError(f"both={both!r} is unknown; there are refuse, terminal and timeout")
    observations, actions, rewards = (
        _readable(name, array, source)
        for name, array in (("observations", observations), ("actions", actions), ("rewards", rewards))
    )
    terminals = _readable("terminals", terminals, source)
    timeouts = None if timeouts is None else _readable("timeouts", timeouts, source)
    next_observations = None if next_observations is None else _readable("next_observations", next_observations, source)
    _check_shapes(source, observations, actions, next_observations)
    length = actions.shape[0]
    reward = _numbers("rewards", rewards, length, source)  # a NaN is refused when its transition is stored
    terminal = _flags("terminals", terminals, length, source)
    timeout = None if timeouts is None else _flags("timeouts", timeouts, length, source)
    if timeout is not None and bool((terminal & timeout).any()):
        if both == "refuse":
            row = int((terminal & timeout).argmax())
            raise InputError(
                f"{source}: row {row} is flagged both as terminal and as timeout ({int((terminal & timeout).sum())} rows are); "
                "say which it is: both='terminal' or both='timeout' (--both terminal, --both timeout)"
            )
        if both == "timeout":
            terminal &= ~timeout
    ends = _ends(
        terminal, timeout, episode_ends, observations=observations, next_observations=next_observations, source=source
    )

    successor = np.ones(length, bool)  # whether the row is a transition
    if final_observation_rows:
        successor = ~ends
        if episode_ends is None:
            terminal[:-1] |= terminal[1:] & ends[1:] & ~ends[:-1]
    elif next_observations is None:
        successor = ~ends | terminal
    extra = ends & successor  # rows behind which a frame of their own is stored
    numbers = np.cumsum(successor) - successor  # transition number of each row
    first_rows = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    builder = TransitionBuilder(
        int(successor.sum()),
        frames=length + int(extra.sum()),
        observation_shape=tuple(observations.shape[1:]),
        observation_dtype=torch.uint8
        if np.dtype(observations.dtype) == np.uint8 and len(observations.shape) > 2
        else torch.float32,
        action_dim=actions.shape[1],
        source=source,
        folder=folder,
    )
    rows = rows_a_chunk(observations)
    followers = None if next_observations is None else chunks(next_observations, rows=rows)
    expected: np.ndarray | None = None  # s' of the last row, where the episode goes on
    for begin, part in chunks(observations, rows=rows):
        own = np.arange(begin, begin + len(part))
        if followers is None:
            final = part
        else:
            _, final = next(followers)
            expected = _check_successors(part, final, expected, ends[own], where=(source, begin))
        behind = np.flatnonzero(extra[own]) + 1
        frames = np.insert(part, behind, final[extra[own]], axis=0)
        builder.add_frames(frames, rows=np.insert(own, behind, own[extra[own]]))
    for begin, part in chunks(actions):
        own = np.arange(begin, begin + len(part))
        kept = successor[own]
        builder.add_actions(part[kept], rows=own[kept])
    kept_rows = np.flatnonzero(successor)
    builder.add_outcomes(reward[kept_rows], terminal[kept_rows], rows=kept_rows)
    dropped = 0 if final_observation_rows else int((~successor).sum())
    dataset = builder.finish(
        episode_starts=numbers[first_rows],
        about={**(about or {}), "rows": length, "rows_without_successor_left_out": dropped},
    )
    jump = None if dataset.report is None else dataset.report.jump
    if jump is not None and jump.ratio > _limit(allow_jumps):
        raise InputError(
            f"{source}: {jump}; mark the episode's end there (timeouts), or, if it belongs there (a teleporter, a wrapped "
            "angle, an object put back), say allow_jumps=True (--allow-jumps)"
        )
    return dataset


def _limit(allow_jumps: bool | float) -> float:
    if isinstance(allow_jumps, bool):
        return math.inf if allow_jumps else 0.0
    return allow_jumps


def _readable(name: str, array: Any, source: str) -> Any:
    """Tensors and lists as arrays; columns as they are."""
    if array is None:
        hint = "; give zeros if the task never ends (--never-terminates)" if name == "terminals" else ""
        raise InputError(f"{source}: {name} are missing{hint}")
    if isinstance(array, torch.Tensor):
        return array.detach().cpu().numpy()
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{source}: {name} are a masked array; fill or drop what is masked")
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        try:
            return np.asarray(array)
        except ValueError as error:
            raise InputError(f"{source}: {name} are no array ({error})") from error
    return array


def _check_shapes(source: str, observations: Column, actions: Column, next_observations: Column | None) -> None:
    columns = {"observations": observations, "actions": actions, "next_observations": next_observations}
    for name, column in columns.items():
        if column is None:
            continue
        dtype = np.dtype(column.dtype)
        if dtype.kind not in "fiub":
            raise InputError(f"{source}: {name} has type {dtype}, expected real numbers")
        dimensions = (2,) if name == "actions" else (2, 4)
        if len(column.shape) not in dimensions or 0 in column.shape[1:]:
            expected = "[N, A]" if name == "actions" else "[N, O], or [N, H, W, C] for uint8 images"
            raise InputError(f"{source}: {name} has shape {tuple(column.shape)}, expected {expected}")
        if len(column.shape) == 4 and dtype != np.uint8:
            raise InputError(f"{source}: {name} has shape {tuple(column.shape)} and type {dtype}; images must be uint8")
        if column.shape[0] != observations.shape[0]:
            raise InputError(f"{source}: {name} has {column.shape[0]} rows, observations {observations.shape[0]}")
    if np.dtype(actions.dtype).kind != "f":
        raise InputError(f"{source}: actions has type {np.dtype(actions.dtype)}, expected floating point in [-1, 1]")
    if next_observations is not None and next_observations.shape != observations.shape:
        raise InputError(f"{source}: observations and next_observations differ in shape")
    if actions.shape[0] == 0:
        raise InputError(f"{source} holds no transition")


def _numbers(name: str, column: Column, length: int, source: str) -> np.ndarray:
    if np.dtype(column.dtype).kind not in "fiub":
        raise InputError(f"{source}: {name} has type {np.dtype(column.dtype)}, expected real numbers")
    if tuple(column.shape) not in ((length,), (length, 1)):
        raise InputError(
            f"{source}: {name} has shape {tuple(column.shape)}, expected one number for each of {length} rows"
        )
    return np.asarray(column[0:length]).reshape(length)


def _flags(name: str, column: Column, length: int, source: str) -> np.ndarray:
    values = _numbers(name, column, length, source)
    odd = ~np.isin(values, (0, 1))
    if odd.any():
        row = int(odd.argmax())
        raise InputError(f"{source}: {name} is {values[row]:g} in row {row}, expected 0 or 1")
    return values != 0


def _ends(
    terminal: np.ndarray,
    timeout: np.ndarray | None,
    told: Any,
    *,
    observations: Column,
    next_observations: Column | None,
    source: str,
) -> np.ndarray:
    """Last rows of the episodes, bool ``[N]``."""
    length = len(terminal)
    flagged = terminal if timeout is None else terminal | timeout
    if told is None:
        if not flagged[-1]:
            raise InputError(
                f"{source}: the last row ends no episode (neither terminal nor timeout): the data are cut short or their ends "
                "are not marked; give timeouts, or say how ends are known (episode_ends, --ends)"
            )
        return flagged.copy()
    if isinstance(told, str):
        if told != "discontinuity":
            raise InputError(
                f"episode_ends={told!r} is unknown; there are 'discontinuity', a length and an array of numbers"
            )
        if next_observations is None:
            raise InputError(f"{source}: ends can be found by discontinuity only where next_observations are given")
        return _discontinuities(observations, next_observations) | flagged
    if isinstance(told, (int, np.integer)) and not isinstance(told, bool):
        if told < 2 or length % told:
            raise InputError(f"{source}: {length} rows are not whole episodes of {told} rows")
        ends = np.arange(1, length + 1) % told == 0
    else:
        numbers = np.asarray(_readable("episode_ends", told, source)[0:length]).reshape(-1)
        if len(numbers) != length:
            raise InputError(f"{source}: episode numbers for {len(numbers)} rows, there are {length}")
        ends = np.append(numbers[1:] != numbers[:-1], True)
        if numbers.dtype == bool or (np.isin(numbers, (0, 1)).all() and ends.sum() > 2):
            raise InputError(
                f"{source}: episode_ends are numbers of episodes, these look like flags of ends; give them as timeouts"
            )
    # A terminal row that is no end only cuts the bootstrap (OGBench's masks); a timeout has no other meaning than an end.
    if timeout is not None and bool((timeout & ~ends).any()):
        row = int((timeout & ~ends).argmax())
        raise InputError(f"{source}: row {row} is a timeout, but its episode goes on by episode_ends")
    return ends


def _discontinuities(observations: Column, next_observations: Column) -> np.ndarray:
    ends = np.zeros(observations.shape[0], bool)
    ends[-1] = True
    rows = rows_a_chunk(observations)
    before: np.ndarray | None = None
    for (begin, part), (_, following) in zip(
        chunks(observations, rows=rows), chunks(next_observations, rows=rows), strict=True
    ):
        inside = ~_same(following[:-1], part[1:])
        ends[begin : begin + len(inside)] |= inside
        if before is not None:
            ends[begin - 1] |= ~_same(before, part[:1])[0]
        before = following[-1:]
    return ends


def _same(following: np.ndarray, observations: np.ndarray) -> np.ndarray:
    """Whether each s' is the s beside it, bool ``[n]``."""
    # A NaN is no jump: it is refused by its own name when it is stored.
    with np.errstate(invalid="ignore"):
        unlike = np.abs(
            np.subtract(following, observations, dtype=_difference(observations.dtype))
        ) > _SAME_ABSOLUTE + _SAME_RELATIVE * np.abs(observations)
    return ~unlike.reshape(len(unlike), int(np.prod(unlike.shape[1:]))).any(1)


def _difference(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.kind == "f" else np.dtype(np.float32)


def _check_successors(
    part: np.ndarray, following: np.ndarray, expected: np.ndarray | None, ends: np.ndarray, *, where: tuple[str, int]
) -> np.ndarray | None:
    """Refuse a jump inside an episode; returns what the next chunk must begin with."""
    source, begin = where
    jumps = np.append(~_same(following[:-1], part[1:]), False) & ~ends
    row = begin + int(jumps.argmax()) if jumps.any() else None
    if expected is not None and not _same(expected, part[:1])[0]:
        row = begin - 1
    if row is not None:
        raise InputError(
            f"{source}: the observation jumps inside an episode: next_observations of row {row} is not the observation of row "
            f"{row + 1}; mark the episode's end there (timeouts), or say how ends are known (episode_ends='discontinuity', "
            "--ends discontinuity)"
        )
    return None if ends[-1] else following[-1:]
