"""FEdit against its equations in plain torch, its walls and its acting policy."""

import copy
import math

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import (
    BestOfNPolicy,
    EditedFlowPolicy,
    TanhGaussianPolicy,
    make_qvalue_networks,
    make_tanh_gaussian_network,
)
from deflow_torchrl.objectives import FEditLoss
from tests.support import flow_critics, networks
from tests.support.flow_critics import doubled, member, mlp
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, total

GAMMA, STEPS, SCALE, RHO = 0.875, 4, 0.25, 0.5  # the same numbers in every precision


def build(*, critics=3, **options):
    edit = TanhGaussianPolicy(
        make_tanh_gaussian_network(OBSERVATION_DIM + ACTION_DIM, ACTION_DIM, HIDDEN),
        log_std_min=-20.0,
        in_keys=("observation", "base_action"),
        out_keys=("edit",),
    )
    critics = make_qvalue_networks(OBSERVATION_DIM, ACTION_DIM, HIDDEN, num_qvalue_nets=critics)
    options = {"edit_scale": SCALE, "pessimism": RHO, **options}
    loss = FEditLoss(networks.make_flow(STEPS), edit, critics, **options)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    with torch.no_grad():
        for value in loss.target_qvalue_network_params.values(True, True):
            value.add_(0.1 * torch.randn_like(value))
    return loss


def make_batch(size=5, candidates=1):
    batch = networks.make_batch(size)
    batch["edit_noise"] = torch.randn(size, ACTION_DIM)
    batch["next", "noise"] = torch.randn(size, candidates, ACTION_DIM)
    batch["next", "edit_noise"] = torch.randn(size, candidates, ACTION_DIM)
    return batch


def flow(params, s, z):
    x = z
    for i in range(STEPS):
        time = torch.tensor([i / STEPS], dtype=x.dtype)
        x = x + mlp(params["module", "velocity_network"], torch.cat([s, x, time]), norm=False) / STEPS
    return x.clamp(-1, 1)


def edited(loss, s, z, e):
    with torch.no_grad():
        base = flow(loss.flow_policy_params, s, z)
    mean, log_std = mlp(loss.edit_policy_params["module", "network"], torch.cat([s, base]), norm=False).chunk(2)
    log_std = log_std.clamp(-20, 2)
    u = mean + log_std.exp() * e
    slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    log_p = (-(e**2) / 2 - log_std - math.log(2 * math.pi) / 2 - slope).sum()
    return (base + SCALE * u.tanh()).clamp(-1, 1), log_p


def values(params, s, a):
    path = ("module", "mlp")
    return torch.stack(
        [mlp(member(params, j, *path), torch.cat([s, a]), norm=True)[0] for j in range(params.batch_size[0])]
    )


def plain_terms(loss, batch, valid):
    flows, actors, alphas, critics = [], [], [], []
    alpha = loss.log_alpha.exp()
    for i in range(len(batch)):
        s, a, following = batch["observation"][i], batch["action"][i], batch["next", "observation"][i]
        with torch.no_grad():
            candidates = [
                edited(loss, following, z, e)[0]
                for z, e in zip(batch["next", "noise"][i], batch["next", "edit_noise"][i], strict=True)
            ]
            best = max(
                candidates, key=lambda action: values(loss.qvalue_network_params, following, action).mean().item()
            )
            target = values(loss.target_qvalue_network_params, following, best)
            pessimistic = target.mean() - RHO * (target - target.mean()).square().mean().sqrt()
            y = batch["next", "reward"][i, 0]
            if not batch["next", "terminated"][i, 0]:
                y = y + GAMMA * pessimistic
        critics.append(valid[i] * (values(loss.qvalue_network_params, s, a) - y).square().mean())
        z, t = batch["flow_noise"][i], batch["flow_time"][i]
        v = mlp(
            loss.flow_policy_params["module", "velocity_network"], torch.cat([s, (1 - t) * z + t * a, t]), norm=False
        )
        flows.append(valid[i] * (v - (a - z)).square().mean())
        action, log_p = edited(loss, s, batch["noise"][i], batch["edit_noise"][i])
        params = loss.qvalue_network_params.apply(torch.Tensor.detach)
        actors.append(alpha.detach() * log_p - values(params, s, action).mean())
        alphas.append(alpha * (-log_p.detach() + ACTION_DIM / 2))
    terms = (("flow", flows), ("actor", actors), ("alpha", alphas), ("qvalue", critics))
    return {f"loss_{name}": torch.stack(rows).mean() for name, rows in terms}


@pytest.mark.parametrize("candidates", [1, 3])
def test_the_terms_are_fedits_written_out_and_go_on_to_be_over_three_updates(candidates):
    torch.manual_seed(0)
    loss = build(best_of_n=candidates).double()
    updater = SoftUpdate(loss, tau=0.005)
    by_hand = copy.deepcopy(loss)
    optimizers = [torch.optim.Adam(it.parameters(), lr=1e-3) for it in (loss, by_hand)]
    for _ in range(3):
        batch = doubled(make_batch(candidates=candidates))
        valid = torch.tensor([1.0, 0, 1, 1, 1]).double()
        batch["valid"] = valid.unsqueeze(-1)
        out, expected = loss(batch.clone()), plain_terms(by_hand, batch, valid)
        for name, value in expected.items():
            torch.testing.assert_close(
                out[name], value, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
            one = getattr(loss, f"{name.removeprefix('loss_')}_loss")(batch.clone())[0]
            torch.testing.assert_close(one, value, rtol=1e-9, atol=1e-12)
        for optimizer, terms in zip(optimizers, (total(out), sum(expected.values())), strict=True):
            optimizer.zero_grad()
            terms.backward()
        with torch.no_grad():
            target, source = by_hand.target_qvalue_network_params, by_hand.qvalue_network_params
            for old, new in zip(target.values(True, True), source.values(True, True), strict=True):
                old.lerp_(new, 0.005)
        updater.step()
        for optimizer in optimizers:
            optimizer.step()
    for (name, one), other in zip(loss.state_dict().items(), by_hand.state_dict().values(), strict=True):
        if isinstance(one, torch.Tensor) and one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_each_terms_gradient_stays_with_its_part():
    torch.manual_seed(0)
    loss = build()
    SoftUpdate(loss, tau=0.005)
    owners = {
        "loss_flow": "flow_policy",
        "loss_actor": "edit_policy",
        "loss_qvalue": "qvalue_network",
        "loss_alpha": "log_alpha",
    }
    for name, owner in owners.items():
        loss.zero_grad()
        loss(make_batch())[name].backward()
        reached = {key.split("_params")[0] for key, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {owner}


def test_draws_that_are_not_given_come_in_order():
    loss = build(best_of_n=2)
    SoftUpdate(loss, tau=0.005)
    batch = networks.make_batch(5, noise=False)
    torch.manual_seed(5)
    drawn = loss(batch.clone())
    torch.manual_seed(5)
    given = batch.clone()
    given["next", "noise"] = torch.randn(5, 2, ACTION_DIM)
    given["next", "edit_noise"] = torch.randn(5, 2, ACTION_DIM)
    given["flow_noise"], given["flow_time"] = torch.randn(5, ACTION_DIM), torch.rand(5, 1)
    given["noise"], given["edit_noise"] = torch.randn(5, ACTION_DIM), torch.randn(5, ACTION_DIM)
    torch.testing.assert_close(loss(given), drawn)


def test_an_edit_is_never_larger_than_its_scale_and_the_temperature_follows_the_entropy():
    torch.manual_seed(0)
    loss = build(target_entropy=1e3)
    SoftUpdate(loss, tau=0.005)
    batch = make_batch(64)
    out = loss(batch)
    assert 0 < out["edit_size"] <= SCALE**2
    out["loss_alpha"].backward()
    assert loss.log_alpha.grad < 0  # entropy below its target: Adam raises alpha
    with torch.no_grad():
        loss.target_entropy.fill_(-1e3)
    loss.zero_grad()
    loss(batch)["loss_alpha"].backward()
    assert loss.log_alpha.grad > 0


def test_the_acting_policy_edits_the_flows_action_and_chooses_among_candidates():
    torch.manual_seed(0)
    loss = build(critics=2).double()
    policy = EditedFlowPolicy(loss.flow_policy, loss.edit_policy, edit_scale=SCALE)
    batch = doubled(networks.make_batch(4, noise=False))
    noise = torch.randn(4, 3, 2 * ACTION_DIM).double()
    with torch.no_grad():
        best = BestOfNPolicy(policy, loss.qvalue_network, loss.qvalue_network_params, 3, q_aggregation="mean")
        assert best.noise_shape == (3, 2 * ACTION_DIM)
        chosen = best(batch.clone().set("noise", noise))["action"]
        for i in range(4):
            s = batch["observation"][i]
            candidates = [edited(loss, s, *row.chunk(2))[0] for row in noise[i]]
            expected = max(candidates, key=lambda action: values(loss.qvalue_network_params, s, action).mean().item())
            torch.testing.assert_close(chosen[i], expected)
            one = policy(batch[i].clone().set("noise", noise[i, 0]))
            torch.testing.assert_close(one["action"], candidates[0])
            assert (one["action"] - one["base_action"]).abs().max() <= SCALE
        drawing = policy.drawing()
        assert drawing.in_keys == ["observation"]
        assert drawing(batch.clone())["action"].shape == (4, ACTION_DIM)


def test_encoders_stand_before_either_part():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    torch.manual_seed(0)
    plain = build()
    flow = networks.make_flow(STEPS)
    flow.load_state_dict(plain.flow_policy.state_dict())
    flow.in_keys[0] = "code"
    encoder = TensorDictModule(Twice(), in_keys=["observation"], out_keys=["code"])
    edit = copy.deepcopy(plain.edit_policy)
    loss = FEditLoss(TensorDictSequential(encoder, flow), edit, networks.make_critics(), edit_scale=SCALE)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    SoftUpdate(loss, tau=0.005)
    batch = make_batch()
    twice = batch.clone()
    twice["observation"] = 2 * batch["observation"]
    torch.testing.assert_close(loss.flow_loss(batch.clone())[0], plain.flow_loss(twice)[0])
    total(loss(batch)).backward()


@pytest.mark.parametrize("options", [{"best_of_n": 0}, {"pessimism": -1.0}, {"alpha_init": 0.0}, {"edit_scale": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        build(**options)


def test_other_policies_are_refused():
    with pytest.raises(TypeError, match="TanhGaussianPolicy"):
        FEditLoss(networks.make_flow(), networks.make_one_step(), networks.make_critics(), edit_scale=0.1)
    edit, critics = build().edit_policy, flow_critics.make_ensemble()
    with pytest.raises(TypeError, match="wants 3 actions"):
        FEditLoss(networks.make_flow(), edit, critics, edit_scale=0.1)


def test_of_a_flag_for_each_step_the_last_counts_for_the_whole_row():
    torch.manual_seed(0)
    loss, batch = build(), make_batch()
    flags = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    steps, rows = loss(batch.clone().set("valid", flags)), loss(batch.clone().set("valid", flags[:, -1:]))
    for name in ("loss_flow", "loss_qvalue"):
        torch.testing.assert_close(steps[name], rows[name])
    assert not torch.isclose(rows["loss_flow"], loss(batch.clone())["loss_flow"])
