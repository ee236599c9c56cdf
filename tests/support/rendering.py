"""Tests that draw pictures in MuJoCo."""

import functools
import os
import subprocess
import sys

import pytest


@functools.cache
def missing_renderer():
    """Why EGL cannot draw here; None where it can."""
    probe = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8)"
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    return None if found.returncode == 0 else found.stderr.strip().splitlines()[-1]


def needs_renderer(test):
    """Skip a test where there is no EGL renderer; otherwise EGL is chosen."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        if (why := missing_renderer()) is not None:
            pytest.skip(f"no EGL renderer here: {why}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MUJOCO_GL", "egl")
            return test(*args, **kwargs)

    return run
