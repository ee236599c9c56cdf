# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Transitions stored once: the next observation is the following row, not a second copy.

An episode of T transitions is T + 1 consecutive *frames* (observations, the last one final) and T rows of action, reward and
``terminated``. Transition i of episode e therefore has s in frame i + e and s' in frame i + e + 1; ``truncated`` is the last
transition of an episode that does not terminate. Nothing else is stored but the number of each episode's first transition.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from deflow_torchrl.data.columns import RowFile, map_column, release_pages, runs_of
from deflow_torchrl.data.continuity import Jump
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import make_writable_folder, only_one_prepares, write_text
from deflow_torchrl.progress import patient_bar

_COLUMNS = ("observation", "action", "reward", "terminated", "episode_starts")
_ABOUT_FILE = "dataset.json"
_STATE_FILE = "transitions.json"
_FORMAT = 1


@dataclass(frozen=True)
class ValidationReport:
    """What the check at load found; what cannot be used is refused, the rest is counted here.

    Attributes:
        transitions: N.
        episodes: episodes with at least one transition.
        shortest_episode: transitions of the shortest episode.
        longest_episode: transitions of the longest episode.
        reward_min: smallest reward.
        reward_max: largest reward.
        terminated: transitions without a bootstrap behind them.
        clipped_actions: numbers moved to +-(1 - 1e-5).
        duplicated_transitions: transitions whose s and a equal an earlier one's.
        jump: the largest jump of the observation inside an episode, if there is any.
    """

    transitions: int
    episodes: int
    shortest_episode: int
    longest_episode: int
    reward_min: float
    reward_max: float
    terminated: int
    clipped_actions: int
    duplicated_transitions: int
    jump: Jump | None = None


class TransitionDataset:
    """A validated, immutable set of transitions; ``dataset[index]`` is a TensorDict in TED (:mod:`deflow_torchrl.data.schema`).

    Made by :meth:`from_arrays`, :class:`deflow_torchrl.data.builder.TransitionBuilder` or a loader, never by hand.

    Args:
        observation: frames ``[F, ...]``, float32 or uint8.
        action: ``[N, A]`` float32.
        reward: ``[N]`` float32.
        terminated: ``[N]`` bool.
        episode_starts: number of each episode's first transition, ascending, int64 ``[E]``; F = N + E.
        folder: where the columns are memory-mapped; ``None`` in memory.
        source: what the data are, for messages.
        about: what is known of the source.
        report: what validation found.

    Examples:
        >>> dataset = TransitionDataset.from_arrays(
        ...     observations=np.arange(8.0).reshape(4, 2), actions=np.zeros((4, 1)), rewards=np.ones(4),
        ...     terminals=np.array([0, 1, 0, 0]), timeouts=np.array([0, 0, 0, 1]),
        ... )
        >>> len(dataset), dataset.num_episodes
        (3, 2)
        >>> dataset[0]["next", "observation"]
        tensor([2., 3.])
    """

    def __init__(
        self,
        *,
        observation: torch.Tensor,
        action: torch.Tensor,
        reward: torch.Tensor,
        terminated: torch.Tensor,
        episode_starts: torch.Tensor,
        folder: Path | None = None,
        source: str = "data",
        about: dict[str, Any] | None = None,
        report: ValidationReport | None = None,
    ) -> None:
        self.observation = observation
        self.action = action
        self.reward = reward
        self.terminated = terminated
        self.episode_starts = episode_starts
        self.folder = folder
        self.source = source
        self.about = dict(about or {})
        self.report = report
        self._files = (
            None
            if folder is None
            else {
                name: RowFile(folder / f"{name}.bin", tuple(column.shape), column.dtype)
                for name, column in zip(_COLUMNS, (observation, action, reward, terminated), strict=False)
            }
        )
        self._bounds = torch.cat([episode_starts, episode_starts.new_tensor([len(action)])])

    @classmethod
    def from_arrays(
        cls,
        observations: Any,
        actions: Any,
        rewards: Any,
        terminals: Any,
        timeouts: Any = None,
        *,
        next_observations: Any = None,
        episode_ends: Any = None,
        **options: Any,
    ) -> TransitionDataset:
        """Build and validate a set from arrays, tensors or lists with one row a step.

        Args:
            observations: ``[N, O]``, or ``[N, H, W, C]`` uint8.
            actions: ``[N, A]`` in [-1, 1].
            rewards: ``[N]``.
            terminals: 1 where the task ended, ``[N]``.
            timeouts: 1 on the last row of an episode that was cut, ``[N]``.

        Keyword Args:
            next_observations: like ``observations``; the next row's where ``None``.
            episode_ends: how ends are known that the flags do not mark; never guessed.
            **options: ``both``, ``final_observation_rows``, ``allow_jumps``, ``source``, ``about``, ``folder``; these and the
                others are described at :func:`deflow_torchrl.data.assembly.dataset_from_arrays`.

        Raises:
            InputError: on anything that cannot be used.
        """
        from deflow_torchrl.data.assembly import dataset_from_arrays

        return dataset_from_arrays(
            observations=observations,
            actions=actions,
            rewards=rewards,
            terminals=terminals,
            timeouts=timeouts,
            next_observations=next_observations,
            episode_ends=episode_ends,
            **options,
        )

    def __len__(self) -> int:
        """N, the number of transitions."""
        return len(self.action)

    def __getitem__(self, index: Any) -> TensorDict:
        """Transitions in TED.

        Args:
            index: an integer, slice, list, range, array or tensor of integers of any shape, or a mask ``[N]``.
        """
        return self._transitions(self._rows(index))

    def draw(self, *shape: int, next_action: bool = False) -> TensorDict:
        """Transitions drawn uniformly with replacement, ``[*shape]``, on the set's device without a word to the host.

        With ``next_action`` they hold ``("next", "action")`` too, see :meth:`next_actions`.
        """
        return self._delivered(torch.randint(len(self), shape, device=self.device), next_action=next_action)

    def _delivered(self, rows: torch.Tensor, *, next_action: bool) -> TensorDict:
        transitions = self._transitions(rows)
        if next_action:
            transitions["next", "action"] = self.next_actions(rows)
        return transitions

    def next_actions(self, rows: torch.Tensor) -> torch.Tensor:
        """Action of the transition that follows each in its episode; at an episode's end the transition's own.

        Args:
            rows: numbers of transitions, int64 of any shape on the set's device.

        Returns:
            ``[*rows.shape, A]``.
        """
        following = rows + 1
        ends = self._bounds[torch.searchsorted(self.episode_starts, rows, right=True)]
        following = torch.where(following == ends, rows, following)
        if self._files is None:
            return self.action[following] if rows.ndim else self.action[following].clone()
        own, place = torch.unique(following, return_inverse=True)
        return self._files["action"].read(runs_of(own))[place]

    def _transitions(self, rows: torch.Tensor) -> TensorDict:
        episode = torch.searchsorted(self.episode_starts, rows, right=True)  # one more than the episode's number
        observation, following, action, reward, terminated = self._gather(rows, rows + episode - 1)
        terminated = terminated.unsqueeze(-1)
        done = (rows + 1 == self._bounds[episode]).unsqueeze(-1) | terminated
        return TensorDict(
            {
                "observation": observation,
                "action": action,
                "next": TensorDict(
                    {
                        "observation": following,
                        "reward": reward.unsqueeze(-1),
                        "terminated": terminated,
                        "truncated": done & ~terminated,
                        "done": done,
                    },
                    batch_size=rows.shape,
                ),
            },
            batch_size=rows.shape,
        )

    def _gather(self, rows: torch.Tensor, frame: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """s, s', a, r and ``terminated`` of transitions whose s is in ``frame``."""
        if self._files is None:
            taken = [(self.observation, frame), (self.observation, frame + 1)]
            taken += [(column, rows) for column in (self.action, self.reward, self.terminated)]
            # A single number would give a view, through which the set could be written.
            return tuple(column[at] if at.ndim else column[at].clone() for column, at in taken)
        # In the order of the file, each row once: s' of one transition is s of the next.
        frames, place = torch.unique(torch.stack([frame, frame + 1]), return_inverse=True)
        observations = self._files["observation"].read(runs_of(frames))
        own, own_place = torch.unique(rows, return_inverse=True)
        runs = runs_of(own)
        rest = (self._files[name].read(runs)[own_place] for name in ("action", "reward", "terminated"))
        return observations[place[0]], observations[place[1]], *rest

    def chunks(self, rows: int, *, doing: str) -> Iterator[tuple[int, TensorDict]]:
        """Yield (number of the first transition, transitions) over the set, with a bar named ``doing`` if it takes long."""
        for begin in patient_bar(range(0, len(self), rows), desc=doing, unit="chunk"):
            yield begin, self[begin : begin + rows]

    @property
    def num_episodes(self) -> int:
        """E; an episode without a transition (a lone observation) counts."""
        return len(self.episode_starts)

    @property
    def episode_lengths(self) -> torch.Tensor:
        """Transitions of each episode, ``[E]``."""
        return self._bounds.diff()

    @property
    def device(self) -> torch.device:
        """Where the transitions are kept."""
        return self.action.device

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, wherever they are kept."""
        return sum(getattr(self, name).nbytes for name in _COLUMNS)

    def to(self, device: torch.device | str) -> TransitionDataset:
        """The same set with every column in the memory of ``device``; itself if it is there already."""
        if self.device == torch.device(device) and self.folder is None:
            return self
        columns = {name: getattr(self, name).to(device, copy=True) for name in _COLUMNS}
        return TransitionDataset(**columns, source=self.source, about=self.about, report=self.report)

    def release(self) -> None:
        """Give the pages of memory-mapped columns back to the system's cache."""
        for name in ("observation", "action", "reward", "terminated"):
            release_pages(getattr(self, name), self.folder)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the set into ``folder``, beside and renamed; :meth:`load` maps it.

        Raises:
            InputError: if the folder exists, cannot be written, or the disk is full.
        """
        folder = Path(folder).expanduser()
        if folder.exists():
            raise InputError(f"{folder} is in the way; choose another folder or delete it")
        make_writable_folder(folder.parent)
        with only_one_prepares(folder.name, folder.parent):
            return self._save(folder)

    def _save(self, folder: Path) -> Path:
        part = _fresh_part(folder)
        try:
            for name in _COLUMNS[:-1]:
                column = getattr(self, name)
                with (part / f"{name}.bin").open("wb") as file:
                    for begin in range(0, len(column), 1 << 16):
                        file.write(column[begin : begin + (1 << 16)].cpu().numpy().tobytes())
            self._write_about(part)
            part.rename(folder)
        except OSError as error:
            raise InputError(f"cannot write in {folder.parent} ({error.strerror}); choose another folder") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TransitionDataset:
        """Map a set written by :meth:`save`; it was validated when it was written.

        Raises:
            InputError: if the folder holds no such set or a damaged one.
        """
        folder = Path(folder).expanduser()
        path = folder / _ABOUT_FILE
        if not path.is_file():
            raise InputError(f"{folder} holds no data set: it has no {_ABOUT_FILE}")
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            if written["format"] != _FORMAT:
                raise InputError(f"{path} has format {written['format']}, this version reads {_FORMAT}; make it again")
            columns = {
                name: map_column(folder / f"{name}.bin", tuple(shape), getattr(torch, dtype), writable=False)
                for name, (shape, dtype) in written["columns"].items()
            }
            starts = torch.from_numpy(np.load(folder / "episode_starts.npy", allow_pickle=False))
            report = written["report"]
            jump = None if report is None or report["jump"] is None else Jump(**report["jump"])
            return cls(
                **columns,
                episode_starts=starts,
                folder=folder,
                source=written["source"],
                about=written["about"],
                report=None if report is None else ValidationReport(**{**report, "jump": jump}),
            )
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{folder} is damaged ({' '.join(str(error).split())}); delete it and make it again"
            ) from error

    def _write_about(self, folder: Path) -> None:
        """Everything beside the four columns."""
        np.save(folder / "episode_starts.npy", self.episode_starts.cpu().numpy())
        written = {
            "format": _FORMAT,
            "source": self.source,
            "about": self.about,
            "report": None if self.report is None else asdict(self.report),
            "columns": {
                name: (list(getattr(self, name).shape), str(getattr(self, name).dtype).removeprefix("torch."))
                for name in _COLUMNS[:-1]
            },
        }
        write_text(folder / _ABOUT_FILE, json.dumps(written, indent=2) + "\n")

    def _rows(self, index: Any) -> torch.Tensor:
        return row_numbers(index, len(self), self.device)

    def states(self) -> torch.Tensor:
        """Copy s of every transition, ``[N, ...]``; ``dataset[:]`` makes a second copy for s'."""
        kept = torch.ones(len(self.observation), dtype=torch.bool, device=self.device)
        kept[self._bounds[1:] + torch.arange(self.num_episodes, device=self.device)] = False  # final observations
        return self.observation[kept]

    def __getstate__(self) -> dict[str, Any]:
        """A mapped set travels to another process as its folder's name."""
        return {"folder": self.folder, "about": self.about} if self.folder is not None else self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See :meth:`__getstate__`.

        Raises:
            InputError: where the folder holds another set by now.
        """
        if state.keys() != {"folder", "about"}:
            self.__dict__.update(state)
            return
        found = self.load(state["folder"])
        if found.about.get("fingerprint") != state["about"].get("fingerprint"):
            raise InputError(f"{state['folder']} holds another set than it did; start again")
        self.__dict__.update(found.__dict__)
        self.about = state["about"]

    def __repr__(self) -> str:
        where = f"mapped from {self.folder}" if self.folder else f"on {self.device}"
        return (
            f"TransitionDataset({len(self)} transitions, {self.num_episodes} episodes, {where}, source={self.source!r})"
        )


def row_numbers(index: Any, length: int, device: torch.device) -> torch.Tensor:
    """Any index as non-negative row numbers, int64 of the index's shape.

    Args:
        index: an integer, slice, list, range, array or tensor of integers of any shape, or a mask ``[length]``.
        length: how many rows there are.
        device: where the numbers are wanted.

    Raises:
        IndexError: if it is no index, or out of range (an accelerator notices that when it reads).
    """
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if index is Ellipsis:
        index = slice(None)
    if isinstance(index, slice):
        return torch.arange(*index.indices(length), device=device)
    if isinstance(index, (list, range)) and len(index) == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    try:
        rows = torch.as_tensor(index, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise IndexError(f"{index!r} is no index of transitions") from error
    if rows.dtype == torch.bool:
        if rows.shape != (length,):
            raise IndexError(f"a mask of shape {tuple(rows.shape)} for {length} transitions")
        return rows.nonzero().squeeze(-1)
    if rows.dtype.is_floating_point or rows.dtype.is_complex:
        raise IndexError(f"an index of type {rows.dtype}; integers are needed")
    rows = rows.to(torch.int64)
    rows = torch.where(rows < 0, rows + length, rows)
    # An accelerator checks by itself, without making the host wait.
    if rows.device.type == "cpu" and bool(((rows < 0) | (rows >= length)).any()):
        raise IndexError(f"an index is out of range for {length} transitions")
    return rows


def prepared(
    folder: Path, fingerprint: dict[str, Any], build: Callable[[Path], TransitionDataset]
) -> TransitionDataset:
    """Map the set in ``folder`` if it was made from what ``fingerprint`` says, else make it there.

    Args:
        folder: the set's own folder; made anew if it holds a set of another fingerprint.
        fingerprint: what the set depends on (file, size, time, task, versions), as JSON.
        build: makes the set with its columns in the folder it is given.

    Raises:
        InputError: if another process makes it at this moment, the folder holds something else or cannot be written, or the
            disk is full.
    """
    fingerprint = json.loads(json.dumps(fingerprint))  # tuples become lists

    def find() -> TransitionDataset | None:
        if not (folder / _ABOUT_FILE).is_file():
            return None
        found = TransitionDataset.load(folder)
        return found if found.about.get("fingerprint") == fingerprint else None

    # A set is renamed into its place whole: whoever only opens it needs no lock, and no right to write.
    found = find()
    if found is not None:
        return found
    make_writable_folder(folder.parent)
    with only_one_prepares(folder.name, folder.parent):
        found = find()
        if found is not None:
            return found
        if (folder / _ABOUT_FILE).is_file():
            shutil.rmtree(folder)
        return _make(folder, build, fingerprint=fingerprint)


def make_folder(
    folder: Path,
    build: Callable[[Path], TransitionDataset],
    *,
    describe: Callable[[TransitionDataset, Path], object] | None = None,
) -> TransitionDataset:
    """Make a set in a folder that must not exist yet; see :func:`prepared`.

    Args:
        folder: the set's own folder.
        build: makes the set with its columns in the folder it is given.

    Keyword Args:
        describe: writes more about the set into the folder it is given, before that gets its name.

    Raises:
        InputError: as :func:`prepared`.
    """
    make_writable_folder(folder.parent)
    with only_one_prepares(folder.name, folder.parent):
        return _make(folder, build, describe=describe)


def _make(
    folder: Path,
    build: Callable[[Path], TransitionDataset],
    *,
    fingerprint: dict[str, Any] | None = None,
    describe: Callable[[TransitionDataset, Path], object] | None = None,
) -> TransitionDataset:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in the way; choose another folder or delete it")
    part = _fresh_part(folder)
    try:
        dataset = build(part)
        if fingerprint is not None:
            dataset.about["fingerprint"] = fingerprint
        dataset._write_about(part)
        if describe is not None:
            describe(dataset, part)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write in {folder.parent} ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return TransitionDataset.load(folder)


def _fresh_part(folder: Path) -> Path:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return part


class TransitionStorage(Storage):
    """A :class:`TransitionDataset` as the storage of any TorchRL replay buffer; it cannot be written.

    Args:
        dataset: the transitions.

    Keyword Args:
        next_action: read ``("next", "action")`` too, see :meth:`TransitionDataset.next_actions`.
    """

    def __init__(self, dataset: TransitionDataset, *, next_action: bool = False) -> None:
        super().__init__(len(dataset))
        self.dataset = dataset
        self.next_action = next_action

    @property
    def device(self) -> torch.device:
        """Where indices are drawn and transitions are read."""
        return self.dataset.device

    def get(self, index: Any) -> TensorDict:
        """Transitions in TED."""
        return self.dataset._delivered(self.dataset._rows(index), next_action=self.next_action)

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        """Refused: the set is immutable."""
        raise RuntimeError("an offline data set cannot be written; keep new transitions in a buffer of their own")

    def _empty(self) -> None:
        self.set(None, None)

    def __len__(self) -> int:
        """Number of transitions."""
        return len(self.dataset)

    def contains(self, item: Any) -> torch.Tensor:
        """Whether there are transitions of these numbers, bool of the numbers' shape."""
        rows = torch.as_tensor(item)
        return (rows >= -len(self)) & (rows < len(self))

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes, so only the size, to notice another set on loading."""
        return {"transitions": len(self.dataset), "episodes": self.dataset.num_episodes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the state is of a set of this size.

        Raises:
            InputError: if it is not.
        """
        own = self.state_dict()
        if state_dict != own:
            theirs, mine = (
                " ".join(f"{number} {name}" for name, number in state.items()) for state in (state_dict, own)
            )
            raise InputError(f"the state is of another data set: {theirs} there, {mine} here")

    def dumps(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict`; the transitions stay where they are."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _STATE_FILE, json.dumps(self.state_dict()) + "\n")

    def loads(self, path: str | os.PathLike[str]) -> None:
        """Check what :meth:`dumps` wrote.

        Raises:
            InputError: if it is of another set, or of another kind of storage.
        """
        file = Path(path) / _STATE_FILE
        if not file.is_file():
            raise InputError(f"{path} holds no state of a data set: it has no {_STATE_FILE}")
        self.load_state_dict(json.loads(file.read_text(encoding="utf-8")))


class TransitionReplayBuffer(TensorDictReplayBuffer):
    """An immutable TorchRL replay buffer over a :class:`TransitionDataset`; ``buffer[:]`` is the whole set in TED.

    Args:
        dataset: the transitions.

    Keyword Args:
        batch_size (int, optional): transitions per :meth:`sample`.
        sampler (Sampler, optional): defaults to uniform with replacement, as in the paper.
        next_action (bool, optional): deliver ``("next", "action")`` too: the action of the transition that follows in the
            episode, at its end the transition's own. Defaults to ``False``.
        **kwargs: forwarded to :class:`torchrl.data.TensorDictReplayBuffer` (``transform``, ``prefetch``, ``pin_memory``...).
    """

    def __init__(
        self,
        dataset: TransitionDataset,
        *,
        batch_size: int | None = None,
        sampler: Sampler | None = None,
        next_action: bool = False,
        **kwargs: Any,
    ) -> None:
        self.dataset = dataset
        super().__init__(
            storage=TransitionStorage(dataset, next_action=next_action),
            sampler=RandomSampler() if sampler is None else sampler,
            writer=ImmutableDatasetWriter(),
            collate_fn=_as_it_is,
            batch_size=batch_size,
            **kwargs,
        )


def _as_it_is(transitions: TensorDict) -> TensorDict:
    return transitions


def to_storage(
    build: Callable[[Path | None], TransitionDataset],
    *,
    fingerprint: dict[str, Any],
    device: torch.device | str | None,
    memmap_dir: str | os.PathLike[str] | None,
) -> TransitionDataset:
    """Build a set in memory, on a device, or in memory-mapped files that a later call finds again.

    Args:
        build: makes the set, in memory or with its columns in a folder.

    Keyword Args:
        fingerprint: as in :func:`prepared`.
        device: where the transitions are kept; the CPU by default.
        memmap_dir: folder of the memory-mapped set, instead of a device.

    Raises:
        InputError: if both are given, and as ``build`` and :func:`prepared`.
    """
    if memmap_dir is None:
        return build(None).to("cpu" if device is None else device)
    if device is not None and torch.device(device).type != "cpu":
        raise InputError("give device or memmap_dir, not both: memory-mapped transitions live on the CPU")
    return prepared(Path(memmap_dir).expanduser(), fingerprint, build)
