# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DeFlow: flow prior, trust-region refinement and twin critic, trained side by side (Algorithm 1).

Where the authors' released code and the paper differ:
  1. Eq. 5 and Eq. 10-12 are written with squared norms, sums over action dimensions; the code averages over them, so that delta
     is per dimension. Default here: the average (``divergence_reduction="sum"`` is Eq. 10 as printed).
  2. Eq. 12 descends in alpha >= 0, the code in log alpha, which starts at 1.0 (alpha = e). Default here: the code.
  3. The code multiplies a fixed alpha twice. Here it multiplies once.
  4. The code has no bound on alpha. Here there is none by default (``min_alpha``, ``max_alpha``).
  5. The paper says Q-normalisation as in FQL; FQL's runs do not normalise, DeFlow's released commands do. Default here: do.
  6. The critics' loss is averaged over them, where TorchRL and others sum. Default here: the average.
  7. The released "frozen" prior stays in the optimiser, whose momentum moves it. Here a frozen prior does not move.
  8. The code moves the targets towards the critics of *before* the optimiser's step. That order is the caller's:
     ``SoftUpdate.step()`` before ``optimizer.step()``, as in :class:`deflow_torchrl.trainers.UpdateStep`.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.critics import check_aggregation
from deflow_torchrl.modules.flow import Precision, check_precision
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, next_key, term
from deflow_torchrl.objectives.refined_actor import RefinedActorLoss


class DeFlowLoss(RefinedActorLoss):
    """The four losses of DeFlow (https://muzhancun.github.io/preprints/deflow), each with gradients to its own part only.

    With b = sg(flow(s, z)), d = f(s, b), D = mean over batch and action dims of d^2:

    * ``loss_flow = mean |v(s, x_t, t) - (a - z)|^2``, ``x_t = (1 - t) z + t a``, trains the prior;
    * ``loss_actor = -lambda mean_{j,batch} Q_j(s, clip(b + d)) + sg(alpha) D`` trains the refinement, critics fixed;
      ``lambda = sg(1 / mean|mean_j Q_j|)`` if ``normalize_q_loss``, else 1;
    * ``loss_alpha = -log_alpha (sg(D) - delta)``, ``alpha = exp(log_alpha)``: alpha rises iff D exceeds delta;
    * ``loss_qvalue = mean_{j,batch} (Q_j(s, a) - y)^2`` trains the critics on
      ``y = r + gamma (1 - terminated) agg_j Qbar_j(s', clip(b' + f(s', b')))``. Truncated transitions bootstrap.

    Each is also a method: ``flow_loss``, ``actor_loss``, ``alpha_loss``, ``qvalue_loss``. Metadata: ``alpha``, ``divergence``.
    Sum them, go back, step ``SoftUpdate`` and one optimiser.

    Args:
        actor_network (DeFlowActor): the acting policy, prior and refinement; encoders may stand before either.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        target_divergence (float, optional): delta, the mean-square shift per action dimension, in squared action units.
            Defaults to ``1e-3`` (the paper's value for cube and scene).
        normalize_q_loss (bool, optional): scale the Q term by lambda. Defaults to ``True``.
        divergence_reduction (str, optional): ``"mean"`` (default) or ``"sum"`` over action dimensions.
        log_alpha_init (float, optional): start of log alpha. Defaults to ``1.0``.
        min_alpha (float, optional): lower bound of alpha, > 0. Defaults to none.
        max_alpha (float, optional): upper bound of alpha. Defaults to none.
        fixed_alpha (float, optional): a constant multiplier; ``loss_alpha`` is then zero. Defaults to none.
        freeze_prior (bool, optional): the prior does not learn and there is no ``loss_flow``: see :meth:`freeze_prior_`,
            which does the same in mid-training. The prior may then be any TensorDictModule that writes the refinement's base
            action, and it is not called where the input holds base actions of s and s' already
            (:class:`~deflow_torchrl.data.BaseActionBank`). Defaults to ``False``.
        sampler_precision (str, optional): of the matrix products that sample base actions, without gradient:
            ``"highest"`` (default), ``"high"``, ``"medium"`` or ``"bfloat16"``, see
            :func:`~deflow_torchrl.modules.flow.matmul_precision`.
        q_aggregation, delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see
            :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if the actor's prior is to learn and is not a :class:`~deflow_torchrl.modules.FlowMatchingPolicy`.
        ValueError: on a non-positive delta or alpha, crossed bounds or an unknown option.

    Random draws may be given in the input, else they are drawn from torch's global generator in this order: ``noise``,
    ``("next", "noise")``, ``flow_noise`` (all N(0, I), ``[..., A]``), ``flow_time`` (U[0, 1), ``[..., 1]``). Those of a
    :class:`~deflow_torchrl.modules.FlowCriticEnsemble` come first, ``noise`` then comes last. With a frozen
    prior ``base_action`` and ``("next", "base_action")`` may be given, each in the place of its noise.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import (
        ...     DeFlowActor, FlowMatchingPolicy, RefinementPolicy,
        ...     make_qvalue_networks, make_refinement_network, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(3, 2, (16,)), 2, low=-1.0, high=1.0))
        >>> loss = DeFlowLoss(actor, make_qvalue_networks(3, 2, (16,)), target_divergence=1e-3)
        >>> _ = loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2),
        ...     next=TensorDict(observation=torch.randn(4, 3), reward=torch.randn(4, 1),
        ...                     done=torch.zeros(4, 1, dtype=torch.bool), terminated=torch.zeros(4, 1, dtype=torch.bool),
        ...                     batch_size=[4]),
        ...     batch_size=[4])
        >>> sorted(loss(data).keys())
        ['alpha', 'divergence', 'loss_actor', 'loss_alpha', 'loss_flow', 'loss_qvalue']

    This class is compatible with non-tensordict based modules too and can be used without recurring to any
    tensordict-related primitive; select the outputs you want:

        >>> _ = loss.select_out_keys("loss_flow", "loss_qvalue")
        >>> loss_flow, loss_qvalue = loss(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2), next_observation=torch.randn(4, 3),
        ...     next_reward=torch.randn(4, 1), next_done=torch.zeros(4, 1, dtype=torch.bool),
        ...     next_terminated=torch.zeros(4, 1, dtype=torch.bool))
        >>> loss_flow.shape
        torch.Size([])
    """

    out_keys = ["loss_flow", "loss_actor", "loss_alpha", "loss_qvalue", "alpha", "divergence"]

    def __init__(
        self,
        actor_network: DeFlowActor,
        qvalue_network: Critics,
        *,
        target_divergence: float = 1e-3,
        q_aggregation: str | float = "mean",
        normalize_q_loss: bool = True,
        divergence_reduction: str = "mean",
        log_alpha_init: float = 1.0,
        min_alpha: float | None = None,
        max_alpha: float | None = None,
        fixed_alpha: float | None = None,
        freeze_prior: bool = False,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
        sampler_precision: Precision = "highest",
    ) -> None:
        check_precision(sampler_precision)
        check_aggregation(q_aggregation)
        super().__init__(actor_network, freeze_prior=freeze_prior, reduction=reduction)
        if not freeze_prior:
            acting.check_flow_policy(actor_network.flow_policy)
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self._add_trust_region(
            target_divergence=target_divergence,
            divergence_reduction=divergence_reduction,
            log_alpha_init=log_alpha_init,
            min_alpha=min_alpha,
            max_alpha=max_alpha,
            fixed_alpha=fixed_alpha,
        )
        self.q_aggregation = q_aggregation
        self.normalize_q_loss = normalize_q_loss
        self.sampler_precision = sampler_precision

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        following = None if tensordict is None else tensordict.get("next", None)
        critic = self.critics.state_keys
        return [
            *self._actor_keys(tensordict),
            *critic,
            self.tensor_keys.action,
            *self._next_keys(*self._actor_keys(following, self.critics.next_samples), *critic),
        ]

    def _optional_keys(self) -> list[NestedKey]:
        keys, draws = self.tensor_keys, self._draw_keys()
        flow = [] if self.prior_frozen else [keys.flow_noise, keys.flow_time]
        return [*draws, *map(next_key, draws), *self.critics.draw_keys, *flow, keys.valid]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        of_prior, of_critics = self._read_by_prior(tensordict), self.critics.encode(tensordict)
        if self.critics.next_samples is not None:
            critic_terms = self._critic_terms(of_critics)  # theirs are the first draws of the reference
            flow = self._flow_terms(of_prior)
            base_action = self._base_action(of_prior)
            loss_actor, divergence = self._actor_term(tensordict, base_action, of_critics)
        else:
            following = self._next(tensordict)
            base_action, next_base_action = self._base_actions(of_prior, following)
            flow = self._flow_terms(of_prior)
            loss_actor, divergence = self._actor_term(tensordict, base_action, of_critics)
            critic_terms = self._td_terms(of_critics, lambda: self._refined(following, next_base_action))
        return {
            **flow,
            "loss_actor": loss_actor,
            "loss_alpha": self._alpha_term(tensordict, divergence),
            **self._multiplier_metadata(tensordict, divergence),
            **critic_terms,
        }

    def _critic_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """Eq. 2, or the terms of critics of another kind, at a' of the actor, without gradient to it."""
        following = self._next(tensordict)
        base_action = self._next_base_action(tensordict, following)
        return self._td_terms(tensordict, lambda: self._refined(following, base_action))

    def _flow_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return {} if self.prior_frozen else {"loss_flow": self._flow_term(tensordict)}

    def _flow_term(self, tensordict: TensorDictBase) -> Tensor:
        """Eq. 5: the prior follows the data, whatever the critics say."""
        return self._reduce(self._flow_error(self.actor_network.flow_policy, tensordict), tensordict)

    def _actor_term(
        self, tensordict: TensorDictBase, base_action: Tensor, of_critics: TensorDictBase
    ) -> tuple[Tensor, Tensor]:
        """Eq. 11: (loss_actor, D of every sample). sg: the base action, the critics, lambda and alpha."""
        shift, action = self._refine(tensordict, base_action)
        divergence = terms.divergence(shift, self.divergence_reduction)
        qvalue = self.critics.values(self._with_action(of_critics, action), frozen=True).mean(0)
        loss = terms.trust_region(qvalue, divergence, alpha=self.alpha, scale=self._q_scale(qvalue, tensordict))
        return self._reduce(loss, tensordict), divergence.detach()

    def _alpha_term(self, tensordict: TensorDictBase, divergence: Tensor) -> Tensor:
        """Eq. 12 in log alpha. sg: D; the constraint moves the multiplier, never the refinement."""
        if self.fixed_alpha is not None:
            return self._reduce(torch.zeros_like(divergence), tensordict)
        excess = divergence - self.target_divergence
        return self._reduce(terms.multiplier(self._project_log_alpha(), excess), tensordict)

    def _multiplier_metadata(self, tensordict: TensorDictBase, divergence: Tensor) -> dict[str, Tensor]:
        return {"alpha": self.alpha, "divergence": self._statistic(divergence, tensordict)}

    @term
    def flow_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow``; inputs as in :meth:`FlowMatchingLoss.flow_loss`.

        Raises:
            RuntimeError: if the prior is frozen.
        """
        if self.prior_frozen:
            raise RuntimeError("the prior is frozen: it has no flow loss")
        return self._flow_term(tensordict), {}

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the actor's and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``alpha`` and ``divergence``, detached.
        """
        loss, divergence = self._actor_term(tensordict, self._base_action(tensordict), tensordict)
        return loss, self._multiplier_metadata(tensordict, divergence)

    @term
    def alpha_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_alpha``; inputs and metadata as in :meth:`actor_loss`."""
        with torch.no_grad():
            shift, _ = self._refine(tensordict, self._base_action(tensordict))
            divergence = terms.divergence(shift, self.divergence_reduction)
        return self._alpha_term(tensordict, divergence), self._multiplier_metadata(tensordict, divergence)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``.

        Args:
            tensordict: observation, ``action [..., A]`` and, under ``"next"``, observation, reward, done and terminated
                ``[..., 1]``; optionally ``("next", "noise") [..., A]``.

        Returns:
            The loss and metadata ``td_error [...]``, detached.
        """
        return self._one_term("loss_qvalue", self._critic_terms(tensordict))

    @term
    def flow_critic_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow_critic`` of a :class:`~deflow_torchrl.modules.FlowCriticEnsemble`.

        Args:
            tensordict: as in :meth:`qvalue_loss`, and the critics' draws.

        Returns:
            The loss and metadata ``td_error [...]`` and ``return_std``, detached.

        Raises:
            RuntimeError: if the critics are of another kind.
        """
        return self._one_term("loss_flow_critic", self._critic_terms(tensordict))
