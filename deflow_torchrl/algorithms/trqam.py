# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""TRQAM, assembled: QAM whose weight of Q follows a budget of path KL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deflow_torchrl.algorithms.settings import Algorithm, CandidatesConfig, Need, check_positive, given

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class TRQAMConfig(CandidatesConfig):
    """Settings of TRQAM, ``algo.<name>=...``.

    Attributes:
        kl_budget: path KL for each step of an action sequence.
        kl_budget_online: the same in the online phase; as before where None.
        horizon: length of the action sequences; the run's ``chunk`` where None.
        lambda_scale: factor of the multiplier in the loss.
        clip_adjoint: Q's gradient passes through the actions' bounds.
        cloning_steps: updates that clone the flow alone, before the tuned flow starts from it; the footing's where None: 0, in
            the original 300000.
        flow_layer_norm: LayerNorm on the flows; the footing's where None: no, in the original on the four data sets of which
            the authors have larger ones, there with networks of 1024.
    """

    common: ClassVar[Mapping[str, Any]] = {**CandidatesConfig.common, "cloning_steps": 0, "flow_layer_norm": False}

    name: str = "trqam"
    kl_budget: float = 1.0
    kl_budget_online: float | None = None
    horizon: int | None = None
    lambda_scale: float = 3.0
    clip_adjoint: bool = True
    cloning_steps: int | None = None
    flow_layer_norm: bool | None = None

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        check_positive(need, self, "kl_budget", "lambda_scale", optional=False)
        check_positive(need, self, "kl_budget_online", "horizon")
        cloning = self.cloning_steps
        need(cloning is None or cloning >= 0, "algo.cloning_steps", cloning, "at least 0")


def build_trqam(config: TRQAMConfig, problem: ProblemSpec) -> Learner:
    """Build TRQAM for a problem."""
    from deflow_torchrl.algorithms.base import Stage, best_of_n_learner
    from deflow_torchrl.objectives import TRQAMLoss

    norm = config.settled("flow_layer_norm")
    flow, tuned = (problem.flow_policy(config.flow_steps, layer_norm=norm) for _ in range(2))
    loss = TRQAMLoss(
        flow,
        tuned,
        problem.critics(config.settled("num_critics")),
        kl_budget=config.kl_budget,
        horizon=given(config.horizon, problem.chunk),
        best_of_n=config.best_of_n,
        pessimism=config.settled("pessimism"),
        lambda_scale=config.lambda_scale,
        clip_adjoint=config.clip_adjoint,
    )

    def after_update(out: TensorDictBase) -> None:
        if "path_kl" in out.keys():  # noqa: SIM118
            loss.update_trust_region(out["path_kl"])

    stages = [Stage(max_grad_norm=1.0)]
    if cloning := config.settled("cloning_steps"):
        cloned = {"actor_network": "flow_policy", "target_flow_policy": "flow_policy"}
        stages = [
            Stage(terms=("loss_flow",), end=cloning, max_grad_norm=1.0),
            Stage(begin=cloning, copies=cloned, max_grad_norm=1.0),
        ]
    online = {} if config.kl_budget_online is None else {"kl_budget": config.kl_budget_online}
    return best_of_n_learner(
        config, problem, loss, tuned, stages=tuple(stages), after_update=after_update, online=online
    )


ALGORITHM = Algorithm(name="trqam", title="TRQAM", config=TRQAMConfig, build=build_trqam)
