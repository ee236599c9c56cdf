"""Candidates of a policy, chosen by the values of target critics."""

import pytest
import torch
from tensordict import TensorDict

from deflow_torchrl.modules import (
    ConsistencyNetwork,
    ConsistencyPolicy,
    DiffusionPolicy,
    NoiseNetwork,
    ValueChosenPolicy,
    make_qvalue_networks,
    make_value_network,
)
from deflow_torchrl.objectives import ConsistencyACLoss, IDQLLoss

OBSERVATION, ACTION, NUMBER = 3, 2, 4


def make_idql():
    torch.manual_seed(0)
    policy = DiffusionPolicy(NoiseNetwork(OBSERVATION, ACTION, width=8, dropout=0.0), ACTION)
    loss = IDQLLoss(policy, make_qvalue_networks(OBSERVATION, ACTION, (8,)), make_value_network(OBSERVATION, (8,)))
    chosen = ValueChosenPolicy(
        policy, loss.qvalue_network, loss.target_qvalue_network_params, NUMBER,
        policy_params=loss.target_diffusion_policy_params,
    )  # fmt: skip
    return policy, loss, chosen


def make_input(chosen, rows=6):
    noise = torch.randn(rows, *chosen.noise_shape)
    return TensorDict(observation=torch.randn(rows, OBSERVATION), noise=noise, batch_size=[rows])


def test_the_action_is_the_averages_candidate_with_the_largest_minimum_of_the_targets():
    policy, loss, chosen = make_idql()
    with torch.no_grad():
        for params in (loss.target_diffusion_policy_params, loss.target_qvalue_network_params):
            for key, leaf in params.items(True, True):
                if key[-1] in ("weight", "bias"):
                    leaf.add_(0.1 * torch.randn_like(leaf))
    data = make_input(chosen)
    action = chosen(data.clone())["action"]
    with torch.no_grad(), loss.target_diffusion_policy_params.to_module(policy):
        for row in range(len(data)):
            observation = data["observation"][row].expand(NUMBER, -1)
            candidates = policy.module(observation, data["noise"][row])
            state = TensorDict(observation=observation, action=candidates, batch_size=[NUMBER])
            best = loss.critics.values(state, target=True).min(0).values.argmax()
            torch.testing.assert_close(action[row], candidates[best])
    assert not torch.equal(
        action, ValueChosenPolicy(policy, loss.qvalue_network, loss.qvalue_network_params, NUMBER)(data)["action"]
    )


def test_it_acts_with_the_parameters_of_now():
    _, loss, chosen = make_idql()
    data = make_input(chosen)
    before = chosen(data.clone())["action"].clone()
    with torch.no_grad():
        for leaf in loss.target_diffusion_policy_params.values(True, True):
            leaf.mul_(0.5)
    assert not torch.equal(before, chosen(data.clone())["action"])


def test_a_softmax_draws_by_the_values():
    torch.manual_seed(0)
    policy = ConsistencyPolicy(ConsistencyNetwork(OBSERVATION, ACTION, hidden_dims=(8,)), ACTION)
    loss = ConsistencyACLoss(policy, make_qvalue_networks(OBSERVATION, ACTION, (8,)), eta=0.1)
    chosen = ValueChosenPolicy(policy, loss.qvalue_network, loss.target_qvalue_network_params, 3, softmax=True)
    assert chosen.noise_shape == (3, 3, ACTION)
    rows = 20_000
    observation = torch.randn(1, OBSERVATION).expand(rows, -1)
    candidates = torch.randn(1, 3, 2, ACTION).expand(rows, -1, -1, -1)
    noise = torch.cat([candidates, torch.randn(rows, 3, 1, ACTION)], -2)
    with torch.no_grad():
        action = chosen(TensorDict(observation=observation, noise=noise, batch_size=[rows]))["action"]
        actions = policy.module(observation[:3], candidates[0])
        state = TensorDict(observation=observation[:3], action=actions, batch_size=[3])
        expected = loss.critics.values(state, target=True).min(0).values.softmax(0)
    counts = torch.stack([(action - one).abs().amax(1).lt(1e-6).float().mean() for one in actions])
    torch.testing.assert_close(counts, expected, atol=0.02, rtol=0)


def test_noise_is_drawn_where_it_is_not_read_and_refused_where_it_does_not_fit():
    policy, loss, chosen = make_idql()
    with pytest.raises(ValueError, match=r"noise of shape \[6, 4, 5, 2\]"):
        chosen(make_input(chosen).set("noise", torch.randn(6, ACTION)))
    free = ValueChosenPolicy(policy, loss.qvalue_network, loss.target_qvalue_network_params, NUMBER, reads_noise=False)
    assert free.in_keys == ["observation"]
    assert free(make_input(chosen).set("noise", torch.randn(6, ACTION)))["action"].shape == (6, ACTION)
    with pytest.raises(ValueError, match="positive"):
        ValueChosenPolicy(policy, loss.qvalue_network, loss.qvalue_network_params, 0)
