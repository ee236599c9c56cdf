# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DeFlow with flow critics (Table 3 of its paper)."""

from __future__ import annotations

from dataclasses import dataclass

from deflow_torchrl.algorithms.deflow import ALGORITHM as DEFLOW
from deflow_torchrl.algorithms.deflow import DeFlowConfig, build_deflow
from deflow_torchrl.algorithms.settings import Algorithm


@dataclass
class DeFlowFloqConfig(DeFlowConfig):
    """Settings of DeFlow + floq, ``algo.<name>=...``: those of DeFlow with ``critic=floq``.

    No command, delta or length of a run was published for it: delta is DeFlow's of the task, everything else the default.
    """

    name: str = "deflow_floq"
    critic: str = "floq"


ALGORITHM = Algorithm(
    name="deflow_floq",
    title="DeFlow + floq",
    config=DeFlowFloqConfig,
    build=build_deflow,
    alarms=DEFLOW.alarms,
    pictures=False,
)
