"""The policies of BC, IQL, IFQL and ReBRAC: what they act with, and with which noise."""

import copy
import math

import pytest
import torch
from tensordict import TensorDict

from deflow_torchrl.modules import (
    BestOfNPolicy,
    DeterministicPolicy,
    FlowMatchingPolicy,
    GaussianPolicy,
    kernels,
    make_policy_network,
    make_value_network,
    make_velocity_network,
)
from deflow_torchrl.objectives import IFQLLoss
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, make_critics
from tests.support.value_losses import SIZES, let_return


def states(rows=6, **entries):
    return TensorDict(observation=torch.randn(rows, OBSERVATION_DIM), **entries, batch_size=[rows])


def test_the_policy_network_is_the_papers_with_a_last_layer_a_tenth_as_large():
    network = make_policy_network(8, 4, (64, 64))
    assert [type(layer).__name__ for layer in network] == [
        "_XavierLinear",
        "GELU",
        "_XavierLinear",
        "GELU",
        "_XavierLinear",
    ]
    bounds = [math.sqrt(6 / (8 + 64)), math.sqrt(6 / (64 + 64)), 0.1 * math.sqrt(6 / (64 + 4))]
    for layer, bound in zip(network[::2], bounds, strict=True):
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    network[4].reset_parameters()
    assert 0.95 * bounds[2] < network[4].weight.abs().max() <= bounds[2], "a reset keeps the scale"
    with kernels.use_kernels(True):
        assert network.kernel_parameters(torch.zeros(1, 8)) is not None


def test_the_value_network_is_the_critics_without_an_action():
    value = make_value_network(OBSERVATION_DIM, HIDDEN)
    norms = [layer for layer in value.module if isinstance(layer, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * len(HIDDEN)
    assert value(states())["state_value"].shape == (6, 1)


@torch.no_grad()
def test_a_gaussian_acts_by_its_mean_or_explores_by_unit_samples_both_clipped():
    policy = GaussianPolicy(make_policy_network(*SIZES))
    let_return(policy, 0.5, 3.0, -0.25)
    mean = torch.tensor([0.5, 1.0, -0.25]).expand(6, -1)
    torch.testing.assert_close(policy(states(noise=torch.ones(6, ACTION_DIM)))["action"], mean)
    exploring = policy.exploring()
    out = exploring(states(noise=torch.full((6, ACTION_DIM), -2.5)))["action"]
    torch.testing.assert_close(out, torch.tensor([-1.0, 0.5, -1.0]).expand(6, -1))
    let_return(policy, 0.0, 0.0, 0.0)
    drawn = exploring(states(20_000))["action"]
    # Of N(0, 1) clipped to +-1 the bounds have 2 * 0.1587 of the mass.
    assert abs((drawn.abs() == 1).float().mean() - 0.3173) < 0.01


@torch.no_grad()
def test_a_deterministic_policy_is_tanh_and_explores_with_clipped_noise():
    policy = DeterministicPolicy(make_policy_network(*SIZES))
    let_return(policy, 0.3, -2.0, 0.0)
    action = torch.tensor([0.3, -2.0, 0.0]).tanh()
    torch.testing.assert_close(policy(states())["action"], action.expand(6, -1))
    exploring = policy.exploring()
    noise = torch.tensor([1.0, -1.0, 9.0]).expand(6, -1)
    expected = torch.tensor([action[0] + 0.2, -1.0, 0.5])
    torch.testing.assert_close(exploring(states(noise=noise))["action"], expected.expand(6, -1))
    drawn = exploring(states(20_000))["action"][:, 2]
    assert drawn.abs().max() == 0.5
    assert drawn.std().item() == pytest.approx(0.197, abs=0.004)  # 0.2, less the tails beyond 2.5 standard deviations
    wide = DeterministicPolicy(make_policy_network(*SIZES), low=torch.tensor([-2.0, 0.0, 1.0]), high=4.0)
    let_return(wide, 50.0, -50.0, 0.0)
    torch.testing.assert_close(wide(states(1))["action"], torch.tensor([[4.0, 0.0, 2.5]]))


def test_policies_check_their_settings():
    for make in (
        lambda: GaussianPolicy(make_policy_network(*SIZES), in_keys=("observation", "noise")),
        lambda: GaussianPolicy(make_policy_network(*SIZES), low=1.0),
        lambda: DeterministicPolicy(make_policy_network(*SIZES), noise_scale=-0.1),
        lambda: DeterministicPolicy(make_policy_network(*SIZES), noise_scale=0.1, in_keys=("observation",)),
        lambda: best_of(0),
    ):
        with pytest.raises(ValueError, match=r"in_keys|less than|negative|positive"):
            make()


def best_of(number=5, **options):
    flow = FlowMatchingPolicy(make_velocity_network(*SIZES), ACTION_DIM, 3)
    loss = IFQLLoss(flow, make_critics(), make_value_network(OBSERVATION_DIM, HIDDEN))
    return BestOfNPolicy(flow, loss.qvalue_network, loss.qvalue_network_params, number, **options)


@torch.no_grad()
@pytest.mark.parametrize("use", [True, False])
def test_best_of_n_takes_the_candidate_whose_smaller_critic_is_largest(use):
    flow = FlowMatchingPolicy(make_velocity_network(*SIZES), ACTION_DIM, 3)
    critics = make_critics()
    loss = IFQLLoss(flow, critics, make_value_network(OBSERVATION_DIM, HIDDEN))
    policy = BestOfNPolicy(flow, loss.qvalue_network, loss.qvalue_network_params, 5)
    batch = states(7, noise=torch.randn(7, 5, ACTION_DIM))
    with kernels.use_kernels(use):
        chosen = policy(batch.clone())["action"]
    places = set()
    for row in range(7):
        observation = batch["observation"][row].expand(5, -1)
        actions = flow.module(observation, batch["noise"][row])
        values = torch.stack([critic.module(observation, actions).squeeze(-1) for critic in critics])
        best = values.min(0).values.argmax()
        places.add(int(best))
        torch.testing.assert_close(chosen[row], actions[best])
    assert len(places) > 1
    torch.testing.assert_close(policy(batch[:1])["action"][0], policy(batch[0])["action"])


@torch.no_grad()
def test_best_of_n_follows_the_losses_critics_and_a_copy_does_not():
    flow = FlowMatchingPolicy(make_velocity_network(*SIZES), ACTION_DIM, 3)
    loss = IFQLLoss(flow, make_critics(), make_value_network(OBSERVATION_DIM, HIDDEN))
    policy = BestOfNPolicy(flow, loss.qvalue_network, loss.qvalue_network_params, 16)
    assert {id(p) for p in policy.parameters()} <= {id(p) for p in loss.parameters()}
    copied = copy.deepcopy(policy)
    batch = states(32, noise=torch.randn(32, 16, ACTION_DIM))
    before = policy(batch.clone())["action"]
    torch.testing.assert_close(copied(batch.clone())["action"], before)
    for parameter in loss.qvalue_network_params.values(True, True):
        parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(policy(batch.clone())["action"], before)
    torch.testing.assert_close(copied(batch.clone())["action"], before)


@torch.no_grad()
def test_best_of_n_draws_its_noise_where_it_is_not_given_and_refuses_another_shape():
    policy, batch = best_of(), states(4)
    assert policy.noise_shape == (5, ACTION_DIM)
    torch.manual_seed(1)
    drawn = policy(batch.clone())["action"]
    torch.manual_seed(1)
    given = policy(batch.clone().set("noise", torch.randn(4, 5, ACTION_DIM)))["action"]
    torch.testing.assert_close(drawn, given)
    with pytest.raises(ValueError, match="one row for each candidate"):
        policy(batch.clone().set("noise", torch.randn(4, ACTION_DIM)))
    alone = best_of(in_keys=("observation",))
    assert alone(batch.clone().set("noise", torch.randn(4, ACTION_DIM)))["action"].shape == (4, ACTION_DIM)
