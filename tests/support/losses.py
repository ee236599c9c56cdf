"""Every loss of the package on small networks."""

from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.objectives import (
    DeFlowLoss,
    FAWACLoss,
    FBRACLoss,
    FlowMatchingLoss,
    FQLLoss,
    RefinementLoss,
    RLPDLoss,
    TDCriticLoss,
)
from tests.support import value_losses
from tests.support.networks import make_actor, make_critics, make_flow, make_one_step, make_tanh_gaussian


def build(kind, *, flow_steps=10, updated=True, **kwargs):
    if kind in value_losses.TERMS:
        return value_losses.build(kind, **kwargs)
    if kind is FlowMatchingLoss:
        loss = FlowMatchingLoss(make_actor().flow_policy, **kwargs)
    elif kind is RefinementLoss:
        loss = RefinementLoss(make_actor(), make_critics(), target_divergence=1e-3, **kwargs)
    elif kind is FQLLoss:
        loss = FQLLoss(make_flow(flow_steps), make_one_step(), make_critics(), **kwargs)
    elif kind is RLPDLoss:
        loss = kind(make_tanh_gaussian(), make_critics(), **kwargs)
    else:
        policy = make_flow(flow_steps) if kind in (FBRACLoss, FAWACLoss) else make_actor()
        loss = kind(policy, make_critics(), **kwargs)
    if kind in WITH_CRITIC:
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
        if updated and kwargs.get("delay_qvalue", True):
            SoftUpdate(loss, tau=0.005)
    return loss


TERMS = {
    FlowMatchingLoss: {"loss_flow"},
    RefinementLoss: {"loss_actor", "loss_alpha"},
    TDCriticLoss: {"loss_qvalue"},
    DeFlowLoss: {"loss_flow", "loss_actor", "loss_alpha", "loss_qvalue"},
    FQLLoss: {"loss_flow", "loss_actor", "loss_qvalue"},
    FBRACLoss: {"loss_flow", "loss_actor", "loss_qvalue"},
    FAWACLoss: {"loss_flow", "loss_qvalue"},
    RLPDLoss: {"loss_actor", "loss_alpha", "loss_qvalue"},
    **value_losses.TERMS,
}
WITH_CRITIC = [kind for kind, terms in TERMS.items() if "loss_qvalue" in terms]
