"""Best of N over policies that are no flow, and repeated refinement."""

import pytest
import torch
from tensordict import TensorDict

from deflow_torchrl.modules import BestOfNPolicy, DeterministicPolicy, RefinedPolicy, make_policy_network
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, make_actor, make_loss, make_one_step


def states(*shape):
    return TensorDict(observation=torch.randn(*shape, OBSERVATION_DIM), batch_size=shape)


def best_of(policy, loss, number=5, **options):
    return BestOfNPolicy(policy, loss.qvalue_network, loss.qvalue_network_params, number, **options)


@pytest.mark.parametrize("how", ["min", "mean"])
@pytest.mark.parametrize("selection", ["final", "base"])
@torch.no_grad()
def test_of_a_deflow_actor_the_best_final_or_base_action_is_taken(selection, how):
    torch.manual_seed(0)
    loss, actor = make_loss(), make_actor()
    batch, noise = states(4), torch.randn(4, 5, ACTION_DIM)
    policy = best_of(actor, loss, selection=selection, q_aggregation=how)
    assert policy.noise_shape == (5, ACTION_DIM)
    chosen = policy(batch.clone().set("noise", noise))["action"]
    for row in range(4):
        acted = [actor(batch[row].clone().set("noise", one)) for one in noise[row]]

        def value(candidate):
            scored = candidate["action" if selection == "final" else "base_action"]
            values = loss.critics.values(TensorDict(observation=candidate["observation"], action=scored))
            return getattr(values, how)().item()

        torch.testing.assert_close(chosen[row], max(acted, key=value)["action"])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)], ids=str)
@torch.no_grad()
def test_batches_of_any_shape_are_acted_in_also_empty_ones(shape):
    for policy in (make_actor(), make_actor().flow_policy):
        key = "action" if "action" in policy.out_keys else policy.out_keys[-1]
        chosen = best_of(policy, make_loss(), out_keys=(key,))(states(*shape))[key]
        assert chosen.shape == (*shape, ACTION_DIM)


def test_any_policy_with_noise_has_candidates_and_draws_them_where_none_are_given():
    torch.manual_seed(0)
    loss, batch = make_loss(), states(3, 2)
    for policy in (make_actor(), make_one_step()):
        best = best_of(policy, loss, in_keys=("observation",))
        one, other = (best(batch.clone())["action"] for _ in range(2))
        assert one.shape == (3, 2, ACTION_DIM)
        assert not torch.equal(one, other)
    with pytest.raises(ValueError, match="noise of shape"):
        best_of(make_actor(), loss)(batch.clone().set("noise", torch.randn(3, 2, ACTION_DIM)))


def test_policies_without_candidates_are_refused():
    loss = make_loss()
    with pytest.raises(ValueError, match="reads no 'noise'"):
        best_of(DeterministicPolicy(make_policy_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN)), loss)
    with pytest.raises(ValueError, match="needs a policy with a base action"):
        best_of(make_one_step(), loss, selection="base")
    with pytest.raises(ValueError, match="selection must be"):
        best_of(make_actor(), loss, selection="worst")
    with pytest.raises(ValueError, match="q_aggregation"):
        best_of(make_actor(), loss, q_aggregation="max")


@torch.no_grad()
def test_refinement_is_repeated_on_its_own_result():
    torch.manual_seed(0)
    actor = make_actor()
    batch = states(4).set("noise", torch.randn(4, ACTION_DIM))
    plain, refined = actor(batch.clone()), RefinedPolicy(actor, iterations=3)(batch.clone())
    action = plain["base_action"]
    for _ in range(3):
        shift = actor.refinement_policy.module.refinement_network(torch.cat([batch["observation"], action], -1))
        action = (action + shift).clamp(-1, 1)
    torch.testing.assert_close(refined["action"], action)
    torch.testing.assert_close(refined["base_action"], plain["base_action"])
    once = RefinedPolicy(actor, iterations=1)(batch.clone())
    torch.testing.assert_close(once["action"], plain["action"])
    with pytest.raises(ValueError, match="iterations must be positive"):
        RefinedPolicy(actor, iterations=0)
    with pytest.raises(TypeError, match="DeFlowActor"):
        RefinedPolicy(make_one_step(), iterations=2)
