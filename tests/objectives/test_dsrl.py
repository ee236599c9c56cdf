"""DSRL against its equations in plain torch, its walls, draws and acting policy."""

import pytest
import torch
from tensordict.nn import TensorDictModule
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import (
    SteeredFlowPolicy,
    TanhGaussianPolicy,
    make_qvalue_networks,
    make_tanh_gaussian_network,
)
from deflow_torchrl.objectives import DSRLLoss
from tests.support import networks
from tests.support.flow_critics import doubled
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM
from tests.support.plain_flow import (
    apart,
    assert_updates_are_those_of,
    flow,
    frozen,
    parts_reached,
    pessimistic,
    tanh_gaussian,
    target,
    values,
    velocity,
)

GAMMA, STEPS, SCALE, RHO = 0.875, 4, 1.25, 0.5  # the same numbers in every precision


def build(flow_policy=None, **options):
    sizes = OBSERVATION_DIM, ACTION_DIM, HIDDEN
    actor = TanhGaussianPolicy(make_tanh_gaussian_network(*sizes), log_std_min=-20.0)
    critics, latent = (make_qvalue_networks(*sizes, num_qvalue_nets=3) for _ in range(2))
    flow_policy = networks.make_flow(STEPS) if flow_policy is None else flow_policy
    loss = DSRLLoss(flow_policy, actor, critics, latent, **{"noise_scale": SCALE, "pessimism": RHO, **options})
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    apart(loss.target_qvalue_network_params, *([] if loss.prior_frozen else [loss.target_flow_policy_params]))
    return loss.double()


def make_batch(candidates=1, size=5):
    batch = networks.make_batch(size)
    batch["next", "noise"] = torch.randn(size, candidates, ACTION_DIM)
    batch["latent_noise"] = torch.randn(size, ACTION_DIM)
    batch["valid"] = torch.tensor([[1.0], [0], [1], [1], [1]])
    return doubled(batch)


def plain_terms(loss, batch):
    rows = {"flow": [], "actor": [], "alpha": [], "qvalue": [], "latent": []}
    alpha = loss.log_alpha.exp()

    def steered(s, w):
        return flow(loss.target_flow_policy_params, s, w, steps=STEPS)

    for i in range(len(batch)):
        s, a, following = batch["observation"][i], batch["action"][i], batch["next", "observation"][i]
        valid = batch["valid"][i, 0]
        with torch.no_grad():
            candidates = [
                steered(following, SCALE * tanh_gaussian(loss.actor_network_params, following, e)[0])
                for e in batch["next", "noise"][i]
            ]
            best = max(candidates, key=lambda it: values(loss.qvalue_network_params, following, it).mean().item())
            y = target(batch, i, pessimistic(values(loss.target_qvalue_network_params, following, best), RHO), GAMMA)
            w = batch["latent_noise"][i]
            taught = values(loss.qvalue_network_params, s, steered(s, w))
        rows["qvalue"].append(valid * (values(loss.qvalue_network_params, s, a) - y).square().mean())
        rows["latent"].append((values(loss.latent_qvalue_network_params, s, w) - taught).square().mean())
        z, t = batch["flow_noise"][i], batch["flow_time"][i].item()
        v = velocity(loss.flow_policy_params, s, (1 - t) * z + t * a, t)
        rows["flow"].append(valid * (v - (a - z)).square().mean())
        action, log_p = tanh_gaussian(loss.actor_network_params, s, batch["noise"][i])
        latent_value = values(frozen(loss.latent_qvalue_network_params), s, SCALE * action).mean()
        rows["actor"].append(alpha.detach() * log_p - latent_value)
        rows["alpha"].append(alpha * (-log_p.detach() + ACTION_DIM / 2))
    return {f"loss_{name}": torch.stack(found).mean() for name, found in rows.items()}


@pytest.mark.parametrize("candidates", [1, 3])
def test_the_terms_are_those_of_the_equations_over_three_updates(candidates):
    torch.manual_seed(0)
    loss = build(best_of_n=candidates)
    batches = [make_batch(candidates) for _ in range(3)]
    assert_updates_are_those_of(plain_terms, loss, batches, targets=("flow_policy", "qvalue_network"))


def test_each_terms_gradient_stays_with_its_part():
    torch.manual_seed(0)
    loss = build()
    SoftUpdate(loss, tau=0.005)
    owners = {
        "flow": "flow_policy",
        "actor": "actor_network",
        "alpha": "log_alpha",
        "qvalue": "qvalue_network",
        "latent": "latent_qvalue_network",
    }
    for name, owner in owners.items():
        assert parts_reached(loss, make_batch(), f"loss_{name}") == {owner}


def test_draws_that_are_not_given_come_in_order():
    loss = build(best_of_n=2)
    SoftUpdate(loss, tau=0.005)
    batch = doubled(networks.make_batch(5, noise=False))
    double = {"dtype": torch.float64}
    torch.manual_seed(5)
    drawn = loss(batch.clone())
    torch.manual_seed(5)
    given = batch.clone()
    given["next", "noise"] = torch.randn(5, 2, ACTION_DIM, **double)
    given["latent_noise"] = torch.randn(5, ACTION_DIM, **double)
    given["flow_noise"], given["flow_time"] = torch.randn(5, ACTION_DIM, **double), torch.rand(5, 1, **double)
    given["noise"] = torch.randn(5, ACTION_DIM, **double)
    torch.testing.assert_close(loss(given), drawn)


def test_the_acting_policy_steers_the_target_flow():
    torch.manual_seed(0)
    loss = build()
    policy = SteeredFlowPolicy(
        loss.flow_policy, loss.actor_network, noise_scale=SCALE, flow_params=loss.target_flow_policy_params
    )
    batch = make_batch()
    for _ in range(2):
        apart(loss.target_flow_policy_params)
        with torch.no_grad():
            action = policy(batch.clone())["action"]
        for i in range(5):
            s = batch["observation"][i]
            w = SCALE * tanh_gaussian(loss.actor_network_params, s, batch["noise"][i])[0]
            torch.testing.assert_close(action[i], flow(loss.target_flow_policy_params, s, w, steps=STEPS))


class Bent(torch.nn.Module):
    """A policy that is no flow: the noise, bent by a layer of the observation."""

    def __init__(self):
        super().__init__()
        self.layer, self.action_dim = torch.nn.Linear(OBSERVATION_DIM, ACTION_DIM), ACTION_DIM

    def forward(self, observation, noise):
        return (noise + self.layer(observation)).tanh()


def test_a_frozen_policy_of_any_kind_is_steered_and_does_not_learn():
    torch.manual_seed(0)
    bent = Bent()
    policy = TensorDictModule(bent, in_keys=["observation", "noise"], out_keys=["action"])
    with pytest.raises(TypeError, match="FlowMatchingPolicy"):
        build(policy)
    loss, batch = build(policy, freeze_prior=True), make_batch()
    SoftUpdate(loss, tau=0.005)
    out = loss(batch.clone())
    assert set(out.keys()) == set(loss.out_keys) == set(build().out_keys) - {"loss_flow"}
    errors = [
        values(loss.latent_qvalue_network_params, s, w) - values(loss.qvalue_network_params, s, bent.double()(s, w))
        for s, w in zip(batch["observation"], batch["latent_noise"], strict=True)
    ]
    torch.testing.assert_close(out["loss_latent"], torch.stack(errors).square().mean())
    sum(out[name] for name in out.keys() if name.startswith("loss_")).backward()  # noqa: SIM118
    moved = {name.split("_params")[0] for name, parameter in loss.named_parameters() if parameter.grad is not None}
    assert moved == {"actor_network", "qvalue_network", "latent_qvalue_network", "log_alpha"}
    with pytest.raises(RuntimeError, match="frozen"):
        loss.flow_loss(batch)
    with pytest.raises(TypeError, match="noise"):
        build(TensorDictModule(bent, in_keys=["observation"], out_keys=["action"]), freeze_prior=True)
