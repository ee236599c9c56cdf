"""Every loss of the package on small networks."""

from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import (
    ConsistencyNetwork,
    ConsistencyPolicy,
    DeterministicPolicy,
    DiffusionPolicy,
    NoiseNetwork,
    TanhGaussianPolicy,
    make_noisy_qvalue_networks,
    make_policy_network,
    make_tanh_gaussian_network,
    make_value_network,
)
from deflow_torchrl.objectives import (
    CalQLLoss,
    ConsistencyACLoss,
    DeFlowLoss,
    DSRLLoss,
    FANLoss,
    FAWACLoss,
    FBRACLoss,
    FEditLoss,
    FlowMatchingLoss,
    FQLLoss,
    IDQLLoss,
    QAMLoss,
    RefinementLoss,
    RLPDLoss,
    SRPOLoss,
    TDCriticLoss,
    TRQAMLoss,
)
from tests.support import flow_critics, value_losses
from tests.support.networks import (
    ACTION_DIM,
    HIDDEN,
    OBSERVATION_DIM,
    add_draws,
    make_actor,
    make_critics,
    make_flow,
    make_one_step,
    make_tanh_gaussian,
)

SIZES = (OBSERVATION_DIM, ACTION_DIM, HIDDEN)


def make_edit():
    network = make_tanh_gaussian_network(OBSERVATION_DIM + ACTION_DIM, ACTION_DIM, HIDDEN)
    return TanhGaussianPolicy(network, in_keys=("observation", "base_action"), out_keys=("edit",))


def make_diffusion():
    return DiffusionPolicy(NoiseNetwork(OBSERVATION_DIM, ACTION_DIM, width=8, dropout=0.0), ACTION_DIM)


def make_consistency():
    return ConsistencyPolicy(ConsistencyNetwork(OBSERVATION_DIM, ACTION_DIM, hidden_dims=(8,)), ACTION_DIM)


class Floq:
    """FQL's loss with flow critics."""


class DeFlowFloq:
    """DeFlow's loss with flow critics."""


def make_flow_critics(*, deactivate_vmap=False):
    """Flow critics that take as many draws of each transition as :func:`.networks.add_draws` gives."""
    return flow_critics.make_ensemble(noise_samples=8, deactivate_vmap=deactivate_vmap)


def looped(options):
    """Take the option that an ensemble has itself out of a loss's."""
    return {name: options.pop(name) for name in ("deactivate_vmap",) if name in options}


# Losses whose draws have shapes of their own: the method that names them, and how they are built.
NEWEST = {
    CalQLLoss: (
        "calql",
        lambda **k: CalQLLoss(make_tanh_gaussian(), make_critics(), num_cql_samples=2, target_gap=0.8, **k),
    ),
    IDQLLoss: ("idql", lambda **k: IDQLLoss(make_diffusion(), make_critics(), make_value_network(*SIZES[::2]), **k)),
    SRPOLoss: (
        "srpo",
        lambda **k: SRPOLoss(
            DeterministicPolicy(make_policy_network(*SIZES)),
            make_diffusion(),
            make_critics(),
            make_value_network(*SIZES[::2]),
            **{"beta": 0.1, **k},
        ),
    ),
    ConsistencyACLoss: (
        "cac",
        lambda **k: ConsistencyACLoss(make_consistency(), make_critics(), **{"eta": 0.1, "num_target_samples": 2, **k}),
    ),
    FEditLoss: ("fedit", lambda **k: FEditLoss(make_flow(), make_edit(), make_critics(), **{"edit_scale": 0.2, **k})),
    QAMLoss: (
        "qam",
        lambda **k: QAMLoss(
            make_flow(),
            make_flow(),
            make_critics(),
            edit_policy=make_edit(),
            **{"edit_scale": 0.2, "inverse_temperature": 3.0, **k},
        ),
    ),
    TRQAMLoss: ("trqam", lambda **k: TRQAMLoss(make_flow(), make_flow(), make_critics(), **{"kl_budget": 1.0, **k})),
    DSRLLoss: (
        "dsrl",
        lambda **k: DSRLLoss(make_flow(), make_tanh_gaussian(), make_critics(), make_critics(), noise_scale=1.0, **k),
    ),
    FANLoss: (
        "fan",
        lambda **k: FANLoss(make_flow(), make_one_step(), make_noisy_qvalue_networks(*SIZES), make_critics(), **k),
    ),
    Floq: ("floq", lambda **k: FQLLoss(make_flow(), make_one_step(), make_flow_critics(**looped(k)), **k)),
    DeFlowFloq: ("deflow_floq", lambda **k: DeFlowLoss(make_actor(), make_flow_critics(**looped(k)), **k)),
}


def batch_of(kind, *shape, **kwargs):
    """A batch with the draws that the loss reads; without them with ``noise=False``, but for the data's returns."""
    batch = value_losses.make_batch(*shape, **kwargs)
    if kind not in NEWEST:
        return batch
    batch = add_draws(batch, NEWEST[kind][0])
    read = build(kind).in_keys
    return batch if kwargs.get("noise", True) else batch.select(*read)


def build(kind, *, flow_steps=10, updated=True, **kwargs):
    if kind in value_losses.TERMS:
        return value_losses.build(kind, **kwargs)
    if kind in NEWEST:
        loss = NEWEST[kind][1](**kwargs)
    elif kind is FlowMatchingLoss:
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
    CalQLLoss: {"loss_actor", "loss_alpha", "loss_alpha_prime", "loss_qvalue"},
    IDQLLoss: {"loss_score", "loss_value", "loss_qvalue"},
    SRPOLoss: {"loss_score", "loss_value", "loss_qvalue", "loss_actor"},
    ConsistencyACLoss: {"loss_consistency", "loss_actor", "loss_qvalue"},
    FEditLoss: {"loss_flow", "loss_actor", "loss_alpha", "loss_qvalue"},
    QAMLoss: {"loss_flow", "loss_actor", "loss_edit", "loss_alpha", "loss_qvalue"},
    TRQAMLoss: {"loss_flow", "loss_actor", "loss_qvalue"},
    DSRLLoss: {"loss_flow", "loss_actor", "loss_alpha", "loss_qvalue", "loss_latent"},
    FANLoss: {"loss_flow", "loss_actor", "loss_qvalue", "loss_marginal"},
    Floq: {"loss_flow", "loss_actor", "loss_flow_critic", "loss_qvalue"},
    DeFlowFloq: {"loss_flow", "loss_actor", "loss_alpha", "loss_flow_critic", "loss_qvalue"},
}
WITH_CRITIC = [kind for kind, terms in TERMS.items() if "loss_qvalue" in terms]
