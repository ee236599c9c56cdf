# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .base import SOURCES as SOURCES
from .base import Source as Source
from .base import get_source as get_source
from .base import register_source as register_source
from .files import import_files as import_files
from .minari import MinariExperienceReplay as MinariExperienceReplay
from .minari import load_minari_dataset as load_minari_dataset
from .minari_env import make_minari_env as make_minari_env
from .ogbench import OGBenchExperienceReplay as OGBenchExperienceReplay
from .ogbench import load_ogbench_dataset as load_ogbench_dataset
