"""The CPU kernels against the layers they stand for."""

import copy
import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
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


def test_ensemble_of_critics(calls):
    critics = make_qvalue_networks(4, 3, WIDTHS)
    stacked = TensorDict.from_modules(*critics)["module"].data
    observation, action = torch.randn(2, 5, 4), torch.randn(2, 5, 3, requires_grad=True)
    values = critics[0].module.ensemble(observation, action, stacked)
    plain = torch.stack([critic.module(observation, action) for critic in critics])
    assert_same([values, *gradients(values, action)], [plain, *gradients(plain, action)])
    with kernels.use_kernels(False):
        assert critics[0].module.ensemble(observation, action, stacked) is None


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


def test_second_derivatives_are_refused_not_wrong(network):
    x = torch.randn(5, 7, requires_grad=True)
    (first,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with kernels.use_kernels(False):
        (first,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        first.sum().backward()


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
