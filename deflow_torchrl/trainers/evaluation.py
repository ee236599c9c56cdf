# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Deterministic, paired evaluation on a batch of environments.

Episode e starts from seed ``seed + e`` and has its own noise stream, so the same policy gives the same trajectories twice,
and two policies get the same starts and the same noise, whatever the number of processes. (The number of environments is the
batch size of the policy call and can change its last digits.) The global random generators are restored afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from deflow_torchrl.entries import unpack
from deflow_torchrl.envs.d4rl import normalized_score
from deflow_torchrl.envs.factory import make_gym_env
from deflow_torchrl.errors import EnvironmentFaultError
from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.processes import PipedProcess, ignore_stop_signals, raise_if_stopped

MakeEnv = Callable[[], Any]
"""Makes one environment; sent to processes."""

OnStep = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Takes the numbers of running episodes, their observations and actions."""

DEFAULT_EVALUATION_SEED = 1_000_000
"""Far from training seeds: no generated data set has the same starts."""


@dataclass(frozen=True)
class EvaluationResult:
    """Outcomes of episodes, in the order of their seeds.

    Attributes:
        success: ``info["success"]`` of the last step, bool ``[E]``; false if the environment reports none.
        episode_return: undiscounted sum of rewards, ``[E]``.
        length: environment steps, ``[E]``.
        seeds: reset seed of each episode, ``[E]``.
    """

    success: np.ndarray
    episode_return: np.ndarray
    length: np.ndarray
    seeds: np.ndarray

    @property
    def success_rate(self) -> float:
        """Fraction of successful episodes."""
        return float(self.success.mean())

    def score(self, references: tuple[float, float]) -> np.ndarray:
        """Compute the normalised score of each episode, ``[E]``: 0 for a random policy's return, 100 for the expert's."""
        return np.asarray(normalized_score(self.episode_return, *references))

    def as_dict(self, references: tuple[float, float] | None = None) -> dict[str, Any]:
        """Return plain lists and numbers for a record, with normalised scores if references are given."""
        scores = None if references is None else self.score(references)
        return {
            "success_rate": self.success_rate,
            "mean_return": float(self.episode_return.mean()),
            **({} if scores is None else {"mean_score": float(scores.mean()), "score": scores.tolist()}),
            "episodes": len(self.success),
            "success": self.success.astype(int).tolist(),
            "episode_return": self.episode_return.tolist(),
            "length": self.length.tolist(),
            "seeds": self.seeds.tolist(),
        }


class Evaluator:
    """Runs policies on a task, with one policy call per step for all environments.

    Args:
        task: name of an environment, see :func:`deflow_torchrl.envs.make_gym_env`.

    Keyword Args:
        num_envs: number of environments stepped together.
        workers: number of processes that step them; 1 steps in this process. More than 1 needs a script with the usual
            ``if __name__ == "__main__"`` guard.
        device: device of the policies.
        frame_stack: frames of an observation.
        max_steps: environment steps of an episode at most; the environment's own limit by default.
        chunk: h, steps of a chunk: the policies write ``action [B, h * A]``, which is executed open loop.

    Examples:
        >>> with Evaluator("cube-single-play-singletask-task2-v0") as evaluator:  # doctest: +SKIP
        ...     print(evaluator.run(policy, episodes=50).success_rate)
    """

    def __init__(
        self,
        task: str,
        *,
        num_envs: int = 10,
        workers: int = 1,
        device: torch.device | str = "cpu",
        chunk: int = 1,
        frame_stack: int = 1,
        max_steps: int | None = None,
    ) -> None:
        if num_envs < 1 or workers < 1:
            raise ValueError(f"num_envs and workers must be positive, got {num_envs} and {workers}")
        self.device = torch.device(device)
        self.num_envs, self._frame_stack = num_envs, frame_stack
        workers = min(workers, num_envs)
        slots = [list(range(worker, num_envs, workers)) for worker in range(workers)]
        group = _LocalGroup if workers == 1 else _RemoteGroup
        limit = {} if max_steps is None else {"max_episode_steps": max_steps}
        make = partial(make_gym_env, task, chunk=chunk, frame_stack=frame_stack, **limit)
        self._groups = [group(make, numbers) for numbers in slots]
        # Also at the interpreter's exit, before multiprocessing waits for the processes.
        self._close = weakref.finalize(self, _close_all, self._groups)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and close the environments."""
        self._close()

    @torch.no_grad()
    def run(
        self,
        policy: TensorDictModuleBase,
        *,
        episodes: int,
        seed: int = DEFAULT_EVALUATION_SEED,
        on_episode: Callable[[], None] | None = None,
        on_step: OnStep | None = None,
    ) -> EvaluationResult:
        """Run ``episodes`` episodes of a policy.

        Args:
            policy: reads ``observation [B, O]``, of pictures ``[B, H, W, C]`` uint8 (and ``noise``, if among its in_keys:
                ``[B, A]``, or ``[B, *noise_shape]`` if it has a ``noise_shape``) and writes ``action [B, A]``.

        Keyword Args:
            episodes: number of episodes E.
            seed: episode e is reset with ``seed + e``.
            on_episode: called at the end of each episode, for a progress bar.
            on_step: called at each step with the running episodes' numbers, observations and actions.

        Returns:
            The outcomes of the episodes.
        """
        outcome = EvaluationResult(
            success=np.zeros(episodes, bool),
            episode_return=np.zeros(episodes),
            length=np.zeros(episodes, np.int64),
            seeds=seed + np.arange(episodes),
        )
        waiting = iter(range(episodes))
        # slot -> its episode. A slot with no episode left keeps its last observation in the batch, so that the batch size, and
        # with it the rounding of every matrix product, stays the same.
        running = dict(zip(range(self.num_envs), waiting, strict=False))
        starting = dict(running)
        observations = np.zeros(0)
        generators: dict[int, torch.Generator] = {}  # slot -> generator of its episode's noise
        noise_shape = getattr(policy, "noise_shape", None)
        if noise_shape is None:
            noise_shape = (self._ask("action_dim", {0: None})[0],)
        entries = self._ask("entries", {0: None})[0]
        with generators_set_aside(seed):  # for a policy that draws random numbers itself
            while running:
                raise_if_stopped()
                seeds = {slot: int(outcome.seeds[episode]) for slot, episode in starting.items()}
                for slot, observation in self._ask("reset", seeds).items():
                    if not observations.size:
                        dtype = np.uint8 if observation.dtype == np.uint8 else np.float32
                        observations = np.zeros((self.num_envs, *observation.shape), dtype)
                    observations[slot] = observation
                    state = np.random.SeedSequence([seed, starting[slot]]).generate_state(1, np.uint64)[0]
                    generators[slot] = torch.Generator().manual_seed(int(state >> 1))
                starting = {}
                read = torch.from_numpy(observations)
                batch = TensorDict(
                    {"observation": unpack(read, entries, self._frame_stack) if entries else read},
                    batch_size=[self.num_envs],
                )
                if "noise" in policy.in_keys:
                    noise = torch.zeros(self.num_envs, *noise_shape)
                    for slot in running:
                        noise[slot] = torch.randn(noise_shape, generator=generators[slot])
                    batch["noise"] = noise
                actions = policy(batch.to(self.device))["action"].cpu().numpy()
                if on_step is not None:
                    slots = list(running)
                    on_step(np.array(list(running.values())), observations[slots], actions[slots])
                for slot, step in self._ask("step", {slot: actions[slot] for slot in running}).items():
                    episode = running[slot]
                    observations[slot], reward, done, success = step
                    outcome.episode_return[episode] += reward
                    outcome.length[episode] += 1
                    if done:
                        outcome.success[episode] = success
                        del running[slot]
                        for following in itertools.islice(waiting, 1):
                            running[slot] = starting[slot] = following
                        if on_episode is not None:
                            on_episode()
        return outcome

    def _ask(self, command: str, values: dict[int, Any]) -> dict[int, Any]:
        """Send a command of :class:`_LocalGroup` with a value for each slot to all groups, then collect their answers."""
        asked = []
        for group in self._groups:
            mine = {slot: values[slot] for slot in group.slots if slot in values}
            if mine:
                group.send(command, mine)
                asked.append(group)
        try:
            return {slot: answer for group in asked for slot, answer in group.receive().items()}
        except BaseException:
            self.close()  # answers of the other groups may be left in their pipes
            raise


def _close_all(groups: list[_LocalGroup | _RemoteGroup]) -> None:
    for group in groups:
        group.close()


class _LocalGroup:
    """A part of the environments, stepped in this process."""

    def __init__(self, make: MakeEnv, slots: list[int]) -> None:
        self.slots, self._make = slots, make
        self._envs = {slots[0]: make()}  # those of the other slots when they are used
        self._answer: dict[int, Any] = {}
        self._episodes: dict[int, list[int]] = {}  # slot -> seed and steps of its episode

    def send(self, command: str, values: dict[int, Any]) -> None:
        for slot in values:
            if slot not in self._envs:
                self._envs[slot] = self._make()
        self._answer = {slot: getattr(self, f"_{command}")(slot, value) for slot, value in values.items()}

    def receive(self) -> dict[int, Any]:
        return self._answer

    def _action_dim(self, slot: int, _: None) -> int:
        return int(np.prod(self._envs[slot].action_space.shape or ()))

    def _entries(self, slot: int, _: None) -> dict[str, list[int]] | None:
        env = self._envs[slot]
        return env.get_wrapper_attr("entries") if env.has_wrapper_attr("entries") else None

    def _reset(self, slot: int, seed: int) -> np.ndarray:
        self._episodes[slot] = [seed, 0]
        with self._faults_named(slot):
            return self._envs[slot].reset(seed=seed)[0]

    def _step(self, slot: int, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        self._episodes[slot][1] += 1
        with self._faults_named(slot):
            observation, reward, terminated, truncated, info = self._envs[slot].step(action)
        return observation, float(reward), bool(terminated or truncated), bool(info.get("success", False))

    @contextlib.contextmanager
    def _faults_named(self, slot: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # simulators raise anything
            from deflow_torchrl.envs.checked import fault

            seed, steps = self._episodes[slot]
            where = f"step {steps}" if steps else "the reset"
            raise EnvironmentFaultError(
                f"the environment failed in {where} of the evaluation's episode of seed {seed} ({fault(error)})"
            ) from error

    def close(self) -> None:
        for env in self._envs.values():
            env.close()


class _RemoteGroup(PipedProcess):
    """The same in a process of its own."""

    def __init__(self, make: MakeEnv, slots: list[int]) -> None:
        self.slots = slots
        super().__init__(_serve, make, slots, died=_process_died)

    def send(self, command: str, values: dict[int, Any]) -> None:  # type: ignore[override]
        super().send((command, values))


def _process_died(code: int | None) -> EnvironmentFaultError:
    return EnvironmentFaultError(f"an evaluation process died (exit code {code}); was the memory full?")


def _serve(pipe: Connection, make: MakeEnv, slots: list[int]) -> None:
    """Execute the commands that come through a pipe, and send back the answers or exceptions."""
    ignore_stop_signals()
    logging.getLogger("deflow_torchrl").setLevel(logging.ERROR)  # the parent logs warnings
    os.environ.setdefault("LP_NUM_THREADS", "1")  # a renderer in software would take all cores for each process
    with contextlib.suppress(EOFError, BrokenPipeError), contextlib.ExitStack() as stack:
        group = None
        while True:
            command, values = pipe.recv()
            try:
                group = group or stack.enter_context(contextlib.closing(_LocalGroup(make, slots)))
                group.send(command, values)
                pipe.send(group.receive())
            except Exception as error:  # the parent raises it
                pipe.send(error)
