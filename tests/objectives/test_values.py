"""The losses' values, against formulas written out by hand here."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from deflow_torchrl.modules import DeFlowActor, FlowMatchingPolicy, RefinementPolicy, make_refinement_network
from deflow_torchrl.objectives import DeFlowLoss, FlowMatchingLoss, RefinementLoss
from tests.support.networks import make_actor, make_batch, make_critics, make_loss


def qvalues(critics, observation, action):
    return torch.stack([critic.module(observation, action).squeeze(-1) for critic in critics])


def by_hand(actor, critics, targets, batch, *, aggregation, normalize, log_alpha, delta, gamma, dims):
    """Algorithm 1 with plain tensors."""
    flow, refine = actor.flow_policy.module, actor.refinement_policy.module.refinement_network
    velocity = flow.velocity_network

    def sample(observation, noise):
        x = noise
        for step in range(10):
            time = torch.full_like(x[:, :1], step / 10)
            x = x + velocity(torch.cat([observation, x, time], -1)) / 10
        return x.clamp(-1, 1)

    s, a, r = batch["observation"], batch["action"], batch["next", "reward"].squeeze(-1)
    following, mask = batch["next", "observation"], 1 - batch["next", "terminated"].float().squeeze(-1)
    z, t = batch["flow_noise"], batch["flow_time"]
    x = (1 - t) * z + t * a
    loss_flow = ((velocity(torch.cat([s, x, t], -1)) - (a - z)) ** 2).mean()
    base = sample(s, batch["noise"])
    shift = refine(torch.cat([s, base], -1))
    q = qvalues(critics, s, (base + shift).clamp(-1, 1)).mean(0)
    divergence = (shift**2).mean() if dims == "mean" else (shift**2).sum(-1).mean()
    scale = 1 / q.abs().mean() if normalize else 1.0
    loss_actor = -scale * q.mean() + math.exp(log_alpha) * divergence
    loss_alpha = -log_alpha * (divergence - delta)
    next_base = sample(following, batch["next", "noise"])
    next_action = (next_base + refine(torch.cat([following, next_base], -1))).clamp(-1, 1)
    next_q = qvalues(targets, following, next_action)
    next_q = next_q.mean(0) if aggregation == "mean" else next_q.min(0).values
    target = r + gamma * mask * next_q
    loss_qvalue = ((qvalues(critics, s, a) - target) ** 2).mean()
    return {"loss_flow": loss_flow, "loss_actor": loss_actor, "loss_alpha": loss_alpha, "loss_qvalue": loss_qvalue}


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dims", ["mean", "sum"])
def test_all_four_losses_equal_algorithm_1_written_out(aggregation, normalize, dims):
    actor, critics, targets = make_actor(), make_critics(), make_critics()
    loss = DeFlowLoss(
        actor,
        critics,
        target_divergence=0.02,
        q_aggregation=aggregation,
        normalize_q_loss=normalize,
        divergence_reduction=dims,
        log_alpha_init=0.7,
    )
    loss.make_value_estimator(gamma=0.95)
    with torch.no_grad():
        for number, critic in enumerate(targets):
            for name, parameter in critic.named_parameters():
                loss.target_qvalue_network_params.get(tuple(name.split(".")))[number] = parameter
    batch = make_batch(32)
    out = loss(batch)
    expected = by_hand(
        actor,
        critics,
        targets,
        batch,
        aggregation=aggregation,
        normalize=normalize,
        log_alpha=0.7,
        delta=0.02,
        gamma=0.95,
        dims=dims,
    )
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["alpha"], torch.tensor(math.exp(0.7)))


def test_alpha_starts_at_e():
    torch.testing.assert_close(make_loss()(make_batch())["alpha"], torch.tensor(math.e))


@pytest.mark.parametrize(("factor", "rises"), [(0.5, True), (2.0, False)])
def test_alpha_rises_iff_divergence_exceeds_target(factor, rises):
    batch = make_batch(64)
    loss = make_loss()
    loss.target_divergence = float(loss(batch)["divergence"]) * factor
    before = loss.log_alpha.item()
    optimizer = torch.optim.SGD([loss.log_alpha], lr=0.1)
    loss.alpha_loss(batch)[0].backward()
    optimizer.step()
    assert (loss.log_alpha.item() > before) is rises


def test_a_fixed_multiplier_multiplies_once_and_does_not_learn():
    batch = make_batch(16)
    results = {}
    for alpha in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        loss = make_loss(fixed_alpha=alpha, normalize_q_loss=False)
        out = loss(batch)
        results[alpha] = out["loss_actor"]
        assert out["loss_alpha"] == 0
        assert "log_alpha" not in dict(loss.named_parameters())
        torch.testing.assert_close(out["alpha"], torch.tensor(alpha))
    torch.testing.assert_close(results[0.5] - results[0.0], (results[1.0] - results[0.0]) / 2)


def test_alpha_stays_inside_its_bounds():
    loss = make_loss(min_alpha=0.5, max_alpha=2.0)
    batch = make_batch()
    for value, bound in ((-9.0, 0.5), (9.0, 2.0)):
        with torch.no_grad():
            loss.log_alpha.fill_(value)
        alone = loss.alpha_loss(batch)[0].item()
        with torch.no_grad():
            loss.log_alpha.fill_(value)
        out = loss(batch)
        torch.testing.assert_close(out["alpha"], torch.tensor(bound))
        assert out["loss_alpha"].item() == pytest.approx(alone, rel=1e-5)
        torch.testing.assert_close(loss.log_alpha.detach().exp(), torch.tensor(bound))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_divergence": 0.0},
        {"target_divergence": float("nan")},
        {"min_alpha": -1.0},
        {"min_alpha": 2.0, "max_alpha": 1.0},
        {"fixed_alpha": -0.1},
        {"divergence_reduction": "max"},
        {"q_aggregation": "max"},
    ],
)
def test_options_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError, match="must"):
        make_loss(**kwargs)


def test_delta_can_be_scheduled_in_place():
    loss = make_loss()
    loss.target_divergence = 0.5
    assert float(loss.state_dict()["target_divergence"]) == 0.5
    batch = make_batch()
    out = loss(batch)
    torch.testing.assert_close(out["loss_alpha"], -loss.log_alpha * (out["divergence"] - 0.5))


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_normalised_q_loss_is_invariant_to_the_scale_of_q(scale):
    batch = make_batch(64)
    gradients = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        loss = make_loss()
        with torch.no_grad():
            head = loss.qvalue_network_params.get(("module", "mlp", "6"))
            head.get("weight").mul_(factor)
            head.get("bias").mul_(factor)
        loss(batch)["loss_actor"].backward()
        gradients.append([p.grad.clone() for p in loss.actor_network.refinement_policy.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


def test_terminated_cuts_the_bootstrap_and_truncated_does_not():
    batch = make_batch(1)
    results = {}
    for name in ("neither", "terminated", "truncated"):
        td = batch.clone()
        for flag in ("terminated", "truncated", "done"):
            td["next", flag] = torch.zeros(1, 1, dtype=torch.bool)
        if name != "neither":
            td["next", name] = td["next", "done"] = torch.ones(1, 1, dtype=torch.bool)
        torch.manual_seed(0)
        results[name] = make_loss()(td)["loss_qvalue"].item()
    assert results["truncated"] == results["neither"]
    assert results["terminated"] != results["neither"]
    torch.manual_seed(0)
    critics = make_loss()
    q = critics.critics.values(batch)
    expected = ((q - batch["next", "reward"].squeeze(-1)) ** 2).mean()
    assert results["terminated"] == pytest.approx(expected.item(), rel=1e-5)


def test_n_step_data_discounts_by_gamma_to_the_n():
    batch = make_batch(8)
    batch["next", "terminated"].zero_()
    loss = make_loss(gamma=0.9)
    cubed = make_loss(gamma=0.9**3)
    cubed.load_state_dict({**loss.state_dict(), **{k: v for k, v in cubed.state_dict().items() if "gamma" in k}})
    expected = cubed(batch.clone())["loss_qvalue"]
    batch["steps_to_next_obs"] = torch.full((8, 1), 3)
    torch.testing.assert_close(loss(batch)["loss_qvalue"], expected)


def test_the_priority_is_the_largest_td_error_of_the_ensemble():
    loss = make_loss()
    batch = make_batch(8)
    batch["next", "terminated"].fill_(True)
    loss(batch)
    q = loss.critics.values(batch)
    torch.testing.assert_close(batch["td_error"], (q - batch["next", "reward"].squeeze(-1)).abs().amax(0).detach())


def test_the_flow_recovers_a_known_mixture_of_modes():
    # Two modes at +-0.6 with weights 0.3 and 0.7 and width 0.05, the same at every state.
    flow = FlowMatchingPolicy(
        nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)), 1, num_steps=50
    )
    loss = FlowMatchingLoss(flow)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    for _ in range(1500):
        positive = torch.rand(256, 1) < 0.3
        action = torch.where(positive, 0.6, -0.6) + 0.05 * torch.randn(256, 1)
        td = TensorDict(observation=torch.zeros(256, 1), action=action, batch_size=[256])
        optimizer.zero_grad()
        loss(td)["loss_flow"].backward()
        optimizer.step()
    with torch.no_grad():
        sampled = flow(TensorDict(observation=torch.zeros(4000, 1), batch_size=[4000]))["action"].squeeze(-1)
    upper, lower = sampled[sampled > 0], sampled[sampled < 0]
    assert len(upper) / 4000 == pytest.approx(0.3, abs=0.05)
    assert upper.mean() == pytest.approx(0.6, abs=0.05)
    assert lower.mean() == pytest.approx(-0.6, abs=0.05)
    assert (sampled.abs() < 0.3).float().mean() < 0.05, "hardly anything between the modes"


class Quadratic(nn.Module):
    """Q(s, a) = -|a - goal|^2, known everywhere."""

    def __init__(self, goal):
        super().__init__()
        self.goal = nn.Parameter(torch.tensor(goal))

    def forward(self, observation, action):
        return -(action - self.goal).square().sum(-1, keepdim=True)


class AnyBase(TensorDictModule):
    """A prior that always proposes the origin."""

    def __init__(self):
        super().__init__(
            lambda observation: torch.zeros(*observation.shape[:-1], 2),
            in_keys=["observation"],
            out_keys=["base_action"],
        )


def test_refinement_climbs_a_quadratic_to_the_trust_regions_edge_and_stops_there():
    # From b = 0, max -|d - g|^2 subject to mean(d^2) <= delta has the closed form d = g sqrt(2 delta) / |g|
    # (|d|^2 = 2 delta in two dimensions), here with |g| = 0.5 well outside the region.
    delta, goal = 0.01, (0.3, -0.4)
    refinement = RefinementPolicy(make_refinement_network(1, 2, (32,)), 2, low=-1.0, high=1.0)
    critic = TensorDictModule(Quadratic(goal), in_keys=["observation", "action"], out_keys=["state_action_value"])
    loss = RefinementLoss(DeFlowActor(AnyBase(), refinement), [critic], target_divergence=delta, normalize_q_loss=False)
    optimizer = torch.optim.Adam(
        [{"params": list(refinement.parameters()), "lr": 1e-3}, {"params": [loss.log_alpha], "lr": 1e-2}]
    )
    td = TensorDict(observation=torch.zeros(16, 1), action=torch.zeros(16, 2), batch_size=[16])
    for _ in range(1500):
        out = loss(td)
        optimizer.zero_grad()
        (out["loss_actor"] + out["loss_alpha"]).backward()
        optimizer.step()
    with torch.no_grad():
        shift = refinement(TensorDict(observation=torch.zeros(1, 1), base_action=torch.zeros(1, 2), batch_size=[1]))[
            "refinement"
        ][0]
    expected = torch.tensor(goal) / 0.5 * math.sqrt(2 * delta)
    torch.testing.assert_close(shift, expected, rtol=0.05, atol=0.005)
    # KKT: gradient of Q equals alpha times gradient of D: 2 (g - d) = alpha d, in two dimensions with D = |d|^2 / 2.
    alpha = 2 * (0.5 - math.sqrt(2 * delta)) / math.sqrt(2 * delta)
    assert float(out["alpha"]) == pytest.approx(alpha, rel=0.1)


def test_a_prior_of_another_kind_cannot_be_flow_matched():
    actor = DeFlowActor(AnyBase(), RefinementPolicy(nn.Linear(3, 2), 2, low=-1.0, high=1.0))
    with pytest.raises(TypeError, match="FlowMatchingPolicy"):
        DeFlowLoss(actor, make_critics(1, 2))


def test_soft_update_moves_the_targets_by_tau():
    from torchrl.objectives import SoftUpdate

    loss = make_loss()
    updater = SoftUpdate(loss, tau=0.25)
    before = loss.target_qvalue_network_params.clone()
    with torch.no_grad():
        for parameter in loss.qvalue_network_params.parameters():
            parameter.add_(1.0)
    updater.step()
    moved = loss.target_qvalue_network_params - before
    assert all(torch.allclose(value, torch.full_like(value, 0.25), atol=1e-6) for value in moved.values(True, True))


def test_the_separate_losses_together_are_deflow_when_the_critics_are_shared():
    from torchrl.objectives import SoftUpdate

    from deflow_torchrl.objectives import TDCriticLoss

    batches = [make_batch(16) for _ in range(4)]
    torch.manual_seed(0)
    whole = make_loss(target_divergence=1e-3)
    torch.manual_seed(0)
    actor = make_actor()
    critic = TDCriticLoss(actor, make_critics())
    critic.make_value_estimator(gamma=0.9)
    parts = [FlowMatchingLoss(actor.flow_policy), RefinementLoss(actor, critic, target_divergence=1e-3), critic]
    updaters = [SoftUpdate(whole, tau=0.1), SoftUpdate(critic, tau=0.1)]
    together = list(dict.fromkeys(parameter for part in parts for parameter in part.parameters()))
    optimizers = [torch.optim.Adam(whole.parameters(), lr=1e-2), torch.optim.Adam(together, lr=1e-2)]
    for batch in batches:
        expected = whole(batch.clone())
        out = {name: value for part in parts for name, value in part(batch.clone()).items()}
        for name in expected.keys():  # noqa: SIM118 - a TensorDict
            torch.testing.assert_close(out[name], expected[name])
        for losses, optimizer, updater in zip((expected, out), optimizers, updaters, strict=True):
            optimizer.zero_grad()
            sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
            updater.step()
            optimizer.step()


def test_something_that_is_no_actor_is_refused():
    with pytest.raises(TypeError, match="must be a DeFlowActor"):
        RefinementLoss(make_actor().flow_policy, make_critics(), target_divergence=1e-3)
