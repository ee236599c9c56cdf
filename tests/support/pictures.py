"""Small problems whose observations are pictures, methods built for them, and batches."""

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from tests.support.networks import NEEDED

SHAPE, ACTION_DIM, HIDDEN = (11, 8, 3), 2, (16, 16)


def pictures(*lead, shape=SHAPE):
    return torch.randint(0, 256, (*lead, *shape), dtype=torch.uint8)


def picture_spec(shape=SHAPE):
    return Bounded(0, 255, shape, dtype=torch.uint8)


def make_problem(observation_spec=None, **kwargs):
    spec = Composite(observation=picture_spec()) if observation_spec is None else observation_spec
    return ProblemSpec(
        action_dim=ACTION_DIM, hidden_dims=HIDDEN, observation_spec=spec, encoder="impala_debug", gamma=0.9, **kwargs
    )


def make_learner(name, problem=None, **settings):
    algorithm = get_algorithm(name)
    problem = make_problem() if problem is None else problem
    return algorithm.build(algorithm.config(**{**NEEDED.get(name, {}), **settings}), problem)


def make_batch(*lead, spec=None, draws=True):
    """A batch with observations of ``spec``, pictures by default, and with every random draw where ``draws``."""
    entries = {"observation": picture_spec()} if spec is None else dict(spec.items(True, True))

    def state():
        out = TensorDict(batch_size=lead)
        for key, entry in entries.items():
            out[key] = (
                pictures(*lead, shape=entry.shape) if entry.dtype == torch.uint8 else torch.randn(*lead, *entry.shape)
            )
        return out

    batch, following = state(), state()
    terminated = torch.rand(*lead, 1) < 0.25
    following["action"], batch["action"] = (torch.rand(*lead, ACTION_DIM) * 2 - 1 for _ in range(2))
    following["reward"] = torch.randn(*lead, 1)
    following["terminated"] = following["done"] = terminated
    if draws:
        following["noise"] = torch.randn(*lead, ACTION_DIM)
        batch["noise"], batch["flow_noise"] = (torch.randn(*lead, ACTION_DIM) for _ in range(2))
        batch["flow_time"] = torch.rand(*lead, 1)
    batch["next"] = following
    return batch
