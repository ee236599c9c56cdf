# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Whole updates, from the drawing of the batch to the step of the targets, as one CUDA graph, several a replay.

An update at the paper's sizes is some thousand kernels of a few microseconds: launched one by one they wait for Python. A graph
launches them at once. On a device without graphs the same code calls the updates one after the other.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.trainers.update import Update

_log = logging.getLogger(__name__)

Once = Callable[[], tuple[TensorDictBase, TensorDictBase]]
"""One update: what it gave, and its batch."""
Capture = Callable[[Once, int], Once]
"""Makes of one update a call that does so many, and gives what the last of them gave."""

_CHECKED = 3
_WARMUP = 3
_LOSS_TOLERANCE = 1e-3
_WEIGHT_TOLERANCE = 1e-2


class GraphedUpdate:
    """Updates on batches that are drawn on the device, several a call.

    Before the first call a few updates are done twice, by the graphs and without them, from the same state and with the same
    random numbers: losses and weights must agree, else the updates stay eager and a warning says why. The state is put back, so
    that a run with graphs is the run without them.

    Args:
        update: the update, on the device of its batches.
        draw: draws a batch on that device, without looking at a value there (which would stop the host).

    Keyword Args:
        updates_per_replay: how many updates a replay does; a second graph does single ones.
        self_check: compare before the first call.
        capture: makes the graphs; CUDA's by default, on another device a loop.
    """

    def __init__(
        self,
        update: Update,
        draw: Callable[[], TensorDictBase],
        *,
        updates_per_replay: int = 10,
        self_check: bool = True,
        capture: Capture | None = None,
    ) -> None:
        if updates_per_replay < 1:
            raise ValueError(f"updates_per_replay must be positive, got {updates_per_replay}")
        self.update = update
        self.draw = draw
        self.updates_per_replay = updates_per_replay
        self.self_check = self_check
        self._device = update.tensors()[0].device
        self._capture = capture or (capture_cuda_graph if self._device.type == "cuda" else repeat)
        self._replays: dict[int, Once] = {}
        self.fell_back: str | None = None
        """Why the updates are eager after all; None where they are not."""

    def __call__(self, count: int) -> tuple[TensorDictBase, TensorDictBase]:
        """Do ``count`` updates.

        Returns:
            Losses and metadata of the last one, and its batch; the next call overwrites both.
        """
        if count < 1:
            raise ValueError(f"count must be positive, got {count}")
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
        """Forget the graphs: after the update's tensors were replaced, by a loaded state or a frozen prior."""
        self._replays = {}

    def _once(self) -> tuple[TensorDictBase, TensorDictBase]:
        batch = self.draw()
        return self.update.run(batch), batch

    def _prepare(self) -> None:
        sizes = sorted({1, self.updates_per_replay})
        try:
            with _state_kept(self.update):  # to capture is to run
                self._replays = {size: self._capture(self._once, size) for size in sizes}
            reason = self._difference() if self.self_check else None
        except RuntimeError as failure:
            error: BaseException = failure
            while error.__context__ is not None:  # the end of a capture that failed fails too, and says less
                error = error.__context__
            reason = f"the capture failed: {str(error).splitlines()[0]}"
        if reason is not None:
            self.fell_back = reason
            self._replays = {size: repeat(self._once, size) for size in sizes}
            _log.warning("updates are done one by one, without a graph: %s", reason)

    def _difference(self) -> str | None:
        """How captured updates differ from eager ones; None where they agree."""
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
    """The same without a graph."""

    def replay() -> tuple[TensorDictBase, TensorDictBase]:
        for _ in range(count):
            result = once()
        return result

    return replay


def capture_cuda_graph(once: Once, count: int) -> Once:
    """Record ``count`` updates into a CUDA graph.

    Raises:
        RuntimeError: where something in them cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # kernels are chosen, and Adam makes its state, before anything is recorded
        repeat(once, _WARMUP)()
    current.wait_stream(stream)
    gc.collect()
    try:
        with torch.cuda.graph(graph, stream=stream):
            result = repeat(once, count)()
    finally:
        torch.cuda.set_stream(current)  # which a capture that failed does not do

    def replay() -> tuple[TensorDictBase, TensorDictBase]:
        graph.replay()
        return result

    return replay


def _change(one: Tensor, other: Tensor) -> Tensor:
    """|one - other|, of equal infinities too."""
    return torch.where(one == other, 0.0, (one - other).abs())


def _flat(update: Update) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in update.tensors() if tensor.is_floating_point()])


@contextmanager
def _state_kept(update: Update) -> Iterator[None]:
    """Put everything back that updates inside change: tensors, moments, random numbers."""
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
                # In place, for a graph knows addresses: a moment that is new is what it was before it was made.
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        value.copy_(moments[parameter][name]) if parameter in moments else value.zero_()
