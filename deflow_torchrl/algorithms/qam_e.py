# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""QAM-E: QAM with an edit on top of the tuned flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deflow_torchrl.algorithms.qam import QAMConfig, build_qam
from deflow_torchrl.algorithms.settings import Algorithm, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class QAMEConfig(QAMConfig):
    """Settings of QAM-E, ``algo.<name>=...``: those of QAM, with the task's ``edit_scale`` where None; 0 is QAM itself."""

    name: str = "qam_e"


def build_qam_e(config: QAMEConfig, problem: ProblemSpec) -> Learner:
    """Build QAM-E for a problem.

    Raises:
        InputError: where neither the settings nor the task have a temperature and ``edit_scale``.
    """
    needed(config.edit_scale, "edit_scale")
    return build_qam(config, problem)


ALGORITHM = Algorithm(name="qam_e", title="QAM-E", config=QAMEConfig, build=build_qam_e)
