# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Transitions in TorchRL's TED layout: from OGBench, Minari or own files, checked, stored once, described."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports

if TYPE_CHECKING:  # what type checkers and editors see
    from deflow_torchrl.data.action_variance import ActionVariance as ActionVariance
    from deflow_torchrl.data.action_variance import intrinsic_action_variance as intrinsic_action_variance
    from deflow_torchrl.data.action_variance import suggest_target_divergence as suggest_target_divergence
    from deflow_torchrl.data.base_actions import BaseActionBank as BaseActionBank
    from deflow_torchrl.data.builder import TransitionBuilder as TransitionBuilder
    from deflow_torchrl.data.card import card_markdown as card_markdown
    from deflow_torchrl.data.card import data_card as data_card
    from deflow_torchrl.data.dataset import TransitionDataset as TransitionDataset
    from deflow_torchrl.data.dataset import TransitionReplayBuffer as TransitionReplayBuffer
    from deflow_torchrl.data.dataset import ValidationReport as ValidationReport
    from deflow_torchrl.data.download import download_ogbench_dataset as download_ogbench_dataset
    from deflow_torchrl.data.files import import_files as import_files
    from deflow_torchrl.data.generation import generate_ogbench_dataset as generate_ogbench_dataset
    from deflow_torchrl.data.minari import MinariExperienceReplay as MinariExperienceReplay
    from deflow_torchrl.data.minari import load_minari_dataset as load_minari_dataset
    from deflow_torchrl.data.ogbench import OGBenchExperienceReplay as OGBenchExperienceReplay
    from deflow_torchrl.data.ogbench import load_ogbench_dataset as load_ogbench_dataset
    from deflow_torchrl.data.oracles import GENERATED_DATASETS as GENERATED_DATASETS
    from deflow_torchrl.data.union_buffer import OfflineOnlineReplayBuffer as OfflineOnlineReplayBuffer
    from deflow_torchrl.data.union_storage import TRANSITION_KEYS as TRANSITION_KEYS

_EXPORTS = {
    "BaseActionBank": ".base_actions",
    "OGBenchExperienceReplay": ".ogbench",
    "load_ogbench_dataset": ".ogbench",
    "MinariExperienceReplay": ".minari",
    "load_minari_dataset": ".minari",
    "import_files": ".files",
    "data_card": ".card",
    "card_markdown": ".card",
    "TransitionDataset": ".dataset",
    "TransitionReplayBuffer": ".dataset",
    "TransitionBuilder": ".builder",
    "ValidationReport": ".dataset",
    "download_ogbench_dataset": ".download",
    "generate_ogbench_dataset": ".generation",
    "GENERATED_DATASETS": ".oracles",
    "OfflineOnlineReplayBuffer": ".union_buffer",
    "TRANSITION_KEYS": ".union_storage",
    "ActionVariance": ".action_variance",
    "intrinsic_action_variance": ".action_variance",
    "suggest_target_divergence": ".action_variance",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
