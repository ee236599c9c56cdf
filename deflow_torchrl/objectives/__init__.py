# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""LossModules: flow matching, refinement, TD critic, DeFlow, which is the three together, and the methods it is compared with."""

from __future__ import annotations

from deflow_torchrl.objectives.bc import BCLoss
from deflow_torchrl.objectives.deflow import DeFlowLoss
from deflow_torchrl.objectives.fawac import FAWACLoss
from deflow_torchrl.objectives.fbrac import FBRACLoss
from deflow_torchrl.objectives.flow_matching import FlowMatchingLoss
from deflow_torchrl.objectives.fql import FQLLoss
from deflow_torchrl.objectives.ifql import IFQLLoss
from deflow_torchrl.objectives.implicit_q import ImplicitQLoss
from deflow_torchrl.objectives.iql import IQLLoss
from deflow_torchrl.objectives.rebrac import ReBRACLoss
from deflow_torchrl.objectives.refinement import RefinementLoss
from deflow_torchrl.objectives.td_critic import TDCriticLoss

__all__ = [
    "BCLoss",
    "DeFlowLoss",
    "FAWACLoss",
    "FBRACLoss",
    "FQLLoss",
    "FlowMatchingLoss",
    "IFQLLoss",
    "IQLLoss",
    "ImplicitQLoss",
    "ReBRACLoss",
    "RefinementLoss",
    "TDCriticLoss",
]
