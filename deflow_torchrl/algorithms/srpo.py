# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""SRPO, assembled: a diffusion model of the data, IQL's values, and a deterministic policy that the score holds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from deflow_torchrl.algorithms.idql import idql_footing
from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig, Need, check_expectile, needed
from deflow_torchrl.errors import InputError

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


_ROWS = 256  # of the authors' batches for policy and values; those of the model of the data have 2048


@dataclass
class SRPOConfig(FootedConfig):
    """Settings of SRPO, ``algo.<name>=...``.

    Attributes:
        q_aggregation: not read: the policy climbs the mean of the target critics.
        beta: coefficient of Q's gradient; the task's where None.
        expectile: of the value regression; the footing's where None: 0.9, in the original 0.7 in locomotion and on Adroit.
        weighting: of the score: ``sigma2``, ``constant`` or ``score``.
        normalize_q_gradient: divide Q's gradient by the root of its mean square over action dimensions; the footing's where
            None: no, in the original of ``vp`` in mazes.
        schedule: of the model of the data: ``ddpm``, IDQL's model of discrete steps, or ``vp``, that of SRPO's authors in
            continuous time.
        diffusion_steps: denoising steps T of ``ddpm``.
        dropout: in the noise network.
        policy_hidden_dims: widths of the policy's hidden layers; ``hidden_dims`` where None, in the original the authors'.
        behavior_steps: updates that train the model of the data alone, which then stays as it is; the footing's where None: 0,
            which trains all parts side by side, in the original of ``vp`` 2 million.
        value_steps: updates after them that train V and Q alone, which then stay as they are; as ``behavior_steps``, 1.5 million.
    """

    common: ClassVar[Mapping[str, Any]] = {
        "expectile": 0.9,
        "normalize_q_gradient": False,
        "behavior_steps": 0,
        "value_steps": 0,
    }

    name: str = "srpo"
    beta: float | None = None
    expectile: float | None = None
    weighting: str = "sigma2"
    normalize_q_gradient: bool | None = None
    schedule: str = "ddpm"
    diffusion_steps: int = 5
    dropout: float = 0.1
    policy_hidden_dims: list[int] | None = None
    behavior_steps: int | None = None
    value_steps: int | None = None

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.beta is None or self.beta >= 0, "algo.beta", self.beta, "a number >= 0")
        check_expectile(need, self.expectile)
        need(self.schedule in ("ddpm", "vp"), "algo.schedule", self.schedule, "ddpm or vp")
        for name in ("behavior_steps", "value_steps"):
            steps = getattr(self, name)
            need(steps is None or steps >= 0, f"algo.{name}", steps, "at least 0")
        kinds = ("sigma2", "constant", "score")
        need(self.weighting in kinds, "algo.weighting", self.weighting, "one of " + ", ".join(kinds))
        need(self.diffusion_steps >= 1, "algo.diffusion_steps", self.diffusion_steps, "at least 1")
        need(0 <= self.dropout < 1, "algo.dropout", self.dropout, "a share in [0, 1)")


def build_srpo(config: SRPOConfig, problem: ProblemSpec) -> Learner:
    """Build SRPO for a problem: the noise network steps first, then V and Q, then the policy with all of that.

    Side by side all three are stages of an update; with ``behavior_steps`` and ``value_steps`` they are phases of the run.

    Raises:
        InputError: where neither the settings nor the task have a beta, or one of two phases has no updates.
    """
    from deflow_torchrl.algorithms.base import SoftTarget, Stage, learner_with_critics
    from deflow_torchrl.modules import DeterministicPolicy, make_policy_network
    from deflow_torchrl.modules.networks import make_plain_mlp
    from deflow_torchrl.objectives import SRPOLoss

    beta = needed(config.beta, "beta")
    first, later = (config.settled(name) for name in ("behavior_steps", "value_steps"))
    if bool(first) != bool(later):
        raise InputError(f"algo.behavior_steps={first} and algo.value_steps={later}: give both, or neither")
    second = first + later
    make: Any = make_plain_mlp if config.is_original else make_policy_network
    as_authors = config.is_original and config.schedule == "vp"
    networks, groups = idql_footing(config, problem)
    if as_authors:
        make = functools.partial(make_plain_mlp, init="torch")
        networks = problem.critics(mlp=make), problem.value_network(make)
        groups = {
            "diffusion_policy_params": {"weight_decay": 0.01, "decoupled_weight_decay": True},
            "actor_network_params": {"cosine_steps": max(problem.num_updates - second, 1), "cosine_begin": second},
        }
    observation_dim, action_dim, hidden_dims = problem.sizes
    network = make(observation_dim, action_dim, config.policy_hidden_dims or hidden_dims)
    actor = problem.encoded(DeterministicPolicy(network, in_keys=(problem.state_key,), **problem.bounds))
    schedule = cast("Any", config.schedule)
    loss = SRPOLoss(
        actor,
        problem.diffusion_policy(config.diffusion_steps, dropout=config.dropout, schedule=schedule),
        *networks,
        beta=beta,
        expectile=config.settled("expectile"),
        weighting=cast("Any", config.weighting),
        normalize_q_gradient=config.settled("normalize_q_gradient"),
    )
    rows = _ROWS if as_authors else None
    return learner_with_critics(
        config,
        problem,
        loss,
        actor,
        optimizer_groups=groups,
        stages=(
            Stage(("loss_score",), end=first or None),
            Stage(
                ("loss_value", "loss_qvalue"),
                (SoftTarget("qvalue_network", config.tau),),
                begin=first,
                end=second or None,
                rows=rows,
            ),
            Stage(("loss_actor",), begin=second, rows=rows),
        ),
    )


ALGORITHM = Algorithm(name="srpo", title="SRPO", config=SRPOConfig, build=build_srpo)
