# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Whole updates, from sampling to the target step, recorded into a CUDA graph, several updates a replay.

An update at the paper's sizes runs about a thousand kernels of a few microseconds each; launched one by one they wait for
Python, and a graph launches them together. On a device without graphs the same code calls the updates one after the other.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from deflow_torchrl.algorithms.base import Stage
from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.trainers.update import Update

_log = logging.getLogger(__name__)

Once = Callable[[], tuple[TensorDictBase, TensorDictBase]]
"""Does one update; returns its output and its batch."""
Capture = Callable[[Once, int], Once]
"""Turns one update into a call that does several, and returns the result of the last."""

_CHECKED = 3
_WARMUP = 3
_LOSS_TOLERANCE = 1e-3
_WEIGHT_TOLERANCE = 1e-2


@dataclass(eq=False, repr=False)
class GraphedUpdate:
    """Does several updates a call, on batches drawn on the device.

    Before the first call a few updates are done twice, by the graphs and without them, from the same state and with the same
    random numbers. If losses or weights disagree, the updates stay eager and a warning says why. The state is put back
    afterwards, so that graphs change nothing in a run. Graphs are made anew where a setting of the optimiser, such as a learning
    rate, has been set to another number; one that is a tensor may change in place.

    Args:
        update: the update, on the device of its batches.
        draw: draws a batch on that device without synchronising with the host.

    Keyword Args:
        updates_per_replay: number of updates of a replay; a second graph does single updates.
        self_check: make the comparison before the first call.
        capture: makes the graphs; CUDA graphs by default, a loop on other devices.
    """

    update: Update
    draw: Callable[[], TensorDictBase]
    _: KW_ONLY
    updates_per_replay: int = 10
    self_check: bool = True
    capture: Capture | None = None

    def __post_init__(self) -> None:
        if self.updates_per_replay < 1:
            raise ValueError(f"updates_per_replay must be positive, got {self.updates_per_replay}")
        self._replays: dict[int, Once] = {}
        self._recorded: list[dict[str, Any]] = []
        self._stages: Sequence[Stage] = ()
        self.fell_back: str | None = None
        """Why the updates are eager; None if they are not."""

    def __call__(self, count: int) -> tuple[TensorDictBase, TensorDictBase]:
        """Do ``count`` updates.

        Returns:
            Losses and metadata of the last update, and its batch; the next call overwrites both.
        """
        if count < 1 or count > self.update.updates_to_next_phase:
            raise ValueError(f"count must be positive and end before the next phase, got {count}")
        self.update.begin_phase()
        stages = self.update.active_stages
        if stages != self._stages:
            self.reset()
            self._stages = stages
        if self._replays and self.fell_back is None and self._recorded != self._optimizer_settings():
            self.reset()  # a learning rate that was set to another number would have no effect in a graph
        if not self._replays:
            self._prepare()
        done = 0
        while done < count:
            size = self.updates_per_replay if count - done >= self.updates_per_replay else 1
            result = self._replays[size]()
            done += size
        self.update.step += count
        return result

    def reset(self) -> None:
        """Drop the graphs: needed after a loaded state or a frozen prior has replaced the update's tensors."""
        self._replays = {}

    def _optimizer_settings(self) -> list[dict[str, Any]]:
        """What a graph records of the optimiser's settings: the value of a number, the place of a tensor."""
        return [
            {
                name: value.data_ptr() if isinstance(value, Tensor) else value
                for name, value in group.items()
                if name != "params"
            }
            for group in self.update.optimizer.param_groups
        ]

    def _once(self) -> tuple[TensorDictBase, TensorDictBase]:
        batch = self.draw()
        return self.update.run(batch), batch

    def _prepare(self) -> None:
        sizes = sorted({1, self.updates_per_replay})
        self._recorded = self._optimizer_settings()
        capture = self.capture or (capture_cuda_graph if self.update.tensors()[0].is_cuda else repeat)
        try:
            with _state_kept(self.update):  # capturing runs the updates
                self._replays = {size: capture(self._once, size) for size in sizes}
            reason = self._difference() if self.self_check else None
        except RuntimeError as failure:
            error: BaseException = failure
            while error.__context__ is not None:  # ending a failed capture fails too, with a less clear message
                error = error.__context__
            reason = f"the capture failed: {str(error).splitlines()[0]}"
        if reason is not None:
            self.fell_back = reason
            self._replays = {size: repeat(self._once, size) for size in sizes}
            _log.warning("updates are done one by one, without a graph: %s", reason)

    def _difference(self) -> str | None:
        """Describe how captured updates differ from eager ones; None if they agree."""
        runs = []
        size = self.updates_per_replay
        single, several = [self._once] * _CHECKED, [repeat(self._once, size)]
        for calls in (single + several, [self._replays[1]] * _CHECKED + [self._replays[size]]):
            with _state_kept(self.update):
                before = _flat(self.update)
                rows = []
                for call in calls:
                    out = call()[0]
                    rows.append(torch.stack([out[name].double().sum() for name in sorted(out.keys())]))
                runs.append((torch.stack(rows), _flat(self.update), before))
        (losses, weights, before), (own_losses, own_weights, _) = runs
        done = _CHECKED + size
        off = float((_change(own_losses, losses) / losses.abs().clamp_min(1e-6)).nan_to_num(torch.inf).max())
        if off > _LOSS_TOLERANCE:
            return f"within {done} updates losses differ by {off:.1g} of their value from those without it"
        off = float(_change(own_weights, weights).norm() / _change(weights, before).norm())
        if not off <= _WEIGHT_TOLERANCE:
            return f"after {done} updates weights differ by {off:.1g} of what they moved from those without it"
        return None


def repeat(once: Once, count: int) -> Once:
    """Do ``count`` updates without a graph."""

    def replay() -> tuple[TensorDictBase, TensorDictBase]:
        for _ in range(count):
            result = once()
        return result

    return replay


def capture_cuda_graph(once: Once, count: int) -> Once:
    """Record ``count`` updates into a CUDA graph.

    Raises:
        RuntimeError: if an operation cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # kernels are chosen and Adam makes its state before the recording
        repeat(once, _WARMUP)()
    current.wait_stream(stream)
    gc.collect()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = repeat(once, count)()
    finally:
        torch.cuda.set_stream(current)  # a failed capture does not do it

    def replay() -> tuple[TensorDictBase, TensorDictBase]:
        graph.replay()
        return result

    return replay


def _change(one: Tensor, other: Tensor) -> Tensor:
    """|one - other|, 0 for equal infinities."""
    return torch.where(one == other, 0.0, (one - other).abs())


def _flat(update: Update) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in update.tensors() if tensor.is_floating_point()])


@contextmanager
def _state_kept(update: Update) -> Iterator[None]:
    """Restore at the end of the block what updates change: tensors, moments, random generators."""
    tensors = [(tensor, tensor.detach().clone()) for tensor in update.tensors()]
    moments: dict[Tensor, dict[str, Any]] = {
        parameter: {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        for parameter, state in update.optimizer.state.items()
    }
    try:
        with generators_set_aside():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
            for parameter, state in update.optimizer.state.items():
                # In place, because a graph holds addresses; moments made in the block become zero, their first value.
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        value.copy_(moments[parameter][name]) if parameter in moments else value.zero_()
