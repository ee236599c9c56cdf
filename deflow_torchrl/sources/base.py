# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What a source of transitions is, and the sources by the prefix of a name (``minari:ID``)."""

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
    """Where transitions come from.

    A source is known by the prefix of a name: ``PREFIX:NAME`` is the set that it calls NAME. Another package adds one by
    :func:`register_source`, or by an entry point in the group ``deflow_torchrl.sources`` whose name is the prefix and whose
    value is an instance. :meth:`load` is all that has to be written.

    Attributes:
        fixed_environment: whether a set and its environment are one (its rewards are computed there, and both are compared
            when it is loaded), so that it cannot be evaluated elsewhere and the names are those of a table of tasks.
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
            name: what the source calls it.

        Keyword Args:
            split: ``"train"`` or ``"val"``.
            root: folder of data files that the user gave.
            download: fetch what is missing.
            device: where the transitions are kept; the CPU by default.
            memmap_dir: keep them in memory-mapped files, in a folder of their own in this one, instead.

        Returns:
            The transitions; ``None`` for a validation split that the source does not have.

        Raises:
            InputError: where the data cannot be found, read or used.
            MissingExtraError: where the source's extra is not installed.
        """

    def ensure(
        self, name: str, *, root: str | Path | None = None, download: bool = True, show_progress: bool = True
    ) -> None:
        """See that a set is on this machine, without loading it where that can be avoided; fetch what is missing.

        Raises:
            InputError: where it cannot be found or fetched.
            MissingExtraError: where the source's extra is not installed.
        """
        self.load(name, root=root, download=download)

    def check_installed(self) -> None:  # noqa: B027 # most have nothing to check
        """Check that what labels and evaluates the sets is installed.

        Raises:
            MissingExtraError: where an extra is missing.
        """

    def digest(self, name: str, *, root: str | Path | None = None) -> str | None:
        """SHA-256 of a set that is on this machine; ``None`` where the source has none."""
        return None

    def describe(self, name: str, *, root: str | Path | None = None) -> dict[str, Any]:
        """What a run's record says of a set before it says what is in it: ``name`` and ``sha256``."""
        return {"name": name, "sha256": self.digest(name, root=root)}

    def environment(self, name: str) -> str | None:
        """The environment of a set as :func:`deflow_torchrl.envs.make_gym_env` takes it; ``None`` where it has none."""
        return None

    def reference_returns(self, name: str, environment: str) -> tuple[float, float] | None:
        """Returns (random policy, expert) that normalise the scores of a set's policies in an environment, where known."""
        return None

    def location(self, name: str, *, root: str | Path | None = None) -> Path | None:
        """The folder a user named for a set, by its name or as ``root``; ``None`` where the source keeps it in a cache."""
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
    """Make a source known by the prefix of its names in this process.

    Args:
        prefix: ``PREFIX`` of ``PREFIX:NAME``.
        source: the source.

    Raises:
        InputError: if the prefix is another source's, or ``source`` is no :class:`Source`.
    """
    SOURCES.register(prefix, source)


def get_source(prefix: str) -> Source:
    """Look a source up.

    Raises:
        InputError: on an unknown prefix, with the nearest ones; where two installed packages announce it.
    """
    return SOURCES.find(prefix)


def split_name(name: str) -> tuple[str | None, str]:
    """Prefix and rest of a name; the prefix is ``None`` where there is none.

    ``own:``, the prefix of version 0.1, is read as ``file:``, which is logged once in a process.

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
    _LOG.warning(f"{prefix}:NAME is read as {_FORMER_PREFIXES[prefix]}:NAME, the prefix's name since version 0.2")


def settled_name(name: str) -> str:
    """A task's name as a run keeps it: a place in it is absolute, so that it means the same from any working folder."""
    return _with_place(name, lambda place: str(place.expanduser().absolute()))


def public_name(name: str) -> str:
    """A task's name for other people: of a place in it the last part alone."""
    return _with_place(name, lambda place: place.name)


def _with_place(name: str, show: Callable[[Path], str]) -> str:
    prefix, rest = split_name(name)
    place = None if prefix is None else get_source(prefix).location(rest)
    return name if place is None else f"{prefix}:{show(place)}"
