"""A pendulum whose episodes have 15 steps, and data recorded in it: the environment of the tests that train."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np

EPISODE_STEPS = 15
ENVIRONMENT = "tests.support.pendulum:ShortPendulum-v0"

if "ShortPendulum-v0" not in gymnasium.registry:
    gymnasium.register(
        "ShortPendulum-v0",
        entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv",
        max_episode_steps=EPISODE_STEPS,
    )


def record_episodes(file: Path, *, episodes: int = 20) -> list[str]:
    """Record random actions into an npz file; return the options by which ``deflow data import`` reads it."""
    env = gymnasium.make(ENVIRONMENT)
    rng = np.random.default_rng(0)
    rows: dict[str, list] = {name: [] for name in ("obs", "action", "reward", "next_obs", "truncated")}
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            action = rng.uniform(-1, 1, 1).astype(np.float32)
            successor, reward, _, truncated, _ = env.step(2 * action)  # the torque's bounds are -2 and 2
            for name, value in zip(rows, (observation, action, reward, successor, truncated), strict=True):
                rows[name].append(value)
            observation = successor
    env.close()
    np.savez(file, **{name: np.asarray(values) for name, values in rows.items()})
    columns = {"observations": "obs", "actions": "action", "rewards": "reward", "next_observations": "next_obs"}
    columns["timeouts"] = "truncated"
    return [*(f"--column={field}={name}" for field, name in columns.items()), "--never-terminates"]


def record_pendulum(folder: Path, *, episodes: int = 20) -> str:
    """Record random actions in the short pendulum and import them; return the task's name."""
    from tests.support.command_line import deflow

    file, out = folder / "pendulum.npz", folder / "pendulum"
    done = deflow("data", "import", str(file), "--out", str(out), *record_episodes(file, episodes=episodes))
    assert done.returncode == 0, done.stderr
    return f"file:{out}"
