# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .comparison import compare_runs as compare_runs
from .demo import run_demo as run_demo
from .evaluate import evaluate_run as evaluate_run
from .evaluate import load_run as load_run
from .landscape import draw_landscape as draw_landscape
from .live import watch_runs as watch_runs
from .offline import evaluate_offline as evaluate_offline
from .overrides import apply_overrides as apply_overrides
from .overrides import compose_config as compose_config
from .render import render_run as render_run
from .run import resume as resume
from .run import train as train
from .settings import TrainConfig as TrainConfig
from .settings import config_from_dict as config_from_dict
from .settings import config_to_dict as config_to_dict
from .settings import default_out as default_out
