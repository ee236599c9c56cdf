# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""TRQAM, assembled: QAM whose weight of Q follows a budget of path KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.settings import Algorithm, CandidatesConfig, Need, check_positive

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class TRQAMConfig(CandidatesConfig):
    """Settings of TRQAM, ``algo.<name>=...``.

    Attributes:
        kl_budget: path KL for each step of an action sequence.
        horizon: length of the action sequences, as ``chunk``.
        lambda_scale: factor of the multiplier in the loss.
        clip_adjoint: Q's gradient passes through the actions' bounds.
        cloning_steps: updates that clone the flow alone, before the tuned flow starts from it; 300000 in the published runs.
    """

    name: str = "trqam"
    kl_budget: float = 1.0
    horizon: int = 1
    lambda_scale: float = 3.0
    clip_adjoint: bool = True
    cloning_steps: int = 0

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        check_positive(need, self, "kl_budget", "horizon", "lambda_scale", optional=False)
        need(self.cloning_steps >= 0, "algo.cloning_steps", self.cloning_steps, "at least 0")


def build_trqam(config: TRQAMConfig, problem: ProblemSpec) -> Learner:
    """Build TRQAM for a problem."""
    from deflow_torchrl.algorithms.base import Stage, best_of_n_learner
    from deflow_torchrl.objectives import TRQAMLoss

    flow, tuned = (problem.flow_policy(config.flow_steps) for _ in range(2))
    loss = TRQAMLoss(
        flow,
        tuned,
        problem.critics(config.num_critics),
        kl_budget=config.kl_budget,
        horizon=config.horizon,
        best_of_n=config.best_of_n,
        pessimism=config.pessimism,
        lambda_scale=config.lambda_scale,
        clip_adjoint=config.clip_adjoint,
    )

    def after_update(out: TensorDictBase) -> None:
        if "path_kl" in out.keys():  # noqa: SIM118
            loss.update_trust_region(out["path_kl"])

    stages = [Stage(max_grad_norm=1.0)]
    if config.cloning_steps:
        cloned = {"actor_network": "flow_policy", "target_flow_policy": "flow_policy"}
        stages = [
            Stage(terms=("loss_flow",), end=config.cloning_steps, max_grad_norm=1.0),
            Stage(begin=config.cloning_steps, copies=cloned, max_grad_norm=1.0),
        ]
    return best_of_n_learner(config, problem, loss, tuned, stages=tuple(stages), after_update=after_update)


ALGORITHM = Algorithm(name="trqam", title="TRQAM", config=TRQAMConfig, build=build_trqam)
