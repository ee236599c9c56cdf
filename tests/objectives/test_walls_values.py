"""A gradient never crosses a wall in IQL, IFQL and ReBRAC: each loss trains exactly its own networks."""

import pytest
import torch

from deflow_torchrl.objectives import IFQLLoss, IQLLoss, ReBRACLoss
from tests.support.value_losses import TERMS, build, make_batch

OWNER = {
    "loss_value": "value_network_params",
    "loss_qvalue": "qvalue_network_params",
    "loss_actor": "actor_network_params",
    "loss_flow": "flow_policy_params",
}
CASES = [(kind, term) for kind in (IQLLoss, IFQLLoss, ReBRACLoss) for term in sorted(TERMS[kind])]


def with_gradient(loss):
    """Networks of which some, and of which all parameters have a gradient."""
    some, every = set(), set()
    for name in OWNER.values():
        params = getattr(loss, name, None)
        if params is None:
            continue
        gradients = [p.grad for p in params.values(True, True) if isinstance(p, torch.nn.Parameter)]
        present = [grad is not None and bool(grad.any()) for grad in gradients]
        some |= {name} if any(present) else set()
        every |= {name} if all(present) else set()
    return some, every


@pytest.mark.parametrize(("kind", "term"), CASES)
def test_each_term_trains_its_own_network_alone_in_forward_and_by_its_method(kind, term):
    torch.manual_seed(3)
    loss = build(kind)
    loss(make_batch(64))[term].backward()
    assert with_gradient(loss) == ({OWNER[term]},) * 2
    loss.zero_grad()
    getattr(loss, f"{term.removeprefix('loss_')}_loss")(make_batch(64))[0].backward()
    assert with_gradient(loss) == ({OWNER[term]},) * 2


@pytest.mark.parametrize("kind", [IQLLoss, IFQLLoss, ReBRACLoss])
def test_targets_never_require_gradient(kind):
    loss = build(kind)
    targets = [loss.target_qvalue_network_params]
    targets += [loss.target_actor_network_params] if kind is ReBRACLoss else []
    assert not any(value.requires_grad for target in targets for value in target.values(True, True))
