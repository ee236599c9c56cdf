"""FAN against its equations in plain torch, its walls and draws."""

import pytest
import torch
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import make_noisy_qvalue_networks, make_qvalue_networks
from deflow_torchrl.objectives import FANLoss
from tests.support import networks
from tests.support.flow_critics import doubled, mlp
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM
from tests.support.plain_flow import (
    apart,
    assert_updates_are_those_of,
    frozen,
    parts_reached,
    target,
    values,
    velocity,
)

GAMMA, ALPHA, CRITIC_ALPHA = 0.875, 10.0, 0.1


def build(**options):
    sizes = OBSERVATION_DIM, ACTION_DIM, HIDDEN
    loss = FANLoss(
        networks.make_flow(),
        networks.make_one_step(),
        make_noisy_qvalue_networks(*sizes),
        make_qvalue_networks(*sizes),
        **{"alpha": ALPHA, "critic_alpha": CRITIC_ALPHA, **options},
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    apart(loss.target_qvalue_network_params)
    return loss.double()


def make_batch(size=5):
    batch = networks.make_batch(size)
    for key in ("marginal_noise", "critic_noise"):
        batch[key] = torch.randn(size, ACTION_DIM)
    batch["anchor_time"], batch["next", "anchor_time"] = torch.rand(size, 1), torch.rand(size, 1)
    batch["valid"] = torch.tensor([[1.0], [0], [1], [1], [1]])
    return doubled(batch)


def anchor(loss, s, x, z, t):
    return (x - z - velocity(frozen(loss.flow_policy_params), s, (1 - t) * z + t * x, t.item())).square()


def plain_terms(loss, batch):
    rows = {"flow": [], "actor": [], "qvalue": [], "marginal": []}
    parts = {"q": [], "marginal_q": [], "anchor": []}
    aggregated = {"mean": torch.mean, "min": torch.min}[loss.q_aggregation]

    def mu(s, z):
        return mlp(loss.actor_network_params["module", "network"], torch.cat([s, z]), norm=False)

    for i in range(len(batch)):
        s, a, following = batch["observation"][i], batch["action"][i], batch["next", "observation"][i]
        valid, z2 = batch["valid"][i, 0], batch["next", "noise"][i]
        with torch.no_grad():
            action = mu(following, z2).clamp(-1, 1)
            penalty = anchor(loss, following, action, z2, batch["next", "anchor_time"][i]).sum()
            bootstrap = aggregated(values(loss.marginal_qvalue_network_params, following, action))
            y = target(batch, i, bootstrap - CRITIC_ALPHA * penalty, GAMMA)
            taught = values(loss.target_qvalue_network_params, s, a, batch["marginal_noise"][i]).mean()
        rows["qvalue"].append(valid * (values(loss.qvalue_network_params, s, a, z2) - y).square().mean())
        u = taught - values(loss.marginal_qvalue_network_params, s, a)
        rows["marginal"].append(sum((0.1 if it < 0 else 0.9) * it**2 for it in u) / len(u))
        z, t = batch["flow_noise"][i], batch["flow_time"][i].item()
        v = velocity(loss.flow_policy_params, s, (1 - t) * z + t * a, t)
        rows["flow"].append(valid * (v - (a - z)).square().mean())
        output = mu(s, batch["noise"][i])
        clipped = output.clamp(-1, 1)
        parts["anchor"].append(anchor(loss, s, output, batch["noise"][i], batch["anchor_time"][i]).mean())
        parts["q"].append(values(frozen(loss.qvalue_network_params), s, clipped, batch["critic_noise"][i]).mean())
        parts["marginal_q"].append(values(frozen(loss.marginal_qvalue_network_params), s, clipped).mean())
    parts = {name: torch.stack(found) for name, found in parts.items()}
    climbed = sum(
        parts[name].mean() / (parts[name].detach().abs().mean() if loss.normalize_q_loss else 1.0)
        for name in ("q", "marginal_q")
    )
    means = {f"loss_{name}": torch.stack(found).mean() for name, found in rows.items() if found}
    means["loss_actor"] = ALPHA * parts["anchor"].mean() - climbed
    return {**means, **{name: found.mean() for name, found in parts.items()}}


@pytest.mark.parametrize(("how", "normalize"), [("mean", False), ("min", True)])
def test_the_terms_are_those_of_the_equations_over_three_updates(how, normalize):
    torch.manual_seed(0)
    loss = build(marginal_aggregation=how, normalize_q_loss=normalize)
    assert_updates_are_those_of(plain_terms, loss, [make_batch() for _ in range(3)], targets=("qvalue_network",))


def test_each_terms_gradient_stays_with_its_part():
    torch.manual_seed(0)
    loss = build()
    SoftUpdate(loss, tau=0.005)
    owners = {
        "flow": "flow_policy",
        "actor": "actor_network",
        "qvalue": "qvalue_network",
        "marginal": "marginal_qvalue_network",
    }
    for name, owner in owners.items():
        assert parts_reached(loss, make_batch(), f"loss_{name}") == {owner}


def test_draws_that_are_not_given_come_in_order():
    loss = build()
    SoftUpdate(loss, tau=0.005)
    batch = doubled(networks.make_batch(5, noise=False))
    double = {"dtype": torch.float64}
    torch.manual_seed(5)
    drawn = loss(batch.clone())
    torch.manual_seed(5)
    given = batch.clone()
    given["next", "noise"], given["next", "anchor_time"] = (
        torch.randn(5, ACTION_DIM, **double),
        torch.rand(5, 1, **double),
    )
    given["marginal_noise"] = torch.randn(5, ACTION_DIM, **double)
    given["flow_noise"], given["flow_time"] = torch.randn(5, ACTION_DIM, **double), torch.rand(5, 1, **double)
    given["noise"], given["anchor_time"] = torch.randn(5, ACTION_DIM, **double), torch.rand(5, 1, **double)
    given["critic_noise"] = torch.randn(5, ACTION_DIM, **double)
    torch.testing.assert_close(loss(given), drawn)
