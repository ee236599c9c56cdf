# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What the losses of a DeFlow actor share: its prior, which may be frozen, and its refined actions."""

from __future__ import annotations

from typing import Any, Self

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.flow import Precision, matmul_precision
from deflow_torchrl.modules.policies import encode, is_flow, last_policy
from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import OffPolicyLoss, Reduction, next_key


class RefinedActorLoss(OffPolicyLoss):
    """Base of the losses whose ``actor_network`` is a :class:`~deflow_torchrl.modules.DeFlowActor`.

    With a frozen prior base actions are read from the input where it has them, under the refinement's base action key for s
    and under ``("next", that key)`` for s', and drawn from the prior where it has not. Those of a prior that learns are never
    read: it has changed since they were drawn.

    Raises:
        TypeError: if ``actor_network`` has no prior and refinement.
    """

    _schedulable_buffers = frozenset({"target_divergence", "min_alpha", "max_alpha"})

    out_keys: list[str]
    actor_network: DeFlowActor
    log_alpha: Tensor
    target_divergence: Tensor
    min_alpha: Tensor | None
    max_alpha: Tensor | None
    _gives_samples = True
    prior_frozen: bool = False
    sampler_precision: Precision = "highest"
    """Of the matrix products that sample base actions; everything that has a gradient is computed in full."""

    def __init__(self, actor_network: DeFlowActor, *, freeze_prior: bool, reduction: Reduction | None) -> None:
        super().__init__(reduction=reduction)
        if not (hasattr(actor_network, "flow_policy") and hasattr(actor_network, "refinement_policy")):
            raise TypeError(f"actor_network must be a DeFlowActor, got {type(actor_network).__name__}")
        self._add_policy(actor_network, "actor_network")
        if freeze_prior:
            self.freeze_prior_()

    def _add_trust_region(
        self,
        *,
        target_divergence: float,
        divergence_reduction: str,
        log_alpha_init: float,
        min_alpha: float | None,
        max_alpha: float | None,
        fixed_alpha: float | None,
    ) -> None:
        """Keep delta and the multiplier: a parameter ``log_alpha`` inside its bounds, or a constant ``fixed_alpha``."""
        for name, value in (
            ("target_divergence", target_divergence),
            ("min_alpha", min_alpha),
            ("max_alpha", max_alpha),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if min_alpha is not None and max_alpha is not None and min_alpha > max_alpha:
            raise ValueError(f"min_alpha must not exceed max_alpha, got {min_alpha} and {max_alpha}")
        if fixed_alpha is not None and not fixed_alpha >= 0:
            raise ValueError(f"fixed_alpha must not be negative, got {fixed_alpha}")
        if divergence_reduction not in ("mean", "sum"):
            raise ValueError(f"divergence_reduction must be 'mean' or 'sum', got {divergence_reduction!r}")
        self.divergence_reduction = divergence_reduction
        self._add_coefficient("target_divergence", target_divergence, exact=False)
        self._add_coefficient("min_alpha", min_alpha if fixed_alpha is None else None)
        self._add_coefficient("max_alpha", max_alpha if fixed_alpha is None else None)
        log_alpha = torch.full_like(self.target_divergence, log_alpha_init)
        if fixed_alpha is None:
            self.log_alpha = torch.nn.Parameter(log_alpha)
        else:
            self.register_buffer("log_alpha", log_alpha)
            self.fixed_alpha = fixed_alpha

    @property
    def alpha(self) -> Tensor:
        """The multiplier alpha inside its bounds, detached scalar."""
        return self._bounded(self.log_alpha.detach()).exp()

    @property
    def fixed_alpha(self) -> Tensor | None:
        """The constant multiplier, which may be assigned to; None where alpha tunes itself."""
        return self.alpha if "log_alpha" in self._buffers else None

    @fixed_alpha.setter
    def fixed_alpha(self, value: float) -> None:
        if "log_alpha" not in self._buffers:
            raise AttributeError("alpha tunes itself here; build the loss with fixed_alpha=... to set it")
        self.log_alpha.copy_(torch.as_tensor(value, dtype=torch.float64).log())

    def _bounded(self, log_alpha: Tensor) -> Tensor:
        low, high = (None if bound is None else bound.log() for bound in (self.min_alpha, self.max_alpha))
        return log_alpha if low is None and high is None else log_alpha.clamp(low, high).to(log_alpha.dtype)

    def _project_log_alpha(self) -> Tensor:
        """The multiplier's parameter, moved back into its bounds.

        Without it the parameter would run on behind a bound that only its exponential obeys.
        """
        with torch.no_grad():
            self.log_alpha.copy_(self._bounded(self.log_alpha))  # clamp_ has no rule for vmap
        return self.log_alpha

    def freeze_prior_(self) -> Self:
        """Fix the prior for good: its parameters require no gradient any more, in every module that shares them.

        There is no ``loss_flow`` from then on. The state dict carries the flag: a loss that loads it freezes its prior too.

        An optimiser made before keeps the prior's parameters but, finding no gradient, leaves them alone;
        :meth:`deflow_torchrl.trainers.UpdateStep.freeze_prior` takes them out of it.
        """
        self.prior_frozen = True
        self.out_keys = [key for key in self.out_keys if key != "loss_flow"]
        with self._functional_policies():
            for parameter in self.actor_network.flow_policy.parameters():
                parameter.requires_grad_(False)
                # A gradient left over from the last step would be applied once more.
                parameter.grad = None
        return self

    def get_extra_state(self) -> Tensor:
        """Whether the prior is frozen, for the state dict."""
        return torch.tensor(self.prior_frozen)

    def set_extra_state(self, state: Tensor) -> None:
        """Freeze the prior if the state says so; a frozen prior stays frozen."""
        if bool(state) and not self.prior_frozen:
            self.freeze_prior_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # States of before 0.2 lack the flag.
        state_dict.setdefault(f"{prefix}_extra_state", torch.tensor(False))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _given_base_action(self, state: TensorDictBase | None, samples: int | None = None) -> Tensor | None:
        """Base action in the input, ``[*B, A]``; ``[*B, n, A]`` where ``samples`` n are needed: fewer will not do."""
        if not self.prior_frozen or state is None:
            return None
        given = state.get(self.actor_network.base_action_key, None)
        return given if given is None or samples is None or given.ndim == state.ndim + 2 else None

    def _draw_keys(self) -> list[NestedKey]:
        """What may be given of a base action: its noise, and that of a frozen prior itself."""
        return [self.tensor_keys.noise, *([self.actor_network.base_action_key] if self.prior_frozen else [])]

    def _actor_keys(self, state: TensorDictBase | None = None, samples: int | None = None) -> list[NestedKey]:
        """Entries the actor reads of a state: the refinement's alone where the base action is given."""
        actor = self.actor_network
        prior = [] if self._given_base_action(state, samples) is not None else acting.state_keys(actor.flow_policy)
        # A prior of another kind may read noise too, which it draws where it is not given.
        given = {self.tensor_keys.noise, actor.base_action_key}
        return [key for key in dict.fromkeys([*prior, *actor.refinement_policy.in_keys]) if key not in given]

    def _read_by_prior(self, state: TensorDictBase) -> TensorDictBase:
        """A state as a flow reads it behind its encoders, which run here; the state where it holds the base action."""
        prior = self.actor_network.flow_policy
        return encode(prior, state) if is_flow(prior) and self._given_base_action(state) is None else state

    @torch.no_grad()
    def _sample_prior(self, state: TensorDictBase, noise: Tensor) -> Tensor:
        """B = sg(flow(s, z)): the prior's action."""
        prior = self.actor_network.flow_policy
        state = self._read_by_prior(state)
        with matmul_precision(self.sampler_precision, noise.device):
            if is_flow(prior):
                return acting.act(prior, state, noise)
            # A prior of another kind explores in its own way; under the deterministic mode of losses it would not.
            with set_exploration_type(ExplorationType.RANDOM):
                action = prior(acting.each_state(state, noise).copy())[self.actor_network.base_action_key]
                return action.to(noise.dtype)  # under autocast the shift's size is a difference of large numbers

    def _base_action(self, tensordict: TensorDictBase) -> Tensor:
        """Base action of s, given or drawn."""
        given = self._given_base_action(tensordict)
        if given is not None:
            return given
        return self._sample_prior(tensordict, self._draw(tensordict, self.tensor_keys.noise))

    def _next_base_action(self, tensordict: TensorDictBase, following: TensorDictBase) -> Tensor:
        """Base action of s', or n where the critics want n, given or drawn; ``following`` is :meth:`_next` of the batch."""
        given = self._given_base_action(following, self.critics.next_samples)
        return self._sample_prior(following, self._draw_next(tensordict)) if given is None else given

    def _base_actions(self, tensordict: TensorDictBase, following: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Base actions of s and s', independent draws.

        One integration of [s; s'] in 2B rows instead of two: the largest cost of an update, at half the calls.
        """
        states = (tensordict, following)
        if tensordict.ndim == 0 or any(self._given_base_action(state) is not None for state in states):
            return self._base_action(tensordict), self._next_base_action(tensordict, following)
        noise = [self._draw(tensordict, key) for key in (self.tensor_keys.noise, next_key(self.tensor_keys.noise))]
        prior = self.actor_network.flow_policy
        keys = acting.state_keys(last_policy(prior) if is_flow(prior) else prior)
        with torch.no_grad():
            both = torch.cat([self._read_by_prior(state).select(*keys) for state in states], 0)
        return self._sample_prior(both, torch.cat(noise, 0)).chunk(2, 0)  # type: ignore[return-value]

    def _refine(self, state: TensorDictBase, base_action: Tensor) -> tuple[Tensor, Tensor]:
        """(d, a) = (f(s, b), clip(b + d)) with gradient to the refinement; d in the type of the parameters."""
        shift, action = acting.refine(self.actor_network.refinement_policy, state, base_action)
        return shift.to(base_action.dtype), action

    @torch.no_grad()
    def _refined(self, following: TensorDictBase, next_base_action: Tensor) -> TensorDictBase:
        """S' with a' = clip(b' + f(s', b')), without gradient."""
        return self._with_action(following, self._refine(following, next_base_action)[1])
