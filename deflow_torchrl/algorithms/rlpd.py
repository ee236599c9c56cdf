# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""RLPD, assembled as FQL's comparison runs it: a tanh-Gaussian, twin critics, one Adam, half of every batch from the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class RLPDConfig(FootedConfig):
    """Settings of RLPD, ``algo.<name>=...``; both footings are that of FQL's comparison.

    Attributes:
        q_aggregation: ``min`` or ``mean`` over the target critics; ``min`` where None, as FQL's code on every task.
        backup_entropy: put the entropy of the next action into the target.
        target_entropy_scale: the temperature aims at an entropy of minus this times the action's dimensions.
    """

    name: str = "rlpd"
    q_aggregation: str | None = "min"
    backup_entropy: bool = False
    target_entropy_scale: float = 0.5


def build_rlpd(config: RLPDConfig, problem: ProblemSpec) -> Learner:
    """Build RLPD for a problem. It acts by tanh of the mean, online by samples."""
    from deflow_torchrl.algorithms.base import exploring, learner_with_critics
    from deflow_torchrl.algorithms.settings import given
    from deflow_torchrl.modules import TanhGaussianPolicy, make_tanh_gaussian_network
    from deflow_torchrl.objectives import RLPDLoss

    network = make_tanh_gaussian_network(*problem.sizes, head_gain=0.1)
    policy = problem.encoded(TanhGaussianPolicy(network, in_keys=(problem.state_key,), **problem.bounds))
    loss = RLPDLoss(
        policy,
        problem.critics(),
        q_aggregation=given(config.q_aggregation, "min"),
        backup_entropy=config.backup_entropy,
        target_entropy=-config.target_entropy_scale * problem.sizes[1],
    )
    return learner_with_critics(config, problem, loss, policy, exploration_policy=exploring(policy))


ALGORITHM = Algorithm(
    name="rlpd",
    title="RLPD",
    config=RLPDConfig,
    build=build_rlpd,
    run_settings={"offline_steps": 0, "mixing": "balanced"},
    trains_offline=False,
    pictures=False,
)
