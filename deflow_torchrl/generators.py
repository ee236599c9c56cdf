# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The process's random generators: seed them, set them aside for a block, and write them into a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed torch's generators, NumPy's global one and Python's ``random``."""
    torch.manual_seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(8))
    random.seed(seed)


def capture_generators() -> dict[str, Any]:
    """Return the states of torch's generators (CPU and every CUDA device), NumPy's global one and Python's ``random``."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`capture_generators` gave.

    States of CUDA devices that this machine lacks are left out: on another machine the digits differ anyway.
    """
    torch.random.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, words in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(words.cpu(), device)
    numpy = state["numpy"]
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached_gaussian"]))
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))


@contextmanager
def generators_set_aside(seed: int | None = None) -> Iterator[None]:
    """Restore torch's generators at the end of the block: the CPU's and, where CUDA is in use, every CUDA device's.

    Args:
        seed: where the generators start in the block; their present states, if None.
    """
    # A device that nobody has used yet has no draws to protect, and asking for its state would start CUDA on it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        yield
