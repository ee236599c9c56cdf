# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Flatten observations to one array, in the same way for recorded data and for environments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError


@dataclass(frozen=True)
class ObservationLayout:
    """Order of an observation's entries in the flat array.

    Attributes:
        entries: path of keys and shape of each entry, in order; the path is empty if the observation is one array.
        shape: shape of the array, ``[O]``, or ``[H, W, C]`` for an image.
        dtype: ``float32``, or ``uint8`` for an image.
    """

    entries: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        names = ", ".join(f"{'/'.join(path) or 'observation'} ({math.prod(shape)})" for path, shape in self.entries)
        return f"{list(self.shape)} of {names}"


def observation_layout(space: Any, observation_keys: Sequence[str] | None = None, *, source: str) -> ObservationLayout:
    """Lay out an observation space.

    The entries of a ``Dict`` space are in the space's order, which is sorted; those of a nested ``Dict`` take the place of its
    key. ``observation_keys`` selects and orders entries instead: a key names an entry, or all entries of a nested ``Dict``;
    ``outer/inner`` names an entry of a nested one.

    Args:
        space: a gymnasium ``Box``, ``MultiBinary``, or ``Dict`` of these. An image (``Box`` of uint8 with three
            dimensions) is not flattened, and must be the only entry.
        observation_keys: keys of a ``Dict`` space.

    Keyword Args:
        source: owner of the space, for error messages.

    Raises:
        InputError: on a space of another kind, an unknown or repeated key, or an image beside other entries.
    """
    from gymnasium import spaces

    if observation_keys is not None and not isinstance(space, spaces.Dict):
        raise InputError(f"{source}: observation_keys are for observations that are dictionaries; this one is {space}")
    if isinstance(observation_keys, str):
        raise InputError(f"{source}: observation_keys must be a list of keys, got the text {observation_keys!r}")

    def leaves(part: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        if isinstance(part, spaces.Dict):
            for key in part.spaces:
                yield from leaves(part.spaces[key], (*path, key))
        elif isinstance(part, (spaces.Box, spaces.MultiBinary)):
            yield path, part
        else:
            where = f"entry {'/'.join(path)!r}" if path else "the observation"
            raise InputError(
                f"{source}: {where} is {part}; only Box, MultiBinary and Dict observations of numbers can be used"
                + ("; leave it out with observation_keys" if path else "")
            )

    found: list[tuple[tuple[str, ...], Any]] = []
    for key in [None] if observation_keys is None else observation_keys:
        part, path = space, () if key is None else tuple(key.split("/"))
        for depth, name in enumerate(path):
            if not isinstance(part, spaces.Dict) or name not in part.spaces:
                known = ", ".join(part.spaces) if isinstance(part, spaces.Dict) else "no entries"
                raise InputError(f"{source}: no observation {'/'.join(path[: depth + 1])!r}; there are {known}")
            part = part.spaces[name]
        found.extend(leaves(part, path))
    paths = [path for path, _ in found]
    if len(set(paths)) < len(paths) or not found:
        raise InputError(
            f"{source}: observation_keys {list(observation_keys or [])} name an entry twice or none at all"
        )
    entries = tuple((path, tuple(part.shape)) for path, part in found)
    image = [path for path, part in found if part.dtype == np.uint8 and len(part.shape) == 3]
    if image and len(found) > 1:
        raise InputError(
            f"{source}: the image {'/'.join(image[0])!r} cannot stand beside other entries; "
            "choose it alone, or the others, with observation_keys"
        )
    if image:
        return ObservationLayout(entries, entries[0][1], np.dtype(np.uint8))
    return ObservationLayout(entries, (sum(math.prod(shape) for _, shape in entries),), np.dtype(np.float32))


def flatten_observation(observation: Any, layout: ObservationLayout) -> np.ndarray:
    """Flatten an observation, or many whose entries have leading batch dimensions.

    Args:
        observation: an array, or a (nested) dictionary of arrays, each ``[..., *shape]``, with the shape of its entry.
        layout: layout of the space.

    Returns:
        ``[..., *layout.shape]`` of type ``layout.dtype``.

    Raises:
        InputError: if an entry is missing or has another shape.
    """
    parts = []
    for path, shape in layout.entries:
        part = observation
        for key in path:
            if not isinstance(part, dict) or key not in part:
                raise InputError(f"an observation lacks the entry {'/'.join(path)!r}")
            part = part[key]
        array = np.asarray(part)
        front = array.ndim - len(shape)
        if front < 0 or array.shape[front:] != shape:
            raise InputError(f"observation {'/'.join(path)!r} has shape {array.shape}, expected it to end in {shape}")
        if array.dtype.kind not in "fiub":
            raise InputError(f"observation {'/'.join(path)!r} has type {array.dtype}, expected numbers")
        flat = array if len(layout.shape) == 3 else array.reshape(*array.shape[:front], -1)
        parts.append(flat.astype(layout.dtype, copy=False))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
