# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FEdit: a cloned flow, a bounded random edit of its actions, and the best of N of them (EXPO, https://arxiv.org/abs/2507.07986).

As in the code base of QAM, which made the published numbers of FEdit. Where it differs from EXPO:
  1. EXPO chooses among base and edited actions; here edited ones alone compete, and with N = 1, as published, nothing does.
  2. EXPO begins online, from a cloned policy or none; here everything is trained from the first offline update.
  3. Neither penalises the size of an edit: ``edit_scale`` bounds it in every dimension, the entropy keeps it spread out.
"""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.edited_flow import EditedFlowPolicy
from deflow_torchrl.modules.policies import last_policy
from deflow_torchrl.objectives import acting
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, next_key, term
from deflow_torchrl.objectives.best_of_n import EDIT_NOISE, BestOfNLoss


class FEditLoss(BestOfNLoss):
    """The four losses of FEdit, each with gradients to its own part only.

    With act(s; z, e) = the best, by the mean of the online critics, of N actions clip(b + c tanh u), b = flow(s, z) and
    tanh u = edit(s, b; e):

    * ``loss_flow`` trains the flow on the data's actions: :class:`FlowMatchingLoss`;
    * ``loss_actor = mean[-mean_j Q_j(s, clip(b + c tanh u)) + sg(alpha) log p(tanh u)]`` trains the edit; sg: b and the critics;
    * ``loss_alpha = alpha (-mean sg(log p) - H)`` trains ``log_alpha``, alpha = exp(log_alpha): the derivative is through exp;
    * ``loss_qvalue = mean_{j,batch} (Q_j(s, a) - y)^2``,
      ``y = r + gamma (1 - terminated) (mean_j Qbar_j - rho std_j Qbar_j)(s', act(s'))``, the deviation with the divisor J.

    Each is also a method. Metadata: ``alpha``, ``entropy`` (-mean log p) and ``edit_size`` (mean square of c tanh u per
    dimension, which compares with DeFlow's divergence).

    Args:
        flow_policy (FlowMatchingPolicy): the behaviour-cloning flow.
        edit_policy (TanhGaussianPolicy): reads ``cat([s, b], -1)``; encoders may stand before either.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        edit_scale (float): c, the largest edit of a dimension, in action units.
        best_of_n (int, optional): N. Defaults to ``1``.
        pessimism (float, optional): rho. Defaults to ``0.5``.
        target_entropy (float, optional): H. Defaults to -A / 2.
        alpha_init (float, optional): start of alpha. Defaults to ``1.0``.
        delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if a policy is of another kind.
        ValueError: on an option out of range.

    Random draws may be given in the input, else they are drawn from torch's global generator in this order, all N(0, I) but
    the time: ``("next", "noise")`` and ``("next", "edit_noise") [..., N, A]``; ``flow_noise [..., A]``, ``flow_time [..., 1]``
    (U[0, 1)); ``noise`` and ``edit_noise [..., A]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate, ValueEstimators
        >>> from deflow_torchrl.modules import (
        ...     FlowMatchingPolicy, TanhGaussianPolicy,
        ...     make_qvalue_networks, make_tanh_gaussian_network, make_velocity_network)
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> network = make_tanh_gaussian_network(3 + 2, 2, (16,))
        >>> edit = TanhGaussianPolicy(network, log_std_min=-20.0, in_keys=("observation", "base_action"), out_keys=("edit",))
        >>> loss = FEditLoss(flow, edit, make_qvalue_networks(3, 2, (16,)), edit_scale=0.2)
        >>> _ = loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> data = TensorDict(
        ...     observation=torch.randn(4, 3), action=torch.rand(4, 2),
        ...     next=TensorDict(observation=torch.randn(4, 3), reward=torch.randn(4, 1),
        ...                     done=torch.zeros(4, 1, dtype=torch.bool), terminated=torch.zeros(4, 1, dtype=torch.bool),
        ...                     batch_size=[4]),
        ...     batch_size=[4])
        >>> sorted(loss(data).keys())
        ['alpha', 'edit_size', 'entropy', 'loss_actor', 'loss_alpha', 'loss_flow', 'loss_qvalue']
    """

    out_keys = ["loss_flow", "loss_actor", "loss_alpha", "loss_qvalue", "alpha", "entropy", "edit_size"]
    _schedulable_buffers = frozenset({"edit_scale", "target_entropy"})

    edit_policy: TensorDictModuleBase

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
        edit_policy: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        edit_scale: float,
        best_of_n: int = 1,
        pessimism: float = 0.5,
        target_entropy: float | None = None,
        alpha_init: float = 1.0,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_flow_policy(flow_policy)
        acting.check_tanh_gaussian_policy(edit_policy)
        super().__init__(reduction=reduction)
        self._add_policy(flow_policy, "flow_policy")
        self._add_policy(edit_policy, "edit_policy")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self._add_coefficient("edit_scale", edit_scale)
        self._add_temperature(alpha_init, target_entropy)
        self._set_choice(best_of_n, pessimism)

    @property
    def actor_network(self) -> EditedFlowPolicy:
        """The policy that acts with one candidate."""
        flow, edit = last_policy(self.flow_policy), last_policy(self.edit_policy)
        return EditedFlowPolicy(
            self.flow_policy,
            self.edit_policy,
            edit_scale=float(self.edit_scale),
            noise_key=flow.in_keys[1] if len(flow.in_keys) == 2 else self.tensor_keys.noise,
            base_action_key=edit.in_keys[1],
            action_key=self.tensor_keys.action,
        )

    def _state_keys(self) -> list[NestedKey]:
        edit = acting.edit_state_keys(self.edit_policy)
        return list(dict.fromkeys([*acting.state_keys(self.flow_policy), *edit, *self.critics.state_keys]))

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states = self._state_keys()
        return [*states, self.tensor_keys.action, *self._next_keys(*states)]

    def _optional_keys(self) -> list[NestedKey]:
        return [*self._sampling_keys(), EDIT_NOISE, next_key(EDIT_NOISE)]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        # In this order: draws that the input lacks are taken from one generator.
        of_critics = self.critics.encode(tensordict)
        critic_terms = self._critic_terms(of_critics)
        loss_flow = self._flow_term(tensordict)
        edit_terms = self._edit_terms("loss_actor", self.flow_policy, tensordict, of_critics)
        return {"loss_flow": loss_flow, **edit_terms, **critic_terms}

    def _candidates(self, tensordict: TensorDictBase, following: TensorDictBase) -> Tensor:
        draws = (self._draw_candidates(tensordict, key) for key in (self.tensor_keys.noise, EDIT_NOISE))
        return self._edited(self.flow_policy, following, *draws)[0]

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the policies' and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise`` and ``edit_noise [..., A]``.

        Returns:
            The loss and metadata ``alpha``, ``entropy`` and ``edit_size``, detached.
        """
        return self._one_term("loss_actor", self._edit_terms("loss_actor", self.flow_policy, tensordict))

    @term
    def alpha_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_alpha``; inputs and metadata as in :meth:`actor_loss`."""
        return self._one_term("loss_alpha", self._edit_terms("loss_actor", self.flow_policy, tensordict))
