# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DSRL: a policy over the starting noise of a flow, taught by critics of that noise (https://arxiv.org/abs/2506.15799).

As in the code base of QAM, whose flow is cloned in the same updates. The numbers here are held against these equations, written
out by hand; they were not compared with runs of that code, nor with DSRL's own, which

1. steers a frozen diffusion policy, online only (``freeze_prior=True`` has the frozen policy);
2. has the entropy in its targets, and a target entropy of 0;
3. teaches the latent critics in steps of their own.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.critics import CriticEnsemble
from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, term
from deflow_torchrl.objectives.best_of_n import BestOfNLoss

_LATENT_NOISE = "latent_noise"


class DSRLLoss(BestOfNLoss):
    """The losses of DSRL, each with gradients to its own part only.

    With act(s; e) = flow_target(s, w), w = c tanh u, tanh u = actor(s; e), of N such actions the best by the mean of the online
    critics:

    * ``loss_flow`` trains the flow on the data's actions: :class:`FlowMatchingLoss`;
    * ``loss_latent = mean_{j,batch} (W_j(s, w) - sg Q_j(s, flow_target(s, w)))^2``, w ~ N(0, I), trains the latent critics W;
    * ``loss_actor = mean[sg(alpha) log p(tanh u) - mean_j W_j(s, c tanh u)]`` trains the actor; sg: W;
    * ``loss_alpha = alpha (-mean sg(log p) - H)`` trains ``log_alpha``, alpha = exp(log_alpha);
    * ``loss_qvalue`` as that of :class:`FEditLoss`, with a' = act(s').

    Each is also a method. Metadata: ``alpha``, ``entropy`` (-mean log p) and ``q`` (mean of W at the actor's w).

    Args:
        flow_policy (FlowMatchingPolicy): the flow; its target samples. Frozen, any policy that maps an observation and noise
            ``[..., A]`` to an action.
        actor_network (TanhGaussianPolicy): reads the state and writes w / c, inside [-1, 1].
        qvalue_network: critics of actions; see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.
        latent_qvalue_network: as many critics that read w under ``action``.

    Keyword Args:
        noise_scale (float): c, the largest |w| of a dimension.
        best_of_n (int, optional): N. Defaults to ``1``.
        pessimism (float, optional): rho of mean - rho std over the target critics. Defaults to ``0.5``.
        target_entropy (float, optional): H, of tanh u. Defaults to -A / 2.
        alpha_init (float, optional): start of alpha. Defaults to ``1.0``.
        freeze_prior (bool, optional): the flow does not learn: no ``loss_flow``, no target of it. Defaults to ``False``.
        delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if a policy is of another kind.
        ValueError: on an option out of range.

    Random draws may be given in the input, else they are drawn from torch's global generator in this order, all N(0, I) but
    the time: ``("next", "noise") [..., N, A]`` of the actor; ``latent_noise [..., A]``; ``flow_noise [..., A]``,
    ``flow_time [..., 1]`` (U[0, 1)); ``noise [..., A]`` of the actor.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import (
        ...     FlowMatchingPolicy, TanhGaussianPolicy,
        ...     make_qvalue_networks, make_tanh_gaussian_network, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> actor = TanhGaussianPolicy(make_tanh_gaussian_network(3, 2, (16,)), log_std_min=-20.0)
        >>> critics, latent = (make_qvalue_networks(3, 2, (16,)) for _ in range(2))
        >>> loss = DSRLLoss(flow, actor, critics, latent, noise_scale=1.0)
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss.latent_loss(data)[0].shape
        torch.Size([])
    """

    out_keys = [
        *("loss_flow", "loss_actor", "loss_alpha", "loss_qvalue", "loss_latent"),
        *("alpha", "entropy", "q"),
    ]
    _schedulable_buffers = frozenset({"noise_scale", "target_entropy"})

    latent_qvalue_network: nn.Module
    latent_qvalue_network_params: TensorDictParams
    target_latent_qvalue_network_params: TensorDictParams
    noise_scale: Tensor

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        latent_qvalue_network: Critics,
        *,
        noise_scale: float,
        best_of_n: int = 1,
        pessimism: float = 0.5,
        target_entropy: float | None = None,
        alpha_init: float = 1.0,
        freeze_prior: bool = False,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        (acting.check_noise_policy if freeze_prior else acting.check_flow_policy)(flow_policy)
        acting.check_tanh_gaussian_policy(actor_network)
        super().__init__(reduction=reduction)
        self._add_policy(flow_policy, "flow_policy", create_target_params=not freeze_prior)
        self.prior_frozen = freeze_prior
        if freeze_prior:
            self.out_keys = [key for key in self.out_keys if key != "loss_flow"]
            self.flow_policy_params.requires_grad_(False)
        self._add_policy(actor_network, "actor_network")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self._add_further_critics(
            latent_qvalue_network,
            "latent_qvalue_network",
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
        )
        self._add_coefficient("noise_scale", noise_scale)
        self._add_temperature(alpha_init, target_entropy)
        self._set_choice(best_of_n, pessimism)

    @property
    def latent_critics(self) -> CriticEnsemble:
        """The critics of starting noise, to be evaluated."""
        return self.__dict__["_critics"][1]

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        acts = [*acting.state_keys(self.flow_policy), *acting.state_keys(self.actor_network), *self.critics.state_keys]
        return [
            *(*acts, *self.latent_critics.state_keys),
            self.tensor_keys.action,
            *self._next_keys(*acts),
        ]

    def _optional_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        flow = [keys.flow_noise, keys.flow_time] if self.prior_frozen else []
        return [key for key in [*self._sampling_keys(), _LATENT_NOISE] if key not in flow]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        # In this order: draws that the input lacks are taken from one generator.
        of_critics, of_latent = self.critics.encode(tensordict), self.latent_critics.encode(tensordict)
        critic_terms = self._critic_terms(of_critics)
        loss_latent = self._latent_term(tensordict, of_critics, of_latent)
        flow = {} if self.prior_frozen else {"loss_flow": self._flow_term(tensordict)}
        actor_terms = self._actor_terms(tensordict, of_latent)
        return {**flow, **actor_terms, **critic_terms, "loss_latent": loss_latent}

    def _flow_term(self, tensordict: TensorDictBase) -> Tensor:
        if self.prior_frozen:
            raise RuntimeError("the prior is frozen: it has no flow loss")
        return super()._flow_term(tensordict)

    def _candidates(self, tensordict: TensorDictBase, following: TensorDictBase) -> Tensor:
        noise = self._draw_candidates(tensordict, self.tensor_keys.noise)
        latent = self.noise_scale * acting.sample_and_log_prob(self.actor_network, following, noise)[0]
        return self._steered(following, latent)

    def _steered(self, state: TensorDictBase, latent: Tensor) -> Tensor:
        """flow_target(s, w), without gradient."""
        with torch.no_grad(), self._target_flow():
            return acting.act(self.flow_policy, state, latent)

    def _latent_values(self, state: TensorDictBase, latent: Tensor, *, frozen: bool = False) -> Tensor:
        """W_j(s, w) ``[J, *B]``."""
        rows = self.latent_critics.state_of(state).set(self.tensor_keys.action, latent)
        return self.latent_critics.values(rows, frozen=frozen)

    def _latent_term(self, tensordict: TensorDictBase, of_critics: TensorDictBase, of_latent: TensorDictBase) -> Tensor:
        latent = self._draw(tensordict, _LATENT_NOISE)
        with torch.no_grad():  # sg: the online critics teach, each its own
            taught = self.critics.values(self._with_action(of_critics, self._steered(tensordict, latent)))
        error = self._latent_values(of_latent, latent) - taught
        return self._reduce(error.square().mean(0), tensordict)

    def _actor_terms(self, tensordict: TensorDictBase, of_latent: TensorDictBase) -> dict[str, Tensor]:
        noise = self._draw(tensordict, self.tensor_keys.noise)
        action, log_prob = acting.sample_and_log_prob(self.actor_network, tensordict, noise)
        # sg: the latent critics and alpha
        qvalue = self._latent_values(of_latent, self.noise_scale * action, frozen=True).mean(0)
        return {
            "loss_actor": self._reduce(self.alpha * log_prob - qvalue, tensordict),
            **self._temperature_terms(log_prob, tensordict),
            "q": self._statistic(qvalue, tensordict),
        }

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the actor's and latent critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``alpha``, ``entropy`` and ``q``, detached.
        """
        return self._one_term("loss_actor", self._actor_terms(tensordict, tensordict))

    @term
    def alpha_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_alpha``; inputs and metadata as in :meth:`actor_loss`."""
        return self._one_term("loss_alpha", self._actor_terms(tensordict, tensordict))

    @term
    def latent_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_latent``.

        Args:
            tensordict: all observations and ``action [..., A]`` (for its shape and type); optionally ``latent_noise [..., A]``.

        Returns:
            The loss and no metadata.
        """
        return self._latent_term(tensordict, tensordict, tensordict), {}
