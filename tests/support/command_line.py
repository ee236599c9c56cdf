"""``deflow`` as a user calls it."""

import contextlib
import io
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deflow_torchrl.processes import interruptible

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def deflow(*arguments, cwd=None, env=None):
    """Run the command line in this process: a fresh one would spend most of its time importing torch."""
    from deflow_torchrl.cli import main

    out, err = io.StringIO(), io.StringIO()
    saved = sys.argv
    code = 0
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            interruptible(),
        ):
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            if cwd is not None:
                patch.chdir(cwd)
            main(arguments)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = saved
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def benchmark(monkeypatch, capsys, name, *arguments):
    """Run a script as `python benchmarks/NAME.py` does, without the seconds that importing torch takes: code, out, err."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *map(str, arguments)])
    try:
        with interruptible():
            runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return (code, *capsys.readouterr())


def benchmark_apart(name, *arguments):
    """The same in a process of its own, for a script that leaves processes to its end."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def assert_one_line(result, *parts):
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip()
    assert "\n" not in line, line
    assert line.startswith("deflow: ")
    for part in parts:
        assert part in line


def heed_ctrl_c() -> None:
    """For ``preexec_fn``: a suite started in the background ignores Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
