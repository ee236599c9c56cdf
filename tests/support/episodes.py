"""Episodes, and data sets built of them."""

import numpy as np
import torch

from deflow_torchrl.data import TransitionBuilder, TransitionDataset

LENGTHS = (4, 1, 7)  # transitions of each episode


def episodes(lengths=LENGTHS, *, images=False, seed=0):
    """Episodes as (s with the final one, a, r, terminated); the second terminates."""
    rng = np.random.default_rng(seed)
    out = []
    for number, length in enumerate(lengths):
        shape = (length + 1, 3, 3, 1) if images else (length + 1, 2)
        observations = rng.integers(256, size=shape, dtype=np.uint8) if images else rng.normal(size=shape)
        terminated = np.zeros(length, bool)
        terminated[-1] = number == 1
        out.append((observations, rng.uniform(-1, 1, (length, 2)), rng.normal(size=length), terminated))
    return out


def build(parts, folder=None, **kwargs) -> TransitionDataset:
    first = parts[0][0]
    total = sum(len(part[1]) for part in parts)
    builder = TransitionBuilder(
        total, frames=total + len(parts), observation_shape=first.shape[1:], action_dim=2, source="test", folder=folder,
        observation_dtype=torch.uint8 if first.dtype == np.uint8 else torch.float32, **kwargs,
    )  # fmt: skip
    for observations, actions, rewards, terminated in parts:
        builder.add_episode(observations=observations, actions=actions, rewards=rewards, terminated=terminated)
    return builder.finish()
