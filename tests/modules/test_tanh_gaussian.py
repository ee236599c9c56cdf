import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from deflow_torchrl.modules import TanhGaussianPolicy, make_tanh_gaussian_network
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM


def make_policy(**options):
    return TanhGaussianPolicy(make_tanh_gaussian_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN), **options).double()


def states(*shape):
    return TensorDict(observation=torch.randn(*shape, OBSERVATION_DIM).double(), batch_size=shape)


def test_samples_and_log_densities_are_those_of_torchs_own_distribution():
    torch.manual_seed(0)
    policy, observation = make_policy(), torch.randn(5, 7, OBSERVATION_DIM).double()
    noise = torch.randn(5, 7, ACTION_DIM).double()
    action, log_prob = policy.module.sample_and_log_prob(observation, noise)
    mean, log_std = policy.module.network(observation).chunk(2, -1)
    std = log_std.clamp(-5, 2).exp()
    reference = TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1))
    torch.testing.assert_close(action, (mean + std * noise).tanh())
    torch.testing.assert_close(log_prob, reference.log_prob(action).sum(-1), rtol=1e-7, atol=1e-8)


def test_the_density_is_finite_where_tanh_rounds_to_one_and_is_differentiable():
    class Far(nn.Module):
        def forward(self, x):
            return torch.cat([x * 0 + 40.0, x * 0 - 1.0], -1)

    policy = TanhGaussianPolicy(Far())
    observation = torch.zeros(2, 3, requires_grad=True)
    action, log_prob = policy.module.sample_and_log_prob(observation, torch.ones(2, 3))
    assert (action == 1).all()
    # log(1 - tanh^2 u) = log 4 - 2 u for a large u
    u = 40 + math.exp(-1)
    expected = 3 * (-0.5 + 1 - math.log(2 * math.pi) / 2 - (math.log(4) - 2 * u))
    torch.testing.assert_close(log_prob, torch.full((2,), expected))
    log_prob.sum().backward()
    assert observation.grad.isfinite().all()


@pytest.mark.parametrize(("output", "bounds", "expected"), [(-30.0, (-20.0, 2.0), -20.0), (9.0, (-5.0, 2.0), 2.0)])
def test_the_log_deviation_is_clipped(output, bounds, expected):
    class Same(nn.Module):
        def forward(self, x):
            return torch.full((*x.shape[:-1], 2), output)

    policy = TanhGaussianPolicy(Same(), log_std_min=bounds[0], log_std_max=bounds[1])
    assert policy.module.mean_and_log_std(torch.zeros(1, 3))[1].item() == expected


def test_two_learned_numbers_scale_and_shift_the_log_deviation_also_of_the_exploring_form():
    policy = make_policy(log_std_affine=(0.5, -1.0))
    assert {"module.log_std_scale", "module.log_std_offset"} <= dict(policy.named_parameters()).keys()
    x = policy.module.network(torch.ones(1, OBSERVATION_DIM).double()).chunk(2, -1)[1]
    with torch.no_grad():
        policy.module.log_std_scale.fill_(0.25)
    for form in (policy, policy.exploring()):
        log_std = form.module.mean_and_log_std(torch.ones(1, OBSERVATION_DIM).double())[1]
        torch.testing.assert_close(log_std, 0.25 * x - 1.0)
    policy.module.sample_and_log_prob(torch.ones(1, OBSERVATION_DIM).double(), torch.ones(1, ACTION_DIM))[
        1
    ].sum().backward()
    assert policy.module.log_std_scale.grad.abs() > 0
    assert policy.module.log_std_offset.grad.abs() > 0
    assert {"module.log_std_scale"}.isdisjoint(dict(make_policy().named_parameters()))


def test_it_acts_by_the_mean_and_explores_by_samples_inside_the_bounds():
    torch.manual_seed(0)
    policy, batch = make_policy(low=torch.tensor([-1.0, 0.0, -2.0]), high=torch.tensor([1.0, 4.0, 2.0])), states(6)
    mean = policy.module.network(batch["observation"]).chunk(2, -1)[0].tanh()
    action = policy(batch.clone())["action"]
    torch.testing.assert_close(action, torch.stack([mean[:, 0], 2 + 2 * mean[:, 1], 2 * mean[:, 2]], -1))
    explorer = policy.exploring()
    noise = torch.randn(6, ACTION_DIM).double()
    sampled = explorer(batch.clone().set("noise", noise))["action"]
    torch.testing.assert_close(sampled, policy.module.sample_and_log_prob(batch["observation"], noise)[0])
    drawn = [explorer(batch.clone())["action"] for _ in range(2)]
    assert not torch.equal(*drawn)


def test_an_edit_policy_reads_observation_and_base_action_as_one_tensor():
    network = make_tanh_gaussian_network(OBSERVATION_DIM + ACTION_DIM, ACTION_DIM, HIDDEN)
    policy = TanhGaussianPolicy(network, in_keys=("observation", "base_action"), out_keys=("edit",))
    batch = TensorDict(
        observation=torch.randn(4, OBSERVATION_DIM), base_action=torch.rand(4, ACTION_DIM), batch_size=[4]
    )
    both = torch.cat([batch["observation"], batch["base_action"]], -1)
    torch.testing.assert_close(policy(batch)["edit"], network(both)[:, :ACTION_DIM].tanh())


@pytest.mark.parametrize("gain", [0.1, 1.0])
def test_each_head_is_initialised_by_its_own_number_of_outputs(gain):
    torch.manual_seed(0)
    last = make_tanh_gaussian_network(7, 5, (64, 512), head_gain=gain)[-1]
    bound = gain * math.sqrt(6 / (512 + 5))
    assert last.weight.abs().max() <= bound
    assert last.weight.abs().max() > 0.99 * bound
    assert (last.bias == 0).all()


def test_wrong_settings_are_refused():
    network = make_tanh_gaussian_network(3, 2, (8,))
    with pytest.raises(ValueError, match="log_std_min must be less than log_std_max"):
        TanhGaussianPolicy(network, log_std_min=2.0, log_std_max=-5.0)
    with pytest.raises(ValueError, match="in_keys"):
        TanhGaussianPolicy(network, explore=True, in_keys=("observation",))
    with pytest.raises(ValueError, match="strictly less"):
        TanhGaussianPolicy(network, low=1.0, high=1.0)
