# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Offline transitions and online experience in one TorchRL replay buffer.

The paper samples uniformly from their union, RLPD samples a fixed share of each: modes ``"uniform"`` and ``"balanced"``. The
numbering of rows and the order of overwriting are described in :mod:`deflow_torchrl.data.union.storage`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn.utils import _set_dispatch_td_nn_modules
from torchrl.data import ReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, Sampler
from torchrl.data.replay_buffers.utils import pin_memory_output
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from deflow_torchrl.data.chunks import ChunkedDataset
from deflow_torchrl.data.dataset import TransitionReplayBuffer, as_it_is
from deflow_torchrl.data.transitions import Transitions
from deflow_torchrl.data.union.sampler import (
    UnionSampler,
    check_count,
    made_sampler,
    native_sampler_state,
    sampler_state,
)
from deflow_torchrl.data.union.storage import ColumnRows, UnionStorage, UnionWriter, columns_of
from deflow_torchrl.errors import InputError, one_line
from deflow_torchrl.paths import atomic_write, make_writable_folder

_STATE_FILE = "buffer.pt"
_OPTIONS = ("transform", "transform_factory", "prefetch", "pin_memory", "generator", "priority_key")


class OfflineOnlineReplayBuffer(TensorDictReplayBuffer):
    """An offline set and the online transitions that :meth:`extend` adds, sampled as one TorchRL replay buffer.

    A batch is a TensorDict ``[B]`` in TED (:mod:`deflow_torchrl.data.schema`) with the row numbers in ``index`` ``[B]``. Rows
    0..num_offline-1 are the offline set, the online zone follows; ``buffer[i]`` and ``buffer[:]`` read rows in this order.
    :meth:`extend` keeps the entries :data:`~deflow_torchrl.data.schema.TRANSITION_KEYS`, which must have the offline set's
    shapes and types, and drops all others.

    ==============  ===================================================================================================
    mode            a batch of B
    ==============  ===================================================================================================
    ``"uniform"``   every held transition, offline or online, is equally likely at every place (the paper's mode)
    ``"balanced"``  exactly ``round(offline_fraction * B)`` offline transitions, then online ones (RLPD's mode)
    ``"annealed"``  the same with a share that goes linearly from ``offline_fraction[0]`` to ``offline_fraction[1]``
                    while the first ``anneal_transitions`` online transitions are added
    ==============  ===================================================================================================

    If there is no online (or no offline) transition, a batch holds the other kind only.

    Unlike TorchRL's ``OfflineToOnlineReplayBuffer`` this is a ``ReplayBuffer`` (state, transforms, priorities, prefetch,
    generator), uniform sampling over the union is available and exact, extra keys of a data set do no harm, types are
    checked instead of promoted, and both sides are on one device.

    Args:
        offline: a :class:`TransitionDataset`, its chunks (online transitions are whole ones then) or a
            :class:`TransitionReplayBuffer` of these, never copied unless ``device`` says so; any
            TorchRL replay buffer or data set, read once through its transforms; or a TensorDict ``[N]`` or ``[B, T]`` in TED.

    Keyword Args:
        online_capacity: rows of the online zone.
        mode: see above.
        offline_fraction: the share of offline transitions in [0, 1], a pair of them for ``"annealed"``; ``"uniform"``
            does not use it.
        anneal_transitions: for ``"annealed"``.
        overwrite: which transitions are replaced when the online zone is full. ``"online"``: the oldest online ones; the
            offline set stays. ``"fifo"``: the oldest of all, offline ones first, as in the reference's array; the columns of
            online transitions are then as long as the whole buffer (a CPU's memory is allocated as it is written).
        batch_size: transitions per :meth:`sample`.
        device: device of all transitions; that of the offline set by default. On a GPU the host does not wait for sampling.
        online_dir: folder for memory-mapped files of the online columns; every buffer makes new files.
        sampler: another TorchRL sampler of single transitions, in mode ``"uniform"`` only: ``PrioritizedSampler`` (its
            ``max_capacity`` must reach ``capacity``; offline rows start with the default priority),
            ``SamplerWithoutReplacement``... Give a function, ``lambda: PrioritizedSampler(...)``, and where torchrl's compiled
            extension does not load beside this torch the error names versions that fit.
        next_action: deliver ``("next", "action")`` too: the action of the transition that follows in the trajectory; the
            transition's own at the end of the trajectory and while no later one was added.
        online_stride: distance of an online transition to the one that follows it in its trajectory: W if W trajectories
            are added in turn.
        **kwargs: forwarded to :class:`torchrl.data.TensorDictReplayBuffer`: ``transform``, ``prefetch``, ``pin_memory``,
            ``generator``, ``priority_key``.

    Raises:
        InputError: on an option out of range, or offline data that do not fit the schema or hold NaN or infinity.

    Examples:
        >>> offline = TensorDict(
        ...     observation=torch.zeros(100, 3), action=torch.zeros(100, 2),
        ...     next=TensorDict(
        ...         observation=torch.zeros(100, 3), reward=torch.zeros(100, 1),
        ...         terminated=torch.zeros(100, 1, dtype=torch.bool), truncated=torch.zeros(100, 1, dtype=torch.bool),
        ...         done=torch.zeros(100, 1, dtype=torch.bool), batch_size=[100],
        ...     ),
        ...     batch_size=[100],
        ... )
        >>> buffer = OfflineOnlineReplayBuffer(offline, online_capacity=50, mode="balanced", batch_size=8)
        >>> buffer.extend(offline[:2])
        tensor([100, 101])
        >>> batch = buffer.sample()
        >>> batch["observation"].shape, buffer.is_online(batch["index"]).sum()
        (torch.Size([8, 3]), tensor(4))
        >>> buffer.num_offline, buffer.num_online, len(buffer), buffer.capacity
        (100, 2, 102, 150)
    """

    _storage: UnionStorage

    def __init__(
        self,
        offline: Transitions | ReplayBuffer | TensorDictBase,
        *,
        online_capacity: int,
        mode: Literal["uniform", "balanced", "annealed"] = "uniform",
        offline_fraction: float | tuple[float, float] = 0.5,
        anneal_transitions: int | None = None,
        overwrite: Literal["online", "fifo"] = "online",
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        online_dir: str | os.PathLike[str] | None = None,
        sampler: Sampler | Callable[[], Sampler] | None = None,
        next_action: bool = False,
        online_stride: int = 1,
        **kwargs: Any,
    ) -> None:
        if unknown := kwargs.keys() - set(_OPTIONS):
            names, known = ", ".join(sorted(unknown)), ", ".join(_OPTIONS)
            raise TypeError(f"OfflineOnlineReplayBuffer takes no option {names}; beside its own: {known}")
        check_count("online_stride", online_stride)
        check_count("online_capacity", online_capacity)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        own_sampler = UnionSampler(mode, offline_fraction, anneal_transitions)
        if overwrite not in ("online", "fifo"):
            raise InputError(f"overwrite={overwrite!r} is neither 'online' nor 'fifo'")
        self.mode, self.overwrite = mode, overwrite
        rows, where = _offline_rows(offline, device)
        if getattr(rows, "entries", None):
            raise InputError("several observations a step are trained on offline only; the union buffer takes one")
        folder = None
        if online_dir is not None:
            if where.type != "cpu":
                raise InputError(f"online_dir={str(online_dir)!r}: files are for the CPU, the data are on {where}")
            folder = make_writable_folder(Path(online_dir).expanduser())
            for file in folder.glob("online_*.bin"):  # another buffer that still maps such a file keeps it
                file.unlink()
        storage = UnionStorage(
            rows,
            where,
            online_capacity=online_capacity,
            fifo=overwrite == "fifo",
            folder=folder,
            next_action=next_action,
            online_stride=online_stride,
        )
        super().__init__(
            storage=storage,
            sampler=own_sampler if sampler is None else self._usable(sampler, storage.max_size),
            writer=UnionWriter(),
            collate_fn=as_it_is,
            batch_size=batch_size,
            delayed_init=False,
            **kwargs,
        )

    # Rows.

    @property
    def dataset(self) -> Transitions | None:
        """The offline set in use, or ``None`` if the offline data came as something else."""
        offline = self._storage.offline
        return offline if isinstance(offline, Transitions) else None

    @property
    def num_offline(self) -> int:
        """Transitions of the offline set, overwritten or not."""
        return self._storage.num_offline

    @property
    def num_online(self) -> int:
        """Online transitions that may be sampled: held and not discarded."""
        return self._storage.num_online

    @property
    def num_discarded(self) -> int:
        """Online transitions that are held but never sampled."""
        return self._storage.num_discarded

    @property
    def online_capacity(self) -> int:
        """Rows of the online zone."""
        return self._storage.online_capacity

    @property
    def capacity(self) -> int:
        """Rows of both zones."""
        return self._storage.max_size

    @property
    def device(self) -> torch.device:
        """Device of transitions and batches."""
        return self._storage.device

    @property
    def offline_fraction(self) -> float:
        """The expected share of offline transitions in a batch sampled now, by this buffer's own sampler."""
        sampler = self._sampler if isinstance(self._sampler, UnionSampler) else UnionSampler()
        return sampler.offline_fraction(self._storage)

    def is_online(self, index: torch.Tensor) -> torch.Tensor:
        """Whether rows hold online transitions.

        Args:
            index: row numbers of any shape, as ``batch["index"]``.

        Returns:
            bool of the same shape, on its device.
        """
        return self._storage.is_online(index)

    def __repr__(self) -> str:
        return (
            f"OfflineOnlineReplayBuffer({self.num_offline} offline, {self.num_online} online of at most "
            f"{self.online_capacity}, overwrite={self.overwrite!r}, sampler={self._sampler}, on {self.device})"
        )

    def __len__(self) -> int:
        """Rows that hold a transition, as in ``buffer[:]``: discarded ones count."""
        return len(self._storage)

    def share(self, shared: bool = True) -> Self:
        """Refuse to be written by several processes, as collectors with worker processes would (``replay_buffer=``).

        Raises:
            InputError: if ``shared``.
        """
        if shared:
            raise InputError(
                "OfflineOnlineReplayBuffer is not shared: each process would write into a copy of its own; leave the "
                "collector's replay_buffer= out, and call extend() with the batches that it yields"
            )
        return super().share(shared)

    # Writing.

    def add(self, data: TensorDictBase) -> int:
        """Add one online transition (batch size ``[]``); its row. Raises as :meth:`extend`."""
        return int(self.extend(data)[0])

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> torch.Tensor:
        """Add online transitions.

        Args:
            tensordicts: ``[n]``, ``[B, T]`` or any other batch in TED, as a collector delivers it, on any device; flattened
                in this order, without the padding of collectors with ``split_trajs`` (``("collector", "mask")``). It is left
                as it is. One flag or, where ``done`` is given, two may be missing: they follow from the others.

        Keyword Args:
            update_priority: as in TorchRL.

        Returns:
            their rows ``[n]``, int64, on the buffer's device.

        Raises:
            InputError: if an entry is missing, has another shape or type than the offline set's, or is not finite, if
                ``steps_to_next_obs`` says another number of steps than the offline set's (n-step transitions), if flags
                contradict one another, or if they are more than the online zone holds. Nothing is added then.
        """
        if not isinstance(tensordicts, TensorDictBase):
            raise InputError(f"new transitions: a TensorDict is needed, not a {type(tensordicts).__name__}")
        steps = _without_padding(tensordicts)
        if len(steps) == 0:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        return super().extend(steps, update_priority=update_priority)

    def discard(self, index: torch.Tensor) -> None:
        """Never sample these online rows again, until they are overwritten (the transitions of a faulty episode).

        Args:
            index: row numbers of any shape, as :meth:`extend` gave them.

        Raises:
            InputError: if a row holds no online transition.
        """
        rows = torch.as_tensor(index)
        if self._prefetch:
            with self._futures_lock:  # a batch that was drawn ahead may hold them
                self._clear_prefetch_queue_locked()
        with self._replay_lock, self._write_lock:
            self._storage.discard(rows)
            self._forget_priorities(rows.reshape(-1))

    def empty(self, empty_write_count: bool = True) -> None:
        """Forget the online transitions, and all priorities."""
        super().empty(empty_write_count)
        self._initialize_prioritized_sampler()

    def set_at_(self, key: Any, value: Any, index: Any) -> NoReturn:
        """Refused: transitions are added, never changed."""
        self._storage.set(index, value)

    def set_(self, key: Any, value: Any) -> NoReturn:
        """Refused: transitions are added, never changed."""
        self._storage.set(None, value)

    def update_(self, input_dict_or_td: Any, clone: bool = False, *, keys_to_update: Any = None) -> NoReturn:
        """Refused: transitions are added, never changed."""
        self._storage.set(None, input_dict_or_td)

    # Sampling.

    def sample(
        self, batch_size: int | None = None, return_info: bool = False, include_info: bool | None = None
    ) -> TensorDictBase:
        """Draw a batch ``[B]`` in TED with ``index`` and the sampler's other entries of each row; options as in TorchRL."""
        if return_info or include_info is not None:
            return super().sample(batch_size, return_info, include_info)
        return ReplayBuffer.sample(self, batch_size)  # the entries are in the batch already

    @pin_memory_output
    def _sample(self, batch_size: int) -> tuple[TensorDictBase, dict]:
        with self._replay_lock, self._write_lock:
            index, info = self._sampler.sample(self._storage, batch_size)
            if self._storage.num_discarded and not isinstance(self._sampler, UnionSampler):
                self._draw_discarded_again(index, info)
            info = {"index": index, **info}
            if index.device != self.device:  # trees of priorities may be elsewhere
                info = {name: value.to(self.device) for name, value in info.items()}
            data: TensorDictBase = self._storage.transitions(info["index"], info)
        if len(self._transform):
            with _set_dispatch_td_nn_modules(True):
                data = self._transform(data)
        return data, info

    def _draw_discarded_again(self, index: torch.Tensor, info: dict) -> None:
        if self._storage.num_discarded == len(self._storage):
            raise RuntimeError("every transition of the buffer was discarded; there is nothing to sample")
        while len(bad := self._storage.is_discarded(index).nonzero().squeeze(1)):
            again, info_again = self._sampler.sample(self._storage, len(bad))
            bad = bad[: len(again)]  # an epoch may end here
            index[bad] = again
            for name, value in info_again.items():
                info[name][bad] = value

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Replace the sampler, in mode ``"uniform"``; the previous one. All priorities start at the default.

        Raises:
            InputError: as the constructor.
        """
        previous = super().set_sampler(self._usable(sampler, self.capacity))
        sampler._rng = self._rng
        self._initialize_prioritized_sampler()
        self._forget_priorities(self._storage.discarded_rows())
        return previous

    def _usable(self, sampler: Sampler | Callable[[], Sampler], capacity: int) -> Sampler:
        sampler = made_sampler(sampler)
        if self.mode != "uniform":
            raise InputError(f"mode={self.mode!r} draws by itself; give sampler={sampler} with mode='uniform' only")
        if isinstance(sampler, PrioritizedSampler) and sampler.max_size < capacity:
            raise InputError(f"PrioritizedSampler(max_capacity={sampler.max_size}) is too small; give {capacity}")
        return sampler

    def update_priority(self, index: Any, priority: Any) -> None:
        """Set priorities as in TorchRL; discarded rows are left out."""
        if self._storage.num_discarded:
            index, priority = torch.as_tensor(index).reshape(-1), torch.as_tensor(priority)
            kept = ~self._storage.is_discarded(index)
            index = index[kept]
            if priority.numel() > 1:
                priority = priority.reshape(-1)[kept.to(priority.device)]
            if len(index) == 0:
                return
        super().update_priority(index, priority)

    def _forget_priorities(self, rows: torch.Tensor) -> None:
        sampler = self._sampler
        if isinstance(sampler, PrioritizedSampler) and len(rows):
            # The trees' neutral values: a priority of 0 would be the smallest one, by which weights are divided.
            rows = rows.to(sampler.device)
            sampler._sum_tree[rows] = torch.zeros(len(rows), dtype=sampler.dtype, device=rows.device)
            sampler._min_tree[rows] = torch.full((len(rows),), torch.inf, dtype=sampler.dtype, device=rows.device)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The online transitions and their position, discarded rows, sampler, transforms, generator and prefetched batches.

        The offline set is represented by its number of rows and a digest. The state is a copy, on the CPU where it is large,
        of tensors, numbers, strings and containers of these, which ``torch.load(..., weights_only=True)`` reads. The caller
        saves torch's global generators (and NumPy's, from which ``PrioritizedSampler`` draws without ``generator=``).

        Raises:
            InputError: if a sampler's state holds something else.
        """
        state = super().state_dict()
        state["_sampler"] = {"class": type(self._sampler).__name__, "state": sampler_state(self._sampler)}
        prefetched = state["_prefetch_state"]
        state["_prefetch_state"] = {
            **prefetched,
            "queue": [{"batch": batch.to_dict(), "info": dict(info)} for batch, info in prefetched["queue"]],
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a result of :meth:`state_dict`; exactly, if the generators are restored as well.

        Mode, shares and batch size may differ; prefetched batches are kept.

        Raises:
            InputError: if the state is of another offline set, capacity, schema, ``overwrite`` or sampler; nothing is loaded.
        """
        if missing := {"_storage", "_sampler", "_transforms", "_prefetch_state"} - state_dict.keys():
            raise InputError(f"this is no state of a buffer: {', '.join(sorted(missing))} is missing")
        self._storage.check_state(state_dict["_storage"])
        theirs, own = state_dict["_sampler"]["class"], type(self._sampler).__name__
        if theirs != own:
            raise InputError(f"the state is of another buffer: its sampler is a {theirs}, here it is a {own}")
        prefetched = state_dict["_prefetch_state"]
        queue = [
            (TensorDict(entry["batch"], batch_size=entry["info"]["index"].shape, device=self.device), entry["info"])
            for entry in prefetched["queue"]
        ]
        super().load_state_dict(
            {
                **state_dict,
                "_sampler": native_sampler_state(self._sampler, state_dict["_sampler"]["state"]),
                "_prefetch_state": {**prefetched, "queue": queue},
                "_batch_size": self._batch_size,
            }
        )

    def dumps(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` into the folder ``path``, beside and renamed, without pickle.

        Raises:
            InputError: if the folder cannot be written or the disk is full.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / _STATE_FILE) as temporary:
                torch.save(self.state_dict(), temporary)
        except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError for a full disk
            raise InputError(f"cannot write in {folder} ({error}); choose another folder") from error

    def loads(self, path: str | os.PathLike[str]) -> None:
        """Continue from a file written by :meth:`dumps`; no code in the file is run.

        Raises:
            InputError: if there is no such file, or it is damaged, and as :meth:`load_state_dict`.
        """
        file = Path(path) / _STATE_FILE
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"{file} is missing or damaged ({one_line(error)[:200]})") from error
        self.load_state_dict(state)


def _offline_rows(offline: Any, device: torch.device | str | None) -> tuple[ColumnRows | Transitions, torch.device]:
    if isinstance(offline, TransitionReplayBuffer) and not len(offline.transform):
        offline = offline.dataset
    if isinstance(offline, ChunkedDataset) and offline.ends == "valid":
        raise InputError(
            f"chunks with ends={offline.ends!r} cannot be joined with experience; take ends='whole' or 'valid_row'"
        )
    if isinstance(offline, Transitions):
        if device is not None and not _is_on(offline.device, torch.device(device)):
            offline = offline.to(device)
        return offline, offline.device
    owned = isinstance(offline, ReplayBuffer) and isinstance(offline.writer, ImmutableDatasetWriter)
    source = "offline data"
    transitions = offline[:] if isinstance(offline, ReplayBuffer) else offline
    if not isinstance(transitions, TensorDictBase):
        raise InputError(
            f"{source}: a TransitionDataset, a replay buffer or a TensorDict is needed, not a {type(offline).__name__}"
        )
    transitions = _without_padding(transitions)
    if len(transitions) == 0:
        raise InputError(f"{source}: there is no transition")
    columns = columns_of(transitions, source=source)
    where = columns[0].device if device is None else torch.device(device)
    # The caller may write into this buffer later; an immutable data set need not be copied.
    columns = [column.as_subclass(torch.Tensor).to(where, copy=not owned) for column in columns]
    return ColumnRows(columns), columns[0].device


def _without_padding(transitions: TensorDictBase) -> TensorDictBase:
    """Flatten a batch, without the rows that fill up the trajectories of a collector with ``split_trajs``; ``[n]``."""
    flat = transitions.reshape(transitions.shape.numel())  # -1 is ambiguous where there is nothing
    mask = transitions.get(("collector", "mask"), None)
    return flat if mask is None else flat[mask.reshape(-1)]


def _is_on(device: torch.device, wanted: torch.device) -> bool:
    return device.type == wanted.type and wanted.index in (None, device.index)
