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

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.policies import last_policy
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, next_key, term


class ReBRACLoss(OffPolicyLoss):
    """TD3 with behaviour-regularised actor and critic.

    With the target actor pibar, z ~ N(0, I) and the data's next action a'_data:

    * a' = clip(pibar(s') + clip(policy_noise z, +-noise_clip)),
      ``y = r + gamma (1 - terminated) (min_j Qbar_j(s', a') - critic_bc_coef |a' - a'_data|^2)``,
      ``loss_qvalue = mean_{j,batch} (Q_j(s, a) - y)^2``;
    * ``loss_actor = mean_batch(-min_j Q_j(s, pi(s)) / sg(mean|min_j Q_j|) + actor_bc_coef |pi(s) - a|^2)``, critics fixed.

    Squared distances are sums over action dimensions.

    Args:
        actor_network (DeterministicPolicy): the policy to train; it gets a target of its own.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        actor_bc_coef (float): weight of the actor's penalty, >= 0 (alpha_1 of the paper's tables).
        critic_bc_coef (float): weight of the penalty in the target, >= 0 (alpha_2).
        policy_noise (float, optional): standard deviation of the target's smoothing noise. Defaults to ``0.2``.
        noise_clip (float, optional): bound of that noise. Defaults to ``0.5``.
        num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if ``actor_network`` is no :class:`~deflow_torchrl.modules.DeterministicPolicy`.
        ValueError: on a negative number or an unknown option.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import DeterministicPolicy, make_policy_network, make_qvalue_networks
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
    normalize_q_loss = True
    _schedulable_buffers = frozenset({"actor_bc_coef", "critic_bc_coef", "policy_noise", "noise_clip"})

    actor_bc_coef: Tensor
    critic_bc_coef: Tensor
    policy_noise: Tensor
    noise_clip: Tensor

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        actor_bc_coef: float,
        critic_bc_coef: float,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_deterministic_policy(actor_network)
        super().__init__(reduction=reduction)
        self._add_policy(actor_network, "actor_network", create_target_params=True)
        self._add_critics(qvalue_network, num_qvalue_nets=num_qvalue_nets, deactivate_vmap=deactivate_vmap)
        self._add_coefficient("actor_bc_coef", actor_bc_coef)
        self._add_coefficient("critic_bc_coef", critic_bc_coef)
        self._add_coefficient("policy_noise", policy_noise)
        self._add_coefficient("noise_clip", noise_clip)

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states, action = [*self.actor_network.in_keys, *self.critics.state_keys], self.tensor_keys.action
        return [*states, action, *self._next_keys(*states, action)]

    def _optional_keys(self) -> list[NestedKey]:
        return [next_key(self.tensor_keys.noise), *self.critics.draw_keys, self.tensor_keys.valid]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        of_critics = self.critics.encode(tensordict)
        return {**self._critic_terms(of_critics), "loss_actor": self._actor_term(tensordict, of_critics)}

    def _critic_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """Targets at the smoothed action of the target policy, less a penalty; all of them without gradient."""
        following = self._next(tensordict)
        with torch.no_grad():
            action = self._smoothed_action(following, self._draw(tensordict, next_key(self.tensor_keys.noise)))
            penalty = terms.squared_distance(action, following[self.tensor_keys.action], self.critic_bc_coef)
        return self._td_terms(
            tensordict,
            lambda: self._with_action(following, action),
            lambda qvalues: qvalues.amin(0) - penalty,
        )

    def _smoothed_action(self, state: TensorDictBase, noise: Tensor) -> Tensor:
        """A' = clip(pibar(s') + clip(policy_noise z, +-noise_clip))."""
        policy = self.actor_network
        with self.target_actor_network_params.to_module(policy, preserve_module_state=False):
            action = self._action(state)
        return last_policy(policy).module.perturb(action, noise, self.policy_noise, self.noise_clip)

    def _action(self, state: TensorDictBase) -> Tensor:
        policy = self.actor_network
        return policy(state.select(*policy.in_keys))[policy.out_keys[-1]]

    def _actor_term(self, tensordict: TensorDictBase, of_critics: TensorDictBase) -> Tensor:
        action = self._action(tensordict)
        # sg: the critics and the normalisation.
        qvalue = self.critics.values(self._with_action(of_critics, action), frozen=True).amin(0)
        penalty = terms.squared_distance(action, tensordict[self.tensor_keys.action], self.actor_bc_coef)
        return self._reduce(-self._q_scale(qvalue, tensordict) * qvalue + penalty, tensordict)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``.

        Args:
            tensordict: observation, ``action [..., A]`` and, under ``"next"``, observation, action, reward, done and
                terminated ``[..., 1]``; optionally ``("next", "noise") [..., A]``.

        Returns:
            The loss and metadata ``td_error [...]``, detached.
        """
        out = self._critic_terms(tensordict)
        return out.pop("loss_qvalue"), out

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the networks' observations and ``action [..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        return self._actor_term(tensordict, tensordict), {}
