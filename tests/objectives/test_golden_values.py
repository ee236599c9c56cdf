"""BC, IQL, IFQL and ReBRAC on networks that answer known numbers, against results derived by hand in the tests."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.objectives import IQLLoss as TorchRLIQLLoss
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.algorithms import ReBRACConfig, get_algorithm
from deflow_torchrl.modules import make_value_network
from deflow_torchrl.objectives import BCLoss, IFQLLoss, ImplicitQLoss, IQLLoss, ReBRACLoss
from deflow_torchrl.trainers import UpdateStep
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, make_critics
from tests.support.updates import PROBLEM
from tests.support.value_losses import build, make_batch


@torch.no_grad()
def critics_return(params, *values):
    """Let critic j answer ``values[j]`` everywhere."""
    last = max(params["module", "mlp"].keys(), key=int)
    params["module", "mlp", last, "weight"].zero_()
    params["module", "mlp", last, "bias"].copy_(torch.tensor(values).unsqueeze(-1))


@torch.no_grad()
def answers(params, *path, values):
    """Let the last layer of an MLP's parameters answer these values."""
    mlp = params[path]
    last = max(mlp.keys(), key=int)
    params[(*path, last, "weight")].zero_()
    params[(*path, last, "bias")].copy_(torch.tensor(values))


def one(*, reward=1.0, terminated=False, action=0.0, next_action=0.0, noise=0.0):
    """One transition."""
    flag = torch.tensor([[terminated]])
    return TensorDict(
        observation=torch.zeros(1, OBSERVATION_DIM),
        action=torch.full((1, ACTION_DIM), action),
        next=TensorDict(
            observation=torch.zeros(1, OBSERVATION_DIM),
            action=torch.full((1, ACTION_DIM), next_action),
            noise=torch.full((1, ACTION_DIM), noise),
            reward=torch.tensor([[reward]]),
            terminated=flag,
            done=flag.clone(),
            batch_size=[1],
        ),
        batch_size=[1],
    )


def iql(*, value, online=(0.0, 0.0), target=(0.0, 0.0), kind=IQLLoss, **options):
    loss = build(kind, **options)
    critics_return(loss.qvalue_network_params, *online)
    critics_return(loss.target_qvalue_network_params, *target)
    answers(loss.value_network_params, "module", values=[value])
    return loss


@pytest.mark.parametrize("kind", [ImplicitQLoss, IQLLoss, IFQLLoss])
@pytest.mark.parametrize(
    ("target", "value", "expected"),
    [
        ((3.0, 5.0), 1.0, 0.9 * 2.0**2),  # u = min(3, 5) - 1 = 2 > 0: weight 0.9
        ((5.0, 3.0), 4.0, 0.1 * 1.0**2),  # u = 3 - 4 = -1 < 0: weight |0.9 - 1| = 0.1
        ((2.0, 2.0), 2.0, 0.0),
    ],
)
def test_the_value_is_regressed_on_the_smaller_target_critic_by_expectiles(kind, target, value, expected):
    # The online critics are far away: they must not enter.
    loss = iql(kind=kind, value=value, target=target, online=(-50.0, -60.0))
    assert loss.value_loss(one())[0].item() == pytest.approx(expected, abs=1e-5)
    assert loss(one())["loss_value"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", [ImplicitQLoss, IQLLoss, IFQLLoss])
@pytest.mark.parametrize(("terminated", "y"), [(False, 1.0 + 0.9 * 4.0), (True, 1.0)])
def test_the_critics_are_summed_over_and_bootstrap_from_the_value_unless_terminated(kind, terminated, y):
    loss = iql(kind=kind, value=4.0, online=(2.0, 3.0), target=(70.0, 80.0))
    batch = one(terminated=terminated)
    out = loss(batch)
    assert out["loss_qvalue"].item() == pytest.approx((2.0 - y) ** 2 + (3.0 - y) ** 2, rel=1e-5)
    assert batch["td_error"].item() == pytest.approx(max(abs(2.0 - y), abs(3.0 - y)), rel=1e-5)


@pytest.mark.parametrize(
    ("online", "weight"),
    [
        ((2.5, 3.0), math.exp(2.0 * (2.5 - 2.0))),
        ((1.0, 3.0), math.exp(2.0 * (1.0 - 2.0))),
        ((9.0, 9.0), 100.0),  # exp(14) is clipped
    ],
)
def test_the_policys_weight_is_of_the_smaller_online_critic_and_clipped_at_a_hundred(online, weight):
    loss = iql(value=2.0, online=online, target=(-30.0, 40.0), temperature=2.0)
    answers(loss.actor_network_params, "module", "mean_network", values=[0.5] * ACTION_DIM)
    # log N(-0.5; 0.5, I) in 3 dimensions: -(3 * 1 / 2 + 3/2 log 2 pi)
    log_prob = -1.5 - 1.5 * math.log(2 * math.pi)
    batch = one(action=-0.5)
    assert loss(batch)["loss_actor"].item() == pytest.approx(-weight * log_prob, rel=1e-4)
    assert loss.actor_loss(batch)[0].item() == pytest.approx(-weight * log_prob, rel=1e-4)


def test_behavioural_cloning_is_half_the_squared_distance_and_a_constant():
    loss = build(BCLoss)
    answers(loss.actor_network_params, "module", "mean_network", values=[0.1, 0.2, -0.3])
    batch = one(action=0.5)
    squared = 0.4**2 + 0.3**2 + 0.8**2
    constant = 1.5 * math.log(2 * math.pi)
    assert loss(batch)["loss_actor"].item() == pytest.approx(squared / 2 + constant, rel=1e-5)
    # The mean is unbounded: BC is trained on what it is before it is clipped to act.
    answers(loss.actor_network_params, "module", "mean_network", values=[2.0, 2.0, 2.0])
    assert loss(batch)["loss_actor"].item() == pytest.approx(3 * 1.5**2 / 2 + constant, rel=1e-5)


def rebrac(*, online=(0.0, 0.0), target=(0.0, 0.0), acts=0.0, target_acts=0.0):
    loss = build(ReBRACLoss, actor_bc_coef=0.3, critic_bc_coef=0.2)
    critics_return(loss.qvalue_network_params, *online)
    critics_return(loss.target_qvalue_network_params, *target)
    for params, action in ((loss.actor_network_params, acts), (loss.target_actor_network_params, target_acts)):
        answers(params, "module", "network", values=[math.atanh(action)] * ACTION_DIM)
    return loss


@pytest.mark.parametrize(
    ("noise", "next_action", "distance"),
    [
        (0.0, 0.5, 0.1),  # a' = 0.6: no noise
        (1.0, 0.5, 0.3),  # 0.6 + 0.2 * 1 = 0.8
        (-4.0, 0.5, -0.4),  # 0.2 * -4 = -0.8 is clipped to -0.5: 0.1
        (2.4, 0.5, 0.5),  # 0.6 + 0.48 = 1.08 is clipped to 1
    ],
)
def test_the_target_is_smoothed_and_penalised_by_the_sum_of_squares(noise, next_action, distance):
    loss = rebrac(online=(1.0, 2.0), target=(5.0, 4.0), acts=-0.9, target_acts=0.6)
    y = 1.0 + 0.9 * (4.0 - 0.2 * 3 * distance**2)
    batch = one(next_action=next_action, noise=noise)
    # The mean over the two critics, as in TDCriticLoss.
    assert loss(batch)["loss_qvalue"].item() == pytest.approx(((1 - y) ** 2 + (2 - y) ** 2) / 2, rel=1e-5)
    assert loss.qvalue_loss(batch)[0].item() == pytest.approx(((1 - y) ** 2 + (2 - y) ** 2) / 2, rel=1e-5)


def test_the_penalty_of_the_target_ends_with_the_episode():
    loss = rebrac(online=(1.0, 1.0), target=(5.0, 4.0), target_acts=0.6)
    assert loss(one(terminated=True, next_action=-1.0))["loss_qvalue"].item() == pytest.approx(0.0, abs=1e-9)


def test_the_actor_climbs_the_normalised_smaller_critic_and_pays_for_the_distance():
    loss = rebrac(online=(-4.0, 7.0), target=(90.0, 90.0), acts=0.5, target_acts=-0.9)
    # -min Q / mean|min Q| = 4 / 4 = 1, and 0.3 * 3 * (0.5 - 0.1)^2
    assert loss(one(action=0.1))["loss_actor"].item() == pytest.approx(1.0 + 0.3 * 3 * 0.16, rel=1e-5)


def test_rebrac_moves_policy_and_targets_at_every_second_update():
    update = UpdateStep(get_algorithm("rebrac").build(ReBRACConfig(actor_bc_coef=0.1, critic_bc_coef=0.1), PROBLEM))
    loss = update.learner.loss
    parts = ("actor_network_params", "qvalue_network_params", "target_actor_network_params")
    parts += ("target_qvalue_network_params",)
    before, moved = {name: getattr(loss, name).clone() for name in parts}, []
    for _ in range(4):
        update(make_batch(16))
        after = {name: getattr(loss, name).clone() for name in parts}
        moved.append([not bool((after[name] == before[name]).all()) for name in parts])
        before = after
    # Targets follow the networks of before the step: the policy's first move is seen by its target two updates later. In the
    # third update the momentum of the shared Adam still moves the policy (as in FQL's code).
    assert moved == [
        [False, True, False, False],
        [True, True, False, True],
        [True, True, False, False],
        [True, True, True, True],
    ]


class _Normal(torch.distributions.Independent):
    def __init__(self, loc):
        super().__init__(torch.distributions.Normal(loc, torch.ones_like(loc)), 1)


def torchrls(ours):
    """TorchRL's IQLLoss on the networks of ours."""
    mean = TensorDictModule(ours.actor_network.module.mean_network, in_keys=["observation"], out_keys=["loc"])
    actor = ProbabilisticTensorDictSequential(
        mean,
        ProbabilisticTensorDictModule(
            in_keys=["loc"], out_keys=["action"], distribution_class=_Normal, return_log_prob=True
        ),
    )
    theirs = TorchRLIQLLoss(
        actor,
        make_critics(),
        value_network=make_value_network(OBSERVATION_DIM, HIDDEN),
        loss_function="l2",
        temperature=float(ours.temperature),
        expectile=float(ours.expectile),
    )
    theirs.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    SoftUpdate(theirs, tau=0.005)
    pairs = [
        (theirs.value_network_params, ours.value_network_params),
        (theirs.qvalue_network_params, ours.qvalue_network_params),
        (theirs.target_qvalue_network_params, ours.target_qvalue_network_params),
        (theirs.actor_network_params["module", "0", "module"], ours.actor_network_params["module", "mean_network"]),
    ]
    with torch.no_grad():
        for own, others in pairs:
            own.update_(others.detach())
    return theirs


def test_torchrls_iql_agrees_but_for_the_critics_in_its_weights_and_its_masks():
    torch.manual_seed(2)
    ours, batch = build(IQLLoss, tau=0.5), make_batch(32)
    theirs = torchrls(ours)
    names = ("loss_value", "loss_qvalue", "loss_actor")
    same = theirs(batch.clone())
    for name in names:  # targets equal the critics
        torch.testing.assert_close(same[name], ours(batch.clone())[name], rtol=1e-5, atol=1e-6)

    with torch.no_grad():
        for parameter in ours.qvalue_network_params.values(True, True):
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs = torchrls(ours)
    given, mine = batch.clone(), batch.clone()
    out, expected = theirs(given), ours(mine)
    for name in names[:2]:
        torch.testing.assert_close(out[name], expected[name], rtol=1e-5, atol=1e-6)
    assert (out["loss_actor"] - expected["loss_actor"]).abs() > 1e-2, "theirs weighs by the target critics"
    torch.testing.assert_close(given["td_error"], mine["td_error"].square(), rtol=1e-4, atol=1e-5)
    assert set(given.keys()) - set(mine.keys()) == {"_log_prob", "loc"}

    masked = batch.clone()
    masked["collector", "mask"] = torch.zeros(32, 1, dtype=torch.bool)
    masked["collector", "mask"][:16] = True
    torch.testing.assert_close(ours(masked.clone())["loss_qvalue"], ours(batch[:16].clone())["loss_qvalue"])
    assert (theirs(masked.clone())["loss_qvalue"] - out["loss_qvalue"]).abs() < 1e-6, "theirs counts the padding"
    masked["next", "reward"][16:] = float("nan")
    assert not theirs(masked.clone())["loss_qvalue"].isfinite()
    assert ours(masked)["loss_qvalue"].isfinite()
