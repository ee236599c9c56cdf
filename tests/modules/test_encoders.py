"""Encoders of pictures: sizes, values against a network written in loops, gradients, layouts and bad input."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded

from deflow_torchrl.modules import ImpalaEncoder, make_encoder


def pictures(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def spec(*shape):
    return Bounded(0, 255, shape, dtype=torch.uint8)


def convolve(x, kernel, bias):
    """``x [H, W, C_in]`` with the reference's ``kernel [3, 3, C_in, C_out]``, zeros around, one output at a time."""
    height, width, _ = x.shape
    out = np.empty((height, width, kernel.shape[-1]))
    for row in range(height):
        for column in range(width):
            total = bias.copy()
            for down in range(3):
                for right in range(3):
                    y, z = row + down - 1, column + right - 1
                    if 0 <= y < height and 0 <= z < width:
                        total = total + x[y, z] @ kernel[down, right]
            out[row, column] = total
    return out


def pool(x):
    """Max pool 3x3 with stride 2 and padding "SAME"."""
    sizes = []
    for size in x.shape[:2]:
        padding = max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0)
        sizes.append((math.ceil(size / 2), padding // 2))
    (rows, above), (columns, left) = sizes
    out = np.empty((rows, columns, x.shape[2]))
    for row in range(rows):
        for column in range(columns):
            first, begin = row * 2 - above, column * 2 - left
            window = x[max(first, 0) : first + 3, max(begin, 0) : begin + 3]
            out[row, column] = window.max((0, 1))
    return out


def in_loops(picture, kernels, dense, num_blocks, stacks):
    """The reference's network of one picture ``[H, W, C]`` from its words, in NumPy."""
    x, kernels = picture.astype(np.float64) / 255, iter(kernels)
    for _ in range(stacks):
        x = pool(convolve(x, *next(kernels)))
        for _ in range(num_blocks):
            inner = convolve(np.maximum(x, 0), *next(kernels))
            x = x + convolve(np.maximum(inner, 0), *next(kernels))
    x = np.maximum(x, 0)
    flat = np.array([x[y, z, c] for y in range(x.shape[0]) for z in range(x.shape[1]) for c in range(x.shape[2])])
    for kernel, bias in dense:
        flat = flat @ kernel + bias
        flat = 0.5 * flat * (1 + np.tanh(math.sqrt(2 / math.pi) * (flat + 0.044715 * flat**3)))
    return flat


def with_random_biases(encoder):
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.3, 0.3)
    return encoder


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (5, 8), (1, 2), (12, 9)], ids=str)
def test_values_are_those_of_the_reference_written_in_loops(size):
    torch.manual_seed(0)
    encoder = ImpalaEncoder(2, stack_sizes=(3, 4), num_blocks=2, mlp_hidden_dims=(6, 5), image_size=size)
    encoder = with_random_biases(encoder.double())
    rng = np.random.default_rng(0)
    # Weights the other way round: kernels in the reference's layout, copied into torch's.
    kernels, dense = [], []
    modules = [it for it in encoder.modules() if isinstance(it, nn.Conv2d | nn.Linear)]
    for module in modules:
        if isinstance(module, nn.Conv2d):
            kernel = rng.uniform(-0.5, 0.5, (3, 3, module.in_channels, module.out_channels))
            kernels.append((kernel, module.bias.detach().numpy()))
            module.weight.data.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))
        else:
            kernel = rng.uniform(-0.5, 0.5, (module.in_features, module.out_features))
            dense.append((kernel, module.bias.detach().numpy()))
            module.weight.data.copy_(torch.from_numpy(kernel).T)
    batch = pictures(3, *size, 2)
    expected = np.stack([in_loops(picture, kernels, dense, num_blocks=2, stacks=2) for picture in batch.numpy()])
    np.testing.assert_allclose(encoder(batch).detach().numpy(), expected, rtol=1e-12, atol=1e-13)


def test_the_papers_encoder_has_1105920_parameters_in_the_order_of_the_reference():
    encoder = make_encoder("impala_small", Composite(observation=spec(64, 64, 9)))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 1_105_920
    expected, before = [], 9
    for width in (16, 32, 32):
        for channels in (before, width, width):
            expected += [(width, channels, 3, 3), (width,)]
        before = width
    assert [tuple(parameter.shape) for parameter in encoder.parameters()] == [*expected, (512, 2048), (512,)]


@pytest.mark.parametrize(
    ("name", "stacks", "blocks", "out"),
    [
        ("impala_small", [16, 32, 32], 1, 512),
        ("impala", [16, 32, 32], 2, 512),
        ("impala_large", [64, 128, 128], 2, 1024),
        ("impala_debug", [4, 4], 1, 512),
    ],
)
def test_named_encoders_have_the_sizes_of_the_reference(name, stacks, blocks, out):
    encoder = make_encoder(name, spec(16, 16, 3))
    assert [stack.conv.out_channels for stack in encoder.stacks] == stacks
    assert {len(stack.blocks) for stack in encoder.stacks} == {blocks}
    assert encoder(pictures(2, 16, 16, 3)).shape == (2, out)
    assert encoder.out_features == out


def test_initialisation_is_xavier_uniform_of_3x3_fans_with_zero_biases_also_after_a_reset():
    encoder = make_encoder("impala_small", spec(64, 64, 9))
    for _ in range(2):
        bounds = []
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                window = 9 if isinstance(module, nn.Conv2d) else 1
                bound = math.sqrt(6 / (window * sum(module.weight.shape[:2])))
                assert bound * 0.95 < module.weight.abs().max() <= bound
                assert not module.bias.any()
                bounds.append(round(bound, 4))
                with torch.no_grad():
                    module.weight.fill_(9.0)
                    module.bias.fill_(9.0)
                module.reset_parameters()
        assert bounds == [0.1633, 0.1443, 0.1443, 0.1179, 0.1021, 0.1021, 0.1021, 0.1021, 0.1021, 0.0484]


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    encoder = ImpalaEncoder(1, stack_sizes=(2, 2), mlp_hidden_dims=(3,), image_size=5).double()
    encoder = with_random_biases(encoder)
    picture = pictures(1, 5, 5, 1).double().requires_grad_()
    names = [name for name, _ in encoder.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in encoder.parameters()]

    def call(picture, *values):
        return torch.func.functional_call(encoder, dict(zip(names, values, strict=True)), (picture,))

    # A picture's numbers are 255 times as large as what they are scaled to.
    assert torch.autograd.gradcheck(lambda *values: call(picture.detach(), *values), values, eps=1e-6)
    assert torch.autograd.gradcheck(lambda picture: call(picture, *values), [picture], eps=1e-4)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)], ids=str)
def test_leading_dimensions_stay(lead):
    encoder = make_encoder("impala_debug", spec(8, 8, 3))
    batch = pictures(*lead, 8, 8, 3)
    out = encoder(batch)
    assert out.shape == (*lead, 512)
    rows = torch.stack([encoder(picture) for picture in batch.reshape(-1, 8, 8, 3)])
    torch.testing.assert_close(out.reshape(-1, 512), rows)


def test_numbers_from_0_to_255_and_uint8_give_the_same_and_stay_as_they_are():
    encoder = make_encoder("impala_debug", spec(8, 8, 3))
    batch = pictures(4, 8, 8, 3)
    numbers = batch.float()
    assert torch.equal(encoder(batch), encoder(numbers))
    assert torch.equal(numbers, batch.float()), "the caller's pictures are not scaled in place"


def test_layout_in_memory_changes_nothing():
    encoder = make_encoder("impala_debug", spec(8, 8, 3))
    batch = pictures(4, 3, 8, 8).permute(0, 2, 3, 1)
    assert not batch.is_contiguous()
    torch.testing.assert_close(encoder(batch), encoder(batch.contiguous()))


def test_several_networks_are_evaluated_by_vmap():
    encoders = [make_encoder("impala_debug", spec(7, 8, 3)) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(encoders)
    batch = pictures(3, 2, 7, 8, 3)

    def one(params, batch):
        return torch.func.functional_call(encoders[0], (params, buffers), (batch,))

    expected = torch.stack([encoder(row) for encoder, row in zip(encoders, batch, strict=True)])
    torch.testing.assert_close(torch.vmap(one)(params, batch), expected, rtol=1e-5, atol=1e-6)


def test_several_cameras_and_a_vector_are_encoded_by_key_and_concatenated():
    cameras = Composite(
        front=spec(8, 8, 3), arm=Composite(wrist=spec(6, 10, 1), joints=Unbounded((7,))), goal=Unbounded((2,))
    )
    encoder = make_encoder("impala_debug", cameras)
    assert encoder.out_features == 512 + 512 + 7 + 2
    inputs = {
        "front": pictures(4, 8, 8, 3),
        ("arm", "wrist"): pictures(4, 6, 10, 1),
        ("arm", "joints"): torch.randn(4, 7),
        "goal": torch.randn(4, 2),
    }
    keys = list(cameras.keys(True, True))
    out = encoder(*(inputs[key] for key in keys))
    parts = [
        module(inputs[key]) if isinstance(module, ImpalaEncoder) else inputs[key]
        for key, module in zip(keys, encoder.encoders, strict=True)
    ]
    assert torch.equal(out, torch.cat(parts, -1))
    assert out.shape == (4, encoder.out_features)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_encoder("impala_tiny", spec(8, 8, 3)), "unknown encoder 'impala_tiny'; there are impala_small"),
        (lambda: make_encoder("impala", Unbounded((4,))), "none of the observations"),
        (lambda: make_encoder("impala", Composite(a=spec(2, 2))), r"observation 'a' has shape \[2, 2\]"),
        (lambda: make_encoder("impala", spec(9, 64, 64)), r"\[9, 64, 64\], which is channels first.*\[64, 64, 9\]"),
        (lambda: make_encoder("impala", spec(3, 48, 64)), r"\[3, 48, 64\], which is channels first.*\[48, 64, 3\]"),
        (lambda: ImpalaEncoder(3, stack_sizes=()), "positive sizes, a stack and a linear layer"),
        (lambda: ImpalaEncoder(3, image_size=0), "positive sizes"),
        (
            lambda: ImpalaEncoder(3, image_size=8)(pictures(2, 3, 8, 8)),
            r"\[..., 8, 8, 3\], channels last, are needed, got \[2, 3, 8, 8\]: channels first",
        ),
        (lambda: ImpalaEncoder(3, image_size=8)(pictures(2, 8, 9, 3)), r"got \[2, 8, 9, 3\]$"),
    ],
)
def test_bad_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pictures_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"uint8, or torch.float32 from 0 to 255, got torch.int64"):
        ImpalaEncoder(3, image_size=8)(pictures(2, 8, 8, 3).long())
