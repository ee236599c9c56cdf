# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What explains a DeFlow run beside its losses: one pass over a batch, without gradient, on the steps that log.

The global random generators are left as they were, so that how often a run logs changes nothing in it.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.modules.policies import encode, last_policy
from deflow_torchrl.objectives import DeFlowLoss, terms

_NEIGHBOURS = 10
_REFERENCE_TRANSITIONS = 10_000
_AT_BOUND = 1e-4
"""Share of the action range; the loaders keep data actions 1e-5 inside their bounds, and those count as at them."""


class DeFlowDiagnostics:
    """Numbers of a batch that the update has just seen, with the networks as the update left them.

    Args:
        loss: the loss that trains.

    Examples:
        >>> from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
        >>> from deflow_torchrl.algorithms.base import ProblemSpec
        >>> problem = ProblemSpec(3, 2, (16,), 0.99, "mean", 1e-3, torch.device("cpu"))
        >>> learner = get_algorithm("deflow").build(DeFlowConfig(), problem)
        >>> type(learner.diagnostics).__name__
        'DeFlowDiagnostics'
    """

    def __init__(self, loss: DeFlowLoss) -> None:
        self.loss = loss
        self._observation_key = last_policy(loss.actor_network.refinement_policy).observation_key
        self._states: Tensor | None = None
        self._actions = torch.empty(0)
        self._scale = torch.empty(0)

    def use_data(self, transitions: TensorDictBase) -> None:
        """Measure ``action_distance`` against these transitions; without a call it is left out.

        Args:
            transitions: observation and action of data ``[N]``; of more than 10,000 as many are taken, evenly spread. Pictures
                are not compared: what stands for them changes as their encoder learns.
        """
        keys = self.loss.actor_network.refinement_policy.in_keys
        if any(transitions.get(key).ndim > 2 for key in keys if key in transitions.keys(True)):
            return
        rows = torch.linspace(0, len(transitions) - 1, min(len(transitions), _REFERENCE_TRANSITIONS)).round().long()
        device = self.loss.target_divergence.device
        states = self._observation(transitions[rows].to(device))
        # A dimension that never changes has no unit: it adds nothing to a distance.
        spread = states.std(0, correction=0)
        self._scale = torch.where(spread > 0, 1 / spread, 0.0)
        self._states = states * self._scale
        self._actions = transitions[self.loss.tensor_keys.action][rows].to(device)

    def _observation(self, transitions: TensorDictBase) -> Tensor:
        """What the refinement network reads, behind its encoder."""
        with self.loss._functional_policies():
            return encode(self.loss.actor_network.refinement_policy, transitions)[self._observation_key]

    @torch.no_grad()
    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Compute the diagnostics.

        Args:
            batch: what the update was called with, ``[B]``: its |TD errors| are in it. The base actions of a frozen prior are
                read from it, where it has them.

        Returns:
            Scalars on the batch's device. With b the prior's actions, d the refinement's shifts and a = clip(b + d):

            * ``divergence_ratio``: D / delta, D the mean (or sum) of d^2 that the loss constrains.
            * ``saturation``: share of the dimensions of a that lie at a bound (within 1e-4 of the range).
            * ``saturation_data``: the same of the data's actions, which it is to be compared with.
            * ``q_base``, ``q_refined``: mean of Q(s, b) and of Q(s, a) over batch and critics.
            * ``td_error``: mean over the batch of |TD error|, the largest of the critics, before the step.
            * ``action_distance``: mean over the batch of the root-mean-square difference per dimension between a and the
              nearest of the data actions at the 10 nearest data states (observations divided by their standard deviation);
              after :meth:`use_data`. In units of action, like sqrt(delta).
            * ``action_distance_base``: the same of b: what of it is the prior's, not the refinement's.
        """
        loss = self.loss
        keys = loss.tensor_keys
        with loss._functional_policies():
            with generators_set_aside(seed=0):
                base = loss._base_action(batch)
            shift, action = loss._refine(batch, base)

        state = loss.critics.encode(batch)

        def qvalue(action: Tensor) -> Tensor:
            return loss.critics.values(loss._with_action(state, action)).mean()

        bounds = last_policy(loss.actor_network.refinement_policy).module
        out = {
            "divergence_ratio": terms.divergence(shift, loss.divergence_reduction).mean() / loss.target_divergence,
            "saturation": _share_at_bounds(action, bounds.low, bounds.high),
            "saturation_data": _share_at_bounds(batch[keys.action], bounds.low, bounds.high),
            "q_base": qvalue(base),
            "q_refined": qvalue(action),
            "td_error": batch[keys.priority].mean(),
        }
        if self._states is not None:
            nearest = torch.cdist(self._observation(batch) * self._scale, self._states)
            nearest = nearest.topk(min(_NEIGHBOURS, len(self._states)), largest=False, sorted=False).indices
            near_actions = self._actions[nearest]
            for name, value in (("action_distance", action), ("action_distance_base", base)):
                squared = (value.unsqueeze(-2) - near_actions).square().mean(-1)
                out[name] = squared.amin(-1).sqrt().mean()
        return out


def _share_at_bounds(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    margin = _AT_BOUND * (high - low)
    return ((action <= low + margin) | (action >= high - margin)).float().mean()
