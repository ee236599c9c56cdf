# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""An exported policy in its environment, in a window or as a clip: with numpy, onnxruntime and gymnasium, without torch."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from deflow_torchrl.deploy import Policy, load_policy
from deflow_torchrl.envs.drawing import ActedEpisode, EpisodeDrawing, check_drawings
from deflow_torchrl.envs.factory import has_display, make_gym_env, qualified_name
from deflow_torchrl.errors import InputError, RunError, one_line
from deflow_torchrl.processes import available_cores, raise_if_stopped
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports.clip import check_clip_file, usual_interval, write_episodes

_SIZE = 256  # height of a picture in pixels


def play_policy(
    file: Path,
    *,
    environment: str | None = None,
    episodes: int = 3,
    seed: int = 0,
    out: Path | None = None,
    force: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Run a policy that ``deflow export`` wrote as ONNX.

    Args:
        file: the policy.

    Keyword Args:
        environment: an OGBench single-task name, a gymnasium id, or ``minari:ID``; by default that of the run's evaluations.
        episodes: how many.
        seed: of the first start, the following ones count up from it, and of the policy's noise.
        out: the clip (.mp4, .gif, .webp); where None a window shows the episodes.
        force: overwrite ``out``.
        show_progress: show progress bars on standard error.

    Returns:
        ``environment``, the episodes' ``success`` (None where the environment reports none), ``episode_return``, ``length`` and
        ``seeds``; with ``out`` also ``file``, ``bytes``, and ``not_repeated``, the seeds whose episodes the clip shows otherwise
        than they were counted, because the environment depends on more than its seed.

    Raises:
        InputError: on a file or environment that cannot be used or that do not fit each other, and where nothing can be shown.
        MissingExtraError: if a package that is needed is not installed.
        RunError: if the environment fails in an episode.
    """
    if out is not None:
        check_clip_file(out, episodes=episodes, force=force)
    elif not has_display():
        raise InputError(
            "there is no display here for a window; --out FILE (.mp4, .gif or .webp) writes a clip instead"
        )
    if file.suffix == ".pt2":
        raise InputError(f"{file} is no ONNX file, which is what can be played; deflow export writes one by default")
    policy = load_policy(file, seed=seed)
    about = policy.manifest
    named = environment or about.get("environment")
    if named is None:
        raise InputError(f"{file} was trained without an environment; name one with --env")
    name = qualified_name(named)
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {} if out is not None else {"render_mode": "human"}
        env = make_gym_env(name, frame_stack=about.get("frame_stack", 1), **options)
        stack.enter_context(contextlib.closing(env))
        _check_fit(policy, env, file, name)
        viewer = None
        if out is None and "human" not in (env.metadata.get("render_modes") or ()):  # else it has gymnasium's window
            viewer = stack.enter_context(contextlib.closing(_Viewer(env, name)))
        if out is not None:
            drawing = EpisodeDrawing(name, size=_SIZE, threads=available_cores())
            check_drawings([stack.enter_context(drawing)])
        acted, knows_success = [], False
        for number in progress_bar(range(episodes), desc="act", unit="episode", leave=False, disable=not show_progress):
            try:
                episode, knows_success = _act(env, policy, seed + number, viewer)
            except (InputError, RunError):
                raise
            except Exception as error:  # simulators and windows raise of any kind
                advice = "" if out is not None else "; --out FILE writes a clip, which needs no window"
                raise RunError(
                    f"{name} failed in the episode of seed {seed + number}: {one_line(error)}{advice}"
                ) from error
            acted.append(episode)
        result: dict[str, Any] = {
            "environment": name,
            "success": [episode.success for episode in acted] if knows_success else None,
            "episode_return": [episode.episode_return for episode in acted],
            "length": [len(episode.actions) for episode in acted],
            "seeds": [episode.seed for episode in acted],
        }
        if out is None:
            return result
        shown = {str(about.get("policy", file.stem)): acted}
        notes = [f"start {number + 1} of {episodes}" for number in range(episodes)]
        write_episodes(
            out,
            dict.fromkeys(shown, drawing),
            shown,
            every=usual_interval(shown),
            size=_SIZE,
            success=knows_success,
            notes=notes,
            show_progress=show_progress,
        )
        return {**result, "file": str(out), "bytes": out.stat().st_size, "not_repeated": drawing.not_repeated}


def _check_fit(policy: Policy, env: Any, file: Path, name: str) -> None:
    takes, gives = policy.observation_shape, env.observation_space.shape
    if takes != gives:
        raise InputError(
            f"{file} reads observations of shape {list(takes)}, and {name} gives {list(gives)}; give another --env"
        )
    acts, needs = (policy.action_dim,), env.action_space.shape
    if acts != needs:
        raise InputError(
            f"{file} gives actions of shape {list(acts)}, and {name} takes {list(needs)}; give another --env"
        )


class _Viewer:
    """MuJoCo's viewer of an environment, as OGBench's robot arms need.

    Args:
        env: the environment.
        name: its name, for messages.

    Raises:
        InputError: if the environment has none.
    """

    def __init__(self, env: Any, name: str) -> None:
        if not hasattr(env.unwrapped, "launch_passive_viewer"):
            raise InputError(f"{name} has no window; --out FILE (.mp4, .gif or .webp) writes a clip instead")
        self.env = env.unwrapped
        self._threads: set[threading.Thread] = set()

    def show(self) -> None:
        """Open the window, anew: a reset may have built another model."""
        self.close()
        before = set(threading.enumerate())
        self.env.launch_passive_viewer()
        self._threads = set(threading.enumerate()) - before

    def step(self) -> None:
        """Show the present state for the time that it lasts.

        Raises:
            RunError: if the window was closed.
        """
        handle = getattr(self.env, "_passive_viewer_handle", None)
        if handle is not None and not handle.is_running():
            raise RunError("the window was closed")
        self.env.sync_passive_viewer()
        time.sleep(self.env.control_timestep())

    def close(self) -> None:
        """Close the window and wait for its threads: the interpreter crashes if it ends before they do."""
        self.env.close_passive_viewer()
        for thread in self._threads:
            thread.join()


def _act(env: Any, policy: Policy, seed: int, viewer: _Viewer | None) -> tuple[ActedEpisode, bool]:
    """Act an episode; returns it, and whether the environment reports success."""
    observation, _ = env.reset(seed=seed)
    policy.reset()
    if viewer is not None:
        viewer.show()
    actions, total, over, info = [], 0.0, False, {}
    while not over:
        raise_if_stopped()
        actions.append(_unit(policy(observation), policy))
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        total, over = total + reward, terminated or truncated
        if viewer is not None:
            viewer.step()
    success = bool(info.get("success", False))
    return ActedEpisode(seed, np.stack(actions), success=success, episode_return=total), "success" in info


def _unit(action: np.ndarray, policy: Policy) -> np.ndarray:
    """Map an action ``[A]`` from the units of the policy's data to [-1, 1], which the environments of this package take."""
    if policy.low is None or policy.high is None:
        return action
    return (action - (policy.low + policy.high) / 2) / ((policy.high - policy.low) / 2)
