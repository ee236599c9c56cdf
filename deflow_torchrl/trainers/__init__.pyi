# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .alarms import Alarm as Alarm
from .alarms import Alarms as Alarms
from .checkpoint import load_checkpoint as load_checkpoint
from .checkpoint import save_checkpoint as save_checkpoint
from .collection import OnlineExperience as OnlineExperience
from .collection import OnlineStep as OnlineStep
from .evaluation import EvaluationResult as EvaluationResult
from .evaluation import Evaluator as Evaluator
from .loop import Trainer as Trainer
from .loop import TrainerSchedule as TrainerSchedule
from .metrics import MetricsLog as MetricsLog
from .online import OnlinePhase as OnlinePhase
from .stacked import StackedTrainer as StackedTrainer
from .stacked import StackedUpdate as StackedUpdate
from .update import UpdateStep as UpdateStep
