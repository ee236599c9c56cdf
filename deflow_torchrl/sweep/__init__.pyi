# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .costs import estimate_costs as estimate_costs
from .jobs import Job as Job
from .jobs import plan_jobs as plan_jobs
from .plan import Cell as Cell
from .plan import SweepPlan as SweepPlan
from .plan import Variant as Variant
from .plan import parse_sweep as parse_sweep
from .run import run_sweep as run_sweep
