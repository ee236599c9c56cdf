# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .data import OfflineOnlineReplayBuffer as OfflineOnlineReplayBuffer
from .data import TransitionDataset as TransitionDataset
from .data import TransitionReplayBuffer as TransitionReplayBuffer
from .modules import BestOfNPolicy as BestOfNPolicy
from .modules import DeFlowActor as DeFlowActor
from .modules import DeterministicPolicy as DeterministicPolicy
from .modules import FlowMatchingPolicy as FlowMatchingPolicy
from .modules import GaussianPolicy as GaussianPolicy
from .modules import OneStepPolicy as OneStepPolicy
from .modules import RefinementPolicy as RefinementPolicy
from .modules import make_one_step_network as make_one_step_network
from .modules import make_policy_network as make_policy_network
from .modules import make_qvalue_networks as make_qvalue_networks
from .modules import make_refinement_network as make_refinement_network
from .modules import make_value_network as make_value_network
from .modules import make_velocity_network as make_velocity_network
from .objectives import BCLoss as BCLoss
from .objectives import DeFlowLoss as DeFlowLoss
from .objectives import FAWACLoss as FAWACLoss
from .objectives import FBRACLoss as FBRACLoss
from .objectives import FlowMatchingLoss as FlowMatchingLoss
from .objectives import FQLLoss as FQLLoss
from .objectives import IFQLLoss as IFQLLoss
from .objectives import ImplicitQLoss as ImplicitQLoss
from .objectives import IQLLoss as IQLLoss
from .objectives import ReBRACLoss as ReBRACLoss
from .objectives import RefinementLoss as RefinementLoss
from .objectives import TDCriticLoss as TDCriticLoss
from .sources import MinariExperienceReplay as MinariExperienceReplay
from .sources import OGBenchExperienceReplay as OGBenchExperienceReplay

__version__: str

def register() -> None: ...
