# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .alarms import AlarmRule as AlarmRule
from .base import Learner as Learner
from .base import ProblemSpec as ProblemSpec
from .bc import BCConfig as BCConfig
from .cac import CACConfig as CACConfig
from .calql import CalQLConfig as CalQLConfig
from .deflow import DeFlowConfig as DeFlowConfig
from .fawac import FAWACConfig as FAWACConfig
from .fbrac import FBRACConfig as FBRACConfig
from .flow_bc import FlowBCConfig as FlowBCConfig
from .fql import FQLConfig as FQLConfig
from .idql import IDQLConfig as IDQLConfig
from .ifql import IFQLConfig as IFQLConfig
from .iql import IQLConfig as IQLConfig
from .panels import Panel as Panel
from .rebrac import ReBRACConfig as ReBRACConfig
from .registry import ALGORITHMS as ALGORITHMS
from .registry import get_algorithm as get_algorithm
from .registry import register_algorithm as register_algorithm
from .rlpd import RLPDConfig as RLPDConfig
from .settings import Algorithm as Algorithm
from .settings import BootstrapConfig as BootstrapConfig
from .settings import CriticConfig as CriticConfig
from .settings import MethodConfig as MethodConfig
from .srpo import SRPOConfig as SRPOConfig
