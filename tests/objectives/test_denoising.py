"""IDQL's, SRPO's and CAC's losses and samplers against their equations, written out in double precision."""

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import ValueEstimators

from deflow_torchrl.modules import (
    ConsistencyNetwork,
    ConsistencyPolicy,
    DeterministicPolicy,
    DiffusionPolicy,
    NoiseNetwork,
    make_policy_network,
    make_qvalue_networks,
    make_value_network,
)
from deflow_torchrl.objectives import ConsistencyACLoss, IDQLLoss, SRPOLoss
from deflow_torchrl.objectives.consistency_ac import number_of_scales

BATCH, OBSERVATION, ACTION, STEPS = 6, 3, 2, 5
GAMMA = 0.875


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def plain_network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def make_batch(**entries):
    terminated = torch.tensor([[True], [False], [False], [True], [False], [False]])
    following = {key[1]: value for key, value in entries.items() if isinstance(key, tuple)}
    return TensorDict(
        observation=torch.randn(BATCH, OBSERVATION), action=torch.rand(BATCH, ACTION) * 2 - 1,
        next=TensorDict(
            observation=torch.randn(BATCH, OBSERVATION), reward=torch.randn(BATCH, 1), terminated=terminated,
            done=terminated, batch_size=[BATCH],
        ).update(following),
        **{key: value for key, value in entries.items() if isinstance(key, str)}, batch_size=[BATCH],
    )  # fmt: skip


def values():
    critics = make_qvalue_networks(OBSERVATION, ACTION, (8,))
    return critics, make_value_network(OBSERVATION, (8,))


def discrete_schedule():
    alphas = [math.exp(-0.1 / STEPS - 9.9 * (2 * i - 1) / (2 * STEPS**2)) for i in range(1, STEPS + 1)]
    return alphas, [math.prod(alphas[: k + 1]) for k in range(STEPS)]


def test_the_schedule_is_the_published_one():
    alphas, bars = discrete_schedule()
    assert alphas == pytest.approx([0.8041, 0.5412, 0.3642, 0.2451, 0.1650], abs=5e-5)
    assert bars == pytest.approx([0.8041, 0.4352, 0.1585, 0.0389, 0.0064], abs=5e-5)
    module = DiffusionPolicy(plain_network(6, 2), ACTION, STEPS).module
    assert module.alphas.tolist() == pytest.approx(alphas, rel=1e-12)
    assert module.alpha_bars.tolist() == pytest.approx(bars, rel=1e-12)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
@pytest.mark.parametrize("clip", ["sample", "denoised"])
def test_a_sample_is_denoised_step_by_step(clip, variance):
    network = plain_network(OBSERVATION + ACTION + 1, ACTION)
    policy = DiffusionPolicy(network, ACTION, STEPS, clip=clip, variance=variance, temperature=0.5)
    observation, noise = torch.randn(BATCH, OBSERVATION), torch.randn(BATCH, STEPS, ACTION)
    alphas, bars = discrete_schedule()
    x = noise[:, 0]
    for number, k in enumerate(reversed(range(STEPS)), start=1):
        before = bars[k - 1] if k else 1.0
        predicted = network(torch.cat([observation, x, torch.full((BATCH, 1), float(k))], -1))
        if clip == "denoised":
            action = ((x - math.sqrt(1 - bars[k]) * predicted) / math.sqrt(bars[k])).clamp(-1, 1)
            x = (math.sqrt(before) * (1 - alphas[k]) * action + math.sqrt(alphas[k]) * (1 - before) * x) / (1 - bars[k])
        else:
            x = (x - (1 - alphas[k]) / math.sqrt(1 - bars[k]) * predicted) / math.sqrt(alphas[k])
        if k:
            spread = 1 - alphas[k] if variance == "beta" else (1 - alphas[k]) * (1 - before) / (1 - bars[k])
            x = x + 0.5 * math.sqrt(spread) * noise[:, number]
        if clip == "sample":
            x = x.clamp(-1, 1)
    torch.testing.assert_close(policy.module(observation, noise), x.clamp(-1, 1))
    drawn = policy(TensorDict(observation=observation, batch_size=[BATCH]))["action"]
    assert drawn.shape == (BATCH, ACTION)
    assert policy.noise_shape == (STEPS, ACTION)


def test_continuous_time_is_never_sampled():
    policy = DiffusionPolicy(plain_network(6, 2), ACTION, schedule="vp")
    with pytest.raises(RuntimeError, match="not sampled"):
        policy.module(torch.randn(1, OBSERVATION))


def test_a_sample_is_taken_without_dropout_and_leaves_the_mode():
    network = NoiseNetwork(OBSERVATION, ACTION, width=8, dropout=0.5)
    policy = DiffusionPolicy(network, ACTION, STEPS)
    observation, noise = torch.randn(BATCH, OBSERVATION), torch.randn(BATCH, STEPS, ACTION)
    assert torch.equal(policy.module(observation, noise), policy.module(observation, noise))
    assert network.training


def test_noise_network_by_hand():
    network = NoiseNetwork(OBSERVATION, ACTION, width=8, num_frequencies=4).eval()
    observation, x, time = torch.randn(5, OBSERVATION), torch.randn(5, ACTION), torch.arange(5.0)[:, None]
    phase = 2 * math.pi * time * network.frequencies
    silu = nn.functional.silu
    embedded = network.time[2](silu(network.time[0](torch.cat([phase.cos(), phase.sin()], -1))))
    hidden = network.first(torch.cat([x, observation, embedded], -1))
    for block in network.blocks:
        normed = nn.functional.layer_norm(hidden, (8,), block[1].weight, block[1].bias, 1e-6)
        hidden = hidden + block[4](silu(block[2](normed)))
    expected = network.last(silu(hidden))
    torch.testing.assert_close(network(torch.cat([observation, x, time], -1)), expected)
    assert network.frequencies.requires_grad
    assert NoiseNetwork(OBSERVATION, ACTION).blocks[0][2].weight.std().item() == pytest.approx(1 / 16, rel=0.02)


def make_idql():
    critics, value = values()
    network = plain_network(OBSERVATION + ACTION + 1, ACTION)
    loss = IDQLLoss(DiffusionPolicy(network, ACTION, STEPS), critics, value, expectile=0.75)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    return loss, network, critics, value


def test_idqls_terms_are_those_of_the_equations():
    loss, network, critics, value = make_idql()
    k, z = torch.randint(STEPS, (BATCH, 1)), torch.randn(BATCH, ACTION)
    batch = make_batch(diffusion_time=k, diffusion_noise=z)
    observation, action, following = batch["observation"], batch["action"], batch["next", "observation"]
    _, bars = discrete_schedule()
    bar = torch.tensor(bars)[k.squeeze(1)][:, None]
    noised = bar.sqrt() * action + (1 - bar).sqrt() * z
    score = ((network(torch.cat([observation, noised, k.double()], -1)) - z) ** 2).sum(-1).mean()
    qs = torch.stack([critic.module(observation, action).squeeze(-1) for critic in critics])
    v, next_v = (value.module(state).squeeze(-1) for state in (observation, following))
    u = qs.min(0).values - v
    weight = torch.where(u < 0, 1 - 0.75, 0.75)
    y = batch["next", "reward"].squeeze(-1) + GAMMA * (1 - batch["next", "terminated"].squeeze(-1).double()) * next_v
    out = loss(batch.clone())
    assert out["loss_score"].item() == pytest.approx(score.item(), rel=1e-12)
    assert out["loss_value"].item() == pytest.approx((weight * u**2).mean().item(), rel=1e-7)
    assert out["loss_qvalue"].item() == pytest.approx(((qs - y) ** 2).sum(0).mean().item(), rel=1e-12)
    for name in ("score", "value", "qvalue"):
        assert getattr(loss, f"{name}_loss")(batch.clone())[0].item() == pytest.approx(out[f"loss_{name}"].item())
    walls = {"loss_score": "diffusion_policy", "loss_value": "value_network", "loss_qvalue": "qvalue_network"}
    for name, part in walls.items():
        loss.zero_grad()
        loss(batch.clone())[name].backward()
        touched = {key.split("_params")[0] for key, p in loss.named_parameters() if p.grad is not None}
        assert touched == {part}
    assert "target_diffusion_policy_params" in dict(loss.named_children())


def test_idqls_draws_are_made_in_the_documented_order():
    loss, *_ = make_idql()
    batch = make_batch()
    torch.manual_seed(3)
    drawn = loss(batch.clone())
    torch.manual_seed(3)
    time = torch.randint_like(batch["action"][:, :1], STEPS).long()
    given = batch.clone().set("diffusion_time", time).set("diffusion_noise", torch.randn(BATCH, ACTION))
    torch.testing.assert_close(loss(given).to_dict(), drawn.to_dict())


@pytest.mark.parametrize("schedule", ["ddpm", "vp"])
@pytest.mark.parametrize("weighting", ["sigma2", "constant", "score"])
@pytest.mark.parametrize("options", [{}, {"normalize_q_gradient": True}, {"subtract_noise": True}])
def test_srpos_actor_gradient_is_that_of_the_equation(schedule, weighting, options):
    critics, value = values()
    network, mean = plain_network(OBSERVATION + ACTION + 1, ACTION), make_policy_network(OBSERVATION, ACTION, (8,))
    policy = DiffusionPolicy(network, ACTION, STEPS, schedule=schedule)
    actor = DeterministicPolicy(mean)
    loss = SRPOLoss(actor, policy, critics, value, beta=0.5, weighting=weighting, **options)
    with torch.no_grad():
        for leaf in loss.target_qvalue_network_params.values(True, True):
            leaf.mul_(1.25)
        for critic in critics:  # lists are copied into the loss: these become the targets
            for parameter in critic.parameters():
                parameter.mul_(1.25)
    t = torch.randint(STEPS, (BATCH, 1)) if schedule == "ddpm" else 0.02 + 0.96 * torch.rand(BATCH, 1)
    z = torch.randn(BATCH, ACTION)
    batch = make_batch(policy_time=t, noise=z)
    observation = batch["observation"]
    if schedule == "ddpm":
        bar = torch.tensor(discrete_schedule()[1])[t.squeeze(1)][:, None]
        signal, sigma = bar.sqrt(), (1 - bar).sqrt()
    else:
        signal = torch.exp(-(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2)
        sigma = (1 - signal**2).sqrt()
    pi = torch.tanh(mean(observation))
    fixed = pi.detach().requires_grad_()
    e = network(torch.cat([observation, signal * fixed + sigma * z, t.double()], -1)).detach()
    q = torch.stack([critic.module(observation, fixed) for critic in critics]).mean(0)
    (g,) = torch.autograd.grad(q.sum(), fixed)
    if options.get("normalize_q_gradient"):
        g = g / (g**2).mean(-1, keepdim=True).sqrt()
    if options.get("subtract_noise"):
        e = e - z
    w = {"sigma2": sigma**2, "constant": 1.0, "score": signal / sigma}[weighting]
    expected = (w * e * pi).sum(-1).mean() - 0.5 * (g * pi).sum(-1).mean()
    gradients = torch.autograd.grad(expected, list(mean.parameters()))
    value, _ = loss.actor_loss(batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    value.backward()
    ours = [p.grad for p in loss.actor_network_params.parameters()]
    for gradient in gradients:
        assert any(own.shape == gradient.shape and torch.allclose(own, gradient, rtol=1e-8) for own in ours)
    assert {k.split("_params")[0] for k, p in loss.named_parameters() if p.grad is not None} == {"actor_network"}


def test_srpos_terms_beside_the_actors_are_those_of_the_equations_in_continuous_time():
    critics, value = values()
    network = plain_network(OBSERVATION + ACTION + 1, ACTION)
    actor = DeterministicPolicy(make_policy_network(OBSERVATION, ACTION, (8,)))
    loss = SRPOLoss(actor, DiffusionPolicy(network, ACTION, schedule="vp"), critics, value, beta=0.5, expectile=0.75)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    batch = make_batch()
    torch.manual_seed(3)
    out = loss(batch.clone())
    torch.manual_seed(3)
    t = 0.001 + 0.999 * torch.rand(BATCH, 1)
    z = torch.randn(BATCH, ACTION)
    given = {"policy_time": 0.02 + 0.96 * torch.rand(BATCH, 1), "noise": torch.randn(BATCH, ACTION)}
    signal = torch.exp(-(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2)
    observation, action, following = batch["observation"], batch["action"], batch["next", "observation"]
    noised = signal * action + (1 - signal**2).sqrt() * z
    score = ((network(torch.cat([observation, noised, t], -1)) - z) ** 2).sum(-1).mean()
    qs = torch.stack([critic.module(observation, action).squeeze(-1) for critic in critics])
    v, next_v = (value.module(state).squeeze(-1) for state in (observation, following))
    u = qs.min(0).values - v
    y = batch["next", "reward"].squeeze(-1) + GAMMA * (1 - batch["next", "terminated"].squeeze(-1).double()) * next_v
    expected = {
        "loss_score": score,
        "loss_value": (torch.where(u < 0, 0.25, 0.75) * u**2).mean(),
        "loss_qvalue": ((qs - y) ** 2).sum(0).mean(),
        "loss_actor": loss.actor_loss(batch.clone().update(given))[0],
    }
    for name, number in expected.items():
        assert out[name].item() == pytest.approx(number.item(), rel=1e-9), name


def test_srpos_score_is_taken_without_dropout_and_leaves_the_mode():
    critics, value = values()
    network = NoiseNetwork(OBSERVATION, ACTION, width=8, dropout=0.5)
    actor = DeterministicPolicy(make_policy_network(OBSERVATION, ACTION, (8,)))
    loss = SRPOLoss(actor, DiffusionPolicy(network, ACTION, STEPS), critics, value, beta=0.1)
    batch = make_batch(policy_time=torch.randint(STEPS, (BATCH, 1)), noise=torch.randn(BATCH, ACTION))
    assert loss.actor_loss(batch)[0] == loss.actor_loss(batch)[0]
    assert network.training
    assert loss.score_loss(batch)[0] != loss.score_loss(batch)[0]


def consistency_by_hand(network, observation, x, sigma):
    skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
    out = (sigma - 0.002) * 0.5 / (sigma**2 + 0.25).sqrt()
    return skip * x + out * network(torch.cat([observation, x, sigma], -1))


def test_a_consistency_sample_takes_two_evaluations():
    network = ConsistencyNetwork(OBSERVATION, ACTION, hidden_dims=(8,))
    policy = ConsistencyPolicy(network, ACTION)
    observation, noise = torch.randn(BATCH, OBSERVATION), torch.randn(BATCH, 2, ACTION)
    top, second = torch.full((BATCH, 1), 80.0), torch.full((BATCH, 1), 2.0)
    x = consistency_by_hand(network, observation, 80.0 * noise[:, 0], top)
    x = consistency_by_hand(network, observation, x + math.sqrt(4 - 0.002**2) * noise[:, 1], second)
    torch.testing.assert_close(policy.module(observation, noise), x.clamp(-1, 1))
    low = torch.full((BATCH, 1), 0.002)
    torch.testing.assert_close(policy.module.consistency(observation, x, low), x)


def test_consistency_network_by_hand():
    network = ConsistencyNetwork(OBSERVATION, ACTION, hidden_dims=(8, 8))
    observation, x, sigma = torch.randn(4, OBSERVATION), torch.randn(4, ACTION), torch.rand(4, 1) * 80
    w = torch.tensor([10000.0 ** (-i / 7) for i in range(8)])
    embedded = network.sigma(torch.cat([(sigma * w).sin(), (sigma * w).cos()], -1))
    torch.testing.assert_close(
        network(torch.cat([observation, x, sigma], -1)), network.layers(torch.cat([x, embedded, observation], -1))
    )


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("options", [{}, {"scale_consistency": False, "normalize_target": True}])
@pytest.mark.parametrize("climbed", [0, 1])
def test_cacs_terms_are_those_of_the_equations(options, samples, climbed):
    critics = make_qvalue_networks(OBSERVATION, ACTION, (8,))
    network = ConsistencyNetwork(OBSERVATION, ACTION, hidden_dims=(8,))
    loss = ConsistencyACLoss(
        ConsistencyPolicy(network, ACTION), critics, eta=0.5, num_target_samples=samples, **options
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    scales = 10
    loss.num_scales = scales
    average = ConsistencyNetwork(OBSERVATION, ACTION, hidden_dims=(8,))
    average.load_state_dict(network.state_dict())
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(1.5)
        for key, leaf in loss.target_actor_network_params.items(True, True):
            if key[-1] in ("weight", "bias"):
                leaf.mul_(1.5)
    shape = (BATCH, samples, 2, ACTION) if samples > 1 else (BATCH, 2, ACTION)
    i = torch.randint(scales - 1, (BATCH, 1))
    batch = make_batch(
        noise=torch.randn(BATCH, 2, ACTION),
        critic_index=torch.full((BATCH, 1), climbed),
        consistency_noise=torch.randn(BATCH, ACTION),
        consistency_step=i,
    )
    batch["next", "noise"] = torch.randn(shape)
    observation, action, following = batch["observation"], batch["action"], batch["next", "observation"]

    def q(state, act):
        return torch.stack([critic.module(state, act).squeeze(-1) for critic in critics])

    by_average = ConsistencyPolicy(average, ACTION).module
    noises = batch["next", "noise"].reshape(BATCH, samples, 2, ACTION)
    per_sample = torch.stack([q(following, by_average(following, noises[:, n])) for n in range(samples)])
    best = per_sample.max(0).values.min(0).values
    y = batch["next", "reward"].squeeze(-1) + GAMMA * (1 - batch["next", "terminated"].squeeze(-1).double()) * best
    if options.get("normalize_target"):
        y = y / (y.std() + 1e-6)
    loss_qvalue = ((q(observation, action) - y.detach()) ** 2).mean(1).sum()
    acted = ConsistencyPolicy(network, ACTION).module(observation, batch["noise"])
    both = q(observation, acted)
    loss_actor = -0.5 * both[climbed].mean() / both[1 - climbed].abs().mean()

    def level(step):
        return (0.002 ** (1 / 7) + step / (scales - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7

    low, high = level(i.double()), level(i.double() + 1)
    z = batch["consistency_noise"]
    error = consistency_by_hand(network, observation, action + high * z, high) - consistency_by_hand(
        average, observation, action + low * z, low
    )
    weight = 1.0 if "scale_consistency" in options else 100 / (high - low)
    expected = {"loss_qvalue": loss_qvalue, "loss_actor": loss_actor, "loss_consistency": (weight * error**2).mean()}
    out = loss(batch.clone())
    for name, value in expected.items():
        assert out[name].item() == pytest.approx(value.item(), rel=1e-9), name
        own = getattr(loss, f"{name.removeprefix('loss_')}_loss")(batch.clone())[0]
        assert own.item() == pytest.approx(value.item(), rel=1e-9), name
    for name, part in {"loss_qvalue": "qvalue", "loss_actor": "actor", "loss_consistency": "actor"}.items():
        loss.zero_grad()
        loss(batch.clone())[name].backward()
        assert {k.split("_network")[0] for k, p in loss.named_parameters() if p.grad is not None} == {part}


def test_cacs_target_is_the_minimum_over_critics_of_each_ones_maximum_over_samples():
    class FirstEntry(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = nn.Parameter(torch.tensor(sign))

        def forward(self, observation, action):
            return self.sign * action[..., :1]

    network = nn.Linear(OBSERVATION + ACTION + 1, ACTION)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    critics = [
        TensorDictModule(FirstEntry(sign), in_keys=["observation", "action"], out_keys=["state_action_value"])
        for sign in (1.0, -1.0)
    ]
    loss = ConsistencyACLoss(ConsistencyPolicy(network, ACTION), critics, eta=0.5, num_target_samples=3)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    batch = make_batch()
    batch["next", "noise"] = torch.zeros(BATCH, 3, 2, ACTION)
    batch["next", "noise"][..., 1, 0] = torch.tensor(
        [-3.0, 1.0, 4.0]
    )  # of the second step: the action is c_skip(2) 2 z
    top = 0.25 / (1.998**2 + 0.25) * math.sqrt(4 - 0.002**2)
    y = batch["next", "reward"] + GAMMA * (~batch["next", "terminated"]) * 3 * top  # min(max a, max -a) = min(4, 3)
    a = batch["action"][:, :1]
    expected = ((a - y) ** 2 + (-a - y) ** 2).mean()
    assert loss.qvalue_loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_levels_are_two_at_first_and_a_hundred_and_fifty_at_last():
    scales = number_of_scales(torch.tensor([0.0, 0.5, 1.0]))
    assert scales.tolist() == [2, math.ceil(math.sqrt(0.5 * (150**2 - 4) + 4) - 1) + 1, 150]
