"""FQL, FBRAC and FAWAC: gradient walls, and numbers worked out by hand for networks that are one linear map.

One observation dimension, one action dimension. The flow's velocity is a constant c, so that M Euler steps give z + c and the
sampled action is clip(z + c). The one-step policy is mu(s, z) = m z. Critics are Q_j(s, a) = k_j a, with target critics of
their own slopes.
"""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import SoftUpdate

from deflow_torchrl.modules import (
    FlowMatchingPolicy,
    OneStepPolicy,
    make_qvalue_networks,
    make_velocity_network,
)
from deflow_torchrl.objectives import FAWACLoss, FBRACLoss, FQLLoss
from tests.support.networks import make_actor, make_batch, make_critics, make_flow, make_one_step

GAMMA = 0.9


class Slope(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(float(slope)))

    def forward(self, observation, action):
        return self.slope * action


def linear(weights, bias=0.0):
    layer = nn.Linear(len(weights), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights], dtype=torch.float32))
        layer.bias.fill_(bias)
    return layer


def hand_flow(c, steps=4, s_weight=0.0):
    return FlowMatchingPolicy(linear([s_weight, 0.0, 0.0], c), 1, steps)


def hand_critics(*slopes):
    return [
        TensorDictModule(Slope(slope), in_keys=["observation", "action"], out_keys=["state_action_value"])
        for slope in slopes
    ]


def hand_batch(rows):
    """Rows of (s, a, z, z', x0, t, r, terminated)."""
    s, a, z, next_z, x0, t, r, terminated = torch.tensor(rows, dtype=torch.float32).unsqueeze(-1).unbind(1)
    terminated = terminated.bool()
    return TensorDict(
        observation=s,
        action=a,
        noise=z,
        flow_noise=x0,
        flow_time=t,
        next=TensorDict(
            observation=s, noise=next_z, reward=r, terminated=terminated, done=terminated, batch_size=[len(rows)]
        ),
        batch_size=[len(rows)],
    )


def ready(loss, *target_slopes):
    loss.make_value_estimator(gamma=GAMMA)
    SoftUpdate(loss, tau=0.1)
    loss.target_qvalue_network_params["module", "slope"].copy_(torch.tensor(target_slopes, dtype=torch.float32))
    return loss


#              s    a    z    z'   x0   t    r  terminated
ROWS = [
    [0.0, 0.5, 0.4, 0.25, 0.1, 0.5, 1.0, 0.0],
    [0.0, -0.5, 0.8, 0.75, -0.3, 0.0, 2.0, 1.0],
]


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_fql_by_hand(aggregation, alpha):
    # c = 0.5, m = 2, online k = (1, 3), target k = (0.5, 1), gamma = 0.9.
    loss = FQLLoss(
        hand_flow(0.5),
        OneStepPolicy(linear([0.0, 2.0]), 1),
        hand_critics(1, 3),
        alpha=alpha,
        q_aggregation=aggregation,
    )
    out = ready(loss, 0.5, 1.0)(batch := hand_batch(ROWS))
    # Flow: v - (a - x0) = 0.5 - 0.4 = 0.1 and 0.5 - (-0.2) = 0.7; mean of 0.01 and 0.49.
    assert out["loss_flow"].item() == pytest.approx(0.25)
    # Distillation: mu = 0.8 and 1.6, unclipped; b = clip(0.9) = 0.9 and clip(1.3) = 1: mean of 0.01 and 0.36.
    assert out["distillation"].item() == pytest.approx(0.185)
    # Q: mean slope 2 at clip(mu) = 0.8 and 1: mean of 1.6 and 2.
    assert out["q"].item() == pytest.approx(1.8)
    assert out["loss_actor"].item() == pytest.approx(alpha * 0.185 - 1.8, rel=1e-5)
    # Critics: a' = clip(0.5) = 0.5 (row 2 has terminated: y = r = 2). agg Qbar(s', a') = 0.375 (mean), 0.25 (min);
    # y = 1.3375 or 1.225. Q(s, a) = (0.5, 1.5) and (-0.5, -1.5). Errors: row 1 (-0.8375, 0.1625) or (-0.725, 0.275),
    # row 2 (-2.5, -3.5): sums of squares 0.7278125 or 0.60125, and 18.5; over 4.
    expected = (18.5 + (0.7278125 if aggregation == "mean" else 0.60125)) / 4
    assert out["loss_qvalue"].item() == pytest.approx(expected)
    assert batch["td_error"].tolist() == pytest.approx([0.8375 if aggregation == "mean" else 0.725, 3.5])


def test_fql_distils_the_unclipped_output_and_climbs_the_clipped_action():
    # d loss_actor / dm, alpha = 10: distillation 2 (mu - b) z: (-0.1)(0.4) 2 = -0.08 and (0.6)(0.8) 2 = 0.96, mean 0.44;
    # Q: slope 2 times z = 0.8 in row 1, nothing in row 2, where the clip holds the action: mean 0.4.
    loss = FQLLoss(hand_flow(0.5), OneStepPolicy(linear([0.0, 2.0]), 1), hand_critics(1, 3), alpha=10.0)
    loss.actor_loss(hand_batch(ROWS))[0].backward()
    weight = next(p for p in loss.actor_network_params.values(True, True) if p.ndim == 2)
    assert weight.grad[0, 1].item() == pytest.approx(10 * 0.44 - 0.4, rel=1e-5)


def test_fql_normalises_the_q_term_on_demand_and_alpha_can_be_scheduled():
    settings = {"alpha": 10.0, "normalize_q_loss": True}
    loss = FQLLoss(hand_flow(0.5), OneStepPolicy(linear([0.0, 2.0]), 1), hand_critics(1, 3), **settings)
    # mean|Q| = 1.8 and mean Q = 1.8: the normalised term is -1.
    assert loss.actor_loss(hand_batch(ROWS))[0].item() == pytest.approx(1.85 - 1)
    loss.alpha = 20.0
    assert loss.actor_loss(hand_batch(ROWS))[0].item() == pytest.approx(3.7 - 1)


def test_fbrac_by_hand_through_every_euler_step_and_the_final_clip():
    # Velocity 0.5 + u x with u = 0, so that x -> z + 0.5; d x_4 / d bias = 1 (four steps of 1/4 each), inside the bounds.
    loss = ready(FBRACLoss(hand_flow(0.5), hand_critics(1, 3), alpha=3.0), 0.5, 1.0)
    out = loss(hand_batch(ROWS))
    assert out["flow_matching"].item() == pytest.approx(0.25)
    assert out["loss_flow"].item() == pytest.approx(0.75)
    # Actions 0.9 and clip(1.3) = 1, mean slope 2: Q = 1.8 and 2.
    assert out["loss_actor"].item() == pytest.approx(-1.9)
    assert out["q"].item() == pytest.approx(1.9)
    # a' = clip(0.25 + 0.5) = 0.75: y = 1 + 0.9 * 0.75 * 0.75 = 1.50625; errors (-1.00625, -0.00625) and (-2.5, -3.5).
    assert out["loss_qvalue"].item() == pytest.approx((1.00625**2 + 0.00625**2 + 18.5) / 4)
    out["loss_actor"].backward()
    layer = loss.actor_network_params.get(("module", "velocity_network"))
    # Row 2 is held by the clip: half of the mean slope 2 is left.
    assert layer.get("bias").grad.item() == pytest.approx(-1.0)
    # d x_4 / d u = sum_i x_i / 4 with x_i = 0.4 + 0.125 i (u = 0): 0.5875, times slope 2, half of the rows. Were the last
    # step alone differentiated it would be x_3 / 4 = 0.19375.
    assert layer.get("weight").grad[0, 1].item() == pytest.approx(-0.5875, rel=1e-5)


def test_fawac_by_hand():
    # Q - V with the mean slope 2: a - clip(z + 0.5) = 0.5 - 0.9 and -0.5 - 1 times 2: -0.8 and -3.
    loss = ready(FAWACLoss(hand_flow(0.5), hand_critics(1, 3), temperature=0.5), 0.5, 1.0)
    out = loss(hand_batch(ROWS))
    weights = torch.tensor([-0.4, -1.5]).exp()
    assert out["weight"].item() == pytest.approx(weights.mean().item())
    # Flow errors 0.01 and 0.49, as in FQL.
    assert out["loss_flow"].item() == pytest.approx((weights * torch.tensor([0.01, 0.49])).mean().item())
    assert out["loss_qvalue"].item() == pytest.approx((1.00625**2 + 0.00625**2 + 18.5) / 4)


def test_fawac_weights_are_bounded():
    # Slopes of -10 turn the advantages into 4 and 15, times temperature 2: e^8 and e^30, both above 100.
    loss = FAWACLoss(hand_flow(0.5), hand_critics(-10, -10), temperature=2.0)
    value, metadata = loss.flow_loss(hand_batch(ROWS))
    assert metadata["weight"].item() == 100
    assert value.item() == pytest.approx(25)
    assert FAWACLoss(hand_flow(0.5), hand_critics(-10, -10), temperature=2.0, max_weight=5.0).flow_loss(
        hand_batch(ROWS)
    )[1]["weight"] == pytest.approx(5)


def test_fawac_weights_are_those_of_the_online_critics():
    loss = ready(FAWACLoss(hand_flow(0.5), hand_critics(1, 3)), 0.0, 0.0)
    assert loss(hand_batch(ROWS))["weight"].item() == pytest.approx(torch.tensor([-0.8, -3.0]).exp().mean().item())


# -- gradient walls ---------------------------------------------------------------------------------------------------

WALLS = {
    (FQLLoss, "flow"): {"flow_policy_params"},
    (FQLLoss, "actor"): {"actor_network_params"},
    (FQLLoss, "qvalue"): {"qvalue_network_params"},
    (FBRACLoss, "flow"): {"actor_network_params"},
    (FBRACLoss, "actor"): {"actor_network_params"},
    (FBRACLoss, "qvalue"): {"qvalue_network_params"},
    (FAWACLoss, "flow"): {"actor_network_params"},
    (FAWACLoss, "qvalue"): {"qvalue_network_params"},
}


def make(kind):
    policies = (make_flow(), make_one_step()) if kind is FQLLoss else (make_flow(),)
    loss = kind(*policies, make_critics())
    loss.make_value_estimator(gamma=GAMMA)
    SoftUpdate(loss, tau=0.005)
    return loss


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("kind", "term"), list(WALLS))
def test_each_term_reaches_its_own_part_and_no_other(kind, term, alone):
    loss = make(kind)
    batch = make_batch(64)
    value = getattr(loss, f"{term}_loss")(batch)[0] if alone else loss(batch)[f"loss_{term}"]
    value.backward()
    gradients = {name: p.grad is not None and bool(p.grad.any()) for name, p in loss.named_parameters()}
    touched = {name.split(".")[0] for name, has in gradients.items() if has}
    assert touched == WALLS[kind, term]
    assert all(has for name, has in gradients.items() if name.split(".")[0] in touched), "every parameter of it learns"


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FQLLoss, {"alpha": -1.0}),
        (FQLLoss, {"alpha": float("nan")}),
        (FQLLoss, {"q_aggregation": "max"}),
        (FBRACLoss, {"alpha": -1.0}),
        (FAWACLoss, {"temperature": -1.0}),
        (FAWACLoss, {"max_weight": 0.0}),
    ],
)
def test_options_out_of_range_are_refused(kind, settings):
    policies = (make_flow(), make_one_step()) if kind is FQLLoss else (make_flow(),)
    with pytest.raises(ValueError, match="must"):
        kind(*policies, make_critics(), **settings)


def test_policies_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="must be a OneStepPolicy, got FlowMatchingPolicy"):
        FQLLoss(make_flow(), make_flow(), make_critics())
    with pytest.raises(TypeError, match="FlowMatchingPolicy, got OneStepPolicy"):
        FQLLoss(make_one_step(), make_one_step(), make_critics())
    for kind in (FBRACLoss, FAWACLoss):
        with pytest.raises(TypeError, match="FlowMatchingPolicy, got DeFlowActor"):
            kind(make_actor(), make_critics())
    with pytest.raises(AttributeError, match="freeze_prior_"):  # only losses with a prior have it
        make(FQLLoss).freeze_prior_()


# -- what they are for ------------------------------------------------------------------------------------------------


def test_fql_settles_where_the_pull_of_the_critics_equals_the_distillations():
    # min over mu of alpha (mu - b)^2 - k mu, with mean slope k = 2 and alpha = 10: mu = b + k / (2 alpha) = z + 0.3 + 0.1.
    loss = FQLLoss(hand_flow(0.3), OneStepPolicy(linear([0.0, 0.0]), 1), hand_critics(1, 3), alpha=10.0)
    optimizer = torch.optim.SGD(loss.actor_network_params.parameters(), lr=0.05)
    batch = TensorDict(observation=torch.zeros(64, 1), action=torch.zeros(64, 1), batch_size=[64])
    for _ in range(200):
        batch["noise"] = torch.rand(64, 1) * 0.8 - 0.6  # nothing reaches a bound
        optimizer.zero_grad()
        loss.actor_loss(batch)[0].backward()
        optimizer.step()
    noise = torch.tensor([[-0.5], [0.0], [0.2]])
    output = loss.get_stateful_net("actor_network", copy=False).module(torch.zeros(3, 1), noise)
    torch.testing.assert_close(output.detach(), noise + 0.4, rtol=0, atol=1e-3)


def test_of_two_modes_of_the_data_fawac_clones_the_better():
    # Data at +-0.5 (30 % and 70 % of them, width 0.05) with a reward of 2 a: cloning puts 30 % of the actions above zero.
    sizes = (1, 1, (32, 32))
    policy = FlowMatchingPolicy(make_velocity_network(*sizes), 1, 5)
    loss = FAWACLoss(policy, make_qvalue_networks(*sizes), temperature=3.0)
    loss.make_value_estimator(gamma=GAMMA)
    SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    state, end = torch.zeros(128, 1), torch.ones(128, 1, dtype=torch.bool)
    for _ in range(300):
        action = torch.where(torch.rand(128, 1) < 0.3, 0.5, -0.5) + 0.05 * torch.randn(128, 1)
        following = TensorDict(observation=state, reward=2 * action, done=end, terminated=end, batch_size=[128])
        out = loss(TensorDict(observation=state, action=action, next=following, batch_size=[128]))
        optimizer.zero_grad()
        (out["loss_flow"] + out["loss_qvalue"]).backward()
        optimizer.step()
    with torch.no_grad():
        acted = policy(TensorDict(observation=torch.zeros(2000, 1), batch_size=[2000]))["action"]
    assert (acted > 0).float().mean() > 0.95
    assert acted.median().item() == pytest.approx(0.5, abs=0.15)
