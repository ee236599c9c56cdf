# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""RLPD (https://arxiv.org/abs/2302.02948), as FQL's comparison runs it: soft actor-critic with prior data in every batch.

Where released code and papers differ:

1. the temperature's loss is on alpha = exp(log_alpha), so that its gradient in log_alpha carries a factor alpha (FQL's code;
   SAC's authors and TorchRL take it on log_alpha);
2. the actor climbs the mean of the critics, also where the target takes their minimum (FQL's code; SAC takes the minimum);
3. the target carries no entropy term unless ``backup_entropy`` (FQL's code; RLPD's authors have it outside antmaze and Adroit);
4. the target entropy is -A/2 (FQL's code; SAC's authors and Cal-QL take -A).
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.critics import aggregate, check_aggregation
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, next_key, term


class RLPDLoss(OffPolicyLoss):
    """The losses of RLPD. ``loss_actor`` trains the policy, ``loss_alpha`` the temperature, ``loss_qvalue`` the critics.

    With a ~ pi(s), a' ~ pi(s') and alpha = exp(log_alpha):

    * ``loss_actor = mean(sg[alpha] log pi(a|s) - mean_j Q_j(s, a))``, critics fixed;
    * ``loss_alpha = alpha mean(-sg[log pi(a|s)] - target_entropy)``;
    * ``loss_qvalue = mean_{B,j} (Q_j(s, a_data) - y)^2``, y = r + gamma (1 - terminated) agg_j Qbar_j(s', a'), with
      ``backup_entropy`` of agg_j Qbar_j(s', a') - alpha log pi(a'|s').

    Each is also a method: ``actor_loss``, ``alpha_loss``, ``qvalue_loss``. Metadata: ``alpha``, ``entropy``, which is
    -mean log pi(a|s), and ``q``, the mean of Q(s, a).

    Args:
        actor_network (TanhGaussianPolicy): the acting policy; encoders may stand before it.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        backup_entropy (bool, optional): put the entropy into the target. Defaults to ``False``.
        target_entropy (float, optional): entropy that alpha aims at, in nats. Defaults to -A/2.
        alpha_init (float, optional): alpha at first. Defaults to ``1.0``.
        q_aggregation (str or float, optional): as there. Defaults to ``"min"``.
        delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see
            :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if the policy is of another kind.
        ValueError: on an unknown option, or an alpha that is not positive.

    Draws are read from the input where given, else made in this order: ``("next", "noise")`` of a', ``noise`` of a, both
    ``[..., A]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import TanhGaussianPolicy, make_qvalue_networks, make_tanh_gaussian_network
        >>> policy = TanhGaussianPolicy(make_tanh_gaussian_network(3, 2, (16,)))
        >>> loss = RLPDLoss(policy, make_qvalue_networks(3, 2, (16,)))
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss_actor, metadata = loss.actor_loss(data)
        >>> bool(loss_actor.isclose(-metadata["alpha"] * metadata["entropy"] - metadata["q"]))
        True
    """

    out_keys = ["loss_actor", "loss_alpha", "loss_qvalue", "alpha", "entropy", "q"]

    log_alpha: nn.Parameter

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        q_aggregation: str | float = "min",
        backup_entropy: bool = False,
        target_entropy: float | None = None,
        alpha_init: float = 1.0,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_tanh_gaussian_policy(actor_network)
        check_aggregation(q_aggregation)
        if not alpha_init > 0:
            raise ValueError(f"alpha_init must be positive, got {alpha_init}")
        super().__init__(reduction=reduction)
        self._add_policy(actor_network, "actor_network")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self.log_alpha = nn.Parameter(next(self.parameters()).new_tensor(math.log(alpha_init)))
        self.q_aggregation = q_aggregation
        self.backup_entropy = backup_entropy
        self.target_entropy = target_entropy

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states = [*acting.state_keys(self.actor_network), *self.critics.state_keys]
        return [*states, self.tensor_keys.action, *self._next_keys(*states)]

    def _optional_keys(self) -> list[NestedKey]:
        noise = self.tensor_keys.noise
        return [noise, next_key(noise), *self.critics.draw_keys, self.tensor_keys.valid]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        critic_terms = self._critic_terms(tensordict)  # first: draws that the input lacks come from one generator
        action, log_prob = self._sample(tensordict)
        loss_actor, actor_metadata = self._actor_term(tensordict, action, log_prob)
        loss_alpha, alpha_metadata = self._alpha_term(tensordict, log_prob)
        return {
            "loss_actor": loss_actor,
            "loss_alpha": loss_alpha,
            **alpha_metadata,
            **actor_metadata,
            **critic_terms,
        }

    def _sample(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        noise = self._draw(tensordict, self.tensor_keys.noise)
        return acting.sample_and_log_prob(self.actor_network, tensordict, noise)

    def _critic_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        following = self._next(tensordict)
        noise = self._draw(tensordict, next_key(self.tensor_keys.noise))
        with torch.no_grad():
            next_action, log_prob = acting.sample_and_log_prob(self.actor_network, following, noise)
        entropy = -self.log_alpha.detach().exp() * log_prob if self.backup_entropy else 0.0
        return self._td_terms(
            tensordict,
            lambda: self._with_action(following, next_action),
            lambda qvalues: aggregate(qvalues, how=self.q_aggregation) + entropy,
        )

    def _actor_term(self, tensordict: TensorDictBase, action: Tensor, log_prob: Tensor) -> Terms:
        # sg: the critics and alpha
        qvalue = self.critics.values(self._with_action(tensordict, action), frozen=True).mean(0)
        alpha = self.log_alpha.detach().exp()
        return self._reduce(alpha * log_prob - qvalue, tensordict), {"q": self._statistic(qvalue, tensordict)}

    def _alpha_term(self, tensordict: TensorDictBase, log_prob: Tensor) -> Terms:
        action_dim = tensordict[self.tensor_keys.action].shape[-1]
        target = -action_dim / 2 if self.target_entropy is None else self.target_entropy
        loss = terms.temperature(self.log_alpha.exp(), log_prob, target)
        metadata = {"alpha": self.log_alpha.detach().exp(), "entropy": self._statistic(-log_prob, tensordict)}
        return self._reduce(loss, tensordict), metadata

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the policy's and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``q``, ``alpha`` and ``entropy``, detached.
        """
        action, log_prob = self._sample(tensordict)
        loss, metadata = self._actor_term(tensordict, action, log_prob)
        return loss, metadata | self._alpha_term(tensordict, log_prob.detach())[1]

    @term
    def alpha_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_alpha``; inputs as in :meth:`actor_loss`.

        Returns:
            The loss and metadata ``alpha`` and ``entropy``, detached.
        """
        with torch.no_grad():
            log_prob = self._sample(tensordict)[1]
        return self._alpha_term(tensordict, log_prob)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``; inputs and metadata as in :meth:`DeFlowLoss.qvalue_loss`."""
        out = self._critic_terms(tensordict)
        return out.pop("loss_qvalue"), out
