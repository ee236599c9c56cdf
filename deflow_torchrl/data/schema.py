# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One transition, one layout: TorchRL's TED, float32, checked once when loaded.

==============================  ==========  =======================================================================
entry                           shape       meaning
==============================  ==========  =======================================================================
``observation``                 ``[N, O]``  s
``action``                      ``[N, A]``  a, inside +-(1 - 1e-5)
``("next", "observation")``     ``[N, O]``  s'
``("next", "reward")``          ``[N, 1]``  r(s, a)
``("next", "terminated")``      ``[N, 1]``  bool: no bootstrap behind this transition
``("next", "truncated")``       ``[N, 1]``  bool: the trajectory was cut here, the bootstrap was not
``("next", "done")``            ``[N, 1]``  bool: terminated or truncated
==============================  ==========  =======================================================================
"""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from deflow_torchrl.errors import InputError

ACTION_LIMIT = 1.0 - 1e-5
"""The reference clips the data's actions to +-(1 - 1e-5)."""

ROUNDING = 1e-6
"""How far rounding may take an action beyond its bound before it counts as outside."""


def transitions_from_arrays(
    *,
    observations: np.ndarray,
    actions: np.ndarray,
    next_observations: np.ndarray,
    rewards: np.ndarray,
    masks: np.ndarray,
    trajectory_ends: np.ndarray,
    source: str,
) -> TensorDict:
    """Build and validate transitions from arrays with one row a transition.

    Args:
        observations: s, ``[N, O]``.
        actions: a, ``[N, A]``, inside [-1, 1]; clipped to +-(1 - 1e-5).
        next_observations: s', ``[N, O]``.
        rewards: r, ``[N]``.
        masks: 0 where the bootstrap is cut (``terminated``), else 1, ``[N]``.
        trajectory_ends: nonzero on the last transition of each trajectory, ``[N]``. An end that does not cut the
            bootstrap is ``truncated``.
        source: what the arrays are, for error messages.

    Raises:
        InputError: on an empty set, wrong shapes or types, NaN or infinity, or actions out of bounds.
    """
    length = len(actions)
    arrays = {
        "observations": observations,
        "actions": actions,
        "next_observations": next_observations,
        "rewards": rewards,
        "masks": masks,
        "trajectory_ends": trajectory_ends,
    }
    if length == 0:
        raise InputError(f"{source} holds no transition")
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise InputError(f"{source}: {name} has type {array.dtype}, expected numbers")
        if len(array) != length:
            raise InputError(f"{source}: {name} has {len(array)} rows, actions {length}")
        if name in ("rewards", "masks", "trajectory_ends") and array.size != length:
            raise InputError(f"{source}: {name} has shape {array.shape}, expected one number a row")
    if actions.dtype.kind != "f":
        raise InputError(f"{source}: actions have type {actions.dtype}, expected floating point in [-1, 1]")

    def column(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).reshape(length, 1)

    def floats(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    terminated = column(np.asarray(masks) == 0)
    truncated = column(np.asarray(trajectory_ends) != 0) & ~terminated
    transitions = TensorDict(
        {
            "observation": floats(observations),
            "action": floats(actions),
            "next": {
                "observation": floats(next_observations),
                "reward": floats(np.asarray(rewards).reshape(length, 1)),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
        },
        batch_size=[length],
    )
    validate_transitions(transitions, source=source)
    transitions["action"].clamp_(-ACTION_LIMIT, ACTION_LIMIT)
    return transitions


def validate_transitions(transitions: TensorDictBase, *, source: str) -> None:
    """Check shapes, types, finiteness and action bounds of transitions in the layout of this module.

    Args:
        transitions: batch size ``[N]``.
        source: what the transitions are, for error messages.

    Raises:
        InputError: naming the entry, the first bad row and what is wrong with it.
    """
    length = transitions.shape[0]
    if length == 0:
        raise InputError(f"{source} holds no transition")
    expected = {
        "observation": torch.float32,
        "action": torch.float32,
        ("next", "observation"): torch.float32,
        ("next", "reward"): torch.float32,
        ("next", "terminated"): torch.bool,
        ("next", "truncated"): torch.bool,
        ("next", "done"): torch.bool,
    }
    for key, dtype in expected.items():
        entry = transitions.get(key, None)
        name = key if isinstance(key, str) else ".".join(key)
        if entry is None:
            raise InputError(f"{source}: {name} is missing")
        if entry.dtype != dtype:
            raise InputError(f"{source}: {name} has type {entry.dtype}, expected {dtype}")
        columns = None if name.endswith(("observation", "action")) else 1
        if entry.ndim != 2 or entry.shape[1] < 1 or (columns and entry.shape[1] != columns):
            raise InputError(
                f"{source}: {name} has shape {tuple(entry.shape)}, expected [{length}, {columns or 'width'}]"
            )
        if dtype.is_floating_point and not bool(entry.isfinite().all()):
            row = int((~entry.isfinite()).any(-1).nonzero()[0])
            raise InputError(
                f"{source}: {name} has a NaN or infinite value in row {row}; repair or drop that trajectory"
            )
    if transitions["observation"].shape != transitions["next", "observation"].shape:
        raise InputError(f"{source}: observation and next.observation differ in shape")
    outside = transitions["action"].abs().amax(-1) > 1 + ROUNDING
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise InputError(
            f"{source}: {int(outside.sum())} actions leave [-1, 1], first in row {row}: "
            f"{transitions['action'][row].tolist()}; rescale the actions to [-1, 1]"
        )
