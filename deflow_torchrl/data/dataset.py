# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Transitions whose observations are stored once: the next observation is the following row, not a second copy.

An episode of T transitions is T + 1 consecutive *frames* (observations, the last one final) and T rows of action, reward and
``terminated``. Transition i of episode e therefore has s in frame i + e and s' in frame i + e + 1; ``truncated`` is the last
transition of an episode that does not terminate. Beside these columns only the number of each episode's first transition is
stored. A set of pictures is *stacked* when it is read: an observation is then k consecutive frames, joined along the channels.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler, Sampler
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from deflow_torchrl.data.assembly import fill_from_arrays
from deflow_torchrl.data.builder import ColumnBuilder
from deflow_torchrl.data.checks import Jump, ValidationReport, validate
from deflow_torchrl.data.chunks import ChunkedDataset, Ends
from deflow_torchrl.data.columns import POSITIONAL_READS, RowFile, map_column, release_pages
from deflow_torchrl.data.schema import Rows
from deflow_torchrl.data.transitions import Transitions, row_numbers
from deflow_torchrl.entries import Entries, unpack
from deflow_torchrl.errors import InputError, one_line
from deflow_torchrl.paths import make_writable_folder, only_one_prepares, write_text

_COLUMNS = ("observation", "action", "reward", "terminated")
_ABOUT_FILE = "dataset.json"
_STATE_FILE = "transitions.json"
_FORMAT = 1


class TransitionDataset(Transitions):
    """A validated, immutable set of transitions; ``dataset[index]`` is a TensorDict in TED (:mod:`deflow_torchrl.data.schema`).

    Made by :meth:`from_arrays`, :class:`TransitionBuilder` or a loader, never by hand.

    Args:
        observation: frames ``[F, ...]``, float32 or uint8.
        action: ``[N, A]`` float32.
        reward: ``[N]`` float32.
        terminated: ``[N]`` bool.
        episode_starts: number of each episode's first transition, ascending, int64 ``[E]``; F = N + E.
        folder: where the columns are memory-mapped; ``None`` in memory.
        source: name of the data, for messages.
        about: facts about the source.
        report: findings of the validation.
        frame_stack: k, frames of an observation, see :meth:`stacked`.

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
        frame_stack: int = 1,
    ) -> None:
        self.observation = observation
        self.action = action
        self.reward = reward
        self.terminated = terminated
        self.episode_starts = episode_starts
        # A process with another working folder opens the same files.
        self.folder = folder = None if folder is None else folder.absolute()
        self.source = source
        self.about = dict(about or {})
        self.report = report
        self.frame_stack = frame_stack
        self._files = (
            {name: RowFile(folder / f"{name}.bin", column.shape, column.dtype) for name, column in self._columns()}
            if folder is not None and POSITIONAL_READS
            else {}
        )
        self._in_memory: frozenset[str] = frozenset()
        self._bounds = torch.cat([episode_starts, episode_starts.new_tensor([len(action)])])
        self._first_frames = episode_starts + torch.arange(len(episode_starts), device=episode_starts.device)

    @classmethod
    def from_arrays(
        cls, observations: Any, actions: Any, rewards: Any, terminals: Any, timeouts: Any = None, **options: Any
    ) -> TransitionDataset:
        """Build and validate a set from arrays with one row a step, episodes one after another.

        Arrays may be tensors, lists, or anything with a shape that gives consecutive rows for a slice (numpy, ``h5py``): vector
        and image columns are read some megabytes at a time.

        Args:
            observations: s, ``[N, O]`` of any real type (float32 inside), ``[N, H, W, C]`` uint8, or a dictionary of several of
                these; the set's ``observation`` is then a TensorDict of them.
            actions: a, ``[N, A]`` floating point inside [-1, 1]; clipped to +-(1 - 1e-5).
            rewards: r, ``[N]`` or ``[N, 1]``; where there are none, ``"success-at-end"``: 1 on each episode's last row, which is
                made terminal, else 0; or ``"zero"``: no meaning, for methods that read no rewards.
            terminals: nonzero where the task ended (no bootstrap), ``[N]``.
            timeouts: nonzero on the last row of an episode that was cut without an end of the task, ``[N]``.

        Keyword Args:
            **options: the following.
            frame_stack: frames of an observation, see :meth:`stacked`; 1 by default.
            next_observations: s', like ``observations``; that of a terminal row is never used and may be NaN. Without it s' is
                the next row's s; an episode's last row then has no successor: it is left out, except where it is terminal.
            episode_ends: how ends are known that ``terminals`` and ``timeouts`` do not mark: an array ``[N]`` of episode numbers
                (an end where the number changes), an integer (every episode has that many rows), or ``"discontinuity"`` (an end
                where s' is not the next row's s; needs ``next_observations``). Never guessed: with ``None`` the flags mark all.
            both: how a row flagged as terminal and as timeout is read: ``"refuse"`` (default), ``"terminal"`` or ``"timeout"``.
            final_observation_rows: each episode's last row holds its final observation only, and no action (OGBench's layout).
                Where ``terminals`` mark the ends, a terminal last row says that the transition into it terminates.
            allow_jumps: accept observations that jump inside an episode (:mod:`deflow_torchrl.data.checks`: teleporters,
                wrapped angles, objects put back): all, or those up to a ratio.
            source: name of the arrays, for messages.
            about: facts about the source, kept with the set.
            folder: existing folder for memory-mapped columns; in memory where ``None``.

        Returns:
            The set; its ``report`` and ``about`` count the rows that were clipped, left out or found twice.

        Raises:
            InputError: on fewer than two transitions, wrong shapes, lengths or types, NaN or infinity, actions out of bounds,
                episodes whose end is not marked, flags that contradict one another, or a jump inside an episode.
        """
        frame_stack = options.pop("frame_stack", 1)
        dataset: TransitionDataset = fill_from_arrays(
            TransitionBuilder,
            observations=observations,
            actions=actions,
            rewards=rewards,
            terminals=terminals,
            timeouts=timeouts,
            **options,
        )
        return dataset.stacked(frame_stack)

    def __len__(self) -> int:
        """N, the number of transitions."""
        return len(self.action)

    def gather(self, rows: torch.Tensor) -> Rows:
        """Copy the transitions ``rows``, int64 ``[n]`` on the set's device."""
        frames = self.frames(rows)
        observations = self.observations(torch.stack([frames, frames + 1]))
        action, reward, terminated = (self.read(name, rows.unsqueeze(0)) for name in _COLUMNS[1:])
        done = self.is_last(rows) | terminated
        flags = torch.cat([terminated, done & ~terminated, done])
        return Rows(observations, action, reward.unsqueeze(-1), flags.unsqueeze(-1))

    def next_actions(self, rows: torch.Tensor) -> torch.Tensor:
        """Action of the transition that follows each in its episode; at an episode's end the transition's own.

        Args:
            rows: numbers of transitions, int64 of any shape on the set's device.

        Returns:
            ``[*rows.shape, A]``.
        """
        return self.read("action", torch.where(self.is_last(rows), rows, rows + 1))

    def frames(self, rows: torch.Tensor) -> torch.Tensor:
        """Numbers of the frames that hold s; s' is in the next."""
        return rows + torch.searchsorted(self.episode_starts, rows, right=True) - 1

    def observations(self, frames: torch.Tensor) -> Any:
        """Copy the observations whose newest frames have these numbers, ``[*frames.shape, *observation_shape]``.

        Frames before an episode's start are its first frame, as the authors stack them. Of several observations it is a
        TensorDict.
        """
        if self.frame_stack == 1:
            found = self.read("observation", frames)
            return unpack(found, self.entries) if self.entries else found
        first = self._first_frames[torch.searchsorted(self._first_frames, frames, right=True) - 1]
        steps = torch.arange(1 - self.frame_stack, 1, device=frames.device)
        parts = self.read("observation", torch.maximum(frames.unsqueeze(-1) + steps, first.unsqueeze(-1)))
        found = parts.movedim(frames.ndim, -2).flatten(-2)
        return unpack(found, self.entries, self.frame_stack) if self.entries else found

    def is_last(self, rows: torch.Tensor) -> torch.Tensor:
        """Whether transitions are the last of their episodes."""
        return rows + 1 == self._bounds[torch.searchsorted(self.episode_starts, rows, right=True)]

    def read(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Copy rows of a column, ``[*rows.shape, ...]``.

        Args:
            name: ``observation``, ``action``, ``reward`` or ``terminated``.
            rows: int64 of any shape; of ``observation`` the numbers of frames.
        """
        if name in self._files:
            return self._files[name].read(rows)
        column: torch.Tensor = getattr(self, name)
        return column.index_select(0, rows.reshape(-1)).view(
            *rows.shape, *column.shape[1:]
        )  # twice as fast as column[rows]

    def stacked(self, frame_stack: int) -> TransitionDataset:
        """Give observations of several frames, the oldest first, joined along the last dimension; nothing is copied.

        The observation of step t is the frames t - k + 1 to t, the next observation t - k + 2 to t + 1, so that the last frame of
        an episode is seen in next observations only. Before an episode's start its first frame is repeated.

        Args:
            frame_stack: k.

        Raises:
            InputError: if it is no positive number.

        Examples:
            >>> dataset = TransitionDataset.from_arrays(
            ...     observations=np.arange(4.0).reshape(4, 1), actions=np.zeros((4, 1)), rewards=np.ones(4),
            ...     terminals=np.zeros(4), timeouts=np.array([0, 0, 0, 1]),
            ... )
            >>> dataset.stacked(3)[:]["next", "observation"].tolist()
            [[0.0, 0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]
        """
        if not isinstance(frame_stack, int) or isinstance(frame_stack, bool) or frame_stack < 1:
            raise InputError(f"frame_stack={frame_stack!r}: a positive number of frames is needed")
        other = TransitionDataset.__new__(TransitionDataset)
        other.__dict__.update(self.__dict__, frame_stack=frame_stack)
        return other

    def with_rewards(self, reward: torch.Tensor, *, about: dict[str, Any] | None = None) -> TransitionDataset:
        """Give the same transitions with other rewards; nothing else is copied.

        Args:
            reward: ``[N]`` float32 on the set's device, kept in memory.

        Keyword Args:
            about: further facts about the set.

        Raises:
            InputError: if there are not as many rewards as transitions, or if they are not float32 or not finite.
        """
        if reward.shape != self.reward.shape:
            raise InputError(f"{len(self)} rewards are needed, got {list(reward.shape)}")
        if reward.dtype != torch.float32 or not bool(reward.isfinite().all()):
            kind = str(reward.dtype).removeprefix("torch.")
            raise InputError(
                f"rewards must be float32 and finite, got {kind if kind != 'float32' else 'NaN or infinity'}"
            )
        other = TransitionDataset.__new__(TransitionDataset)
        other.__dict__.update(self.__dict__, about={**self.about, **(about or {})})
        other._keep_in_memory({"reward": reward})
        return other

    def _keep_in_memory(self, columns: dict[str, torch.Tensor]) -> None:
        """Replace columns, those of a mapped set by tensors in memory."""
        self.__dict__.update(columns)
        self._in_memory = frozenset(columns)
        self._files = {name: file for name, file in self._files.items() if name not in columns}

    def chunked(self, length: int, *, gamma: float = 0.99, ends: Ends = "whole") -> ChunkedDataset:
        """Give chunks of ``length`` actions as single transitions, without copying anything: :mod:`deflow_torchrl.data.chunks`.

        Args:
            length: h, steps of a chunk.

        Keyword Args:
            gamma: discount of one step; that of the losses, which see gamma^h through ``steps_to_next_obs``.
            ends: ``"whole"``: a chunk starts wherever its h steps lie inside one trajectory. ``"valid"``: it starts at every
                row that h - 1 rows follow, also across trajectories' ends, as Q-chunking's authors sample; ``valid`` ``[h]``
                is then 1 for the first step and until a trajectory has ended, else 0. ``"valid_row"``: the same starts, and
                ``valid`` ``[1]`` of the last step, as QAM's authors mask whole chunks.

        Raises:
            InputError: on an option out of range, or a chunk longer than every trajectory.

        Examples:
            >>> dataset = TransitionDataset.from_arrays(
            ...     observations=np.arange(10.0).reshape(5, 2), actions=np.array([[0.1], [0.2], [0.3], [0.4], [0.5]]),
            ...     rewards=np.ones(5), terminals=np.zeros(5), timeouts=np.array([0, 0, 0, 0, 1]),
            ... )
            >>> chunks = dataset.chunked(3, gamma=0.5)
            >>> chunks[0]["action"], chunks[0]["next", "reward"], chunks[0]["steps_to_next_obs"]
            (tensor([0.1000, 0.2000, 0.3000]), tensor([1.7500]), tensor([3]))
        """
        return ChunkedDataset(self, length, gamma=gamma, ends=ends)

    def _columns(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, getattr(self, name)) for name in _COLUMNS)

    @property
    def entries(self) -> Entries | None:
        """Name -> shape of one step's observations where there are several: ``observation`` holds their bytes then."""
        return self.about.get("entries")

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Shape of one observation, ``[O]`` or ``[H, W, C]``; of stacked frames the last dimension is k times as wide."""
        *front, last = self.observation.shape[1:]
        return *front, self.frame_stack * last

    @property
    def num_episodes(self) -> int:
        """E; an episode without a transition (a lone observation) counts."""
        return len(self.episode_starts)

    @property
    def episode_lengths(self) -> torch.Tensor:
        """Transitions of each episode, ``[E]``."""
        return self._bounds.diff()

    @property
    def start_rows(self) -> torch.Tensor:
        """Number of the first transition of each episode that has one."""
        return self.episode_starts[self.episode_lengths > 0]

    @property
    def device(self) -> torch.device:
        """Where the transitions are kept."""
        return self.action.device

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, wherever they are kept."""
        return self.episode_starts.nbytes + sum(column.nbytes for _, column in self._columns())

    def to(self, device: torch.device | str) -> TransitionDataset:
        """Copy every column into the memory of ``device``; the set itself if it is there already."""
        if self.device == torch.device(device) and self.folder is None:
            return self
        moved = {name: getattr(self, name).to(device, copy=True) for name in (*_COLUMNS, "episode_starts")}
        facts: Any = {name: getattr(self, name) for name in ("source", "about", "report", "frame_stack")}
        return TransitionDataset(**moved, **facts)

    def release(self) -> None:
        """Give the pages of memory-mapped columns back to the system's cache."""
        for name, column in self._columns():
            if name not in self._in_memory:  # its pages would be lost
                release_pages(column, self.folder)

    def states(self) -> torch.Tensor:
        """Copy s of every transition, ``[N, ...]``; ``dataset[:]`` copies s' as well."""
        kept = torch.ones(len(self.observation), dtype=torch.bool, device=self.device)
        kept[self._bounds[1:] + torch.arange(self.num_episodes, device=self.device)] = False  # final observations
        return self.observations(kept.nonzero().squeeze(1))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the set into ``folder``, beside and renamed; :meth:`load` maps it, with as many frames to an observation.

        Raises:
            InputError: if the folder holds something, cannot be written, or the disk is full.
        """
        folder = Path(folder).expanduser()
        make_folder(folder, self._write_columns)
        return folder

    def _write_columns(self, folder: Path) -> TransitionDataset:
        for name, column in self._columns():
            with (folder / f"{name}.bin").open("wb") as file:
                for part in column.split(1 << 16):
                    file.write(part.cpu().numpy().tobytes())
        return self

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TransitionDataset:
        """Map a set written by :meth:`save`; it was validated when it was built.

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
            parts: dict[str, Any] = {
                name: map_column(folder / f"{name}.bin", tuple(shape), getattr(torch, dtype), writable=False)
                for name, (shape, dtype) in written["columns"].items()
            }
            parts["episode_starts"] = torch.from_numpy(np.load(folder / "episode_starts.npy", allow_pickle=False))
            report = written["report"]
            if report is not None:
                jump = None if report["jump"] is None else Jump(**report["jump"])
                report = ValidationReport(**{**report, "jump": jump})
            facts = {
                "source": written["source"],
                "about": written["about"],
                "frame_stack": written.get("frame_stack", 1),
            }
            return cls(**parts, folder=folder, report=report, **facts)
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise InputError(f"{folder} is damaged ({one_line(error)}); delete it and make it again") from error

    def write_about(self, folder: Path) -> None:
        """Write what :meth:`load` needs beside the four columns."""
        np.save(folder / "episode_starts.npy", self.episode_starts.cpu().numpy())
        written = {
            "format": _FORMAT,
            "source": self.source,
            "about": self.about,
            "report": None if self.report is None else asdict(self.report),
            "columns": {
                name: (list(column.shape), str(column.dtype).removeprefix("torch.")) for name, column in self._columns()
            },
            **({} if self.frame_stack == 1 else {"frame_stack": self.frame_stack}),
        }
        write_text(folder / _ABOUT_FILE, json.dumps(written, indent=2) + "\n")

    def __getstate__(self) -> dict[str, Any]:
        """Pickle a mapped set as the name of its folder."""
        if self.folder is None:
            return self.__dict__
        in_memory = {name: getattr(self, name) for name in self._in_memory}
        return {"folder": self.folder, "about": self.about, "frame_stack": self.frame_stack, "in_memory": in_memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See :meth:`__getstate__`.

        Raises:
            InputError: where the folder holds another set by now.
        """
        about, folder, frame_stack = state["about"], state["folder"], state["frame_stack"]
        if folder is None:
            self.__dict__.update(state)
            return
        loaded = self.load(folder).__dict__
        if loaded["about"].get("fingerprint") != about.get("fingerprint"):
            raise InputError(f"{folder} holds another set than it did; start again")
        self.__dict__.update({**loaded, "about": about, "frame_stack": frame_stack})
        if state["in_memory"]:
            self._keep_in_memory(state["in_memory"])

    def __repr__(self) -> str:
        where = f"mapped from {self.folder}" if self.folder else f"on {self.device}"
        stack = "" if self.frame_stack == 1 else f", frame_stack={self.frame_stack}"
        return f"TransitionDataset({len(self)} transitions, {self.num_episodes} episodes, {where}{stack}, source={self.source!r})"


class TransitionBuilder(ColumnBuilder):
    """Builds a :class:`TransitionDataset` of known size from chunks of rows; arguments and ``add_*`` as :class:`ColumnBuilder`.

    Examples:
        >>> builder = TransitionBuilder(2, frames=3, observation_shape=(4,), action_dim=1, source="example")
        >>> builder.add_episode(
        ...     observations=np.zeros((3, 4)), actions=np.zeros((2, 1)), rewards=np.ones(2), terminated=np.array([0, 1])
        ... )
        >>> builder.finish()[:]["next", "done"].flatten().tolist()
        [False, True]
    """

    def finish(
        self,
        *,
        episode_starts: np.ndarray | None = None,
        about: dict[str, Any] | None = None,
        allow_jumps: bool | float = True,
    ) -> TransitionDataset:
        """Make the set and validate it as a whole.

        Keyword Args:
            episode_starts: number of each episode's first transition ``[E]``, where :meth:`add_episode` was not used.
            about: facts about the source (provenance, versions), kept with the set.
            allow_jumps: accept observations that jump inside an episode: all, none, or those up to a ratio.

        Raises:
            InputError: if rows are missing, actions were out of bounds, or on a jump that is not allowed.
        """
        columns: dict[str, Any] = self.columns(episode_starts)
        dataset = TransitionDataset(**columns, folder=self.folder, source=self.source, about=about)
        dataset.report = validate(dataset, clipped=self.clipped)
        jump = dataset.report.jump
        if jump is not None and allow_jumps is not True and jump.ratio > allow_jumps:
            raise InputError(
                f"{self.source}: {jump}; mark the episode's end there (timeouts), or, if it belongs there (a teleporter, a "
                "wrapped angle, an object put back), say allow_jumps=True (--allow-jumps)"
            )
        if self.folder is not None:
            dataset.write_about(self.folder)
        return dataset


def prepared(
    folder: Path, fingerprint: dict[str, Any], build: Callable[[Path], TransitionDataset]
) -> TransitionDataset:
    """Map the set in ``folder`` if it was made from the same ``fingerprint``, else make it there.

    Args:
        folder: the set's own folder; made anew if it holds a set of another fingerprint.
        fingerprint: everything that the set depends on (file, size, time, task, versions), as JSON.
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

    def build_with_fingerprint(part: Path) -> TransitionDataset:
        dataset = build(part)
        dataset.about["fingerprint"] = fingerprint
        return dataset

    # A set gets its name when it is complete: opening one needs no lock and no right to write.
    if (found := find()) is not None:
        return found
    make_writable_folder(folder.parent)
    with only_one_prepares(folder.name, folder.parent):
        if (found := find()) is not None:
            return found
        if (folder / _ABOUT_FILE).is_file():
            shutil.rmtree(folder)
        return _make(folder, build_with_fingerprint)


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
        return _make(folder, build, describe)


def _make(
    folder: Path,
    build: Callable[[Path], TransitionDataset],
    describe: Callable[[TransitionDataset, Path], object] | None = None,
) -> TransitionDataset:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in the way; choose another folder or delete it")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        dataset = build(part)
        dataset.write_about(part)
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


class TransitionStorage(Storage):
    """A set of transitions as the storage of any TorchRL replay buffer; it cannot be written.

    Args:
        dataset: the transitions.

    Keyword Args:
        next_action: read ``("next", "action")`` too, see :meth:`TransitionDataset.next_actions`.
    """

    def __init__(self, dataset: Transitions, *, next_action: bool = False) -> None:
        super().__init__(len(dataset))
        self.dataset = dataset
        self.next_action = next_action

    @property
    def device(self) -> torch.device:
        """Device of drawn indices and of transitions."""
        return self.dataset.device

    def get(self, index: Any) -> TensorDict:
        """Transitions in TED."""
        return self.dataset.transitions(row_numbers(index, len(self), self.device), next_action=self.next_action)

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
        """The size, which tells another set on loading; the transitions never change."""
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
        """Write :meth:`state_dict`; the transitions stay in their place."""
        Path(path).mkdir(parents=True, exist_ok=True)
        write_text(Path(path) / _STATE_FILE, json.dumps(self.state_dict()) + "\n")

    def loads(self, path: str | os.PathLike[str]) -> None:
        """Check a state written by :meth:`dumps`.

        Raises:
            InputError: if it is of another set, or of another kind of storage.
        """
        file = Path(path) / _STATE_FILE
        if not file.is_file():
            raise InputError(f"{path} holds no state of a data set: it has no {_STATE_FILE}")
        self.load_state_dict(json.loads(file.read_text(encoding="utf-8")))


class TransitionReplayBuffer(TensorDictReplayBuffer):
    """An immutable TorchRL replay buffer over a set of transitions; ``buffer[:]`` is the whole set in TED.

    Args:
        dataset: a :class:`TransitionDataset` or its chunks.

    Keyword Args:
        batch_size (int, optional): transitions per :meth:`sample`.
        sampler (Sampler, optional): defaults to uniform with replacement, as in the paper.
        next_action (bool, optional): deliver ``("next", "action")`` too: the action of the transition that follows in the
            episode, at its end the transition's own. Defaults to ``False``.
        frame_stack (int, optional): frames of an observation, see :meth:`TransitionDataset.stacked`; the set's own by default.
        **kwargs: forwarded to :class:`torchrl.data.TensorDictReplayBuffer` (``transform``, ``prefetch``, ``pin_memory``...).

    Raises:
        InputError: if ``dataset`` is something else (a TensorDict).
    """

    def __init__(
        self,
        dataset: Transitions,
        *,
        batch_size: int | None = None,
        sampler: Sampler | None = None,
        next_action: bool = False,
        frame_stack: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(dataset, Transitions):
            raise InputError(
                f"TransitionReplayBuffer: a TransitionDataset is needed, not a {type(dataset).__name__}; TorchRL's own buffers "
                "and OfflineOnlineReplayBuffer take a TensorDict"
            )
        self.dataset = dataset = dataset if frame_stack is None else dataset.stacked(frame_stack)
        super().__init__(
            storage=TransitionStorage(dataset, next_action=next_action),
            sampler=RandomSampler() if sampler is None else sampler,
            writer=ImmutableDatasetWriter(),
            collate_fn=as_it_is,
            batch_size=batch_size,
            **kwargs,
        )


def as_it_is(transitions: TensorDict) -> TensorDict:
    """Collate a batch that a storage delivers whole; unlike a lambda it can be pickled."""
    return transitions
