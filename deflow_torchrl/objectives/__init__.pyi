# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .bc import BCLoss as BCLoss
from .calql import CalQLLoss as CalQLLoss
from .consistency_ac import ConsistencyACLoss as ConsistencyACLoss
from .deflow import DeFlowLoss as DeFlowLoss
from .dsrl import DSRLLoss as DSRLLoss
from .fan import FANLoss as FANLoss
from .fawac import FAWACLoss as FAWACLoss
from .fbrac import FBRACLoss as FBRACLoss
from .fedit import FEditLoss as FEditLoss
from .flow_matching import FlowMatchingLoss as FlowMatchingLoss
from .fql import FQLLoss as FQLLoss
from .idql import IDQLLoss as IDQLLoss
from .ifql import IFQLLoss as IFQLLoss
from .implicit_q import ImplicitQLoss as ImplicitQLoss
from .iql import IQLLoss as IQLLoss
from .qam import QAMLoss as QAMLoss
from .qam import TRQAMLoss as TRQAMLoss
from .rebrac import ReBRACLoss as ReBRACLoss
from .refinement import RefinementLoss as RefinementLoss
from .rlpd import RLPDLoss as RLPDLoss
from .srpo import SRPOLoss as SRPOLoss
from .td_critic import TDCriticLoss as TDCriticLoss
