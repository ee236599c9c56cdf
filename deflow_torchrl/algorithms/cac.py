# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""CAC, assembled: a consistency policy and an average of it, twin critics, and a softmax over candidates where it acts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig, Need, check_positive, given, needed
from deflow_torchrl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from deflow_torchrl.algorithms.base import Learner, ProblemSpec

_AVERAGE_RATE, _AVERAGE_PERIOD, _AVERAGE_FIRST = 0.005, 5, 1_000


@dataclass
class CACConfig(FootedConfig):
    """Settings of CAC (Consistency-AC), ``algo.<name>=...``.

    Attributes:
        q_aggregation: not read: the target takes the minimum over critics.
        eta: weight of the Q term; the task's where None.
        sampling_steps: evaluations K of the consistency function in a sample.
        max_q_backup: next actions of the target; the footing's where None: 10, in the original 1 on some D4RL tasks.
        scale_consistency: weight noise levels by 100 over their distance.
        normalize_target: divide targets by their standard deviation over the batch; the footing's where None: no, in the
            original on some D4RL tasks.
        max_grad_norm: bound of the 2-norm of the actor's gradients, in the original footing of the critics' too; the footing's
            where None: 5, in the original the task's.
        actor_lr: learning rate of the actor; ``lr`` where None.
        reward_scale: factor of rewards; the footing's where None: 1, in the original 4 on D4RL's antmaze.
        reward_shift: what is added to them then; as ``reward_scale``, 2.
        standardize_rewards: rewards in units of the data's standard deviation around their mean, in the place of scale and
            shift; the footing's where None: no, in the original on Adroit.
        num_candidates: actions of which one is drawn by a softmax of their values, where the policy acts.
        schedule_steps: updates in which the number of noise levels grows from 2 to 150; it starts anew after them. Those of the
            run where None, in the original 50000.
    """

    common: ClassVar[Mapping[str, Any]] = {
        "max_q_backup": 10,
        "normalize_target": False,
        "max_grad_norm": 5.0,
        "reward_scale": 1.0,
        "reward_shift": 0.0,
        "standardize_rewards": False,
    }

    name: str = "cac"
    eta: float | None = None
    sampling_steps: int = 2
    max_q_backup: int | None = None
    scale_consistency: bool = True
    normalize_target: bool | None = None
    max_grad_norm: float | None = None
    actor_lr: float | None = None
    reward_scale: float | None = None
    reward_shift: float | None = None
    standardize_rewards: bool | None = None
    num_candidates: int = 50
    schedule_steps: int | None = None

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.eta is None or self.eta >= 0, "algo.eta", self.eta, "a number >= 0")
        check_positive(need, self, "max_grad_norm", "actor_lr", "reward_scale")
        for name in ("sampling_steps", "max_q_backup", "num_candidates", "schedule_steps"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"algo.{name}", value, "at least 1")


def build_cac(config: CACConfig, problem: ProblemSpec) -> Learner:
    """Build CAC for a problem: critics step first, then the actor against the new critics.

    Raises:
        InputError: where neither the settings nor the task have an eta, or rewards that are all equal are to be standardised.
    """
    from torch import nn
    from torchrl.objectives import SoftUpdate

    from deflow_torchrl.algorithms.base import SoftTarget, Stage, learner_with_critics
    from deflow_torchrl.modules import ConsistencyNetwork, ConsistencyPolicy
    from deflow_torchrl.modules.chosen import ValueChosenPolicy
    from deflow_torchrl.modules.networks import make_plain_mlp
    from deflow_torchrl.objectives import ConsistencyACLoss
    from deflow_torchrl.objectives.consistency_ac import number_of_scales

    eta = needed(config.eta, "eta")
    observation_dim, action_dim, _ = problem.sizes
    policy = problem.encoded(
        ConsistencyPolicy(
            ConsistencyNetwork(observation_dim, action_dim),
            action_dim,
            config.sampling_steps,
            in_keys=(problem.state_key, "noise"),
            **problem.bounds,
        )
    )
    mlp = functools.partial(make_plain_mlp, activation=nn.Mish, init="torch") if config.is_original else None
    scale, shift = config.settled("reward_scale"), config.settled("reward_shift")
    if config.settled("standardize_rewards") and problem.reward_moments is not None:
        mean, deviation = problem.reward_moments
        if not deviation > 0:
            raise InputError("algo.standardize_rewards=true: all rewards of the data are equal; leave it off")
        scale, shift = 1 / deviation, -mean / deviation
    loss = ConsistencyACLoss(
        policy,
        problem.critics(mlp=mlp),
        eta=eta,
        scale_consistency=config.scale_consistency,
        num_target_samples=config.settled("max_q_backup"),
        normalize_target=config.settled("normalize_target"),
        reward_scale=scale,
        reward_shift=shift,
    )
    schedule_steps = given(config.schedule_steps, problem.num_updates)
    max_grad_norm = config.settled("max_grad_norm")

    def set_scales(update: Tensor) -> None:
        done = (update - 1) % schedule_steps
        loss.num_scales.copy_(number_of_scales(done.float() / schedule_steps))

    SoftUpdate(loss, tau=config.tau)  # the stages move the targets; without it the loss warns that nothing does
    acting, exploring = (
        ValueChosenPolicy(
            policy,
            loss.qvalue_network,
            loss.target_qvalue_network_params,
            config.num_candidates,
            softmax=True,
            reads_noise=reads_noise,
        )
        for reads_noise in (True, False)  # the collector's noise is one row a state
    )
    average = SoftTarget("actor_network", _AVERAGE_RATE, _AVERAGE_PERIOD, _AVERAGE_FIRST)
    return learner_with_critics(
        config,
        problem,
        loss,
        acting,
        exploration_policy=exploring,
        optimizer_groups={} if config.actor_lr is None else {"actor_network_params": {"lr": config.actor_lr}},
        stages=(
            Stage(("loss_qvalue",), max_grad_norm=max_grad_norm if config.is_original else None),
            Stage(
                ("loss_consistency", "loss_actor"),
                (average, SoftTarget("qvalue_network", config.tau)),
                max_grad_norm=max_grad_norm,
            ),
        ),
        before_update=set_scales,
    )


ALGORITHM = Algorithm(name="cac", title="CAC", config=CACConfig, build=build_cac)
