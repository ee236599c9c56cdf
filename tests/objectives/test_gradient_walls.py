"""A gradient never crosses a wall: each loss trains exactly its own part."""

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential

from deflow_torchrl.modules import (
    DeFlowActor,
    EncodedCritics,
    FlowMatchingPolicy,
    OneStepPolicy,
    RefinementPolicy,
    make_one_step_network,
    make_qvalue_networks,
    make_refinement_network,
    make_velocity_network,
)
from deflow_torchrl.objectives import DeFlowLoss, FQLLoss, RefinementLoss
from tests.support.networks import (
    ACTION_DIM,
    OBSERVATION_DIM,
    make_actor,
    make_batch,
    make_critics,
    make_loss,
)

PARTS = {
    "flow": ("actor_network_params", "module", "0"),
    "refinement": ("actor_network_params", "module", "1"),
    "critics": ("qvalue_network_params",),
}
OWNER = {"loss_flow": "flow", "loss_actor": "refinement", "loss_qvalue": "critics", "loss_alpha": "log_alpha"}


def parts_with_gradient(loss):
    touched = {}
    for part, (attribute, *path) in PARTS.items():
        params = getattr(loss, attribute)
        params = params.get(tuple(path)) if path else params
        gradients = [p.grad for p in params.values(True, True) if isinstance(p, torch.nn.Parameter)]
        present = [grad is not None and bool(grad.any()) for grad in gradients]
        touched[part] = (any(present), all(present))
    touched["log_alpha"] = (loss.log_alpha.grad is not None and bool(loss.log_alpha.grad != 0),) * 2
    return touched


@pytest.mark.parametrize("term", list(OWNER))
def test_each_term_of_forward_reaches_its_own_part_and_no_other(term):
    loss = make_loss()
    loss(make_batch(64))[term].backward()
    touched = parts_with_gradient(loss)
    assert {part for part, (some, _) in touched.items() if some} == {OWNER[term]}
    assert touched[OWNER[term]][1], "every parameter of the part learns"


@pytest.mark.parametrize("term", list(OWNER))
def test_each_method_alone_keeps_the_same_walls(term):
    loss = make_loss()
    getattr(loss, f"{term.removeprefix('loss_')}_loss")(make_batch(64))[0].backward()
    assert {part for part, (some, _) in parts_with_gradient(loss).items() if some} == {OWNER[term]}


def test_targets_never_require_gradient():
    loss = make_loss()
    assert not any(value.requires_grad for value in loss.target_qvalue_network_params.values(True, True))


def test_the_separate_refinement_loss_has_the_walls_too():
    loss = RefinementLoss(make_actor(), make_critics(), target_divergence=1e-3)
    out = loss(make_batch(64))
    (out["loss_actor"] + out["loss_alpha"]).backward()
    touched = parts_with_gradient(loss)
    assert {part for part, (some, _) in touched.items() if some} == {"refinement", "log_alpha"}


def test_parts_that_share_an_encoder_are_refused_unless_nothing_trains_it():
    width = 6
    encoder = TensorDictModule(torch.nn.Linear(OBSERVATION_DIM, width), in_keys=["observation"], out_keys=["state"])
    flow = FlowMatchingPolicy(
        make_velocity_network(width, ACTION_DIM, (8,)),
        ACTION_DIM,
        in_keys=("state", "noise"),
        out_keys=("base_action",),
    )
    network = make_refinement_network(width, ACTION_DIM, (8,))
    refinement = RefinementPolicy(network, ACTION_DIM, low=-1.0, high=1.0, in_keys=("state", "base_action"))
    refinement = TensorDictSequential(encoder, refinement)
    actor = DeFlowActor(TensorDictSequential(encoder, flow), refinement)
    with pytest.raises(ValueError, match="flow_policy and refinement_policy share parameters"):
        DeFlowLoss(actor, make_critics(), target_divergence=1e-3)
    critics = EncodedCritics(encoder, make_qvalue_networks(width, ACTION_DIM, (8,), observation_key="state"))
    apart = DeFlowActor(make_actor().flow_policy, refinement)
    with pytest.raises(ValueError, match="refinement_policy and the critics share parameters"):
        DeFlowLoss(apart, critics, target_divergence=1e-3)
    one_step = OneStepPolicy(make_one_step_network(width, ACTION_DIM, (8,)), ACTION_DIM, in_keys=("state", "noise"))
    with pytest.raises(ValueError, match="actor_network and flow_policy share parameters"):
        FQLLoss(TensorDictSequential(encoder, flow), TensorDictSequential(encoder, one_step), make_critics())
    encoder.requires_grad_(False)
    assert DeFlowLoss(actor, make_critics(), target_divergence=1e-3).out_keys
