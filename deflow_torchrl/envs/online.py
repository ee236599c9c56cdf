# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Environments for the online phase: numbered episodes that can be restored, and that survive a simulator's faults.

1. **A running episode is a number and a list of actions.** Episode e is reset with a seed derived from (run seed, e), and
   the policy's noise in it comes from a generator derived from (run seed, e). Simulators are deterministic, so the state of
   an episode is restored by its reset and a replay of the actions so far (:class:`EpisodeStart`), including the time limit's
   counter and the noise; nothing of a simulator's memory has to be saved. :func:`is_replayable` measures whether a simulator
   is deterministic.
2. **A fault ends the episode, not the run.** An exception in ``reset`` or ``step``, or a number that is not finite, cuts the
   episode (``truncated``, ``fault``) at the last good observation; a new simulator is made before the next episode.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, Unbounded
from torchrl.envs.gym_like import default_info_dict_reader

from deflow_torchrl.envs.factory import make_gym_env
from deflow_torchrl.errors import InputError, one_line

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

CAUSE_BYTES = 200
"""Length of the text of a fault's cause in a transition."""

_RESET_STREAM, _NOISE_STREAM = 0, 1


@dataclass(frozen=True)
class EpisodeStart:
    """The point at which a worker begins.

    Attributes:
        episode: number of its first episode.
        actions: actions already taken in it, ``[t, A]`` float32; they are replayed at the first reset.
    """

    episode: int
    actions: np.ndarray


def reset_seed(seed: int, episode: int) -> int:
    """Derive the seed of an episode's reset, in [2^30, 2^31): evaluation's seeds count from a million."""
    state = np.random.SeedSequence([seed, episode, _RESET_STREAM]).generate_state(1)
    return 2**30 + int(state[0]) % 2**30


def noise_stream(seed: int, episode: int) -> np.random.Generator:
    """Make the generator of an episode's noise."""
    return np.random.default_rng(np.random.SeedSequence([seed, episode, _NOISE_STREAM]))


class OnlineEpisodes(gymnasium.Wrapper):
    """A task's environment as an endless sequence of numbered episodes, each determined by its number and its actions.

    Every ``reset`` begins the next of the episodes ``first``, ``first + stride``, ``first + 2 stride``... with the episode's own
    seed; a seed given by the caller is ignored. ``info`` holds ``episode`` (int), ``noise`` (``[A]`` float32, N(0, I), for the
    next action), ``success`` and ``fault`` (bool) and ``cause`` (text of a fault). A reset that fails returns an observation of
    zeros, or the last one, and the next step reports the fault.

    Args:
        task: as for :func:`deflow_torchrl.envs.make_gym_env`.

    Keyword Args:
        seed: the run's.
        first: number of the first episode.
        stride: distance between numbers: with W workers, worker w runs w, w + W, w + 2W...
        start: begin in the middle of an episode instead.
        **kwargs: forwarded to ``gymnasium.make``.

    Raises:
        InputError: if the environment cannot be made.
    """

    def __init__(
        self, task: str, *, seed: int, first: int = 0, stride: int = 1, start: EpisodeStart | None = None, **kwargs: Any
    ) -> None:
        self._make = functools.partial(make_gym_env, task, **kwargs)
        super().__init__(self._make())
        self._seed = seed
        self._stride = stride
        self._start = start or EpisodeStart(first, np.zeros((0, self._action_dim), np.float32))
        self._episode = self._start.episode
        self._observation = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)
        self._cause = ""
        self._broken = False

    @property
    def _action_dim(self) -> int:
        return int(np.prod(self.env.action_space.shape or ()))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode."""
        self._episode = self._start.episode
        actions = self._start.actions
        self._start = EpisodeStart(self._episode + self._stride, actions[:0])
        self._noise = noise_stream(self._seed, self._episode)
        self._cause = ""
        try:
            if self._broken:
                with contextlib.suppress(Exception):
                    self.env.close()
                self.env = self._make()
                self._broken = False
            self._observation, _ = self.env.reset(seed=reset_seed(self._seed, self._episode), options=options)
            for action in actions:
                self._draw()
                self._observation, _, terminated, truncated, _ = self.env.step(action)
                if terminated or truncated:
                    raise RuntimeError("the replayed episode ended before its last recorded action")
        except Exception as error:  # simulators raise anything
            self._fail("reset", error)
        return self._observation, self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step the environment; a fault of this step, or of the reset before it, truncates the episode."""
        if not self._cause:
            try:
                self._observation, reward, terminated, truncated, info = self.env.step(action)
                return self._observation, float(reward), terminated, truncated, self._info(info.get("success", False))
            except Exception as error:  # simulators raise anything
                self._fail("step", error)
        return self._observation, 0.0, False, True, self._info()

    def _fail(self, where: str, error: Exception) -> None:
        self._broken = True
        text = " ".join(str(error).split())
        self._cause = f"{where}: {type(error).__name__}{': ' if text else ''}{text}"

    def _draw(self) -> np.ndarray:
        return self._noise.standard_normal(self._action_dim, dtype=np.float32)

    def _info(self, success: bool = False) -> dict[str, Any]:
        return {
            "episode": self._episode,
            "noise": self._draw(),
            "success": success,
            "fault": bool(self._cause),
            "cause": self._cause,
        }


class _EpisodeReader(default_info_dict_reader):
    """Write the ``info`` of :class:`OnlineEpisodes` into TorchRL's step data."""

    def __init__(self, action_dim: int) -> None:
        spec = {
            "episode": Unbounded(shape=(1,), dtype=torch.int64),
            "noise": Unbounded(shape=(action_dim,), dtype=torch.float32),
            "success": Binary(shape=(1,), dtype=torch.bool),
            "fault": Binary(shape=(1,), dtype=torch.bool),
            "cause": Unbounded(shape=(CAUSE_BYTES,), dtype=torch.uint8),
        }
        super().__init__(list(spec), spec=spec)

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        """Add the entries to ``tensordict``."""
        entries = {key: torch.atleast_1d(torch.as_tensor(info_dict[key])) for key in self.keys if key != "cause"}
        return super().__call__({**entries, "cause": encode_cause(info_dict["cause"])}, tensordict)


def encode_cause(cause: str) -> torch.Tensor:
    """Encode a text for a transition, as bytes ``[CAUSE_BYTES]`` uint8, cut or filled with zeros."""
    data = cause.encode()[:CAUSE_BYTES]
    return torch.frombuffer(bytearray(data.ljust(CAUSE_BYTES, b"\0")), dtype=torch.uint8)


def decode_cause(encoded: torch.Tensor) -> str:
    """Decode a result of :func:`encode_cause`."""
    return bytes(encoded.tolist()).rstrip(b"\0").decode(errors="ignore")


def make_online_env(
    task: str, *, seed: int, first: int = 0, stride: int = 1, start: EpisodeStart | None = None, **kwargs: Any
) -> EnvBase:
    """Make the TorchRL environment of :class:`OnlineEpisodes`.

    Its step data holds ``observation`` (``[O]`` float32; images ``[H, W, C]`` uint8), ``reward [1]``, ``terminated``,
    ``truncated``, ``done``, ``success``, ``fault`` (bool ``[1]``), ``episode`` (int64 ``[1]``), ``noise [A]`` for the coming
    action, and ``cause`` (:func:`decode_cause`). It lives on the CPU.

    Args:
        task: as for :func:`deflow_torchrl.envs.make_gym_env`.

    Keyword Args:
        seed: the run's.
        first: number of the first episode.
        stride: distance between episode numbers.
        start: begin in the middle of an episode instead.
        **kwargs: forwarded to :func:`deflow_torchrl.envs.make_gym_env` (``chunk``, ``frame_stack``).

    Raises:
        InputError: if the environment cannot be made.
    """
    from torchrl.envs import GymWrapper, RenameTransform, TransformedEnv

    episodes = OnlineEpisodes(task, seed=seed, first=first, stride=stride, start=start, **kwargs)
    env = GymWrapper(episodes, device="cpu")
    env.set_info_dict_reader(_EpisodeReader(int(np.prod(episodes.action_space.shape or ()))))
    return TransformedEnv(env, RenameTransform(["pixels"], ["observation"])) if env.from_pixels else env


def check_online_environment(task: str, **kwargs: Any) -> None:
    """Reset the environment of :func:`make_online_env` and step it once; arguments as there.

    Raises:
        InputError: if it cannot be made, or fails.
    """
    with contextlib.closing(make_online_env(task, seed=0, **kwargs)) as env:
        try:
            start = env.reset()
            start["action"] = torch.zeros(env.action_spec.shape)
            after = env.step(start)["next"]
        except Exception as error:  # of any kind, by what its spaces declare
            raise InputError(f"{task} cannot act online: {type(error).__name__}: {one_line(error)}") from error
        if after["fault"].item():
            raise InputError(f"{task} cannot act online: {decode_cause(after['cause'])}")


@functools.cache
def is_replayable(task: str, *, steps: int = 20) -> bool:
    """Return whether a replay of an episode's actions restores it bit for bit.

    It is measured on one episode, in an environment that has run another episode before and in a fresh one. A fault that
    occurs at the same step again counts as a repetition.

    Args:
        task: as for :func:`deflow_torchrl.envs.make_gym_env`.

    Keyword Args:
        steps: length of the episode, at most.

    Raises:
        InputError: if the environment cannot be made.
    """
    used, fresh = OnlineEpisodes(task, seed=0), OnlineEpisodes(task, seed=0, first=1)
    try:
        _play(used, steps)
        return _play(used, steps) == _play(fresh, steps)
    finally:
        used.close()
        fresh.close()


def _play(env: OnlineEpisodes, steps: int) -> list[tuple[Any, ...]]:
    """Play up to ``steps`` steps of the next episode, with its noise for actions."""
    observation, info = env.reset()
    played: list[tuple[Any, ...]] = [(observation.tolist(),)]
    for _ in range(steps):
        observation, reward, terminated, truncated, info = env.step(info["noise"].clip(-1.0, 1.0))
        played.append((observation.tolist(), reward, terminated, truncated, info["cause"]))
        if terminated or truncated:
            break
    return played
