"""Tiny simulators with faults, registered with gymnasium when this module is imported: ``gym:tests.support.simulators:ID``."""

import os
import time

import gymnasium
import numpy as np

EPISODE_STEPS = 10


class Point(gymnasium.Env):
    """A point on a line that noise of its own pushes about; bad episodes, fixed by their seed, end in a fault.

    Args:
        fault: what happens in a bad episode: "raise", "nan" or "reward" in its fifth step, "reset" at its reset, "exit" of the
            whole process in its fifth step.
        share: of bad episodes.
        repeats: whether the same seed and actions give the same observations.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, fault="none", share=0.0, repeats=True):
        self.fault, self.share, self.repeats = fault, share, repeats
        self.closed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        assert not self.closed
        self.bad = self.np_random.random() < self.share
        self.steps, self.state = 0, self.np_random.normal(size=2)
        if self.bad and self.fault == "reset":
            raise ValueError("the simulator does not start")
        return self.state.copy(), {}

    def step(self, action):
        assert not self.closed
        self.steps += 1
        self.state += 0.1 * action + 0.1 * self.np_random.normal(size=2)
        if not self.repeats:
            self.state += 1e-3 * (time.perf_counter_ns() % 1000)
        reward = -float(abs(self.state[0]))
        if self.bad and self.steps == 5:
            if self.fault == "raise":
                raise RuntimeError(f"the simulator broke at {self.state[0]:.3f}")
            if self.fault == "exit":
                os._exit(7)
            if self.fault == "nan":
                self.state[1] = np.nan
            if self.fault == "reward":
                reward = float("inf")
        return self.state.copy(), reward, False, False, {"success": reward > -0.5}

    def close(self):
        self.closed = True


def _register(name, **kwargs):
    gymnasium.register(name, entry_point=Point, max_episode_steps=EPISODE_STEPS, kwargs=kwargs)


_register("Point-v0")
_register("PointUnsteady-v0", repeats=False)
for _fault in ("raise", "nan", "reward", "reset", "exit"):
    _register(f"PointSometimes{_fault.capitalize()}-v0", fault=_fault, share=0.3)
    _register(f"PointAlways{_fault.capitalize()}-v0", fault=_fault, share=1.0)


def simulator(name):
    """The task name of one."""
    return f"gym:tests.support.simulators:{name}-v0"
