"""The flow critic by itself: embedding, integration, ranges, keys."""

import math
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from deflow_torchrl.modules import FlowCritic, FlowCriticEnsemble, make_flow_critic_network, make_qvalue_networks
from tests.support.flow_critics import embed, make_flow_critics
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM


def make_critic(**options):
    options = {"reward_range": (-1.0, 0.0), "gamma": 0.99, **options}
    network = make_flow_critic_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN, time_features=options.get("time_features"))
    return FlowCritic(network, **options)


def test_ranges_are_those_of_rewards_in_returns():
    model = make_critic(noise_coverage=0.1).module
    assert model.start == pytest.approx((-10.0, 0.0))
    assert model.support == pytest.approx((-101.0, 1.0))
    u = torch.tensor([[0.0], [0.25]])
    torch.testing.assert_close(model.starts(u), torch.tensor([[-10.0], [-7.5]]))


@pytest.mark.parametrize("z", [-101.0, -60.0, -50.0, -3.3, 0.0, 1.0, 20.0, -200.0])
def test_the_embedding_is_hl_gauss_and_sums_to_one(z):
    z = torch.tensor([z], dtype=torch.float64)
    expected = embed(z[0], low=-1.0, high=0.0, gamma=0.99)
    found = make_critic().module.embed(z)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("z", [-250.0, -460.0, 160.0, 350.0])
def test_in_single_precision_the_embedding_has_the_digits_of_double_precision_far_outside(z):
    model = make_critic().module
    single = model.embed(torch.tensor([z]))
    torch.testing.assert_close(single.double(), model.embed(torch.tensor([z]).double()), rtol=2e-3, atol=1e-5)
    low, high = model.support
    width = (high - low) / 50
    assert max(low - z, z - high) > 70 * width, "where the differences of erf have lost their digits"


@pytest.mark.parametrize("z", [-1e4, -1e9, 1e6, 3e38, -3e38])
def test_the_embedding_is_finite_everywhere_and_stands_still_beyond_181_widths(z):
    model = make_critic().module
    far = model.embed(torch.tensor([z]))
    assert far.isfinite().all()
    assert far.sum().item() == pytest.approx(1.0, abs=1e-5)
    low, high = model.support
    edge = 8 * math.sqrt(2) * 16 * (high - low) / 50
    torch.testing.assert_close(
        far, model.embed(torch.tensor([low - edge if z < 0 else high + edge])), rtol=1e-3, atol=1e-6
    )


def test_the_network_reads_state_action_embedding_and_the_cosine_of_the_time():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.full((*x.shape[:-1], 1), 2.0)

    critic = FlowCritic(Spy(), reward_range=(-1.0, 0.0), gamma=0.9, num_steps=4)
    s, a, z, t = torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 1), torch.rand(5, 1)
    assert critic.module.velocity(s, a, z, t).shape == (5, 1)
    torch.testing.assert_close(seen[0], torch.cat([s, a, critic.module.embed(z), t.cos()], -1))
    seen.clear()
    u = torch.rand(5, 1)
    torch.testing.assert_close(critic.module(s, a, u), critic.module.starts(u) + 2.0)  # M steps of 2 / M
    times = [x[0, -1].item() for x in seen]
    assert times == pytest.approx([math.cos(step / 4) for step in range(4)])


def test_the_option_as_named_embeds_the_time_in_cosines():
    model = make_critic(time_features=3).module
    t = torch.tensor([[0.3]])
    expected = torch.tensor([[math.cos(k * math.pi * 0.3) for k in (1, 2, 3)]])
    torch.testing.assert_close(model.embed_time(t), expected)
    observation, action = torch.zeros(1, OBSERVATION_DIM), torch.zeros(1, ACTION_DIM)
    assert model(observation, action, torch.rand(1, 1)).shape == (1, 1)


def test_it_is_a_tensordict_module_that_draws_its_start_where_none_is_given():
    torch.manual_seed(0)
    critic = make_critic(num_steps=2)
    batch = TensorDict(observation=torch.randn(4, OBSERVATION_DIM), action=torch.randn(4, ACTION_DIM), batch_size=[4])
    drawn = [critic(batch.clone())["state_action_return"] for _ in range(2)]
    assert not torch.equal(*drawn)
    u = torch.rand(4, 1)
    given = critic(batch.clone().set("critic_noise", u))["state_action_return"]
    torch.testing.assert_close(given, critic.module(batch["observation"], batch["action"], u))
    again = pickle.loads(pickle.dumps(critic))
    torch.testing.assert_close(again(batch.clone().set("critic_noise", u))["state_action_return"], given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_range": (1.0, 0.0)}, "reward_range"),
        ({"reward_range": (0.0, float("inf"))}, "reward_range"),
        ({"gamma": 1.0}, "gamma"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_bins": 1}, "num_bins"),
        ({"sigma": 0.0}, "sigma"),
        ({"in_keys": ("observation", "action")}, "in_keys"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlowCritic(nn.Linear(1, 1), **{"reward_range": (-1.0, 0.0), "gamma": 0.9, **options})


def test_an_ensemble_needs_flow_critics_of_one_kind():
    distilled = make_qvalue_networks(OBSERVATION_DIM, ACTION_DIM, HIDDEN)
    for critics, samples in (([], 2), (make_flow_critics(1), 0)):
        with pytest.raises(ValueError, match="positive number of noise samples"):
            FlowCriticEnsemble(critics, distilled, noise_samples=samples)
    with pytest.raises(ValueError, match="same settings"):
        FlowCriticEnsemble([*make_flow_critics(1), *make_flow_critics(1, num_steps=9)], distilled)
    with pytest.raises(TypeError, match="FlowCritic modules"):
        FlowCriticEnsemble(distilled, distilled)
