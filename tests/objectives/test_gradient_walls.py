"""A gradient never crosses a wall: each loss trains exactly its own part."""

import pytest
import torch

from deflow_torchrl.objectives import RefinementLoss
from tests.support.networks import make_actor, make_batch, make_critics, make_loss

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
