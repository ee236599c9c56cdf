# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Arrays with one row a step, split into episodes: where they end, which rows have a successor, which observations are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from deflow_torchrl.data.checks import check_pictures
from deflow_torchrl.data.columns import Column, chunks, rows_a_chunk
from deflow_torchrl.errors import InputError

# next_observations[i] and observations[i + 1] of one episode are the same number written twice; FQL's tolerance is 1e-6.
_SAME_ABSOLUTE, _SAME_RELATIVE = 1e-6, 1e-5


def fill_from_arrays(
    make_builder: Callable[..., Any],
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
) -> Any:
    """Fill a builder (:class:`deflow_torchrl.data.TransitionBuilder`) from arrays with one row a step, and finish it.

    The arrays and options are those of :meth:`deflow_torchrl.data.TransitionDataset.from_arrays`.
    """
    if both not in ("refuse", "terminal", "timeout"):
        raise InputError(f"both={both!r} is unknown; there are refuse, terminal and timeout")
    observations, actions, rewards, terminals = (
        _readable(name, array, source)
        for name, array in (
            ("observations", observations),
            ("actions", actions),
            ("rewards", rewards),
            ("terminals", terminals),
        )
    )
    timeouts = None if timeouts is None else _readable("timeouts", timeouts, source)
    next_observations = None if next_observations is None else _readable("next_observations", next_observations, source)
    _check_shapes(source, observations, actions, next_observations)
    length = actions.shape[0]
    reward = _numbers("rewards", rewards, length, source)  # a NaN is refused when its transition is stored
    terminal = _flags("terminals", terminals, length, source)
    timeout = np.zeros(length, bool) if timeouts is None else _flags("timeouts", timeouts, length, source)
    if (doubtful := terminal & timeout).any():
        if both == "refuse":
            raise InputError(
                f"{source}: row {int(doubtful.argmax())} is flagged both as terminal and as timeout ({int(doubtful.sum())} rows "
                "are); say which it is: both='terminal' or both='timeout' (--both terminal, --both timeout)"
            )
        if both == "timeout":
            terminal &= ~timeout
    ends = _ends(terminal, timeout, episode_ends, observations, next_observations, source=source)

    successor = np.ones(length, bool)  # whether the row is a transition
    if final_observation_rows:
        successor = ~ends
        if episode_ends is None:
            terminal[:-1] |= terminal[1:] & ends[1:] & ~ends[:-1]
    elif next_observations is None:
        successor = ~ends | terminal
    extra = ends & successor  # rows after which a frame of their own is stored
    numbers = np.cumsum(successor) - successor  # transition number of each row
    first_rows = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    images = np.dtype(observations.dtype) == np.uint8 and len(observations.shape) > 2
    builder = make_builder(
        int(successor.sum()),
        frames=length + int(extra.sum()),
        observation_shape=tuple(observations.shape[1:]),
        observation_dtype=torch.uint8 if images else torch.float32,
        action_dim=actions.shape[1],
        source=source,
        folder=folder,
    )
    rows = rows_a_chunk(observations)
    followers = None if next_observations is None else chunks(next_observations, rows=rows)
    before: np.ndarray | None = None  # s' of the row before the chunk
    for begin, part in chunks(observations, rows=rows):
        own = np.arange(begin, begin + len(part))
        final = part
        if followers is not None:
            _, final = next(followers)
            jumps = ~_follows(part, final, before) & ~ends[own - 1]
            if jumps.any():
                row = begin + int(jumps.argmax())
                raise InputError(
                    f"{source}: the observation jumps inside an episode: next_observations of row {row - 1} is not the "
                    f"observation of row {row}; mark the episode's end there (timeouts), or say how ends are known "
                    "(episode_ends='discontinuity', --ends discontinuity)"
                )
            before = final[-1:]
        after = np.flatnonzero(extra[own]) + 1
        frames = np.insert(part, after, final[extra[own]], axis=0)
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
        about={**(about or {}), "rows": length, "rows_without_successor_left_out": dropped},
        allow_jumps=allow_jumps,
    )


def _readable(name: str, array: Any, source: str) -> Any:
    """Tensors and lists as arrays; columns as they are."""
    if array is None:
        hint = "; give zeros if the task never ends (--never-terminates)" if name == "terminals" else ""
        raise InputError(f"{source}: {name} are missing{hint}")
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()  # numpy has no bfloat16
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{source}: {name} are a masked array; fill or drop what is masked")
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        try:
            return np.asarray(array)
        except ValueError as error:
            raise InputError(f"{source}: {name} are no array ({error})") from error
    return array


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
        return discontinuities(observations, next_observations) | flagged
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
    # A terminal row inside an episode only cuts the bootstrap (OGBench's masks); a timeout always is an end.
    if (inside := timeout & ~ends).any():
        raise InputError(f"{source}: row {int(inside.argmax())} is a timeout, but its episode goes on by episode_ends")
    return ends


def discontinuities(observations: Column, next_observations: Column) -> np.ndarray:
    """Find the rows whose s' is not the next row's s, and the last row, bool ``[N]``."""
    ends = np.zeros(observations.shape[0], bool)
    ends[-1] = True
    rows = rows_a_chunk(observations)
    before: np.ndarray | None = None
    for (begin, part), (_, following) in zip(
        chunks(observations, rows=rows), chunks(next_observations, rows=rows), strict=True
    ):
        ends[begin - 1 + np.flatnonzero(~_follows(part, following, before))] = True
        before = following[-1:]
    return ends


def _follows(part: np.ndarray, following: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Compare each row's s with the s' of the row before it, bool ``[n]``; a row without one (``before``) counts as equal."""
    previous = np.concatenate([part[:1] if before is None else before, following[:-1]])
    dtype = part.dtype if part.dtype.kind == "f" else np.dtype(np.float32)
    # A NaN is no jump: it is refused by its own name when it is stored.
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.subtract(previous, part, dtype=dtype))
        jumps = difference > _SAME_ABSOLUTE + _SAME_RELATIVE * np.abs(part)
    return ~jumps.reshape(len(part), -1).any(1)
