# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Offline rows and a ring of online rows under one numbering, as TorchRL's Storage and Writer.

Rows 0..num_offline-1 are the offline set, read where it lies; the rows behind them are the online zone. Online transition
number w (counted from the first ever) goes to row num_offline + w. What happens when the last row is taken is ``overwrite``:

* ``"online"``: on from row num_offline, so that the offline rows stay;
* ``"fifo"``: on from row 0, as in the reference, whose array is full after online_capacity steps: the oldest offline rows
  go first. The offline set itself is not written: a row that was overwritten is read from the online columns.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import Writer

from deflow_torchrl.data.columns import allocate
from deflow_torchrl.data.dataset import TransitionDataset, row_numbers
from deflow_torchrl.errors import InputError

TRANSITION_KEYS = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "terminated"),
    ("next", "truncated"),
    ("next", "done"),
)
"""What a transition consists of, in the order of every tuple of columns here; anything else is dropped on the way in."""

NAMES = tuple(key if isinstance(key, str) else ".".join(key) for key in TRANSITION_KEYS)
_FLAGS = ("next.terminated", "next.truncated", "next.done")
_FORMAT = 1
_DIGEST_ROWS = 4096

Columns = tuple[torch.Tensor, ...]
Schema = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape of one row and type of every column."""


def columns_of(transitions: TensorDictBase, *, source: str) -> Columns:
    """The columns of a batch ``[n]`` in the order of :data:`TRANSITION_KEYS`.

    Raises:
        InputError: if one is missing or no tensor.
    """
    columns = []
    for key, name in zip(TRANSITION_KEYS, NAMES, strict=True):
        column = transitions.get(key, None)
        if not isinstance(column, torch.Tensor):
            found = ", ".join(
                sorted(".".join(key) if isinstance(key, tuple) else key for key in transitions.keys(True, True))
            )
            raise InputError(f"{source}: {name} is {'missing' if column is None else 'no tensor'}; found {found}")
        columns.append(column)
    return tuple(columns)


def check_schema(columns: Columns, schema: Schema, *, source: str) -> None:
    """Refuse rows of another shape or type.

    Raises:
        InputError: naming the key, what is expected and what was found.
    """
    for name, column, (shape, dtype) in zip(NAMES, columns, schema, strict=True):
        if column.dtype != dtype or column.shape[1:] != shape:
            raise InputError(
                f"{source}: {name} is {_described(tuple(column.shape[1:]), column.dtype)} a transition, "
                f"{_described(shape, dtype)} is needed"
            )


def check_finite(columns: Columns, *, source: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: naming the key and the first bad row.
    """
    floats = [(name, column) for name, column in zip(NAMES, columns, strict=True) if column.is_floating_point()]
    # One question to the device, whatever the number of columns.
    if bool(torch.stack([column.isfinite().all() for _, column in floats]).all()):
        return
    for name, column in floats:
        bad = (~column.isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            raise InputError(f"{source}: {name} of transition {int(bad[0])} is not finite; drop its episode")


def offline_schema(columns: Columns, *, source: str) -> Schema:
    """The schema of an offline set; it fixes what online transitions must look like.

    Raises:
        InputError: if a column is not as :mod:`deflow_torchrl.data.schema` has it.
    """
    observation, action = columns[:2]
    images = observation.dtype == torch.uint8
    frame = (tuple(observation.shape[1:]), torch.uint8 if images else torch.float32)
    flag = ((1,), torch.bool)
    schema = (frame, (tuple(action.shape[1:]), torch.float32), frame, ((1,), torch.float32), flag, flag, flag)
    check_schema(columns, schema, source=source)
    if observation.ndim < 2 or action.ndim != 2:
        raise InputError(f"{source}: observation [N, ...] and action [N, A] are needed, found {_shapes(columns[:2])}")
    return schema


def _shapes(columns: Columns) -> str:
    return ", ".join(str(list(column.shape)) for column in columns)


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


class Blocks(NamedTuple):
    """Transitions as they are moved: few large tensors instead of seven, of which :meth:`columns` are views.

    Attributes:
        frames: s and s' ``[n, 2, ...]``.
        numbers: a and r ``[n, A + 1]``.
        flags: terminated, truncated and done ``[n, 3]``.
    """

    frames: torch.Tensor
    numbers: torch.Tensor
    flags: torch.Tensor

    def columns(self) -> Columns:
        """Views in the order of :data:`TRANSITION_KEYS`."""
        observation, next_observation = self.frames.unbind(1)
        width = self.numbers.shape[1] - 1
        action, reward = self.numbers.narrow(1, 0, width), self.numbers.narrow(1, width, 1)
        return observation, action, next_observation, reward, *(self.flags.narrow(1, i, 1) for i in range(3))


class Rows:
    """An offline set that is no :class:`TransitionDataset`: a column for every entry."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def gather(self, rows: torch.Tensor) -> Blocks:
        """Copies of the transitions ``rows`` [n]."""
        observation, action, next_observation, reward, *flags = (
            column.index_select(0, rows) for column in self._columns
        )
        return Blocks(
            torch.stack([observation, next_observation], 1), torch.cat([action, reward], 1), torch.cat(flags, 1)
        )

    def next_actions(self, rows: torch.Tensor) -> torch.Tensor:
        """Actions ``[n, A]`` that follow those of ``rows`` [n] in their trajectories; their own where ``done``."""
        action, done = self._columns[1], self._columns[6].squeeze(1)
        stays = done.index_select(0, rows) | (rows + 1 == len(action))
        return action.index_select(0, torch.where(stays, rows, rows + 1))


class FrameRows:
    """The same of a :class:`TransitionDataset`, which keeps every observation once: nothing but the flags is copied."""

    def __init__(self, dataset: TransitionDataset) -> None:
        self.dataset = dataset
        starts, lengths = dataset.episode_starts, dataset.episode_lengths
        self._last = starts + lengths - 1
        # OGBench's episodes are equally long; a division is many times faster than a search.
        self._length = int(lengths[0]) if bool((lengths[:-1] == lengths[0]).all() & (lengths[-1] <= lengths[0])) else 0
        if dataset.folder is None:
            frames = dataset.observation
            # s and s' lie behind one another: row i of this view is frames i and i + 1.
            self._pairs = frames.as_strided(
                (len(frames) - 1, 2, *frames.shape[1:]), (frames.stride(0), *frames.stride())
            )
            last = torch.zeros_like(dataset.terminated)
            last[self._last[lengths > 0]] = True
            self._flags = self._flags_of(dataset.terminated, last)

    def __len__(self) -> int:
        return len(self.dataset)

    def gather(self, rows: torch.Tensor) -> Blocks:
        """Copies of the transitions ``rows`` [n]."""
        dataset = self.dataset
        if self._length:
            episode = rows.floor_divide(self._length)
        else:
            episode = torch.searchsorted(dataset.episode_starts, rows, right=True) - 1
        if dataset.folder is None:
            frames = self._pairs.index_select(0, rows + episode)
            action, reward = dataset.action.index_select(0, rows), dataset.reward.index_select(0, rows)
            flags = self._flags.index_select(0, rows)
        else:
            observation, next_observation, action, reward, terminated = dataset._gather(rows, rows + episode)
            frames = torch.stack([observation, next_observation], 1)
            flags = self._flags_of(terminated, self._last.index_select(0, episode) == rows)
        return Blocks(frames, torch.cat([action, reward.unsqueeze(1)], 1), flags)

    def next_actions(self, rows: torch.Tensor) -> torch.Tensor:
        """See :meth:`TransitionDataset.next_actions`."""
        return self.dataset.next_actions(rows)

    @staticmethod
    def _flags_of(terminated: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return torch.stack([terminated, last & ~terminated, last | terminated], 1)


class OnlineRows:
    """The columns of online transitions, kept as they are moved: three places in memory a row.

    Args:
        length: rows.
        schema: of a transition.
        device: where they are.
        folder: for memory-mapped files; ``None`` in memory.
    """

    def __init__(self, length: int, schema: Schema, device: torch.device, folder: Path | None) -> None:
        (frame, frame_dtype), ((action_dim,), _) = schema[:2]
        shapes = ((2, *frame), (action_dim + 1,), (3,))
        dtypes = (frame_dtype, torch.float32, torch.bool)
        self.blocks = Blocks(
            *(
                allocate(f"online_{name}", (length, *shape), dtype, folder)
                if device.type == "cpu"
                else torch.zeros((length, *shape), dtype=dtype, device=device)
                for name, shape, dtype in zip(Blocks._fields, shapes, dtypes, strict=True)
            )
        )

    def gather(self, slots: torch.Tensor) -> Blocks:
        """Copies of the transitions ``slots`` [n]."""
        return Blocks(*(block.index_select(0, slots) for block in self.blocks))

    def first(self, count: int) -> Columns:
        """Views of the first ``count`` transitions."""
        return Blocks(*(block[:count] for block in self.blocks)).columns()

    def write(self, begin: int, columns: Columns) -> None:
        """Put transitions from ``begin`` on, round at the end."""
        for own, new in zip(self.blocks.columns(), columns, strict=True):
            until_end = min(len(new), len(own) - begin)
            own[begin : begin + until_end] = new[:until_end]
            if until_end < len(new):
                own[: len(new) - until_end] = new[until_end:]


class UnionStorage(Storage):
    """Offline rows followed by online rows; see the module.

    Args:
        offline: the offline rows.
        device: where batches are put together; the offline rows are there.

    Keyword Args:
        online_capacity: rows of the online zone.
        fifo: whether offline rows are overwritten.
        folder: where the online columns are memory-mapped; ``None`` in memory.
        next_action: read ``("next", "action")`` too.
        online_stride: distance of an online transition to the one that follows it in its trajectory.
    """

    def __init__(
        self,
        offline: Rows | FrameRows,
        device: torch.device,
        *,
        online_capacity: int,
        fifo: bool,
        folder: Path | None,
        next_action: bool = False,
        online_stride: int = 1,
    ) -> None:
        self.next_action, self.online_stride = next_action, online_stride
        self.offline = offline
        self.device = device
        self.num_offline = len(offline)
        self.online_capacity = online_capacity
        self.fifo = fifo
        super().__init__(self.num_offline + online_capacity)
        first = offline.gather(torch.zeros(1, dtype=torch.int64, device=device))
        self.schema = offline_schema(first.columns(), source="offline data")
        self.slots = self.max_size if fifo else online_capacity
        """Rows of the online columns: every row of the union may become an online one where offline rows go."""
        self.online = OnlineRows(self.slots, self.schema, device, folder)
        # Where the host need not be spared, only what is online is looked up there.
        self._host_waits = device.type == "cpu"
        self.written = 0
        """Online transitions ever added."""
        self._digest: str | None = None
        self._set_discarded(np.empty(0, dtype=np.int64))

    # What is where.

    def __len__(self) -> int:
        """Rows that hold a transition; they are the first ones. Discarded ones count."""
        return min(self.num_offline + self.written, self.max_size)

    @property
    def held_online(self) -> int:
        """Rows that hold an online transition, discarded ones too."""
        return min(self.written, self.slots)

    @property
    def overwritten(self) -> int:
        """Offline rows that hold an online transition by now; they are the first ones."""
        return min(max(self.written - self.online_capacity, 0), self.num_offline) if self.fifo else 0

    def is_online(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether these rows hold online transitions, bool of their shape."""
        online = rows >= self.num_offline
        return online | (rows < self.overwritten) if self.overwritten else online

    def contains(self, item: Any) -> torch.Tensor:
        """Whether there are transitions of these numbers, bool of the numbers' shape."""
        rows = torch.as_tensor(item)
        return (rows >= -len(self)) & (rows < len(self))

    # Reading.

    def get(self, index: Any) -> TensorDict:
        """Transitions in TED."""
        if isinstance(index, torch.Tensor):  # checked here: an index out of range would read another row
            index = index.cpu()
        rows = row_numbers(index, len(self), torch.device("cpu")).to(self.device)
        return self.transitions(rows.reshape(-1)).reshape(rows.shape)

    def transitions(self, rows: torch.Tensor, about: dict[str, torch.Tensor] | None = None) -> TensorDict:
        """Transitions ``rows`` [n], which must be held; on an accelerator the host does not wait.

        Args:
            rows: int64 ``[n]`` on the storage's device.
            about: more entries ``[n, ...]`` on that device.
        """
        observation, action, next_observation, reward, terminated, truncated, done = self._gather(rows).columns()
        following = {
            "observation": next_observation,
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "done": done,
        }
        if self.next_action:
            following["action"] = self._next_actions(rows, action, next_observation, done)
        batch_size, device = rows.shape, self.device
        # The constructor would look at every entry again, which takes as long as reading them.
        return TensorDict._new_unsafe(
            {
                "observation": observation,
                "action": action,
                "next": TensorDict._new_unsafe(following, batch_size=batch_size, device=device),
                **(about or {}),
            },
            batch_size=batch_size,
            device=device,
        )

    def _next_actions(
        self, rows: torch.Tensor, action: torch.Tensor, next_observation: torch.Tensor, done: torch.Tensor
    ) -> torch.Tensor:
        """Actions ``[n, A]`` that follow those of ``rows`` [n] in their trajectories; their own where there is none.

        Of an online transition the one that follows was added ``online_stride`` transitions later, if it was yet, and if
        it is one of the same trajectory: where dropped episodes have moved others' transitions together it may not be. That
        is seen from the states: s' of the one is s of the other.
        """
        offline = self.offline.next_actions(rows.clamp(max=self.num_offline - 1))
        if not self.written:
            return offline
        slots = self._slots(rows).remainder(self.slots)
        newer = (self.written - 1 - slots).remainder(self.slots)  # transitions that were added after it
        later = (slots + self.online_stride).remainder(self.slots)
        candidates = self.online.gather(later)
        same = (candidates.frames[:, 0] == next_observation).flatten(1).all(1)
        follows = same & (newer >= self.online_stride) & ~done.squeeze(1)
        online = torch.where(follows.unsqueeze(1), candidates.numbers[:, : action.shape[1]], action)
        return torch.where(self.is_online(rows).unsqueeze(1), online, offline)

    def _gather(self, rows: torch.Tensor) -> Blocks:
        if not self.written:
            return self.offline.gather(rows)
        online = self.is_online(rows)
        blocks = self.offline.gather(rows.clamp(max=self.num_offline - 1))
        if self._host_waits:
            places = online.nonzero().view(-1)
            theirs = self.online.gather(self._slots(rows.index_select(0, places)))
            for block, new in zip(blocks, theirs, strict=True):
                block.index_copy_(0, places, new)
            return blocks
        # Every row is looked up on both sides, so that nothing needs to be counted.
        theirs = self.online.gather(self._slots(rows).mul_(online))
        return Blocks(
            *(torch.where(online.view(-1, *(1,) * (a.ndim - 1)), b, a) for a, b in zip(blocks, theirs, strict=True))
        )

    def _slots(self, rows: torch.Tensor) -> torch.Tensor:
        slots = rows - self.num_offline
        return slots.remainder_(self.slots) if self.overwritten else slots

    # Writing.

    def checked(self, transitions: TensorDictBase) -> Columns:
        """The columns of new online transitions ``[n]``, found usable.

        Raises:
            InputError: if they do not fit the schema, hold NaN or infinity, or are more than the ring takes at once.
        """
        source = "new transitions"
        columns = columns_of(transitions, source=source)
        check_schema(columns, self.schema, source=source)
        check_finite(columns, source=source)
        if len(transitions) > self.slots:
            raise InputError(f"{source}: {len(transitions)} at once, the online zone holds {self.slots}; add fewer")
        return columns

    def append(self, columns: Columns) -> torch.Tensor:
        """Write checked transitions; their rows ``[n]``."""
        count = len(columns[0])
        begin = self.written % self.slots
        self.online.write(begin, columns)
        slots = (np.arange(count) + begin) % self.slots
        if self.num_discarded:
            places = np.searchsorted(self._discarded, slots).clip(max=self.num_discarded - 1)
            places = places[self._discarded[places] == slots]
            if len(places):
                self._set_discarded(np.delete(self._discarded, places))
        self.written += count
        return torch.from_numpy((self.num_offline + slots) % self.max_size).to(self.device, non_blocking=True)

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> NoReturn:
        """Refused: transitions are added, never changed."""
        raise RuntimeError("transitions of this buffer are not changed; add new ones with extend()")

    def _empty(self) -> None:
        """Forget the online transitions."""
        self.written = 0
        self._set_discarded(np.empty(0, dtype=np.int64))

    # Discarded rows, kept as the ascending numbers of their slots in the online columns.

    @property
    def num_discarded(self) -> int:
        """Online rows that are held but never sampled."""
        return len(self._discarded)

    @property
    def num_online(self) -> int:
        """Online rows that may be sampled."""
        return self.held_online - self.num_discarded

    def discard(self, rows: torch.Tensor) -> None:
        """Never sample these online rows again, until they are overwritten.

        Raises:
            InputError: if one holds no online transition.
        """
        rows = rows.reshape(-1).cpu()
        bad = rows[(rows < 0) | (rows >= len(self)) | ~self.is_online(rows)]
        if len(bad):
            raise InputError(f"row {int(bad[0])} holds no online transition and cannot be discarded")
        self._set_discarded(np.union1d(self._discarded, (rows.numpy() - self.num_offline) % self.slots))

    def discarded_rows(self) -> torch.Tensor:
        """Their numbers, on the CPU."""
        return torch.from_numpy((self._discarded + self.num_offline) % self.max_size)

    def is_discarded(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether these rows were discarded, bool of their shape."""
        slots = (rows - self.num_offline) % self.slots
        return torch.isin(slots, torch.from_numpy(self._discarded).to(rows.device)) & self.is_online(rows)

    def online_rows(self, positions: torch.Tensor) -> torch.Tensor:
        """Rows of the online transitions that may be sampled, by their position among these (0..num_online-1)."""
        slots = positions
        if self.num_discarded:
            # As many discarded slots lie before the wanted one as there are discarded[i] - i <= position.
            slots = slots + torch.searchsorted(self._gaps, slots, right=True)
        rows = slots + self.num_offline
        return rows % self.max_size if self.fifo else rows

    def _set_discarded(self, slots: np.ndarray) -> None:
        self._discarded = slots
        self._gaps = torch.from_numpy(slots - np.arange(len(slots))).to(self.device)

    # State.

    def offline_reference(self) -> dict[str, Any]:
        """What tells one offline set from another: its rows, and a digest over some thousands of them."""
        if self._digest is None:
            count = min(self.num_offline, _DIGEST_ROWS)
            rows = torch.arange(count, device=self.device) * (self.num_offline - 1) // max(count - 1, 1)
            digest = hashlib.sha256()
            for column in self.offline.gather(rows).columns():
                digest.update(column.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._digest = digest.hexdigest()
        return {"rows": self.num_offline, "sha256": self._digest}

    def _reference(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "schema": {name: _described(*entry) for name, entry in zip(NAMES, self.schema, strict=True)},
            "offline": self.offline_reference(),
            "online_capacity": self.online_capacity,
            "overwrite": "fifo" if self.fifo else "online",
        }

    def state_dict(self) -> dict[str, Any]:
        """The online rows written so far, on the CPU, and what the offline rows must be."""
        return {
            **self._reference(),
            "written": self.written,
            "discarded": torch.from_numpy(self._discarded.copy()),
            "online": {
                name: column.to("cpu", copy=True).contiguous()
                for name, column in zip(NAMES, self.online.first(self.held_online), strict=True)
            },
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that is not of this storage.

        Raises:
            InputError: naming what differs.
        """
        written, discarded = state.get("written"), state.get("discarded")
        if not isinstance(written, int) or written < 0 or not isinstance(discarded, torch.Tensor):
            raise InputError("the state is damaged: it does not say how many transitions were written or discarded")
        for name, own in self._reference().items():
            if name == "online_capacity" and written <= min(state.get(name, 0), own):
                continue  # nothing was overwritten: the rows lie where they would have in a zone of this size
            if state.get(name) != own:
                raise InputError(f"the state is of another buffer: {name} is {state.get(name)} there, {own} here")
        held = min(written, self.slots)
        columns = tuple(state["online"][name] for name in NAMES)
        check_schema(columns, self.schema, source="the state")
        if any(len(column) != held for column in columns):
            raise InputError(f"the state is damaged: it says {held} online transitions and holds {_shapes(columns)}")
        if bool((discarded.diff() <= 0).any() | (discarded < 0).any() | (discarded >= held).any()):
            raise InputError("the state is damaged: it names discarded transitions that are not there")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the online rows back.

        Raises:
            InputError: as :meth:`check_state`.
        """
        self.check_state(state_dict)
        self.online.write(0, tuple(state_dict["online"][name] for name in NAMES))
        self.written = state_dict["written"]
        self._set_discarded(state_dict["discarded"].cpu().numpy().copy())


class UnionWriter(Writer):
    """Adds to the online zone of a :class:`UnionStorage`, which knows the position itself."""

    _storage: UnionStorage

    @property
    def _write_count(self) -> int:
        return self._storage.written

    def add(self, data: TensorDictBase) -> int:
        """Add one transition; its row."""
        return int(self.extend(data.unsqueeze(0))[0])

    def extend(self, data: TensorDictBase) -> torch.Tensor:
        """Add transitions ``[n]``; their rows ``[n]``."""
        index = self._storage.append(self._storage.checked(data))
        for entity in self._storage._attached_entities_iter():
            entity.mark_update(index)
        return index

    def _empty(self, empty_write_count: bool = True) -> None:
        pass

    def dumps(self, path: Any) -> None:
        """Nothing: the storage knows."""

    def loads(self, path: Any) -> None:
        """Nothing: the storage knows."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the storage knows."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the storage knows."""
