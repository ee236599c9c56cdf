"""Updates of DeFlow on small networks."""

import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from deflow_torchrl.algorithms import DeFlowConfig, ProblemSpec, get_algorithm
from deflow_torchrl.trainers import UpdateStep
from tests.support.networks import ACTION_DIM, OBSERVATION_DIM, make_batch

PROBLEM = ProblemSpec(
    observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM, hidden_dims=(16, 16), gamma=0.9, q_aggregation="min",
    target_divergence=0.01, device=torch.device("cpu"), reward_range=(-1.0, 1.0),
)  # fmt: skip


def make_update(*, precision="highest", **settings):
    torch.manual_seed(0)
    return UpdateStep(get_algorithm("deflow").build(DeFlowConfig(**settings), PROBLEM), precision=precision)


def rows_of_training(steps, *, prepare=lambda update: None, **settings):
    """A row every ten steps, as the trainer writes them, of a real training on random data; and max|r|."""
    update = make_update(**settings)
    prepare(update)
    data = make_batch(512, noise=False)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(512), batch_size=64)
    buffer.extend(data)
    rows = []
    for step in range(1, steps + 1):
        batch = buffer.sample()
        values = dict(update(batch).items())
        if step % 10 == 0:
            values |= update.learner.diagnostics(batch)
            rows.append({"step": step, "phase": "offline", **{f"train/{k}": float(v) for k, v in values.items()}})
    return rows, float(data["next", "reward"].abs().max())
