# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Offline rows and a ring of online rows under one numbering, as TorchRL's Storage and Writer.

Rows 0..num_offline-1 are the offline set, read in its place; the online zone follows. Online transition number w (counted
from the first ever) goes to row num_offline + w. Once the last row is written, writing goes on as ``overwrite`` says:

* ``"online"``: at row num_offline, so that the offline rows stay;
* ``"fifo"``: at row 0, as in the reference, whose array is full after online_capacity steps: the oldest offline rows go
  first. The offline set itself is not written: a row that was overwritten is read from the online columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import Writer

from deflow_torchrl.data.checks import check_pictures
from deflow_torchrl.data.chunks import ChunkedDataset
from deflow_torchrl.data.columns import allocate
from deflow_torchrl.data.returns import OnlineReturns, ReturnsToGo
from deflow_torchrl.data.schema import TRANSITION_KEYS, Rows
from deflow_torchrl.data.transitions import Transitions, row_numbers
from deflow_torchrl.errors import InputError

NAMES = tuple(key if isinstance(key, str) else ".".join(key) for key in TRANSITION_KEYS)
_FORMAT = 1
_DIGEST_ROWS = 4096

Columns = Sequence[torch.Tensor]
"""Seven tensors ``[n, ...]`` in the order of :data:`TRANSITION_KEYS`."""

Schema = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape of one row and type of every column, by its name."""


def columns_of(transitions: TensorDictBase, *, source: str, schema: Schema | None = None, steps: int = 1) -> Columns:
    """Take the columns of a batch ``[n]``, without the graph of an action.

    Flags that TorchRL's environments may leave out follow from the others: ``terminated`` is ``done`` but not ``truncated``,
    ``truncated`` is ``done`` but not ``terminated``, ``done`` is either.

    Args:
        transitions: the batch.

    Keyword Args:
        source: name of the data, for messages.
        schema: shapes and types that are needed.
        steps: environment steps of a transition, which ``steps_to_next_obs`` must say where it is given.

    Raises:
        InputError: if a column is missing, is no tensor, does not fit the ``schema`` or holds NaN or infinity, if ``done``
            contradicts the other flags, or if a transition is of another number of steps.
    """
    columns = [transitions.get(key, None) for key in TRANSITION_KEYS]
    columns[4:] = _completed_flags(*columns[4:])
    for name, column in zip(NAMES, columns, strict=True):
        if not isinstance(column, torch.Tensor):
            keys = transitions.keys(True, True)
            found = ", ".join(sorted(key if isinstance(key, str) else ".".join(key) for key in keys))
            raise InputError(f"{source}: {name} is {'missing' if column is None else 'no tensor'}; found {found}")
    columns = [column.detach() for column in columns]
    check_schema(columns, schema or offline_schema(columns, source=source), source=source)
    _check_steps(transitions, steps, source=source)
    *_, terminated, truncated, done = columns
    if bool((wrong := done != terminated | truncated).any()):
        row = int(wrong.flatten().nonzero()[0])
        raise InputError(f"{source}: next.done of transition {row} is not terminated or truncated; mend the flags")
    # Collectors may leave NaN behind a terminal row, where nobody looks.
    observation, _, following, _, terminated, *_ = columns
    if following.is_floating_point():
        unused = following.isnan().flatten(1).any(1) & terminated.squeeze(-1)
        if bool(unused.any()):
            columns[2] = following.clone()
            columns[2][unused] = observation[unused]
    for name, column in zip(NAMES, columns, strict=True):
        if column.is_floating_point() and not bool((finite := column.isfinite()).all()):
            row = int((~finite).flatten(1).any(1).nonzero()[0])
            raise InputError(f"{source}: {name} of transition {row} is not finite; drop its episode")
    return columns


def _completed_flags(terminated: Any, truncated: Any, done: Any) -> tuple[Any, Any, Any]:
    if isinstance(done, torch.Tensor):
        if terminated is None:
            terminated = done if truncated is None else done.logical_and(truncated.logical_not())
        if truncated is None:
            truncated = done.logical_and(terminated.logical_not())
    elif done is None and terminated is not None and truncated is not None:
        done = terminated.logical_or(truncated)
    return terminated, truncated, done


def _check_steps(transitions: TensorDictBase, steps: int, *, source: str) -> None:
    for key in ("steps_to_next_obs", ("next", "steps_to_next_obs")):
        found = transitions.get(key, None)
        if found is not None and bool((wrong := found.reshape(-1) != steps).any()):
            row = int(wrong.nonzero()[0])
            raise InputError(
                f"{source}: transition {row} spans {int(found.reshape(-1)[row])} steps (steps_to_next_obs), {steps} is needed: "
                "leave MultiStepTransform out, and give chunks as a set's own, without transforms"
            )


def check_schema(columns: Columns, schema: Schema, *, source: str) -> None:
    """Refuse rows of another shape or type.

    Raises:
        InputError: naming the key, the expected and the found shape and type.
    """
    for column, (name, entry) in zip(columns, schema.items(), strict=True):
        found = tuple(column.shape[1:]), column.dtype
        if found != entry:
            raise InputError(f"{source}: {name} is {_described(*found)} a transition, {_described(*entry)} is needed")


def offline_schema(columns: Columns, *, source: str) -> Schema:
    """Describe an offline set; online transitions must look like it.

    Raises:
        InputError: if the set has no vectors of actions, or observations without a dimension of their own.
    """
    observation, action = columns[:2]
    frame = tuple(observation.shape[1:]), torch.uint8 if observation.dtype == torch.uint8 else torch.float32
    flag = (1,), torch.bool
    entries = (frame, (tuple(action.shape[1:]), torch.float32), frame, ((1,), torch.float32), flag, flag, flag)
    if observation.ndim < 2 or action.ndim != 2:
        found = f"{list(observation.shape)}, {list(action.shape)}"
        raise InputError(f"{source}: observation [N, ...] and action [N, A] are needed, found {found}")
    if observation.ndim == 4:
        check_pictures("observation", observation.shape, observation.dtype, source=source)
    return dict(zip(NAMES, entries, strict=True))


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


class ColumnRows:
    """Offline transitions that are no :class:`Transitions`: seven columns, read in their place."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def gather(self, rows: torch.Tensor) -> Rows:
        """Copy the transitions ``rows`` [n]."""
        return Rows.of([column.index_select(0, rows) for column in self._columns])

    def next_actions(self, rows: torch.Tensor) -> torch.Tensor:
        """Actions ``[n, A]`` that follow those of ``rows`` [n] in their trajectories; their own where none does.

        The following row does where ``done`` is not set and s' of the one is s of the other.
        """
        observation, action, next_observation, *_, done = self._columns
        later = (rows + 1).clamp(max=len(action) - 1)
        same = observation.index_select(0, later) == next_observation.index_select(0, rows)
        follows = same.flatten(1).all(1) & ~done.squeeze(1).index_select(0, rows) & (later > rows)
        return action.index_select(0, torch.where(follows, later, rows))

    def extras(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """More entries: none."""
        return {}


class UnionStorage(Storage):
    """Offline rows followed by online rows; see the module.

    Args:
        offline: the offline rows.
        device: device of the offline rows and of batches.

    Keyword Args:
        online_capacity: rows of the online zone.
        fifo: whether offline rows are overwritten.
        folder: folder of the memory-mapped online columns; ``None`` in memory.
        next_action: read ``("next", "action")`` too.
        online_stride: distance of an online transition to the one that follows it in its trajectory.
    """

    def __init__(
        self,
        offline: ColumnRows | Transitions,
        device: torch.device,
        *,
        online_capacity: int,
        fifo: bool,
        folder: Path | None,
        next_action: bool = False,
        online_stride: int = 1,
    ) -> None:
        self.offline = offline
        self.device = device
        self.num_offline = len(offline)
        self.online_capacity = online_capacity
        self.fifo = fifo
        self.next_action, self.online_stride = next_action, online_stride
        super().__init__(self.num_offline + online_capacity)
        first = offline.gather(torch.zeros(1, dtype=torch.int64, device=device))
        self.schema = offline_schema(first.columns(), source="offline data")
        self.steps = offline.length if isinstance(offline, ChunkedDataset) else 1
        """Environment steps of a transition."""
        self.slots = self.max_size if fifo else online_capacity
        """Rows of the online columns: with ``fifo`` every row of the union may become an online one."""
        on_cpu = device.type == "cpu"
        shapes = [(len(part), self.slots, *part.shape[2:]) for part in first]
        self.online = Rows(
            *(
                allocate(f"online_{name}", shape, part.dtype, folder)
                if on_cpu
                else torch.zeros(shape, dtype=part.dtype, device=device)
                for name, shape, part in zip(Rows._fields, shapes, first, strict=True)
            )
        )
        self.returns = (
            OnlineReturns(offline, self.online, stride=online_stride) if isinstance(offline, ReturnsToGo) else None
        )
        # On a CPU, where nothing waits for the device, only the online rows of a batch are read from the online columns.
        self._host_waits = on_cpu
        self._digest: str | None = None
        self._empty()

    def _empty(self) -> None:
        """Forget the online transitions."""
        self.written = 0
        """Online transitions ever added."""
        self._set_discarded(torch.empty(0, dtype=torch.int64))

    # Positions.

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
        return (rows >= self.num_offline) | (rows < self.overwritten)

    def contains(self, item: Any) -> torch.Tensor:
        """Whether there are transitions of these numbers, bool of the numbers' shape."""
        rows = torch.as_tensor(item)
        return (rows >= -len(self)) & (rows < len(self))

    def _slots(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows - self.num_offline).remainder_(self.slots)

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
        found = self._gather(rows)
        next_action = self._next_actions(rows, found) if self.next_action else None
        entries = self.offline.extras(rows.clamp(max=self.num_offline - 1)) | (about or {})
        if self.returns is not None and self.written:
            known = self.returns.values.index_select(0, self._slots(rows))
            entries["mc_return"] = torch.where(self.is_online(rows).unsqueeze(1), known, entries["mc_return"])
        if "valid" in entries and self.written:  # experience is whole chunks
            entries["valid"] = torch.where(self.is_online(rows).unsqueeze(1), 1.0, entries["valid"])
        return found.tensordict(device=self.device, next_action=next_action, about=entries)

    def _next_actions(self, rows: torch.Tensor, found: Rows) -> torch.Tensor:
        """Actions ``[n, A]`` that follow those of ``rows`` [n] in their trajectories; their own where there is none.

        An online transition is followed by the one added ``online_stride`` transitions later, if that was added already and
        if it belongs to the same trajectory: where episodes were dropped it may not. The states tell: s' of the one is s of
        the other.
        """
        offline = self.offline.next_actions(rows.clamp(max=self.num_offline - 1))
        if not self.written:
            return offline
        _, action, next_observation, *_, done = found.columns()
        slots = self._slots(rows)
        newer = (self.written - 1 - slots).remainder(self.slots)  # transitions that were added after it
        later = self.online.take((slots + self.online_stride).remainder(self.slots))
        same = (later.frames[0] == next_observation).flatten(1).all(1)
        follows = same & (newer >= self.online_stride) & ~done.squeeze(1)
        online = torch.where(follows.unsqueeze(1), later.action[0], action)
        return torch.where(self.is_online(rows).unsqueeze(1), online, offline)

    def _gather(self, rows: torch.Tensor) -> Rows:
        offline = self.offline.gather(rows.clamp(max=self.num_offline - 1))
        if not self.written:
            return offline
        online = self.is_online(rows)
        if self._host_waits:
            places = online.nonzero().squeeze(1)
            for part, new in zip(offline, self.online.take(self._slots(rows[places])), strict=True):
                part.index_copy_(1, places, new)
            return offline
        # Every row is read on both sides, so that nothing needs to be counted.
        theirs = self.online.take(self._slots(rows))
        return Rows(
            *(torch.where(online.view(-1, *[1] * (a.ndim - 2)), b, a) for a, b in zip(offline, theirs, strict=True))
        )

    # Writing.

    def append(self, transitions: TensorDictBase) -> torch.Tensor:
        """Write online transitions ``[n]``; their rows ``[n]``.

        Raises:
            InputError: if they do not fit the schema, hold NaN or infinity, or are more than the online columns hold.
        """
        source, count = "new transitions", len(transitions)
        columns = columns_of(transitions, source=source, schema=self.schema, steps=self.steps)
        if count > self.slots:
            raise InputError(f"{source}: {count} at once, the online zone holds {self.slots}; add fewer")
        slots = (torch.arange(count) + self.written) % self.slots
        self._write(slots, columns)
        if self.num_discarded:
            self._set_discarded(self._discarded[~torch.isin(self._discarded, slots)])
        self.written += count
        if self.returns is not None:
            self.returns.written(slots, self.written, self._discarded)
        return ((self.num_offline + slots) % self.max_size).to(self.device, non_blocking=True)

    def _write(self, slots: torch.Tensor, columns: Columns) -> None:
        slots = slots.to(self.device)
        for own, new in zip(self.online, Rows.of(columns), strict=True):
            own.index_copy_(1, slots, new.to(self.device))

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> NoReturn:
        """Refused: transitions are added, never changed."""
        raise RuntimeError("transitions of this buffer are not changed; add new ones with extend()")

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
        self._set_discarded(torch.cat([self._discarded, self._slots(rows)]).unique())

    def discarded_rows(self) -> torch.Tensor:
        """Row numbers of the discarded transitions, on the CPU."""
        return (self._discarded + self.num_offline) % self.max_size

    def is_discarded(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether these rows were discarded, bool of their shape."""
        return torch.isin(self._slots(rows), self._discarded.to(rows.device)) & self.is_online(rows)

    def online_rows(self, positions: torch.Tensor) -> torch.Tensor:
        """Rows of the online transitions that may be sampled, by their position among these (0..num_online-1)."""
        if self.num_discarded:
            # As many discarded slots lie before the wanted one as there are discarded[i] - i <= position.
            positions = positions + torch.searchsorted(self._gaps, positions, right=True)
        return (positions + self.num_offline) % self.max_size

    def _set_discarded(self, slots: torch.Tensor) -> None:
        self._discarded = slots
        self._gaps = (slots - torch.arange(len(slots))).to(self.device)

    # State.

    def _reference(self) -> dict[str, Any]:
        """Describe the storage so that another one is told apart; of the offline set by a digest over some thousand rows."""
        if self._digest is None:
            count = min(self.num_offline, _DIGEST_ROWS)
            rows = torch.arange(count, device=self.device) * (self.num_offline - 1) // max(count - 1, 1)
            digest = hashlib.sha256()
            for column in self.offline.gather(rows).columns():
                digest.update(column.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._digest = digest.hexdigest()
        return {
            "format": _FORMAT,
            "schema": {name: _described(*entry) for name, entry in self.schema.items()},
            "offline": {"rows": self.num_offline, "sha256": self._digest},
            "online_capacity": self.online_capacity,
            "overwrite": "fifo" if self.fifo else "online",
        }

    def state_dict(self) -> dict[str, Any]:
        """The online rows written so far, on the CPU, and a description of the offline rows."""
        held = Rows(*(part[:, : self.held_online] for part in self.online))
        return {
            **self._reference(),
            "written": self.written,
            "discarded": self._discarded.clone(),
            "online": {name: c.to("cpu", copy=True) for name, c in zip(NAMES, held.columns(), strict=True)},
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that is not of this storage.

        Raises:
            InputError: naming the difference.
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
        columns = [state["online"][name] for name in NAMES]
        check_schema(columns, self.schema, source="the state")
        if lengths := {len(column) for column in columns} - {held}:
            raise InputError(f"the state is damaged: it says {held} online transitions and holds {min(lengths)}")
        if bool((discarded.diff() <= 0).any() | (discarded < 0).any() | (discarded >= held).any()):
            raise InputError("the state is damaged: it names discarded transitions that are not there")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the online rows back.

        Raises:
            InputError: as :meth:`check_state`.
        """
        self.check_state(state_dict)
        self.written = state_dict["written"]
        self._write(torch.arange(self.held_online), [state_dict["online"][name] for name in NAMES])
        self._set_discarded(state_dict["discarded"].cpu().clone())
        if self.returns is not None:  # in the order in which they were written
            slots = (torch.arange(self.held_online) + self.written - self.held_online) % self.slots
            self.returns.written(slots, self.written, self._discarded)


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
        index = self._storage.append(data)
        for entity in self._storage._attached_entities_iter():
            entity.mark_update(index)
        return index

    def _empty(self, empty_write_count: bool = True) -> None:
        pass

    def dumps(self, path: Any) -> None:
        """Nothing: the storage keeps the position."""

    def loads(self, path: Any) -> None:
        """Nothing: the storage keeps the position."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the storage keeps the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: the storage keeps the position."""
