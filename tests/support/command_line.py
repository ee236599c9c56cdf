"""``deflow`` as a user calls it."""

import contextlib
import io
import signal
import sys
from types import SimpleNamespace

import pytest


def deflow(*arguments, cwd=None, env=None):
    """Run the command line in this process: a fresh one would spend most of its time importing torch."""
    from deflow_torchrl.cli import main
    from deflow_torchrl.processes import interruptible

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
