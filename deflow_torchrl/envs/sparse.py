# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""OGBench's tasks with sparse rewards, as QAM's authors have scene and puzzle."""

from __future__ import annotations

from typing import Any

import gymnasium

from deflow_torchrl.envs.factory import make_env_by_id
from deflow_torchrl.envs.names import parse_ogbench_name


class SparseReward(gymnasium.RewardWrapper):
    """Reward -1 where the environment's is not 0, else 0."""

    def reward(self, reward: Any) -> float:
        """Make one reward sparse."""
        return -float(reward != 0)


def make_sparse_env(task: str, **kwargs: Any) -> gymnasium.Env:
    """Make the environment of an OGBench task, with sparse rewards."""
    return SparseReward(make_env_by_id(parse_ogbench_name(task).environment_id, **kwargs))
