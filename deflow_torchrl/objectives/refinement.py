# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Refinement and multiplier losses (DeFlow Eq. 10-12).

Where the released code and the paper differ:
  1. Eq. 10-12 constrain |da|^2, a sum over action dimensions; the code averages over them, so that delta is per dimension.
     Default here: the average (``divergence_reduction="sum"`` is the printed equation).
  2. Eq. 12 descends in alpha >= 0, the code in log alpha, which starts at 1.0 (alpha = e). Default here: the code.
  3. The code multiplies a fixed alpha twice. Here it multiplies once.
  4. The code has no bound on alpha. Here there is none by default (``min_alpha``, ``max_alpha``).
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.objectives.common import Critics, OffPolicyLoss, Reduction

_UNBOUNDED = (-math.inf, math.inf)


class RefinementLoss(OffPolicyLoss):
    """Move sampled actions towards higher Q inside the trust region E|da|^2 <= delta (DeFlow Eq. 10-12).

    With b = sg(flow(s, z)), d = f(s, b), D = mean over batch and action dims of d^2:

    * ``loss_actor = -lambda mean_{j,batch} Q_j(s, clip(b + d)) + sg(alpha) D``, critics fixed,
      ``lambda = sg(1 / mean|mean_j Q_j|)`` if ``normalize_q_loss``, else 1;
    * ``loss_alpha = -log_alpha (sg(D) - delta)``, ``alpha = exp(log_alpha)``: alpha rises iff D exceeds delta.

    Args:
        actor_network (DeFlowActor): the acting policy. Only its refinement receives gradient from this loss.
        qvalue_network (list of TensorDictModule, TensorDictModule or TDCriticLoss): critics reading the observation and
            ``action`` and writing ``state_action_value [..., 1]``. A list is stacked into a copy that keeps its
            initialisation; one module is copied ``num_qvalue_nets`` times, all but the first copy re-initialised by their
            own layers. To follow critics that are trained elsewhere give the :class:`TDCriticLoss` that trains them, whose
            parameters are then shared.

    Keyword Args:
        target_divergence (float): delta, the mean-square shift per action dimension (in squared action units).
        normalize_q_loss (bool, optional): scale the Q term by lambda. Defaults to ``True``.
        divergence_reduction (str, optional): ``"mean"`` (default) or ``"sum"`` over action dimensions.
        log_alpha_init (float, optional): start of log alpha. Defaults to ``1.0``.
        min_alpha (float, optional): lower bound of alpha, > 0. Defaults to none.
        max_alpha (float, optional): upper bound of alpha. Defaults to none.
        fixed_alpha (float, optional): a constant multiplier; ``loss_alpha`` is then zero. Defaults to none.
        freeze_prior (bool, optional): see :meth:`freeze_prior_`. Base actions are then read from the input where it has them.
            Defaults to ``False``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

    Raises:
        ValueError: on a non-positive delta or alpha, crossed bounds or an unknown option.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import (
        ...     DeFlowActor, FlowMatchingPolicy, RefinementPolicy,
        ...     make_qvalue_networks, make_refinement_network, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(3, 2, (16,)), 2, low=-1.0, high=1.0))
        >>> loss = RefinementLoss(actor, make_qvalue_networks(3, 2, (16,)), target_divergence=1e-3)
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> sorted(loss(data).keys())
        ['alpha', 'divergence', 'loss_actor', 'loss_alpha']

    Without tensordict: ``loss_actor, loss_alpha, alpha, divergence = loss(observation=..., action=...)``.
    """

    out_keys = ["loss_actor", "loss_alpha", "alpha", "divergence"]
    _schedulable_buffers = frozenset({"target_divergence"})

    log_alpha: Tensor
    target_divergence: Tensor

    def __init__(
        self,
        actor_network: DeFlowActor,
        qvalue_network: Critics,
        *,
        target_divergence: float,
        normalize_q_loss: bool = True,
        divergence_reduction: str = "mean",
        log_alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        fixed_alpha: float | None = None,
        freeze_prior: bool = False,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__(reduction=reduction)
        self._set_actor(actor_network, freeze_prior=freeze_prior)
        # The actor climbs the online critics: this loss alone needs no targets.
        self._set_critic(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            create_target_params=False,
            deactivate_vmap=deactivate_vmap,
        )
        self._set_trust_region(
            target_divergence=target_divergence,
            normalize_q_loss=normalize_q_loss,
            divergence_reduction=divergence_reduction,
            log_alpha_init=log_alpha_init,
            min_alpha=min_alpha,
            max_alpha=max_alpha,
            fixed_alpha=fixed_alpha,
        )

    def _set_trust_region(
        self,
        *,
        target_divergence: float,
        normalize_q_loss: bool,
        divergence_reduction: str,
        log_alpha_init: float,
        min_alpha: float | None,
        max_alpha: float | None,
        fixed_alpha: float | None,
    ) -> None:
        if not target_divergence > 0:
            raise ValueError(f"target_divergence must be positive, got {target_divergence}")
        if divergence_reduction not in ("mean", "sum"):
            raise ValueError(f"divergence_reduction must be 'mean' or 'sum', got {divergence_reduction!r}")
        if fixed_alpha is not None and not fixed_alpha >= 0:
            raise ValueError(f"fixed_alpha must not be negative, got {fixed_alpha}")
        low = _UNBOUNDED[0] if min_alpha is None else _log(min_alpha, "min_alpha")
        high = _UNBOUNDED[1] if max_alpha is None else _log(max_alpha, "max_alpha")
        if low > high:
            raise ValueError(f"min_alpha must not exceed max_alpha, got {min_alpha} and {max_alpha}")
        example = next(iter(self.actor_network_params.values(True, True)))
        device, dtype = example.device, example.dtype
        self.normalize_q_loss = normalize_q_loss
        self.divergence_reduction = divergence_reduction
        self.register_coeff_buffer("target_divergence", float(target_divergence), device=device, dtype=dtype)
        self.fixed_alpha = fixed_alpha is not None
        self._log_alpha_bounds = _UNBOUNDED if fixed_alpha is not None else (low, high)
        if fixed_alpha is not None:
            log_alpha = -math.inf if fixed_alpha == 0 else math.log(fixed_alpha)
            self.register_buffer("log_alpha", torch.tensor(log_alpha, device=device, dtype=dtype))
        else:
            self.log_alpha = torch.nn.Parameter(torch.tensor(float(log_alpha_init), device=device, dtype=dtype))

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        keys = [*self._actor_keys(tensordict), *self._critic_keys()]
        # The data's action only gives the noise its shape and type.
        return keys if self._given_base_action(tensordict) is not None else [*keys, self.tensor_keys.action]

    def _optional_keys(self) -> list[NestedKey]:
        return self._draw_keys()

    @property
    def alpha(self) -> Tensor:
        """The multiplier alpha inside its bounds, detached scalar."""
        return self.log_alpha.detach().clamp(*self._log_alpha_bounds).exp()

    def _divergence(self, shift: Tensor) -> Tensor:
        """D of each sample from the unclipped shift ``[..., A]``."""
        squared = shift.square()
        return squared.mean(-1) if self.divergence_reduction == "mean" else squared.sum(-1)

    def _actor_loss(self, tensordict: TensorDictBase, base_action: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss_actor, detached divergence of each sample)."""
        shift, action = self._refine(tensordict, base_action)
        divergence = self._divergence(shift)
        # Eq. 11: critics fixed. Their gradients would be thrown away, so their parameters enter detached.
        qvalue = self._qvalues(tensordict, action, self.qvalue_network_params, frozen=True).mean(0)
        loss = -self._q_scale(qvalue, tensordict) * qvalue + self.alpha * divergence
        return self._reduce_term(loss, tensordict), divergence.detach()

    def _alpha_loss(self, tensordict: TensorDictBase, divergence: Tensor) -> Tensor:
        """Eq. 12 in log alpha; ``divergence`` is detached: the constraint drives the multiplier, never the refinement."""
        if self.fixed_alpha:
            return self._reduce_term(torch.zeros_like(divergence), tensordict)
        if self._log_alpha_bounds != _UNBOUNDED:
            # Projection: without it the parameter itself would run on behind a bound that only its exponential obeys.
            with torch.no_grad():
                self.log_alpha.copy_(self.log_alpha.clamp(*self._log_alpha_bounds))  # clamp_ has no rule for vmap
        return self._reduce_term(-self.log_alpha * (divergence - self.target_divergence), tensordict)

    def _current_base_action(self, tensordict: TensorDictBase) -> Tensor:
        """Base action of s, given or drawn."""
        given = self._given_base_action(tensordict)
        if given is not None:
            return given
        return self._base_action(tensordict, self._noise(tensordict, self.tensor_keys.noise))

    def _refinement_terms(self, tensordict: TensorDictBase, base_action: Tensor) -> dict[str, Tensor]:
        loss_actor, divergence = self._actor_loss(tensordict, base_action)
        return {
            "loss_actor": loss_actor,
            "loss_alpha": self._alpha_loss(tensordict, divergence),
            "alpha": self.alpha,
            "divergence": self._statistic(divergence, tensordict),
        }

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return self._refinement_terms(tensordict, self._current_base_action(tensordict))

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_actor``.

        Args:
            tensordict: the actor's and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``alpha`` and ``divergence``, detached.
        """
        tensordict = self._blank_masked_rows(tensordict)
        with self._acting():
            loss, divergence = self._actor_loss(tensordict, self._current_base_action(tensordict))
        return loss, {"alpha": self.alpha, "divergence": self._statistic(divergence, tensordict)}

    def alpha_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_alpha``; inputs and metadata as in :meth:`actor_loss`."""
        tensordict = self._blank_masked_rows(tensordict)
        with self._acting(), torch.no_grad():
            divergence = self._divergence(self._refine(tensordict, self._current_base_action(tensordict))[0])
        loss = self._alpha_loss(tensordict, divergence)
        return loss, {"alpha": self.alpha, "divergence": self._statistic(divergence, tensordict)}


def _log(value: float, name: str) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return math.log(value)
