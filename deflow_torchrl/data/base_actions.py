# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Base actions of a frozen prior, drawn once and stored beside the transitions.

A frozen prior has the same distribution of actions at a state in every update. Its actions need not be sampled at each update,
which takes half of an update's time, and more if the prior is larger than the paper's. The bank holds K draws for every state
of a replay buffer; an update takes one of them at random.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter
from torchrl.envs.utils import ExplorationType, set_exploration_type

from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.errors import InputError, one_line
from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.paths import atomic_write

_FORMAT = 1
_OFFLINE, _ONLINE = 0, 1  # the two streams of seeds
_PROBES = 1_000  # transitions that stand for the whole set in its digest


class BaseActionBank:
    """K base actions of a frozen prior for every state s and s' of a replay buffer.

    ``bank.fill()`` draws the actions of the transitions in the buffer, ``bank.extend(index)`` those of transitions added
    later, and ``bank(batch)`` writes one of the K into a sampled batch, for s and for s' independently. The draws have the
    prior's distribution and leave torch's global generators alone; the choice among the K uses the global generator.

    K trades memory for diversity. A bank takes ``K * A * bytes of a number`` for a state: 160 bytes at K = 8 and the
    paper's A = 5 in float32. If the buffer has a :class:`TransitionDataset`, s' of one transition is s of the next and each
    transition has one state; otherwise, and online, it has two. With a small K the updates see an empirical prior: with K = 1
    the refinement learns from one base action per state, and the critic's target at s' is not averaged over the prior as it
    is with fresh draws. At K = 8 a mode of probability p is missing at a state with probability (1 - p)^8: 17% of the states
    for p = 0.2, 0.4% for p = 0.5. Networks that generalise over neighbouring states make up for missing modes.

    Filling samples the prior as often as ``N * K / (2 * B)`` updates of batch size B do (one state per transition): 16,000
    updates for a million transitions at K = 8 and B = 256. Shorter trainings are faster without a bank.

    The prior must not change: freeze it first, and put a prior with dropout or batch normalisation in evaluation mode. A prior
    that draws its own noise draws it as under random exploration.

    Args:
        prior: any TensorDictModule that writes the base action ``[..., A]``. If it reads noise, the noise is drawn.
        buffer: the transitions: :class:`TransitionReplayBuffer`, :class:`OfflineOnlineReplayBuffer`, or any TorchRL replay
            buffer of single transitions. States are read through its transforms.

    Keyword Args:
        num_actions: K.
        base_action_key: out key of the prior and base action key of the refinement.
        seed: seed of the draws; equal seeds and batch sizes give equal banks (on one device).
        batch_size: rows of one call of the prior, K for each state.
        device: device of the bank; the prior's device, on which its samples are drawn, by default.

    Raises:
        InputError: on an option out of range, a prior that does not write the key, or a buffer of another kind.

    Examples:
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, make_velocity_network
        >>> prior = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100), batch_size=4)
        >>> states = torch.randn(20, 3)
        >>> _ = buffer.extend(TensorDict(
        ...     observation=states, next=TensorDict(observation=states, batch_size=[20]), batch_size=[20]))
        >>> bank = BaseActionBank(prior, buffer, num_actions=4)
        >>> bank.fill()
        >>> batch = bank(buffer.sample())
        >>> batch["base_action"].shape, batch["next", "base_action"].shape
        (torch.Size([4, 2]), torch.Size([4, 2]))
    """

    def __init__(
        self,
        prior: TensorDictModuleBase,
        buffer: ReplayBuffer,
        *,
        num_actions: int = 8,
        base_action_key: NestedKey = "base_action",
        seed: int = 0,
        batch_size: int = 8_192,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value, least in (("num_actions", num_actions, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if not least <= value < 2**63:
                raise InputError(f"{name} must be at least {least} (and below 2**63), got {value}")
        self.base_action_key = unravel_key(base_action_key)
        if self.base_action_key not in [unravel_key(key) for key in prior.out_keys]:
            raise InputError(f"the prior writes {prior.out_keys}, not {base_action_key!r}; build it with that out_key")
        if getattr(buffer.storage, "ndim", 1) != 1:
            raise InputError("a bank needs a buffer of single transitions, this storage has more than one dimension")
        self.prior, self.buffer = prior, buffer
        encoders, policy = [], prior
        while isinstance(policy, TensorDictSequential):
            *before, policy = policy.module
            encoders += before
        noise = getattr(policy, "noise_key", None)
        # What stands before a policy that reads its noise draws none: it runs once for all base actions of a state.
        self._encoders, self._policy = (encoders, policy) if noise is not None else ([], prior)
        self._prior_keys = [key for key in prior.in_keys if noise is None or unravel_key(key) != unravel_key(noise)]
        self.num_actions, self.seed, self.batch_size = num_actions, seed, batch_size
        if device is None:
            weights = next(chain(prior.parameters(), prior.buffers()), None)
            device = getattr(buffer.storage, "device", None) if weights is None else weights.device
        self.device = torch.device("cpu" if device in (None, "auto") else device)
        self._num_offline = int(getattr(buffer, "num_offline", len(buffer)))
        immutable = isinstance(buffer.writer, ImmutableDatasetWriter)
        self._capacity = len(buffer) if immutable else int(getattr(buffer, "capacity", buffer.storage.max_size))
        dataset = getattr(buffer, "dataset", None)
        # Frames are read directly if no transform changes them and if rows keep their transitions.
        frames = isinstance(dataset, TransitionDataset) and not len(buffer.transform)
        self._dataset = dataset if frames and getattr(buffer, "overwrite", "online") != "fifo" else None
        self._starts = None if self._dataset is None else self._dataset.episode_starts.to(self.device)
        self._filled = False
        self._extensions = 0
        self._extended = torch.zeros(self._capacity, dtype=torch.bool, device=self.device)
        self._actions: torch.Tensor | None = None  # [states, K, A]; made when A is known
        # Computed here: with overwrite="fifo" the buffer's first rows do not stay the data's.
        self._data = self._data_digest()

    # -- drawing ------------------------------------------------------------------------------------------------------

    def fill(self, progress: Callable[[Iterator[int], int], Iterator[int]] | None = None) -> None:
        """Draw the base actions of the buffer's offline transitions, or of all transitions of a buffer without such a part.

        Args:
            progress: wraps the iterator of finished calls of the prior (iterator, total), for a progress bar.

        Raises:
            InputError: if the transitions lack what the prior reads, or what it writes is not ``[rows, A]``, floating
                point, finite and as wide as the data's actions.
        """
        size = max(self.batch_size // self.num_actions // 2, 1) * 2  # even: s and s' of a row are drawn together
        begins = range(0, self._offline_states, size)

        def calls() -> Iterator[int]:
            for call, begin in enumerate(begins):
                states = self._read_states(begin, min(begin + size, self._offline_states))
                drawn = self._draw(states, _OFFLINE, call)
                self._table(drawn)[begin : begin + len(drawn)] = drawn
                yield call
            if self._dataset is not None:
                self._dataset.release()
            self._filled = True

        for _ in calls() if progress is None else progress(calls(), len(begins)):
            pass
        if not self._filled:
            raise InputError("progress did not go through the iterator it was given; return an iterator over all of it")

    @property
    def _offline_states(self) -> int:
        return 2 * self._num_offline if self._dataset is None else len(self._dataset.observation)

    def _read_states(self, begin: int, end: int) -> TensorDictBase:
        """Read states by their places in the table: frames, or s and s' of one row after another."""
        if self._dataset is not None:
            frames = torch.arange(begin, end, device=self._dataset.device)
            return TensorDict({"observation": self._dataset.observations(frames)}, batch_size=[end - begin])
        return self._both_states(self.buffer[begin // 2 : end // 2])

    def _both_states(self, transitions: TensorDictBase) -> TensorDictBase:
        """Select the prior's inputs of s and s', alternating, ``[2 n]``; s stands in for NaN behind a terminated row."""
        keys = self._prior_keys
        both = [transitions.select(*keys, strict=False), transitions["next"].select(*keys, strict=False)]
        states = [state.exclude("next").reshape(-1) for state in both]
        terminated = transitions.get(("next", "terminated"), None)
        if terminated is not None:
            own, following = states
            for key, value in list(following.items(True, True)):
                if value.is_floating_point():
                    unused = terminated.reshape(-1) & value.isnan().reshape(len(value), -1).any(1)
                    following[key] = torch.where(unused.view(-1, *[1] * (value.ndim - 1)), own[key], value)
        return torch.stack(states, 1).reshape(-1)

    def extend(self, index: torch.Tensor) -> None:
        """Draw the base actions of transitions that were added to the buffer or have overwritten others.

        Args:
            index: their rows ``[n]``, as ``buffer.extend`` returned them.

        Raises:
            InputError: as :meth:`fill`.
        """
        index = torch.as_tensor(index).reshape(-1)
        if not len(index):
            return
        if self._dataset is not None and int(index.min()) < self._num_offline:
            raise InputError(f"row {int(index.min())} is offline and never changes; extend the bank by online rows")
        drawn = self._draw(self._both_states(self.buffer[index]), _ONLINE, self._extensions)
        self._put(index.to(self.device), drawn)
        self._extensions += 1

    def _put(self, rows: torch.Tensor, actions: torch.Tensor) -> None:
        self._table(actions)[self._states_of(rows)] = actions
        self._extended[rows] = True

    def _draw(self, states: TensorDictBase, stream: int, call: int) -> torch.Tensor:
        """Draw K base actions for each state, ``[n, K, A]``; a function of seed, stream and number of the call."""
        missing = [key for key in self._prior_keys if states.get(key, None) is None]
        if missing:
            raise InputError(
                f"the prior reads {missing}, which the buffer's transitions lack; store them or rename keys"
            )
        states = states.select(*self._prior_keys).to(self.device)
        with torch.no_grad():
            for encoder in self._encoders:
                states = encoder(states)
        states = states.select(*self._policy.in_keys, strict=False)
        rows = states.unsqueeze(1).expand(len(states), self.num_actions).reshape(-1)
        seed = int(np.random.SeedSequence((self.seed, stream, call)).generate_state(1, np.uint64)[0]) >> 1
        # Under deterministic exploration a prior such as a DiffusionActor gives one action instead of a sample.
        exploration = set_exploration_type(ExplorationType.RANDOM)
        with torch.no_grad(), exploration, generators_set_aside(seed):
            actions = self._policy(rows).get(self.base_action_key)
        self._check(actions, len(rows))
        return actions.reshape(len(states), self.num_actions, -1)

    def _check(self, actions: Any, rows: int) -> None:
        if not isinstance(actions, torch.Tensor) or not actions.is_floating_point():
            kind = actions.dtype if isinstance(actions, torch.Tensor) else type(actions).__name__
            raise InputError(f"the prior writes {self.base_action_key!r} of type {kind}, expected floating point")
        like = self._actions
        if like is None:  # the first draw; without an entry "action" in the data the prior's own width counts
            row = self.buffer[:1].get("action", None) if len(self.buffer) else None
            like = actions if row is None else row.to(actions.dtype)
        if actions.shape != (rows, *like.shape[-1:]) or actions.dtype != like.dtype:
            raise InputError(
                f"the prior writes {self.base_action_key!r} of shape {tuple(actions.shape)} and {actions.dtype} for {rows} "
                f"states, expected {[rows, *like.shape[-1:]]} and {like.dtype}"
            )
        if not bool(actions.isfinite().all()):
            raise InputError(f"the prior writes NaN or infinity into {self.base_action_key!r}; check its weights")

    def _table(self, actions: torch.Tensor) -> torch.Tensor:
        if self._actions is None:
            # On a CPU memory of zeros is allocated as it is written: the online zone takes as much as it holds.
            states = self._offline_states + 2 * (self._capacity - self._num_offline)
            self._actions = torch.zeros(states, *actions.shape[-2:], dtype=actions.dtype, device=self.device)
        return self._actions

    def _states_of(self, rows: torch.Tensor) -> torch.Tensor:
        first = self._first_state(rows)
        return torch.stack([first, first + 1], 1).reshape(-1)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def _first_state(self, rows: torch.Tensor) -> torch.Tensor:
        """Place of s in the table; s' is the next."""
        if self._starts is None:
            return 2 * rows
        frame = rows + torch.searchsorted(self._starts, rows, right=True) - 1
        if self._capacity == self._num_offline:
            return frame
        return torch.where(rows < self._num_offline, frame, self._offline_states + 2 * (rows - self._num_offline))

    def __call__(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ``base_action`` and ``("next", "base_action")`` ``[..., A]`` into a batch sampled from the buffer.

        Each is one of the state's K, drawn by the global generator of the bank's device. On an accelerator the host does not
        wait for the device; rows without base actions get NaN there.

        Args:
            batch: transitions with their rows in ``"index"``.

        Returns:
            the same batch.

        Raises:
            InputError: if the batch has no ``"index"`` or, on a CPU, a row without base actions.
        """
        rows = batch.get("index", None)
        if rows is None:
            raise InputError("the batch has no 'index'; give the bank what its buffer's sample() returned")
        if self._actions is None:
            raise InputError("the bank is empty; call fill() or load() first")
        rows = rows.reshape(batch.batch_size).to(self.device)
        first = self._first_state(rows)
        states = torch.stack([first, first + 1])
        chosen = states * self.num_actions + torch.randint(self.num_actions, states.shape, device=self.device)
        actions = self._actions.flatten(0, 1)[chosen]
        unseen = ~self._extended[rows]
        if self._filled:
            unseen &= rows >= self._num_offline
        if self.device.type != "cpu":
            actions = actions.masked_fill(unseen.unsqueeze(-1), torch.nan)
        elif bool(unseen.any()):
            raise InputError(f"row {int(rows[unseen][0])} has no base actions; call extend() after buffer.extend()")
        batch.set(self.base_action_key, actions[0])
        batch.set(unravel_key(("next", self.base_action_key)), actions[1])
        return batch

    # -- keeping ------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Everything that the offline part depends on."""
        return {
            "format": _FORMAT,
            "base_action_key": repr(self.base_action_key),
            "num_actions": self.num_actions,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "transitions": self._num_offline,
            "states": self._offline_states,
            "prior": _digest(self.prior.state_dict().items()),
            "data": self._data,
        }

    def _data_digest(self) -> str:
        step = max(self._offline_states // _PROBES, 1)
        probes = (self._read_states(place, place + 2) for place in range(0, self._offline_states - 1, 2 * step))
        chosen = (probe.select(*self._prior_keys, strict=False) for probe in probes)
        return _digest(item for probe in chosen for item in probe.flatten_keys(".").items())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the offline part into one file, beside and renamed.

        Raises:
            InputError: if the bank is not filled, or the file cannot be written.
        """
        if not self._filled or self._actions is None:
            raise InputError("the bank is empty; call fill() first")
        path = Path(path)
        try:
            with atomic_write(path) as temporary:
                # A view would be saved with the online zone behind it.
                torch.save({**self._identity(), "actions": self._actions[: self._offline_states].clone()}, temporary)
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot write {path} ({one_line(error)}); choose another folder") from error

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a file written by :meth:`save` for this prior, data, K, seed and batch size; no code in it is run.

        Raises:
            InputError: if the file is missing, damaged or of another bank; the differences are named.
        """
        path = Path(path)
        try:
            if path.exists() and not zipfile.is_zipfile(path):
                raise EOFError("no archive of tensors")
            state = torch.load(path, map_location=self.device, weights_only=True)
            actions = state.pop("actions")
            if actions.shape[:2] != (state["states"], state["num_actions"]) or not bool(actions.isfinite().all()):
                raise EOFError("not K finite actions a state")
        except FileNotFoundError as error:
            raise InputError(f"no base actions {path}") from error
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"{path} is damaged or holds no base actions; delete it and fill the bank again"
            ) from error
        own = self._identity()
        differs = [name for name in sorted(own.keys() | state.keys()) if own.get(name) != state.get(name)]
        if differs:
            raise InputError(f"{path} is of another bank (different: {', '.join(differs)}); fill this one")
        self._table(actions)[: self._offline_states] = actions
        self._filled = True

    def state_dict(self) -> dict[str, Any]:
        """The online part and the position in its stream of draws; :meth:`save` keeps the offline part."""
        rows = self._extended.nonzero().squeeze(-1)
        state: dict[str, Any] = {"num_actions": self.num_actions, "extensions": self._extensions, "rows": rows}
        if self._actions is not None:
            state["actions"] = self._actions[self._states_of(rows)]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a result of :meth:`state_dict` in a bank with the same offline part.

        Raises:
            InputError: if it is of a bank with another K or action, or of a larger buffer.
        """
        rows, actions = state["rows"].to(self.device), state.get("actions")
        if state["num_actions"] != self.num_actions:
            raise InputError(f"the state has {state['num_actions']} base actions a state, this bank {self.num_actions}")
        if len(rows) and int(rows.max()) >= self._capacity:
            raise InputError(f"the state has row {int(rows.max())}, this bank's buffer {self._capacity} rows")
        if self._actions is not None and actions is not None and actions.shape[1:] != self._actions.shape[1:]:
            raise InputError(f"the state has actions of width {actions.shape[-1]}, this bank {self._actions.shape[-1]}")
        self._extended.zero_()
        if actions is not None:
            self._put(rows, actions.to(self.device))
        self._extensions = state["extensions"]


def _digest(items: Any) -> str:
    digest = hashlib.sha256()
    for name, value in items:
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
