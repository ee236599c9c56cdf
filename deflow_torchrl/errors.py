# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Exceptions that the command line turns into one line: exit code 2 for :class:`InputError`, 1 for :class:`RunError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, known: Iterable[str], *, n: int = 3, cutoff: float = 0.6) -> list[str]:
    """The known names most like an unknown one, the nearest first; ``n`` at most."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=cutoff)


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str | None = None, n: int = 3) -> str:
    """A hint for an unknown name: the nearest known names; if none is near, ``otherwise``, by default all known names.

    Examples:
        >>> did_you_mean("smal", ["paper", "small"]), did_you_mean("x", ["paper", "small"])
        ('did you mean small?', 'there are paper, small')
    """
    names = list(known)
    near = nearest(name, names, n=n)
    if otherwise is None:
        otherwise = f"there are {', '.join(names)}"
    return f"did you mean {', '.join(near)}?" if near else otherwise


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class InputError(ValueError):
    """An input of the user cannot be used: the message says what, where and what to do, in one line."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency is not installed.

    Args:
        module: the module that could not be imported.
        extra: the extra of ``deflow-torchrl`` that brings it.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; install it with: pip install 'deflow-torchrl[{extra}]'")
        self._arguments = module, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """Pickle the constructor's arguments; by default an exception pickles its message alone."""
        return type(self), self._arguments


class LockHeldError(InputError):
    """Another process holds a lock; it is free when that process ends."""


class RunError(Exception):
    """Something failed after its input was accepted."""


class NonFiniteLossError(RunError, RuntimeError):
    """A loss became NaN or infinite: the message names the term and the step."""


class CheckpointNotWritten(RunError, OSError):
    """A checkpoint could not be written, for example on a full disk; earlier ones are whole and the run can go on.

    Args:
        path: the checkpoint.
        cause: the error of the operating system.
        advice: what to do.
    """

    def __init__(self, path: Path, cause: OSError, advice: str = "") -> None:
        more = f"; {advice}" if advice else ""
        super().__init__(cause.errno, f"{path} was not written ({cause.strerror or cause}){more}")
        self.path, self.cause, self.advice = path, cause, advice

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[CheckpointNotWritten], tuple[Path, OSError, str]]:
        """Pickle the constructor's arguments; by default an OSError pickles its number and message."""
        return type(self), (self.path, self.cause, self.advice)


class ExportParityError(RunError, RuntimeError):
    """An exported policy computes other actions than the policy: the message says how far apart they are."""


class EnvironmentFaultError(RunError, RuntimeError):
    """The environment failed in an evaluation, or in too many online episodes: the message names where, how often and why."""


class CollectorError(RunError, RuntimeError):
    """The processes that step the environments died repeatedly: the message says how."""


class RestoreError(RunError, RuntimeError):
    """An environment did not come back to its recorded state: the message names the episode."""


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the training: a checkpoint was saved, the message says how to go on."""
