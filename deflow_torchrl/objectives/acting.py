# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""How losses call policies: through their TensorDict interface, so that encoders may stand before them.

Policies are known by what they can do, not by their class: those of TorchRL's main branch are taken too. A ``state`` may be a
result of :func:`~deflow_torchrl.modules.policies.encode`, so that encoders run once for several calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.networks import is_wrapped
from deflow_torchrl.modules.policies import check_encoders, encode, is_flow, last_policy

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""v(x, t) of one state or of each of several."""


def check_flow_policy(policy: TensorDictModuleBase) -> None:
    """Raise TypeError unless the policy ends in a velocity field that flow matching can train."""
    _check(policy, is_flow(policy), "FlowMatchingPolicy")


def check_noise_policy(policy: TensorDictModuleBase) -> None:
    """Raise TypeError unless the policy maps an observation and noise to an action."""
    if noise_key(policy) is None:
        raise TypeError(
            f"the policy must read an observation and noise and have an action_dim, got {type(policy).__name__}"
        )
    check_encoders(policy)


def check_one_step_policy(policy: TensorDictModuleBase) -> None:
    """Raise TypeError unless the policy maps an observation and noise to an action in one pass."""
    core = _core(policy)
    _check(policy, all(hasattr(core, name) for name in ("network", "action_dim", "low")), "OneStepPolicy")


def check_gaussian_policy(policy: TensorDictModuleBase) -> None:
    """Raise TypeError unless the policy has a likelihood of actions."""
    _check(policy, hasattr(_core(policy), "log_prob"), "GaussianPolicy")


def check_deterministic_policy(policy: TensorDictModuleBase) -> None:
    """Raise TypeError unless the policy can perturb its actions."""
    _check(policy, hasattr(_core(policy), "perturb"), "DeterministicPolicy")


def noise_key(policy: TensorDictModuleBase) -> NestedKey | None:
    """Key under which a flow or one-step policy reads its noise; None where it always draws its own."""
    head = last_policy(policy)
    is_noise_policy = hasattr(_core(policy), "action_dim")
    return head.in_keys[1] if is_noise_policy and len(head.in_keys) == 2 else None


def state_keys(policy: TensorDictModuleBase) -> list[NestedKey]:
    """Entries of the state that a policy reads: its ``in_keys`` without the noise."""
    return [key for key in policy.in_keys if key != noise_key(policy)]


def act(policy: TensorDictModuleBase, state: TensorDictBase, noise: Tensor) -> Tensor:
    """Action of a flow or one-step policy for this state ``[*B]`` and noise ``[*B, A]``, or n of each for ``[*B, n, A]``."""
    key, head = noise_key(policy), last_policy(policy)
    if key is None or not is_wrapped(head):
        return head.module(_each(encode(policy, state)[head.in_keys[0]], noise), noise)
    read = encode(policy, state).select(*state_keys(head))
    return head(each_state(read, noise).set(key, noise))[policy.out_keys[-1]]


def refine(policy: TensorDictModuleBase, state: TensorDictBase, base_action: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and action of a refinement policy, both of the shape of the base action, ``[*B, A]`` or ``[*B, n, A]``."""
    head = last_policy(policy)
    if not is_wrapped(head):
        return head.module(_each(encode(policy, state)[head.observation_key], base_action), base_action)
    read = encode(policy, state).select(head.observation_key)
    refined = head(each_state(read, base_action).set(head.base_action_key, base_action))
    return refined[head.out_keys[0]], refined[head.out_keys[1]]


def velocity(policy: TensorDictModuleBase, state: TensorDictBase) -> Velocity:
    """The flow's velocity field v(x, t) at this state, of x ``[*B, A]`` or ``[*B, n, A]``; the encoders run once, here."""
    observation, core = _observation(policy, state), _core(policy)
    if hasattr(core, "velocity"):
        return lambda x, t: core.velocity(_each(observation, x), x, t)
    return lambda x, t: core.velocity_network(torch.cat([_each(observation, x), x, t], -1))


def unclipped(policy: TensorDictModuleBase, state: TensorDictBase, noise: Tensor) -> Tensor:
    """Output ``[*B, A]`` of a one-step policy's network, before it is clipped to the bounds."""
    observation, core = _observation(policy, state), _core(policy)
    if "clamp" in inspect.signature(type(core).forward).parameters:
        return core(observation, noise, clamp=False)
    return core.network(torch.cat([observation, noise], -1))


def clip(policy: TensorDictModuleBase, action: Tensor) -> Tensor:
    """Clip an action to the policy's bounds."""
    core = _core(policy)
    return action.clamp(core.low, core.high)


def log_prob(policy: TensorDictModuleBase, state: TensorDictBase, action: Tensor) -> Tensor:
    """Log likelihood ``[*B]`` of actions ``[*B, A]`` under a Gaussian policy."""
    return _core(policy).log_prob(_observation(policy, state), action)


def check_tanh_gaussian_policy(policy: TensorDictModuleBase) -> None:
    """Raise TypeError unless the policy gives samples with their log densities."""
    _check(policy, hasattr(_core(policy), "sample_and_log_prob"), "TanhGaussianPolicy")


def sample_and_log_prob(
    policy: TensorDictModuleBase, state: TensorDictBase, noise: Tensor, *more: Tensor
) -> tuple[Tensor, Tensor]:
    """Action and log density of a tanh-Gaussian policy, by noise ``[*B, A]``, or n of each state by ``[*B, n, A]``.

    The network reads the observation and, behind it, ``more``: of an edit policy the base action.
    """
    observation = _each(_observation(policy, state), noise)
    return _core(policy).sample_and_log_prob(torch.cat([observation, *more], -1), noise)


def edit_state_keys(policy: TensorDictModuleBase) -> list[NestedKey]:
    """Entries of the state that an edit policy reads: its ``in_keys`` without the base action."""
    return [key for key in policy.in_keys if key not in last_policy(policy).in_keys[1:]]


def each_state(state: TensorDictBase, rows: Tensor) -> TensorDictBase:
    """A state ``[*B]`` as ``[*B, n]`` where ``rows [*B, n, A]`` has n rows of each; else as it is, ``[*B]``."""
    return state if rows.ndim == state.ndim + 1 else state.unsqueeze(-1).expand(*rows.shape[:-1])


def repeated(state: TensorDictBase, rows: Tensor) -> TensorDictBase:
    """A state ``[*B]`` once for each of the n rows of ``rows [*B, n, A]``.

    Dimensions that its entries have behind the batch's, as of agents, stand before n.
    """
    wide = state.copy()
    wide.batch_size = rows.shape[:-2]
    return wide.unsqueeze(-1).expand(*rows.shape[:-1])


def _each(observation: Tensor, rows: Tensor) -> Tensor:
    """As :func:`each_state`, of an encoded observation, so that encoders run once per state."""
    if observation.ndim == rows.ndim:
        return observation
    return observation.unsqueeze(-2).expand(*rows.shape[:-1], observation.shape[-1])


def check_diffusion_policy(policy: TensorDictModuleBase) -> None:
    """Raise TypeError unless the policy predicts the noise in an action."""
    _check(policy, hasattr(_core(policy), "predicted_noise"), "DiffusionPolicy")


def check_consistency_policy(policy: TensorDictModuleBase) -> None:
    """Raise TypeError unless the policy has a consistency function."""
    _check(policy, hasattr(_core(policy), "consistency"), "ConsistencyPolicy")


def predicted_noise(
    policy: TensorDictModuleBase, state: TensorDictBase, action: Tensor, noise: Tensor, time: Tensor
) -> Tensor:
    """eps(s, x_t, t) ``[*B, A]`` of the action ``[*B, A]`` noised to time ``[*B, 1]`` by noise ``[*B, A]``."""
    core = _core(policy)
    signal, spread = core.signal_and_noise(time)
    return core.predicted_noise(_observation(policy, state), signal * action + spread * noise, time)


def signal_and_noise(policy: TensorDictModuleBase, time: Tensor) -> tuple[Tensor, Tensor]:
    """Scales ``[*B, 1]`` of action and noise in x_t of a diffusion policy."""
    return _core(policy).signal_and_noise(time)


def draw_time(policy: TensorDictModuleBase, action: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Times ``[*B, 1]`` of a diffusion: uniform steps 0..T-1, or in continuous time uniform in [low, high]."""
    core, like = _core(policy), action[..., :1]
    if core.schedule == "ddpm":
        return torch.randint_like(like, core.num_steps).long()
    return low + (high - low) * torch.rand_like(like)


def num_steps(policy: TensorDictModuleBase) -> int:
    """Steps M of a flow; rows of noise of one sample of a policy that adds noise between its steps."""
    return _core(policy).num_steps


def act_in_steps(policy: TensorDictModuleBase, state: TensorDictBase, noise: Tensor) -> Tensor:
    """Action ``[*B, A]`` of a policy that adds noise between its K steps, by ``[*B, K, A]``."""
    key, head = noise_key(policy), last_policy(policy)
    if key is None or not is_wrapped(head):
        return head.module(_observation(policy, state), noise)
    return policy(state.select(*state_keys(policy)).set(key, noise))[policy.out_keys[-1]]


def noise_levels(policy: TensorDictModuleBase) -> tuple[float, float]:
    """The lowest and the highest noise level of a consistency policy."""
    return _core(policy).sigma_min, _core(policy).sigma_max


def consistency(policy: TensorDictModuleBase, state: TensorDictBase, x: Tensor, sigma: Tensor) -> Tensor:
    """f(s, x, sigma) ``[*B, A]`` of a consistency policy; sigma ``[*B, 1]``."""
    return _core(policy).consistency(_observation(policy, state), x, sigma)


def _core(policy: TensorDictModuleBase) -> Any:
    return getattr(last_policy(policy), "module", None)


def _observation(policy: TensorDictModuleBase, state: TensorDictBase) -> Tensor:
    return encode(policy, state)[last_policy(policy).in_keys[0]]


def _check(policy: TensorDictModuleBase, condition: bool, kind: str) -> None:
    if condition:
        check_encoders(policy)
    else:
        raise TypeError(f"the policy must be a {kind}, got {type(policy).__name__}; encoders may stand before it")
