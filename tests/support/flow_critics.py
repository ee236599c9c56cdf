"""Losses with flow critics on small networks, batches with their draws, and floq in plain torch, loop by loop."""

import itertools
import math

import torch
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import FlowCritic, FlowCriticEnsemble, make_flow_critic_network
from deflow_torchrl.objectives import DeFlowLoss, FQLLoss, TDCriticLoss
from tests.support import networks
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM

GAMMA, RANGE = 0.875, (-2.0, 0.5)  # gamma is the same number in every precision


def make_flow_critics(number=2, *, sizes=(OBSERVATION_DIM, ACTION_DIM, HIDDEN), **options):
    options = {"reward_range": RANGE, "gamma": GAMMA, "num_steps": 4, **options}
    features = options.get("time_features")
    return [FlowCritic(make_flow_critic_network(*sizes, time_features=features), **options) for _ in range(number)]


def make_ensemble(*, noise_samples=3, number=2, distilled=2, deactivate_vmap=False, **options):
    flow_critics, critics = make_flow_critics(number, **options), networks.make_critics()[:distilled]
    return FlowCriticEnsemble(flow_critics, critics, noise_samples=noise_samples, deactivate_vmap=deactivate_vmap)


def build(kind, *, ensemble=None, gamma=GAMMA, tau=0.005, **options):
    """A loss with flow critics, its targets apart from them, and what moves those."""
    ensemble = make_ensemble() if ensemble is None else ensemble
    if kind is FQLLoss:
        loss = FQLLoss(networks.make_flow(3), networks.make_one_step(), ensemble, **options)
    else:
        loss = kind(networks.make_actor(), ensemble, **options)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
    updater = SoftUpdate(loss, tau=tau)
    with torch.no_grad():
        for value in loss.target_flow_critic_network_params.values(True, True):
            value.add_(0.1 * torch.randn_like(value))
    return loss, updater


KINDS = [DeFlowLoss, FQLLoss, TDCriticLoss]


def make_batch(size=6, samples=3, *, action_dim=ACTION_DIM, draws=True):
    batch = networks.make_batch(size, noise=draws, action_dim=action_dim)
    if draws:
        batch["next", "noise"] = torch.randn(size, samples, action_dim)
        batch["next", "critic_noise"] = torch.rand(size, samples, 1)
        batch["critic_noise"] = torch.rand(size, samples, 1)
        batch["critic_time"] = torch.rand(size, samples, 1)
    return batch


def doubled(batch):
    return batch.apply(lambda entry: entry.double() if entry.is_floating_point() else entry)


# -- floq in plain torch ----------------------------------------------------------------------------------------------


def mlp(layers, x, *, norm):
    """``layers``: {"0": {"weight", "bias"}, ...} in order, GELU behind every Linear but the last, then a LayerNorm or none."""
    numbers = sorted(map(int, layers.keys()))
    for number in numbers:
        weight, bias = layers[str(number)]["weight"], layers[str(number)]["bias"]
        if weight.ndim == 1:
            mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
            x = (x - mean) / (variance + 1e-6).sqrt() * weight + bias
            continue
        x = x @ weight.T + bias
        if number != numbers[-1]:
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert any(layers[str(number)]["weight"].ndim == 1 for number in numbers) == norm
    return x


def embed(z, *, low, high, bins=51, sigma=16.0, offset=0.01, gamma=GAMMA):
    """The probabilities of one number's bins, by erf."""
    q_min, q_max = (low - offset) / (1 - gamma), (high + offset) / (1 - gamma)
    width = (q_max - q_min) / (bins - 1)
    edges = [torch.erf((q_min + k * width - z) / (math.sqrt(2) * sigma * width)) for k in range(bins)]
    return torch.stack([(after - before) / (edges[-1] - edges[0]) for before, after in itertools.pairwise(edges)])


def velocity(layers, s, a, z, t, **settings):
    """v of one state, action, return and time."""
    low, high = RANGE
    features = torch.cat([s, a, embed(z, low=low, high=high, **settings), t.cos().reshape(1)])
    return mlp(layers, features, norm=True)[0]


def integrate(layers, s, a, u, *, steps, coverage=0.1):
    low, high = (coverage * reward / (1 - GAMMA) for reward in RANGE)
    z = (1 - u) * low + u * high
    for i in range(steps):
        z = z + velocity(layers, s, a, z, torch.tensor(i / steps, dtype=z.dtype)) / steps
    return z


def member(params, number, *path):
    """Layers of one of several stacked networks."""
    return {name: {kind: value[number] for kind, value in layer.items()} for name, layer in params[path].items()}


def plain_terms(loss, batch, act, *, steps=4, how="mean", coverage=0.1):
    """(loss_flow_critic, loss_qvalue) by loops over transitions, samples and critics; ``act(s', z)`` gives a'."""
    low, high = (coverage * reward / (1 - GAMMA) for reward in RANGE)
    path = ("module", "velocity_network")
    online = [
        member(loss.flow_critic_network_params, e, *path) for e in range(loss.flow_critic_network_params.batch_size[0])
    ]
    target = [member(loss.target_flow_critic_network_params, e, *path) for e in range(len(online))]
    distilled = [
        member(loss.qvalue_network_params, k, "module", "mlp") for k in range(loss.qvalue_network_params.batch_size[0])
    ]
    flow_losses, distillations = [], []
    samples = batch["critic_noise"].shape[1]
    for i in range(len(batch)):
        s, a = batch["observation"][i], batch["action"][i]
        with torch.no_grad():
            backups, returns = [], []
            for j in range(samples):
                following = batch["next", "observation"][i]
                action = act(following, batch["next", "noise"][i, j])
                ends = torch.stack(
                    [
                        integrate(layers, following, action, batch["next", "critic_noise"][i, j, 0], steps=steps)
                        for layers in target
                    ]
                )
                end = {"mean": ends.mean(), "min": ends.min()}[how]
                alive = 0.0 if batch["next", "terminated"][i, 0] else 1.0
                backups.append(
                    batch["next", "reward"][i, 0] + GAMMA * alive * end if alive else batch["next", "reward"][i, 0]
                )
                returns += [integrate(layers, s, a, batch["critic_noise"][i, j, 0], steps=steps) for layers in online]
            y, mean_return = torch.stack(backups).mean(), torch.stack(returns).mean()
        for layers in online:
            total = 0.0
            for j in range(samples):
                u, t = batch["critic_noise"][i, j, 0], batch["critic_time"][i, j, 0]
                start = (1 - u) * low + u * high
                v = velocity(layers, s, a, (1 - t) * start + t * y, t)
                total = total + (v - (y - start)) ** 2
            flow_losses.append(total)
        for layers in distilled:
            distillations.append((mlp(layers, torch.cat([s, a]), norm=True)[0] - mean_return) ** 2)
    return torch.stack(flow_losses).mean(), torch.stack(distillations).mean()
