# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""QAM, assembled: a cloned flow, a tuned one, optionally an edit or a one-step policy on top, one clip of all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from deflow_torchrl.algorithms.settings import Algorithm, CandidatesConfig, Need, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class QAMConfig(CandidatesConfig):
    """Settings of QAM, ``algo.<name>=...``.

    With an ``edit_scale`` it is QAM-E, with a ``distillation_coef`` QAM-F; they exclude each other. ``qam_e`` and ``qam_f`` are
    these with the values that were published for each task.

    Attributes:
        inverse_temperature: tau, the weight of Q; the task's where None.
        clip_adjoint: Q's gradient passes through the actions' bounds.
        edit_scale: c, the largest edit of an action dimension; no edit where None or 0.
        distillation_coef: weight of the one-step policy's distillation; no such policy where None or 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("inverse_temperature",)

    name: str = "qam"
    inverse_temperature: float | None = None
    clip_adjoint: bool = True
    edit_scale: float | None = None
    distillation_coef: float | None = None

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        for name in ("inverse_temperature", "edit_scale", "distillation_coef"):
            value = getattr(self, name)
            need(value is None or value >= 0, f"algo.{name}", value, "a number >= 0")
        both = bool(self.edit_scale) and bool(self.distillation_coef)
        need(not both, "algo.distillation_coef", self.distillation_coef, "null where there is an edit_scale")


def build_qam(config: QAMConfig, problem: ProblemSpec) -> Learner:
    """Build QAM for a problem; settings that are None are the task's.

    Raises:
        InputError: where neither the settings nor the task have a temperature, or what QAM-E and QAM-F need beside it.
    """
    from deflow_torchrl.algorithms.base import Stage, best_of_n_learner, one_step_policy
    from deflow_torchrl.modules import EditedFlowPolicy
    from deflow_torchrl.objectives import QAMLoss

    for name in config.needs:
        needed(getattr(config, name), name)
    temperature = cast("float", config.inverse_temperature)
    more: dict[str, Any] = {}
    flow, tuned = (problem.flow_policy(config.flow_steps) for _ in range(2))
    critics = problem.critics(config.settled("num_critics"))
    if config.edit_scale:
        more |= {"edit_policy": problem.edit_policy(), "edit_scale": config.edit_scale}
    if config.distillation_coef:
        more |= {"one_step_policy": one_step_policy(problem), "distillation_coef": config.distillation_coef}
    loss = QAMLoss(
        flow,
        tuned,
        critics,
        inverse_temperature=temperature,
        best_of_n=config.best_of_n,
        pessimism=config.settled("pessimism"),
        clip_adjoint=config.clip_adjoint,
        **more,
    )
    stages = (Stage(max_grad_norm=1.0),)
    if config.edit_scale:
        policy = EditedFlowPolicy(
            flow if temperature == 0 else tuned, more["edit_policy"], edit_scale=config.edit_scale
        )
        return best_of_n_learner(config, problem, loss, policy, drawing=policy.drawing(), stages=stages)
    policy = more.get("one_step_policy", flow if temperature == 0 else tuned)
    return best_of_n_learner(config, problem, loss, policy, stages=stages)


ALGORITHM = Algorithm(name="qam", title="QAM", config=QAMConfig, build=build_qam)
