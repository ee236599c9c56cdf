"""Signals that ask a process to stop."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from deflow_torchrl import processes
from deflow_torchrl.processes import STOP_SIGNALS, interruptible, raise_if_stopped, signals_delayed

POSIX = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@contextlib.contextmanager
def interrupted():
    """The block is interrupted."""
    with pytest.raises(KeyboardInterrupt), interruptible():
        yield


@pytest.fixture
def handler():
    """Set a signal's handler for the test."""
    with contextlib.ExitStack() as stack:

        def install(number, handler):
            stack.callback(signal.signal, number, signal.signal(number, handler))

        yield install


@pytest.mark.parametrize("number", POSIX)
def test_a_stop_signal_interrupts_and_its_handler_is_put_back(number):
    before = signal.getsignal(number)
    with interrupted():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", POSIX)
def test_an_ignored_signal_stays_ignored(number, handler):
    handler(number, signal.SIG_IGN)
    with interruptible():
        signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN


def test_a_handler_of_the_programs_own_keeps_usr1_but_not_sigterm(handler):
    seen = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        handler(number, lambda number, frame: seen.append(number))
    with interrupted():
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", POSIX)
def test_a_signal_waits_for_the_end_of_nested_delays(number):
    done = []
    with interrupted(), signals_delayed():
        with signals_delayed():
            signal.raise_signal(number)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_repeated_signals_do_not_disturb_the_closing(monkeypatch):
    monkeypatch.setattr(processes, "_ONE_CTRL_C", 0.0)
    closed = []
    with interrupted():
        try:
            signal.raise_signal(signal.SIGUSR1)
        finally:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
                signal.raise_signal(number)
            with signals_delayed(closing=True):
                signal.raise_signal(signal.SIGTERM)
            closed.append(True)
    assert closed


def test_a_second_ctrl_c_interrupts_even_what_is_delayed_and_one_passed_on_twice_does_not(monkeypatch):
    done = []
    with interrupted(), signals_delayed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("passed on twice")
        monkeypatch.setattr(processes, "_ONE_CTRL_C", 0.0)
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == ["passed on twice"]
    raise_if_stopped()  # nothing is left behind the block, for what runs without one
    with interruptible():
        raise_if_stopped()  # the next block starts afresh


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_destructor_swallows_is_raised_before_the_next_delayed_block():
    class Deaf:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with interrupted():
        Deaf()
        with signals_delayed():
            pytest.fail("it goes on")


CHILDREN = """
import multiprocessing, os, signal, sys, time
from deflow_torchrl.processes import STOP_SIGNALS, children_ignore_signals, ignore_stop_signals, take_stop_signals

def child(pipe):
    if sys.argv[1] == "ignoring":
        ignore_stop_signals()
    pipe.send("here")
    pipe.recv()
    pipe.send("still here")

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with children_ignore_signals():
        lock = context.Lock()
        process = context.Process(target=child, args=(theirs,))
        process.start()
    ours.recv()
    caught = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: caught.append(number))
        os.killpg(0, number)
    time.sleep(0.2)
    ours.send("on")
    assert ours.recv() == "still here"
    process.join()
    assert sorted(caught) == sorted(STOP_SIGNALS), caught
"""


@pytest.mark.parametrize("how", ["ignoring", "as started"])
def test_signals_to_the_whole_group_leave_children_and_the_keeper_of_semaphores_alone(how, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CHILDREN)
    ran = subprocess.run(
        [sys.executable, str(script), how],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


NOT_CLOSED = """
import atexit, os, signal, time
from deflow_torchrl.trainers import Evaluator
import torch
from tensordict.nn import TensorDictModule

if __name__ == "__main__":
    evaluator = Evaluator("gym:Pendulum-v1", num_envs=2, workers=2)
    policy = TensorDictModule(lambda observation: observation[:, :1], in_keys=["observation"], out_keys=["action"])
    evaluator.run(policy, episodes=2)
    print(*[group._process.pid for group in evaluator._groups], flush=True)
"""


def test_an_evaluator_that_is_not_closed_does_not_hang_the_interpreters_end(tmp_path):
    pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
    script = tmp_path / "script.py"
    script.write_text(NOT_CLOSED)
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    pids = [int(word) for word in ran.stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 10
    while any(_exists(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def _exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_signals_are_those_of_this_system():
    assert set(POSIX) <= set(STOP_SIGNALS)
