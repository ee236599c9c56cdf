"""What of the checklist of every loss is of BC, IQL, IFQL and ReBRAC alone."""

import shutil

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
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, assert_compiled_equals_eager
from tests.support.value_losses import KINDS, SIZES, build, make_batch

ALL = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


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


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (IQLLoss, {"temperature": -1.0}, "temperature"),
        (IQLLoss, {"expectile": 1.0}, "expectile"),
        (IFQLLoss, {"expectile": 0.0}, "expectile"),
        (IFQLLoss, {"num_samples": 0}, "num_samples"),
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
    need = pytest.mark.skipif(backend == "inductor" and shutil.which("g++") is None, reason="needs g++")
    return pytest.param(kind, backend, marks=[*slow, need], id=f"{kind.__name__}-{backend}")


@pytest.mark.parametrize(
    ("kind", "backend"),
    [_compiled(kind, backend) for kind in (IQLLoss, ReBRACLoss, IFQLLoss) for backend in ("eager", "inductor")],
)
def test_compiled_equals_eager_over_optimiser_and_target_updates(kind, backend):
    def make():
        loss = build(kind, tau=0.1)
        return loss, loss.__dict__["updater"]

    assert_compiled_equals_eager(make, [make_batch(16) for _ in range(10)], backend)
