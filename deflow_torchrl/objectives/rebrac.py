# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""ReBRAC as FQL's comparison runs it: TD3 with penalties on the distance to the data's actions (https://arxiv.org/abs/2305.09836).

Where the released code and the paper differ:
  1. Both penalties are sums over action dimensions (so is the paper's), where most losses here are averages.
  2. The actor's Q term is divided by mean|min_j Q_j| of the batch, as TD3+BC does. Default here: the code.
  3. At the end of a trajectory FQL's code penalises against the first action of the next trajectory in the file. Here the data
     give the current action there (:attr:`deflow_torchrl.algorithms.Learner.next_action`).
  4. The actor's loss counts and all targets move at every second update only. In the code one Adam holds all parameters, so
     that its momentum moves the actor at the other updates too. Here the same: the learner's ``term_periods`` and
     ``target_period``.
Online the policy explores by the noise that smooths the targets: clip(pi(s) + clip(policy_noise z, +-noise_clip)).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.policies import DeterministicPolicy
from deflow_torchrl.objectives.common import OffPolicyLoss, Reduction, next_key, tiny
from deflow_torchrl.objectives.td_critic import TDCriticLoss


class ReBRACLoss(TDCriticLoss):
    """TD3 with behaviour-regularised actor and critic.

    With the target actor pibar, z ~ N(0, I) and the data's next action a'_data:

    * a' = clip(pibar(s') + clip(policy_noise z, +-noise_clip)),
      ``y = r + gamma (1 - terminated) (min_j Qbar_j(s', a') - critic_bc_coef |a' - a'_data|^2)``,
      ``loss_qvalue = mean_{j,batch} (Q_j(s, a) - y)^2``;
    * ``loss_actor = mean_batch(-min_j Q_j(s, pi(s)) / sg(mean|min_j Q_j|) + actor_bc_coef |pi(s) - a|^2)``, critics fixed.

    Squared distances are sums over action dimensions.

    Args:
        actor_network (DeterministicPolicy): the policy to train; it gets a target of its own.
        qvalue_network (list of TensorDictModule, or TensorDictModule): see :class:`RefinementLoss`.

    Keyword Args:
        actor_bc_coef (float): weight of the actor's penalty, >= 0 (alpha_1 of the paper's tables).
        critic_bc_coef (float): weight of the penalty in the target, >= 0 (alpha_2).
        policy_noise (float, optional): standard deviation of the target's smoothing noise. Defaults to ``0.2``.
        noise_clip (float, optional): bound of that noise. Defaults to ``0.5``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (shape ``td.shape``).
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

    Raises:
        TypeError: if ``actor_network`` is no :class:`~deflow_torchrl.modules.DeterministicPolicy`.
        ValueError: on a negative number or an unknown option.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import make_policy_network, make_qvalue_networks
        >>> policy = DeterministicPolicy(make_policy_network(3, 2, (16,)))
        >>> loss = ReBRACLoss(policy, make_qvalue_networks(3, 2, (16,)), actor_bc_coef=0.1, critic_bc_coef=0.01)
        >>> _ = loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2),
        ...     next=TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), reward=torch.randn(4, 1),
        ...                     done=torch.zeros(4, 1, dtype=torch.bool), terminated=torch.zeros(4, 1, dtype=torch.bool),
        ...                     batch_size=[4]),
        ...     batch_size=[4])
        >>> sorted(loss(data).keys())
        ['loss_actor', 'loss_qvalue']
    """

    out_keys = ["loss_qvalue", "loss_actor"]

    actor_network: DeterministicPolicy

    def __init__(
        self,
        actor_network: DeterministicPolicy,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        actor_bc_coef: float,
        critic_bc_coef: float,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        OffPolicyLoss.__init__(self, reduction=reduction)
        if not isinstance(actor_network, DeterministicPolicy):
            raise TypeError(f"a DeterministicPolicy is needed, got {type(actor_network).__name__}")
        numbers = {
            "actor_bc_coef": actor_bc_coef,
            "critic_bc_coef": critic_bc_coef,
            "policy_noise": policy_noise,
            "noise_clip": noise_clip,
        }
        for name, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
            setattr(self, name, float(value))
        self.convert_to_functional(actor_network, "actor_network", create_target_params=True)
        self._set_critic(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            create_target_params=True,
            deactivate_vmap=deactivate_vmap,
        )

    actor_bc_coef: float
    critic_bc_coef: float
    policy_noise: float
    noise_clip: float

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        keys = self.tensor_keys
        states = [self.actor_network.observation_key, *self._critic_keys()]
        following = (*states, keys.action, keys.reward, keys.done, keys.terminated)
        return [*states, keys.action, *map(next_key, following)]

    def _optional_keys(self) -> list[NestedKey]:
        return [next_key(self.tensor_keys.noise)]

    def _target_acting(self) -> AbstractContextManager[Any]:
        return self.target_actor_network_params.to_module(self.actor_network, preserve_module_state=False)

    def _q_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return (loss_qvalue, |TD error| of each sample, the largest of the ensemble)."""
        keys, policy = self.tensor_keys, self.actor_network
        with torch.no_grad():
            following = tensordict["next"]
            with self._target_acting():
                action = policy.module(following[policy.observation_key])
            noise = self._noise(tensordict, next_key(keys.noise))
            action = policy.module.perturb(action, noise, self.policy_noise, self.noise_clip)
            penalty = (action - following[keys.action]).square().sum(-1)
            qvalue = self._qvalues(following, action, self.target_qvalue_network_params).amin(0)
            bootstrap = (qvalue - self.critic_bc_coef * penalty).unsqueeze(-1)
            target = self.value_estimator.value_estimate(tensordict, next_value=bootstrap).squeeze(-1)
        error = self._qvalues(tensordict, tensordict[keys.action], self.qvalue_network_params) - target
        td_error = error.detach().abs().amax(0)
        mask = self._mask(tensordict)
        loss = self._reduce_term(error.square().mean(0), tensordict)
        return loss, td_error if mask is None else torch.where(mask, td_error, 0.0)

    def _actor_loss(self, tensordict: TensorDictBase) -> Tensor:
        policy = self.actor_network
        action = policy.module(tensordict[policy.observation_key])
        # Critics fixed: their gradients would be thrown away, so their parameters enter detached.
        qvalue = self._qvalues(tensordict, action, self.qvalue_network_params, frozen=True).amin(0)
        scale = 1 / self._batch_mean(qvalue.detach().abs(), tensordict).clamp_min(tiny(qvalue))
        penalty = (action - tensordict[self.tensor_keys.action]).square().sum(-1)
        return self._reduce_term(-scale * qvalue + self.actor_bc_coef * penalty, tensordict)

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        loss_qvalue, td_error = self._q_loss(tensordict)
        return {
            "loss_qvalue": loss_qvalue,
            "loss_actor": self._actor_loss(tensordict),
            self.tensor_keys.priority: td_error,
        }

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_qvalue``.

        Args:
            tensordict: observation, ``action [..., A]`` and, under ``"next"``, observation, action, reward, done and
                terminated ``[..., 1]``; optionally ``("next", "noise") [..., A]``.

        Returns:
            The loss and metadata ``td_error [...]``, detached.
        """
        loss, td_error = self._q_loss(self._blank_masked_rows(tensordict))
        return loss, {"td_error": td_error}

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute ``loss_actor``.

        Args:
            tensordict: the networks' observations and ``action [..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        with self._acting():
            return self._actor_loss(self._blank_masked_rows(tensordict)), {}
