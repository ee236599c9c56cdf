# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Online experience, one transition at a time, from TorchRL's collectors.

The collector acts in numbered episodes (:mod:`deflow_torchrl.envs.online`), so the transitions depend on the run's seed and
the weights only, and the state of a running episode is its number and its actions. A checkpoint is therefore exact
(:meth:`OnlineExperience.state_dict` holds numbers, never a simulator), and if a worker dies, its chunk is collected again.

In this process (``workers=0``) each collection acts with the live weights. With worker processes the next chunk is collected
while the learner uses the last one, with the weights published when delivery of the last one began: acting lags behind
learning by one to two chunks of updates, by the same number in every run, independent of timing.
"""

from __future__ import annotations

import copy
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from deflow_torchrl.data import TRANSITION_KEYS
from deflow_torchrl.data.chunks import chunk_of
from deflow_torchrl.envs.factory import make_gym_env
from deflow_torchrl.errors import CollectorError, EnvironmentFaultError, InputError, RestoreError
from deflow_torchrl.trainers.collectors import LocalSource, ProcessSource, WorkerDied

_LOG = logging.getLogger(__name__)

MINIMUM_EPISODES = 20
"""The share of faulty episodes is checked after this many: one early fault does not stop a run."""

HOPELESS_EPISODES = 10
"""This many episodes in a row without a good transition stop the run, whatever share is allowed."""

RESTARTS = 5
"""More restarts of the workers in a row without a collected chunk stop the run."""

_COLLECTED = (*TRANSITION_KEYS, "episode", ("next", "success"), ("next", "fault"), ("next", "cause"))


@dataclass(frozen=True)
class OnlineStep:
    """Result of one call of :meth:`OnlineExperience.step`.

    Attributes:
        episode_return: undiscounted sum of rewards of the episode that ended with this step; ``None`` while it runs.
        length: its number of steps.
        success: its last ``info["success"]``.
        fault: the environment failed: the episode was dropped, and this step added no transition.
        cause: cause of the fault.
    """

    episode_return: float | None = None
    length: int | None = None
    success: bool | None = None
    fault: bool = False
    cause: str = ""


@dataclass
class _Simulator:
    """State of a worker's simulator, after everything collected."""

    episode: int
    actions: list[Tensor] = field(default_factory=list)  # of the running episode
    observation: Tensor | None = None  # the last; None before the first action

    def end(self, stride: int) -> None:
        """Move to the start of the next episode."""
        self.episode, self.actions, self.observation = self.episode + stride, [], None


@dataclass
class _Episode:
    """The part of a worker's running episode that was delivered to the buffer."""

    number: int
    rows: dict[int, None] = field(default_factory=dict)  # its row numbers in the buffer, an ordered set
    episode_return: float = 0.0
    length: int = 0
    plan: Tensor | None = None  # the chunk of actions that is being executed, [1, h * A]
    steps: list[TensorDictBase] = field(default_factory=list)  # its last h - 1 steps, with the executed actions


class OnlineExperience:
    """Acts with a policy and hands each transition to a buffer.

    Args:
        task: as for :func:`deflow_torchrl.envs.make_gym_env`.
        policy: the learner's own acting policy: it reads ``observation`` and ``noise``, and writes ``action``.

    Keyword Args:
        seed: fixes the episodes' starts and the policy's noise.
        add: takes one transition (TED, batch ``[1]``) and returns its row number ``[1]``.
        discard: takes row numbers ``[n]`` of transitions that must not be learned from: those of a faulty episode.
        device: of the policy.
        workers: processes that act; 0 acts in this process.
        steps_per_collection: environment steps of all workers between two publications of the policy's weights. With 1 and
            ``workers=0`` every step acts with the weights of the last update, as in the paper.
        max_fault_share: share of faulty episodes above which :meth:`step` raises.
        chunk: h, steps of a chunk: the policy writes ``action [h * A]``, which is executed open loop, and ``add`` takes the
            chunks of each episode as :meth:`deflow_torchrl.data.TransitionDataset.chunked` gives them.
        gamma: discount of one step, for the reward of a chunk.
        frame_stack: frames of an observation, as the data have them.

    Raises:
        InputError: on settings out of range, or an environment that cannot be made.
    """

    def __init__(
        self,
        task: str,
        policy: TensorDictModuleBase,
        *,
        seed: int,
        add: Callable[[TensorDictBase], Tensor],
        discard: Callable[[Tensor], None],
        device: torch.device | str = "cpu",
        workers: int = 0,
        steps_per_collection: int = 1,
        max_fault_share: float = 0.1,
        chunk: int = 1,
        gamma: float = 0.99,
        frame_stack: int = 1,
    ) -> None:
        if workers < 0 or steps_per_collection < 1 or steps_per_collection % max(workers, 1):
            raise InputError(
                f"collector_workers={workers} with {steps_per_collection} steps per collection cannot be used; the workers "
                "must not be negative, and the steps a positive multiple of them"
            )
        if not 0.0 <= max_fault_share <= 1.0:
            raise InputError(f"max_fault_share={max_fault_share} must lie between 0 and 1")
        self.task = task
        self.policy = policy
        self.workers = workers
        self.steps_per_collection = steps_per_collection
        self.max_fault_share = max_fault_share
        self.chunk_length, self.gamma, self.frame_stack = chunk, gamma, frame_stack
        self.waiting_seconds = 0.0
        self.counters = {"episodes": 0, "faults": 0, "worker_restarts": 0, "env_steps": 0}
        self._seed = seed
        self._device = torch.device(device)
        self._add, self._discard = add, discard
        slots = range(max(workers, 1))
        self._simulators = [_Simulator(slot) for slot in slots]
        self._episodes = [_Episode(slot) for slot in slots]
        self._hopeless = 0  # faulty episodes in a row without a good transition
        self._said: set[str] = set()
        # The chunk being delivered, in the order of delivery: row i comes from worker i % W.
        self._chunk: TensorDictBase | None = None
        self._cursor = 0
        self._ahead: TensorDictBase | None = None  # the next chunk, if a checkpoint has waited for it
        self._source: LocalSource | ProcessSource | None = None
        make_gym_env(task).close()  # an unusable name is refused here

    def __enter__(self) -> OnlineExperience:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Acting

    def _start(self) -> LocalSource | ProcessSource:
        if self.workers == 0:
            return LocalSource(self._envs()[0], self.policy, self._device, self.steps_per_collection)
        return ProcessSource(self._envs(), self._snapshot, self.steps_per_collection)

    @cached_property
    def _snapshot(self) -> TensorDictModuleBase:
        """The workers' copy of the policy: on the CPU, in shared memory."""
        return copy.deepcopy(self.policy).to("cpu").requires_grad_(False).share_memory()

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the policy's present weights to the workers; called while nothing is collected."""
        theirs = chain(self._snapshot.parameters(), self._snapshot.buffers())
        mine = chain(self.policy.parameters(), self.policy.buffers())
        for destination, weights in zip(theirs, mine, strict=True):
            destination.copy_(weights)

    def _next_chunk(self) -> TensorDictBase:
        """Return the next chunk and, with worker processes, begin to collect the one after it."""
        if self._ahead is not None:
            chunk, self._ahead = self._ahead, None
        else:
            chunk = self._gather()
        if self.workers:
            self._begin()
        return chunk

    def _begin(self) -> None:
        self._source = self._source or self._start()
        if self.workers:
            self._publish()
        self._source.begin()

    def _gather(self) -> TensorDictBase:
        """Return the chunk that is being collected, or collect one."""
        if self._source is None or not self._source.running:
            self._begin()
        failed = 0
        while True:
            try:
                if self._source is None:
                    self._source = self._start()
                    self._source.begin()
                return self._follow(self._source.finish())
            except WorkerDied as error:
                # The simulators' records and the published weights are still those of the chunk's beginning.
                self.close()
                failed += 1
                if failed > RESTARTS:
                    raise CollectorError(f"the collector's workers died {failed} times in a row: {error}") from error
                self.counters["worker_restarts"] += 1
                _LOG.warning("%s; all workers are started anew and collect the chunk again", error)

    def _envs(self) -> list[Callable[[], Any]]:
        """Make a constructor of each worker's environment, at the state of its simulator."""
        from deflow_torchrl.envs.online import EpisodeStart, make_online_env

        envs: list[Callable[[], Any]] = []
        for simulator in self._simulators:
            if simulator.actions and not self.replayable:
                _LOG.warning(
                    "%s does not repeat itself: episode %d, %d steps old, cannot be restored and ends here",
                    self.task, simulator.episode, len(simulator.actions),
                )  # fmt: skip
                simulator.end(len(self._simulators))
            actions = torch.stack(simulator.actions) if simulator.actions else torch.zeros(0, 0)
            start = EpisodeStart(simulator.episode, actions.numpy())
            envs.append(
                partial(
                    make_online_env,
                    self.task,
                    seed=self._seed,
                    stride=len(self._simulators),
                    start=start,
                    chunk=self.chunk_length,
                    frame_stack=self.frame_stack,
                )
            )
        return envs

    def _follow(self, chunk: TensorDictBase) -> TensorDictBase:
        """Update the simulators' records by a collected chunk.

        Raises:
            RestoreError: if an episode was not restored as recorded; the records stay as they were.
        """
        chunk = chunk.select(*_COLLECTED)
        for row, simulator in enumerate(self._simulators):
            if simulator.observation is not None and not torch.equal(simulator.observation, chunk["observation"][row]):
                from deflow_torchrl.envs.online import decode_cause

                cause = decode_cause(chunk["next", "cause"][row])
                raise RestoreError(
                    f"episode {simulator.episode} of {self.task} was not restored exactly: after a replay of its "
                    f"{len(simulator.actions)} actions the observation differs from the recorded one"
                    f"{f' ({cause})' if cause else ''}; resume from a checkpoint at an episode's end"
                )
        episodes, done = chunk["episode"].flatten().tolist(), chunk["next", "done"].flatten().tolist()
        for row, episode in enumerate(episodes):
            simulator = self._simulators[row % len(self._simulators)]
            simulator.episode = episode
            if done[row]:
                simulator.end(len(self._simulators))
            else:
                simulator.actions.append(chunk["action"][row])
                simulator.observation = chunk["next", "observation"][row]
        return chunk

    # Delivery

    def step(self) -> OnlineStep:
        """Deliver one transition.

        Raises:
            EnvironmentFaultError: if the share of faulty episodes is above ``max_fault_share``.
            RestoreError: if an episode was not restored as recorded.
        """
        if self._chunk is None or self._cursor == len(self._chunk):
            began = time.perf_counter()
            self._chunk, self._cursor = self._next_chunk(), 0
            self.waiting_seconds += time.perf_counter() - began
        row, worker = self._chunk[self._cursor : self._cursor + 1], self._cursor % len(self._episodes)
        self._cursor += 1
        self.counters["env_steps"] += 1
        number = int(row["episode"].item())
        if self._episodes[worker].number != number:  # its last episode could not be restored
            self._episodes[worker] = _Episode(number)
        episode = self._episodes[worker]
        if row["next", "done"].item():
            self._episodes[worker] = _Episode(number + len(self._episodes))
            self.counters["episodes"] += 1
        if row["next", "fault"].item():
            return self._drop(episode, row)
        self._hopeless = 0
        transition: TensorDictBase | None = row.select(*TRANSITION_KEYS)
        if self.chunk_length > 1:
            transition = self._join(episode, row.select(*TRANSITION_KEYS))
        for index in [] if transition is None else self._add(transition).tolist():
            for other in self._episodes:  # a full buffer reuses rows
                other.rows.pop(index, None)
            episode.rows[index] = None
        episode.episode_return += row["next", "reward"].item()
        episode.length += 1
        if not row["next", "done"].item():
            return OnlineStep()
        return OnlineStep(episode.episode_return, episode.length, bool(row["next", "success"].item()))

    def _join(self, episode: _Episode, step: TensorDictBase) -> TensorDictBase | None:
        """The chunk that ends with this step of an episode; None where fewer than h steps have been made."""
        place = episode.length % self.chunk_length
        if place == 0:
            episode.plan = step["action"]
        assert episode.plan is not None
        step["action"] = episode.plan.chunk(self.chunk_length, dim=-1)[place]  # the policy's others were not executed
        episode.steps.append(step)
        if len(episode.steps) < self.chunk_length:
            return None
        chunk = chunk_of(episode.steps, gamma=self.gamma)
        del episode.steps[0]
        return chunk

    def _drop(self, episode: _Episode, row: TensorDictBase) -> OnlineStep:
        """Discard a faulty episode."""
        from deflow_torchrl.envs.online import decode_cause

        cause = decode_cause(row["next", "cause"][0])
        if episode.rows:
            self._discard(torch.tensor(list(episode.rows)))
        self.counters["faults"] += 1
        self._hopeless += 0 if episode.length else 1
        kind = re.sub(r"[-+]?\d+(\.\d+)?", "#", cause)  # "at time 1.20" and "at time 1.25" count as one cause
        if kind not in self._said:
            self._said.add(kind)
            _LOG.warning(
                "%s failed in step %d of episode %d (%s); the episode is dropped and counted, the run goes on",
                self.task, episode.length + 1, episode.number, cause,
            )  # fmt: skip
        faults, episodes = self.counters["faults"], self.counters["episodes"]
        if episodes >= MINIMUM_EPISODES and faults > self.max_fault_share * episodes:
            raise EnvironmentFaultError(
                f"{faults} of {episodes} episodes of {self.task} failed ({faults / episodes:.0%}), the last with {cause}; "
                f"max_fault_share={self.max_fault_share:g} allows fewer: mend the environment, or set a larger share"
            )
        if self._hopeless >= HOPELESS_EPISODES:
            raise EnvironmentFaultError(
                f"{self._hopeless} episodes of {self.task} in a row failed in their first step, the last with {cause}; "
                "mend the environment"
            )
        return OnlineStep(fault=True, cause=cause)

    # Checkpoints

    @cached_property
    def replayable(self) -> bool:
        """Whether an episode of the environment can be restored at any step; measured once."""
        from deflow_torchrl.envs.online import is_replayable

        return is_replayable(self.task)

    @property
    def restorable(self) -> bool:
        """Whether a checkpoint may be made now.

        Always if the environment is :attr:`replayable`; otherwise only between episodes. With worker processes or longer
        collections, where there may be no such moment, always: a resume then cuts the running episodes short, with a
        warning.
        """
        alone = self.workers == 0 and self.steps_per_collection == 1
        return not alone or not any(simulator.actions for simulator in self._simulators) or self.replayable

    def state_dict(self) -> dict[str, Any]:
        """Return what another object needs to continue exactly: plain numbers, strings and tensors."""
        if self._ahead is None and self._source is not None and self._source.running:
            self._ahead = self._gather()
        chunk = None if self._chunk is None else self._chunk[self._cursor :]
        return {
            "task": self.task,
            "seed": self._seed,
            "counters": dict(self.counters),
            "hopeless": self._hopeless,
            "waiting_seconds": self.waiting_seconds,
            "simulators": [
                {**vars(simulator), "actions": torch.stack(simulator.actions) if simulator.actions else None}
                for simulator in self._simulators
            ],
            "episodes": [
                {**vars(episode), "rows": list(episode.rows), "steps": [_packed(step) for step in episode.steps]}
                for episode in self._episodes
            ],
            "chunk": None if chunk is None or not len(chunk) else _packed(chunk),
            "cursor": self._cursor,
            "ahead": None if self._ahead is None else _packed(self._ahead),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a result of :meth:`state_dict`.

        Raises:
            InputError: if the state has another task, seed or number of workers.
        """
        workers = len(self._simulators), len(state["simulators"])
        pairs = {"task": (self.task, state["task"]), "seed": (self._seed, state["seed"]), "workers": workers}
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                raise InputError(f"the online experience was saved with {name}={theirs}, this run has {mine}")
        self.close()
        self.counters = dict(state["counters"])
        self._hopeless = state["hopeless"]
        self.waiting_seconds = state["waiting_seconds"]
        self._simulators = [
            _Simulator(**{**saved, "actions": [] if saved["actions"] is None else list(saved["actions"])})
            for saved in state["simulators"]
        ]
        self._episodes = [
            _Episode(
                **{
                    **saved,
                    "rows": dict.fromkeys(saved["rows"]),
                    "steps": [_unpacked(step) for step in saved.get("steps", [])],
                }
            )
            for saved in state["episodes"]
        ]
        self._chunk, self._cursor = None, 0
        if state["chunk"] is not None:
            # Rows keep their positions, which tell their workers.
            rest = _unpacked(state["chunk"])
            self._chunk = torch.cat([rest[:1].expand(state["cursor"]), rest])
            self._cursor = state["cursor"]
        self._ahead = None if state["ahead"] is None else _unpacked(state["ahead"])

    def close(self) -> None:
        """Close the environments and end the processes; may be called twice."""
        if self._source is not None:
            self._source.close()
            self._source = None


def _packed(chunk: TensorDictBase) -> dict[str, Tensor]:
    """Copy a chunk's entries under flat names, as a checkpoint holds them."""
    return dict(chunk.flatten_keys("/").clone().items())


def _unpacked(entries: dict[str, Tensor]) -> TensorDictBase:
    return TensorDict(dict(entries)).auto_batch_size_(1).unflatten_keys("/")
