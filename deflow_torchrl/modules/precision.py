# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Precision of the matrix products inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Precision = Literal["highest", "high", "medium", "bfloat16"]


def check_precision(name: str) -> None:
    """Raise ValueError unless it is a :data:`Precision`."""
    if name not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {name!r}")


@contextmanager
def matmul_precision(name: Precision, device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products of the block with fewer digits; their inputs and results stay float32.

    Args:
        name: ``highest`` leaves everything as it is; ``high`` and ``medium`` are those of
            :func:`torch.set_float32_matmul_precision` (TF32 on a GPU; on a CPU, where it has the instructions, ``medium`` is
            bfloat16); ``bfloat16`` runs the networks under autocast.
        device: where they are computed.
    """
    if name == "highest":
        yield
    elif name == "bfloat16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
