"""A frozen prior is out of the update: no loss, no gradient, no call where base actions are given."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import DiffusionActor
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import DeFlowActor, RefinementPolicy, make_qvalue_networks, make_refinement_network
from deflow_torchrl.objectives import DeFlowLoss, RefinementLoss, TDCriticLoss
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, make_actor, make_batch, make_critics, total

KINDS = [RefinementLoss, TDCriticLoss, DeFlowLoss]
ALL = pytest.mark.parametrize("kind", KINDS)
TERMS = {
    RefinementLoss: {"loss_actor", "loss_alpha"},
    TDCriticLoss: {"loss_qvalue"},
    DeFlowLoss: {"loss_actor", "loss_alpha", "loss_qvalue"},
}
READS = {RefinementLoss: ("base_action",), TDCriticLoss: (("next", "base_action"),)}
READS[DeFlowLoss] = READS[RefinementLoss] + READS[TDCriticLoss]


class Uncallable(nn.Module):
    """A prior that is there and must not be used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, *inputs):
        raise AssertionError("the prior was called")


def actor_with(prior):
    refinement = make_refinement_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN)
    return DeFlowActor(prior, RefinementPolicy(refinement, ACTION_DIM, low=-1.0, high=1.0))


def uncallable(in_keys=("observation",)):
    return TensorDictModule(Uncallable(), in_keys=list(in_keys), out_keys=["base_action"])


def build(kind, actor=None, critics=None, **kwargs):
    if kind is RefinementLoss:
        kwargs = {"target_divergence": 1e-3, **kwargs}
    loss = kind(make_actor() if actor is None else actor, make_critics() if critics is None else critics, **kwargs)
    if kind is not RefinementLoss:
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
        SoftUpdate(loss, tau=0.005)
    return loss


def prior_parameters(loss):
    return [p for name, p in loss.named_parameters() if name.startswith("actor_network_params") and "module.0" in name]


def with_base_actions(actor, batch):
    """The base actions of the batch's noise, in the place of the noise."""
    flow = actor.flow_policy.module
    with torch.no_grad():
        batch["base_action"] = flow(batch["observation"], batch["noise"])
        batch["next", "base_action"] = flow(batch["next", "observation"], batch["next", "noise"])
    return batch.exclude("noise", ("next", "noise"), "flow_noise", "flow_time")


@ALL
def test_given_base_actions_replace_the_prior_and_nothing_else(kind):
    actor, critics, batch = make_actor(), make_critics(), make_batch(16)
    expected = build(kind, actor, critics)(batch.clone())
    given = with_base_actions(actor, batch)
    frozen = build(kind, actor_with(uncallable()), critics, freeze_prior=True)
    frozen.load_state_dict(
        build(kind, actor, critics).state_dict() | {k: v for k, v in frozen.state_dict().items() if "module.0" in k},
        strict=False,
    )
    out = frozen(given)
    assert {name for name in out.to_dict() if name.startswith("loss")} == TERMS[kind]
    for name in TERMS[kind]:
        torch.testing.assert_close(out[name], expected[name], rtol=0, atol=0)
    for name in TERMS[kind]:
        value, _ = getattr(frozen, f"{name.removeprefix('loss_')}_loss")(given)
        torch.testing.assert_close(value, out[name], rtol=0, atol=0)


@ALL
def test_without_them_they_are_drawn_as_before(kind):
    actor, critics, batch = make_actor(), make_critics(), make_batch(16)
    expected = build(kind, actor, critics)(batch.clone())
    out = build(kind, actor, critics, freeze_prior=True)(batch)
    for name in TERMS[kind]:
        torch.testing.assert_close(out[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("given", READS[DeFlowLoss])
def test_one_of_the_two_is_given_and_only_the_other_is_drawn(given):
    actor, critics, batch = make_actor(), make_critics(), make_batch(16)
    loss = build(DeFlowLoss, actor, critics, freeze_prior=True)
    expected = loss(batch.clone())
    both = with_base_actions(actor, batch.clone())
    batch[given] = both[given]
    batch[(*given[:-1], "noise") if isinstance(given, tuple) else "noise"].fill_(float("nan"))
    out = loss(batch)
    for name in TERMS[DeFlowLoss]:
        torch.testing.assert_close(out[name], expected[name])


@ALL
def test_a_prior_that_learns_ignores_them(kind):
    # What a collector leaves in the buffer was drawn by an older prior.
    loss, batch = build(kind), make_batch(16)
    expected = loss(batch.clone())
    batch["base_action"] = torch.full((16, ACTION_DIM), float("nan"))
    batch["next", "base_action"] = torch.full((16, ACTION_DIM), float("nan"))
    torch.testing.assert_close(loss(batch).to_dict(), expected.to_dict())


@ALL
def test_out_keys_are_what_forward_returns_and_in_keys_suffice(kind):
    loss = build(kind, freeze_prior=True)
    out = loss(make_batch(noise=False).select(*loss.in_keys))
    assert set(out.keys()) == set(loss.out_keys)
    assert "loss_flow" not in loss.out_keys


@ALL
def test_what_only_the_prior_reads_is_needed_only_where_it_is_called(kind):
    prior = uncallable(("pixels",))
    loss = build(kind, actor_with(prior), freeze_prior=True)
    batch = with_base_actions(make_actor(), make_batch())
    loss(batch)
    for key in READS[kind]:
        with pytest.raises(KeyError, match="pixels"):
            loss(batch.exclude(key))


def test_the_refinement_alone_needs_no_action_of_the_data_where_base_actions_are_given():
    loss = build(RefinementLoss, freeze_prior=True)
    batch = with_base_actions(make_actor(), make_batch())
    expected = loss(batch.clone())
    out = loss(observation=batch["observation"], base_action=batch["base_action"])
    for name, value in zip(loss.out_keys, out, strict=True):
        torch.testing.assert_close(value, expected[name])


def test_dispatch_takes_base_actions_and_honours_select_out_keys():
    loss = build(DeFlowLoss, actor_with(uncallable()), freeze_prior=True)
    batch = with_base_actions(make_actor(), make_batch())
    expected = loss(batch.clone())
    entries = {
        "_".join(key) if isinstance(key, tuple) else key: batch[key]
        for key in batch.keys(True, True)
        if key != ("next", "truncated")
    }
    assert {"base_action", "next_base_action"} <= entries.keys()
    for name, value in zip(loss.out_keys, loss(**entries), strict=True):
        torch.testing.assert_close(value, expected[name])
    loss.select_out_keys("loss_qvalue", "loss_actor")
    qvalue, actor = loss(**entries)
    torch.testing.assert_close((qvalue, actor), (expected["loss_qvalue"], expected["loss_actor"]))


def test_freezing_after_selecting_keeps_the_selection():
    loss = build(DeFlowLoss)
    loss.select_out_keys("loss_flow", "loss_qvalue")
    loss.freeze_prior_()
    assert loss.out_keys == ["loss_qvalue"]
    assert set(loss(make_batch()).keys()) == {"loss_qvalue"}


@ALL
def test_reductions_and_masks_reach_given_base_actions(kind):
    batch = with_base_actions(make_actor(), make_batch(8))
    losses = {}
    for reduction in ("mean", "sum", "none"):
        torch.manual_seed(1)
        losses[reduction] = build(kind, freeze_prior=True, reduction=reduction)
    out = {reduction: loss(batch.clone()) for reduction, loss in losses.items()}
    for name in TERMS[kind]:
        assert out["none"][name].shape == (8,)
        torch.testing.assert_close(out["none"][name].mean(), out["mean"][name])
        torch.testing.assert_close(out["none"][name].sum(), out["sum"][name])
    mask = torch.tensor([True, True, False, True, False, True, True, True])
    expected = losses["mean"](batch[mask])
    for key in ("base_action", ("next", "base_action")):
        batch[key][~mask] = float("nan")
    batch["collector", "mask"] = mask.unsqueeze(-1)
    result = losses["mean"](batch)
    torch.testing.assert_close(result.to_dict(), expected.to_dict())
    total(result).backward()
    gradients = [parameter.grad for parameter in losses["mean"].parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_any_leading_dimensions(shape):
    loss = build(DeFlowLoss, freeze_prior=True)
    batch = with_base_actions(make_actor(), make_batch(6))
    if shape:
        torch.testing.assert_close(loss(batch.reshape(shape)).to_dict(), loss(batch).to_dict())
    else:
        torch.testing.assert_close(loss(batch[0]).to_dict(), loss(batch[:1]).to_dict())


@ALL
def test_renamed_and_nested_keys(kind):
    base = ("draws", "base")
    prior = TensorDictModule(Uncallable(), in_keys=[("sensors", "s")], out_keys=[base])
    refinement = RefinementPolicy(
        make_actor().refinement_policy.module.refinement_network, ACTION_DIM, low=-1.0, high=1.0,
        in_keys=(("sensors", "s"), base), out_keys=("shift", "act"),
    )  # fmt: skip
    critics = make_qvalue_networks(
        OBSERVATION_DIM, ACTION_DIM, HIDDEN, observation_key=("sensors", "s"), action_key="act"
    )
    loss = build(kind, DeFlowActor(prior, refinement), critics, freeze_prior=True)
    loss.set_keys(action="act", reward="gain")
    batch = with_base_actions(make_actor(), make_batch())
    renamed = TensorDict(batch_size=batch.batch_size)
    names = {"observation": ("sensors", "s"), "action": "act", "reward": "gain", "base_action": base}
    for key in batch.keys(True, True):
        prefix, last = (("next",), key[1]) if isinstance(key, tuple) else ((), key)
        new = names.get(last, last)
        renamed[(*prefix, *((new,) if isinstance(new, str) else new))] = batch[key]
    reference = build(kind, actor_with(uncallable()), freeze_prior=True)
    loss.load_state_dict(reference.state_dict())
    torch.testing.assert_close(loss(renamed).to_dict(), reference(batch).to_dict())


@ALL
def test_the_priors_parameters_are_offered_to_no_optimiser_and_get_no_gradient(kind):
    loss = build(kind, freeze_prior=True)
    total(loss(make_batch(64))).backward()
    priors = prior_parameters(loss)
    assert priors
    assert not any(parameter.requires_grad for parameter in priors)
    assert all(parameter.grad is None for parameter in priors)
    learning = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in learning) or kind is not DeFlowLoss


@ALL
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_is_frozen_too(kind, copied):
    loss = copied(build(kind, actor_with(uncallable()), freeze_prior=True))
    loss(with_base_actions(make_actor(), make_batch()))
    assert not any(parameter.requires_grad for parameter in prior_parameters(loss))
    thawed = copied(build(kind))
    thawed.freeze_prior_()
    assert not any(parameter.requires_grad for parameter in prior_parameters(thawed))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_prior_frozen_in_mid_training_stays_bit_for_bit_though_adam_has_momentum(set_to_none):
    results = {}
    for freeze in (True, False):
        torch.manual_seed(0)
        loss = build(DeFlowLoss)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        for step in range(6):
            if step == 3:
                if freeze:
                    loss.freeze_prior_()
                before = {name: value.clone() for name, value in loss.state_dict().items()}
            out = loss(make_batch(16))
            optimizer.zero_grad(set_to_none=set_to_none)
            total(out).backward()
            optimizer.step()
        after = loss.state_dict()
        results[freeze] = {name for name, value in before.items() if not torch.equal(value, after[name])}
    flow = {name for name in results[False] if name.startswith("actor_network_params.module.0")}
    assert flow
    assert results[True] == results[False] - flow


def test_a_frozen_loss_has_no_flow_loss():
    loss = build(DeFlowLoss)
    loss.flow_loss(make_batch())
    loss.freeze_prior_()
    with pytest.raises(RuntimeError, match="frozen"):
        loss.flow_loss(make_batch())
    assert not any("flow_" in str(key) for key in loss._dispatch_keys)


def test_any_prior_is_taken_if_it_does_not_learn():
    with pytest.raises(TypeError, match="FlowMatchingPolicy"):
        DeFlowLoss(actor_with(uncallable()), make_critics())
    prior = DiffusionActor(ACTION_DIM, OBSERVATION_DIM, num_steps=5, out_keys=["base_action"])
    loss = build(DeFlowLoss, actor_with(prior), freeze_prior=True)
    batch = make_batch(64)
    refined = []
    loss.actor_network.refinement_policy.module.register_forward_pre_hook(lambda _, inputs: refined.append(inputs))
    total(loss(batch)).backward()
    (states, base), (_, next_base) = refined
    assert states.shape == (64, OBSERVATION_DIM)
    # Under the losses' deterministic mode a diffusion policy would start from zeros: a function of the state alone.
    twice = torch.cat([batch[:1]] * 64)
    loss(twice)
    assert len(refined[-2][1].unique(dim=0)) == 64
    assert not torch.equal(base, next_base)


def test_the_base_actions_of_s_and_its_successor_are_independent_draws():
    loss, batch = build(DeFlowLoss, freeze_prior=True), make_batch(32, noise=False)
    batch["next", "observation"] = batch["observation"]
    base, following = loss._base_actions(batch, batch["next"])
    assert not torch.isclose(base, following).all(-1).any()


@pytest.mark.slow
def test_compiled_equals_eager_with_given_base_actions():
    batches = [with_base_actions(make_actor(), make_batch(16)) for _ in range(3)]
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        loss = build(DeFlowLoss)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        forward = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        history = []
        for step, batch in enumerate(batches):
            if step == 1:
                loss.freeze_prior_()
            noise = make_batch(16).select("noise", ("next", "noise"), "flow_noise", "flow_time") if step == 0 else None
            out = forward(batch.clone() if noise is None else batch.clone().update(noise))
            optimizer.zero_grad()
            total(out).backward()
            optimizer.step()
            history.append(out.detach().to_dict())
        results.append(history)
    assert [set(out) for out in results[1]] == [set(out) for out in results[0]]
    assert "loss_flow" not in results[1][1]
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=1e-5)


def test_the_shift_of_a_prior_of_another_kind_is_measured_in_full_precision_under_autocast():
    prior = TensorDictModule(nn.Linear(OBSERVATION_DIM, ACTION_DIM), in_keys=["observation"], out_keys=["base_action"])
    refinement = RefinementPolicy(
        make_refinement_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN), ACTION_DIM, low=-1.0, high=1.0
    )
    loss = RefinementLoss(DeFlowActor(prior, refinement), make_critics(), target_divergence=1e-3, freeze_prior=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(make_batch(8))
    assert {out[name].dtype for name in ("divergence", "loss_alpha", "alpha")} == {torch.float32}
