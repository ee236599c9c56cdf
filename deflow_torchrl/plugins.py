# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Registries: objects by name, built in, registered by a call, or announced by other packages as entry points."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from deflow_torchrl.errors import InputError, did_you_mean, one_line

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Objects by name; each is imported when it is first asked for.

    Args:
        kind: type of the objects.
        noun: name of the kind in error messages, for example ``"source"``.
        group: entry-point group for other packages, for example ``"deflow_torchrl.sources"``.
        own: name -> ``"module:attribute"`` of the built-in objects.
    """

    def __init__(self, kind: type[T], noun: str, group: str, own: Mapping[str, str]) -> None:
        self._kind, self._noun, self._group, self._own = kind, noun, group, own
        self._loaded: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        """Names: built-in, then registered, then announced by entry points."""
        return iter(dict.fromkeys([*self._own, *self._loaded, *self._announced]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        """Whether there is an object of this name; entry points are read only if it is neither built in nor registered."""
        return name in self._loaded or name in self._own or name in self._announced

    def __getitem__(self, name: str) -> T:
        """The object of a name.

        Raises:
            KeyError: if there is none.
            InputError: if an entry point cannot be loaded, holds something else, or is announced by two distributions.
        """
        if name not in self._loaded:
            self._loaded[name] = (
                pkgutil.resolve_name(self._own[name]) if name in self._own else self._load(name, self._announced[name])
            )
        return self._loaded[name]

    def find(self, name: str) -> T:
        """The object of a name that the user gave.

        Raises:
            InputError: on an unknown name, with the nearest ones, and as :meth:`__getitem__`.
        """
        if name not in self:
            raise InputError(f"unknown {self._noun} {name!r}; {did_you_mean(name, self)}")
        return self[name]

    def register(self, name: str, thing: T) -> None:
        """Register an object under a name, in this process.

        Raises:
            InputError: if the object is of another type, or the name is taken by another object.
        """
        if name in self and self[name] != thing:
            raise InputError(f"there is a {self._noun} {name!r} already; choose another name")
        self._loaded[name] = self._checked(thing, f"the {self._noun} {name!r}")

    def unregister(self, name: str) -> None:
        """Forget an object that was registered in this process."""
        self._loaded.pop(name, None)

    @functools.cached_property
    def _announced(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self._group):
            found.setdefault(entry.name, []).append(entry)
        return found

    def _load(self, name: str, entries: list[EntryPoint]) -> T:
        packages = [entry.dist.name if entry.dist else entry.module for entry in entries]
        if len(entries) > 1:
            raise InputError(
                f"the {self._noun} {name!r} is announced by {' and by '.join(sorted(packages))} "
                f"(entry points {self._group}); uninstall all but one"
            )
        try:
            thing = entries[0].load()
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the {self._noun} {name!r} of {packages[0]} cannot be loaded ({type(error).__name__}: {one_line(error)})"
            ) from error
        return self._checked(thing, f"the {self._noun} {name!r} of {packages[0]}")

    def _checked(self, thing: T, named: str) -> T:
        if not isinstance(thing, self._kind):
            raise InputError(f"{named} is no {self._kind.__name__} but {thing!r}")
        return thing
