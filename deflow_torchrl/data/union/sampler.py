# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The sampler of offline and online rows, and samplers' states as plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, RandomSampler, Sampler
from torchrl.data.replay_buffers.storages import Storage

from deflow_torchrl.data.union.storage import UnionStorage
from deflow_torchrl.errors import InputError
from deflow_torchrl.versions import extension_fault

MODES = ("uniform", "balanced", "annealed")
_TREES = ("_sum_tree", "_min_tree")


class UnionSampler(RandomSampler):
    """Draws rows of a :class:`UnionStorage` with replacement; on an accelerator the host does not wait.

    Args:
        mode: ``"uniform"``, ``"balanced"`` or ``"annealed"``; see :class:`OfflineOnlineReplayBuffer`.
        offline_fraction: the share, or the pair (first, last).
        anneal_transitions: online transitions over which the share goes from the first to the last.

    Raises:
        InputError: if one of them is out of range.
    """

    def __init__(
        self,
        mode: str = "uniform",
        offline_fraction: float | tuple[float, float] = 0.5,
        anneal_transitions: int | None = None,
    ) -> None:
        shares = offline_fraction if isinstance(offline_fraction, (tuple, list)) else (offline_fraction,)
        if mode not in MODES:
            raise InputError(f"mode={mode!r} is none of {', '.join(MODES)}")
        if len(shares) != (2 if mode == "annealed" else 1) or not all(
            isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share <= 1 for share in shares
        ):
            needed = "pair of shares" if mode == "annealed" else "share"
            raise InputError(f"offline_fraction={offline_fraction!r} is no {needed} in [0, 1]")
        if mode == "annealed":
            check_count("anneal_transitions", anneal_transitions)
        self.mode = mode
        self._first, self._last = shares[0], shares[-1]
        self._over = anneal_transitions or 1

    def offline_fraction(self, storage: UnionStorage) -> float:
        """The expected share of offline rows in a batch drawn now."""
        offline, online = storage.num_offline - storage.overwritten, storage.num_online
        if self.mode == "uniform":
            return offline / max(offline + online, 1)
        if not online or not offline:
            return float(not online)
        return self._first + (self._last - self._first) * min(storage.written / self._over, 1.0)

    def sample(self, storage: Storage, batch_size: int) -> tuple[torch.Tensor, dict]:
        """Rows ``[batch_size]``; of a fixed share, the offline ones come first."""
        assert isinstance(storage, UnionStorage)
        if not self._sampleable_count(storage, batch_size):
            raise RuntimeError("every transition of the buffer was discarded; there is nothing to sample")
        if self.mode == "uniform":
            return self._uniform(storage, batch_size), {}
        count = round(self.offline_fraction(storage) * batch_size)
        offline = self._draw(storage, storage.overwritten, storage.num_offline, count)
        online = self._draw(storage, 0, storage.num_online, batch_size - count)
        return torch.cat([offline, storage.online_rows(online)]), {}

    def _uniform(self, storage: UnionStorage, batch_size: int) -> torch.Tensor:
        if not storage.num_discarded:
            return self._draw(storage, 0, len(storage), batch_size)
        # The live offline rows, then the live online ones: no rejection, so the cost is fixed and nothing waits.
        offline = storage.num_offline - storage.overwritten
        drawn = self._draw(storage, 0, offline + storage.num_online, batch_size)
        online = storage.online_rows((drawn - offline).clamp_(min=0))
        return torch.where(drawn < offline, drawn + storage.overwritten, online)

    def _draw(self, storage: UnionStorage, low: int, high: int, count: int) -> torch.Tensor:
        if count == 0:
            return torch.empty(0, dtype=torch.int64, device=storage.device)
        return torch.randint(low, high, (count,), generator=self._rng, device=storage.device)

    def _sampleable_count(self, storage: Storage, batch_size: int) -> int:
        assert isinstance(storage, UnionStorage)
        return storage.num_offline - storage.overwritten + storage.num_online

    def __repr__(self) -> str:
        return f"UnionSampler(mode={self.mode!r})"


def made_sampler(sampler: Sampler | Callable[[], Sampler]) -> Sampler:
    """Get a sampler from a sampler or from a function that makes it.

    Raises:
        InputError: if the function fails where TorchRL's compiled extension does not load: it names versions that fit.
    """
    if isinstance(sampler, Sampler):
        return sampler
    try:
        return sampler()
    except RuntimeError as error:
        if (fault := extension_fault()) is None:
            raise
        raise InputError(fault) from error


def sampler_state(sampler: Sampler) -> dict[str, Any]:
    """Get a sampler's state in tensors, numbers, strings and containers of these.

    TorchRL's :class:`PrioritizedSampler` gives its two trees, objects that only pickle can write; here they are the
    priorities they hold, ``[max_capacity]``.

    Raises:
        InputError: if another sampler's state holds something else.
    """
    state = dict(sampler.state_dict())
    if isinstance(sampler, PrioritizedSampler):
        rows = torch.arange(sampler.max_size, device=sampler.device)
        state |= {name: torch.as_tensor(state[name][rows]).cpu() for name in _TREES}
        state["_max_priority"] = [_tensor(part, "cpu") for part in state["_max_priority"]]
    _check_plain(state, type(sampler).__name__)
    return state


def native_sampler_state(sampler: Sampler, state: dict[str, Any]) -> dict[str, Any]:
    """Turn the result of :func:`sampler_state` into the state that ``sampler.load_state_dict`` takes.

    Raises:
        InputError: if it is of a sampler of another size.
    """
    if not isinstance(sampler, PrioritizedSampler):
        return state
    rows = torch.arange(sampler.max_size, device=sampler.device)
    trees = {name: sampler.state_dict()[name] for name in _TREES}  # copies of the sampler's own
    for name, tree in trees.items():
        if len(state[name]) != len(rows):
            raise InputError(f"the state is of another sampler: {len(state[name])} priorities there, {len(rows)} here")
        tree[rows] = state[name].to(sampler.device)
    return {**state, **trees, "_max_priority": tuple(_tensor(part, sampler.device) for part in state["_max_priority"])}


def _tensor(value: Any, device: torch.device | str) -> torch.Tensor | None:
    return None if value is None else torch.as_tensor(value, device=device)


def _check_plain(value: Any, name: str) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _check_plain(part, name)
    elif value is not None and not isinstance(value, (torch.Tensor, bool, int, float, str)):
        raise InputError(f"the state of {name} holds a {type(value).__name__}, which cannot be saved without pickle")


def check_count(name: str, value: Any) -> None:
    """Refuse anything but a positive integer.

    Raises:
        InputError: naming the option.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}={value!r} is no positive number of transitions")
