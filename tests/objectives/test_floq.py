"""Flow critics inside losses: against floq written out in plain torch, by properties, and in everything a loss has to stand."""

import copy
import io
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.algorithms import Learner
from deflow_torchrl.algorithms.base import trainable
from deflow_torchrl.modules import (
    DeFlowActor,
    FlowCritic,
    FlowCriticEnsemble,
    FlowMatchingPolicy,
    make_qvalue_networks,
    make_velocity_network,
)
from deflow_torchrl.modules.kernels import use_kernels
from deflow_torchrl.objectives import DeFlowLoss, FQLLoss, IFQLLoss, RefinementLoss, TDCriticLoss
from deflow_torchrl.trainers import StackedUpdate, UpdateStep
from tests.support import flow_critics as floq
from tests.support import networks, value_losses
from tests.support.flow_critics import KINDS, build, doubled, make_batch, make_ensemble, make_flow_critics
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, total


def parts_of(loss):
    return {
        name: getattr(loss, f"{name}_params")
        for name in (
            "actor_network",
            "flow_policy",
            "qvalue_network",
            "flow_critic_network",
            "target_flow_critic_network",
        )
        if f"{name}_params" in loss._modules
    }


def sample(layers, s, z, steps):
    x = z
    for i in range(steps):
        x = x + floq.mlp(layers, torch.cat([s, x, torch.tensor([i / steps], dtype=x.dtype)]), norm=False) / steps
    return x.clamp(-1, 1)


def acting(loss):
    """a' of the loss's acting policy in plain torch."""
    params = loss.actor_network_params
    if isinstance(loss, FQLLoss):
        return lambda s, z: floq.mlp(params["module", "network"], torch.cat([s, z]), norm=False).clamp(-1, 1)
    prior, refinement = (
        params["module", "0", "module", "velocity_network"],
        params["module", "1", "module", "refinement_network"],
    )

    def act(s, z):
        base = sample(prior, s, z, 10)
        return (base + floq.mlp(refinement, torch.cat([s, base]), norm=False)).clamp(-1, 1)

    return act


@pytest.mark.parametrize("how", ["mean", "min"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_critics_terms_are_floqs_written_out_and_go_on_to_be_over_three_updates(kind, how):
    torch.manual_seed(0)
    loss, updater = build(kind, q_aggregation=how, ensemble=make_ensemble(number=2, distilled=2, noise_coverage=0.1))
    loss = loss.double()
    updater = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    by_hand = copy.deepcopy(loss)
    hand_optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-3)
    for _ in range(3):
        batch = doubled(make_batch())
        out = loss(batch.clone())
        flow_critic, qvalue = floq.plain_terms(by_hand, batch, acting(by_hand), how=how)
        torch.testing.assert_close(out["loss_flow_critic"], flow_critic, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(out["loss_qvalue"], qvalue, rtol=1e-9, atol=1e-12)
        for name in ("flow_critic_loss", "qvalue_loss"):
            one = getattr(loss, name)(batch.clone())[0]
            torch.testing.assert_close(one, out[f"loss_{name.removesuffix('_loss')}"], rtol=1e-9, atol=1e-12)
        # The actor's terms are those of a loss with plain critics, held by its own golden test.
        others = sum(
            (value for name, value in by_hand(batch.clone()).items() if name.startswith("loss_")), torch.zeros(())
        )
        others = others - sum(by_hand(batch.clone())[name] for name in ("loss_flow_critic", "loss_qvalue"))
        for step, forward in ((optimizer, total(out)), (hand_optimizer, others + flow_critic + qvalue)):
            step.zero_grad()
            forward.backward()
        # tau of the weights before the step
        with torch.no_grad():
            for target, source in zip(
                by_hand.target_flow_critic_network_params.values(True, True),
                by_hand.flow_critic_network_params.values(True, True),
                strict=True,
            ):
                target.lerp_(source, 0.005)
        updater.step()
        optimizer.step()
        hand_optimizer.step()
    for (name, one), other in zip(loss.state_dict().items(), by_hand.state_dict().values(), strict=True):
        if isinstance(one, torch.Tensor) and one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_each_terms_gradient_stays_with_its_part(kind):
    torch.manual_seed(0)
    loss, _ = build(kind)
    learners = {"loss_flow_critic": {"flow_critic_network"}, "loss_qvalue": {"qvalue_network"}}
    for name, expected in learners.items():
        loss.zero_grad()
        loss(make_batch())[name].backward()
        reached = {
            part
            for part, params in parts_of(loss).items()
            if any(parameter.grad is not None and parameter.grad.any() for parameter in params.parameters())
        }
        assert reached == expected
    for name in loss.out_keys:
        if name.startswith("loss_") and name not in learners:
            loss.zero_grad()
            loss(make_batch())[name].backward()
            for part in ("qvalue_network", "flow_critic_network"):
                assert all(p.grad is None or not p.grad.any() for p in parts_of(loss)[part].parameters()), (name, part)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_targets_and_outputs_have_their_names(kind):
    loss, _ = build(kind)
    assert {"loss_flow_critic", "loss_qvalue", "return_std"} <= set(loss.out_keys)
    assert loss.flow_critic_network_params.batch_size == (2,)
    assert "target_flow_critic_network_params" in loss._modules
    assert "target_qvalue_network_params" not in loss._modules
    out = loss(make_batch())
    assert set(out.keys()) == set(loss.out_keys)


def test_the_actor_climbs_the_distilled_critics():
    torch.manual_seed(0)
    loss, _ = build(FQLLoss)
    batch, before = make_batch(), {}
    before = loss(batch.clone())
    with torch.no_grad():
        for value in loss.flow_critic_network_params.values(True, True):
            value.add_(1.0)
    after = loss(batch.clone())
    torch.testing.assert_close(after["loss_actor"], before["loss_actor"])
    with torch.no_grad():
        loss.qvalue_network_params["module", "mlp", "6", "bias"].add_(1.0)
    torch.testing.assert_close(loss(batch.clone())["q"], before["q"] + 1.0, rtol=1e-4, atol=1e-4)


def test_the_target_updater_moves_the_flow_critics_targets_and_no_others():
    loss, updater = build(DeFlowLoss, tau=0.25)
    before = loss.target_flow_critic_network_params.clone()
    updater.step()
    for key, value in loss.target_flow_critic_network_params.items(True, True):
        expected = 0.75 * before[key] + 0.25 * loss.flow_critic_network_params[key]
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_that_are_not_given_come_in_the_references_order(kind):
    loss, _ = build(kind)
    batch = make_batch(draws=False)
    torch.manual_seed(5)
    drawn = loss(batch.clone())
    torch.manual_seed(5)
    given, n = batch.clone(), 3
    given["next", "noise"] = torch.randn(6, n, ACTION_DIM)
    given["next", "critic_noise"] = torch.rand(6, n, 1)
    given["critic_noise"] = torch.rand(6, n, 1)
    given["critic_time"] = torch.rand(6, n, 1)
    if kind is not TDCriticLoss:
        given["flow_noise"] = torch.randn(6, ACTION_DIM)
        given["flow_time"] = torch.rand(6, 1)
        given["noise"] = torch.randn(6, ACTION_DIM)
    torch.testing.assert_close(loss(given), drawn)


def test_a_terminated_rows_next_state_reaches_no_number_and_no_gradient():
    torch.manual_seed(0)
    loss, _ = build(DeFlowLoss)
    batch = make_batch()
    batch["next", "terminated"] = torch.tensor([True, False, True, False, False, False]).unsqueeze(-1)
    batch["next", "done"] = batch["next", "terminated"].clone()
    expected = loss(batch.clone())
    batch["next", "observation"][0] = float("nan")
    out = loss(batch.clone())
    torch.testing.assert_close(out, expected)
    total(out).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


def test_masked_rows_and_weights_count_as_in_every_loss():
    torch.manual_seed(0)
    loss, _ = build(DeFlowLoss, normalize_q_loss=False)
    batch = make_batch()
    mask = torch.tensor([True, True, False, True, False, True])
    kept = loss(batch[mask].clone())
    padded = batch.clone()
    padded["observation"][2] = float("nan")
    padded["collector", "mask"] = mask
    out = loss(padded)
    for name in ("loss_flow_critic", "loss_qvalue", "return_std"):
        torch.testing.assert_close(out[name], kept[name])
    assert (padded["td_error"][~mask] == 0).all()
    each, _ = build(DeFlowLoss, reduction="none")
    each.load_state_dict(loss.state_dict())
    by_row = each(batch.clone())
    weights = torch.rand(6)
    weighted = loss(batch.clone().set("priority_weight", weights))
    for name in ("loss_flow_critic", "loss_qvalue"):
        torch.testing.assert_close(weighted[name], (by_row[name] * weights).sum() / weights.sum())


def test_of_chunks_that_leave_their_trajectory_no_row_trains_the_critics_and_gamma_is_per_step():
    torch.manual_seed(0)
    loss, _ = build(DeFlowLoss, normalize_q_loss=False)
    each, _ = build(DeFlowLoss, reduction="none")
    each.load_state_dict(loss.state_dict())
    batch = make_batch()
    batch["steps_to_next_obs"] = torch.full((6, 1), 3)
    valid = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    by_row, out = each(batch.clone()), loss(batch.clone().set("valid", valid))
    for name in ("loss_flow_critic", "loss_qvalue"):
        torch.testing.assert_close(out[name], (by_row[name] * valid[:, -1]).mean())
    of_steps, _ = build(DeFlowLoss, gamma=floq.GAMMA**3)
    of_steps.load_state_dict({k: v for k, v in loss.state_dict().items() if "_value_estimator" not in k}, strict=False)
    batch.pop("steps_to_next_obs")
    torch.testing.assert_close(of_steps(batch.clone())["loss_flow_critic"], by_row["loss_flow_critic"].mean())


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("shape", ["plain", "wide"])
def test_kernels_layers_and_a_loop_give_the_same_numbers(generic, shape):
    torch.manual_seed(0)
    hidden = (16, 16) if shape == "plain" else (16, 24)
    critics = make_flow_critics(sizes=(OBSERVATION_DIM, ACTION_DIM, hidden))
    if generic:
        for critic in critics:
            critic.module.velocity_network = nn.Sequential(critic.module.velocity_network)
    results = []
    for kernels, loop in ((True, False), (False, False), (True, True)):
        ensemble = FlowCriticEnsemble(
            copy.deepcopy(critics),
            make_qvalue_networks(OBSERVATION_DIM, ACTION_DIM, HIDDEN),
            noise_samples=3,
            deactivate_vmap=loop,
        )
        loss, _ = build(DeFlowLoss, ensemble=ensemble)
        loss = loss.double()
        if results:
            loss.load_state_dict(results[0][0])
        with use_kernels(kernels):
            torch.manual_seed(1)
            out = loss(doubled(make_batch(draws=False)))
            total(out).backward()
        grads = [p.grad for p in loss.parameters() if p.grad is not None]
        results.append((loss.state_dict(), out.detach(), grads))
    for _, out, grads in results[1:]:
        torch.testing.assert_close(out, results[0][1], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(grads, results[0][2], rtol=1e-7, atol=1e-10)


def test_kernels_in_single_precision_stay_near_the_layers():
    torch.manual_seed(0)
    loss, _ = build(FQLLoss)
    batch = make_batch(32)
    with use_kernels(True):
        fast = loss(batch.clone())
    with use_kernels(False):
        plain = loss(batch.clone())
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


class Spy(nn.Module):
    """A velocity network that notes its inputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape)
        return x[..., :1] * 0 * self.scale


def test_any_network_is_called_with_one_tensor_and_no_loop_over_samples():
    spies = [FlowCritic(Spy(), reward_range=(-1.0, 0.0), gamma=0.9, num_steps=4) for _ in range(2)]
    loss, _ = build(FQLLoss, ensemble=FlowCriticEnsemble(spies, networks.make_critics(), noise_samples=3))
    spies[0].module.velocity_network.seen.clear()
    loss(make_batch())
    seen = spies[0].module.velocity_network.seen
    assert set(seen) == {torch.Size([6, 3, OBSERVATION_DIM + ACTION_DIM + 51])}
    assert len(seen) == 4 + 4 + 1


def test_an_encoder_before_the_prior_runs_once_per_state():
    class Count(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = []

        def forward(self, x):
            self.rows.append(x.shape)
            return x * 2

    count = Count()
    flow = FlowMatchingPolicy(
        make_velocity_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN),
        ACTION_DIM,
        in_keys=("code", "noise"),
        out_keys=("base_action",),
    )
    encoder = TensorDictModule(count, in_keys=["observation"], out_keys=["code"])
    actor = DeFlowActor(TensorDictSequential(encoder, flow), networks.make_actor().refinement_policy)
    loss = DeFlowLoss(actor, make_ensemble())
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    SoftUpdate(loss, tau=0.005)
    loss(make_batch())
    assert set(count.rows) == {torch.Size([6, OBSERVATION_DIM])}


@pytest.mark.parametrize("samples_given", [False, True])
def test_a_frozen_priors_base_actions_are_read_where_there_is_one_for_each_sample(samples_given):
    torch.manual_seed(0)
    loss, _ = build(DeFlowLoss, freeze_prior=True)
    batch = make_batch()
    expected = loss(batch.clone())
    base = loss._sample_prior(batch, batch["noise"])
    batch["base_action"] = base
    following = loss._sample_prior(loss._next(batch), batch["next", "noise"])
    # One base action of s' is not n different ones: it is not taken.
    batch["next", "base_action"] = following if samples_given else torch.zeros_like(base)
    out = loss(batch.clone())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_losses_that_give_one_next_action_refuse_the_critics_in_one_line():
    value = value_losses.make_value_network(OBSERVATION_DIM, HIDDEN)
    with pytest.raises(
        TypeError, match="FlowCriticEnsemble wants 3 actions of each next state, and IFQLLoss gives one"
    ):
        IFQLLoss(networks.make_flow(), make_ensemble(), value)


def test_a_loss_with_plain_critics_has_no_flow_critic_term():
    loss = networks.make_loss()
    with pytest.raises(RuntimeError, match="these critics have no loss_flow_critic, they have loss_qvalue"):
        loss.flow_critic_loss(networks.make_batch())


def test_the_refinement_alone_follows_the_distilled_critics_of_another_loss():
    loss, _ = build(TDCriticLoss)
    refinement = RefinementLoss(loss.actor_network, loss, target_divergence=1e-3)
    assert refinement.critics is loss.critics
    assert refinement(make_batch())["loss_actor"].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_can_be_saved_copied_and_pickled(kind):
    torch.manual_seed(0)
    loss, _ = build(kind)
    batch = make_batch()
    expected = loss(batch.clone())
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other, _ = build(kind)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(batch.clone()), expected)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(twin(batch.clone()), expected)
        with torch.no_grad():
            for value in twin.flow_critic_network_params.values(True, True):
                value.zero_()
        torch.testing.assert_close(loss(batch.clone()), expected)
        assert not torch.equal(twin(batch.clone())["loss_flow_critic"], expected["loss_flow_critic"])


def learner(loss, updater):
    return Learner(
        loss=loss,
        policy=loss.actor_network,
        evaluated_policies={"it": loss.actor_network},
        param_groups=[{"params": trainable(loss), "lr": 1e-3}],
        target_updater=updater,
    )


@pytest.mark.parametrize("kernels", [True, False])
def test_stacked_seeds_train_as_each_would_alone(kernels):
    with use_kernels(kernels):
        updates, alone = [], []
        for made in (updates, alone):
            torch.manual_seed(0)
            made += [UpdateStep(learner(*build(DeFlowLoss))) for _ in range(2)]
        stack = StackedUpdate(updates)
        for _ in range(2):
            batches = [make_batch() for _ in updates]
            together = stack(torch.stack(batches))
            outs = [update(batch.clone()) for update, batch in zip(alone, batches, strict=True)]
            torch.testing.assert_close(together, torch.stack(outs), rtol=1e-4, atol=1e-5)
    for one, other in zip(updates, alone, strict=True):
        torch.testing.assert_close(one.learner.loss.state_dict(), other.learner.loss.state_dict(), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_loss_trains_as_the_eager_one():
    networks.assert_compiled_equals_eager(lambda: build(FQLLoss), [make_batch() for _ in range(2)], "eager")


def test_autocast_keeps_returns_and_targets_in_full():
    torch.manual_seed(0)
    loss, _ = build(DeFlowLoss)
    batch = make_batch()
    expected = loss(batch.clone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(batch.clone())
    assert out["loss_flow_critic"].dtype == torch.float32
    torch.testing.assert_close(out["loss_flow_critic"], expected["loss_flow_critic"], rtol=0.05, atol=0.05)


def bandit(size, reward):
    """One-step episodes of one state: the return is the reward."""
    batch = networks.make_batch(size, noise=False)
    batch["observation"].zero_()
    batch["action"].zero_()
    batch["next", "reward"] = reward
    batch["next", "terminated"] = batch["next", "done"] = torch.ones(size, 1, dtype=torch.bool)
    return batch


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda size: torch.full((size, 1), -1.0), -1.0),
        (lambda size: torch.where(torch.arange(size).unsqueeze(-1) % 4 == 0, -2.0, 0.4), -0.2),
    ],
    ids=["deterministic", "two returns"],
)
def test_the_flow_learns_the_mean_return_and_forgets_its_start(draw, mean):
    torch.manual_seed(0)
    options = {"noise_coverage": 0.5, "sizes": (OBSERVATION_DIM, ACTION_DIM, (16, 16)), "gamma": 0.5}
    ensemble = FlowCriticEnsemble(make_flow_critics(**options), networks.make_critics(), noise_samples=4)
    loss, updater = build(TDCriticLoss, ensemble=ensemble)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    probe = bandit(1, draw(1))
    grid = torch.linspace(0, 1, 17).reshape(1, 17, 1)
    spread_before = loss.critics.returns(probe, grid).std().item()
    for _ in range(400):
        out = loss(bandit(64, draw(64)))
        optimizer.zero_grad()
        total(out).backward()
        optimizer.step()
        updater.step()
        schedule.step()
    returns = loss.critics.returns(probe, grid)
    assert returns.mean().item() == pytest.approx(mean, abs=0.06)
    assert loss.critics.values(probe).mean().item() == pytest.approx(mean, abs=0.06)
    if mean == -1.0:
        assert spread_before > 0.3
        assert returns.std(-1).max() < 0.06
        assert out["return_std"] < 0.06


def test_random_draws_are_uniform_in_their_range():
    loss, _ = build(TDCriticLoss, ensemble=make_ensemble(noise_samples=50))
    draws = loss.critics._draw(make_batch(40, draws=False), "critic_noise")
    assert draws.shape == (40, 50, 1)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
    start = loss.flow_critic_network.module.starts(draws)
    low, high = (0.1 * reward / (1 - floq.GAMMA) for reward in floq.RANGE)
    assert start.min().item() == pytest.approx(low, abs=0.02)
    assert start.max().item() == pytest.approx(high, abs=0.02)
    assert isinstance(loss(make_batch(4, 50, draws=False)), TensorDict)
