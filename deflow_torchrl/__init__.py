"""DeFlow for TorchRL: a flow prior, a trust-region refinement and a twin critic as LossModules and TensorDictModules."""

from __future__ import annotations

from deflow_torchrl._lazy import lazy_exports

__version__ = "0.1.0"

_EXPORTS = {
    "DeFlowActor": ".modules",
    "FlowMatchingPolicy": ".modules",
    "RefinementPolicy": ".modules",
    "make_qvalue_networks": ".modules",
    "make_refinement_network": ".modules",
    "make_velocity_network": ".modules",
    "DeFlowLoss": ".objectives",
    "FlowMatchingLoss": ".objectives",
    "RefinementLoss": ".objectives",
    "TDCriticLoss": ".objectives",
    "OGBenchExperienceReplay": ".data",
}
__all__ = [*_EXPORTS, "__version__"]  # noqa: PLE0604 - the names are resolved on first use
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
