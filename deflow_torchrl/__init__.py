# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DeFlow for TorchRL: a flow prior, a trust-region refinement and a twin critic as LossModules and TensorDictModules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports
from deflow_torchrl._register import register_datasets

if TYPE_CHECKING:  # what type checkers and editors see
    from deflow_torchrl.data import MinariExperienceReplay as MinariExperienceReplay
    from deflow_torchrl.data import OfflineOnlineReplayBuffer as OfflineOnlineReplayBuffer
    from deflow_torchrl.data import OGBenchExperienceReplay as OGBenchExperienceReplay
    from deflow_torchrl.data import TransitionDataset as TransitionDataset
    from deflow_torchrl.data import TransitionReplayBuffer as TransitionReplayBuffer
    from deflow_torchrl.modules import BestOfNPolicy as BestOfNPolicy
    from deflow_torchrl.modules import DeFlowActor as DeFlowActor
    from deflow_torchrl.modules import DeterministicPolicy as DeterministicPolicy
    from deflow_torchrl.modules import FlowMatchingPolicy as FlowMatchingPolicy
    from deflow_torchrl.modules import GaussianPolicy as GaussianPolicy
    from deflow_torchrl.modules import OneStepPolicy as OneStepPolicy
    from deflow_torchrl.modules import RefinementPolicy as RefinementPolicy
    from deflow_torchrl.modules import make_one_step_network as make_one_step_network
    from deflow_torchrl.modules import make_policy_network as make_policy_network
    from deflow_torchrl.modules import make_qvalue_networks as make_qvalue_networks
    from deflow_torchrl.modules import make_refinement_network as make_refinement_network
    from deflow_torchrl.modules import make_value_network as make_value_network
    from deflow_torchrl.modules import make_velocity_network as make_velocity_network
    from deflow_torchrl.objectives import BCLoss as BCLoss
    from deflow_torchrl.objectives import DeFlowLoss as DeFlowLoss
    from deflow_torchrl.objectives import FAWACLoss as FAWACLoss
    from deflow_torchrl.objectives import FBRACLoss as FBRACLoss
    from deflow_torchrl.objectives import FlowMatchingLoss as FlowMatchingLoss
    from deflow_torchrl.objectives import FQLLoss as FQLLoss
    from deflow_torchrl.objectives import IFQLLoss as IFQLLoss
    from deflow_torchrl.objectives import ImplicitQLoss as ImplicitQLoss
    from deflow_torchrl.objectives import IQLLoss as IQLLoss
    from deflow_torchrl.objectives import ReBRACLoss as ReBRACLoss
    from deflow_torchrl.objectives import RefinementLoss as RefinementLoss
    from deflow_torchrl.objectives import TDCriticLoss as TDCriticLoss

__version__ = "0.1.0"

_EXPORTS = {
    "DeFlowActor": ".modules",
    "FlowMatchingPolicy": ".modules",
    "RefinementPolicy": ".modules",
    "make_qvalue_networks": ".modules",
    "make_refinement_network": ".modules",
    "make_velocity_network": ".modules",
    "DeFlowLoss": ".objectives",
    "FlowMatchingLoss": ".objectives",
    "RefinementLoss": ".objectives",
    "TDCriticLoss": ".objectives",
    "BestOfNPolicy": ".modules",
    "DeterministicPolicy": ".modules",
    "GaussianPolicy": ".modules",
    "OneStepPolicy": ".modules",
    "make_one_step_network": ".modules",
    "make_policy_network": ".modules",
    "make_value_network": ".modules",
    "BCLoss": ".objectives",
    "FAWACLoss": ".objectives",
    "FBRACLoss": ".objectives",
    "FQLLoss": ".objectives",
    "IFQLLoss": ".objectives",
    "ImplicitQLoss": ".objectives",
    "IQLLoss": ".objectives",
    "ReBRACLoss": ".objectives",
    "OGBenchExperienceReplay": ".data",
    "MinariExperienceReplay": ".data",
    "OfflineOnlineReplayBuffer": ".data",
    "TransitionDataset": ".data",
    "TransitionReplayBuffer": ".data",
}
__all__ = [*_EXPORTS, "__version__"]  # noqa: PLE0604 - the names are resolved on first use
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
register_datasets()
