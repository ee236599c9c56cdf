# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The base class of a source of transitions, and the registry of sources by the prefix of a name (``minari:ID``)."""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deflow_torchrl.plugins import Registry

if TYPE_CHECKING:
    import torch

    from deflow_torchrl.data.dataset import TransitionDataset

_LOG = logging.getLogger(__name__)
_FORMER_PREFIXES = {"own": "file"}


class Source(ABC):
    """A source of transitions.

    A source is found by a prefix: in ``PREFIX:NAME``, NAME is the source's own name of a data set. Another package adds a
    source with :func:`register_source`, or with an entry point in the group ``deflow_torchrl.sources`` whose name is the
    prefix and whose value is an instance. A subclass must define :meth:`load`; the other methods have defaults.

    Attributes:
        fixed_environment: whether each data set belongs to one environment. Then the environment computes its rewards and is
            compared with it when it is loaded, the data cannot be evaluated in another one, and only the names in the
            package's tables of tasks are known.
    """

    fixed_environment = False

    @abstractmethod
    def load(
        self,
        name: str,
        *,
        split: str = "train",
        root: str | Path | None = None,
        download: bool = True,
        device: torch.device | str | None = None,
        memmap_dir: Path | None = None,
    ) -> TransitionDataset | None:
        """Load a set.

        Args:
            name: the source's name of the set.

        Keyword Args:
            split: ``"train"`` or ``"val"``.
            root: folder of data files, if the user gave one.
            download: fetch what is missing.
            device: device of the transitions; the CPU by default.
            memmap_dir: keep the transitions in memory-mapped files in a subfolder of this folder instead.

        Returns:
            The transitions; ``None`` for a validation split that the source does not have.

        Raises:
            InputError: where the data cannot be found, read or used.
            MissingExtraError: where the source's extra is not installed.
        """

    def ensure(
        self, name: str, *, root: str | Path | None = None, download: bool = True, show_progress: bool = True
    ) -> None:
        """Make sure that a set is on this machine; fetch it if it is missing. Load it only if there is no other way.

        Raises:
            InputError: where it cannot be found or fetched.
            MissingExtraError: where the source's extra is not installed.
        """
        self.load(name, root=root, download=download)

    def check_installed(self) -> None:  # noqa: B027 # most have nothing to check
        """Check that the packages which label the data and evaluate policies are installed.

        Raises:
            MissingExtraError: where an extra is missing.
        """

    def digest(self, name: str, *, root: str | Path | None = None) -> str | None:
        """SHA-256 of a set that is on this machine; ``None`` if the source computes none."""
        return None

    def describe(self, name: str, *, root: str | Path | None = None) -> dict[str, Any]:
        """What a run's record says about a set in addition to its contents: ``name`` and ``sha256``."""
        return {"name": name, "sha256": self.digest(name, root=root)}

    def environment(self, name: str) -> str | None:
        """Name of a set's environment for :func:`deflow_torchrl.envs.make_gym_env`; ``None`` if it has none."""
        return None

    def reference_returns(self, name: str, environment: str) -> tuple[float, float] | None:
        """Returns of (random policy, expert) in an environment, for normalised scores; ``None`` if they are unknown."""
        return None

    def location(self, name: str, *, root: str | Path | None = None) -> Path | None:
        """Folder that the user named, in the set's name or as ``root``; ``None`` if the set lies in a cache."""
        return None


SOURCES: Registry[Source] = Registry(
    Source,  # type: ignore[type-abstract]
    "source",
    "deflow_torchrl.sources",
    {
        "ogbench": "deflow_torchrl.sources.ogbench:SOURCE",
        "minari": "deflow_torchrl.sources.minari:SOURCE",
        "file": "deflow_torchrl.sources.files:SOURCE",
    },
)
"""Prefix -> source."""


def register_source(prefix: str, source: Source) -> None:
    """Register a source under a prefix, in this process.

    Args:
        prefix: ``PREFIX`` of ``PREFIX:NAME``.
        source: the source.

    Raises:
        InputError: if the prefix is taken by another source, or ``source`` is no :class:`Source`.
    """
    SOURCES.register(prefix, source)


def get_source(prefix: str) -> Source:
    """Look a source up.

    Raises:
        InputError: on an unknown prefix, with the nearest ones, or if two installed packages announce it.
    """
    return SOURCES.find(prefix)


def split_name(name: str) -> tuple[str | None, str]:
    """Split a name into prefix and rest; the prefix is ``None`` if there is none.

    ``own:``, the prefix of version 0.1, is read as ``file:``; this is logged once per process.

    Examples:
        >>> split_name("file:data/arm"), split_name("door-human-v1")
        (('file', 'data/arm'), (None, 'door-human-v1'))
    """
    prefix, colon, rest = name.partition(":")
    if not colon:
        return None, name
    if prefix in _FORMER_PREFIXES:
        _log_former_prefix(prefix)
    return _FORMER_PREFIXES.get(prefix, prefix), rest


@functools.cache
def _log_former_prefix(prefix: str) -> None:
    _LOG.warning(f"{prefix}:NAME is read as {_FORMER_PREFIXES[prefix]}:NAME, the prefix since version 0.2")


def settled_name(name: str) -> str:
    """A task's name as a run stores it: paths are absolute, so the name does not depend on the working folder."""
    return _with_place(name, lambda place: str(place.expanduser().absolute()))


def public_name(name: str) -> str:
    """A task's name for records and exports: of a path, the last part only."""
    return _with_place(name, lambda place: place.name)


def _with_place(name: str, show: Callable[[Path], str]) -> str:
    prefix, rest = split_name(name)
    place = None if prefix is None else get_source(prefix).location(rest)
    # The prefix stays as it was written: it is part of what a checkpoint or a sweep compares.
    return name if place is None else f"{name.partition(':')[0]}:{show(place)}"
