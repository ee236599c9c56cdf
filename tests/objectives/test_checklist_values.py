"""The checklist of every loss, for BC, IQL, IFQL and ReBRAC."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import ValueEstimators

from deflow_torchrl.modules import (
    DeterministicPolicy,
    FlowMatchingPolicy,
    GaussianPolicy,
    make_policy_network,
    make_qvalue_networks,
    make_value_network,
    make_velocity_network,
)
from deflow_torchrl.objectives import BCLoss, IFQLLoss, ImplicitQLoss, IQLLoss, ReBRACLoss
from tests.conftest import ACTION_DIM, HIDDEN, OBSERVATION_DIM, total
from tests.objectives import test_checklist as checklist
from tests.objectives.value_losses import KINDS, SIZES, TERMS, build, make_batch

ALL = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
CRITICS = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind is not BCLoss], ids=lambda kind: kind.__name__
)
SHARED = {
    checklist.test_construction_does_not_warn_and_out_keys_are_what_forward_returns: {},
    checklist.test_in_keys_are_sufficient_and_each_is_necessary: {},
    checklist.test_forward_is_the_terms_methods_together: {},
    checklist.test_reductions_agree: {},
    checklist.test_masked_rows_count_for_nothing_even_if_nan: {},
    checklist.test_an_all_false_mask_gives_zero_losses_and_finite_gradients: {"weighted": True},
    checklist.test_priority_weights_give_the_weighted_mean: {"shape": (1,)},
    checklist.test_leading_batch_dimensions_are_a_reshape: {},
    checklist.test_float64: {},
    checklist.test_state_dict_round_trip_and_deepcopy: {},
    checklist.test_reset_parameters_recursive_changes_every_network_including_targets: {},
    checklist.test_losses_pickle: {},
}


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """The shared checks build these losses and batches."""
    monkeypatch.setattr(checklist, "build", build)
    monkeypatch.setattr(checklist, "make_batch", make_batch)
    monkeypatch.setattr(checklist, "TERMS", {**checklist.TERMS, **TERMS})


@ALL
@pytest.mark.parametrize("check", SHARED, ids=lambda check: check.__name__.removeprefix("test_"))
def test_as_every_loss(check, kind):
    check(kind, **SHARED[check])


@ALL
def test_the_input_is_left_as_it_is_but_for_the_priority(kind):
    batch = make_batch()
    before = batch.clone()
    build(kind)(batch)
    added = set(batch.keys(True, True)) - set(before.keys(True, True))
    assert added == (set() if kind is BCLoss else {"td_error"})
    torch.testing.assert_close(batch.select(*before.keys(True, True)).to_dict(), before.to_dict())


@ALL
def test_dispatch_with_keyword_arguments_equals_the_tensordict_call(kind):
    loss = build(kind)
    batch = make_batch()
    expected = loss(batch.clone())
    given = [key for key in loss._dispatch_keys if key in batch.keys(True)]
    draws = {IFQLLoss: {"flow_noise", "flow_time"}, ReBRACLoss: {("next", "noise")}}
    assert draws.get(kind, set()) <= set(given)
    out = loss(**{"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in given})
    out = (out,) if torch.is_tensor(out) else out
    for name, value in zip(loss.out_keys, out, strict=True):
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("kind", [IFQLLoss, ReBRACLoss])
def test_noise_given_equals_noise_drawn_with_the_same_seed(kind):
    loss = build(kind)
    batch = make_batch(noise=False)
    torch.manual_seed(5)
    drawn = loss(batch.clone())
    torch.manual_seed(5)
    given = batch.clone()
    if kind is IFQLLoss:
        given["flow_noise"] = torch.randn(8, ACTION_DIM)
        given["flow_time"] = torch.rand(8, 1)
    else:
        given["next", "noise"] = torch.randn(8, ACTION_DIM)
    torch.manual_seed(99)
    torch.testing.assert_close(loss(given).to_dict(), drawn.to_dict(), rtol=0, atol=0)
    torch.manual_seed(99)
    other = loss(batch.clone())
    name = "loss_flow" if kind is IFQLLoss else "loss_qvalue"
    assert other[name] != drawn[name]


@ALL
def test_renamed_and_nested_keys(kind):
    reference, batch = build(kind), make_batch()
    expected = reference(batch)
    state, act = ("sensors", "s"), ("agent", "act")
    names = {
        "action": act,
        "reward": "gain",
        "done": ("flags", "end"),
        "terminated": ("flags", "stop"),
        "noise": ("draws", "z"),
        "flow_noise": ("draws", "x0"),
        "flow_time": ("draws", "t"),
        "priority": "prio",
        "state_action_value": "q",
    }
    critics = make_qvalue_networks(*SIZES, observation_key=state, action_key=act)
    for critic in critics:
        critic.out_keys = ["q"]
    value = make_value_network(OBSERVATION_DIM, HIDDEN, observation_key=state)
    value.out_keys = ["v"]
    gaussian = GaussianPolicy(make_policy_network(*SIZES), in_keys=(state,), out_keys=(act,))
    policy = DeterministicPolicy(make_policy_network(*SIZES), in_keys=(state,), out_keys=(act,))
    flow = FlowMatchingPolicy(make_velocity_network(*SIZES), ACTION_DIM, in_keys=(state,), out_keys=(act,))
    loss = {
        BCLoss: lambda: BCLoss(gaussian),
        ImplicitQLoss: lambda: ImplicitQLoss(critics, value),
        IQLLoss: lambda: IQLLoss(gaussian, critics, value, temperature=2.0),
        IFQLLoss: lambda: IFQLLoss(flow, critics, value),
        ReBRACLoss: lambda: ReBRACLoss(policy, critics, actor_bc_coef=0.3, critic_bc_coef=0.2),
    }[kind]()
    loss.set_keys(**names, **({"value": "v"} if issubclass(kind, ImplicitQLoss) else {}))
    if kind is not BCLoss:
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    loss.load_state_dict(reference.state_dict())
    renamed = TensorDict(batch_size=batch.batch_size)
    for key in batch.keys(True, True):
        prefix, last = (("next",), key[1]) if isinstance(key, tuple) else ((), key)
        new = state if last == "observation" else names.get(last, last)
        renamed[(*prefix, *((new,) if isinstance(new, str) else new))] = batch[key]
    assert all(key in renamed.keys(True) for key in loss.in_keys)
    torch.testing.assert_close(loss(renamed).to_dict(), expected.to_dict())
    if kind is not BCLoss:
        torch.testing.assert_close(renamed["prio"], batch["td_error"])
    with pytest.raises(ValueError, match="not an accepted"):
        loss.set_keys(no_such_key="x")


@CRITICS
def test_masked_rows_get_no_priority_and_other_value_estimators_are_refused(kind):
    loss, batch = build(kind), make_batch(4)
    batch["collector", "mask"] = torch.tensor([[True], [False], [True], [False]])
    loss(batch)
    assert (batch["td_error"] > 0).tolist() == [True, False, True, False]
    with pytest.raises(NotImplementedError):
        loss.make_value_estimator(ValueEstimators.TDLambda)


@CRITICS
def test_deactivate_vmap_changes_nothing(kind):
    batch, results = make_batch(), []
    for deactivate in (False, True):
        torch.manual_seed(1)
        results.append(build(kind, deactivate_vmap=deactivate)(batch.clone()).to_dict())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (IQLLoss, {"temperature": -1.0}, "temperature"),
        (IQLLoss, {"expectile": 1.0}, "expectile"),
        (IFQLLoss, {"expectile": 0.0}, "expectile"),
        (ReBRACLoss, {"actor_bc_coef": -0.1}, "actor_bc_coef"),
        (ReBRACLoss, {"noise_clip": float("nan")}, "noise_clip"),
    ],
)
def test_options_out_of_range_are_refused_by_name(kind, options, match):
    with pytest.raises(ValueError, match=match):
        build(kind, **options)


def test_policies_of_another_kind_are_refused():
    gaussian, deterministic = (kind(make_policy_network(*SIZES)) for kind in (GaussianPolicy, DeterministicPolicy))
    critics, value = make_qvalue_networks(*SIZES), make_value_network(OBSERVATION_DIM, HIDDEN)
    for make in (
        lambda: BCLoss(deterministic),
        lambda: IQLLoss(deterministic, critics, value, temperature=1.0),
        lambda: IFQLLoss(gaussian, critics, value),
        lambda: ReBRACLoss(gaussian, critics, actor_bc_coef=0.1, critic_bc_coef=0.1),
    ):
        with pytest.raises(TypeError, match="Policy"):
            make()


def _compiled(kind, backend):
    # Minutes of C++; "eager" runs the same graph, without a break in it, as it was captured. IFQL is IQL's values and a loss
    # that is compiled in DeFlow.
    slow = [] if backend == "eager" and kind is not IFQLLoss else [pytest.mark.slow]
    need = pytest.mark.skipif(backend == "inductor" and checklist.shutil.which("g++") is None, reason="needs g++")
    return pytest.param(kind, backend, marks=[*slow, need], id=f"{kind.__name__}-{backend}")


@pytest.mark.parametrize(
    ("kind", "backend"),
    [_compiled(kind, backend) for kind in (IQLLoss, ReBRACLoss, IFQLLoss) for backend in ("eager", "inductor")],
)
def test_compiled_equals_eager_over_optimiser_and_target_updates(kind, backend):
    batches, results = [make_batch(16) for _ in range(10)], []
    for compiled in (False, True):
        torch.manual_seed(1)
        loss = build(kind, tau=0.1)
        updater = loss.__dict__["updater"]
        optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
        forward = torch.compile(loss, fullgraph=True, backend=backend) if compiled else loss
        history = []
        for batch in batches:
            out = forward(batch.clone())
            optimizer.zero_grad()
            total(out).backward()
            optimizer.step()
            updater.step()
            history.append(out.detach().to_dict())
        results.append((history, dict(loss.state_dict())))
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=1e-5)
