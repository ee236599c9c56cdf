# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""CAC, Consistency-AC (https://arxiv.org/abs/2309.16984): an actor-critic whose policy is a consistency model.

Where released code and paper differ, and what is done here:

1. with max-Q backup the target is the minimum over critics of each one's maximum over the samples (code);
2. the number N of noise levels follows a schedule that the caller sets in :attr:`ConsistencyACLoss.num_scales`; the code restarts
   it with each evaluation, the paper runs it once;
3. critics step first, and the actor is trained against the critics of after that step (code): the learner's stages;
4. the average of the actor starts at update 1000 and moves at every fifth (code); it gives a' and the teacher's actions, while
   the actor itself acts.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, next_key, term, tiny

_MAX_SCALES = 150
_RHO = 7


def number_of_scales(progress: Tensor) -> Tensor:
    """N after the share ``progress`` of the schedule, from 2 to 150: ceil(sqrt(progress (150^2 - 4) + 4) - 1) + 1."""
    return (progress * (_MAX_SCALES**2 - 4) + 4).sqrt().sub(1).ceil().long() + 1


class ConsistencyACLoss(OffPolicyLoss):
    """The losses of CAC. The actor's objective is ``loss_consistency + loss_actor``; ``loss_qvalue`` trains the critics.

    * ``loss_qvalue = sum_j mean (Q_j(s, a) - y)^2``: a sum, because gradients are clipped. y = r + gamma (1 - terminated)
      min_j max_i Qbar_j(s', a'_i), the a'_i samples of the *averaged* actor;
    * ``loss_consistency = mean_{B,d} c (f(s, a + sigma_{i+1} z, sigma_{i+1}) - sg fbar(s, a + sigma_i z, sigma_i))^2`` with the
      averaged actor's fbar, i uniform in 0..N-2, sigma_i = (eps^(1/7) + i/(N-1) (80^(1/7) - eps^(1/7)))^7 and
      c = 100 / (sigma_{i+1} - sigma_i), or 1 if not ``scale_consistency``;
    * ``loss_actor = -eta mean Q_c(s, pi(s)) / sg mean |Q_{1-c}(s, pi(s))|``, c a fair coin, critics fixed.

    Each is also a method: ``qvalue_loss``, ``consistency_loss``, ``actor_loss``. Metadata ``q`` is the mean of Q_c(s, pi(s)).

    Args:
        actor_network (ConsistencyPolicy): the acting policy; encoders may stand before it.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        eta (float): weight of the Q term.
        scale_consistency (bool, optional): weight levels by 100 over their distance. Defaults to ``True``.
        num_target_samples (int, optional): next actions of the target. Defaults to ``1``.
        normalize_target (bool, optional): divide y by its standard deviation over the batch + 1e-6. Defaults to ``False``.
        reward_scale (float, optional): factor of rewards. Defaults to ``1.0``.
        reward_shift (float, optional): what is added to them then. Defaults to ``0.0``.
        num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if the policy is of another kind.
        ValueError: on an option out of range.

    Draws are read from the input where given, else made in this order: ``("next", "noise") [..., K, A]``, or
    ``[..., n, K, A]`` with n > 1 samples; ``noise [..., K, A]``; ``critic_index [..., 1]`` (integer, c, the same in all rows);
    ``consistency_noise [..., A]``; ``consistency_step [..., 1]`` (integer, i).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import ConsistencyNetwork, ConsistencyPolicy, make_qvalue_networks
        >>> policy = ConsistencyPolicy(ConsistencyNetwork(3, 2, hidden_dims=(16,)), 2)
        >>> loss = ConsistencyACLoss(policy, make_qvalue_networks(3, 2, (16,)), eta=0.1)
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss.consistency_loss(data)[0].shape
        torch.Size([])
    """

    out_keys = ["loss_consistency", "loss_actor", "loss_qvalue", "q"]
    _schedulable_buffers = frozenset({"eta", "num_scales"})

    eta: Tensor
    num_scales: Tensor

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        eta: float,
        scale_consistency: bool = True,
        num_target_samples: int = 1,
        normalize_target: bool = False,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_consistency_policy(actor_network)
        if num_target_samples < 1:
            raise ValueError(f"num_target_samples must be positive, got {num_target_samples}")
        super().__init__(reduction=reduction)
        self._add_policy(actor_network, "actor_network", create_target_params=True)
        self._add_critics(qvalue_network, num_qvalue_nets=num_qvalue_nets, deactivate_vmap=deactivate_vmap)
        self._add_coefficient("eta", eta)
        self.register_buffer("num_scales", torch.tensor(2))
        self.scale_consistency = scale_consistency
        self.num_target_samples = num_target_samples
        self.normalize_target = normalize_target
        self.reward_scale, self.reward_shift = reward_scale, reward_shift

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states = [*acting.state_keys(self.actor_network), *self.critics.state_keys]
        return [*states, self.tensor_keys.action, *self._next_keys(*states)]

    def _optional_keys(self) -> list[NestedKey]:
        noise = self.tensor_keys.noise
        draws = [next_key(noise), noise, "critic_index", "consistency_noise", "consistency_step"]
        return [*draws, *self.critics.draw_keys, self.tensor_keys.valid]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        # In this order: draws that the input lacks come from one generator.
        critic_terms = self._critic_terms(tensordict)
        loss_actor, metadata = self._actor_term(tensordict)
        return {
            "loss_consistency": self._consistency_term(tensordict),
            "loss_actor": loss_actor,
            **metadata,
            **critic_terms,
        }

    def _noise(self, tensordict: TensorDictBase, key: NestedKey, *samples: int) -> Tensor:
        noise = tensordict.get(key, None)
        if noise is not None:
            return noise
        action = tensordict[self.tensor_keys.action]
        shape = (*action.shape[:-1], *samples, acting.num_steps(self.actor_network), action.shape[-1])
        return torch.randn(shape, device=action.device, dtype=action.dtype)

    def _critic_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        following, number = self._next(tensordict), self.num_target_samples
        noise = self._noise(tensordict, next_key(self.tensor_keys.noise), *((number,) if number > 1 else ()))
        policy, states = self.actor_network, following
        if number > 1:
            read = following.select(*acting.state_keys(policy), *self.critics.state_keys)
            states = acting.repeated(read, noise[..., 0, :])
        with torch.no_grad(), self.target_actor_network_params.to_module(policy, preserve_module_state=False):
            action = acting.act_in_steps(policy, states, noise)
            qvalues = self.critics.values(self._with_action(states, action), target=True)
            reward = next_key(self.tensor_keys.reward)
            scaled = tensordict.copy().set(reward, self.reward_scale * tensordict[reward] + self.reward_shift)
            target = self._bootstrap(scaled, (qvalues.amax(-1) if number > 1 else qvalues).amin(0))
            if self.normalize_target:
                target = target / (target.std() + 1e-6)
        error = self.critics.values(tensordict) - target
        critic_terms = {"loss_qvalue": error.square().sum(0), "td_error": error.detach().abs().amax(0)}
        return self._reduce_critic_terms(critic_terms, tensordict)

    def _actor_term(self, tensordict: TensorDictBase) -> Terms:
        # The gradient goes through every evaluation of f, and stops where the clip holds the action. sg: critics, divisor.
        action = acting.act_in_steps(self.actor_network, tensordict, self._noise(tensordict, self.tensor_keys.noise))
        qvalues = self.critics.values(self._with_action(tensordict, action), frozen=True)
        climbed = tensordict.get("critic_index", None)
        if climbed is None:
            climbed = torch.randint_like(action[..., :1], 2).flatten()[:1]
        climbed = climbed.flatten()[:1].long()
        qvalue, other = (qvalues.index_select(0, which).squeeze(0) for which in (climbed, 1 - climbed))
        scale = self.eta / self._batch_mean(other.detach().abs(), tensordict).clamp_min(tiny(other))
        return self._reduce(-scale.to(qvalue.dtype) * qvalue, tensordict), {"q": self._statistic(qvalue, tensordict)}

    def _consistency_term(self, tensordict: TensorDictBase) -> Tensor:
        action = tensordict[self.tensor_keys.action]
        noise = tensordict.get("consistency_noise", None)
        noise = torch.randn_like(action) if noise is None else noise
        step = tensordict.get("consistency_step", None)
        if step is None:  # uniform in 0..N-2, with N on the device
            step = (torch.rand_like(action[..., :1]) * (self.num_scales - 1)).floor().clamp_max(self.num_scales - 2)
        low, high = self._level(step, action), self._level(step + 1, action)
        policy = self.actor_network
        with torch.no_grad(), self.target_actor_network_params.to_module(policy, preserve_module_state=False):
            taught = acting.consistency(policy, tensordict, action + low * noise, low)
        error = acting.consistency(policy, tensordict, action + high * noise, high) - taught
        weight = 100 / (high - low) if self.scale_consistency else 1.0
        return self._reduce((weight * error.square()).mean(-1), tensordict)

    def _level(self, step: Tensor, like: Tensor) -> Tensor:
        """sigma_i ``[*B, 1]``."""
        low, high = (sigma ** (1 / _RHO) for sigma in acting.noise_levels(self.actor_network))
        return (low + step.to(like.dtype) / (self.num_scales - 1) * (high - low)) ** _RHO

    @term
    def consistency_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_consistency``.

        Args:
            tensordict: the policy's observations and ``action [..., A]``; optionally ``consistency_noise [..., A]`` and
                ``consistency_step [..., 1]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        return self._consistency_term(tensordict), {}

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the policy's and critics' observations and ``action [..., A]`` (for its shape and type); optionally
                ``noise [..., K, A]`` and ``critic_index [..., 1]``.

        Returns:
            The loss and metadata ``q``, detached.
        """
        return self._actor_term(tensordict)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``; inputs and metadata as in :meth:`DeFlowLoss.qvalue_loss`, noise of another shape."""
        out = self._critic_terms(tensordict)
        return out.pop("loss_qvalue"), out
