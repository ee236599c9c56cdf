"""Transitions in TorchRL's TED layout: validation, OGBench data sets and their generation."""

from __future__ import annotations

from deflow_torchrl._lazy import lazy_exports

_EXPORTS = {
    "OGBenchExperienceReplay": ".ogbench",
    "load_ogbench_transitions": ".ogbench",
    "transitions_from_arrays": ".schema",
    "validate_transitions": ".schema",
    "generate_ogbench_dataset": ".generation",
    "GENERATED_DATASETS": ".generation",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
