# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""QAM-F: QAM with a one-step policy that is distilled from the tuned flow and climbs Q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.qam import QAMConfig, build_qam
from deflow_torchrl.algorithms.settings import Algorithm, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class QAMFConfig(QAMConfig):
    """Settings of QAM-F, ``algo.<name>=...``: those of QAM, with the task's ``distillation_coef`` where None; 0 is QAM itself."""

    name: str = "qam_f"


def build_qam_f(config: QAMFConfig, problem: ProblemSpec) -> Learner:
    """Build QAM-F for a problem.

    Raises:
        InputError: where neither the settings nor the task have a temperature and ``distillation_coef``.
    """
    needed(config.distillation_coef, "distillation_coef")
    return build_qam(config, problem)


ALGORITHM = Algorithm(name="qam_f", title="QAM-F", config=QAMFConfig, build=build_qam_f)
