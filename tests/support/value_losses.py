"""BC's, IQL's, IFQL's and ReBRAC's losses on small networks, and batches for them."""

from __future__ import annotations

import torch
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import (
    DeterministicPolicy,
    FlowMatchingPolicy,
    GaussianPolicy,
    make_policy_network,
    make_value_network,
    make_velocity_network,
)
from deflow_torchrl.objectives import BCLoss, IFQLLoss, ImplicitQLoss, IQLLoss, ReBRACLoss
from tests.support import networks
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, make_critics

SIZES = (OBSERVATION_DIM, ACTION_DIM, HIDDEN)
TERMS = {
    BCLoss: {"loss_actor"},
    ImplicitQLoss: {"loss_value", "loss_qvalue"},
    IQLLoss: {"loss_value", "loss_qvalue", "loss_actor"},
    IFQLLoss: {"loss_value", "loss_qvalue", "loss_flow"},
    ReBRACLoss: {"loss_qvalue", "loss_actor"},
}
KINDS = list(TERMS)


def build(kind, *, gamma=0.9, tau=0.005, **kwargs):
    """A loss ready for use; ``updater`` is its SoftUpdate, None without targets."""
    value = make_value_network(OBSERVATION_DIM, HIDDEN)
    if kind is BCLoss:
        loss = kind(GaussianPolicy(make_policy_network(*SIZES)), **kwargs)
        loss.__dict__["updater"] = None
        return loss
    if kind is ImplicitQLoss:
        loss = kind(make_critics(), value, **kwargs)
    elif kind is IQLLoss:
        policy = GaussianPolicy(make_policy_network(*SIZES))
        loss = kind(policy, make_critics(), value, **{"temperature": 2.0, **kwargs})
    elif kind is IFQLLoss:
        loss = kind(FlowMatchingPolicy(make_velocity_network(*SIZES), ACTION_DIM), make_critics(), value, **kwargs)
    else:
        policy = DeterministicPolicy(make_policy_network(*SIZES))
        loss = kind(policy, make_critics(), **{"actor_bc_coef": 0.3, "critic_bc_coef": 0.2, **kwargs})
    loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
    updater = SoftUpdate(loss, tau=tau)
    loss.__dict__["updater"] = updater if tau != 0.005 else None  # it would be copied and pickled with the loss
    return loss


def make_batch(*shape, **kwargs):
    """Conftest's, with the data's next action."""
    batch = networks.make_batch(*shape, **kwargs)
    batch["next", "action"] = torch.rand_like(batch["action"]) * 2 - 1
    return batch


def let_return(network, *values):
    """Let an MLP answer everything with these values."""
    last = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(values))
