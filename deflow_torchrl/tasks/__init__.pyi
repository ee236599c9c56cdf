# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .paper import PaperTask as PaperTask
from .paper import chosen_by_task as chosen_by_task
from .paper import families as families
from .paper import family_groups as family_groups
from .paper import has_own_footing as has_own_footing
from .paper import original_settings as original_settings
from .paper import paper_settings as paper_settings
from .paper import paper_task as paper_task
from .paper import paper_tasks as paper_tasks
from .paper import published_settings as published_settings
from .paper import usual_protocol as usual_protocol
from .registry import Task as Task
from .registry import d4rl_task_names as d4rl_task_names
from .registry import get_task as get_task
from .registry import ogbench_dataset_name as ogbench_dataset_name
from .registry import ogbench_task_names as ogbench_task_names
