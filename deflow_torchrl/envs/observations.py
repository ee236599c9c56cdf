# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""One way to make one array of an observation, for recorded data and for environments alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deflow_torchrl.errors import InputError


@dataclass(frozen=True)
class ObservationLayout:
    """Which entries of an observation stand where in the array made of it.

    Attributes:
        entries: path of keys and shape of each entry, in order; the path is empty where the observation is one array.
        shape: of the array: ``[O]``, or ``[H, W, C]`` of an image.
        dtype: ``float32``, or ``uint8`` of an image.
    """

    entries: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        names = ", ".join(f"{'/'.join(path) or 'observation'} ({math.prod(shape)})" for path, shape in self.entries)
        return f"{list(self.shape)} of {names}"


def observation_layout(space: Any, observation_keys: Sequence[str] | None = None, *, source: str) -> ObservationLayout:
    """Lay out an observation space.

    The entries of a ``Dict`` space stand in the space's own order, which is the sorted one; those of a nested ``Dict`` where
    its key stands. ``observation_keys`` chooses and orders them instead: a key names an entry, or all entries of a nested
    ``Dict``; ``outer/inner`` names one inside.

    Args:
        space: a gymnasium ``Box``, ``MultiBinary``, or ``Dict`` of such. An image (``Box`` of uint8 with three
            dimensions) stays as it is, and stands alone.
        observation_keys: keys of a ``Dict`` space.

    Keyword Args:
        source: what the space is of, for error messages.

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
    """Make one array of an observation, or of many whose entries have more dimensions in front.

    Args:
        observation: an array, or a (nested) dictionary of arrays, each ``[..., *shape]`` of its entry.
        layout: of its space.

    Returns:
        ``[..., *layout.shape]`` of type ``layout.dtype``.

    Raises:
        InputError: where an entry is missing or has another shape.
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
