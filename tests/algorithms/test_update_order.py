"""The order inside an update of the methods with stages, against updates written out step by step in double precision."""

import copy
import dataclasses
import math

import pytest
import torch

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec, SoftTarget
from deflow_torchrl.trainers import UpdateStep
from tests.support import networks
from tests.support.flow_critics import member, mlp
from tests.support.networks import ACTION_DIM, NEEDED, OBSERVATION_DIM

BATCH, UPDATES, GAMMA, TAU, LR = 6, 8, 0.875, 0.05, 1e-2


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_update(name, **options):
    algorithm = get_algorithm(name)
    problem = ProblemSpec(observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM, hidden_dims=(8,), gamma=GAMMA)
    config = algorithm.config(**{**NEEDED.get(name, {}), "tau": TAU, "lr": LR, **options})
    return UpdateStep(algorithm.build(config, problem))


def leaves(loss, name):
    return list(getattr(loss, f"{name}_params").values(True, True))


class Plain:
    """A copy of a loss's parameters with one Adam for each network, and its networks as functions of tensors."""

    def __init__(self, loss):
        self.loss, self.optimizers = copy.deepcopy(loss), {}

    def step(self, value, *names, limit=None):
        for name in names:
            if name not in self.optimizers:
                parameters = [leaf for leaf in leaves(self.loss, name) if leaf.requires_grad]
                self.optimizers[name] = torch.optim.Adam(parameters, lr=LR)
            self.optimizers[name].zero_grad()
        value.backward(inputs=[leaf for name in names for leaf in self.parameters(name)])
        if limit is not None:
            gradients = [leaf.grad for name in names for leaf in self.parameters(name)]
            norm = math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
            assert norm > limit, "the bound is to be felt"
            for gradient in gradients:
                gradient.mul_(limit / norm)
        for name in names:
            self.optimizers[name].step()

    def parameters(self, name):
        return [parameter for group in self.optimizers[name].param_groups for parameter in group["params"]]

    @torch.no_grad()
    def follow(self, name, rate):
        for target, source in zip(leaves(self.loss, f"target_{name}"), leaves(self.loss, name), strict=True):
            target.copy_(rate * source + (1 - rate) * target)

    def q(self, s, a, prefix=""):
        params = getattr(self.loss, f"{prefix}qvalue_network_params")
        return torch.stack(
            [mlp(member(params, j, "module", "mlp"), torch.cat([s, a], -1), norm=True)[..., 0] for j in range(2)]
        )

    def v(self, s):
        return mlp(self.loss.value_network_params["module"], s, norm=True)[..., 0]

    def through(self, name, function, prefix=""):
        """Evaluate a policy's network with the parameters that stand under a name."""
        policy = getattr(self.loss, name)
        with getattr(self.loss, f"{prefix}{name}_params").to_module(policy):
            return function(policy.module)

    def noise(self, s, x, k):
        inputs = torch.cat([s, x, k.double()], -1)
        return self.through("diffusion_policy", lambda module: module.noise_network(inputs))


def bars(k):
    """Share of signal left at step k of 5, by the published schedule."""
    alphas = [math.exp(-0.1 / 5 - 9.9 * (2 * i - 1) / (2 * 25)) for i in range(1, 6)]
    return torch.tensor([math.prod(alphas[: i + 1]) for i in range(5)])[k.squeeze(-1)][:, None]


def score(plain, batch):
    k, z, a = batch["diffusion_time"], batch["diffusion_noise"], batch["action"]
    noised = bars(k).sqrt() * a + (1 - bars(k)).sqrt() * z
    return ((plain.noise(batch["observation"], noised, k) - z) ** 2).sum(-1).mean()


def target(batch, value):
    continues = 1 - batch["next", "terminated"].squeeze(-1).double()
    return (batch["next", "reward"].squeeze(-1) + GAMMA * continues * value).detach()


def value_terms(plain, batch, expectile=0.9):
    """loss_value, and loss_qvalue as a function, so that it can be computed with a later V."""
    s, a = batch["observation"], batch["action"]
    u = plain.q(s, a, "target_").min(0).values.detach() - plain.v(s)
    loss_value = (torch.where(u < 0, 1 - expectile, expectile) * u**2).mean()

    def loss_qvalue():
        y = target(batch, plain.v(batch["next", "observation"]))
        return ((plain.q(s, a) - y) ** 2).sum(0).mean()

    return loss_value, loss_qvalue


def idql(plain, batch, number):
    out = {"loss_score": score(plain, batch)}
    plain.step(out["loss_score"], "diffusion_policy")
    plain.follow("diffusion_policy", 0.001)
    out["loss_value"], qvalue = value_terms(plain, batch)
    plain.step(out["loss_value"], "value_network")
    out["loss_qvalue"] = qvalue()  # with the V of after its step
    plain.step(out["loss_qvalue"], "qvalue_network")
    plain.follow("qvalue_network", TAU)
    return out


def srpo(plain, batch, number):
    out = {"loss_score": score(plain, batch)}
    plain.step(out["loss_score"], "diffusion_policy")
    out["loss_value"], qvalue = value_terms(plain, batch)
    out["loss_qvalue"] = qvalue()  # with the V of before its step
    plain.step(out["loss_value"] + out["loss_qvalue"], "value_network", "qvalue_network")
    plain.follow("qvalue_network", TAU)
    s, k, z = batch["observation"], batch["policy_time"], batch["noise"]
    pi = torch.tanh(mlp(plain.loss.actor_network_params["module", "network"], s, norm=False))
    x = bars(k).sqrt() * pi.detach() + (1 - bars(k)).sqrt() * z
    fixed = pi.detach().requires_grad_()
    (g,) = torch.autograd.grad(plain.q(s, fixed, "target_").mean(0).sum(), fixed)
    e = plain.noise(s, x, k).detach()
    out["loss_actor"] = (((1 - bars(k)) * e - 0.1 * g) * pi).sum(-1).mean()
    plain.step(out["loss_actor"], "actor_network")
    return out


LIMIT = 0.05


def consistency(module, s, x, sigma):
    skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
    scale = (sigma - 0.002) * 0.5 / (sigma**2 + 0.25).sqrt()
    return skip * x + scale * module.network(torch.cat([s, x, sigma], -1))


def sampled(module, s, noise):
    column = torch.ones(*s.shape[:-1], 1)
    x = consistency(module, s, 80 * noise[..., 0, :], 80 * column)
    return consistency(module, s, x + math.sqrt(4 - 0.002**2) * noise[..., 1, :], 2 * column).clamp(-1, 1)


def cac(plain, batch, number):
    s, a, following = batch["observation"], batch["action"], batch["next", "observation"]
    repeated = following.unsqueeze(1).expand(-1, 2, -1)
    by_average = plain.through(
        "actor_network", lambda module: sampled(module, repeated, batch["next", "noise"]), "target_"
    )
    y = target(batch, plain.q(repeated, by_average, "target_").max(-1).values.min(0).values)
    out = {"loss_qvalue": ((plain.q(s, a) - y) ** 2).mean(1).sum()}
    plain.step(out["loss_qvalue"], "qvalue_network")
    q = plain.q(s, plain.through("actor_network", lambda module: sampled(module, s, batch["noise"])))  # the new critics
    climbed = int(batch["critic_index"][0])
    out["loss_actor"] = -0.1 * q[climbed].mean() / q[1 - climbed].detach().abs().mean()
    scales = math.ceil(math.sqrt(number / UPDATES * (150**2 - 4) + 4) - 1) + 1
    low, high = (
        (0.002 ** (1 / 7) + i / (scales - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        for i in (batch["consistency_step"].double(), batch["consistency_step"].double() + 1)
    )
    z = batch["consistency_noise"]
    ours = plain.through("actor_network", lambda module: consistency(module, s, a + high * z, high))
    taught = plain.through("actor_network", lambda module: consistency(module, s, a + low * z, low), "target_").detach()
    out["loss_consistency"] = (100 / (high - low) * (ours - taught) ** 2).mean()
    plain.step(out["loss_consistency"] + out["loss_actor"], "actor_network", limit=LIMIT)
    if number + 1 >= 3 and (number + 1) % 2 == 0:
        plain.follow("actor_network", 0.005)
    plain.follow("qvalue_network", TAU)
    return out


def make_batch(number):
    batch = networks.make_batch(BATCH, noise=False)
    scales = math.ceil(math.sqrt(number / UPDATES * (150**2 - 4) + 4) - 1) + 1
    batch = batch.apply(lambda entry: entry.double() if entry.is_floating_point() else entry)
    for key, value in {
        "diffusion_time": torch.randint(5, (BATCH, 1)),
        "diffusion_noise": torch.randn(BATCH, ACTION_DIM),
        "policy_time": torch.randint(5, (BATCH, 1)),
        "consistency_noise": torch.randn(BATCH, ACTION_DIM),
        "consistency_step": torch.randint(scales - 1, (BATCH, 1)),
        "critic_index": torch.randint(2, (1, 1)).expand(BATCH, 1),
    }.items():
        batch[key] = value
    return batch


@pytest.mark.parametrize(("name", "by_hand"), [("idql", idql), ("srpo", srpo), ("cac", cac)])
def test_eight_updates_are_those_written_out(name, by_hand):
    options = {"max_grad_norm": LIMIT, "schedule_steps": UPDATES} if name == "cac" else {}
    update = make_update(name, **options)
    if name == "cac":  # its average begins at update 1000: here at the third, and moves at every second
        critic, actor = update.learner.stages
        average, of_critics = actor.targets
        assert average == SoftTarget("actor_network", rate=0.005, period=5, first=1000)
        targets = (dataclasses.replace(average, period=2, first=3), of_critics)
        update.learner.stages = (critic, dataclasses.replace(actor, targets=targets))
    plain = Plain(update.learner.loss)
    for number in range(UPDATES):
        batch = make_batch(number)
        noise = (2, ACTION_DIM) if name == "cac" else (ACTION_DIM,)
        batch["noise"], batch["next", "noise"] = torch.randn(BATCH, *noise), torch.randn(BATCH, 2, 2, ACTION_DIM)
        out, expected = update(batch.clone()), by_hand(plain, batch, number)
        assert {key for key in out.keys() if key.startswith("loss_")} == set(expected)  # noqa: SIM118
        for key, value in expected.items():
            assert out[key].item() == pytest.approx(value.item(), rel=1e-7), (key, number)
    for key, ours in update.learner.loss.state_dict().items():
        if "_params." in key:
            torch.testing.assert_close(ours, plain.loss.state_dict()[key], rtol=1e-6, atol=1e-8, msg=key)


AFTER = ("calql", "idql", "srpo", "cac")
BEFORE = ("rlpd", "fedit", "dsrl", "qam", "trqam", "fan")
WITH_TARGET_FLOW = ("dsrl", "qam", "trqam")


@pytest.mark.parametrize("name", [*AFTER, *BEFORE])
def test_targets_follow_the_critics_of_after_the_step_or_of_before(name):
    update = make_update(name)
    batch = make_batch(0)
    batch["mc_return"] = torch.zeros(BATCH, 1)
    loss = update.learner.loss
    names = ["qvalue_network", *(["flow_policy"] if name in WITH_TARGET_FLOW else [])]
    before = {key: [leaf.clone() for leaf in leaves(loss, key)] for part in names for key in (part, f"target_{part}")}
    update(batch)
    for part in names:
        source = [leaf.detach() for leaf in leaves(loss, part)] if name in AFTER else before[part]
        for old, new, moved in zip(before[f"target_{part}"], source, leaves(loss, f"target_{part}"), strict=True):
            torch.testing.assert_close(moved, old + TAU * (new - old))
        assert any(not torch.equal(*pair) for pair in zip(before[part], leaves(loss, part), strict=True))


def test_a_resume_with_other_settings_keeps_the_multiplier_that_training_has_moved():
    update, other = make_update("trqam"), make_update("trqam", kl_budget=0.25)
    for _ in range(3):
        update(make_batch(0))
    other.load_state_dict(update.state_dict(), keep_settings=True)
    assert other.learner.loss.trust_lambda == update.learner.loss.trust_lambda != 1
    assert other.learner.loss.kl_average == update.learner.loss.kl_average != 0
    assert other.learner.loss.kl_budget == 0.25


@pytest.mark.parametrize("name", ["qam", "trqam"])
def test_one_clip_bounds_the_gradients_of_all_terms_together(name):
    update = make_update(name)
    batch = make_batch(0)
    batch["next", "reward"] *= 1e3
    update(batch)
    gradients = [p.grad for p in update.learner.loss.parameters() if p.grad is not None]
    assert math.sqrt(sum((gradient**2).sum().item() for gradient in gradients)) == pytest.approx(1.0)
