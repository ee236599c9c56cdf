# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FAN: a one-step policy anchored to a cloned flow along straight paths, critics that read noise, and marginal critics.

The equations are those of the authors' released code. The numbers here are held against these equations, written out by hand;
they were not compared with runs of that code. Where it surprises, and what is done here as there:

1. the anchor is a sum over action dimensions in the target and a mean in the actor's loss, so that ``alpha`` and
   ``critic_alpha`` are not on one scale;
2. Q(s, a, .) is read at the very noise that made a';
3. the marginal critics have no targets: their online values bootstrap.
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.critics import CriticEnsemble, aggregate, check_aggregation
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, next_key, term

_ANCHOR_TIME, _CRITIC_NOISE, _MARGINAL_NOISE = "anchor_time", "critic_noise", "marginal_noise"


class FANLoss(OffPolicyLoss):
    """The losses of FAN, each with gradients to its own part only.

    With the anchor k(s, x, z; t) = x - z - v(s, (1 - t) z + t x, t) of an action x made of noise z:

    * ``loss_flow`` trains the flow v on the data's actions: :class:`FlowMatchingLoss`;
    * ``loss_actor = alpha mean_{d,batch} k(s, mu, z; t)^2 - l_1 mean_{j,batch} Q_j(s, clip(mu), n') - l_2 mean_{j,batch} Z_j(s,
      clip(mu))`` trains mu = mu(s, z); sg: v's weights and all critics; l = 1 or, with ``normalize_q_loss``, sg(1 / mean|.|) of
      each part;
    * ``loss_qvalue = mean_{j,batch} (Q_j(s, a, z2) - y)^2`` with a' = clip(mu(s', z2)) and
      ``y = r + gamma (1 - terminated) (agg_j Z_j(s', a') - critic_alpha sum_d k(s', a', z2; t2)^2)``;
    * ``loss_marginal = mean_{j,batch} |expectile - 1(u_j < 0)| u_j^2``, u_j = sg(mean_i Qbar_i(s, a, n)) - Z_j(s, a).

    Each is also a method. Metadata: ``anchor`` (mean k^2), ``q`` and ``marginal_q``, the parts of ``loss_actor`` before their
    coefficients.

    Args:
        flow_policy (FlowMatchingPolicy): the flow v, from which nothing is sampled.
        actor_network (OneStepPolicy): mu.
        qvalue_network: critics that read the state, ``action`` and ``critic_noise [..., A]``; see
            :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.
        marginal_qvalue_network: critics Z that read the state and ``action``.

    Keyword Args:
        alpha (float, optional): weight of the actor's anchor. Defaults to ``10.0``.
        critic_alpha (float, optional): weight of the anchor in the target. Defaults to ``10.0``.
        expectile (float, optional): of the marginal critics' regression. Defaults to ``0.9``.
        marginal_aggregation (str, optional): agg, ``"mean"`` or ``"min"``. Defaults to ``"mean"``.
        normalize_q_loss (bool, optional): as above. Defaults to ``False``.
        delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if a policy is of another kind.
        ValueError: on an option out of range.

    Random draws may be given in the input, else they are drawn from torch's global generator in this order, N(0, I) and for
    times U[0, 1): ``("next", "noise") [..., A]``, ``("next", "anchor_time") [..., 1]``, ``marginal_noise [..., A]``;
    ``flow_noise [..., A]``, ``flow_time [..., 1]``; ``noise [..., A]``, ``anchor_time [..., 1]``, ``critic_noise [..., A]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import (
        ...     FlowMatchingPolicy, OneStepPolicy, make_noisy_qvalue_networks,
        ...     make_one_step_network, make_qvalue_networks, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> actor = OneStepPolicy(make_one_step_network(3, 2, (16,)), 2)
        >>> loss = FANLoss(flow, actor, make_noisy_qvalue_networks(3, 2, (16,)), make_qvalue_networks(3, 2, (16,)))
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> sorted(loss.actor_loss(data)[1])
        ['anchor', 'marginal_q', 'q']
    """

    out_keys = [
        *("loss_flow", "loss_actor", "loss_qvalue", "loss_marginal"),
        *("anchor", "q", "marginal_q"),
    ]
    _schedulable_buffers = frozenset({"alpha", "critic_alpha", "expectile"})

    marginal_qvalue_network: nn.Module
    marginal_qvalue_network_params: TensorDictParams
    target_marginal_qvalue_network_params: TensorDictParams
    alpha: Tensor
    critic_alpha: Tensor
    expectile: Tensor

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        marginal_qvalue_network: Critics,
        *,
        alpha: float = 10.0,
        critic_alpha: float = 10.0,
        expectile: float = 0.9,
        marginal_aggregation: Literal["mean", "min"] = "mean",
        normalize_q_loss: bool = False,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_flow_policy(flow_policy)
        acting.check_one_step_policy(actor_network)
        check_aggregation(marginal_aggregation)
        if not 0 < expectile < 1:
            raise ValueError(f"expectile must lie between 0 and 1, got {expectile}")
        super().__init__(reduction=reduction)
        self._add_policy(flow_policy, "flow_policy")
        self._add_policy(actor_network, "actor_network")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self._add_further_critics(
            marginal_qvalue_network,
            "marginal_qvalue_network",
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
        )
        for name, value in {"alpha": alpha, "critic_alpha": critic_alpha, "expectile": expectile}.items():
            self._add_coefficient(name, value)
        self.q_aggregation = marginal_aggregation
        self.normalize_q_loss = normalize_q_loss

    @property
    def marginal_critics(self) -> CriticEnsemble:
        """The critics without noise, to be evaluated."""
        return self.__dict__["_critics"][1]

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        flow, actor = acting.state_keys(self.flow_policy), acting.state_keys(self.actor_network)
        marginal = self.marginal_critics.state_keys
        critics = [key for key in self.critics.state_keys if key != _CRITIC_NOISE]
        return [*flow, *actor, *critics, *marginal, self.tensor_keys.action, *self._next_keys(*flow, *actor, *marginal)]

    def _optional_keys(self) -> list[NestedKey]:
        return [*self._sampling_keys(), _ANCHOR_TIME, next_key(_ANCHOR_TIME), _CRITIC_NOISE, _MARGINAL_NOISE]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        # In this order: draws that the input lacks are taken from one generator.
        of_marginal = self.marginal_critics.encode(tensordict)
        critic_terms = self._critic_terms(tensordict)
        loss_marginal = self._marginal_term(tensordict, of_marginal)
        loss_flow = self._reduce(self._flow_error(self.flow_policy, tensordict), tensordict)
        loss_actor, metadata = self._actor_term(tensordict, of_marginal)
        out = {"loss_flow": loss_flow, "loss_actor": loss_actor, **metadata, **critic_terms}
        return {**out, "loss_marginal": loss_marginal}

    def _draw_time(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        time = tensordict.get(key, None)
        return torch.rand_like(tensordict[self.tensor_keys.action][..., :1]) if time is None else time

    def _anchor(self, state: TensorDictBase, action: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """k(s, x, z; t)^2 ``[*B, A]``; sg: the flow's weights."""
        params = self.flow_policy_params.apply(Tensor.detach)
        with params.to_module(self.flow_policy, preserve_module_state=False):
            velocity = acting.velocity(self.flow_policy, state)((1 - time) * noise + time * action, time)
        return (action - noise - velocity).square()

    def _q(self, state: TensorDictBase, noise: Tensor, *, action: Tensor | None = None, **options: bool) -> Tensor:
        """Q_j(s, a, n) ``[J, *B]``, of the data's action where none is given."""
        action = state[self.tensor_keys.action] if action is None else action
        rows = state.copy().set(_CRITIC_NOISE, noise)
        return self.critics.values(self._with_action(rows, action), **options)

    def _z(self, state: TensorDictBase, action: Tensor, *, frozen: bool = False) -> Tensor:
        """Z_j(s, a) ``[J, *B]``."""
        rows = self.marginal_critics.state_of(state).set(self.tensor_keys.action, action)
        return self.marginal_critics.values(rows, frozen=frozen)

    def _critic_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        following = self._next(tensordict)
        noise = self._draw(tensordict, next_key(self.tensor_keys.noise))
        time = self._draw_time(tensordict, next_key(_ANCHOR_TIME))
        with torch.no_grad():  # sg: the target
            action = acting.act(self.actor_network, following, noise)
            anchor = self._anchor(following, action, noise, time).sum(-1)
            value = aggregate(self._z(following, action), self.q_aggregation) - self.critic_alpha * anchor
            target = self._bootstrap(tensordict, value)
        error = self._q(tensordict, noise) - target
        every = {"loss_qvalue": error.square().mean(0), "td_error": error.detach().abs().amax(0)}
        return self._reduce_critic_terms(every, tensordict)

    def _marginal_term(self, tensordict: TensorDictBase, of_marginal: TensorDictBase) -> Tensor:
        noise = self._draw(tensordict, _MARGINAL_NOISE)
        with torch.no_grad():  # sg: the target critics
            taught = self._q(tensordict, noise, target=True).mean(0)
        advantage = taught - self._z(of_marginal, tensordict[self.tensor_keys.action])
        return self._reduce(terms.expectile_regression(advantage, self.expectile).mean(0), tensordict)

    def _actor_term(self, tensordict: TensorDictBase, of_marginal: TensorDictBase) -> Terms:
        noise = self._draw(tensordict, self.tensor_keys.noise)
        time = self._draw_time(tensordict, _ANCHOR_TIME)
        critic_noise = self._draw(tensordict, _CRITIC_NOISE)
        output = acting.unclipped(self.actor_network, tensordict, noise)
        # With gradient through the place where v is read too.
        anchor = self._anchor(tensordict, output, noise, time).mean(-1)
        action = acting.clip(self.actor_network, output)
        # sg: both kinds of critics and their scales
        qvalue = self._q(tensordict, critic_noise, action=action, frozen=True).mean(0)
        marginal = self._z(of_marginal, action, frozen=True).mean(0)
        climbed = [self._q_scale(value, tensordict) * value for value in (qvalue, marginal)]
        parts = {"anchor": anchor, "q": qvalue, "marginal_q": marginal}
        metadata = {name: self._statistic(part, tensordict) for name, part in parts.items()}
        return self._reduce(self.alpha * anchor - climbed[0] - climbed[1], tensordict), metadata

    @term
    def flow_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow``; inputs as in :meth:`FlowMatchingLoss.flow_loss`."""
        return self._reduce(self._flow_error(self.flow_policy, tensordict), tensordict), {}

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: all observations and ``action [..., A]`` (for its shape and type); optionally ``noise``,
                ``anchor_time`` and ``critic_noise``.

        Returns:
            The loss and metadata ``anchor``, ``q`` and ``marginal_q``, detached.
        """
        return self._actor_term(tensordict, tensordict)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``; metadata as in :meth:`DeFlowLoss.qvalue_loss`."""
        return self._one_term("loss_qvalue", self._critic_terms(tensordict))

    @term
    def marginal_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_marginal``.

        Args:
            tensordict: the critics' observations and ``action [..., A]``; optionally ``marginal_noise [..., A]``.

        Returns:
            The loss and no metadata.
        """
        return self._marginal_term(tensordict, tensordict), {}
