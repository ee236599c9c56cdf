"""What other people's pipelines bring: layouts, encoders, types and conventions that are not our own."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.objectives import SoftUpdate, ValueEstimators

from deflow_torchrl.modules import (
    BestOfNPolicy,
    ConsistencyNetwork,
    ConsistencyPolicy,
    DeFlowActor,
    DeterministicPolicy,
    DiffusionPolicy,
    FlowMatchingPolicy,
    GaussianPolicy,
    NoiseNetwork,
    OneStepPolicy,
    RefinementPolicy,
    TanhGaussianPolicy,
    make_noisy_qvalue_networks,
    make_one_step_network,
    make_policy_network,
    make_qvalue_networks,
    make_refinement_network,
    make_tanh_gaussian_network,
    make_value_network,
    make_velocity_network,
)
from deflow_torchrl.modules.critics import EncodedCritics, TwinCritic, aggregate
from deflow_torchrl.objectives import (
    BCLoss,
    CalQLLoss,
    ConsistencyACLoss,
    DeFlowLoss,
    DSRLLoss,
    FANLoss,
    FAWACLoss,
    FBRACLoss,
    FEditLoss,
    FlowMatchingLoss,
    FQLLoss,
    IDQLLoss,
    IFQLLoss,
    ImplicitQLoss,
    IQLLoss,
    QAMLoss,
    ReBRACLoss,
    RefinementLoss,
    RLPDLoss,
    SRPOLoss,
    TDCriticLoss,
    TRQAMLoss,
)
from tests.support import networks
from tests.support.losses import NEWEST, TERMS, DeFlowFloq, Floq, batch_of, build, make_flow_critics
from tests.support.networks import ACTION_DIM, HIDDEN, OBSERVATION_DIM, assert_compiled_equals_eager, make_actor, total
from tests.support.value_losses import make_batch

ALL = pytest.mark.parametrize("kind", list(TERMS), ids=lambda kind: kind.__name__)
TD = pytest.mark.parametrize(
    "kind", [kind for kind, terms in TERMS.items() if "loss_qvalue" in terms], ids=lambda kind: kind.__name__
)
METHODS = pytest.mark.parametrize(
    "kind",
    [FlowMatchingLoss, DeFlowLoss, FQLLoss, FBRACLoss, FAWACLoss, BCLoss, IQLLoss, IFQLLoss, ReBRACLoss, RLPDLoss],
    ids=lambda kind: kind.__name__,
)
ENCODED = 5


OBSERVATIONS = ("observation", ("sensors", "extra"))  # one of them nested


class Encoder(nn.Linear):
    """A linear layer that counts its calls, and the rows of each, while it runs eagerly."""

    def __init__(self, observations):
        super().__init__(observations * OBSERVATION_DIM, ENCODED)
        self.calls = []

    def forward(self, *observations):
        if not torch.compiler.is_compiling():
            self.calls.append(observations[0].shape[:-1].numel())
        return super().forward(torch.cat(observations, -1))


def encoder(out_key, in_keys=OBSERVATIONS):
    return TensorDictModule(Encoder(len(in_keys)), in_keys=list(in_keys), out_keys=[out_key])


def build_encoded(kind, *, critics=None, in_keys=OBSERVATIONS, flow_steps=3, **kwargs):
    """A loss whose parts each have an encoder of their own, and its encoders by part."""
    flow_steps = 10 if kind in NEWEST else flow_steps  # of which the batch has the noise

    def behind(policy, key):
        return TensorDictSequential(encoder(key, in_keys), policy)

    sizes = (ENCODED, ACTION_DIM, HIDDEN)
    flow = behind(
        FlowMatchingPolicy(make_velocity_network(*sizes), ACTION_DIM, flow_steps, in_keys=("flow_state", "noise")),
        "flow_state",
    )
    prior = behind(
        FlowMatchingPolicy(
            make_velocity_network(*sizes),
            ACTION_DIM,
            flow_steps,
            in_keys=("prior_state", "noise"),
            out_keys=("base_action",),
        ),
        "prior_state",
    )
    refinement = behind(
        RefinementPolicy(
            make_refinement_network(*sizes), ACTION_DIM, low=-1.0, high=1.0, in_keys=("refined_state", "base_action")
        ),
        "refined_state",
    )
    one_step = behind(
        OneStepPolicy(make_one_step_network(*sizes), ACTION_DIM, in_keys=("actor_state", "noise")), "actor_state"
    )
    gaussian = behind(GaussianPolicy(make_policy_network(*sizes), in_keys=("actor_state",)), "actor_state")
    deterministic = behind(DeterministicPolicy(make_policy_network(*sizes), in_keys=("actor_state",)), "actor_state")
    tanh_gaussian = behind(
        TanhGaussianPolicy(make_tanh_gaussian_network(*sizes), in_keys=("actor_state",)), "actor_state"
    )
    value = behind(make_value_network(ENCODED, HIDDEN, observation_key="value_state"), "value_state")
    tuned = behind(
        FlowMatchingPolicy(make_velocity_network(*sizes), ACTION_DIM, flow_steps, in_keys=("tuned_state", "noise")),
        "tuned_state",
    )
    edit_network = make_tanh_gaussian_network(ENCODED + ACTION_DIM, *sizes[1:])
    edit = behind(
        TanhGaussianPolicy(edit_network, in_keys=("edit_state", "base_action"), out_keys=("edit",)), "edit_state"
    )
    noise_network = NoiseNetwork(*sizes[:2], width=8, dropout=0.0)
    diffusion = behind(
        DiffusionPolicy(noise_network, ACTION_DIM, in_keys=("denoised_state", "noise")), "denoised_state"
    )
    consistency_network = ConsistencyNetwork(*sizes[:2], hidden_dims=(8,))
    consistency = behind(
        ConsistencyPolicy(consistency_network, ACTION_DIM, in_keys=("consistent_state", "noise")), "consistent_state"
    )
    latent_critics = EncodedCritics(
        encoder("latent_critic_state", in_keys), make_qvalue_networks(*sizes, observation_key="latent_critic_state")
    )
    noisy_critics = EncodedCritics(
        encoder("noisy_critic_state", in_keys), make_noisy_qvalue_networks(*sizes, observation_key="noisy_critic_state")
    )
    members = make_qvalue_networks(*sizes, observation_key="critic_state")
    critics = EncodedCritics(encoder("critic_state", in_keys), members) if critics is None else critics
    loss = {
        FlowMatchingLoss: lambda: FlowMatchingLoss(flow, **kwargs),
        RefinementLoss: lambda: RefinementLoss(
            DeFlowActor(prior, refinement), critics, target_divergence=1e-3, **kwargs
        ),
        TDCriticLoss: lambda: TDCriticLoss(DeFlowActor(prior, refinement), critics, **kwargs),
        DeFlowLoss: lambda: DeFlowLoss(DeFlowActor(prior, refinement), critics, **kwargs),
        FQLLoss: lambda: FQLLoss(flow, one_step, critics, **kwargs),
        FBRACLoss: lambda: FBRACLoss(flow, critics, **kwargs),
        FAWACLoss: lambda: FAWACLoss(flow, critics, **kwargs),
        BCLoss: lambda: BCLoss(gaussian, **kwargs),
        ImplicitQLoss: lambda: ImplicitQLoss(critics, value, **kwargs),
        IQLLoss: lambda: IQLLoss(gaussian, critics, value, temperature=2.0, **kwargs),
        IFQLLoss: lambda: IFQLLoss(flow, critics, value, num_samples=4, **kwargs),
        RLPDLoss: lambda: RLPDLoss(tanh_gaussian, critics, **kwargs),
        ReBRACLoss: lambda: ReBRACLoss(deterministic, critics, actor_bc_coef=0.3, critic_bc_coef=0.2, **kwargs),
        CalQLLoss: lambda: CalQLLoss(tanh_gaussian, critics, num_cql_samples=2, target_gap=0.8, **kwargs),
        IDQLLoss: lambda: IDQLLoss(diffusion, critics, value, **kwargs),
        SRPOLoss: lambda: SRPOLoss(deterministic, diffusion, critics, value, beta=0.1, **kwargs),
        ConsistencyACLoss: lambda: ConsistencyACLoss(consistency, critics, eta=0.1, num_target_samples=2, **kwargs),
        FEditLoss: lambda: FEditLoss(flow, edit, critics, edit_scale=0.2, **kwargs),
        QAMLoss: lambda: QAMLoss(
            flow, tuned, critics, edit_policy=edit, edit_scale=0.2, inverse_temperature=3.0, **kwargs
        ),
        TRQAMLoss: lambda: TRQAMLoss(flow, tuned, critics, kl_budget=1.0, **kwargs),
        DSRLLoss: lambda: DSRLLoss(flow, tanh_gaussian, critics, latent_critics, noise_scale=1.0, **kwargs),
        FANLoss: lambda: FANLoss(flow, one_step, noisy_critics, critics, **kwargs),
        Floq: lambda: FQLLoss(flow, one_step, make_flow_critics(), **kwargs),
        DeFlowFloq: lambda: DeFlowLoss(DeFlowActor(prior, refinement), make_flow_critics(), **kwargs),
    }[kind]()
    if "loss_qvalue" in TERMS[kind]:
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
        SoftUpdate(loss, tau=0.005)
    encoders = {"prior": prior, "refinement": refinement, "flow": flow, "one_step": one_step, "gaussian": gaussian,
                "deterministic": deterministic, "tanh_gaussian": tanh_gaussian, "value": value, "tuned": tuned,
                "edit": edit, "diffusion": diffusion, "consistency": consistency}  # fmt: skip
    found = {name: sequence[0].module for name, sequence in encoders.items()}
    ensembles = {"critic": critics, "latent_critic": latent_critics, "noisy_critic": noisy_critics}
    return loss, {**found, **{name: ensemble.encoder.module for name, ensemble in ensembles.items()}}


def encoded_batch(*shape, kind=None):
    batch = batch_of(kind, *shape)
    for state in (batch, batch["next"]):
        state["sensors", "extra"] = torch.randn(*batch.shape, OBSERVATION_DIM)
    return batch


PARTS = {  # term -> the encoders that it trains
    FlowMatchingLoss: {"loss_flow": {"flow"}},
    RefinementLoss: {"loss_actor": {"refinement"}, "loss_alpha": set()},
    TDCriticLoss: {"loss_qvalue": {"critic"}},
    DeFlowLoss: {
        "loss_flow": {"prior"}, "loss_actor": {"refinement"}, "loss_alpha": set(), "loss_qvalue": {"critic"}
    },
    FQLLoss: {"loss_flow": {"flow"}, "loss_actor": {"one_step"}, "loss_qvalue": {"critic"}},
    FBRACLoss: {"loss_flow": {"flow"}, "loss_actor": {"flow"}, "loss_qvalue": {"critic"}},
    FAWACLoss: {"loss_flow": {"flow"}, "loss_qvalue": {"critic"}},
    BCLoss: {"loss_actor": {"gaussian"}},
    ImplicitQLoss: {"loss_value": {"value"}, "loss_qvalue": {"critic"}},
    IQLLoss: {"loss_value": {"value"}, "loss_qvalue": {"critic"}, "loss_actor": {"gaussian"}},
    IFQLLoss: {"loss_value": {"value"}, "loss_qvalue": {"critic"}, "loss_flow": {"flow"}},
    ReBRACLoss: {"loss_qvalue": {"critic"}, "loss_actor": {"deterministic"}},
    RLPDLoss: {"loss_actor": {"tanh_gaussian"}, "loss_alpha": set(), "loss_qvalue": {"critic"}},
    CalQLLoss: {
        "loss_actor": {"tanh_gaussian"}, "loss_alpha": set(), "loss_alpha_prime": set(), "loss_qvalue": {"critic"}
    },
    IDQLLoss: {"loss_score": {"diffusion"}, "loss_value": {"value"}, "loss_qvalue": {"critic"}},
    SRPOLoss: {
        "loss_score": {"diffusion"}, "loss_value": {"value"}, "loss_qvalue": {"critic"}, "loss_actor": {"deterministic"}
    },
    ConsistencyACLoss: {
        "loss_consistency": {"consistency"}, "loss_actor": {"consistency"}, "loss_qvalue": {"critic"}
    },
    FEditLoss: {"loss_flow": {"flow"}, "loss_actor": {"edit"}, "loss_alpha": set(), "loss_qvalue": {"critic"}},
    QAMLoss: {
        "loss_flow": {"flow"}, "loss_actor": {"tuned"}, "loss_edit": {"edit"}, "loss_alpha": set(),
        "loss_qvalue": {"critic"},
    },
    TRQAMLoss: {"loss_flow": {"flow"}, "loss_actor": {"tuned"}, "loss_qvalue": {"critic"}},
    DSRLLoss: {
        "loss_flow": {"flow"}, "loss_actor": {"tanh_gaussian"}, "loss_alpha": set(), "loss_qvalue": {"critic"},
        "loss_latent": {"latent_critic"},
    },
    FANLoss: {
        "loss_flow": {"flow"}, "loss_actor": {"one_step"}, "loss_qvalue": {"noisy_critic"}, "loss_marginal": {"critic"}
    },
    # Flow critics read the state itself, behind no encoder.
    Floq: {"loss_flow": {"flow"}, "loss_actor": {"one_step"}, "loss_flow_critic": set(), "loss_qvalue": set()},
    DeFlowFloq: {
        "loss_flow": {"prior"}, "loss_actor": {"refinement"}, "loss_alpha": set(), "loss_flow_critic": set(),
        "loss_qvalue": set(),
    },
}  # fmt: skip


@ALL
def test_an_encoder_learns_inside_the_wall_of_its_part(kind):
    for name, owners in PARTS[kind].items():
        torch.manual_seed(0)
        loss, encoders = build_encoded(kind)
        out = loss(encoded_batch(32, kind=kind))
        assert set(out.keys()) == set(loss.out_keys)
        out[name].backward()
        touched = {part for part, it in encoders.items() if it.weight.grad is not None and bool(it.weight.grad.any())}
        # Critics are stacked into a copy, but not those of EncodedCritics: the object's own parameters learn.
        assert touched == owners


@ALL
def test_encoded_losses_give_what_the_same_losses_give_on_encoded_observations(kind):
    loss, _ = build_encoded(kind)
    reference, batch = build_encoded(kind)[0], encoded_batch(8, kind=kind)
    reference.load_state_dict(loss.state_dict())
    torch.testing.assert_close(loss(batch.clone()).to_dict(), reference(batch.clone()).to_dict())
    assert set(loss.in_keys) >= {"observation", ("sensors", "extra"), "action"}
    loss(batch.select(*loss.in_keys, *loss._optional_keys(), strict=False))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    torch.testing.assert_close(copied(batch.clone()).to_dict(), reference(batch.clone()).to_dict())
    for name in TERMS[kind]:
        term, _ = getattr(loss, f"{name.removeprefix('loss_')}_loss")(batch.clone())
        torch.testing.assert_close(term, reference(batch.clone())[name])


def test_an_identity_encoder_changes_no_number():
    eye = nn.Linear(2 * OBSERVATION_DIM, 2 * OBSERVATION_DIM, bias=False)
    with torch.no_grad():
        eye.weight.copy_(torch.eye(2 * OBSERVATION_DIM))
    join = TensorDictModule(
        lambda a, b: torch.cat([a, b], -1), in_keys=["observation", ("sensors", "extra")], out_keys=["joined"]
    )
    sizes = (2 * OBSERVATION_DIM, ACTION_DIM, HIDDEN)
    flow, one_step = make_velocity_network(*sizes), make_one_step_network(*sizes)
    critics = make_qvalue_networks(*sizes)
    plain = FQLLoss(FlowMatchingPolicy(flow, ACTION_DIM), OneStepPolicy(one_step, ACTION_DIM), critics)
    members = make_qvalue_networks(*sizes, observation_key="encoded")
    for member, critic in zip(members, critics, strict=True):
        member.load_state_dict(critic.state_dict())

    def encoded(policy):
        own = TensorDictModule(copy.deepcopy(eye), in_keys=["joined"], out_keys=["encoded"])
        return TensorDictSequential(TensorDictSequential(join, own), policy)

    loss = FQLLoss(
        encoded(FlowMatchingPolicy(flow, ACTION_DIM, in_keys=("encoded", "noise"))),
        encoded(OneStepPolicy(one_step, ACTION_DIM, in_keys=("encoded", "noise"))),
        EncodedCritics(
            TensorDictSequential(join, TensorDictModule(copy.deepcopy(eye), in_keys=["joined"], out_keys=["encoded"])),
            members,
        ),
    )
    batch = encoded_batch(16)
    joined = batch.clone()
    for state in (joined, joined["next"]):
        state["observation"] = torch.cat([state["observation"], state["sensors", "extra"]], -1)
    for it in (plain, loss):
        it.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
        SoftUpdate(it, tau=0.1)
    torch.testing.assert_close(loss(batch).to_dict(), plain(joined).to_dict())


def test_an_encoder_runs_once_per_state_and_never_per_term_or_euler_step():
    loss, encoders = build_encoded(DeFlowLoss)
    for it in encoders.values():
        it.calls.clear()
    loss(encoded_batch(8))
    for part in ("prior", "refinement", "critic"):
        assert encoders[part].calls == [8, 8]  # at s, with gradient, and at s'


@pytest.mark.slow
@pytest.mark.parametrize("kind", TERMS)
def test_encoders_compile(kind):
    def make():
        loss, _ = build_encoded(kind, flow_steps=1)
        return loss, SoftUpdate(loss, tau=0.1) if "loss_qvalue" in TERMS[kind] else None

    assert_compiled_equals_eager(make, [encoded_batch(16) for _ in range(2)], "eager")


def test_the_best_of_n_acts_behind_an_encoder():
    loss, encoders = build_encoded(IFQLLoss)
    state = encoded_batch(6).select("observation", "sensors")
    encoders["flow"].calls.clear()
    with torch.no_grad():
        assert loss.actor_network(state)["action"].shape == (6, ACTION_DIM)
    assert encoders["flow"].calls == [6]


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@METHODS
def test_a_policy_behind_encoders_is_exported_with_them(kind, tmp_path):
    from deflow_torchrl.deploy import load_policy
    from deflow_torchrl.export import export_policy

    loss, _ = build_encoded(kind, in_keys=OBSERVATIONS[:1])
    # Best-of-N chooses by its critics and is not exported; its flow is.
    policy = loss.flow_policy if kind in (FlowMatchingLoss, IFQLLoss) else loss.actor_network
    export_policy(policy, tmp_path / "policy.pt2", observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM)
    inputs = {"observation": torch.randn(4, OBSERVATION_DIM), "noise": torch.randn(4, ACTION_DIM)}
    with torch.no_grad():
        expected = policy(TensorDict(inputs, batch_size=[4]))["action"]
    given = {key: value.numpy() for key, value in inputs.items() if key in policy.in_keys}
    exported = load_policy(tmp_path / "policy.pt2", trusted=True)
    torch.testing.assert_close(torch.as_tensor(exported(**given)), expected, rtol=1e-5, atol=1e-5)


# -- critics ----------------------------------------------------------------------------------------------------------


def test_values_of_a_list_are_each_critics_own_with_targets_and_without_gradient():
    critics = make_qvalue_networks(OBSERVATION_DIM, ACTION_DIM, HIDDEN, num_qvalue_nets=3)
    loss = TDCriticLoss(make_actor(), critics)
    SoftUpdate(loss, tau=0.5)
    batch = make_batch(7)
    expected = torch.stack([it(batch.clone())["state_action_value"].squeeze(-1) for it in critics])
    torch.testing.assert_close(loss.critics.values(batch), expected)
    torch.testing.assert_close(TwinCritic(critics).values(batch), expected)
    assert not loss.critics.values(batch, frozen=True).requires_grad
    with torch.no_grad():
        loss.qvalue_network_params.apply_(lambda parameter: parameter.mul_(2))
    torch.testing.assert_close(loss.critics.values(batch, target=True), expected.detach())
    assert not torch.allclose(loss.critics.values(batch), expected)
    for how, value in (("mean", expected.mean(0)), ("min", expected.min(0).values)):
        torch.testing.assert_close(aggregate(expected, how), value)
    torch.testing.assert_close(aggregate(expected, 0.5), expected.mean(0) - 0.5 * expected.std(0, correction=0))


def test_a_trunk_shared_by_the_critics_of_a_list_is_warned_of():
    trunk = nn.Linear(OBSERVATION_DIM + ACTION_DIM, 8)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.head = trunk, nn.Linear(8, 1)

        def forward(self, observation, action):
            return self.head(self.trunk(torch.cat([observation, action], -1)))

    critics = [
        TensorDictModule(Critic(), in_keys=["observation", "action"], out_keys=["state_action_value"]) for _ in range(2)
    ]
    with pytest.warns(UserWarning, match="share parameters"):
        TDCriticLoss(make_actor(), critics)


def test_an_encoder_that_the_critics_do_not_read_is_refused_with_both_names():
    members = make_qvalue_networks(ENCODED, ACTION_DIM, HIDDEN, observation_key="critic_state")
    with pytest.raises(ValueError, match=r"other.*critic_state"):
        EncodedCritics(encoder("other"), members)


@pytest.mark.parametrize("kind", [IFQLLoss, IDQLLoss, FEditLoss], ids=lambda kind: kind.__name__)
def test_the_policy_that_acts_has_the_keys_of_its_loss(kind):
    critics = [
        TensorDictModule(critic.module, in_keys=["obs", "act"], out_keys=["q"])
        for critic in make_qvalue_networks(OBSERVATION_DIM, ACTION_DIM, HIDDEN)
    ]
    keys = {"in_keys": ("obs", "z"), "out_keys": ("act",)}
    flow = FlowMatchingPolicy(make_velocity_network(OBSERVATION_DIM, ACTION_DIM, HIDDEN), ACTION_DIM, **keys)
    value = TensorDictModule(make_value_network(OBSERVATION_DIM, HIDDEN).module, in_keys=["obs"], out_keys=["v"])
    if kind is IFQLLoss:
        loss = kind(flow, critics, value, num_samples=3)
    elif kind is IDQLLoss:
        noise = NoiseNetwork(OBSERVATION_DIM, ACTION_DIM, width=8, dropout=0.0)
        loss = kind(DiffusionPolicy(noise, ACTION_DIM, **keys), critics, value)
    else:
        network = make_tanh_gaussian_network(OBSERVATION_DIM + ACTION_DIM, ACTION_DIM, HIDDEN)
        edit = TanhGaussianPolicy(network, in_keys=("obs", "base"), out_keys=("edit",))
        loss = kind(flow, edit, critics, edit_scale=0.2)
    loss.set_keys(action="act", state_action_value="q")
    policy = loss.actor_network
    assert (policy.in_keys, policy.out_keys[-1]) == (["obs", "z"], "act")
    acted = policy(TensorDict(obs=torch.zeros(2, OBSERVATION_DIM), batch_size=[2]))
    assert acted["act"].shape == (2, ACTION_DIM)
    assert {"action", "noise", "base_action"}.isdisjoint(acted.keys())


# -- layouts and types ------------------------------------------------------------------------------------------------


def agents(batch, number=3):
    """The batch with a dimension of agents inside its entries, [B, n, ...], and batch size [B]."""
    out = batch.reshape(-1, number)
    return TensorDict(
        {key: entry for key, entry in out.items() if key != "next"} | {"next": dict(out["next"].items())},
        batch_size=out.shape[:1],
    )


@ALL
@pytest.mark.parametrize("number", [3, 4])
def test_entries_may_have_more_dimensions_than_the_batch(kind, number):
    loss, batch = build(kind), batch_of(kind, 12)
    expected = loss(batch.clone())
    wide = agents(batch, number)
    torch.testing.assert_close(loss(wide).to_dict(), expected.to_dict())
    if "loss_qvalue" in TERMS[kind]:
        assert wide["td_error"].shape == (12 // number, number)
    unreduced = build(kind, reduction="none")
    unreduced.load_state_dict(loss.state_dict())
    out = unreduced(agents(batch, number))
    for name in TERMS[kind]:
        assert out[name].shape == (12 // number, number)
        torch.testing.assert_close(out[name].mean(), expected[name])


@ALL
def test_a_mask_of_rows_masks_all_their_agents(kind):
    loss, batch = build(kind), batch_of(kind, 16)
    wide = agents(batch, 4)
    keep = torch.tensor([True, False, True, True])
    expected = loss(wide[keep])
    wide["collector", "mask"] = keep.unsqueeze(-1)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        wide[key][~keep] = float("nan")
    torch.testing.assert_close(loss(wide).to_dict(), expected.to_dict())


@TD
def test_the_next_state_of_a_terminated_row_reaches_no_number(kind):
    if kind is CalQLLoss:
        pytest.skip(
            "as the authors' code has it, the policy's actions at s' bound the values at s also behind a terminal row"
        )
    loss, batch = build(kind), batch_of(kind, 16)
    batch["next", "terminated"][:4] = batch["next", "done"][:4] = True
    expected = loss(batch.clone())
    total(expected).backward()
    gradients = [p.grad.clone() for p in loss.parameters() if p.grad is not None]
    loss.zero_grad()
    end = batch["next", "terminated"].squeeze(-1)
    for key in ("observation", "action"):
        batch["next", key][end] = float("nan")
    out = loss(batch)
    torch.testing.assert_close(out.to_dict(), expected.to_dict())
    total(out).backward()
    torch.testing.assert_close([p.grad for p in loss.parameters() if p.grad is not None], gradients)


@TD
def test_without_terminated_done_cuts_the_bootstrap(kind):
    loss, batch = build(kind), batch_of(kind, 16)
    batch["next", "terminated"] = batch["next", "done"]
    expected = loss(batch.clone())
    torch.testing.assert_close(loss(batch.exclude(("next", "terminated"))).to_dict(), expected.to_dict())


def test_divergence_alpha_and_their_loss_are_float32_under_autocast():
    loss, batch = build(DeFlowLoss), make_batch(64)
    exact = loss(batch.clone())
    loss.target_divergence = float(exact["divergence"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(batch.clone())
    assert {out[name].dtype for name in ("divergence", "alpha", "loss_alpha", "loss_qvalue")} == {torch.float32}
    torch.testing.assert_close(out["divergence"], exact["divergence"], rtol=5e-3, atol=0)
    assert abs(float(out["loss_alpha"].detach())) < 0.01 * float(exact["divergence"])


# -- conventions ------------------------------------------------------------------------------------------------------


class TheirModel(nn.Module):
    """A flow as TorchRL's main branch has it: no ``velocity``, no ``draw_noise``."""

    def __init__(self, velocity_network, action_dim, num_steps):
        super().__init__()
        self.velocity_network, self.action_dim, self.num_steps = velocity_network, action_dim, num_steps
        self.low, self.high = torch.tensor(-1.0), torch.tensor(1.0)

    def forward(self, observation, noise=None):
        x = torch.randn(*observation.shape[:-1], self.action_dim) if noise is None else noise
        for step in range(self.num_steps):
            t = torch.full_like(x[..., :1], step / self.num_steps)
            x = x + self.velocity_network(torch.cat([observation, x, t], -1)) / self.num_steps
        return x.clamp(self.low, self.high)


class TheirOneStep(nn.Module):
    def __init__(self, network, action_dim):
        super().__init__()
        self.network, self.action_dim = network, action_dim
        self.low, self.high = torch.tensor(-1.0), torch.tensor(1.0)

    def forward(self, observation, noise=None):
        return self.network(torch.cat([observation, noise], -1)).clamp(self.low, self.high)


def test_policies_of_another_package_are_known_by_what_they_can_do():
    sizes = (OBSERVATION_DIM, ACTION_DIM, HIDDEN)
    velocity, network = make_velocity_network(*sizes), make_one_step_network(*sizes)
    critics = make_qvalue_networks(*sizes)
    ours = FQLLoss(FlowMatchingPolicy(velocity, ACTION_DIM, 4), OneStepPolicy(network, ACTION_DIM), critics)
    keys = {"in_keys": ["observation", "noise"], "out_keys": ["action"]}
    theirs = FQLLoss(
        TensorDictModule(TheirModel(velocity, ACTION_DIM, 4), **keys),
        TensorDictModule(TheirOneStep(network, ACTION_DIM), **keys),
        critics,
    )
    batch = make_batch(16)
    for loss in (ours, theirs):
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
        SoftUpdate(loss, tau=0.1)
    torch.testing.assert_close(theirs(batch.clone()).to_dict(), ours(batch.clone()).to_dict())


def test_the_critics_entry_may_be_called_value():
    critics = make_qvalue_networks(OBSERVATION_DIM, ACTION_DIM, HIDDEN)
    for critic in critics:
        critic.out_keys = ["q"]
    loss = DeFlowLoss(make_actor(), critics)
    loss.set_keys(value="q")
    assert loss.tensor_keys.state_action_value == "q"
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    SoftUpdate(loss, tau=0.1)
    loss(make_batch())


@ALL
def test_every_loss_with_a_policy_shows_the_one_that_acts(kind):
    loss = build(kind)
    if kind is ImplicitQLoss:
        assert not hasattr(loss, "actor_network")
        return
    policy = loss.actor_network
    assert isinstance(policy, nn.Module)
    assert {id(parameter) for parameter in policy.parameters()} <= {id(parameter) for parameter in loss.parameters()}
    assert "action" in policy.out_keys or kind is FlowMatchingLoss
    if kind is IFQLLoss:
        assert isinstance(policy, BestOfNPolicy)
        assert not any("actor_network" in name for name in loss.state_dict())


COEFFICIENTS = {
    RefinementLoss: {"target_divergence": 0.5},
    DeFlowLoss: {"target_divergence": 0.5},
    FQLLoss: {"alpha": 0.5},
    FBRACLoss: {"alpha": 0.5},
    FAWACLoss: {"temperature": 0.5, "max_weight": 1.01},
    ImplicitQLoss: {"expectile": 0.6},
    IQLLoss: {"expectile": 0.6, "temperature": 0.5},
    IFQLLoss: {"expectile": 0.6},
    ReBRACLoss: {"actor_bc_coef": 0.5, "critic_bc_coef": 0.5, "policy_noise": 0.5, "noise_clip": 0.1},
    IDQLLoss: {"expectile": 0.6},
    SRPOLoss: {"expectile": 0.6, "beta": 0.5},
    ConsistencyACLoss: {"eta": 0.5},
    FEditLoss: {"edit_scale": 0.5},
    QAMLoss: {"inverse_temperature": 1.0, "edit_scale": 0.5},
    FANLoss: {"alpha": 0.5, "critic_alpha": 0.5, "expectile": 0.6},
    Floq: {"alpha": 0.5},
    DeFlowFloq: {"target_divergence": 0.5},
}


@pytest.mark.parametrize("kind", list(COEFFICIENTS), ids=lambda kind: kind.__name__)
def test_every_coefficient_can_be_assigned_to(kind):
    for name, value in COEFFICIENTS[kind].items():
        torch.manual_seed(1)
        loss, batch = build(kind), batch_of(kind, 16)
        before = loss(batch.clone())
        buffer = loss.state_dict()[name]
        setattr(loss, name, value)
        assert loss.state_dict()[name].data_ptr() == buffer.data_ptr()
        after = loss(batch.clone())
        assert any(not torch.equal(after[key], before[key]) for key in TERMS[kind])
        torch.manual_seed(1)
        built = build(kind, **({name: value} if kind is not RefinementLoss else {}))
        if kind is not RefinementLoss:
            torch.testing.assert_close(built(batch.clone()).to_dict(), after.to_dict())


def test_a_fixed_alpha_can_be_assigned_to_and_an_adaptive_one_says_why_not():
    loss, batch = build(DeFlowLoss, fixed_alpha=1.0), make_batch()
    loss.fixed_alpha = 0.25
    torch.testing.assert_close(loss(batch)["alpha"], torch.tensor(0.25))
    torch.testing.assert_close(loss.fixed_alpha, torch.tensor(0.25))
    with pytest.raises(AttributeError, match="tunes itself"):
        build(DeFlowLoss).fixed_alpha = 0.25


def test_a_frozen_prior_travels_in_the_state_dict():
    frozen, fresh = build(DeFlowLoss, freeze_prior=True), build(DeFlowLoss)
    fresh.load_state_dict(frozen.state_dict())
    assert fresh.prior_frozen
    assert "loss_flow" not in fresh(make_batch())
    old = {name: value for name, value in build(DeFlowLoss).state_dict().items() if "_extra_state" not in name}
    build(DeFlowLoss).load_state_dict(old)
    assert not hasattr(build(FQLLoss), "freeze_prior_")


# -- chunks -----------------------------------------------------------------------------------------------------------


def test_valid_steps_of_a_chunk_mask_the_flow_and_its_last_one_the_critics():
    steps, width = 3, 2
    sizes = (OBSERVATION_DIM, steps * width, HIDDEN)
    flow = FlowMatchingPolicy(make_velocity_network(*sizes), steps * width)
    loss = FBRACLoss(flow, make_qvalue_networks(*sizes), alpha=1.0)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    SoftUpdate(loss, tau=0.1)

    batch = networks.make_batch(4, action_dim=steps * width)
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).float()
    plain = loss(batch.clone())
    with torch.no_grad():
        time, noise, action = batch["flow_time"], batch["flow_noise"], batch["action"]
        velocity = flow.module.velocity(batch["observation"], (1 - time) * noise + time * action, time)
        error = (velocity - (action - noise)) ** 2
        following = batch["next"]
        next_action = flow.module(following["observation"], following["noise"])
        following = following.select("observation").set("action", next_action)
        target = loss._bootstrap(batch, loss.critics.values(following, target=True).mean(0))
        squared = ((loss.critics.values(batch) - target) ** 2).mean(0)
    by_step = loss(batch.clone().set("valid", valid))
    torch.testing.assert_close(
        by_step["loss_flow"], (error.reshape(4, steps, width) * valid.unsqueeze(-1)).sum() / error.numel()
    )
    torch.testing.assert_close(by_step["loss_qvalue"], (squared * valid[:, -1]).sum() / 4)
    torch.testing.assert_close(by_step["loss_actor"], plain["loss_actor"])
    by_row = loss(batch.clone().set("valid", valid[:, -1:]))
    torch.testing.assert_close(by_row["loss_flow"], (error * valid[:, -1:]).sum() / error.numel())
    torch.testing.assert_close(by_row["loss_qvalue"], by_step["loss_qvalue"])
