# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Reader that copies ``info["success"]`` into TorchRL's step data."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Binary
from torchrl.envs.gym_like import BaseInfoDictReader


class SuccessReader(BaseInfoDictReader):
    """Write ``success`` (bool ``[1]``): false at a reset, then the simulator's value.

    TorchRL's default reader needs arrays; OGBench's ``success`` is a Python bool.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        """Add the entry to ``tensordict``."""
        success = bool(info_dict.get("success", False))
        return tensordict.set("success", torch.tensor([success], device=self.device))

    @property
    def info_spec(self) -> dict[str, Binary]:
        """The entry's spec."""
        return {"success": Binary(n=1, shape=(1,), dtype=torch.bool, device=self.device)}
