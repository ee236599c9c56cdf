# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Which rows of offline and online transitions make up a batch, and samplers' states as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, Sampler
from torchrl.data.replay_buffers.storages import Storage

from deflow_torchrl.data.union_storage import UnionStorage
from deflow_torchrl.errors import InputError

MODES = ("uniform", "balanced", "annealed")


class UnionSampler(Sampler):
    """Draws rows of a :class:`UnionStorage` with replacement; on an accelerator the host does not wait.

    Args:
        mode: ``"uniform"``, ``"balanced"`` or ``"annealed"``; see :class:`OfflineOnlineReplayBuffer`.
        offline_fraction: the share, or the pair (first, last).
        anneal_transitions: online transitions over which the share goes from the first to the last.

    Raises:
        InputError: if one of them is not as it must be.
    """

    def __init__(
        self,
        mode: str,
        offline_fraction: float | tuple[float, float] = 0.5,
        anneal_transitions: int | None = None,
    ) -> None:
        shares = offline_fraction if isinstance(offline_fraction, (tuple, list)) else (offline_fraction,)
        if mode not in MODES:
            raise InputError(f"mode={mode!r} is none of {', '.join(MODES)}")
        if len(shares) != (2 if mode == "annealed" else 1) or not all(_is_share(share) for share in shares):
            needed = "pair of shares" if mode == "annealed" else "share"
            raise InputError(f"offline_fraction={offline_fraction!r} is no {needed} in [0, 1]")
        if mode == "annealed" and not is_count(anneal_transitions):
            raise InputError(f"anneal_transitions={anneal_transitions!r} is no positive number of transitions")
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
        if not storage.num_online and storage.overwritten == storage.num_offline:
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

    def _empty(self) -> None:
        pass

    def dumps(self, path: Any) -> None:
        """Nothing: every draw comes from the generator."""

    def loads(self, path: Any) -> None:
        """Nothing: every draw comes from the generator."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every draw comes from the generator."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: every draw comes from the generator."""

    def __repr__(self) -> str:
        return f"UnionSampler(mode={self.mode!r})"


def sampler_state(sampler: Sampler) -> dict[str, Any]:
    """A sampler's state in tensors, numbers, strings and containers of these.

    TorchRL's :class:`PrioritizedSampler` gives its two trees, objects that only pickle can write; here they are the
    priorities they hold, ``[max_capacity]``.

    Raises:
        InputError: if another sampler's state holds something else.
    """
    state = sampler.state_dict()
    if isinstance(sampler, PrioritizedSampler):
        rows = torch.arange(sampler.max_size, device=sampler.device)
        for name in ("_sum_tree", "_min_tree"):
            state[name] = torch.as_tensor(state[name][rows]).cpu()
        state["_max_priority"] = [None if part is None else float(part) for part in state["_max_priority"]]
    _check_plain(state, type(sampler).__name__)
    return dict(state)


def native_sampler_state(sampler: Sampler, state: dict[str, Any]) -> dict[str, Any]:
    """The state as ``sampler.load_state_dict`` takes it, from :func:`sampler_state`.

    Raises:
        InputError: if it is of a sampler of another size.
    """
    if not isinstance(sampler, PrioritizedSampler):
        return state
    state = dict(state)
    rows = torch.arange(sampler.max_size, device=sampler.device)
    for name in ("_sum_tree", "_min_tree"):
        own = getattr(sampler, name)
        values = state[name]
        if len(values) != len(rows):
            raise InputError(f"the state is of another sampler: {len(values)} priorities there, {len(rows)} here")
        tree = type(own)(len(rows), sampler.device) if sampler.device.type == "cuda" else type(own)(len(rows))
        tree[rows] = values.to(sampler.device)
        state[name] = tree
    largest, row = state["_max_priority"]
    state["_max_priority"] = (
        None if largest is None else torch.tensor(largest, dtype=sampler.dtype, device=sampler.device),
        None if row is None else torch.tensor(int(row), device=sampler.device),
    )
    return state


def _check_plain(value: Any, name: str) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _check_plain(part, name)
    elif value is not None and not isinstance(value, (torch.Tensor, bool, int, float, str)):
        raise InputError(f"the state of {name} holds a {type(value).__name__}, which cannot be saved without pickle")


def is_count(value: Any) -> bool:
    """Whether it is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
