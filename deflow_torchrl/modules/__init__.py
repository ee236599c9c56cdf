# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Networks and policies: the flow prior, the refinement and the actor that chains them; policies of other methods."""

from __future__ import annotations

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.best_of_n import BestOfNModel, BestOfNPolicy
from deflow_torchrl.modules.deterministic import DeterministicModel, DeterministicPolicy
from deflow_torchrl.modules.flow import FlowMatchingModel, FlowMatchingPolicy
from deflow_torchrl.modules.gaussian import GaussianModel, GaussianPolicy
from deflow_torchrl.modules.networks import (
    make_one_step_network,
    make_policy_network,
    make_qvalue_networks,
    make_refinement_network,
    make_value_network,
    make_velocity_network,
)
from deflow_torchrl.modules.one_step import OneStepModel, OneStepPolicy
from deflow_torchrl.modules.refinement import RefinementModel, RefinementPolicy

__all__ = [
    "BestOfNModel",
    "BestOfNPolicy",
    "DeFlowActor",
    "DeterministicModel",
    "DeterministicPolicy",
    "FlowMatchingModel",
    "FlowMatchingPolicy",
    "GaussianModel",
    "GaussianPolicy",
    "OneStepModel",
    "OneStepPolicy",
    "RefinementModel",
    "RefinementPolicy",
    "make_one_step_network",
    "make_policy_network",
    "make_qvalue_networks",
    "make_refinement_network",
    "make_value_network",
    "make_velocity_network",
]
