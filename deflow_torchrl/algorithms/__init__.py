# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Method name -> networks, loss and optimiser groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports

if TYPE_CHECKING:  # what type checkers and editors see
    from deflow_torchrl.algorithms.base import Learner as Learner
    from deflow_torchrl.algorithms.base import ProblemSpec as ProblemSpec
    from deflow_torchrl.algorithms.bc import BCConfig as BCConfig
    from deflow_torchrl.algorithms.deflow import DeFlowConfig as DeFlowConfig
    from deflow_torchrl.algorithms.fawac import FAWACConfig as FAWACConfig
    from deflow_torchrl.algorithms.fbrac import FBRACConfig as FBRACConfig
    from deflow_torchrl.algorithms.flow_bc import FlowBCConfig as FlowBCConfig
    from deflow_torchrl.algorithms.fql import FQLConfig as FQLConfig
    from deflow_torchrl.algorithms.ifql import IFQLConfig as IFQLConfig
    from deflow_torchrl.algorithms.iql import IQLConfig as IQLConfig
    from deflow_torchrl.algorithms.rebrac import ReBRACConfig as ReBRACConfig
    from deflow_torchrl.algorithms.registry import ALGORITHMS as ALGORITHMS
    from deflow_torchrl.algorithms.registry import get_algorithm as get_algorithm
    from deflow_torchrl.algorithms.registry import register_algorithm as register_algorithm
    from deflow_torchrl.algorithms.settings import Algorithm as Algorithm
    from deflow_torchrl.algorithms.settings import BootstrapConfig as BootstrapConfig
    from deflow_torchrl.algorithms.settings import CriticConfig as CriticConfig
    from deflow_torchrl.algorithms.settings import MethodConfig as MethodConfig

_EXPORTS = {
    "Algorithm": ".settings",
    "BootstrapConfig": ".settings",
    "CriticConfig": ".settings",
    "Learner": ".base",
    "MethodConfig": ".settings",
    "ProblemSpec": ".base",
    "ALGORITHMS": ".registry",
    "get_algorithm": ".registry",
    "register_algorithm": ".registry",
    "BCConfig": ".bc",
    "DeFlowConfig": ".deflow",
    "IFQLConfig": ".ifql",
    "IQLConfig": ".iql",
    "ReBRACConfig": ".rebrac",
    "FAWACConfig": ".fawac",
    "FBRACConfig": ".fbrac",
    "FQLConfig": ".fql",
    "FlowBCConfig": ".flow_bc",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
