# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""floq: FQL with flow critics (https://arxiv.org/abs/2509.06863)."""

from __future__ import annotations

from dataclasses import dataclass

from deflow_torchrl.algorithms.fql import FQLConfig, build_fql
from deflow_torchrl.algorithms.settings import Algorithm


@dataclass
class FloqConfig(FQLConfig):
    """Settings of floq, ``algo.<name>=...``: those of FQL with ``critic=floq``; the defaults are those of its published runs."""

    name: str = "floq"
    critic: str = "floq"


ALGORITHM = Algorithm(name="floq", title="floq", config=FloqConfig, build=build_fql, pictures=False)
