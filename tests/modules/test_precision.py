"""Fewer digits in the sampler, and nowhere else."""

import contextlib
from typing import get_args

import pytest
import torch

from deflow_torchrl.algorithms.settings import PRECISIONS
from deflow_torchrl.modules.flow import Precision, matmul_precision
from tests.support.networks import make_batch, make_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", get_args(Precision))
def test_only_what_samples_is_rounded(name):
    torch.manual_seed(0)
    loss = make_loss()
    torch.manual_seed(0)
    rounded = make_loss(sampler_precision=name)
    batch = make_batch(64)
    out, expected = rounded(batch.clone()), loss(batch.clone())
    torch.testing.assert_close(out["loss_flow"], expected["loss_flow"], rtol=0, atol=0)
    torch.testing.assert_close(out.to_dict(), expected.to_dict(), rtol=0.05, atol=0.02)
    if name == "highest":
        torch.testing.assert_close(out.to_dict(), expected.to_dict(), rtol=0, atol=0)
    if name == "bfloat16":
        assert (out["loss_actor"] != expected["loss_actor"]).all()


@pytest.mark.parametrize("name", get_args(Precision))
def test_the_sampler_alone_runs_with_it(name):
    seen = {True: set(), False: set()}

    def look(module, inputs, output):
        fewer = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
        seen[torch.is_grad_enabled()].add(fewer)

    loss = make_loss(sampler_precision=name)
    loss.actor_network.flow_policy.module.velocity_network.register_forward_hook(look)
    loss(make_batch(8))
    expected = (name if name in ("high", "medium") else "highest", name == "bfloat16")
    assert seen == {False: {expected}, True: {("highest", False)}}


def test_the_settings_know_every_precision():
    assert get_args(Precision) == PRECISIONS


@pytest.mark.parametrize("name", get_args(Precision))
def test_the_processs_own_precision_comes_back(name):
    torch.set_float32_matmul_precision("high")
    try:
        with contextlib.suppress(ZeroDivisionError), matmul_precision(name, CPU):
            inside = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
            raise ZeroDivisionError
        assert inside == (name if name in ("high", "medium") else "high", name == "bfloat16")
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="highest, high, medium, bfloat16, got 'low'"):
        make_loss(sampler_precision="low")
