# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .actor import DeFlowActor as DeFlowActor
from .best_of_n import BestOfNModel as BestOfNModel
from .best_of_n import BestOfNPolicy as BestOfNPolicy
from .critics import CriticEnsemble as CriticEnsemble
from .critics import EncodedCritics as EncodedCritics
from .critics import TwinCritic as TwinCritic
from .flow import FlowMatchingModel as FlowMatchingModel
from .flow import FlowMatchingPolicy as FlowMatchingPolicy
from .networks import make_one_step_network as make_one_step_network
from .networks import make_policy_network as make_policy_network
from .networks import make_qvalue_networks as make_qvalue_networks
from .networks import make_refinement_network as make_refinement_network
from .networks import make_value_network as make_value_network
from .networks import make_velocity_network as make_velocity_network
from .normalizer import ObservationNormalizer as ObservationNormalizer
from .policies import DeterministicModel as DeterministicModel
from .policies import DeterministicPolicy as DeterministicPolicy
from .policies import GaussianModel as GaussianModel
from .policies import GaussianPolicy as GaussianPolicy
from .policies import OneStepModel as OneStepModel
from .policies import OneStepPolicy as OneStepPolicy
from .refinement import RefinementModel as RefinementModel
from .refinement import RefinementPolicy as RefinementPolicy
from .tanh_gaussian import TanhGaussianModel as TanhGaussianModel
from .tanh_gaussian import TanhGaussianPolicy as TanhGaussianPolicy
from .tanh_gaussian import make_tanh_gaussian_network as make_tanh_gaussian_network
