# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Behavioural cloning, assembled: a Gaussian of unit standard deviation, evaluated at its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, MethodConfig

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class BCConfig(MethodConfig):
    """Settings of behavioural cloning, ``algo.<name>=...``."""

    name: str = "bc"


def build_bc(config: BCConfig, problem: ProblemSpec) -> Learner:
    """Build behavioural cloning for a problem. Online it acts by the samples of its Gaussian."""
    from deflow_torchrl.algorithms.base import Learner, exploring, trainable
    from deflow_torchrl.modules import GaussianPolicy, make_policy_network
    from deflow_torchrl.objectives import BCLoss

    network = make_policy_network(*problem.sizes)
    policy = problem.encoded(GaussianPolicy(network, in_keys=(problem.state_key,), **problem.bounds))
    loss = BCLoss(policy)
    return Learner(
        loss=loss,
        policy=policy,
        evaluated_policies={"bc": policy},
        param_groups=[{"params": trainable(loss), "lr": config.lr}],
        target_updater=None,
        exploration_policy=exploring(policy),
    )


ALGORITHM = Algorithm(name="bc", title="BC", config=BCConfig, build=build_bc)
