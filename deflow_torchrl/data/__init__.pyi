# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .action_variance import ActionVariance as ActionVariance
from .action_variance import intrinsic_action_variance as intrinsic_action_variance
from .action_variance import suggest_target_divergence as suggest_target_divergence
from .base_actions import BaseActionBank as BaseActionBank
from .crop import RandomCrop as RandomCrop
from .dataset import TransitionBuilder as TransitionBuilder
from .dataset import TransitionDataset as TransitionDataset
from .dataset import TransitionReplayBuffer as TransitionReplayBuffer
from .dataset import ValidationReport as ValidationReport
from .reexports import GENERATED_DATASETS as GENERATED_DATASETS
from .reexports import MinariExperienceReplay as MinariExperienceReplay
from .reexports import OGBenchExperienceReplay as OGBenchExperienceReplay
from .reexports import card_markdown as card_markdown
from .reexports import data_card as data_card
from .reexports import download_ogbench_dataset as download_ogbench_dataset
from .reexports import generate_ogbench_dataset as generate_ogbench_dataset
from .reexports import import_files as import_files
from .reexports import load_minari_dataset as load_minari_dataset
from .reexports import load_ogbench_dataset as load_ogbench_dataset
from .schema import TRANSITION_KEYS as TRANSITION_KEYS
from .union.buffer import OfflineOnlineReplayBuffer as OfflineOnlineReplayBuffer
