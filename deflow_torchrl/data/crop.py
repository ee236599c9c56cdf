# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Augmentation of sampled pictures by a random crop, as FQL's code has it (https://github.com/seohongpark/fql)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.transforms import Transform

OFFSET_KEY = "crop_offset"


class RandomCrop(Transform):
    """Shift the pictures of a sampled batch by up to ``padding`` pixels, repeating the pixels at their edges.

    A picture is padded by its edge pixels and cut to its size again, from a row and column of its own, each uniform on
    0, ..., 2 padding; (padding, padding) leaves it as it is. One coin decides for the whole batch. The channels of a picture,
    its state and its next state are cropped alike. There is no interpolation: uint8 stays uint8.

    It belongs behind a replay buffer, not into an environment: acting and evaluation see whole pictures.

    Drawn from torch's global generator of the data's device are the coin (one number of U[0, 1)), then the offsets (``[B, 2]``
    integers), whatever the coin says; of S batches at once, ``[S, B]``, each has a coin of its own.
    With ``crop_offset [B, 2]`` in the batch, row and column of each sample, nothing is drawn and all are cropped.

    Args:
        padding: pixels on each side.
        probability: of a batch to be cropped.

    Keyword Args:
        in_keys: entries to crop; those that are missing or are not ``[*B, H, W, C]`` stay as they are. Defaults to
            ``("observation", ("next", "observation"))``.

    Raises:
        ValueError: on a negative padding or a probability outside [0, 1]; by calls, on other offsets, or in an environment.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> pictures = torch.randint(0, 256, (10, 16, 16, 3), dtype=torch.uint8)
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=4, transform=RandomCrop(2))
        >>> _ = buffer.extend(TensorDict(observation=pictures, batch_size=[10]))
        >>> buffer.sample()["observation"].shape
        torch.Size([4, 16, 16, 3])
    """

    def __init__(
        self,
        padding: int = 3,
        probability: float = 0.5,
        *,
        in_keys: Sequence[NestedKey] = ("observation", ("next", "observation")),
    ) -> None:
        if padding < 0 or not 0 <= probability <= 1:
            raise ValueError(
                f"padding must not be negative and probability lie in [0, 1], got {padding} and {probability}"
            )
        super().__init__(in_keys=list(in_keys), out_keys=list(in_keys))
        self.padding = padding
        self.probability = probability

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Crop the pictures of a batch ``[*B]``."""
        entries = {key: tensordict.get(key, None) for key in self.in_keys}
        pictures = {key: it for key, it in entries.items() if it is not None and it.ndim == tensordict.ndim + 3}
        if not pictures:
            return tensordict
        offset = self._offset(tensordict, next(iter(pictures.values())).device)
        if offset is not None:
            for key, value in pictures.items():
                tensordict.set(key, crop(value, offset, self.padding))
        return tensordict

    def _offset(self, tensordict: TensorDictBase, device: torch.device) -> Tensor | None:
        """Row and column of each sample, None where nothing is cropped."""
        shape = (*tensordict.batch_size, 2)
        given = tensordict.get(OFFSET_KEY, None)
        if given is not None:
            # On an accelerator the host would wait for the numbers.
            numbers = given if given.device.type == "cpu" else given[:0]
            if (
                given.shape != shape
                or given.is_floating_point()
                or bool(((numbers < 0) | (numbers > 2 * self.padding)).any())
            ):
                raise ValueError(
                    f"{OFFSET_KEY} must be integers {list(shape)} from 0 to {2 * self.padding}, got {given.dtype} "
                    f"{list(given.shape)}"
                )
            return given.to(device)
        falls = torch.rand(tensordict.batch_size[:-1], device=device) < self.probability
        offset = torch.randint(0, 2 * self.padding + 1, shape, device=device)
        if device.type == "cpu" and not falls.any():
            return None  # on an accelerator the host would wait for the coin
        return torch.where(falls.reshape(*falls.shape, *(1,) * (offset.ndim - falls.ndim)), offset, self.padding)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        raise ValueError("RandomCrop is a transform of replay buffers; environments show whole pictures")

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Any) -> Any:
        """The spec as it is: sizes and types stay."""
        return observation_spec


def crop(pictures: Tensor, offset: Tensor, padding: int) -> Tensor:
    """Cut windows of their own size from pictures ``[*B, H, W, C]`` whose edges are repeated.

    Args:
        pictures: numbers of any type.
        offset: row and column ``[*B, 2]`` at which each window starts in the padded picture, 0 to 2 padding.
        padding: pixels on each side.
    """
    height, width, channels = pictures.shape[-3:]
    rows, columns = offset.reshape(-1, 2).unbind(-1)
    # Repeating edge pixels is the same as reading from the nearest row and column there is.
    row = (torch.arange(height, device=offset.device) + rows[:, None] - padding).clamp(0, height - 1)
    column = (torch.arange(width, device=offset.device) + columns[:, None] - padding).clamp(0, width - 1)
    first = torch.arange(len(rows), device=offset.device)[:, None, None] * (height * width)
    index = first + row[:, :, None] * width + column[:, None, :]
    # One copy of C numbers for each pixel: a quarter of the time of pictures[batch, row, column].
    return pictures.reshape(-1, channels).index_select(0, index.flatten()).reshape(pictures.shape)
