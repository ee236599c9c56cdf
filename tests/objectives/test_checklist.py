"""What every loss of the package owes to a TorchRL user (keys, masks, weights, dtypes, state, compile)."""

import copy
import shutil

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.objectives.value import TDLambdaEstimator

from deflow_torchrl.modules import (
    DeFlowActor,
    FlowMatchingPolicy,
    OneStepPolicy,
    RefinementPolicy,
    TanhGaussianPolicy,
    make_qvalue_networks,
)
from deflow_torchrl.objectives import (
    BCLoss,
    DeFlowLoss,
    FAWACLoss,
    FBRACLoss,
    FlowMatchingLoss,
    FQLLoss,
    ImplicitQLoss,
    IQLLoss,
    RefinementLoss,
    RLPDLoss,
    TDCriticLoss,
)
from tests.support import value_losses
from tests.support.losses import NEWEST, TERMS, WITH_CRITIC, batch_of, build
from tests.support.networks import (
    ACTION_DIM,
    OBSERVATION_DIM,
    assert_compiled_equals_eager,
    make_actor,
    make_critics,
    make_one_step,
    make_tanh_gaussian,
    total,
)
from tests.support.value_losses import make_batch

ALL = pytest.mark.parametrize("kind", list(TERMS), ids=lambda kind: kind.__name__)
# What differs by the policy: the other losses' is in test_checklist_values.py.
SAMPLING = pytest.mark.parametrize(
    "kind", [kind for kind in TERMS if kind not in {**value_losses.TERMS, **NEWEST}], ids=lambda kind: kind.__name__
)
WITH_FLOW = [kind for kind, terms in TERMS.items() if "loss_flow" in terms]
CRITICS = pytest.mark.parametrize("kind", WITH_CRITIC, ids=lambda kind: kind.__name__)


@ALL
def test_construction_does_not_warn_and_out_keys_are_what_forward_returns(kind):
    loss = build(kind)
    out = loss(batch_of(kind))
    assert set(out.keys()) == set(loss.out_keys)
    assert {name for name, _ in out.items() if name.startswith("loss")} == TERMS[kind]
    assert all(value.grad_fn is None for name, value in out.items() if not name.startswith("loss"))


@ALL
def test_in_keys_are_sufficient_and_each_is_necessary(kind):
    loss = build(kind)
    batch = batch_of(kind, noise=False)
    loss(batch.select(*loss.in_keys))
    for key in loss.in_keys:
        rest = batch.select(*(other for other in loss.in_keys if other != key))
        if key == ("next", "terminated"):  # done stands in for it: see test_contracts.py
            continue
        with pytest.raises(KeyError, match=str(key[-1] if isinstance(key, tuple) else key)):
            loss(rest)


@ALL
def test_the_input_is_left_as_it_is_but_for_the_priority(kind):
    batch = batch_of(kind)
    before = batch.clone()
    build(kind)(batch)
    added = set(batch.keys(True, True)) - set(before.keys(True, True))
    assert added == ({"td_error"} if kind in WITH_CRITIC else set())
    torch.testing.assert_close(batch.select(*before.keys(True, True)).to_dict(), before.to_dict())


@ALL
def test_dispatch_with_keyword_arguments_equals_the_tensordict_call(kind):
    loss = build(kind)
    batch = batch_of(kind)
    expected = loss(batch.clone())
    given = [key for key in loss._dispatch_keys if key in batch.keys(True)]
    assert any("noise" in str(key) for key in given) == (kind not in (BCLoss, ImplicitQLoss, IQLLoss))
    arguments = {"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in given}
    out = loss(**arguments)
    out = (out,) if torch.is_tensor(out) else out
    for name, value in zip(loss.out_keys, out, strict=True):
        torch.testing.assert_close(value, expected[name])


def test_dispatch_honours_select_out_keys():
    loss = build(DeFlowLoss).select_out_keys("loss_qvalue", "loss_flow")
    batch = make_batch(noise=False)
    out = loss(
        observation=batch["observation"],
        action=batch["action"],
        next_observation=batch["next", "observation"],
        next_reward=batch["next", "reward"],
        next_done=batch["next", "done"],
        next_terminated=batch["next", "terminated"],
    )
    assert len(out) == 2


@ALL
def test_forward_is_the_terms_methods_together(kind):
    loss = build(kind)
    batch = batch_of(kind)
    out = loss(batch)
    for name in TERMS[kind]:
        value, metadata = getattr(loss, f"{name.removeprefix('loss_')}_loss")(batch)
        torch.testing.assert_close(value, out[name])
        assert not any(entry.requires_grad for entry in metadata.values())


@SAMPLING
def test_noise_given_equals_noise_drawn_with_the_same_seed(kind):
    loss = build(kind)
    batch = batch_of(kind, noise=False)
    torch.manual_seed(5)
    drawn = loss(batch.clone())
    torch.manual_seed(5)
    given = batch.clone()
    if kind is RLPDLoss:
        given["next", "noise"] = torch.randn(8, ACTION_DIM)
    if kind not in (FlowMatchingLoss, TDCriticLoss):
        given["noise"] = torch.randn(8, ACTION_DIM)
    if kind in WITH_CRITIC and kind is not RLPDLoss:
        given["next", "noise"] = torch.randn(8, ACTION_DIM)
    if kind in WITH_FLOW:
        given["flow_noise"] = torch.randn(8, ACTION_DIM)
        given["flow_time"] = torch.rand(8, 1)
    torch.manual_seed(99)
    torch.testing.assert_close(loss(given).to_dict(), drawn.to_dict(), rtol=0, atol=0)


@ALL
def test_reductions_agree(kind):
    batch = batch_of(kind, 6, 5)
    losses = {}
    for reduction in ("mean", "sum", "none"):
        torch.manual_seed(1)
        losses[reduction] = build(kind, reduction=reduction)(batch.clone())
    assert losses["none"].batch_size == batch.batch_size
    for name in TERMS[kind]:
        assert losses["none"][name].shape == batch.shape
        torch.testing.assert_close(losses["none"][name].mean(), losses["mean"][name])
        torch.testing.assert_close(losses["none"][name].sum(), losses["sum"][name])
    with pytest.raises(ValueError, match="reduction"):
        build(kind, reduction="median")


@ALL
def test_masked_rows_count_for_nothing_even_if_nan(kind):
    loss = build(kind)
    batch = batch_of(kind, 8)
    mask = torch.tensor([True, True, False, True, False, True, True, True])
    expected = loss(batch[mask])
    poisoned = batch.clone()
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        poisoned[key][~mask] = float("nan")
    poisoned["collector", "mask"] = mask.unsqueeze(-1)
    out = loss(poisoned)
    torch.testing.assert_close(out.to_dict(), expected.to_dict())
    total(out).backward()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters() if parameter.grad is not None)


@ALL
@pytest.mark.parametrize("weighted", [False, True])
def test_an_all_false_mask_gives_zero_losses_and_finite_gradients(kind, weighted):
    loss = build(kind)
    batch = batch_of(kind, 4)
    batch["collector", "mask"] = torch.zeros(4, 1, dtype=torch.bool)
    if weighted:
        batch["priority_weight"] = torch.rand(4)
    out = loss(batch)
    total(out).backward()
    assert all(out[name] == 0 for name in TERMS[kind])
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters() if parameter.grad is not None)


@ALL
@pytest.mark.parametrize("shape", [(), (1,)])
def test_priority_weights_give_the_weighted_mean(kind, shape):
    batch = batch_of(kind, 8)
    torch.manual_seed(1)
    terms = build(kind, reduction="none")(batch.clone())
    weights = torch.rand(8)
    batch["priority_weight"] = weights.reshape(8, *shape)
    torch.manual_seed(1)
    out = build(kind)(batch)
    for name in TERMS[kind]:
        torch.testing.assert_close(out[name], (terms[name] * weights).sum() / weights.sum())
    batch["priority_weight"].zero_()
    assert all(build(kind)(batch)[name].isfinite() for name in TERMS[kind])


@ALL
def test_leading_batch_dimensions_are_a_reshape(kind):
    loss = build(kind)
    batch = batch_of(kind, 12)
    torch.testing.assert_close(loss(batch.reshape(4, 3)).to_dict(), loss(batch).to_dict())


@ALL
def test_float64(kind):
    loss = build(kind).to(torch.float64)
    batch = batch_of(kind).apply(lambda entry: entry.double() if entry.is_floating_point() else entry)
    out = loss(batch)
    total(out).backward()
    assert all(out[name].dtype == torch.float64 for name in TERMS[kind])
    # And back, after use: no cached view of the parameters stays behind in the other type.
    single = loss.float()(batch.apply(lambda entry: entry.float() if entry.is_floating_point() else entry))
    for name in TERMS[kind]:
        torch.testing.assert_close(single[name], out[name].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [DeFlowLoss, FQLLoss, FBRACLoss, FAWACLoss])
def test_unbatched_input_equals_a_batch_of_one(kind):
    loss = build(kind)
    batch = batch_of(kind, 1)
    torch.testing.assert_close(loss(batch[0]).to_dict(), loss(batch).to_dict())


@CRITICS
def test_masked_rows_get_no_priority(kind):
    batch = batch_of(kind, 4)
    batch["collector", "mask"] = torch.tensor([[True], [False], [True], [False]])
    build(kind)(batch)
    assert (batch["td_error"] > 0).tolist() == [True, False, True, False]


def test_changing_type_without_target_critics():
    loss = build(TDCriticLoss, delay_qvalue=False)
    batch = make_batch()
    loss(batch)
    loss.double()(batch.apply(lambda entry: entry.double() if entry.is_floating_point() else entry))


@SAMPLING
def test_renamed_and_nested_keys(kind):
    reference = build(kind)
    batch = batch_of(kind)
    expected = reference(batch)
    names = {
        "action": ("agent", "act"),
        "reward": "gain",
        "done": ("flags", "end"),
        "terminated": ("flags", "stop"),
        "noise": ("draws", "z"),
        "flow_noise": ("draws", "x0"),
        "flow_time": ("draws", "t"),
        "priority": "prio",
        "state_action_value": "q",
    }
    torch.manual_seed(0)
    flow = make_actor().flow_policy.module
    refinement = make_actor().refinement_policy.module
    actor = DeFlowActor(
        FlowMatchingPolicy(flow.velocity_network, ACTION_DIM, in_keys=(("sensors", "s"), "z"), out_keys=("base",)),
        RefinementPolicy(
            refinement.refinement_network,
            ACTION_DIM,
            low=-1.0,
            high=1.0,
            in_keys=(("sensors", "s"), "base"),
            out_keys=("shift", ("agent", "act")),
        ),
    )
    critics = make_qvalue_networks(
        OBSERVATION_DIM, ACTION_DIM, (16, 16), observation_key=("sensors", "s"), action_key=("agent", "act")
    )
    for critic in critics:
        critic.out_keys = ["q"]
    as_policy = FlowMatchingPolicy(
        flow.velocity_network, ACTION_DIM, in_keys=(("sensors", "s"), "z"), out_keys=(("agent", "act"),)
    )
    if kind is FlowMatchingLoss:
        loss = kind(actor.flow_policy)
    elif kind is FQLLoss:
        one_step = OneStepPolicy(make_one_step().module.network, ACTION_DIM, in_keys=(("sensors", "s"), "z"))
        loss = kind(as_policy, one_step, critics)
    elif kind in (FBRACLoss, FAWACLoss):
        loss = kind(as_policy, critics)
    elif kind is RLPDLoss:
        network = make_tanh_gaussian().module.network
        loss = kind(TanhGaussianPolicy(network, in_keys=(("sensors", "s"),), out_keys=(("agent", "act"),)), critics)
    else:
        loss = kind(actor, critics, **({"target_divergence": 1e-3} if kind is RefinementLoss else {}))
    loss.set_keys(**names)
    if kind in WITH_CRITIC:
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    loss.load_state_dict(reference.state_dict())
    renamed = TensorDict(batch_size=batch.batch_size)
    for key in batch.keys(True, True):
        prefix, last = (("next",), key[1]) if isinstance(key, tuple) else ((), key)
        new = ("sensors", "s") if last == "observation" else names.get(last, last)
        renamed[(*prefix, *((new,) if isinstance(new, str) else new))] = batch[key]
    assert all(key in renamed.keys(True) for key in loss.in_keys)
    torch.testing.assert_close(loss(renamed).to_dict(), expected.to_dict())
    if kind in WITH_CRITIC:
        torch.testing.assert_close(renamed["prio"], batch["td_error"])
    with pytest.raises(ValueError, match="not an accepted"):
        loss.set_keys(no_such_key="x")


@ALL
def test_state_dict_round_trip_and_deepcopy(kind):
    torch.manual_seed(1)
    first = build(kind)
    torch.manual_seed(2)
    second = build(kind)
    batch = batch_of(kind)
    assert not torch.allclose(total(first(batch)), total(second(batch)))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(batch).to_dict(), first(batch).to_dict())
    copied = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(copied(batch).to_dict(), second(batch).to_dict())


@ALL
def test_reset_parameters_recursive_changes_every_network_including_targets(kind):
    loss = build(kind)
    before = {name: value.clone() for name, value in loss.state_dict().items() if "weight" in name and value.ndim > 1}
    loss.reset_parameters_recursive()
    after = loss.state_dict()
    matrices = [
        name for name in before if not (before[name] == 1).all()
    ]  # a fresh LayerNorm is all ones before and after
    assert matrices
    assert not [name for name in matrices if torch.equal(before[name], after[name])]


@SAMPLING
def test_the_acting_policy_is_where_trainers_look_for_it(kind):
    if kind is FlowMatchingLoss:
        pytest.skip("flow matching alone has no composite actor")
    loss = build(kind)
    policy = loss.get_stateful_net("actor_network", copy=False)
    kinds = {
        FQLLoss: OneStepPolicy,
        FBRACLoss: FlowMatchingPolicy,
        FAWACLoss: FlowMatchingPolicy,
        RLPDLoss: TanhGaussianPolicy,
    }
    assert isinstance(policy, kinds.get(kind, DeFlowActor))
    assert {id(p) for p in policy.parameters()} <= {id(p) for p in loss.parameters()}


@ALL
def test_losses_pickle(kind):
    import pickle

    loss = build(kind)
    batch = batch_of(kind)
    torch.testing.assert_close(pickle.loads(pickle.dumps(loss))(batch).to_dict(), loss(batch).to_dict())


@CRITICS
def test_value_estimators_other_than_td0_are_refused(kind):
    with pytest.raises(NotImplementedError):
        build(kind).make_value_estimator(ValueEstimators.TDLambda)


@pytest.mark.parametrize("kind", [kind for kind in WITH_CRITIC if kind not in value_losses.TERMS])
def test_the_target_warning_is_there_until_a_soft_update_is_built(kind):
    loss = build(kind, updated=False)
    with pytest.warns(UserWarning, match="No target network updater"):
        loss(batch_of(kind))
    SoftUpdate(loss, tau=0.1)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(batch_of(kind))


def test_a_list_of_critics_keeps_its_initialisation_and_one_module_is_copied():
    critics = make_critics()
    loss = DeFlowLoss(make_actor(), critics)
    for number, critic in enumerate(critics):
        for name, parameter in critic.named_parameters():
            torch.testing.assert_close(loss.qvalue_network_params.get(tuple(name.split(".")))[number], parameter)
    single = make_critics()[0]
    loss = DeFlowLoss(make_actor(), single, num_qvalue_nets=3)
    first = loss.qvalue_network_params.get(("module", "mlp", "0", "weight"))
    torch.testing.assert_close(first[0], single.module.mlp[0].weight)
    assert first.shape[0] == 3
    assert not torch.equal(first[0], first[1])
    assert (
        first.abs().max() <= (6 / (OBSERVATION_DIM + ACTION_DIM + 16)) ** 0.5
    )  # the layer's own initialiser, not a redraw
    with pytest.raises(ValueError, match="empty list"):
        DeFlowLoss(make_actor(), [])


@CRITICS
def test_deactivate_vmap_changes_nothing(kind):
    batch = batch_of(kind)
    results = []
    for deactivate in (False, True):
        torch.manual_seed(1)
        results.append(build(kind, deactivate_vmap=deactivate)(batch.clone()).to_dict())
    torch.testing.assert_close(*results)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize(
    ("kind", "backend", "settings"),
    [
        (DeFlowLoss, "inductor", {"min_alpha": 0.01, "max_alpha": 10.0}),
        # Two steps of the flow and a backend that writes no C++: compiling is what takes the time.
        (FQLLoss, "aot_eager", {"normalize_q_loss": True, "flow_steps": 2}),
        pytest.param(FQLLoss, "inductor", {}, marks=pytest.mark.slow),
        pytest.param(FBRACLoss, "aot_eager", {"flow_steps": 2}, marks=pytest.mark.slow),
        pytest.param(FAWACLoss, "aot_eager", {"temperature": 3.0, "flow_steps": 2}, marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager_over_optimiser_and_target_updates(kind, backend, settings):
    def make():
        loss = build(kind, q_aggregation="min", **settings)
        return loss, SoftUpdate(loss, tau=0.1)

    assert_compiled_equals_eager(make, [batch_of(kind, 16) for _ in range(20)], backend)


@CRITICS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
def test_flags_that_are_numbers_mean_what_booleans_do(kind, dtype):
    batch = batch_of(kind)
    batch["next", "terminated"][0] = batch["next", "done"][0] = True
    numbers = batch.clone()
    for key in ("terminated", "done"):
        numbers["next", key] = batch["next", key].to(dtype)
    loss, results = build(kind), []
    for td in (batch, numbers):
        torch.manual_seed(1)
        results.append(loss(td).to_dict())
    torch.testing.assert_close(*results)


def test_a_coefficient_that_was_not_set_can_be_set_in_mid_training():
    loss = build(DeFlowLoss)
    loss.max_alpha = 0.5
    assert loss(batch_of(DeFlowLoss))["alpha"] == 0.5
    assert "max_alpha" in loss.state_dict()
    loss.max_alpha = None
    loss.max_alpha = 0.25
    assert float(loss.alpha) == 0.25


def test_nested_weights_are_found_and_may_be_missing():
    loss, batch = build(DeFlowLoss), batch_of(DeFlowLoss)
    loss.set_keys(priority_weight=("replay", "weight"))
    plain = loss(batch.clone())
    batch["replay", "weight"] = torch.ones(batch.batch_size)
    torch.testing.assert_close(loss(batch).to_dict(), plain.to_dict())
    batch["replay", "weight"] = torch.arange(len(batch)).float()
    assert not torch.allclose(loss(batch)["loss_qvalue"], plain["loss_qvalue"])


@pytest.mark.parametrize("key", ["noise", "flow_noise", "flow_time"])
def test_draws_of_another_width_are_refused(key):
    batch = batch_of(DeFlowLoss)
    wrong = batch["flow_noise"][:, :2] if key == "flow_time" else batch[key][:, :1]
    with pytest.raises(ValueError, match=rf"'{key}' has the shape .*, and its last dimension must be"):
        build(DeFlowLoss)(batch.set(key, wrong))


def test_an_estimator_over_time_is_refused_as_an_object_too():
    for estimator in (TDLambdaEstimator, TDLambdaEstimator(gamma=0.9, lmbda=0.9, value_network=None)):
        with pytest.raises(NotImplementedError, match="TDLambdaEstimator is not for DeFlowLoss"):
            build(DeFlowLoss).make_value_estimator(estimator)
