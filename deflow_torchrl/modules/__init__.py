# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Networks and policies: the flow prior, the refinement and the actor that chains them, the one-step policy."""

from __future__ import annotations

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.flow import FlowMatchingModel, FlowMatchingPolicy
from deflow_torchrl.modules.networks import (
    make_one_step_network,
    make_qvalue_networks,
    make_refinement_network,
    make_velocity_network,
)
from deflow_torchrl.modules.one_step import OneStepModel, OneStepPolicy
from deflow_torchrl.modules.refinement import RefinementModel, RefinementPolicy

__all__ = [
    "DeFlowActor",
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "OneStepModel",
    "OneStepPolicy",
    "RefinementModel",
    "RefinementPolicy",
    "make_one_step_network",
    "make_qvalue_networks",
    "make_refinement_network",
    "make_velocity_network",
]
