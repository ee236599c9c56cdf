import math

import pytest
import torch
from torch import nn

from deflow_torchrl.modules import (
    make_one_step_network,
    make_qvalue_networks,
    make_refinement_network,
    make_velocity_network,
)


def linears(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def test_default_networks_are_the_papers_four_by_512():
    for network, width_in, width_out in (
        (make_velocity_network(7, 3), 7 + 3 + 1, 3),
        (make_refinement_network(7, 3), 7 + 3, 3),
        (make_one_step_network(7, 3), 7 + 3, 3),
        (make_qvalue_networks(7, 3)[0].module, 7 + 3, 1),
    ):
        shapes = [(layer.in_features, layer.out_features) for layer in linears(network)]
        assert shapes == [(width_in, 512), (512, 512), (512, 512), (512, 512), (512, width_out)]


def test_initialisation_is_xavier_uniform_with_zero_bias():
    for layer in linears(make_velocity_network(20, 5, (256, 256))):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not layer.bias.any()


def test_reset_parameters_restores_the_same_initialisation():
    layer = linears(make_velocity_network(20, 5, (256,)))[0]
    layer.reset_parameters()
    assert layer.weight.abs().max() <= math.sqrt(6 / (26 + 256))
    assert not layer.bias.any()


def test_layer_norm_follows_the_activation_on_critics_only():
    kinds = [type(layer).__name__ for layer in make_qvalue_networks(4, 2, (8, 8))[0].module.mlp]
    assert kinds == ["_XavierLinear", "GELU", "LayerNorm", "_XavierLinear", "GELU", "LayerNorm", "_XavierLinear"]
    assert [
        layer.eps for layer in make_qvalue_networks(4, 2, (8,))[0].modules() if isinstance(layer, nn.LayerNorm)
    ] == [1e-6]
    for make in (make_refinement_network, make_one_step_network):
        assert not any(isinstance(layer, nn.LayerNorm) for layer in make(4, 2, (8, 8)).modules())


def test_gelu_is_the_tanh_approximation():
    activation = make_velocity_network(1, 1, (2,))[1]
    x = torch.linspace(-3, 3, 50)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(activation(x), expected)


def test_critics_are_independent():
    first, second = make_qvalue_networks(4, 2, (8,))
    assert not torch.equal(linears(first)[0].weight, linears(second)[0].weight)


@pytest.mark.parametrize("hidden", [(), (0,), (8, -1)])
def test_impossible_widths_are_refused(hidden):
    with pytest.raises(ValueError, match="positive widths"):
        make_velocity_network(4, 2, hidden)
