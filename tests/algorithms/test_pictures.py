"""Every method on pictures: which encoder encodes what, what trains it, and whole updates against their equations."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchrl.data import Composite, Unbounded

from deflow_torchrl.data import BaseActionBank, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.deploy import load_policy
from deflow_torchrl.errors import InputError
from deflow_torchrl.export import export_policy
from deflow_torchrl.modules import ImpalaEncoder, ObservationNormalizer
from deflow_torchrl.trainers import UpdateStep
from deflow_torchrl.trainers.stacked import StackedUpdate
from tests.support.networks import assert_compiled_equals_eager
from tests.support.pictures import ACTION_DIM, SHAPE, make_batch, make_learner, make_problem, picture_spec, pictures

# Encodings of an update, and of an action: [at s with gradient, without].
ENCODINGS = {
    "deflow": (6, 2), "fql": (5, 1), "iql": (5, 1), "ifql": (5, 2), "rebrac": (4, 1), "fbrac": (4, 1), "fawac": (4, 1),
    "bc": (1, 1), "flow_bc": (1, 1),
}  # fmt: skip
PRIOR, REFINEMENT = "actor_network_params.module.0.module.0", "actor_network_params.module.1.module.0"
ACTOR, FLOW, VALUE = (f"{name}_params.module.0" for name in ("actor_network", "flow_policy", "value_network"))
CRITIC = "qvalue_network_params.encoder"
OWNERS = {  # term -> the encoders that it trains
    "deflow": {"loss_flow": PRIOR, "loss_actor": REFINEMENT, "loss_alpha": None, "loss_qvalue": CRITIC},
    "fql": {"loss_flow": FLOW, "loss_actor": ACTOR, "loss_qvalue": CRITIC},
    "iql": {"loss_value": VALUE, "loss_actor": ACTOR, "loss_qvalue": CRITIC},
    "ifql": {"loss_value": VALUE, "loss_flow": FLOW, "loss_qvalue": CRITIC},
    "rebrac": {"loss_actor": ACTOR, "loss_qvalue": CRITIC},
    "fbrac": {"loss_flow": ACTOR, "loss_actor": ACTOR, "loss_qvalue": CRITIC},
    "fawac": {"loss_flow": ACTOR, "loss_qvalue": CRITIC},
    "bc": {"loss_actor": ACTOR},
    "flow_bc": {"loss_flow": FLOW},
}
METHODS = list(ENCODINGS)


@pytest.fixture
def calls(monkeypatch):
    """Rows of each call of an encoder from now on."""
    rows, forward = [], ImpalaEncoder.forward

    def counting(self, pictures):
        rows.append(pictures.shape[:-3].numel())
        return forward(self, pictures)

    monkeypatch.setattr(ImpalaEncoder, "forward", counting)
    return rows


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", METHODS)
def test_an_update_encodes_each_state_once_for_each_encoder_that_reads_it(name, calls):
    learner = make_learner(name)
    update, batch = UpdateStep(learner), make_batch(6)
    calls.clear()
    update(batch)
    assert calls == [6] * ENCODINGS[name][0]


@pytest.mark.parametrize("name", METHODS)
def test_an_action_encodes_a_state_once_for_each_encoder_not_for_each_step_or_candidate(name, calls):
    learner = make_learner(name)
    state = make_batch(3, draws=False).select("observation")
    with torch.no_grad():
        for policy in {*learner.evaluated_policies.values(), learner.online_policy}:
            calls.clear()
            action = policy(state.clone())["action"]
            assert action.shape == (3, ACTION_DIM)
            assert set(calls) == {3}
            assert len(calls) <= ENCODINGS[name][1]
        assert learner.policy(state[0].clone())["action"].shape == (ACTION_DIM,), "without a batch dimension"


@pytest.mark.parametrize("name", METHODS)
def test_an_encoder_gets_gradient_from_the_loss_of_its_part_and_from_nothing_else(name):
    for term, owner in OWNERS[name].items():
        torch.manual_seed(0)
        loss = make_learner(name).loss
        loss(make_batch(16))[term].backward()
        touched = {
            key.rpartition(".module.stacks")[0]
            for key, parameter in loss.named_parameters()
            if ".module.stacks" in key and parameter.grad is not None and bool(parameter.grad.any())
        }
        assert touched == ({owner} if owner else set())
        assert set(OWNERS[name]) == {key for key in loss.out_keys if key.startswith("loss_")}


@pytest.mark.parametrize("name", METHODS)
def test_parts_share_no_weights_and_start_from_their_own(name):
    loss = make_learner(name).loss
    first = [p for key, p in loss.named_parameters() if key.endswith("stacks.0.conv.weight")]
    assert len(first) == len({owner for owner in OWNERS[name].values() if owner})
    assert all(not torch.equal(one, other) for one, other in pairwise(first))


@pytest.mark.parametrize("name", ["deflow", "iql"])
def test_one_camera_after_the_other_and_a_vector_are_read_by_every_part(name):
    spec = Composite(cameras=Composite(front=picture_spec(), wrist=picture_spec((6, 6, 1))), joints=Unbounded((4,)))
    problem = make_problem(spec)
    assert problem.observation_dim == 512 + 512 + 4
    learner = make_learner(name, problem)
    update, batch = UpdateStep(learner), make_batch(5, spec=spec)
    terms = list(update(batch.clone()).keys())
    for key in spec.keys(True, True):
        other = batch.clone()
        other[key] = other[key].flip(0)
        assert any(bool(learner.loss(other)[term] != learner.loss(batch)[term]) for term in terms)
    assert learner.policy(batch.select(*spec.keys(True, True)))["action"].shape == (5, ACTION_DIM)


def test_pictures_and_a_normalisation_are_refused_and_so_are_shapes_that_are_no_pictures():
    normalizer = ObservationNormalizer(torch.zeros(3), torch.ones(3))
    with pytest.raises(InputError, match="pictures are scaled by their encoder"):
        make_problem(normalizer=normalizer)
    with pytest.raises(InputError, match=r"'observation' has shape \[3, 16, 16\], which is channels first"):
        make_problem(Composite(observation=picture_spec((3, 16, 16))))


# -- whole updates against their equations, in plain torch ------------------------------------------------------------

EXPECTILE, TEMPERATURE, ALPHA, BC_ACTOR, BC_CRITIC = 0.9, 2.0, 10.0, 0.3, 0.2
GAMMA, TAU, LR, DELTA = 0.9, 0.005, 3e-4, 1e-3


def of(state_dict, prefix):
    """A part's weights in the order of registration, free of the loss."""
    return [
        value.detach().clone().requires_grad_()
        for key, value in state_dict.items()
        if key.startswith(prefix) and key.endswith((".weight", ".bias"))
    ]


def encode(weights, picture):
    """Two stacks of one block each, from the words of the specification."""
    x = (picture.double() / 255).permute(0, 3, 1, 2)
    queue = list(weights)

    def convolve(x):
        weight, bias = queue.pop(0), queue.pop(0)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias)

    for _ in range(2):
        x = convolve(x)
        total = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]
        (top, left) = (n // 2 for n in total)
        padded = F.pad(x, (left, total[1] - left, top, total[0] - top), value=-math.inf)
        x = F.max_pool2d(padded, 3, 2)
        x = x + convolve(F.relu(convolve(F.relu(x))))
    flat = F.relu(x).permute(0, 2, 3, 1).reshape(len(picture), -1)
    weight, bias = queue
    return F.gelu(flat @ weight.T + bias, approximate="tanh")


def mlp(weights, x, *, norm=False):
    queue = list(weights)
    while len(queue) > 2:
        x = F.gelu(x @ queue.pop(0).T + queue.pop(0), approximate="tanh")
        if norm:
            scale, shift = queue.pop(0), queue.pop(0)
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() * scale + shift
    return x @ queue[0].T + queue[1]


class Part:
    """An encoder and a network behind it."""

    def __init__(self, state_dict, encoder, *networks, norm=False):
        self.encoder, self.networks, self.norm = of(state_dict, encoder), [of(state_dict, it) for it in networks], norm

    @property
    def weights(self):
        return [*self.encoder, *(weight for network in self.networks for weight in network)]

    def __call__(self, picture, *inputs, network=0):
        x = torch.cat([encode(self.encoder, picture), *inputs], -1)
        return mlp(self.networks[network], x, norm=self.norm)

    def values(self, picture, *inputs):
        """All networks behind the one encoder: [J, B]."""
        return torch.stack([self(picture, *inputs, network=j).squeeze(-1) for j in range(len(self.networks))])


def critics(state_dict, prefix=""):
    root = f"{prefix}qvalue_network_params"
    return Part(state_dict, f"{root}.encoder", f"{root}.critics.0", f"{root}.critics.1", norm=True)


def euler(flow, picture, z):
    x = z
    for step in range(10):
        x = x + flow(picture, x, torch.full((len(z), 1), step / 10)) / 10
    return x.clamp(-1, 1)


def flow_loss(flow, batch):
    z, t, a = batch["flow_noise"], batch["flow_time"], batch["action"]
    return (flow(batch["observation"], (1 - t) * z + t * a, t) - (a - z)).square().mean()


def bellman(batch, value):
    alive = 1 - batch["next", "terminated"].double().squeeze(-1)
    return batch["next", "reward"].squeeze(-1) + GAMMA * alive * value


class DeFlow:
    def __init__(self, state):
        self.prior = Part(state, f"{PRIOR}.", "actor_network_params.module.0.module.1.")
        self.refinement = Part(state, f"{REFINEMENT}.", "actor_network_params.module.1.module.1.")
        self.critics, self.targets = critics(state), critics(state, "target_")
        self.log_alpha = state["log_alpha"].clone().requires_grad_()
        self.parts = {"flow": self.prior, "actor": self.refinement, "qvalue": self.critics}
        self.moving = [(self.targets, self.critics)]

    def terms(self, batch):
        s, following = batch["observation"], batch["next", "observation"]
        with torch.no_grad():
            base = euler(self.prior, s, batch["noise"])
            next_base = euler(self.prior, following, batch["next", "noise"])
            next_action = (next_base + self.refinement(following, next_base)).clamp(-1, 1)
            y = bellman(batch, self.targets.values(following, next_action).mean(0))
        shift = self.refinement(s, base)
        q = self.critics.values(s, (base + shift).clamp(-1, 1)).mean(0)
        divergence = shift.square().mean()
        return {
            "loss_flow": flow_loss(self.prior, batch),
            "loss_actor": -q.mean() / q.detach().abs().mean() + self.log_alpha.exp().detach() * divergence,
            "loss_alpha": -self.log_alpha * (divergence.detach() - DELTA),
            "loss_qvalue": (self.critics.values(s, batch["action"]) - y).square().mean(),
        }


class FQL:
    def __init__(self, state):
        self.flow = Part(state, f"{FLOW}.", "flow_policy_params.module.1.")
        self.actor = Part(state, f"{ACTOR}.", "actor_network_params.module.1.")
        self.critics, self.targets = critics(state), critics(state, "target_")
        self.parts = {"flow": self.flow, "actor": self.actor, "qvalue": self.critics}
        self.moving = [(self.targets, self.critics)]

    def terms(self, batch):
        s, following = batch["observation"], batch["next", "observation"]
        with torch.no_grad():
            taught = euler(self.flow, s, batch["noise"])
            next_action = self.actor(following, batch["next", "noise"]).clamp(-1, 1)
            y = bellman(batch, self.targets.values(following, next_action).mean(0))
        out = self.actor(s, batch["noise"])
        q = self.critics.values(s, out.clamp(-1, 1)).mean(0)
        return {
            "loss_flow": flow_loss(self.flow, batch),
            "loss_actor": ALPHA * (out - taught).square().mean() - q.mean(),
            "loss_qvalue": (self.critics.values(s, batch["action"]) - y).square().mean(),
        }


class IQL:
    def __init__(self, state):
        self.value = Part(state, f"{VALUE}.", "value_network_params.module.1.", norm=True)
        self.actor = Part(state, f"{ACTOR}.", "actor_network_params.module.1.")
        self.critics, self.targets = critics(state), critics(state, "target_")
        self.parts = {"value": self.value, "actor": self.actor, "qvalue": self.critics}
        self.moving = [(self.targets, self.critics)]

    def terms(self, batch):
        s, action = batch["observation"], batch["action"]
        with torch.no_grad():
            target = self.targets.values(s, action).amin(0)
            y = bellman(batch, self.value(batch["next", "observation"]).squeeze(-1))
            advantage = self.critics.values(s, action).amin(0) - self.value(s).squeeze(-1)
            weight = (TEMPERATURE * advantage).exp().clamp(max=100)
        u = target - self.value(s).squeeze(-1)
        log_prob = -0.5 * ((action - self.actor(s)).square() + math.log(2 * math.pi)).sum(-1)
        return {
            "loss_value": (torch.where(u < 0, 1 - EXPECTILE, EXPECTILE) * u.square()).mean(),
            "loss_qvalue": (self.critics.values(s, action) - y).square().sum(0).mean(),
            "loss_actor": -(weight * log_prob).mean(),
        }


class ReBRAC:
    def __init__(self, state):
        self.actor = Part(state, f"{ACTOR}.", "actor_network_params.module.1.")
        self.target_actor = Part(state, f"target_{ACTOR}.", "target_actor_network_params.module.1.")
        self.critics, self.targets = critics(state), critics(state, "target_")
        self.parts = {"actor": self.actor, "qvalue": self.critics}
        self.moving = [(self.targets, self.critics), (self.target_actor, self.actor)]

    def terms(self, batch):
        s, following = batch["observation"], batch["next", "observation"]
        with torch.no_grad():
            smoothing = (0.2 * batch["next", "noise"]).clamp(-0.5, 0.5)
            next_action = (self.target_actor(following).tanh() + smoothing).clamp(-1, 1)
            penalty = BC_CRITIC * (next_action - batch["next", "action"]).square().sum(-1)
            y = bellman(batch, self.targets.values(following, next_action).amin(0) - penalty)
        action = self.actor(s).tanh()
        q = self.critics.values(s, action).amin(0)
        distance = (action - batch["action"]).square().sum(-1)
        return {
            "loss_qvalue": (self.critics.values(s, batch["action"]) - y).square().mean(),
            "loss_actor": (-q / q.detach().abs().mean() + BC_ACTOR * distance).mean(),
        }


def adam(weight, gradient, moments, step):
    first, second = moments.setdefault(id(weight), [torch.zeros_like(weight), torch.zeros_like(weight)])
    first.mul_(0.9).add_(0.1 * gradient)
    second.mul_(0.999).add_(0.001 * gradient**2)
    weight -= LR * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


def update_by_hand(method, batch, moments, step, *, delayed):
    """Each term's gradient for the weights of its own part, which are walls written the other way round; targets, then Adam."""
    terms = method.terms(batch)
    gradients = []
    for name, part in method.parts.items():
        found = torch.autograd.grad(terms[f"loss_{name}"], part.weights, retain_graph=True)
        gradients += list(zip(part.weights, found, strict=True))
    if "loss_alpha" in terms:
        gradients += [(method.log_alpha, *torch.autograd.grad(terms["loss_alpha"], method.log_alpha))]
    due = not delayed or step % 2 == 0
    with torch.no_grad():
        if due:
            for target, online in method.moving:
                for one, other in zip(target.weights, online.weights, strict=True):
                    one.lerp_(other, TAU)
        held = {id(weight) for weight in method.parts["actor"].weights} if not due else set()
        for weight, gradient in gradients:
            adam(weight, torch.zeros_like(gradient) if id(weight) in held else gradient, moments, step)
    return {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize(
    ("name", "method"),
    [("deflow", DeFlow), ("fql", FQL), ("iql", IQL), ("rebrac", ReBRAC)],
    ids=["deflow", "fql", "iql", "rebrac"],
)
@pytest.mark.usefixtures("double")
def test_three_updates_are_those_of_the_equations(name, method):
    torch.manual_seed(0)
    learner = make_learner(name)
    state = learner.loss.state_dict()
    with torch.no_grad():  # targets of their own, so that taking the one for the other shows
        for key, value in state.items():
            if key.startswith("target_") and key.endswith((".weight", ".bias")):
                value.add_(0.02 * torch.randn_like(value))
    learner.loss.load_state_dict(state)
    by_hand, moments = method(learner.loss.state_dict()), {}
    update = UpdateStep(learner)
    for step in (1, 2, 3):
        batch = make_batch(6)
        expected = update_by_hand(by_hand, batch, moments, step, delayed=name == "rebrac")
        out = update(batch)
        for term, value in expected.items():
            assert float(out[term]) == pytest.approx(value, rel=1e-10), term
    now = method(learner.loss.state_dict())
    for part in ("prior", "flow", "refinement", "actor", "value", "critics", "targets", "target_actor"):
        if hasattr(now, part):
            for one, other in zip(getattr(now, part).weights, getattr(by_hand, part).weights, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_targets_of_encoders_start_as_copies_and_move_softly():
    learner = make_learner("rebrac")
    state = learner.loss.state_dict()
    pairs = {key: key.removeprefix("target_") for key in state if key.startswith("target_") and "stacks" in key}
    assert {key.split("_params")[0] for key in pairs} == {"target_qvalue_network", "target_actor_network"}
    assert all(torch.equal(state[target], state[source]) for target, source in pairs.items())
    update = UpdateStep(learner)
    for _ in range(2):
        before = {key: value.clone() for key, value in learner.loss.state_dict().items()}
        update(make_batch(4))
    for target, source in pairs.items():
        torch.testing.assert_close(learner.loss.state_dict()[target], before[target].lerp(before[source], TAU))


def test_pictures_of_a_terminated_step_reach_no_number():
    torch.manual_seed(0)
    loss, batch = make_learner("deflow").loss, make_batch(6)
    batch["next", "terminated"] = batch["next", "done"] = torch.ones(6, 1, dtype=torch.bool)
    out = loss(batch.clone()).to_dict()
    batch["next", "observation"] = pictures(6)
    torch.testing.assert_close(loss(batch).to_dict(), out, rtol=0, atol=0)


# -- what stands around the update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_stacked_seeds_train_as_each_alone(name):
    def updates():
        torch.manual_seed(0)
        return [UpdateStep(make_learner(name)) for _ in range(2)]

    stack, alone = StackedUpdate(updates()), updates()
    for _ in range(2):
        batch = make_batch(2, 5)
        out = stack(batch.clone())
        rows = [update(row) for update, row in zip(alone, batch.unbind(0), strict=True)]
        for term in out.keys():  # noqa: SIM118 - a TensorDict
            torch.testing.assert_close(out[term], torch.stack([row[term] for row in rows]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["deflow", "rebrac"])
def test_an_update_that_goes_on_from_a_state_gives_the_same_weights(name):
    torch.manual_seed(0)
    update, batches = UpdateStep(make_learner(name)), [make_batch(5) for _ in range(4)]
    for batch in batches[:2]:
        update(batch.clone())
    other = UpdateStep(make_learner(name))
    other.load_state_dict(copy.deepcopy(update.state_dict()))
    for batch in batches[2:]:
        for it in (update, other):
            it(batch.clone())
    for key, value in update.learner.loss.state_dict().items():
        assert torch.equal(value, other.learner.loss.state_dict()[key]), key


def test_a_frozen_prior_has_a_bank_of_base_actions_and_encodes_each_state_once_for_it(calls):
    torch.manual_seed(0)
    arrays = [pictures(9).numpy(), torch.zeros(9, ACTION_DIM).numpy(), torch.zeros(9).numpy(), [0, 0, 0, 1] * 2 + [1]]
    buffer = TransitionReplayBuffer(TransitionDataset.from_arrays(*arrays), batch_size=4)
    update = UpdateStep(make_learner("deflow"))
    update.freeze_prior()
    bank = BaseActionBank(update.learner.prior, buffer, num_actions=8)
    calls.clear()
    bank.fill()
    assert sum(calls) == len(buffer.dataset.observation), "not eight times as many, for the eight base actions of each"
    calls.clear()
    out = update(bank(buffer.sample()))
    assert "loss_flow" not in out.keys()  # noqa: SIM118 - a TensorDict
    assert calls == [4] * 4, "critic and refinement at s and s'; the prior encodes nothing"


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("name", ["deflow", "iql"])
def test_an_exported_policy_reads_uint8_pictures(name, format, tmp_path):
    torch.manual_seed(0)
    policy, file = make_learner(name).policy, tmp_path / f"policy.{format}"
    about = export_policy(policy, file, observation_dim=SHAPE, action_dim=ACTION_DIM)
    assert about["inputs"]["observation"] == {"shape": ["batch", *SHAPE], "dtype": "uint8"}
    exported = load_policy(file, trusted=True)
    assert exported.observation_shape == SHAPE
    state = make_batch(3).select("observation", "noise")
    noise = {"noise": state["noise"].numpy()} if "noise" in policy.in_keys else {}
    with torch.no_grad():
        expected = policy(state.clone())["action"].numpy()
    np.testing.assert_allclose(exported(state["observation"].numpy(), **noise), expected, atol=1e-5)
    one = {key: value[0] for key, value in noise.items()}
    np.testing.assert_allclose(exported(state["observation"][0].numpy(), **one), expected[0], atol=1e-5)
    for wrong, message in (
        (state["observation"].numpy() / 255, "observation must be pictures of uint8, got values of type float64"),
        (state["observation"].movedim(-1, 1).numpy(), r"shape \[11, 8, 3\] or \[B, 11, 8, 3\], got \[3, 3, 11, 8\]"),
    ):
        with pytest.raises(InputError, match=message):
            exported(wrong)


def test_several_cameras_cannot_be_exported_and_the_message_names_them(tmp_path):
    spec = Composite(front=picture_spec(), joints=Unbounded((4,)))
    policy = make_learner("iql", make_problem(spec)).policy
    with pytest.raises(InputError, match=r"reads \['front', 'joints'\]; what is exported reads an observation"):
        export_policy(policy, tmp_path / "policy.pt2", observation_dim=SHAPE, action_dim=ACTION_DIM)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deflow", "iql"])
def test_losses_on_pictures_compile(name):
    def make():
        learner = make_learner(name)
        return learner.loss, learner.target_updater

    torch.manual_seed(0)
    assert_compiled_equals_eager(make, [make_batch(8) for _ in range(2)], "eager")


def test_diagnostics_leave_out_distances_between_pictures():
    torch.manual_seed(0)
    learner = make_learner("deflow")
    update, batch = UpdateStep(learner), make_batch(5)
    learner.diagnostics.use_data(make_batch(20))
    update(batch)
    found = learner.diagnostics(batch)
    assert {"q_base", "q_refined", "divergence_ratio"} <= set(found)
    assert "action_distance" not in found
