"""The CPU kernels against the layers they stand for."""

import copy
import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import (
    DeFlowActor,
    FlowMatchingPolicy,
    RefinementPolicy,
    kernels,
    make_qvalue_networks,
    make_refinement_network,
    make_velocity_network,
)
from deflow_torchrl.modules.flow import FlowMatchingModel
from deflow_torchrl.modules.networks import StateActionValue, make_mlp
from deflow_torchrl.objectives import DeFlowLoss

WIDTHS = (16, 24, 8)


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=[False, True], ids=["actor", "critic"])
def network(request):
    network = make_mlp(7, 3, WIDTHS, layer_norm=request.param)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.fixture
def calls(monkeypatch):
    """Names of the kernels that were called."""
    called = []
    for name in ("mlp", "sample_flow"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, _kernel=kernel, _name=name, **k: called.append(_name) or _kernel(*a, **k)
        )
    return called


def both(compute):
    """What ``compute`` gives with the kernels and with the layers."""
    with kernels.use_kernels(True):
        fast = compute()
    with kernels.use_kernels(False):
        return fast, compute()


def assert_same(fast, plain):
    assert len(fast) == len(plain)
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def copies_of(network, *shape):
    """Parameters of differing networks of this kind, stacked."""
    return {
        name: (parameter.detach() + 0.1 * torch.randn(*shape, *parameter.shape)).requires_grad_()
        for name, parameter in network.named_parameters()
    }


def gradients(out, *inputs):
    weights = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
    return torch.autograd.grad((out * weights + out.square()).sum(), inputs)


@pytest.mark.parametrize("shape", [(5,), (2, 5), ()], ids=str)
def test_values_and_gradients_are_those_of_the_layers(network, shape, calls):
    x = torch.randn(*shape, 7, requires_grad=True)

    def compute():
        with torch.no_grad():
            silent = network(x)
        out = network(x)
        return [silent, out, *gradients(out, x, *network.parameters())]

    assert_same(*both(compute))
    assert calls == ["mlp", "mlp"]


def test_gelu_is_the_same_far_from_zero():
    network = make_mlp(1, 1, (1,), layer_norm=False)
    x = torch.tensor([-1e30, -40.0, -6.0, 0.0, 6.0, 40.0, 1e30])[:, None].requires_grad_()
    assert_same(*both(lambda: [network(x), *gradients(network(x).clamp(-50, 50), x)]))
    network, x = network.float(), torch.tensor([[-1e18], [-1e13], [1e13], [1e18]], dtype=torch.float32).requires_grad_()
    assert_same(*both(lambda: [network(x), *torch.autograd.grad(network(x).sum(), x)]))


def test_only_asked_gradients_are_computed(network):
    x = torch.randn(5, 7, requires_grad=True)
    network[0].weight.requires_grad_(False)
    network[-1].bias.requires_grad_(False)
    asked = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
    assert_same(*both(lambda: gradients(network(x), *asked)))
    network(x).sum().backward()
    assert network[0].weight.grad is None
    frozen = copy.deepcopy(network).requires_grad_(False)
    assert_same(*both(lambda: gradients(frozen(x), x)))
    only_weights = x.detach()
    assert_same(*both(lambda: gradients(network(only_weights), *asked[1:])))


def test_gradients_have_the_parameters_layout(network):
    network(torch.randn(5, 7)).sum().backward()
    for parameter in network.parameters():
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("shared_input", [False, True])
def test_vmap_over_parameters(network, shared_input):
    params = copies_of(network, 4)
    x = torch.randn(*(() if shared_input else (4,)), 5, 7, requires_grad=True)
    call = torch.vmap(lambda params, x: functional_call(network, params, (x,)), (0, None if shared_input else 0))

    def compute():
        out = call(params, x)
        return [out, *gradients(out, x, *params.values())]

    assert_same(*both(compute))


def test_vmap_over_inputs(network):
    x = torch.randn(4, 5, 7, requires_grad=True)

    def compute():
        out = torch.vmap(network, 1)(x)
        return [out, *gradients(out, x, *network.parameters())]

    assert_same(*both(compute))


def test_vmap_over_some_of_the_parameters(network):
    x = torch.randn(5, 7)
    params = {name: p.detach() for name, p in network.named_parameters()}
    biases = torch.randn(4, WIDTHS[0], requires_grad=True)

    def compute():
        out = torch.vmap(lambda bias: functional_call(network, params | {"0.bias": bias}, (x,)))(biases)
        return [out, *gradients(out, biases)]

    assert_same(*both(compute))


def test_vmap_in_vmap(network):
    """Stacked seeds of an ensemble of critics."""
    params = copies_of(network, 3, 4)
    x = torch.randn(3, 5, 7, requires_grad=True)
    ensemble = torch.vmap(lambda params, x: functional_call(network, params, (x,)), (0, None))

    def compute():
        out = torch.vmap(ensemble)(params, x)
        return [out, *gradients(out, x, *params.values())]

    assert_same(*both(compute))


def test_gradients_by_torch_func(network):
    x = torch.randn(5, 7)
    assert_same(*both(lambda: [torch.func.grad(lambda x: network(x).square().sum())(x)]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("seeds", [(), (3,)], ids=str)
def test_an_ensemble_of_critics_is_one_call_of_the_kernel(calls, seeds, frozen):
    critics = make_qvalue_networks(4, 3, WIDTHS)
    stacked = TensorDict.from_modules(*critics)
    stacked = stacked.expand(*seeds, *stacked.shape).clone().apply(lambda p: p.detach().requires_grad_(not frozen))
    td = TensorDict(observation=torch.randn(*seeds, 2, 5, 4), action=torch.randn(*seeds, 2, 5, 3).requires_grad_())

    def values(td, params):
        with params.to_module(critics[0], preserve_module_state=False):
            return critics[0](td.copy())["state_action_value"]

    ensemble = torch.vmap(values, (None, 0))
    for _ in seeds:
        ensemble = torch.vmap(ensemble)

    def compute():
        out = ensemble(td, stacked)
        return [out, *gradients(out, td["action"], *(() if frozen else stacked.values(True, True)))]

    computed = []
    with pytest.MonkeyPatch.context() as patch:
        product = torch.Tensor.__matmul__
        patch.setattr(torch.Tensor, "__matmul__", lambda *pair: computed.append(1) or product(*pair))
        fast = compute()
    with kernels.use_kernels(False):
        assert_same(fast, compute())
    assert calls == ["mlp"]
    # One product a layer for the gradient below it (of the output none: it has one column), one for each weight that trains.
    assert len(computed) == len(WIDTHS) + (0 if frozen else len(WIDTHS) + 1)


@pytest.mark.parametrize("widths", [WIDTHS, (16,)], ids=str)
def test_sampler(widths, calls):
    model = FlowMatchingModel(make_velocity_network(4, 3, widths), 3, 5, low=-0.5, high=9.0)
    observation, noise = torch.randn(2, 6, 4), torch.randn(2, 6, 3)
    params = copies_of(model, 4)

    def compute():
        with torch.no_grad():
            return [
                model(observation, noise),
                model(observation[0, 0], noise[0, 0]),
                torch.vmap(lambda params: functional_call(model, params, (observation, noise)))(params),
                torch.vmap(model, 1)(observation, noise),
            ]

    fast, plain = both(compute)
    assert_same(fast, [plain[0], plain[1], *plain[2:]])
    assert calls.count("sample_flow") == 4
    assert (fast[0] == -0.5).any()


def test_the_sampler_with_gradient_goes_through_the_network(calls):
    model = FlowMatchingModel(make_velocity_network(4, 3, WIDTHS), 3, 5)
    noise = torch.randn(6, 3, requires_grad=True)
    assert_same(*both(lambda: gradients(model(torch.randn(6, 4).fill_(0.3), noise), noise)))
    assert "sample_flow" not in calls


def test_changed_layers_are_called(network, calls):
    x = torch.randn(5, 7)
    seen = []
    handle = network[1].register_forward_hook(lambda *_: seen.append(1))
    network(x)
    handle.remove()
    assert seen == [1]
    network[1] = nn.ReLU()
    torch.testing.assert_close(network(x), nn.Sequential(*network)(x))
    assert calls == []


def test_compiled_and_half_precision_calls_go_through_the_layers(network, calls):
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert_same([compiled(torch.ones(5, 7))], [network(torch.ones(5, 7))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(torch.ones(5, 7))
    network.to(torch.bfloat16)(torch.ones(5, 7, dtype=torch.bfloat16))
    assert calls == ["mlp"]


def parameters_of(network):
    return list(network.parameters())


def loss_of(network, x):
    out = network(x)
    return (out * torch.linspace(-1, 2, out.numel()).reshape(out.shape) + out.square()).sum()


def grads(loss, network, x, **options):
    inputs = [tensor for tensor in (x, *parameters_of(network)) if tensor.requires_grad]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, **options)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


def gradient_penalty(network, x):
    (first,) = torch.autograd.grad(loss_of(network, x), x, create_graph=True)
    return [first, *grads(network(x).mean() + 10 * first.square().sum(), network, x)]


def third_derivatives(network, x):
    loss = loss_of(network, x)
    for _ in range(2):
        loss = sum(gradient.square().sum() for gradient in grads(loss, network, x, create_graph=True))
    return grads(loss, network, x)


def meta_gradient(network, x):
    """Through one step of gradient descent on all parameters, as MAML does."""
    names = [name for name, _ in network.named_parameters()]
    steps = torch.autograd.grad(loss_of(network, x), parameters_of(network), create_graph=True)
    moved = {name: p - 0.1 * g for name, p, g in zip(names, parameters_of(network), steps, strict=True)}
    return grads(functional_call(network, moved, (x,)).square().sum(), network, x)


def penalty_of_a_stack(network, x):
    params = copies_of(network, 2)
    torch.manual_seed(5)
    params = {name: p + 0 for name, p in params.items()}
    out = torch.vmap(lambda params: functional_call(network, params, (x,)))(params)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), [x, *params.values()])


def dual_numbers(network, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with torch.no_grad():
            silent = forward_ad.unpack_dual(network(dual.detach()))
        return [*forward_ad.unpack_dual(network(dual)), silent.primal, silent.tangent]


def dual_parameter(network, x):
    weight = network[0].weight
    with forward_ad.dual_level():
        dual = {"0.weight": forward_ad.make_dual(weight.detach(), torch.ones_like(weight))}
        return [forward_ad.unpack_dual(functional_call(network, dual, (x,))).tangent]


def of_parameters(transform):
    def usage(network, x):
        params = {name: p.detach() for name, p in network.named_parameters()}
        return list(transform(lambda params: functional_call(network, params, (x,)).square().sum())(params).values())

    return usage


def per_sample_gradients(network, x):
    params = {name: p.detach() for name, p in network.named_parameters()}
    call = lambda params, row: functional_call(network, params, (row,)).square().sum()  # noqa: E731
    return list(torch.vmap(torch.func.grad(call), (None, 0))(params, x.detach()).values())


def beside_vmap(network, x):
    """Inside vmap, which batches nothing that the network reads."""
    out = torch.vmap(lambda scale: network(x) * scale)(torch.tensor([1.0, 2.0]))
    return grads(out.square().sum(), network, x)


def batched_gradients(network, x):
    out = network(x)
    rows = torch.eye(out.numel()).reshape(-1, *out.shape)
    return torch.autograd.grad(out, [x, *parameters_of(network)], rows, is_grads_batched=True)


def functional(derivative, **options):
    return lambda network, x: [derivative(lambda x: network(x).square().sum(), x.detach(), **options)]


def seen(register):
    """Values, gradients and what a hook saw."""

    def usage(network, x):
        calls = []
        handles = register(network, calls)
        try:
            result = grads(loss_of(network, x), network, x)
        finally:
            for handle in handles:
                handle.remove()
        assert calls
        return [*result, *calls]

    return usage


def note(calls):
    def hook(module, *tensors):
        calls.extend(t[0].detach().clone() if isinstance(t, tuple) else t.detach().clone() for t in tensors)

    return hook


def forward_hook_that_changes_the_output(network, x):
    layer = network[1]
    handle = layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    result = grads(loss_of(network, x), network, x)
    handle.remove()
    return result


def wrapped_instance(part):
    """What accelerate and libraries that offload weights do."""

    def usage(network, x):
        module = network if part is None else network[part]
        inner = module.forward
        module.forward = lambda *inputs: 2 * inner(*inputs)
        result = [network(x).detach(), *grads(loss_of(network, x), network, x)]
        del module.forward
        return result

    return usage


def replaced(owner, name, function):
    def usage(network, x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, function)
            return [network(x).detach(), *grads(loss_of(network, x), network, x)]

    return usage


def changed(change):
    """On a copy whose layers were changed."""

    def usage(network, x):
        torch.manual_seed(3)
        network = copy.deepcopy(network)
        network = change(network) or network
        return [network(x).detach(), *grads(loss_of(network, x), network, x)]

    return usage


def lora(network):
    weight = network[0].weight

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(weight.shape[0], 2)), nn.Parameter(torch.ones(2, 7))

        def forward(self, weight):
            return weight + self.left @ self.right

    parametrize.register_parametrization(network[0], "weight", Adapter())


def checkpointed(use_reentrant):
    def usage(network, x):
        out = checkpoint(network, x * 1, use_reentrant=use_reentrant)
        return (
            [out.detach(), *grads(out.square().sum(), network, x)] if not use_reentrant else by_backward(out, network)
        )

    return usage


def by_backward(out, network):
    network.zero_grad()
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in network.parameters())]


def hooked_storage(network, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(1) or t.float(), lambda t: t.double()):
        loss = loss_of(network, x)
    return [torch.tensor(len(kept)), *grads(loss, network, x)]


def in_dtype(dtype, x_dtype=None):
    def usage(network, x):
        network = copy.deepcopy(network).to(dtype)
        return grads(loss_of(network, x.to(x_dtype or dtype)), network, x)

    return usage


def autocast(network, x):
    network = copy.deepcopy(network).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x.float())
    return [out.detach(), *grads(out.float().square().sum(), network, x)]


def on(make):
    return lambda network, x: [network(make(x)).detach(), *grads(loss_of(network, make(x)), network, x)]


def partly_frozen(network, x):
    for number, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(number % 3 == 1)
    return grads(loss_of(network, x), network, x) + grads(loss_of(network, x.detach()), network, x)


def used_twice(network, x):
    out = network(network(x) @ torch.ones(3, 7) + x)
    first = grads(out.square().sum(), network, x, retain_graph=True)
    return [*first, *grads(out.sum(), network, x)]


def shared_layers(network, x):
    """One layer in two places."""
    kinds = 3 if network.layer_norm else 2
    square = make_mlp(7, 3, (7, 7), layer_norm=network.layer_norm)
    square[kinds] = square[0]
    return grads(loss_of(square, x), square, x) + gradient_penalty(square, x)


def changed_beside_the_graph(network, x):
    """Biases, and the first weight where the input has no gradient, are not needed by the gradient."""
    network = copy.deepcopy(network)
    loss = loss_of(network, x.detach())
    with torch.no_grad():
        network[0].weight.add_(1)
        for layer in network:
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
    return grads(loss, network, x)


def output_changed_in_place(network, x):
    out = network(x)
    out.mul_(2).clamp_(-1, 1)
    return [out.detach(), *grads(out.square().sum(), network, x)]


def traced(network, x):
    graph = torch.jit.trace(network, (x.detach(),))
    return [graph(x).detach(), *grads(loss_of(graph, x), network, x)]


def exported(strict):
    def usage(network, x):
        program = torch.export.export(network, (x.detach(),), strict=strict)
        return [program.module()(x.detach())]

    return usage


def compiled_layer(network, x):
    network = copy.deepcopy(network)
    network[0].compile(backend="eager")
    return grads(loss_of(network, x), network, x)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is torch.nn.functional.gelu else out


class Counted(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is torch.ops.aten.gelu.default else out


class Logged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 3 * out if function is torch.nn.functional.gelu else out


def under(make):
    def usage(network, x):
        with make():
            return [network(x).detach(), *grads(loss_of(network, x), network, x)]

    return usage


def from_inference_mode(network, x):
    with torch.inference_mode():
        rows = torch.ones(5, 7)
        inside = network(rows).clone()
    frozen = copy.deepcopy(network).requires_grad_(False)
    return [inside * 1, frozen(rows) * 1, *grads(loss_of(network, rows.clone()), network, x)]


USAGES = {
    "gradient penalty": gradient_penalty,
    "third derivatives": third_derivatives,
    "meta gradient": meta_gradient,
    "penalty of a stack": penalty_of_a_stack,
    "functional.hessian": functional(torch.autograd.functional.hessian),
    "functional.hessian, vectorized": functional(torch.autograd.functional.hessian, vectorize=True),
    "functional.hvp": functional(torch.autograd.functional.hvp, v=torch.ones(5, 7, dtype=torch.float64)),
    "batched gradients": batched_gradients,
    "dual numbers": dual_numbers,
    "dual parameter": dual_parameter,
    "func.jvp": lambda network, x: torch.func.jvp(network, (x,), (torch.ones_like(x),)),
    "func.jacrev": lambda network, x: [torch.func.jacrev(network)(x)],
    "func.jacfwd": lambda network, x: [torch.func.jacfwd(network)(x)],
    "func.hessian": lambda network, x: [torch.func.hessian(lambda row: network(row).square().sum())(x[0].detach())],
    "func.linearize": lambda network, x: [torch.func.linearize(network, x)[1](torch.ones_like(x))],
    "func.functionalize": lambda network, x: [torch.func.functionalize(network)(x)],
    "func.grad of parameters": of_parameters(torch.func.grad),
    "per-sample gradients": per_sample_gradients,
    "beside vmap": beside_vmap,
    "forward hook": seen(lambda n, calls: [n.register_forward_hook(note(calls))]),
    "forward hook of a layer": seen(lambda n, calls: [n[1].register_forward_hook(note(calls))]),
    "forward pre-hook of a layer": seen(lambda n, calls: [n[0].register_forward_pre_hook(note(calls))]),
    "full backward hook": seen(lambda n, calls: [n.register_full_backward_hook(note(calls))]),
    "full backward hook of a layer": seen(lambda n, calls: [n[2].register_full_backward_hook(note(calls))]),
    "full backward pre-hook of a layer": seen(lambda n, calls: [n[2].register_full_backward_pre_hook(note(calls))]),
    "global forward hook": seen(lambda n, calls: [register_module_forward_hook(note(calls))]),
    "global forward pre-hook": seen(lambda n, calls: [register_module_forward_pre_hook(note(calls))]),
    "global backward hook": seen(lambda n, calls: [register_module_full_backward_hook(note(calls))]),
    "hook of a parameter": seen(lambda n, calls: [n[0].weight.register_hook(lambda g: note(calls)(n, g))]),
    "hook that changes the output": forward_hook_that_changes_the_output,
    "replaced forward": wrapped_instance(None),
    "replaced forward of a layer": wrapped_instance(0),
    "replaced forward of an activation": wrapped_instance(1),
    "replaced Linear.forward": replaced(nn.Linear, "forward", lambda self, x: 2 * (x @ self.weight.mT)),
    "replaced GELU.forward": replaced(nn.GELU, "forward", lambda self, x: x.relu()),
    "replaced F.linear": replaced(torch.nn.functional, "linear", lambda x, w, b: x @ w.mT - b),
    "replaced F.gelu": replaced(torch.nn.functional, "gelu", lambda x, approximate: x.tanh()),
    "replaced layer": changed(lambda n: n.__setitem__(1, nn.ReLU())),
    "parametrized weight_norm": changed(lambda n: nn.utils.parametrizations.weight_norm(n[2]) and None),
    "parametrized spectral_norm": changed(lambda n: nn.utils.parametrizations.spectral_norm(n[2]).eval() and None),
    "old spectral_norm": changed(lambda n: nn.utils.spectral_norm(n[2]).eval() and None),
    "pruned layer": changed(lambda n: prune.random_unstructured(n[2], "weight", 0.5) and None),
    "LoRA": changed(lora),
    "no bias": changed(lambda n: setattr(n[0], "bias", None)),
    "another layer appended": changed(lambda n: n.append(nn.Tanh()) and None),
    "checkpoint": checkpointed(use_reentrant=False),
    "reentrant checkpoint": checkpointed(use_reentrant=True),
    "saved-tensor hooks": hooked_storage,
    "save_on_cpu": under(torch.autograd.graph.save_on_cpu),
    "anomaly detection": under(lambda: torch.autograd.detect_anomaly(check_nan=True)),
    "autocast": autocast,
    "bfloat16": in_dtype(torch.bfloat16),
    "float16": in_dtype(torch.float16),
    "non-contiguous rows": on(lambda x: torch.cat([x, x], -1)[:, ::2]),
    "transposed": on(lambda x: (x.mT @ torch.ones(5, 5)).mT),
    "expanded": on(lambda x: x[:1].expand(4, 7)),
    "sparse": on(lambda x: x.to_sparse()),
    "no rows": on(lambda x: x[:0]),
    "no rows of two dimensions": on(lambda x: x[:0].reshape(0, 2, 7)),
    "four dimensions": on(lambda x: x.reshape(5, 1, 1, 7)),
    "one row": on(lambda x: x[0]),
    "nested tensors": lambda network, x: [
        part.detach() for part in network(torch.nested.nested_tensor([x[:2].detach(), x[2:].detach()])).unbind()
    ],
    "partly frozen": partly_frozen,
    "used twice": used_twice,
    "shared layers": shared_layers,
    "changed beside the graph": changed_beside_the_graph,
    "output changed in place": output_changed_in_place,
    "jit.trace": traced,
    "jit.script": lambda network, x: grads(loss_of(torch.jit.script(network), x), network, x),
    "export": exported(strict=True),
    "non-strict export": exported(strict=False),
    "make_fx": lambda network, x: [make_fx(network)(x.detach())(x)],
    "compiled layer": compiled_layer,
    "torch function mode": under(Doubled),
    "torch dispatch mode": under(Counted),
    "default device": under(lambda: torch.device("cpu")),
    "tensor subclass": lambda network, x: [network(x.detach().as_subclass(Logged)).as_subclass(torch.Tensor)],
    "subclass of a parameter": changed(
        lambda n: setattr(n[0], "weight", nn.Parameter(n[0].weight.detach().as_subclass(Logged)))
    ),
    "inference mode": from_inference_mode,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("usage", USAGES)
def test_every_usage_gives_the_numbers_of_the_layers(usage, network):
    x = torch.randn(5, 7, requires_grad=True)
    trained = [parameter.requires_grad for parameter in network.parameters()]

    def compute():
        torch.manual_seed(1)
        for parameter, train in zip(network.parameters(), trained, strict=True):
            parameter.requires_grad_(train)
        return USAGES[usage](network, x)

    assert_same(*both(compute))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("part", [0, -1])
def test_a_weight_changed_between_call_and_gradient_is_refused(network, part, create_graph):
    x = torch.randn(5, 7, requires_grad=True)
    for kernel in (True, False):
        with kernels.use_kernels(kernel):
            loss = loss_of(network, x)
            with torch.no_grad():
                network[part].weight.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                grads(loss, network, x, create_graph=create_graph)


def test_a_freed_graph_is_refused(network):
    x = torch.randn(5, 7, requires_grad=True)
    loss = loss_of(network, x)
    grads(loss, network, x)
    for create_graph in (False, True):
        with pytest.raises(RuntimeError, match="second time"):
            grads(loss, network, x, create_graph=create_graph)


@pytest.mark.filterwarnings("ignore")
def test_numerical_derivatives_agree(network):
    x = torch.randn(2, 7, requires_grad=True)
    options = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(network, (x,), check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(network, (x,), **options)


@pytest.mark.parametrize("x", [torch.ones(5, 6), torch.ones(5, 7).float(), torch.ones(()), torch.ones(5, 7).to("meta")])
def test_inputs_that_do_not_fit_give_the_error_of_the_layers(network, x):
    with kernels.use_kernels(False), pytest.raises(RuntimeError) as plain:
        network(x)
    with pytest.raises(RuntimeError) as error:
        network(x)
    assert str(error.value) == str(plain.value)


def test_processes_that_a_run_starts_compute_as_it_does(network, calls):
    script = "from deflow_torchrl.modules import kernels; import torch; print(kernels.usable(torch.ones(2)))"
    for enabled in (False, True):
        with kernels.use_kernels(enabled):
            out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
            network(torch.ones(5, 7))
        assert out == f"{enabled}\n"
    assert calls == ["mlp"]


def test_a_call_in_inference_mode_spoils_nothing(network):
    with torch.inference_mode():
        network(torch.randn(5, 7))
    network(torch.randn(5, 7)).sum().backward()
    assert network[0].weight.grad is not None


def make_update(dtype):
    torch.manual_seed(0)
    flow = FlowMatchingPolicy(make_velocity_network(5, 3, WIDTHS), 3, 4, out_keys=("base_action",))
    actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(5, 3, WIDTHS), 3, low=-1.0, high=1.0))
    loss = DeFlowLoss(actor, make_qvalue_networks(5, 3, WIDTHS)).to(dtype)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    return loss, SoftUpdate(loss, tau=0.005), torch.optim.Adam(loss.parameters(), lr=3e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=str)
def test_twenty_updates_are_those_of_the_layers(dtype, tolerance, calls):
    def train():
        loss, updater, optimizer = make_update(dtype)
        torch.manual_seed(1)
        rows = []
        for _ in range(20):
            flags = {name: torch.rand(16, 1) < 0.1 for name in ("terminated", "done")}
            following = {
                "observation": torch.randn(16, 5, dtype=dtype),
                "reward": torch.randn(16, 1, dtype=dtype),
                **flags,
            }
            batch = {
                "observation": torch.randn(16, 5, dtype=dtype),
                "action": torch.rand(16, 3, dtype=dtype),
                "next": following,
            }
            out = loss(TensorDict(batch, batch_size=[16]))
            terms = [value for name, value in out.items() if name.startswith("loss_")]
            rows.append(torch.stack(terms).detach())
            optimizer.zero_grad()
            sum(terms).backward()
            updater.step()
            optimizer.step()
        return torch.stack(rows), {name: value.clone() for name, value in loss.state_dict().items()}

    (losses, weights), (plain_losses, plain_weights) = both(train)
    torch.testing.assert_close(losses, plain_losses, rtol=tolerance, atol=tolerance)
    assert weights.keys() == plain_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, plain_weights[name], rtol=tolerance, atol=tolerance, msg=name)
    assert calls.count("sample_flow") == 20
    assert calls.count("mlp") == 20 * 6


def test_layers_of_other_options_are_called():
    x = torch.randn(5, 4)
    for number, layer in (
        (1, nn.GELU()),
        (2, nn.LayerNorm(16, eps=0.1)),
        (2, nn.LayerNorm(16, elementwise_affine=False)),
    ):
        network = make_mlp(4, 3, (16, 8), layer_norm=True)
        network[number] = layer
        torch.testing.assert_close(network(x), nn.Sequential(*network)(x), rtol=0, atol=0)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_slices_are_called(layer_norm):
    network, x = make_mlp(4, 3, (16,), layer_norm=layer_norm), torch.randn(5, 4)
    for stop in range(1, len(network)):
        torch.testing.assert_close(network[:stop](x), nn.Sequential(*network[:stop])(x), rtol=0, atol=0)


class Scaled(StateActionValue):
    def forward(self, observation, action):
        return 10 * super().forward(observation, action)


@pytest.mark.parametrize("kind", ["subclass", "hook"])
def test_critics_of_another_kind_are_called(kind):
    loss, _, _ = make_update(torch.float64)
    critics = make_qvalue_networks(5, 3, WIDTHS)
    seen = []
    for critic in critics:
        if kind == "subclass":
            critic.module = Scaled(critic.module.mlp)
        else:
            critic.module.register_forward_hook(lambda *_: seen.append(1))
    loss = DeFlowLoss(loss.actor_network, critics)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    flags = {name: torch.zeros(4, 1, dtype=torch.bool) for name in ("terminated", "done")}
    following = {"observation": torch.randn(4, 5), "reward": torch.ones(4, 1), **flags}
    batch = {"observation": torch.randn(4, 5), "action": torch.rand(4, 3), "next": following}
    batch |= {"noise": torch.randn(4, 3), "flow_noise": torch.randn(4, 3), "flow_time": torch.rand(4, 1)}
    batch["next"]["noise"] = torch.randn(4, 3)
    batch = TensorDict(batch, batch_size=[4])
    assert_same(*both(lambda: [loss(batch)["loss_qvalue"]]))
    assert bool(seen) == (kind == "hook")


def test_a_velocity_of_ones_own_is_sampled():
    class Curved(FlowMatchingModel):
        def velocity(self, observation, x, t):
            return super().velocity(observation, x, t.square())

    model = Curved(make_velocity_network(4, 3, WIDTHS), 3, 5)
    observation, noise, seen = torch.randn(6, 4), torch.randn(6, 3), []
    with torch.no_grad():
        assert_same(*both(lambda: [model(observation, noise)]))
        model = FlowMatchingModel(model.velocity_network, 3, 5)
        model.velocity_network.register_forward_hook(lambda *_: seen.append(1))
        model(observation, noise)
    assert len(seen) == 5


def test_inputs_that_do_not_fit_are_treated_as_by_the_layers():
    model = FlowMatchingModel(make_velocity_network(4, 3, WIDTHS), 3, 5)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            model(torch.randn(3, 2, 4), torch.randn(2, 3, 3))
        images = torch.randint(0, 5, (6, 4), dtype=torch.uint8)
        noise = torch.randn(6, 3)
        torch.testing.assert_close(model(images, noise), model(images.double(), noise))


def test_fake_tensors_leave_nothing_behind(network):
    with FakeTensorMode(allow_non_fake_inputs=True):
        network(torch.randn(5, 7))
    assert type(network(torch.randn(5, 7))) is torch.Tensor


def test_a_vector_product_under_vmap(network):
    params = {name: parameter.detach() for name, parameter in network.named_parameters()}
    x = torch.randn(5, 7)

    def product(weight):
        call = lambda x: functional_call(network, params | {"0.weight": weight}, (x,))  # noqa: E731
        return torch.func.vjp(call, x)[1](torch.ones(5, 3))[0]

    weights = torch.randn(4, *network[0].weight.shape)
    assert_same(*both(lambda: [torch.vmap(product)(weights)]))


def test_graphs_are_traced_through_the_layers(network):
    traced = torch.fx.symbolic_trace(network)
    assert_same([traced(torch.ones(5, 7))], [network(torch.ones(5, 7))])
