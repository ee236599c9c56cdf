# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""QAM-E: QAM with an edit on top of the tuned flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deflow_torchrl.algorithms.qam import QAMConfig, build_qam
from deflow_torchrl.algorithms.settings import Algorithm


@dataclass
class QAMEConfig(QAMConfig):
    """Settings of QAM-E, ``algo.<name>=...``: those of QAM, with the task's ``edit_scale`` where None; 0 is QAM itself."""

    needs: ClassVar[tuple[str, ...]] = ("inverse_temperature", "edit_scale")

    name: str = "qam_e"


ALGORITHM = Algorithm(name="qam_e", title="QAM-E", config=QAMEConfig, build=build_qam)
