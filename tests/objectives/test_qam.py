"""QAM with its variants, and TRQAM, against their equations in plain torch, sample by sample in double precision."""

import functools
import math

import pytest
import torch
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import TanhGaussianPolicy, make_qvalue_networks, make_tanh_gaussian_network
from deflow_torchrl.objectives import QAMLoss, TRQAMLoss
from tests.support import networks
from tests.support.flow_critics import doubled, mlp
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

GAMMA, STEPS, TAU, SCALE, RHO, COEF = 0.875, 4, 3.0, 0.25, 0.5, 10.0  # the same numbers in every precision
VARIANTS = ("plain", "edit", "one_step", "trust_region")


def build(variant="plain", **options):
    networks_of = networks.make_flow(STEPS), networks.make_flow(STEPS)
    critics = make_qvalue_networks(OBSERVATION_DIM, ACTION_DIM, HIDDEN, num_qvalue_nets=3)
    options = {"pessimism": RHO, **options}
    if variant == "edit":
        edit = TanhGaussianPolicy(
            make_tanh_gaussian_network(OBSERVATION_DIM + ACTION_DIM, ACTION_DIM, HIDDEN),
            log_std_min=-20.0,
            in_keys=("observation", "base_action"),
            out_keys=("edit",),
        )
        options |= {"edit_policy": edit, "edit_scale": SCALE}
    if variant == "one_step":
        options |= {"one_step_policy": networks.make_one_step(), "distillation_coef": COEF}
    if variant == "trust_region":
        loss = TRQAMLoss(*networks_of, critics, **{"kl_budget": 0.5, "horizon": 2, **options})
        loss.trust_lambda.fill_(0.7)
    else:
        loss = QAMLoss(*networks_of, critics, **{"inverse_temperature": TAU, **options})
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    apart(loss.target_qvalue_network_params, loss.target_flow_policy_params)
    return loss.double()


def make_batch(size=5, candidates=1):
    batch = networks.make_batch(size)
    batch["edit_noise"] = torch.randn(size, ACTION_DIM)
    batch["sde_noise"] = torch.randn(size, STEPS, ACTION_DIM)
    batch["next", "noise"] = torch.randn(size, candidates, ACTION_DIM)
    batch["next", "edit_noise"] = torch.randn(size, candidates, ACTION_DIM)
    batch["valid"] = torch.tensor([[1.0], [0], [1], [1], [1]])
    return doubled(batch)


def edited(loss, s, z, e):
    with torch.no_grad():
        base = flow(loss.actor_network_params, s, z, steps=STEPS)
    edit, log_p = tanh_gaussian(loss.edit_policy_params, torch.cat([s, base]), e)
    return (base + SCALE * edit).clamp(-1, 1), log_p


def one_step(loss, s, z):
    return mlp(loss.one_step_policy_params["module", "network"], torch.cat([s, z]), norm=False)


def act(loss, variant, s, z, e):
    if variant == "edit":
        return edited(loss, s, z, e)[0]
    if variant == "one_step":
        return one_step(loss, s, z).clamp(-1, 1)
    return flow(loss.actor_network_params, s, z, steps=STEPS)


def matching(loss, s, noise, *, clipped, tau, strength):
    """(loss, path KL) of one sample."""
    eta = 1 / STEPS
    f, prior = loss.actor_network_params, loss.target_flow_policy_params
    sigma = [math.sqrt(2 * (1 - i / STEPS + eta) / (i / STEPS + eta)) for i in range(STEPS)]
    with torch.no_grad():
        states = [noise[0]]
        for i in range(STEPS - 1):
            x, t = states[-1], i / STEPS
            x = x + eta * (2 * velocity(f, s, x, t) - x / (t + eta)) + math.sqrt(eta) * sigma[i] * noise[i + 1]
            states.append(x)
        states.append(states[-1] + eta * velocity(prior, s, states[-1], (STEPS - 1) / STEPS))

    def mean_value(x):
        return values(loss.target_qvalue_network_params, s, x.clamp(-1, 1) if clipped else x).mean()

    g = -tau * torch.autograd.functional.jacobian(mean_value, states[-1])
    adjoints = {}
    for i in reversed(range(STEPS)):
        t = i / STEPS
        drift = torch.autograd.functional.jacobian(
            lambda x, t=t: 2 * velocity(prior, s, x, t + eta) - x / (t + eta), states[i]
        )
        g = g + eta * drift.T @ g
        adjoints[i] = g
    loss_actor, kl = 0.0, 0.0
    for i in range(STEPS):
        difference = velocity(f, s, states[i], i / STEPS) - velocity(prior, s, states[i], i / STEPS).detach()
        scaled = sigma[i] / math.sqrt(strength)
        loss_actor = loss_actor + ((2 / scaled) * difference + scaled * adjoints[i]).square().sum()
        kl = kl + 2 * eta / sigma[i] ** 2 * difference.detach().square().sum()
    return loss_actor, kl, states[-1]


def plain_terms(variant, loss, batch, *, clipped=True):
    rows = {"flow": [], "actor": [], "qvalue": [], "edit": [], "alpha": [], "one_step": [], "kl": []}
    trust = variant == "trust_region"
    strength = 3 * loss.trust_lambda.item() if trust else 1.0
    valid = batch["valid"].squeeze(-1)
    for i in range(len(batch)):
        s, a, following = batch["observation"][i], batch["action"][i], batch["next", "observation"][i]
        with torch.no_grad():
            pairs = zip(batch["next", "noise"][i], batch["next", "edit_noise"][i], strict=True)
            candidates = [act(loss, variant, following, z, e) for z, e in pairs]
            best = max(candidates, key=lambda it: values(loss.qvalue_network_params, following, it).mean().item())
            y = target(batch, i, pessimistic(values(loss.target_qvalue_network_params, following, best), RHO), GAMMA)
        rows["qvalue"].append(valid[i] * (values(loss.qvalue_network_params, s, a) - y).square().mean())
        z, t = batch["flow_noise"][i], batch["flow_time"][i].item()
        v = velocity(loss.flow_policy_params, s, (1 - t) * z + t * a, t)
        rows["flow"].append(valid[i] * (v - (a - z)).square().mean())
        actor, kl, _ = matching(
            loss, s, batch["sde_noise"][i], clipped=clipped, tau=1.0 if trust else TAU, strength=strength
        )
        rows["actor"].append(actor)
        rows["kl"].append(kl / 2 if trust else kl)  # the horizon
        fixed = frozen(loss.qvalue_network_params)
        if variant == "edit":
            alpha = loss.log_alpha.exp()
            action, log_p = edited(loss, s, batch["noise"][i], batch["edit_noise"][i])
            rows["edit"].append(alpha.detach() * log_p - values(fixed, s, action).mean())
            rows["alpha"].append(alpha * (-log_p.detach() + ACTION_DIM / 2))
        if variant == "one_step":
            output = one_step(loss, s, batch["noise"][i])
            taught = flow(loss.actor_network_params, s, batch["noise"][i], steps=STEPS).detach()
            climb = values(fixed, s, output.clamp(-1, 1)).mean()
            rows["one_step"].append(COEF * (output - taught).square().mean() - climb)
    means = {name: torch.stack(found).mean() for name, found in rows.items() if found}
    return {"path_kl": means.pop("kl"), **{f"loss_{name}": value for name, value in means.items()}}


@pytest.mark.parametrize(("variant", "candidates"), [*((variant, 1) for variant in VARIANTS), ("edit", 3)])
def test_the_terms_are_those_of_the_equations_over_three_updates(variant, candidates):
    torch.manual_seed(0)
    loss = build(variant, best_of_n=candidates)

    def after(trained, out):
        if variant != "trust_region":
            return
        if trained is loss:
            loss.update_trust_region(out["path_kl"])
            return
        average = 0.9 * trained.kl_average.item() + 0.1 * min(out["path_kl"].item(), 2 * 0.5)
        moved = trained.trust_lambda.item() + 0.01 * (average - 0.5)
        trained.trust_lambda.fill_(min(max(moved, 0.01), 100.0))
        trained.kl_average.fill_(average)

    assert_updates_are_those_of(
        functools.partial(plain_terms, variant),
        loss,
        [make_batch(candidates=candidates) for _ in range(3)],
        targets=("flow_policy", "qvalue_network"),
        clip=True,
        after=after,
    )


@pytest.mark.parametrize("clipped", [True, False])
def test_beyond_the_bounds_the_critics_pull_only_without_the_clip(clipped):
    torch.manual_seed(0)
    loss = build(clip_adjoint=clipped)
    batch = make_batch()
    batch["sde_noise"] *= 20
    starts = zip(batch["observation"], batch["sde_noise"], strict=True)
    ends = [matching(loss, s, noise, clipped=True, tau=1.0, strength=1.0)[2] for s, noise in starts]
    assert (torch.stack(ends).abs() > 1).any()
    expected = plain_terms("plain", loss, batch, clipped=clipped)
    assert loss.actor_loss(batch)[0].item() == pytest.approx(expected["loss_actor"].item(), rel=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_terms_gradient_stays_with_its_part(variant):
    torch.manual_seed(0)
    loss = build(variant)
    SoftUpdate(loss, tau=0.005)
    owners = {"flow": "flow_policy", "actor": "actor_network", "qvalue": "qvalue_network"}
    owners |= {"edit": {"edit": "edit_policy", "alpha": "log_alpha"}, "one_step": {"one_step": "one_step_policy"}}.get(
        variant, {}
    )
    for name, owner in owners.items():
        assert parts_reached(loss, make_batch(), f"loss_{name}") == {owner}


@pytest.mark.parametrize("variant", VARIANTS)
def test_draws_that_are_not_given_come_in_order(variant):
    loss = build(variant, best_of_n=2)
    SoftUpdate(loss, tau=0.005)
    batch = doubled(networks.make_batch(5, noise=False))
    shape = {"dtype": torch.float64}
    torch.manual_seed(5)
    drawn = loss(batch.clone())
    torch.manual_seed(5)
    given = batch.clone()
    given["next", "noise"] = torch.randn(5, 2, ACTION_DIM, **shape)
    if variant == "edit":
        given["next", "edit_noise"] = torch.randn(5, 2, ACTION_DIM, **shape)
    given["flow_noise"], given["flow_time"] = torch.randn(5, ACTION_DIM, **shape), torch.rand(5, 1, **shape)
    given["sde_noise"] = torch.randn(5, STEPS, ACTION_DIM, **shape)
    if variant in ("edit", "one_step"):
        given["noise"] = torch.randn(5, ACTION_DIM, **shape)
    if variant == "edit":
        given["edit_noise"] = torch.randn(5, ACTION_DIM, **shape)
    torch.testing.assert_close(loss(given), drawn)


def test_at_temperature_zero_the_prior_acts():
    torch.manual_seed(0)
    loss = build(inverse_temperature=0.0)
    SoftUpdate(loss, tau=0.005)
    batch = make_batch()
    before = loss.qvalue_loss(batch.clone())[0]
    with torch.no_grad():
        for value in loss.actor_network_params.values(True, True):
            value.add_(0.5)
    assert loss.qvalue_loss(batch.clone())[0] == before
    with torch.no_grad():
        for value in loss.flow_policy_params.values(True, True):
            value.add_(0.5)
    assert loss.qvalue_loss(batch.clone())[0] != before


def test_trqam_is_l_times_qam_at_the_inverse_of_l():
    torch.manual_seed(0)
    trust = build("trust_region")
    strength = 3 * 0.7
    torch.manual_seed(0)
    plain = build(inverse_temperature=1 / strength)
    batch = make_batch()
    torch.testing.assert_close(trust.actor_loss(batch.clone())[0], strength * plain.actor_loss(batch.clone())[0])


def test_the_multiplier_rises_iff_the_path_kl_exceeds_its_budget_and_stays_in_its_bounds():
    loss = build("trust_region", lambda_rate=1e3)
    loss.update_trust_region(torch.tensor(100.0))
    assert loss.kl_average.item() == pytest.approx(0.1 * 2 * 0.5)  # one batch counts as twice the budget at most
    assert loss.trust_lambda.item() == pytest.approx(0.01)  # the average is still below
    for _ in range(20):
        loss.update_trust_region(torch.tensor(100.0))
    assert loss.trust_lambda.item() == pytest.approx(100.0)


def test_combinations_that_cannot_be_are_refused():
    edit = build("edit").edit_policy
    flows, critics = [networks.make_flow(STEPS) for _ in range(2)], networks.make_critics()
    with pytest.raises(ValueError, match="exclude each other"):
        QAMLoss(*flows, critics, inverse_temperature=1.0, edit_policy=edit, one_step_policy=networks.make_one_step())
    with pytest.raises(ValueError, match="as many steps"):
        QAMLoss(flows[0], networks.make_flow(STEPS + 1), critics, inverse_temperature=1.0)
    with pytest.raises(AttributeError, match="edit_policy"):
        build().edit_loss(make_batch())
