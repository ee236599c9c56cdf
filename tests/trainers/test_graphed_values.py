"""Several updates a call of BC, IQL, IFQL and ReBRAC, on batches that a data set draws with their next actions."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.trainers import UpdateStep
from deflow_torchrl.trainers.graphed import GraphedUpdate
from tests.conftest import ACTION_DIM, NEEDED, OBSERVATION_DIM
from tests.trainers.test_update import PROBLEM


def make(name, device):
    rng = np.random.default_rng(0)
    dataset = TransitionDataset.from_arrays(
        observations=rng.standard_normal((60, OBSERVATION_DIM)).astype(np.float32),
        actions=rng.uniform(-1, 1, (60, ACTION_DIM)).astype(np.float32),
        rewards=rng.standard_normal(60).astype(np.float32),
        terminals=np.arange(60) % 20 == 19,
    ).to(device)
    torch.manual_seed(0)
    algorithm = get_algorithm(name)
    learner = algorithm.build(
        algorithm.config(**NEEDED.get(name, {})), dataclasses.replace(PROBLEM, device=torch.device(device))
    )
    return UpdateStep(learner), functools.partial(dataset.draw, 16, next_action=learner.next_action)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["bc", "iql", "ifql", "rebrac"])
def test_ten_updates_in_calls_of_several_are_those_of_single_calls(name, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    eager, draw = make(name, device)
    torch.manual_seed(1)
    losses = [eager(draw()) for _ in range(10)]
    update, draw = make(name, device)
    graphed = GraphedUpdate(update, draw, updates_per_replay=3)  # an odd number: periods go on inside a graph
    torch.manual_seed(1)
    out, batch = graphed(10)
    assert graphed.fell_back is None
    assert (("next", "action") in batch.keys(True)) == (name == "rebrac")
    tolerance = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(out.to_dict(), losses[-1].to_dict(), **tolerance)
    states = [it.state_dict()["loss"] for it in (update, eager)]
    torch.testing.assert_close(*map(dict, states), **tolerance)
