# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Entries for TorchRL's Hydra configurations: ``loss/deflow`` and ``trainer/deflow``. Importing this module registers them.

    from torchrl.trainers.algorithms.configs import *
    import deflow_torchrl.configs

They stand in Hydra's ConfigStore beside TorchRL's own groups; ``examples/torchrl_trainer.yaml`` composes them. Networks need no
entries: ``_target_: deflow_torchrl.DeFlowActor`` and so on, as any callable in Hydra.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from inspect import Parameter, signature
from typing import Any

from torch.optim import Adam
from torchrl.data import OfflineToOnlineReplayBuffer, ReplayBuffer, TensorStorage
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.errors import MissingExtraError
from deflow_torchrl.modules import DeFlowActor
from deflow_torchrl.objectives import DeFlowLoss

try:
    from hydra.core.config_store import ConfigStore
    from hydra.utils import get_method
    from omegaconf import MISSING
    from torchrl.trainers.algorithms.configs import OfflineToOnlineTrainerConfig
    from torchrl.trainers.algorithms.configs.objectives import LossConfig
except ImportError as error:
    raise MissingExtraError(error.name or "hydra-core", "cli") from error

LR, TAU = 3e-4, 0.005  # the paper's


def make_deflow_loss(
    actor_network: DeFlowActor,
    qvalue_network: Any = None,
    *,
    critic_network: Any = None,
    gamma: float | None = None,
    **options: Any,
) -> DeFlowLoss:
    """Build the loss of ``loss/deflow``.

    Args:
        actor_network: the actor.
        qvalue_network: the critics, as :class:`DeFlowLoss` takes them.

    Keyword Args:
        critic_network: the critics, under the name that TorchRL's trainers use.
        gamma: discount; the estimator's default where None.
        **options: of :class:`DeFlowLoss`.
    """
    loss = DeFlowLoss(actor_network, critic_network if qvalue_network is None else qvalue_network, **options)
    if gamma is not None:
        loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
    return loss


def make_offline_buffer(dataset: ReplayBuffer) -> ReplayBuffer:
    """The rows of a data set without the ``index`` that it adds to a batch, which ``OfflineToOnlineReplayBuffer`` refuses."""
    return ReplayBuffer(storage=TensorStorage(dataset[:].exclude("index")))


def make_deflow_trainer(**options: Any) -> Any:
    """Build the trainer of ``trainer/deflow``: TorchRL's offline-to-online trainer, with DeFlow's optimiser and target updater.

    TorchRL's trainer moves the targets after the optimiser step; the authors' code, and this package's commands, before it.
    """
    if options.get("optimizer") is None:
        options["optimizer"] = lambda params: Adam(params, lr=LR)
    if options.get("target_net_updater") is None:
        options["target_net_updater"] = lambda loss: SoftUpdate(loss, tau=TAU)
    return get_method(OfflineToOnlineTrainerConfig._target_)(**options)


def _loss_config() -> type:
    """A dataclass with a field for every argument of the loss, so that Hydra refuses misspelt ones."""
    arguments = [it for it in signature(DeFlowLoss).parameters.values() if it.kind is not Parameter.VAR_KEYWORD]
    options = [(it.name, Any, field(default=None if it.default is it.empty else it.default)) for it in arguments]
    target = ("_target_", str, field(default=f"{__name__}.make_deflow_loss"))
    return make_dataclass(
        "DeFlowLossConfig", [*options, ("gamma", Any, field(default=None)), target], bases=(LossConfig,)
    )


DeFlowLossConfig = _loss_config()
"""Settings of ``loss/deflow``."""


@dataclass
class DeFlowTrainerConfig(OfflineToOnlineTrainerConfig):
    """Settings of ``trainer/deflow``: TorchRL's, without gradient clipping, and with logging where it works."""

    optimizer: Any = None
    logger: Any = None
    save_trainer_file: Any = None
    replay_buffer: Any = MISSING
    clip_grad_norm: bool = False
    # TorchRL's hooks ask the buffer for a count that it does not keep in 0.14.1.
    enable_logging: bool = hasattr(OfflineToOnlineReplayBuffer, "write_count")
    _target_: str = f"{__name__}.make_deflow_trainer"


for _group, _node in (("loss", DeFlowLossConfig), ("trainer", DeFlowTrainerConfig)):
    ConfigStore.instance().store(group=_group, name="deflow", node=_node, provider="deflow_torchrl")
