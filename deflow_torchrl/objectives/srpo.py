# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""SRPO (https://arxiv.org/abs/2310.07297): a deterministic policy that climbs Q and is held by the score of the data.

Where the released code and the paper differ, and what is done here:

1. the weight w(t) is sigma_t^2, without subtracting the noise from the predicted noise (the code's default, "VDS");
2. V and Q are computed at the same weights (code);
3. the policy is trained with everything else after its step, against the target critics (code): the learner's stages.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.policies import in_evaluation_mode
from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, term, tiny
from deflow_torchrl.objectives.idql import DenoisingValueLoss

Weighting = Literal["sigma2", "constant", "score"]


class SRPOLoss(DenoisingValueLoss):
    """The losses of SRPO. ``loss_actor`` trains the policy; the others are those of :class:`IDQLLoss`.

    ``loss_actor = mean_batch(w(t) sum_d sg[e_d] pi_d(s) - beta sum_d sg[g_d] pi_d(s))``: only its gradient means something.
    x_t is pi(s), noised to t by z; e = eps(s, x_t, t) without dropout, minus z if ``subtract_noise``;
    g = grad_a mean_j Qbar_j(s, a) at a = pi(s), by the target critics.

    Args:
        actor_network (DeterministicPolicy): the acting policy; encoders may stand before it.
        diffusion_policy (DiffusionPolicy): model of the data, trained by ``loss_score`` alone.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.
        value_network (TensorDictModule): reads an observation and writes ``state_value [..., 1]``.

    Keyword Args:
        beta (float): coefficient of Q's gradient.
        expectile (float, optional): in (0, 1). Defaults to ``0.7``.
        weighting (str, optional): w(t): ``"sigma2"`` (default) sigma_t^2, ``"constant"`` 1, or ``"score"`` alpha_t / sigma_t.
        normalize_q_gradient (bool, optional): divide g by the root of its mean square over action dimensions. Defaults to
            ``False``.
        subtract_noise (bool, optional): Defaults to ``False``.
        num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if a policy is of another kind.
        ValueError: on an option out of range.

    Draws are read from the input where given, else made in this order: ``diffusion_time [..., 1]``, ``diffusion_noise [..., A]``
    (of the score), ``policy_time [..., 1]``, ``noise [..., A]`` (of the actor). Continuous times of the actor are uniform in
    [0.02, 0.98].

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import DeterministicPolicy, DiffusionPolicy, NoiseNetwork
        >>> from deflow_torchrl.modules import make_policy_network, make_qvalue_networks, make_value_network
        >>> actor = DeterministicPolicy(make_policy_network(3, 2, (16,)))
        >>> policy = DiffusionPolicy(NoiseNetwork(3, 2, width=8), 2)
        >>> loss = SRPOLoss(actor, policy, make_qvalue_networks(3, 2, (16,)), make_value_network(3, (16,)), beta=0.1)
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss.actor_loss(data)[0].shape
        torch.Size([])
    """

    out_keys = ["loss_score", "loss_value", "loss_qvalue", "loss_actor", "q_gradient"]
    _schedulable_buffers = frozenset({"expectile", "beta"})

    beta: Tensor

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        diffusion_policy: TensorDictModuleBase,
        qvalue_network: Critics,
        value_network: TensorDictModuleBase,
        *,
        beta: float,
        expectile: float = 0.7,
        weighting: Weighting = "sigma2",
        normalize_q_gradient: bool = False,
        subtract_noise: bool = False,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_deterministic_policy(actor_network)
        acting.check_diffusion_policy(diffusion_policy)
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {', '.join(get_args(Weighting))}, got {weighting!r}")
        super().__init__(
            qvalue_network,
            value_network,
            expectile=expectile,
            num_qvalue_nets=num_qvalue_nets,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            policies={"actor_network": actor_network, "diffusion_policy": diffusion_policy},
        )
        self._add_coefficient("beta", beta)
        self.weighting = weighting
        self.normalize_q_gradient = normalize_q_gradient
        self.subtract_noise = subtract_noise

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [*super()._required_keys(tensordict), *self.actor_network.in_keys]

    def _optional_keys(self) -> list[NestedKey]:
        return [*super()._optional_keys(), "policy_time", self.tensor_keys.noise]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        out = super()._compute(tensordict)
        loss_actor, metadata = self._actor_term(tensordict)
        return {**out, "loss_actor": loss_actor, **metadata}

    def _actor_term(self, tensordict: TensorDictBase) -> Terms:
        time = tensordict.get("policy_time", None)
        if time is None:
            action = tensordict[self.tensor_keys.action]
            time = acting.draw_time(self.diffusion_policy, action, low=0.02, high=0.98)
        noise = self._draw(tensordict, self.tensor_keys.noise)
        policy = self.actor_network
        action = policy(tensordict.select(*policy.in_keys))[policy.out_keys[-1]]
        fixed = action.detach()
        with in_evaluation_mode(self.diffusion_policy), torch.no_grad():
            predicted = acting.predicted_noise(self.diffusion_policy, tensordict, fixed, noise, time)
        gradient = self._q_gradient(tensordict, fixed)
        pull = predicted - noise if self.subtract_noise else predicted
        held = (self._weight(time) * pull * action).sum(-1)
        climbed = (gradient * action).sum(-1)
        size = self._statistic(gradient.norm(dim=-1), tensordict)
        return self._reduce(held - self.beta.to(climbed.dtype) * climbed, tensordict), {"q_gradient": size}

    def _q_gradient(self, tensordict: TensorDictBase, action: Tensor) -> Tensor:
        """Gradient ``[*B, A]`` of mean_j Qbar_j(s, a) in a, a constant."""

        def qvalue(action: Tensor) -> Tensor:
            return self.critics.values(self._with_action(tensordict, action), target=True, frozen=True).mean(0).sum()

        gradient = torch.func.grad(qvalue)(action)
        if not self.normalize_q_gradient:
            return gradient
        return gradient / gradient.square().mean(-1, keepdim=True).sqrt().clamp_min(tiny(gradient))

    def _weight(self, time: Tensor) -> Tensor:
        signal, spread = acting.signal_and_noise(self.diffusion_policy, time)
        return {"sigma2": spread.square(), "constant": torch.ones_like(spread), "score": signal / spread}[
            self.weighting
        ]

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the networks' observations and ``action [..., A]`` (for its shape and type); optionally
                ``policy_time [..., 1]`` and ``noise [..., A]``.

        Returns:
            The loss and metadata ``q_gradient``, the mean 2-norm of g, detached.
        """
        return self._actor_term(tensordict)
