"""Flows, critics and the tanh-Gaussian in plain torch, one sample at a time, of the parameters in a loss."""

import copy
import math

import pytest
import torch
from torchrl.objectives import SoftUpdate

from tests.support.flow_critics import member, mlp
from tests.support.networks import total


def velocity(params, s, x, t):
    time = torch.tensor([t], dtype=x.dtype)
    return mlp(params["module", "velocity_network"], torch.cat([s, x, time]), norm=False)


def flow(params, s, z, *, steps):
    x = z
    for i in range(steps):
        x = x + velocity(params, s, x, i / steps) / steps
    return x.clamp(-1, 1)


def values(params, *inputs):
    path = ("module", "mlp")
    return torch.stack(
        [mlp(member(params, j, *path), torch.cat(inputs), norm=True)[0] for j in range(params.batch_size[0])]
    )


def frozen(params):
    return params.apply(torch.Tensor.detach)


def tanh_gaussian(params, inputs, e):
    """(tanh u, log p)."""
    mean, log_std = mlp(params["module", "network"], inputs, norm=False).chunk(2)
    log_std = log_std.clamp(-20, 2)
    u = mean + log_std.exp() * e
    slope = 2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))
    return u.tanh(), (-(e**2) / 2 - log_std - math.log(2 * math.pi) / 2 - slope).sum()


def target(batch, i, value, gamma):
    reward = batch["next", "reward"][i, 0]
    return reward if batch["next", "terminated"][i, 0] else reward + gamma * value


def pessimistic(target_values, rho):
    mean = target_values.mean()
    return mean - rho * (target_values - mean).square().mean().sqrt()


def apart(*targets):
    """Move target parameters away from what they follow."""
    with torch.no_grad():
        for params in targets:
            for value in params.values(True, True):
                if value.ndim:  # a policy's bounds stay
                    value.add_(0.1 * torch.randn_like(value))


def assert_updates_are_those_of(plain_terms, loss, batches, *, targets, clip=False, after=lambda loss, out: None):
    """Train a loss and its plain twin, ``plain_terms(loss, batch) -> {name: value}``, on the same batches, and compare."""
    updater = SoftUpdate(loss, tau=0.005)
    by_hand = copy.deepcopy(loss)
    optimizers = [torch.optim.Adam(it.parameters(), lr=1e-3) for it in (loss, by_hand)]
    for batch in batches:
        out, expected = loss(batch.clone()), plain_terms(by_hand, batch)
        assert {name for name in out.keys() if name.startswith("loss_")} == {  # noqa: SIM118
            name for name in expected if name.startswith("loss_")
        }
        for name, value in expected.items():
            assert out[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
            if name.startswith("loss_"):
                one = getattr(loss, f"{name.removeprefix('loss_')}_loss")(batch.clone())[0]
                assert one.item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
        for it, optimizer, terms in zip((loss, by_hand), optimizers, (total(out), total(expected)), strict=True):
            optimizer.zero_grad()
            terms.backward()
            if clip:
                _clip(list(it.parameters()))
        updater.step()
        with torch.no_grad():
            for name in targets:
                old, new = (getattr(by_hand, f"{prefix}{name}_params").values(True, True) for prefix in ("target_", ""))
                for one, other in zip(old, new, strict=True):
                    one.lerp_(other, 0.005)
        for optimizer in optimizers:
            optimizer.step()
        after(loss, out)
        after(by_hand, expected)
    for (name, one), other in zip(loss.state_dict().items(), by_hand.state_dict().values(), strict=True):
        if isinstance(one, torch.Tensor) and one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def _clip(parameters):
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, 1 / norm))


def parts_reached(loss, batch, name):
    """Names of the parts that the gradient of one term reaches."""
    loss.zero_grad()
    loss(batch)[name].backward()
    return {key.split("_params")[0] for key, p in loss.named_parameters() if p.grad is not None and p.grad.any()}
