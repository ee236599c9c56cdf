"""RLPD's losses against its equations, written out with plain tensors in double precision."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import ValueEstimators

from deflow_torchrl.modules import TanhGaussianPolicy, make_qvalue_networks, make_tanh_gaussian_network
from deflow_torchrl.objectives import RLPDLoss

BATCH, OBSERVATION, ACTION = 7, 3, 2
GAMMA, TAU, LR = 0.875, 0.1, 1e-2


def make_batch():
    noise = {"noise": torch.randn(BATCH, ACTION)}
    terminated = torch.rand(BATCH, 1) < 0.4
    following = TensorDict(
        observation=torch.randn(BATCH, OBSERVATION), reward=torch.randn(BATCH, 1), terminated=terminated, done=terminated,
        noise=torch.randn(BATCH, ACTION), batch_size=[BATCH],
    )  # fmt: skip
    return TensorDict(
        observation=torch.randn(BATCH, OBSERVATION), action=torch.rand(BATCH, ACTION) * 2 - 1, next=following, **noise,
        batch_size=[BATCH],
    ).apply(lambda entry: entry.double() if entry.is_floating_point() else entry)  # fmt: skip


def make_networks():
    torch.manual_seed(0)
    network = make_tanh_gaussian_network(OBSERVATION, ACTION, (8, 8)).double()
    with torch.no_grad():
        network[-1].weight.mul_(8.0)  # log standard deviations on both sides of both bounds
    return network, [critic.double() for critic in make_qvalue_networks(OBSERVATION, ACTION, (8, 8))]


def policy_by_hand(network, observation, noise):
    output = network(observation)
    mean, log_std = output[:, :ACTION], output[:, ACTION:].clamp(-5.0, 2.0)
    u = mean + log_std.exp() * noise
    log_prob = 0.0
    for d in range(ACTION):
        gaussian = -(noise[:, d] ** 2) / 2 - log_std[:, d] - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob + gaussian - 2 * (math.log(2) - u[:, d] - torch.log1p(torch.exp(-2 * u[:, d])))
    return torch.tanh(u), log_prob


def q_by_hand(critics, observation, action):
    return torch.stack([critic.module(observation, action).squeeze(-1) for critic in critics])


@pytest.mark.parametrize("backup_entropy", [False, True])
@pytest.mark.parametrize("aggregation", ["min", "mean"])
def test_three_updates_are_those_of_the_equations(aggregation, backup_entropy):
    network, critics = make_networks()
    own_network, own_critics = make_networks()
    targets = make_networks()[1]
    loss = RLPDLoss(
        TanhGaussianPolicy(network), critics, q_aggregation=aggregation, backup_entropy=backup_entropy, alpha_init=0.5
    ).double()
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    log_alpha = torch.tensor(math.log(0.5), dtype=torch.float64, requires_grad=True)
    parameters = [*own_network.parameters(), *(p for critic in own_critics for p in critic.parameters()), log_alpha]
    optimizer = torch.optim.Adam(parameters, lr=LR)
    own_optimizer = torch.optim.Adam(loss.parameters(), lr=LR)
    for _ in range(3):
        batch = make_batch()
        observation, following = batch["observation"], batch["next", "observation"]
        reward, terminated = batch["next", "reward"].squeeze(-1), batch["next", "terminated"].squeeze(-1).double()

        alpha = log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = policy_by_hand(own_network, following, batch["next", "noise"])
            both = q_by_hand(targets, following, next_action)
            value = both.min(0).values if aggregation == "min" else both.mean(0)
            value = value - alpha * next_log_prob if backup_entropy else value
            target = reward + GAMMA * (1 - terminated) * value
        loss_qvalue = ((q_by_hand(own_critics, observation, batch["action"]) - target) ** 2).mean()
        action, log_prob = policy_by_hand(own_network, observation, batch["noise"])
        climbed = make_networks()[1]
        for frozen, critic in zip(climbed, own_critics, strict=True):
            frozen.load_state_dict(critic.state_dict())
            frozen.requires_grad_(False)
        loss_actor = (alpha * log_prob - q_by_hand(climbed, observation, action).mean(0)).mean()
        loss_alpha = log_alpha.exp() * (-log_prob.detach() - (-ACTION / 2)).mean()

        out = loss(batch.clone())
        for name, value in {"loss_qvalue": loss_qvalue, "loss_actor": loss_actor, "loss_alpha": loss_alpha}.items():
            assert out[name].item() == pytest.approx(value.item(), rel=1e-10), name
            method = getattr(loss, f"{name.removeprefix('loss_')}_loss")
            assert method(batch.clone())[0].item() == pytest.approx(value.item(), rel=1e-10), name
        optimizer.zero_grad()
        (loss_qvalue + loss_actor + loss_alpha).backward()
        own_optimizer.zero_grad()
        sum(out[name] for name in ("loss_qvalue", "loss_actor", "loss_alpha")).backward()
        optimizer.step()
        own_optimizer.step()
        with torch.no_grad():
            for target, critic in zip(targets, own_critics, strict=True):
                for moved, source in zip(target.parameters(), critic.parameters(), strict=True):
                    moved.lerp_(source, TAU)
            for moved, source in zip(
                loss.target_qvalue_network_params.values(True, True),
                loss.qvalue_network_params.values(True, True),
                strict=True,
            ):
                moved.lerp_(source, TAU)
    assert loss.log_alpha.item() == pytest.approx(log_alpha.item(), rel=1e-9)
    for own, ours in zip(own_network.parameters(), loss.actor_network_params.parameters(), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-8, atol=1e-10)


def test_alpha_rises_iff_the_entropy_is_below_its_target():
    network, critics = make_networks()
    for target, sign in ((-50.0, 1), (50.0, -1)):
        loss = RLPDLoss(TanhGaussianPolicy(network), critics, target_entropy=target).double()
        loss.alpha_loss(make_batch())[0].backward()
        assert loss.log_alpha.grad.sign().item() == sign


def test_draws_are_made_for_the_next_action_first():
    network, critics = make_networks()
    loss = RLPDLoss(TanhGaussianPolicy(network), critics).double()
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    batch = make_batch().exclude("noise", ("next", "noise"))
    torch.manual_seed(5)
    drawn = loss(batch.clone())
    torch.manual_seed(5)
    given = batch.clone()
    given["next", "noise"] = torch.randn_like(batch["action"])
    given["noise"] = torch.randn_like(batch["action"])
    torch.testing.assert_close(loss(given).to_dict(), drawn.to_dict())


def test_another_policy_is_refused():
    from deflow_torchrl.modules import GaussianPolicy, make_policy_network

    with pytest.raises(TypeError, match="TanhGaussianPolicy"):
        RLPDLoss(GaussianPolicy(make_policy_network(OBSERVATION, ACTION, (8,))), make_networks()[1])
