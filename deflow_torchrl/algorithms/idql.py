# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""IDQL, assembled: a diffusion model of the data, IQL's values, and the best of N by the target critics."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig, Need, check_expectile, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class IDQLConfig(FootedConfig):
    """Settings of IDQL, ``algo.<name>=...``.

    Attributes:
        q_aggregation: not read: candidates are ranked by the minimum over critics.
        num_samples: candidates N; the task's where None.
        expectile: of the value regression; the footing's where None: 0.9, in the original 0.7 in locomotion and on Adroit.
        diffusion_steps: denoising steps T.
        dropout: in the noise network.
        average_rate: share of the noise network that moves into the average that acts, at each update.
    """

    common: ClassVar[Mapping[str, Any]] = {"expectile": 0.9}

    name: str = "idql"
    num_samples: int | None = None
    expectile: float | None = None
    diffusion_steps: int = 5
    dropout: float = 0.1
    average_rate: float = 0.001

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.num_samples is None or self.num_samples >= 1, "algo.num_samples", self.num_samples, "at least 1")
        check_expectile(need, self.expectile)
        need(self.diffusion_steps >= 1, "algo.diffusion_steps", self.diffusion_steps, "at least 1")
        need(0 <= self.dropout < 1, "algo.dropout", self.dropout, "a share in [0, 1)")
        need(0 < self.average_rate <= 1, "algo.average_rate", self.average_rate, "a number in (0, 1]")


def idql_footing(config: FootedConfig, problem: ProblemSpec) -> tuple[tuple[Any, Any], dict[str, dict[str, Any]]]:
    """Critics and V, and the optimiser groups by name, as the footing has them.

    In the original: ReLU without LayerNorm, but on V's input; weight decay and a half cosine to 0 of the noise network alone.
    """
    if not config.is_original:
        return (problem.critics(), problem.value_network()), {}
    from deflow_torchrl.modules.networks import make_plain_mlp

    value = problem.value_network(functools.partial(make_plain_mlp, input_norm=True))
    decayed = {"weight_decay": 1e-4, "decoupled_weight_decay": True, "cosine_steps": problem.num_updates}
    return (problem.critics(mlp=make_plain_mlp), value), {"diffusion_policy_params": decayed}


def build_idql(config: IDQLConfig, problem: ProblemSpec) -> Learner:
    """Build IDQL for a problem: the noise network steps first, then V, then Q with the new V.

    Raises:
        InputError: where neither the settings nor the task have a number of samples.
    """
    from torchrl.objectives import SoftUpdate

    from deflow_torchrl.algorithms.base import SoftTarget, Stage, learner_with_critics
    from deflow_torchrl.modules.chosen import ValueChosenPolicy
    from deflow_torchrl.objectives import IDQLLoss

    num_samples = needed(config.num_samples, "num_samples")
    policy = problem.diffusion_policy(config.diffusion_steps, dropout=config.dropout)
    networks, groups = idql_footing(config, problem)
    loss = IDQLLoss(policy, *networks, expectile=config.settled("expectile"))
    SoftUpdate(loss, tau=config.tau)  # the stages move the targets; without it the loss warns that nothing does
    acting, exploring = (
        ValueChosenPolicy(
            policy,
            loss.qvalue_network,
            loss.target_qvalue_network_params,
            num_samples,
            policy_params=loss.target_diffusion_policy_params,
            reads_noise=reads_noise,
        )
        for reads_noise in (True, False)  # the collector's noise is one row a state
    )
    return learner_with_critics(
        config,
        problem,
        loss,
        acting,
        exploration_policy=exploring,
        optimizer_groups=groups,
        stages=(
            Stage(("loss_score",), (SoftTarget("diffusion_policy", config.average_rate),)),
            Stage(("loss_value",)),
            Stage(("loss_qvalue",), (SoftTarget("qvalue_network", config.tau),)),
        ),
    )


ALGORITHM = Algorithm(name="idql", title="IDQL", config=IDQLConfig, build=build_idql)
