# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Networks and policies: the flow prior, the refinement and the actor that chains them."""

from __future__ import annotations

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.flow import FlowMatchingModel, FlowMatchingPolicy
from deflow_torchrl.modules.networks import make_qvalue_networks, make_refinement_network, make_velocity_network
from deflow_torchrl.modules.refinement import RefinementModel, RefinementPolicy

__all__ = [
    "DeFlowActor",
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "RefinementModel",
    "RefinementPolicy",
    "make_qvalue_networks",
    "make_refinement_network",
    "make_velocity_network",
]
