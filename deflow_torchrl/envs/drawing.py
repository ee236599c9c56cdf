# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Pictures of episodes that were acted before: their actions are repeated from the same start, in a process with a renderer.

The process is new, so that its renderer can be chosen although this process has imported the simulator, and the evaluation that
acted the episode is as it is without pictures.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from deflow_torchrl.envs.factory import chosen_renderer, make_gym_env
from deflow_torchrl.envs.names import task_with_states
from deflow_torchrl.errors import InputError, RunError, one_line
from deflow_torchrl.processes import PipedProcess, ignore_stop_signals

_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")  # names of OpenGL's renderers without a GPU


@dataclass(frozen=True)
class ActedEpisode:
    """An episode that a policy has acted.

    Attributes:
        seed: seed of its reset.
        actions: the actions, or chunks of them, as the environment took them, ``[T, A]``.
        success: ``info["success"]`` of its last step.
        episode_return: sum of its rewards.
    """

    seed: int
    actions: np.ndarray
    success: bool
    episode_return: float


@dataclass(frozen=True)
class Picture:
    """A picture of an environment.

    Attributes:
        pixels: ``[H, W, 3]`` uint8.
        step: environment steps before it.
        success: ``info["success"]`` of the last of them.
        episode_return: sum of their rewards.
    """

    pixels: np.ndarray
    step: int
    success: bool
    episode_return: float


class EpisodeDrawing:
    """Draws episodes of an environment in a process of its own.

    Args:
        task: name of an environment, see :func:`deflow_torchrl.envs.make_gym_env`. Tasks of OGBench with pictures as
            observations are drawn as the same tasks with states: larger, and with the goal.

    Keyword Args:
        size: height and width of a picture in pixels, where the environment lets them be chosen.
        chunk: h, steps of a chunk of actions.
        shadows: draw shadows, reflections and smoothed edges; None: where a GPU draws. In software they take most of the time.
        threads: threads of a renderer in software.

    Attributes:
        not_repeated: seeds of episodes that ended otherwise than they were acted: the environment depends on more than its seed.
    """

    def __init__(self, task: str, *, size: int, chunk: int = 1, shadows: bool | None = None, threads: int = 1) -> None:
        self.task = task
        self.not_repeated: list[int] = []
        self._process = PipedProcess(
            _serve,
            task_with_states(task),
            size,
            chunk,
            shadows,
            died=lambda code: RunError(f"the process that draws {task} died (exit code {code}); was the memory full?"),
            environment={**chosen_renderer(), "LP_NUM_THREADS": os.environ.get("LP_NUM_THREADS", str(threads))},
        )

    def __enter__(self) -> EpisodeDrawing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.close()

    def pictures(self, episode: ActedEpisode, *, every: int) -> Iterator[Picture]:
        """Draw the start of an episode, every ``every``-th step and its end; the work begins with the call."""
        self._process.send((episode.seed, episode.actions, every))

        def received() -> Iterator[Picture]:
            last = None
            while (picture := self._process.receive()) is not None:
                last = picture
                yield picture
            if last is None or (last.step, last.success) != (len(episode.actions), episode.success):
                self.not_repeated.append(episode.seed)

        return received()


def check_drawings(drawings: Iterable[EpisodeDrawing]) -> None:
    """Draw one picture with each.

    Raises:
        InputError: if there is none: the environment has no pictures, or there is no renderer.
    """
    nothing = ActedEpisode(0, np.zeros((0, 1)), success=False, episode_return=0.0)
    for drawing, pictures in [(drawing, drawing.pictures(nothing, every=1)) for drawing in drawings]:
        try:
            list(pictures)
        except (InputError, RunError) as error:
            raise InputError(
                f"{drawing.task} cannot be drawn here ({one_line(error)}); deflow doctor says whether there is a renderer"
            ) from error


@functools.cache
def check_drawing(task: str) -> None:
    """Draw one small picture of a task.

    Raises:
        InputError: as :func:`check_drawings`.
    """
    with EpisodeDrawing(task, size=32, shadows=False) as drawing:
        check_drawings([drawing])


def _serve(pipe: Connection, task: str, size: int, chunk: int, shadows: bool | None) -> None:
    ignore_stop_signals()
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, OSError):
        try:
            with contextlib.closing(_make(task, size, chunk)) as env:
                while True:
                    for picture in _repeat(env, *pipe.recv(), shadows=shadows):
                        pipe.send(picture)
                    pipe.send(None)
        except (EOFError, OSError):
            raise
        except InputError as error:
            pipe.send(error)
        except Exception as error:  # of classes that this process's parent may not have
            pipe.send(RunError(one_line(error)))


def _make(task: str, size: int, chunk: int) -> Any:
    try:
        return make_gym_env(task, chunk=chunk, render_mode="rgb_array", width=size, height=size)
    except (InputError, TypeError):  # it has a size of its own
        return make_gym_env(task, chunk=chunk, render_mode="rgb_array")


def _repeat(env: Any, seed: int, actions: np.ndarray, every: int, *, shadows: bool | None) -> Iterator[Picture]:
    env.reset(seed=seed)
    model: Any = getattr(env.unwrapped, "model", getattr(env.unwrapped, "_model", None))  # of MuJoCo
    if hasattr(model, "light_castshadow") and (_in_software() if shadows is None else not shadows):
        model.light_castshadow[:] = False
        model.mat_reflectance[:] = 0
        model.vis.quality.offsamples = 0  # edges are drawn once; read when the first picture is
    yield Picture(_drawn(env), 0, success=False, episode_return=0.0)
    total = 0.0
    for step, action in enumerate(actions, 1):
        _, reward, terminated, truncated, info = env.step(action)
        total += reward
        ended = terminated or truncated or step == len(actions)
        if ended or step % every == 0:
            yield Picture(_drawn(env), step, success=bool(info.get("success", False)), episode_return=total)
        if ended:
            return


def _drawn(env: Any) -> np.ndarray:
    pixels = env.render()
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise InputError(f"its render() gives {type(pixels).__name__}, not a picture")
    return np.ascontiguousarray(pixels[..., :3])


@functools.cache  # a context that is made and freed later leaves gymnasium's renderer black
def _in_software() -> bool:
    """Whether OpenGL draws without a GPU."""
    import mujoco
    from OpenGL import GL

    context = mujoco.GLContext(16, 16)
    try:
        context.make_current()
        name = GL.glGetString(GL.GL_RENDERER)
    finally:
        context.free()
    return any(word in (name or b"").decode().lower() for word in _SOFTWARE)
