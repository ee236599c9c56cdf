# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What a method hands to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from deflow_torchrl.algorithms.settings import BootstrapConfig, given


@dataclass(frozen=True)
class ProblemSpec:
    """Sizes and task-given settings a method builds its networks from.

    Attributes:
        observation_dim: O.
        action_dim: A.
        hidden_dims: widths of the hidden layers of every network.
        gamma: the task's discount.
        q_aggregation: the task's aggregation of target critics.
        target_divergence: the task's delta.
        device: where the parameters live.
    """

    observation_dim: int
    action_dim: int
    hidden_dims: Sequence[int]
    gamma: float
    q_aggregation: str
    target_divergence: float
    device: torch.device


class Diagnostics(Protocol):
    """Numbers that explain a run, computed on steps that log. Neither call touches the global random generators."""

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Scalars of ``batch``, which the update was just called with; rows of metrics carry them as ``train/NAME``."""

    def use_data(self, transitions: TensorDictBase) -> None:
        """Compare with these transitions of the data from now on."""


@dataclass
class Learner:
    """A method, built.

    Attributes:
        loss: computes every ``loss_*`` of a batch; their sum is minimised.
        policy: the acting policy.
        evaluated_policies: name -> policy, everything worth evaluating at the end of a run.
        param_groups: optimiser groups over the loss's parameters, in ``torch.optim`` form.
        target_updater: moves the target networks at each update; None in a method that has none.
        prior: the part that writes the base action, which :meth:`~deflow_torchrl.trainers.UpdateStep.freeze_prior` fixes; None
            in a method that has none.
        diagnostics: explains a batch the update has just seen, in scalars; None where a method has nothing to say.
        exploration_policy: acts in the online phase, where that is not how ``policy`` acts; None where it is.
        term_periods: name of a loss -> n: it counts at every n-th update only, and is zero at the others (whose gradient is then
            zero too, not absent: Adam's momentum goes on moving what the term trains).
        target_period: the target networks move at every n-th update only.
        next_action: the loss reads ``("next", "action")``: buffers are to deliver the action of the transition that follows each
            in its trajectory, the transition's own at the trajectory's end.
    """

    loss: LossModule
    policy: TensorDictModuleBase
    evaluated_policies: Mapping[str, TensorDictModuleBase]
    param_groups: Sequence[Mapping[str, Any]]
    target_updater: TargetNetUpdater | None
    prior: TensorDictModuleBase | None = None
    diagnostics: Diagnostics | None = None
    exploration_policy: TensorDictModuleBase | None = None
    term_periods: Mapping[str, int] = field(default_factory=dict)
    target_period: int = 1
    next_action: bool = False

    @property
    def online_policy(self) -> TensorDictModuleBase:
        """The policy that acts in the online phase."""
        return self.policy if self.exploration_policy is None else self.exploration_policy

    @property
    def loss_names(self) -> list[str]:
        """Names of the summed terms."""
        return [key for key in self.loss.out_keys if key.startswith("loss_")]

    @property
    def acting_policy(self) -> str:
        """Name of the acting policy among the evaluated ones."""
        return next(name for name, policy in self.evaluated_policies.items() if policy is self.policy)


def learner_with_critics(
    config: BootstrapConfig,
    problem: ProblemSpec,
    loss: LossModule,
    policy: TensorDictModuleBase,
    *,
    evaluated_policies: Mapping[str, TensorDictModuleBase] | None = None,
    **more: Any,
) -> Learner:
    """What every method with critics ends in: the discount, one Adam over all parameters, and targets that move softly.

    Args:
        config: the method's settings; a discount that is None is the task's.
        problem: what the method is built for.
        loss: its loss, whose value estimator is set here (TD(0)).
        policy: the acting policy.

    Keyword Args:
        evaluated_policies: as of :class:`Learner`; the acting policy under the method's name by default.
        more: further fields of :class:`Learner`.
    """
    gamma = given(config.gamma, problem.gamma)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma, device=problem.device)
    return Learner(
        loss=loss,
        policy=policy,
        evaluated_policies={config.name: policy} if evaluated_policies is None else evaluated_policies,
        param_groups=[{"params": trainable(loss), "lr": config.lr}],
        target_updater=SoftUpdate(loss, tau=config.tau),
        **more,
    )


def trainable(module: nn.Module) -> list[Tensor]:
    """The module's parameters that require gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
