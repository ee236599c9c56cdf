import pytest
import torch

pytest.importorskip("gymnasium", reason="needs the extra ogbench")

from deflow_torchrl.trainers import OnlineExperience
from tests.conftest import make_actor

PENDULUM = "gym:Pendulum-v1"


class Log:
    """Keeps every transition, numbered as a buffer would."""

    def __init__(self):
        self.rows, self.discarded = [], []

    def add(self, transition):
        self.rows.append(transition.clone())
        return torch.tensor([len(self.rows) - 1])

    def discard(self, index):
        self.discarded += index.tolist()


def make(policy, log, **kwargs):
    return OnlineExperience(PENDULUM, policy, **{"seed": 3, "add": log.add, "discard": log.discard} | kwargs)


def act(experience, policy, steps, first=0):
    """Steps with a policy whose weights change before each."""
    for step in range(first, first + steps):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.0 + 1e-2 * ((step % 5) - 2))
        experience.step()


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("steps_per_collection", [1, 8])
@pytest.mark.parametrize("saved_at", [0, 17, 200, 203])
def test_a_restored_experience_goes_on_bit_for_bit(saved_at, steps_per_collection):
    policy, log = make_actor(3, 1), Log()
    experience = make(policy, log, steps_per_collection=steps_per_collection)
    act(experience, policy, 220)
    experience.close()
    policy, other = (torch.manual_seed(0), make_actor(3, 1))[1], Log()
    experience = make(policy, other, steps_per_collection=steps_per_collection)
    act(experience, policy, saved_at)
    state = experience.state_dict()
    experience.close()
    experience = make(policy, other, steps_per_collection=steps_per_collection)
    experience.load_state_dict(state)
    act(experience, policy, 220 - saved_at, first=saved_at)
    assert_same(log.rows, other.rows)
    assert experience.counters == {"episodes": 1, "faults": 0, "worker_restarts": 0, "env_steps": 220}
    experience.close()
