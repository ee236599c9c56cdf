"""Cal-QL's losses against its equations, written out sample by sample in double precision."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import ValueEstimators

from deflow_torchrl.modules import TanhGaussianPolicy, make_qvalue_networks, make_tanh_gaussian_network
from deflow_torchrl.objectives import CalQLLoss

BATCH, OBSERVATION, ACTION, SAMPLES = 5, 3, 2, 4
GAMMA, SCALE = 0.875, 2.0


def make_batch():
    terminated = torch.tensor([[True], [False], [False], [True], [False]])
    following = TensorDict(
        observation=torch.randn(BATCH, OBSERVATION), reward=torch.randn(BATCH, 1), terminated=terminated, done=terminated,
        noise=torch.randn(BATCH, SAMPLES, ACTION), cql_noise=torch.randn(BATCH, SAMPLES, ACTION), batch_size=[BATCH],
    )  # fmt: skip
    batch = TensorDict(
        observation=torch.randn(BATCH, OBSERVATION), action=torch.rand(BATCH, ACTION) * 2 - 1, next=following,
        mc_return=torch.randn(BATCH, 1) / 4, noise=torch.randn(BATCH, ACTION),
        cql_random_action=torch.rand(BATCH, SAMPLES, ACTION) * 2 - 1, cql_noise=torch.randn(BATCH, SAMPLES, ACTION),
        batch_size=[BATCH],
    )  # fmt: skip
    return batch.apply(lambda entry: entry.double() if entry.is_floating_point() else entry)


def make_networks():
    torch.manual_seed(0)
    network = make_tanh_gaussian_network(OBSERVATION, ACTION, (8, 8)).double()
    return network, [critic.double() for critic in make_qvalue_networks(OBSERVATION, ACTION, (8, 8))]


def make_loss(**options):
    network, critics = make_networks()
    policy = TanhGaussianPolicy(network, log_std_min=-20.0, log_std_affine=(1.0, -1.0)).double()
    loss = CalQLLoss(policy, critics, num_cql_samples=SAMPLES, reward_scale=SCALE, **options).double()
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    with torch.no_grad():  # targets that are not the critics
        for leaf in loss.target_qvalue_network_params.values(True, True):
            leaf.mul_(1.5)
    return loss


def sample(network, observation, noise):
    """One action and its log density."""
    output = network(observation)
    log_std = (output[ACTION:] - 1.0).clamp(-20.0, 2.0)
    u = output[:ACTION] + log_std.exp() * noise
    log_prob = sum(
        -(noise[d] ** 2) / 2 - log_std[d] - 0.5 * math.log(2 * math.pi) - torch.log(1 - torch.tanh(u[d]) ** 2)
        for d in range(ACTION)
    )
    return torch.tanh(u), log_prob


def by_hand(batch, *, target_gap=None, calibrated=True, cql_alpha=5.0):
    network, critics = make_networks()
    targets = make_networks()[1]
    with torch.no_grad():
        for critic in targets:
            for parameter in critic.parameters():
                parameter.mul_(1.5)

    def q(critic, observation, action):
        return critic.module(observation, action).squeeze()

    alpha, alpha_prime = 1.0, math.e
    losses = {"loss_actor": [], "loss_alpha": [], "loss_qvalue": [], "loss_alpha_prime": []}
    for i in range(BATCH):
        s, a, following = batch["observation"][i], batch["action"][i], batch["next", "observation"][i]
        action, log_prob = sample(network, s, batch["noise"][i])
        losses["loss_actor"].append(alpha * log_prob - min(q(critic, s, action) for critic in critics))
        losses["loss_alpha"].append(torch.zeros(()).double() * (log_prob - ACTION))
        continues = 1.0 - float(batch["next", "terminated"][i])
        best = max(
            min(q(target, following, sample(network, following, noise)[0]) for target in targets)
            for noise in batch["next", "noise"][i]
        )
        y = SCALE * batch["next", "reward"][i].squeeze() + GAMMA * continues * best
        per_critic, gaps = [], []
        bound = SCALE * batch["mc_return"][i].squeeze() if calibrated else torch.tensor(-math.inf).double()
        for critic in critics:
            terms = [q(critic, s, u) - ACTION * math.log(0.5) for u in batch["cql_random_action"][i]]
            for where, noises in ((following, batch["next", "cql_noise"][i]), (s, batch["cql_noise"][i])):
                for noise in noises:
                    other, density = sample(network, where, noise)
                    terms.append(torch.maximum(q(critic, s, other.detach()), bound) - density.detach())
            gap = torch.logsumexp(torch.stack(terms), 0) - q(critic, s, a)
            weight = cql_alpha if target_gap is None else 5 * alpha_prime
            per_critic.append((q(critic, s, a) - y.detach()) ** 2 + weight * (gap - (target_gap or 0.0)))
            gaps.append(gap.detach())
        losses["loss_qvalue"].append(sum(per_critic) / len(per_critic))
        if target_gap is not None:
            losses["loss_alpha_prime"].append(-5 * alpha_prime * (sum(gaps) / len(gaps) - target_gap))
    means = {name: torch.stack(values).mean() for name, values in losses.items() if values}
    (means["loss_actor"]).backward(retain_graph=True)
    policy_gradient = [parameter.grad.clone() for parameter in network.parameters()]
    for module in (*critics, network):
        module.zero_grad()
    means["loss_qvalue"].backward()
    return means, policy_gradient, [[parameter.grad for parameter in critic.parameters()] for critic in critics]


@pytest.mark.parametrize("target_gap", [None, 0.8])
@pytest.mark.parametrize("calibrated", [True, False])
def test_terms_and_gradients_are_those_of_the_equations(calibrated, target_gap):
    torch.manual_seed(3)
    batch = make_batch()
    loss = make_loss(target_gap=target_gap, calibrated=calibrated, **({} if target_gap else {"cql_alpha": 0.5}))
    expected, policy_gradient, critic_gradients = by_hand(
        batch, target_gap=target_gap, calibrated=calibrated, cql_alpha=0.5
    )
    out = loss(batch.clone())
    assert {name for name in loss.out_keys if name.startswith("loss_")} == set(expected)
    for name, value in expected.items():
        assert out[name].item() == pytest.approx(value.item(), rel=1e-10, abs=1e-12), name
        method = getattr(loss, f"{name.removeprefix('loss_')}_loss")
        assert method(batch.clone())[0].item() == pytest.approx(value.item(), rel=1e-10, abs=1e-12), name
    out["loss_actor"].backward()
    ours = [p.grad for name, p in loss.actor_network_params.named_parameters() if "log_std" not in name]
    torch.testing.assert_close(sorted(ours, key=torch.numel), sorted(policy_gradient, key=torch.numel))
    assert loss.qvalue_network_params.grad is None or not any(
        p.grad is not None for p in loss.qvalue_network_params.parameters()
    )
    loss.zero_grad()
    loss(batch.clone())["loss_qvalue"].backward()
    for leaf in loss.qvalue_network_params.parameters():
        matches = [g for g in zip(*critic_gradients, strict=True) if torch.stack(g).shape == leaf.shape]
        assert any(torch.allclose(leaf.grad, torch.stack(g)) for g in matches)
    assert all(p.grad is None for p in (loss.log_alpha, *loss.actor_network_params.parameters()))


def test_log_alpha_moves_towards_the_target_entropy():
    batch = make_batch()
    loss = make_loss()
    loss.alpha_loss(batch)[0].backward()
    entropy = loss.alpha_loss(batch)[1]["entropy"]
    assert loss.log_alpha.grad.item() == pytest.approx((entropy + ACTION).item(), rel=1e-10)


def test_the_gap_moves_alpha_prime_alone():
    batch = make_batch()
    loss = make_loss(target_gap=0.8)
    value, _ = loss.alpha_prime_loss(batch)
    value.backward()
    assert loss.log_alpha_prime.grad.item() == pytest.approx(value.item(), rel=1e-10)
    others = [p for name, p in loss.named_parameters() if name != "log_alpha_prime"]
    assert all(p.grad is None for p in others)


def test_without_a_target_there_is_no_multiplier():
    with pytest.raises(AttributeError, match="target_gap"):
        make_loss().alpha_prime_loss(make_batch())


def test_a_next_state_that_is_not_finite_behind_a_terminal_row_reaches_no_number():
    batch = make_batch()
    batch["next", "observation"][0] = float("nan")
    out = make_loss(target_gap=0.8)(batch)
    assert all(torch.isfinite(value).all() for value in out.values())


def test_draws_that_are_missing_are_made_in_the_documented_order():
    keys = ("noise", ("next", "noise"), "cql_random_action", "cql_noise", ("next", "cql_noise"))
    batch = make_batch()
    loss = make_loss()
    torch.manual_seed(7)
    drawn = loss(batch.exclude(*keys))
    torch.manual_seed(7)
    given = batch.exclude(*keys)
    shape = (BATCH, SAMPLES, ACTION)
    for key in keys:
        if key == "cql_random_action":
            given[key] = torch.rand(shape, dtype=torch.float64) * 2 - 1
        else:
            given[key] = torch.randn(shape if key != "noise" else (BATCH, ACTION), dtype=torch.float64)
    torch.testing.assert_close(loss(given).to_dict(), drawn.to_dict())
