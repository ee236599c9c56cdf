# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Environments by name, as gymnasium and as TorchRL environments."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import io
import os
import pkgutil
import socket
import subprocess
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deflow_torchrl.envs.names import parse_ogbench_name
from deflow_torchrl.errors import InputError, MissingExtraError, one_line

if TYPE_CHECKING:
    import gymnasium
    import torch
    from torchrl.envs import EnvBase

_MAKERS = {
    "gym": "deflow_torchrl.envs.factory:make_registered_env",
    "minari": "deflow_torchrl.sources.minari_env:make_rescaled_minari_env",
    "sparse": "deflow_torchrl.envs.sparse:make_sparse_env",
}
"""Prefix of a name -> function that makes its environment from the rest of the name, imported on use."""


@functools.cache
def import_ogbench() -> ModuleType:
    """Import ``ogbench``, which registers its environments; its warnings about missing displays are silenced.

    Raises:
        MissingExtraError: if it, gymnasium or mujoco is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # glfw warns about a missing display; no window is opened
            import ogbench
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "ogbench", "ogbench") from error
    return ogbench


@functools.cache
def register_robotics() -> None:
    """Register the environments of ``gymnasium_robotics`` in this process, if it is installed."""
    try:
        import gymnasium
    except ImportError:
        return
    # On import it prints a notice about the reward's sign, which deflow_torchrl.envs.adroit takes care of.
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(ImportError, gymnasium.error.Error),
    ):
        warnings.filterwarnings("ignore", module="glfw")  # a missing display; no window is opened
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)


def qualified_name(name: str) -> str:
    """The name that :func:`make_gym_env` takes, where a gymnasium id may stand without its prefix."""
    known = name.partition(":")[0] in _MAKERS if ":" in name else "-singletask" in name
    return name if known else f"gym:{name}"


def make_gym_env(task: str, *, chunk: int = 1, frame_stack: int = 1, **kwargs: Any) -> gymnasium.Env:
    """Make the gymnasium environment of a task; its actions are in [-1, 1].

    Observations are float32 (pictures uint8), rewards floats and flags bools, whatever numbers the simulator gives; what is no
    number raises (:class:`deflow_torchrl.envs.checked.CheckedSteps`). ``reset(seed=...)`` fixes the whole episode (see
    :class:`deflow_torchrl.envs.seeding.SeededReset`).

    Args:
        task: an OGBench single-task name (``info["success"]`` is its outcome), ``minari:ID`` for a Minari set's environment
            (:func:`deflow_torchrl.envs.make_minari_env`), or ``gym:ID`` for any environment registered with gymnasium
            (as ``gymnasium.make`` reads it, ``module:ID`` included; those of ``gymnasium_robotics`` are; finite action
            bounds are mapped to [-1, 1]; a ``Dict`` of pictures and vectors is packed, see
            :class:`deflow_torchrl.envs.wrappers.PackedObservations`); ``sparse:NAME`` for an OGBench task with the reward -1
            until it is solved, then 0.

    Keyword Args:
        chunk: h, steps of a chunk: with more than one the environment takes ``[h * A]`` and executes it open loop
            (:class:`deflow_torchrl.envs.wrappers.OpenLoopActions`).
        frame_stack: frames of an observation (:class:`deflow_torchrl.envs.wrappers.StackedFrames`).
        **kwargs: forwarded to ``gymnasium.make``.

    Raises:
        InputError: on a malformed or unknown name, or an environment without bounded continuous actions, whose observations
            are no array, or without a time limit.
        MissingExtraError: if the extra it needs is not installed.
    """
    prefix, colon, rest = task.partition(":")
    if colon and prefix in _MAKERS:
        env = pkgutil.resolve_name(_MAKERS[prefix])(rest, **kwargs)
    else:
        env = make_env_by_id(parse_ogbench_name(task).environment_id, **kwargs)
    from deflow_torchrl.envs.checked import CheckedSteps

    env = CheckedSteps(env)
    if frame_stack > 1:
        from deflow_torchrl.envs.wrappers import StackedFrames

        env = StackedFrames(env, frame_stack)
    if chunk > 1:
        from deflow_torchrl.envs.wrappers import OpenLoopActions

        env = OpenLoopActions(env, chunk)
    return env


def make_registered_env(environment_id: str, **kwargs: Any) -> gymnasium.Env:
    """Make an environment that is registered with gymnasium, for ``gym:ID``; see :func:`make_gym_env`."""
    try:
        import gymnasium
        from gymnasium.wrappers import RescaleAction
    except ModuleNotFoundError as error:
        raise MissingExtraError("gymnasium", "ogbench") from error

    from deflow_torchrl.envs.seeding import SeededReset

    register_robotics()
    try:
        env = _make(environment_id, **kwargs)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise InputError(f"env={environment_id} cannot be made: {one_line(error)}") from error
    space, wrong = env.action_space, None
    if (
        not isinstance(space, gymnasium.spaces.Box)
        or len(space.shape) != 1
        or space.dtype.kind != "f"
        or not space.is_bounded("both")
    ):
        kind = f" of {space.dtype}" if isinstance(space, gymnasium.spaces.Box) else ""
        wrong = f" takes actions in {space}{kind}; a bounded vector of real numbers is needed"
    elif isinstance(env.observation_space, gymnasium.spaces.Dict) and not _has_pictures(env.observation_space):
        names = ", ".join(env.observation_space.spaces)
        wrong = f": observations are a dictionary of {names}; name a flat one or wrap it (gymnasium.wrappers)"
    elif env.observation_space.shape is None and not isinstance(env.observation_space, gymnasium.spaces.Dict):
        wrong = f": observations are {env.observation_space}; an array is needed: wrap it (gymnasium.wrappers)"
    elif env.spec is None or env.spec.max_episode_steps is None:
        wrong = " has no time limit, so that an evaluation might never end; register it with max_episode_steps"
    if wrong is not None:
        env.close()
        raise InputError(f"env={environment_id}{wrong}")
    assert isinstance(space, gymnasium.spaces.Box)
    if not (space.low == -1).all() or not (space.high == 1).all():
        env = RescaleAction(env, np.float32(-1.0), np.float32(1.0))
    if isinstance(env.observation_space, gymnasium.spaces.Dict):
        from deflow_torchrl.envs.wrappers import PackedObservations

        env = PackedObservations(env)
    return SeededReset(env)


def _has_pictures(space: gymnasium.spaces.Dict) -> bool:
    """Whether observations are pictures ``[H, W, C]`` uint8, at least one, and vectors."""
    parts = [(len(part.shape or ()), part.dtype == np.uint8) for part in space.spaces.values()]
    return (3, True) in parts and all(part == (3, True) or part[0] == 1 for part in parts)


def make_env_by_id(environment_id: str, **kwargs: Any) -> gymnasium.Env:
    """Make any environment of ``ogbench`` by its gymnasium id; see :func:`make_gym_env`."""
    import_ogbench()
    import gymnasium

    from deflow_torchrl.envs.seeding import SeededReset

    if environment_id not in gymnasium.registry:
        near = difflib.get_close_matches(environment_id, list(gymnasium.registry), n=3)
        raise InputError(f"ogbench has no environment {environment_id!r}; the nearest are {', '.join(near) or 'none'}")
    if environment_id.startswith("visual-"):
        _check_renderer(environment_id)
    return SeededReset(_make(environment_id, **kwargs))


def _make(environment_id: str, **kwargs: Any) -> gymnasium.Env:
    import gymnasium

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="glfw")  # a missing display; the simulator is imported here
        warnings.filterwarnings("ignore", ".*render_mode")  # who asks for one looks himself whether it is there
        # gymnasium's checker would use the simulator's spaces before SeededReset has replaced them.
        return gymnasium.make(environment_id, disable_env_checker=True, **kwargs)


def environment_action_bounds(task: str) -> tuple[list[float], list[float]]:
    """Low and high of each dimension of the actions that a task's simulator takes, before they are mapped to [-1, 1].

    Args:
        task: as :func:`make_gym_env` takes it.

    Raises:
        InputError: if the environment cannot be made.
    """
    from deflow_torchrl.envs.checked import own_action_space

    with contextlib.closing(make_gym_env(task)) as env:
        space = own_action_space(env)
    return space.low.tolist(), space.high.tolist()


def success_timing(task: str) -> Literal["pre", "post"] | None:
    """Return whether a task's environment computes success, reward and ``terminated`` on s, before a step, or on s', after it.

    OGBench's data and the single-task environments of ogbench 1.2 and later use s; older environments use s'.

    Args:
        task: as :func:`make_gym_env` takes it.

    Returns:
        ``pre`` (s) or ``post`` (s'); ``None`` for an environment that is not OGBench's.

    Raises:
        MissingExtraError: if the task is OGBench's and ``ogbench`` is not installed.
    """
    task = task.removeprefix("sparse:")
    if ":" in task:
        return None
    import_ogbench()
    import gymnasium

    return gymnasium.spec(parse_ogbench_name(task).environment_id).kwargs.get("success_timing", "post")


def has_display() -> bool:
    """Whether a window can be opened: on Linux, whether the named display answers; that of a closed SSH session does not."""
    if sys.platform != "linux":
        return True
    addresses: list[str | tuple[str, int]] = []
    if wayland := os.environ.get("WAYLAND_DISPLAY"):
        addresses.append(os.path.join(os.environ.get("XDG_RUNTIME_DIR", ""), wayland))
    host, _, screen = os.environ.get("DISPLAY", "").rpartition(":")
    if (number := screen.split(".")[0]).isdecimal():
        local = f"/tmp/.X11-unix/X{number}"
        addresses += [local, f"\0{local}"] if host in ("", "unix") else [(host, 6000 + int(number))]
    return any(map(_answers, addresses))


def _answers(address: str | tuple[str, int]) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(2)
        try:
            client.connect(address)
        except OSError:
            return False
    return True


def chosen_renderer() -> dict[str, str]:
    """Environment variables of a process that draws: EGL where nothing is chosen and there is no display."""
    return {} if has_display() or os.environ.get("MUJOCO_GL") else {"MUJOCO_GL": "egl"}


def check_renderer(name: str) -> None:
    """Check in a process of its own that pictures can be drawn here; without a display EGL is chosen where nothing is chosen.

    The choice (``MUJOCO_GL``) holds for this process and for those started from now on.

    Args:
        name: of what is to be drawn, for the message.

    Raises:
        InputError: where the renderer cannot be used.
    """
    if chosen := chosen_renderer():
        os.environ.update(chosen)
        # mujoco chose when it was imported, which torchrl.envs does.
        for chooser in ("mujoco.rendering.classic.gl_context", "mujoco.gl_context"):
            if chooser in sys.modules:
                importlib.reload(sys.modules[chooser])
    _check_renderer(name)
    backend = os.environ.get("MUJOCO_GL", "")
    if (cause := _why_no_picture(backend)) is not None:
        raise InputError(
            f"{name} is drawn, and with MUJOCO_GL={backend} there is no GL driver here ({cause}); install its packages "
            "(Debian: libegl1 and libgl1-mesa-dri for egl, libosmesa6 for osmesa) or choose another (egl, osmesa, glfw)"
        )


@functools.cache
def _why_no_picture(backend: str) -> str | None:
    """Draw one picture of nothing; what went wrong."""
    if importlib.util.find_spec("mujoco") is None:
        raise MissingExtraError("mujoco", "ogbench")
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = run.stderr.strip().splitlines()
    return None if run.returncode == 0 else lines[-1] if lines else f"exit code {run.returncode}"


def _check_renderer(environment_id: str) -> None:
    """Refuse visual environments without a renderer: the simulator would fail at the first reset, with an OpenGL error."""
    if os.environ.get("MUJOCO_GL", "").strip().lower() not in ("egl", "osmesa") and not has_display():
        raise InputError(
            f"{environment_id} draws images, and there is no display here; set the environment variable MUJOCO_GL=egl "
            "(or osmesa) before Python starts"
        )


def make_env(task: str, *, device: torch.device | str = "cpu", **kwargs: Any) -> EnvBase:
    """Make a TorchRL environment of an OGBench single-task name.

    Its step data holds ``observation`` (``[O]`` float32; images ``[H, W, C]`` uint8; of a dictionary a TensorDict of these,
    as data sets deliver it), ``reward [1]``, ``terminated``, ``truncated``, ``done`` (bool ``[1]``) and ``success`` (bool
    ``[1]``): whether the goal is reached.

    Args:
        task: for example ``cube-single-play-singletask-task2-v0``.

    Keyword Args:
        device: device of the tensors.
        **kwargs: forwarded to :func:`make_gym_env`.

    Raises:
        InputError: on a malformed or unknown name, and on a visual task without a renderer.
        MissingExtraError: if the ``ogbench`` extra is not installed.
    """
    from torchrl.envs import Compose, DoubleToFloat, GymWrapper, RenameTransform, TransformedEnv, UnaryTransform

    from deflow_torchrl.entries import unpack
    from deflow_torchrl.envs.info import SuccessReader

    simulator = make_gym_env(task, **kwargs)
    env = GymWrapper(simulator, device=device)
    transforms: list[Any] = [DoubleToFloat()]
    if simulator.has_wrapper_attr("entries"):
        entries, frames = simulator.get_wrapper_attr("entries"), kwargs.get("frame_stack", 1)
        read = functools.partial(unpack, entries=entries, frame_stack=frames)
        transforms.append(UnaryTransform(["observation"], ["observation"], fn=read))
    if env.from_pixels:  # TorchRL calls images "pixels"; the data sets call every observation "observation"
        transforms.append(RenameTransform(["pixels"], ["observation"]))
    return TransformedEnv(env.set_info_dict_reader(SuccessReader(device)), Compose(*transforms))
