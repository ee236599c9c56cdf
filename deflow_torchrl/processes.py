# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Cores, memory, child processes, and the signals that ask a process to stop."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")
    if name in signal.Signals.__members__  # Windows lacks some, and other systems the last
)
"""What terminals, schedulers and supervisors send to a process that is to end or to save."""

_ONE_CTRL_C = 0.3  # seconds: a wrapper such as srun passes on the signal that the terminal has sent already

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def available_cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor, up to 1 GB of it and blocks of up to 32 MB.

    An update allocates the same tensors of about a megabyte again and again. Otherwise their memory goes back to the system,
    which has to clear every page that it gives out: 3 to 4% of an update of the paper's networks. Without effect unless the C
    library is glibc, and where the user has set a variable ``MALLOC_...`` or ``GLIBC_TUNABLES``.
    """
    set_by_user = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if sys.platform == "linux" and not set_by_user:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest it takes
            libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TOP_PAD, 64 << 20)


class _Stop:
    """Whether a signal has asked this process to stop."""

    asked: float | None = None  # when, on the monotonic clock
    forced = False  # by a second Ctrl-C
    delays = 0  # nested blocks of signals_delayed()


def _handle(number: int, frame: FrameType | None) -> None:
    now, asked = time.monotonic(), _Stop.asked
    if asked is not None and (number != signal.SIGINT or now - asked < _ONE_CTRL_C):
        return
    _Stop.asked, _Stop.forced = now, asked is not None
    if number == getattr(signal, "SIGHUP", None):
        _leave_terminal()
    if _Stop.forced or not _Stop.delays:
        raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Send further output to nowhere where the terminal is gone: writing to it would be an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)


def take_stop_signals() -> dict[signal.Signals, Any]:
    """Let each of :data:`STOP_SIGNALS` raise KeyboardInterrupt in the main thread, except in :func:`signals_delayed` blocks.

    Further signals then change nothing, except that a second Ctrl-C raises KeyboardInterrupt at once, everywhere. A signal that
    is ignored stays so (``nohup``), and SIGHUP, SIGUSR1 and SIGUSR2 stay with a handler that the program has set itself.

    Returns:
        The handlers that were replaced.
    """
    previous = {}
    for number in STOP_SIGNALS:
        handler = signal.getsignal(number)
        ours = handler in (signal.SIG_DFL, signal.default_int_handler, _handle)
        if ours or (callable(handler) and number in (signal.SIGINT, signal.SIGTERM)):
            previous[number] = signal.signal(number, _handle)
    if _handle not in previous.values():
        _Stop.asked, _Stop.forced = None, False
    return previous


@contextmanager
def interruptible() -> Iterator[None]:
    """:func:`take_stop_signals` for a block; outside the main thread, where Python delivers no signals, without effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = take_stop_signals()
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if _handle not in previous.values():  # the outermost block: a later run starts afresh
            _Stop.asked, _Stop.forced = None, False


def raise_if_stopped() -> None:
    """Raise KeyboardInterrupt if a signal has asked this process to stop, also inside :func:`signals_delayed`."""
    if _Stop.asked is not None and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def stop_forced() -> bool:
    """Whether a second Ctrl-C has raised KeyboardInterrupt at an arbitrary place."""
    return _Stop.forced


@contextmanager
def signals_delayed(*, closing: bool = False) -> Iterator[None]:
    """Delay stop signals to the end of the block, so that none leaves it half done.

    Keyword Args:
        closing: raise nothing at the block's beginning and end either, since the process is about to end or checks later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not closing:
        raise_if_stopped()  # where the exception was lost, as in a destructor
    _Stop.delays += 1
    try:
        yield
    finally:
        _Stop.delays -= 1
    if not closing and not _Stop.delays:
        raise_if_stopped()


@contextmanager
def children_ignore_signals() -> Iterator[None]:
    """Let processes that are started in this block not notice stop signals: the parent ends them.

    A terminal, Slurm and systemd send their signals to all processes of a job. A signal to this process is delayed.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    with signals_delayed(closing=True):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit what is blocked
        try:
            # Python's own child, which removes the semaphores of a process that was killed.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # before Python 3.12 its start unblocks some
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Ignore stop signals in this child process, but not in the programs that it starts; see :func:`children_ignore_signals`."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    unblock_stop_signals()


def unblock_stop_signals() -> None:
    """Receive stop signals in a process that was started by :func:`children_ignore_signals`."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class KillableSpawnContext(SpawnContext):
    """Start processes that can be ended at once; an executor has no public way to end its workers before Python 3.14."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override] # a class there
        """Make a process, as the class of this name does in a plain context."""
        process = SpawnProcess(*args, **kwargs)
        self._started.append(process)
        return process

    def kill(self) -> None:
        """End all processes of this context, also those that are importing or inside compiled code."""
        for process in self._started:
            if process.is_alive():
                process.kill()


def die_with_parent() -> None:
    """End this process as soon as its parent is gone, also after a kill that left the parent no time to end it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # an orderly exit would wait for the current work and for a queue that no process reads

    threading.Thread(target=watch, name="die with parent", daemon=True).start()


class PipedProcess:
    """A process that reads messages from a pipe and answers through it; it starts with the first message.

    Args:
        serve: what it runs, a function of its end of the pipe and of ``arguments``; an exception that it sends is raised here.
        arguments: more arguments of it.

    Keyword Args:
        died: makes the exception that is raised where the process has ended, of its exit code.
        environment: environment variables of it alone.
    """

    def __init__(
        self,
        serve: Callable[..., None],
        *arguments: Any,
        died: Callable[[int | None], Exception],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self._theirs, *arguments), daemon=True)
        self._died, self._environment = died, dict(environment or {})

    def send(self, message: Any) -> None:
        """Send a message."""
        if self._process.pid is None:
            with children_ignore_signals(), _environment(self._environment):
                self._process.start()
            self._theirs.close()
        try:
            self._pipe.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self) -> Any:
        """Wait for an answer."""
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self) -> Exception:
        self._process.join(1)
        return self._died(self._process.exitcode)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # ends the process
        self._theirs.close()
        if self._process.pid is not None:
            self._process.join(timeout=5)
            self._process.kill()
            self._process.join()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a block: a child inherits them."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def first_line(*files: str) -> str:
    """Content of the first of these files that can be read, without blanks around it; empty if none can."""
    for file in files:
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except OSError:
            continue
    return ""


def free_memory(read: Callable[..., str] = first_line) -> int | None:
    """Bytes of memory that are free, on Linux, by the system and by a control group's limit; None elsewhere."""
    system = [line.split() for line in read("/proc/meminfo").splitlines()]
    free = [int(words[1]) * 1024 for words in system if words[0] == "MemAvailable:"]
    limit = read("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    used = read("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    return min(free) if free else None
