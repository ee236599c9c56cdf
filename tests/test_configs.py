"""DeFlow's entries among TorchRL's Hydra configurations."""

import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

pytest.importorskip("hydra", reason="needs the extra cli")

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate

import deflow_torchrl.configs
from deflow_torchrl.objectives import DeFlowLoss

EXAMPLES = Path(__file__).parents[1] / "examples"


def composed(*overrides):
    with initialize_config_dir(str(EXAMPLES), version_base="1.3"):
        return compose("torchrl_trainer", overrides=list(overrides))


# TorchRL calls its trainers experimental, and announces another way to register their optimiser.
@pytest.mark.filterwarnings("ignore:.*experimental:UserWarning", "ignore:.*OptimizationStepper:FutureWarning")
def test_torchrls_trainer_is_built_from_the_groups_and_trains_on_ogbench(generated):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    config = composed(
        "sizes.hidden_dims=[8,8]", "loss.target_divergence=0.25", "trainer.total_frames=8",
        "trainer.collector.frames_per_batch=4",
        "trainer.optim_steps_per_batch=2", "trainer.progress_bar=false", "trainer.replay_buffer.batch_size=8",
        f"+trainer.replay_buffer.offline_dataset.dataset.root={generated}",
    )  # fmt: skip
    trainer = instantiate(config.trainer)
    loss = trainer.loss_module
    assert isinstance(loss, DeFlowLoss)
    assert (loss.target_divergence.item(), loss.value_estimator.gamma.item()) == (0.25, pytest.approx(0.99))
    assert (trainer.optimizer.defaults["lr"], trainer.clip_grad_norm) == (3e-4, False)
    before = loss.actor_network_params.clone()
    trainer.train()
    assert trainer.collected_frames == len(trainer.replay_buffer.online_buffer) == 8
    assert (before != loss.actor_network_params).any(), "the optimiser ran"
    critics, targets = loss.qvalue_network_params, loss.target_qvalue_network_params
    assert (critics != targets).any()
    assert 1 - trainer.target_net_updater.eps == pytest.approx(0.005)


def test_misspelt_settings_are_refused_and_every_argument_has_a_field():
    with pytest.raises(HydraException, match="target_divergance"):
        composed("loss.target_divergance=1")
    fields = set(deflow_torchrl.configs.DeFlowLossConfig.__dataclass_fields__)
    assert fields == {*signature(DeFlowLoss).parameters, "gamma", "_target_", "_partial_"}


def test_without_hydra_one_line_says_what_to_install():
    code = "import sys; sys.modules['hydra'] = sys.modules['hydra.core.config_store'] = None\nimport deflow_torchrl.configs"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "deflow-torchrl[cli]" in done.stderr.splitlines()[-1]
