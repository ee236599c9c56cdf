# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""QAM-F: QAM with a one-step policy that is distilled from the tuned flow and climbs Q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deflow_torchrl.algorithms.qam import QAMConfig, build_qam
from deflow_torchrl.algorithms.settings import Algorithm


@dataclass
class QAMFConfig(QAMConfig):
    """Settings of QAM-F, ``algo.<name>=...``: those of QAM, with the task's ``distillation_coef`` where None; 0 is QAM itself."""

    needs: ClassVar[tuple[str, ...]] = ("inverse_temperature", "distillation_coef")

    name: str = "qam_f"


ALGORITHM = Algorithm(name="qam_f", title="QAM-F", config=QAMFConfig, build=build_qam)
