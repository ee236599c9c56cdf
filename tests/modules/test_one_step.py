"""The one-step policy alone."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from deflow_torchrl.modules import OneStepPolicy
from tests.support.networks import ACTION_DIM, OBSERVATION_DIM, make_one_step


class Sum(nn.Module):
    """The noise (the last two of five inputs) plus the sum of the observation."""

    def forward(self, inputs):
        return inputs[..., 3:] + inputs[..., :3].sum(-1, keepdim=True)


def test_the_network_is_called_once_with_observation_and_noise_and_the_action_is_clipped():
    policy = OneStepPolicy(Sum(), 2, low=-0.5, high=torch.tensor([1.0, 2.0]))
    td = TensorDict(observation=torch.tensor([[0.5, 0.5, 0.5]]), noise=torch.tensor([[-2.5, 1.0]]), batch_size=[1])
    torch.testing.assert_close(policy(td)["action"], torch.tensor([[-0.5, 2.0]]))
    output = policy.module(td["observation"], td["noise"], clamp=False)
    torch.testing.assert_close(output, torch.tensor([[-1.0, 2.5]]))


@pytest.mark.parametrize("exploration", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_absent_noise_is_drawn_under_every_exploration_mode(exploration):
    policy = make_one_step()
    td = TensorDict(observation=torch.zeros(5, OBSERVATION_DIM), batch_size=[5])
    with set_exploration_type(exploration):
        torch.manual_seed(3)
        first, second = (policy(td.clone())["action"] for _ in range(2))
        torch.manual_seed(3)
        given = policy(td.clone().set("noise", torch.randn(5, ACTION_DIM)))["action"]
    assert not torch.equal(first, second)
    torch.testing.assert_close(given, first, rtol=0, atol=0)


def test_keys_may_be_renamed_and_the_noise_key_left_out():
    policy = OneStepPolicy(Sum(), 2, in_keys=[("sensors", "s")], out_keys=[("agent", "act")])
    td = policy(TensorDict(sensors=TensorDict(s=torch.zeros(4, 3), batch_size=[4]), batch_size=[4]))
    assert td["agent", "act"].shape == (4, 2)
    assert policy.noise_key is None
    assert policy.observation_key == ("sensors", "s")


@pytest.mark.parametrize(
    "settings", [{"action_dim": 0}, {"low": 1.0, "high": 1.0}, {"in_keys": ()}, {"out_keys": ("action", "more")}]
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        OneStepPolicy(Sum(), **{"action_dim": 2, **settings})


def test_it_pickles_and_its_bounds_are_saved_with_it():
    policy = make_one_step()
    td = TensorDict(observation=torch.randn(5, OBSERVATION_DIM), noise=torch.randn(5, ACTION_DIM), batch_size=[5])
    copied = pickle.loads(pickle.dumps(policy))
    torch.testing.assert_close(copied(td.clone())["action"], policy(td)["action"], rtol=0, atol=0)
    assert {"module.low", "module.high"} <= policy.state_dict().keys()
