"""Runs in child processes that can be killed at any moment.

Importing torch takes seconds, so children are forked from a server process that has only imported everything:
``python -m tests.support.killable`` reads one job per line and prints the child's process id and, when it ends, its exit status.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Children:
    """Starts one run at a time in a child; to be used in a ``with`` block.

    Args:
        log: file for what the children print.
    """

    def __init__(self, log: Path) -> None:
        self.log = log

    def __enter__(self) -> Children:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "CHILDREN_OF": str(self.log),  # what descends from here is known by it
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.killable", str(self.log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self._server.stdout.readline() == "ready\n"
        self.number = self._server.pid
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

    def start(
        self,
        out: Path,
        config: dict | None = None,
        *,
        die: tuple[str, int] | None = None,
        by: signal.Signals = signal.SIGKILL,
        delay: float = 0.0,
    ) -> int:
        """Train a new run with these settings, or resume the run where there are none; returns the child's number.

        ``die=(moment, n)`` sends it a signal so many seconds after the n-th time of a moment; see :func:`_die`.
        """
        self._server.stdin.write(
            json.dumps({"out": str(out), "config": config, "die": die, "by": by, "delay": delay}) + "\n"
        )
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def wait(self) -> int:
        """The child's exit code; minus the signal's number, if one killed it."""
        return int(self._server.stdout.readline())

    def run(self, out: Path, config: dict | None = None, **options: Any) -> int:
        """:meth:`start` and :meth:`wait`."""
        self.start(out, config, **options)
        return self.wait()

    def kill_after(self, out: Path, seconds: float, config: dict | None = None) -> bool:
        """Start as :meth:`start`, kill after so many seconds; whether there was anything left to kill."""
        child = self.start(out, config)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(
                child, signal.SIGKILL
            )  # it stays a zombie until the server has waited: no other process has its number
        return self.wait() == -signal.SIGKILL


def _die(moment: str, number: int, by: signal.Signals, delay: float) -> None:
    """Send this process a signal, the ``number``-th time it comes to a moment.

    In the writing of a checkpoint: ``writing``: some of the temporary file is there; ``written``: all of it; ``renamed``: the
    old ones are still there too. At their beginning: ``loading`` data, an ``offline`` or ``online`` step, what lies ``between``
    the phases, an environment step of ``evaluating``, ``reporting``.
    """
    from deflow_torchrl.runs import run
    from deflow_torchrl.trainers import Evaluator, Trainer, checkpoint
    from deflow_torchrl.trainers.online import OnlinePhase

    count = 0

    def at(place: str) -> None:
        nonlocal count
        count += place == moment
        if place == moment and count == number:
            if delay:
                threading.Timer(delay, os.kill, (os.getpid(), by)).start()
            else:
                os.kill(os.getpid(), by)

    def begins(place: str, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def begin(*arguments: Any, **options: Any) -> Any:
            at(place)
            return function(*arguments, **options)

        setattr(owner, name, begin)

    begins("loading", run.build, "load_data")
    begins("between", OnlinePhase, "begin")
    begins("evaluating", Evaluator, "_ask")
    begins("reporting", run, "build_record")
    train_step = Trainer._train_step

    def step(self):
        at("online" if self.schedule.is_online(self.step + 1) else "offline")
        train_step(self)

    Trainer._train_step = step
    write, replace, sync_folder = checkpoint._HashingFile.write, os.replace, checkpoint._sync_folder

    def write_and_die(self, data):
        size = write(self, data)
        if self.file.tell() > 4096 and not getattr(self, "counted", False):
            self.counted = True
            self.file.flush()
            at("writing")
        return size

    def replace_and_die(source, target):
        if str(target).endswith(".pt"):
            at("written")
        replace(source, target)

    def sync_and_die(folder):
        at("renamed")
        sync_folder(folder)

    checkpoint._HashingFile.write, os.replace, checkpoint._sync_folder = write_and_die, replace_and_die, sync_and_die


def _child(job: dict) -> None:
    from deflow_torchrl.runs import run
    from deflow_torchrl.runs.settings import config_from_dict

    # The page with its curve takes as long as a tiny run and is drawn from what the tests compare.
    run.plot_learning_curve = run.write_html_report = lambda *_, **__: None
    if job["die"] is not None:
        _die(*job["die"], signal.Signals(job["by"]), job["delay"])
    out = Path(job["out"])
    if job["config"] is None:
        run.resume(out, command="resume", show_progress=False)
    else:
        run.train(config_from_dict(job["config"] | {"out": job["out"]}), command="train", show_progress=False)


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _serve(log: Path) -> None:
    import yaml  # noqa: F401

    import deflow_torchrl.envs.factory
    import deflow_torchrl.runs.run
    import tests.support.pendulum  # noqa: F401 # the environment
    from deflow_torchrl.processes import interruptible

    deflow_torchrl.envs.factory.register_robotics()
    _say("ready")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                with interruptible():
                    _child(json.loads(line))
                code = 0
            except KeyboardInterrupt as error:
                print(error)  # noqa: T201 # the log
                code = 130
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _say(child)
        _, status = os.waitpid(child, 0)
        _say(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
