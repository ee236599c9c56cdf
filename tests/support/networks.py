"""Small networks, losses and batches for them."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import (
    DeFlowActor,
    FlowMatchingPolicy,
    OneStepPolicy,
    RefinementPolicy,
    TanhGaussianPolicy,
    make_one_step_network,
    make_qvalue_networks,
    make_refinement_network,
    make_tanh_gaussian_network,
    make_velocity_network,
)
from deflow_torchrl.objectives import DeFlowLoss

OBSERVATION_DIM, ACTION_DIM, HIDDEN = 4, 3, (16, 16)
NEEDED = {  # what a method's settings leave to the task or the user
    "dsrl": {"noise_scale": 1.0},
    "fan": {"alpha": 10.0, "critic_alpha": 0.1},
    "fedit": {"edit_scale": 0.2},
    "qam": {"inverse_temperature": 3.0},
    "qam_e": {"inverse_temperature": 3.0, "edit_scale": 0.1},
    "qam_f": {"inverse_temperature": 3.0, "distillation_coef": 10.0},
    "floq": {"alpha": 10.0},
    "fql": {"alpha": 10.0},
    "fbrac": {"alpha": 10.0},
    "fawac": {"temperature": 1.0},
    "iql": {"temperature": 2.0},
    "ifql": {"num_samples": 4},
    "idql": {"num_samples": 3, "dropout": 0.0},
    "srpo": {"beta": 0.1, "dropout": 0.0},
    "cac": {"eta": 0.1, "num_candidates": 3, "max_q_backup": 2},
    "calql": {"target_gap": 0.8, "num_actions": 2},
    "rebrac": {"actor_bc_coef": 0.3, "critic_bc_coef": 0.2},
}


def make_tanh_gaussian() -> TanhGaussianPolicy:
    return TanhGaussianPolicy(make_tanh_gaussian_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN))


def make_actor(observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM, hidden=HIDDEN) -> DeFlowActor:
    flow = FlowMatchingPolicy(
        make_velocity_network(observation_dim, action_dim, hidden), action_dim, out_keys=("base_action",)
    )
    refinement = make_refinement_network(observation_dim, action_dim, hidden)
    return DeFlowActor(flow, RefinementPolicy(refinement, action_dim, low=-1.0, high=1.0))


def make_flow(num_steps=10) -> FlowMatchingPolicy:
    return FlowMatchingPolicy(make_velocity_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN), ACTION_DIM, num_steps)


def make_one_step() -> OneStepPolicy:
    return OneStepPolicy(make_one_step_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN), ACTION_DIM)


def make_critics(observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM, hidden=HIDDEN):
    return make_qvalue_networks(observation_dim, action_dim, hidden)


def make_loss(**kwargs) -> DeFlowLoss:
    gamma = kwargs.pop("gamma", 0.9)
    loss = DeFlowLoss(make_actor(), make_critics(), **kwargs)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
    SoftUpdate(loss, tau=0.005)
    return loss


def make_batch(*shape, noise=True, observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM) -> TensorDict:
    shape = shape or (8,)
    terminated = torch.rand(*shape, 1) < 0.25
    truncated = (torch.rand(*shape, 1) < 0.25) & ~terminated
    batch = TensorDict(
        observation=torch.randn(*shape, observation_dim),
        action=torch.rand(*shape, action_dim) * 2 - 1,
        next=TensorDict(
            observation=torch.randn(*shape, observation_dim),
            reward=torch.randn(*shape, 1),
            terminated=terminated,
            truncated=truncated,
            done=terminated | truncated,
            batch_size=shape,
        ),
        batch_size=shape,
    )
    if noise:
        batch["noise"] = torch.randn(*shape, action_dim)
        batch["next", "noise"] = torch.randn(*shape, action_dim)
        batch["flow_noise"] = torch.randn(*shape, action_dim)
        batch["flow_time"] = torch.rand(*shape, 1)
    return batch


def total(out: TensorDict) -> torch.Tensor:
    return sum(value for name, value in out.items() if name.startswith("loss_"))


def assert_compiled_equals_eager(make, batches, backend):
    """Train what ``make()`` gives, a loss and its target updater or None, eagerly and compiled, on the same batches and draws."""
    torch.compiler.reset()  # what other tests compiled counts towards the limit of recompilations
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        loss, updater = make()
        optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
        forward = torch.compile(loss, fullgraph=True, backend=backend) if compiled else loss
        history = []
        for batch in batches:
            out = forward(batch.clone())
            optimizer.zero_grad()
            total(out).backward()
            optimizer.step()
            if updater is not None:
                updater.step()
            history.append(out.detach().to_dict())
        results.append((history, dict(loss.state_dict())))
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=1e-5)


DENOISING_STEPS = 5


def add_draws(batch, name):
    """Give a batch the draws and columns that a method reads, of other shapes than those of :func:`make_batch`."""
    action, column = batch["action"], batch["action"][..., :1]

    def normal(*rows):
        return torch.randn(*action.shape[:-1], *rows, action.shape[-1])

    if name in ("idql", "srpo"):
        batch["diffusion_noise"] = normal()
        for key in ("diffusion_time", "policy_time"):
            batch[key] = torch.randint_like(column, DENOISING_STEPS).long()
    elif name == "cac":
        batch["noise"], batch["next", "noise"], batch["consistency_noise"] = normal(2), normal(2, 2), normal()
        for key in ("critic_index", "consistency_step"):
            batch[key] = torch.zeros_like(column).long()
    elif name == "calql":
        batch["mc_return"] = torch.randn_like(column)
        for key in (("next", "noise"), "cql_noise", ("next", "cql_noise")):
            batch[key] = normal(2)
        batch["cql_random_action"] = normal(2).tanh()
    elif name in ("dsrl", "fedit", "qam", "qam_e", "qam_f", "trqam"):
        batch["sde_noise"], batch["latent_noise"] = normal(10), normal()
        batch["edit_noise"], batch["next", "edit_noise"] = normal(), normal(1)
        batch["next", "noise"] = normal(1)
    elif name in ("floq", "deflow_floq"):
        batch["next", "noise"] = normal(8)
        for key in ("critic_noise", "critic_time", ("next", "critic_noise")):
            batch[key] = torch.rand_like(normal(8)[..., :1])
    elif name == "fan":
        batch["critic_noise"], batch["marginal_noise"] = normal(), normal()
        batch["anchor_time"], batch["next", "anchor_time"] = torch.rand_like(column), torch.rand_like(column)
    return batch
