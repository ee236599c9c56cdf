# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What differs between tasks, as data: names, data sets and hyperparameters."""

from __future__ import annotations

from deflow_torchrl.tasks.paper import (
    PaperTask,
    families,
    family_groups,
    paper_settings,
    paper_task,
    paper_tasks,
    usual_protocol,
)
from deflow_torchrl.tasks.registry import Task, d4rl_task_names, get_task, ogbench_dataset_name, ogbench_task_names

__all__ = [
    "PaperTask",
    "Task",
    "d4rl_task_names",
    "families",
    "family_groups",
    "get_task",
    "ogbench_dataset_name",
    "ogbench_task_names",
    "paper_settings",
    "paper_task",
    "paper_tasks",
    "usual_protocol",
]
