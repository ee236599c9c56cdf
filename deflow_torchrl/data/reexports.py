# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Names of :mod:`deflow_torchrl.sources` that this package exports too. Nothing else in this room imports from there."""

from deflow_torchrl.sources.card import card_markdown, data_card  # noqa: F401
from deflow_torchrl.sources.download import download_ogbench_dataset  # noqa: F401
from deflow_torchrl.sources.files import import_files  # noqa: F401
from deflow_torchrl.sources.generation import generate_ogbench_dataset  # noqa: F401
from deflow_torchrl.sources.minari import (
    MinariExperienceReplay,  # noqa: F401
    load_minari_dataset,  # noqa: F401
)
from deflow_torchrl.sources.ogbench import (
    OGBenchExperienceReplay,  # noqa: F401
    load_ogbench_dataset,  # noqa: F401
)
from deflow_torchrl.sources.oracles import GENERATED_DATASETS  # noqa: F401
