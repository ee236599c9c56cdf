"""Several updates a call, and what happens where the captured ones are not the same as the eager ones."""

import dataclasses
import functools
import logging

import numpy as np
import pytest
import torch

from deflow_torchrl.algorithms import ALGORITHMS, DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.data.returns import with_returns
from deflow_torchrl.errors import NonFiniteLossError
from deflow_torchrl.trainers import StackedUpdate, UpdateStep
from deflow_torchrl.trainers.graphed import GraphedUpdate, repeat
from tests.support.networks import ACTION_DIM, NEEDED, OBSERVATION_DIM

PROBLEM = ProblemSpec(
    OBSERVATION_DIM, ACTION_DIM, (16, 16), 0.9, "min", 0.01, torch.device("cpu"), reward_range=(-1.0, 1.0)
)


def make_update(device="cpu", name="deflow"):
    torch.manual_seed(0)
    problem = dataclasses.replace(PROBLEM, device=torch.device(device))
    algorithm = get_algorithm(name)
    return UpdateStep(algorithm.build(algorithm.config(**NEEDED.get(name, {})), problem))


def make_draw(device="cpu", *, next_action=False, returns=None):
    """Batches as a run draws them."""
    rng = np.random.default_rng(5)
    dataset = TransitionDataset.from_arrays(
        observations=rng.standard_normal((100, OBSERVATION_DIM)).astype(np.float32),
        actions=rng.uniform(-1, 1, (100, ACTION_DIM)).astype(np.float32),
        rewards=rng.standard_normal(100).astype(np.float32),
        terminals=np.arange(100) % 20 == 19,
    )
    if returns is not None:
        dataset = with_returns(dataset, gamma=0.9, tail=returns)
    return functools.partial(dataset.to(device).draw, 16, next_action=next_action)


def train_eagerly(steps, device="cpu", name="deflow"):
    update = make_update(device, name)
    draw = make_draw(device, next_action=update.learner.next_action, returns=update.learner.returns)
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        losses.append(update(draw()))
    return update, losses


def weights(update):
    return {name: value.clone() for name, value in update.state_dict()["loss"].items()}


@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("updates_per_replay", [1, 4])
def test_twenty_updates_are_those_of_single_calls_to_the_last_bit(updates_per_replay, self_check):
    eager, losses = train_eagerly(20)
    update = make_update()
    graphed = GraphedUpdate(update, make_draw(), updates_per_replay=updates_per_replay, self_check=self_check)
    torch.manual_seed(1)
    for count, done in ((1, 1), (9, 10), (10, 20)):
        out, _ = graphed(count)
        assert update.step == done
        torch.testing.assert_close(out.to_dict(), losses[done - 1].to_dict(), rtol=0, atol=0)
    torch.testing.assert_close(weights(update), weights(eager), rtol=0, atol=0)
    moments = [tensor for state in update.optimizer.state.values() for tensor in state.values()]
    expected = [tensor for state in eager.optimizer.state.values() for tensor in state.values()]
    torch.testing.assert_close(moments, expected, rtol=0, atol=0)
    assert graphed.fell_back is None


def test_stacked_seeds_are_captured_like_one():
    def make_stack():
        updates = []
        for seed in range(3):
            torch.manual_seed(seed)
            updates.append(UpdateStep(get_algorithm("deflow").build(DeFlowConfig(), PROBLEM)))
        return StackedUpdate(updates)

    draw = make_draw()
    single, several = make_stack(), make_stack()
    torch.manual_seed(1)
    for _ in range(7):
        expected = single(torch.stack([draw() for _ in range(3)]))
    graphed = GraphedUpdate(several, lambda: torch.stack([draw() for _ in range(3)]), updates_per_replay=3)
    torch.manual_seed(1)
    out, batch = graphed(7)
    assert graphed.fell_back is None
    assert batch.shape == (3, 16)
    torch.testing.assert_close(out.to_dict(), expected.to_dict(), rtol=0, atol=0)
    for one, other in zip(several.updates, single.updates, strict=True):
        assert one.step == other.step == 7
        torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
        states = [update.optimizer.state_dict()["state"] for update in (one, other)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def wrong(kind):
    """A capture that loses something, as graphs do: values read when it was made, or a part that was not recorded."""

    def capture(once, count):
        if kind == "stale batch":
            update, batch = once.__self__.update, once.__self__.draw()
            return lambda: (update.run(batch), batch)
        if kind == "no step":
            return lambda: _without_step(once)
        once()  # to warm up
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("the end of the capture failed too")  # as torch.cuda.graph does

    return capture


def _without_step(once):
    optimizer = once.__self__.update.optimizer
    step, optimizer.step = optimizer.step, lambda: None
    try:
        return once()
    finally:
        optimizer.step = step


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("stale batch", "losses differ"),
        ("no step", "differ"),
        ("nothing", "capture failed: operation not permitted when stream is capturing"),
    ],
)
def test_a_capture_that_differs_falls_back_and_says_why(kind, reason, caplog):
    eager, _ = train_eagerly(6)
    update = make_update()
    graphed = GraphedUpdate(update, make_draw(), updates_per_replay=3, capture=wrong(kind))
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        graphed(6)
    assert reason in graphed.fell_back
    assert [reason in record.message and "\n" not in record.message for record in caplog.records] == [True]
    torch.testing.assert_close(weights(update), weights(eager), rtol=0, atol=0)


def test_a_fault_of_the_graph_of_several_updates_alone_is_found():
    def capture(once, count):
        return repeat(once, count if count == 1 else count - 1)

    graphed = GraphedUpdate(make_update(), make_draw(), updates_per_replay=4, capture=capture)
    graphed(4)
    assert "differ" in graphed.fell_back


def test_a_fixed_alpha_of_zero_is_no_difference():
    torch.manual_seed(0)
    update = UpdateStep(get_algorithm("deflow").build(DeFlowConfig(fixed_alpha=0.0), PROBLEM))
    graphed = GraphedUpdate(update, make_draw())
    graphed(1)
    assert graphed.fell_back is None


def test_without_the_check_a_wrong_capture_is_believed():
    eager, _ = train_eagerly(6)
    graphed = GraphedUpdate(make_update(), make_draw(), self_check=False, capture=wrong("stale batch"))
    torch.manual_seed(1)
    graphed(6)
    assert graphed.fell_back is None
    assert any((value != weights(eager)[name]).any() for name, value in weights(graphed.update).items())


def test_a_replay_repeats_as_often_as_it_says():
    calls = []
    assert repeat(lambda: calls.append(1) or len(calls), 7)() == 7


def test_a_non_finite_loss_within_a_replay_is_found_with_its_step():
    update, draw = make_update(), make_draw()
    drawn = []

    def sometimes_bad():
        batch = draw()
        drawn.append(1)
        if len(drawn) == 3:
            batch["next", "reward"] = torch.full_like(batch["next", "reward"], float("nan"))
        return batch

    graphed = GraphedUpdate(update, sometimes_bad, updates_per_replay=5, self_check=False)
    graphed._replays = {5: repeat(graphed._once, 5), 1: graphed._once}
    graphed(5)
    with pytest.raises(NonFiniteLossError, match="loss_qvalue became NaN or infinite at gradient step 3"):
        update.check_finite()


@pytest.mark.parametrize("count", [0, -1])
def test_counts_that_make_no_sense_are_refused(count):
    with pytest.raises(ValueError, match="must be positive"):
        GraphedUpdate(make_update(), make_draw(), updates_per_replay=count)
    with pytest.raises(ValueError, match="must be positive"):
        GraphedUpdate(make_update(), make_draw())(count)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_graph_trains_as_single_calls_do(name, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    eager, losses = train_eagerly(20, device, name)
    update = make_update(device, name)
    draw = make_draw(device, next_action=update.learner.next_action, returns=update.learner.returns)
    graphed = GraphedUpdate(update, draw, updates_per_replay=3)  # an odd number: periods go on inside a graph
    torch.manual_seed(1)
    out, batch = graphed(20)
    assert graphed.fell_back is None
    assert (("next", "action") in batch.keys(True)) == (name == "rebrac")
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(out.to_dict(), losses[-1].to_dict(), **tolerance)
    torch.testing.assert_close(weights(update), weights(eager), **tolerance)


def as_a_graph(once, count):
    """A capture that keeps, as a CUDA graph does, the numbers of the optimiser's settings that it saw."""
    groups = once.__self__.update.optimizer.param_groups
    recorded = [group["lr"] for group in groups]

    def replay():
        now = [group["lr"] for group in groups]
        for group, rate in zip(groups, recorded, strict=True):
            group["lr"] = rate
        try:
            return repeat(once, count)()
        finally:
            for group, rate in zip(groups, now, strict=True):
                group["lr"] = rate

    return replay


def train_with_another_rate(device, *, graphed, as_tensor):
    """Eight updates, whose learning rate becomes another after four."""
    update = make_update(device)
    if as_tensor:
        for group in update.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    draw = make_draw(device)
    several = GraphedUpdate(update, draw, updates_per_replay=2, **graphed) if graphed is not None else None
    torch.manual_seed(1)
    for rate in (3e-4, 3e-2):
        for group in update.optimizer.param_groups:
            group["lr"].fill_(rate) if as_tensor else group.update(lr=rate)
        if several is not None:
            several(4)
            assert several.fell_back is None
        else:
            for _ in range(4):
                update(draw())
    return weights(update)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_learning_rate_that_is_changed_in_mid_training_acts(as_tensor):
    eager = train_with_another_rate("cpu", graphed=None, as_tensor=as_tensor)
    graphed = train_with_another_rate("cpu", graphed={"capture": as_a_graph}, as_tensor=as_tensor)
    torch.testing.assert_close(graphed, eager, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_learning_rate_that_is_changed_after_a_graph_was_captured_acts(as_tensor):
    eager = train_with_another_rate("cuda", graphed=None, as_tensor=as_tensor)
    graphed = train_with_another_rate("cuda", graphed={}, as_tensor=as_tensor)
    torch.testing.assert_close(graphed, eager, rtol=1e-3, atol=1e-4)
