import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from deflow_torchrl.modules import (
    DeFlowActor,
    DeterministicPolicy,
    FlowMatchingPolicy,
    GaussianPolicy,
    OneStepPolicy,
    RefinementPolicy,
    make_refinement_network,
    make_value_network,
    make_velocity_network,
)
from deflow_torchrl.modules.policies import check_encoders, is_flow, last_policy
from tests.support.networks import ACTION_DIM, OBSERVATION_DIM, make_actor


class ConstantVelocity(nn.Module):
    """v = c + t: the Euler sum of M steps is c + (M - 1) / (2 M), by hand."""

    def __init__(self, action_dim, constant):
        super().__init__()
        self.action_dim, self.constant = action_dim, constant
        self.times = []

    def forward(self, inputs):
        self.times.append(inputs[..., -1:].unique().item())
        return torch.full((*inputs.shape[:-1], self.action_dim), self.constant) + inputs[..., -1:]


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler_integration_visits_i_over_m_and_sums_the_velocities(steps):
    network = ConstantVelocity(2, 0.1)
    noise = torch.tensor([[0.05, -0.2]])
    action = FlowMatchingPolicy(network, 2, steps)(
        TensorDict(observation=torch.zeros(1, 3), noise=noise, batch_size=[1])
    )
    assert network.times == pytest.approx([step / steps for step in range(steps)])
    torch.testing.assert_close(action["action"], noise + 0.1 + (steps - 1) / (2 * steps))


def test_the_network_is_called_with_observation_x_and_time_in_this_order():
    seen = []

    class Spy(nn.Module):
        def forward(self, inputs):
            seen.append(inputs.clone())
            return torch.zeros(*inputs.shape[:-1], 2)

    observation, noise = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.4, 0.5]])
    FlowMatchingPolicy(Spy(), 2, 1)(TensorDict(observation=observation, noise=noise, batch_size=[1]))
    torch.testing.assert_close(seen[0], torch.tensor([[1.0, 2.0, 3.0, 0.4, 0.5, 0.0]]))


def test_clipping_happens_after_the_last_step_only():
    class Boomerang(nn.Module):
        # Out to 3 in the first half, back by 2.5 in the second: a clip on the way would end at -1.
        def forward(self, inputs):
            time = inputs[..., -1:]
            return torch.where(time < 0.5, 6.0, -5.0)

    policy = FlowMatchingPolicy(Boomerang(), 1, 2)
    action = policy(TensorDict(observation=torch.zeros(1, 1), noise=torch.zeros(1, 1), batch_size=[1]))["action"]
    torch.testing.assert_close(action, torch.tensor([[0.5]]))
    far = policy(TensorDict(observation=torch.zeros(1, 1), noise=torch.full((1, 1), 9.0), batch_size=[1]))["action"]
    torch.testing.assert_close(far, torch.tensor([[1.0]]))


@pytest.mark.parametrize("mode", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
def test_missing_noise_is_drawn_also_under_deterministic_exploration(mode):
    policy = FlowMatchingPolicy(make_velocity_network(OBSERVATION_DIM, ACTION_DIM, (8,)), ACTION_DIM)
    td = TensorDict(observation=torch.zeros(5, OBSERVATION_DIM), batch_size=[5])
    with set_exploration_type(mode):
        drawn = policy(td.clone())["action"]
    assert len(drawn.unique(dim=0)) == 5


def test_noise_drawn_equals_noise_given_with_the_same_seed():
    actor = make_actor()
    td = TensorDict(observation=torch.randn(6, OBSERVATION_DIM), batch_size=[6])
    torch.manual_seed(3)
    drawn = actor(td.clone())["action"]
    torch.manual_seed(3)
    td["noise"] = torch.randn(6, ACTION_DIM)
    torch.testing.assert_close(actor(td)["action"], drawn, rtol=0, atol=0)


def test_bounds_may_be_tensors_and_move_with_the_module():
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 2.0])
    policy = FlowMatchingPolicy(ConstantVelocity(2, 50.0), 2, low=low, high=high)
    action = policy(TensorDict(observation=torch.zeros(1, 1), batch_size=[1]))["action"]
    torch.testing.assert_close(action[0], high)
    assert policy.to(torch.float64).module.low.dtype == torch.float64
    assert "module.low" in policy.state_dict()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"action_dim": 0}, "must be positive"),
        ({"num_steps": 0}, "must be positive"),
        ({"low": 1.0, "high": 1.0}, "strictly less"),
        ({"low": float("nan")}, "strictly less"),
        ({"in_keys": ("a", "b", "c")}, "in_keys"),
        ({"out_keys": ("a", "b")}, "out_keys"),
    ],
)
def test_wrong_arguments_of_the_prior_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchingPolicy(nn.Linear(3, 1), **{"action_dim": 1, **kwargs})


@pytest.mark.parametrize(
    "bound", [torch.full((ACTION_DIM - 1,), -1.0), torch.full((5, 1), -1.0)], ids=["narrow", "rows"]
)
def test_bounds_of_another_width_are_refused(bound):
    with pytest.raises(ValueError, match=rf"low has the shape .*; it is one number, or one for each of {ACTION_DIM}"):
        FlowMatchingPolicy(make_velocity_network(OBSERVATION_DIM, ACTION_DIM, (8,)), ACTION_DIM, low=bound)
    with pytest.raises(ValueError, match="low has the shape"):
        RefinementPolicy(nn.Identity(), ACTION_DIM, low=bound, high=1.0)


def test_refinement_adds_its_shift_and_clips_the_action_but_not_the_shift():
    network = nn.Linear(2, 1)
    nn.init.zeros_(network.weight)
    nn.init.constant_(network.bias, 0.7)
    policy = RefinementPolicy(network, 1, low=-1.0, high=1.0)
    td = policy(TensorDict(observation=torch.zeros(2, 1), base_action=torch.tensor([[0.1], [0.9]]), batch_size=[2]))
    torch.testing.assert_close(td["refinement"], torch.full((2, 1), 0.7))
    torch.testing.assert_close(td["action"], torch.tensor([[0.8], [1.0]]))


def test_refinement_is_per_sampled_action_not_per_state():
    # Instance-level: at one state, two base actions get different shifts.
    actor = make_actor()
    observation = torch.randn(1, OBSERVATION_DIM).expand(2, -1)
    noise = torch.tensor([[1.0] * ACTION_DIM, [-1.0] * ACTION_DIM])
    td = actor(TensorDict(observation=observation, noise=noise, batch_size=[2]))
    assert not torch.allclose(td["refinement"][0], td["refinement"][1])


def test_the_prior_policy_acts_with_the_base_action_and_shares_its_weights():
    actor = make_actor()
    prior = actor.prior_policy()
    td = TensorDict(observation=torch.randn(6, OBSERVATION_DIM), noise=torch.randn(6, ACTION_DIM), batch_size=[6])
    torch.testing.assert_close(prior(td.clone())["action"], actor(td.clone())["base_action"])
    shared = {id(parameter) for parameter in actor.flow_policy.parameters()}
    assert {id(parameter) for parameter in prior.parameters()} == shared


def test_an_actor_takes_any_prior_that_writes_the_base_action():
    prior = TensorDictModule(nn.Linear(OBSERVATION_DIM, ACTION_DIM), in_keys=["observation"], out_keys=["base_action"])
    actor = DeFlowActor(
        prior, RefinementPolicy(nn.Linear(OBSERVATION_DIM + ACTION_DIM, ACTION_DIM), ACTION_DIM, low=-1.0, high=1.0)
    )
    assert actor(TensorDict(observation=torch.zeros(2, OBSERVATION_DIM), batch_size=[2]))["action"].shape == (
        2,
        ACTION_DIM,
    )


def test_a_prior_of_another_kind_acts_alone_inside_the_bounds():
    linear = nn.Linear(OBSERVATION_DIM, ACTION_DIM)
    prior = TensorDictModule(linear, in_keys=["observation"], out_keys=["base_action"])
    network, low = nn.Linear(OBSERVATION_DIM + ACTION_DIM, ACTION_DIM), torch.tensor([-0.1, -0.2, -0.3])
    alone = DeFlowActor(prior, RefinementPolicy(network, ACTION_DIM, low=low, high=0.5)).prior_policy()
    td = TensorDict(observation=10 * torch.randn(50, OBSERVATION_DIM), batch_size=[50])
    action = alone(td.clone())["action"]
    torch.testing.assert_close(action, linear(td["observation"]).clamp(low, torch.tensor(0.5)))
    assert {id(parameter) for parameter in alone.parameters()} == {id(parameter) for parameter in linear.parameters()}
    copied = pickle.loads(pickle.dumps(alone))
    torch.testing.assert_close(copied(td)["action"], action)


def test_an_actor_whose_parts_do_not_fit_is_refused():
    flow = FlowMatchingPolicy(nn.Linear(OBSERVATION_DIM + ACTION_DIM + 1, ACTION_DIM), ACTION_DIM)
    with pytest.raises(ValueError, match="base_action"):
        DeFlowActor(
            flow, RefinementPolicy(nn.Linear(OBSERVATION_DIM + ACTION_DIM, ACTION_DIM), ACTION_DIM, low=-1.0, high=1.0)
        )


def test_the_actor_drives_a_torchrl_collector():
    from torchrl.collectors import Collector
    from torchrl.envs import PendulumEnv  # pure torch, no simulator needed

    actor = make_actor(observation_dim=3, action_dim=1)
    stack = TensorDictModule(
        lambda th, thdot: torch.stack([th.cos(), th.sin(), thdot], -1),
        in_keys=["th", "thdot"],
        out_keys=["observation"],
    )
    collector = Collector(
        PendulumEnv(),
        TensorDictSequential(stack, actor),
        frames_per_batch=10,
        total_frames=10,
        auto_register_policy_transforms=True,
    )
    (data,) = list(collector)
    assert data["action"].shape == (10, 1)
    assert data["action"].abs().max() <= 1
    collector.shutdown()


def make_encoder(out_key="encoded", in_key="observation"):
    return TensorDictModule(nn.Linear(OBSERVATION_DIM, 5), in_keys=[in_key], out_keys=[out_key])


def make_flow(*, out_key="base_action", encoded=True):
    network = make_velocity_network(5 if encoded else OBSERVATION_DIM, ACTION_DIM, (8,))
    in_keys = ("encoded" if encoded else "observation", "noise")
    return FlowMatchingPolicy(network, ACTION_DIM, in_keys=in_keys, out_keys=(out_key,))


def make_refinement(observation_key="features"):
    network = make_refinement_network(5, ACTION_DIM, (8,))
    return RefinementPolicy(network, ACTION_DIM, low=-1.0, high=1.0, in_keys=(observation_key, "base_action"))


class UpstreamModel(nn.Module):
    """The interface of the model in TorchRL's own FlowMatchingPolicy."""

    def __init__(self):
        super().__init__()
        self.velocity_network = nn.Linear(5 + ACTION_DIM + 1, ACTION_DIM)

    def velocity(self, observation, action, time):
        return self.velocity_network(torch.cat((observation, action, time), -1))

    def forward(self, observation, noise):
        return noise + self.velocity(observation, noise, torch.zeros_like(noise[..., :1]))


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("upstream", [True, False])
def test_encoders_may_stand_before_both_parts_of_an_actor(noise, upstream):
    encoder, features, flow, refinement = make_encoder(), make_encoder("features"), make_flow(), make_refinement()
    if upstream:
        flow = TensorDictModule(UpstreamModel(), in_keys=["encoded", "noise"], out_keys=["base_action"])
        noise = True
    prior, refine = TensorDictSequential(encoder, flow), TensorDictSequential(features, refinement)
    actor = DeFlowActor(prior, refine)
    assert actor[0] is actor.flow_policy is prior
    assert actor[1] is actor.refinement_policy is refine
    assert (actor.base_action_key, actor.action_key) == ("base_action", "action")
    td = TensorDict(observation=torch.randn(6, OBSERVATION_DIM), batch_size=[6])
    z = torch.randn(6, ACTION_DIM)
    if noise:
        td["noise"] = z
    torch.manual_seed(4)
    out = actor(td.clone())
    torch.manual_seed(4)
    base = flow.module(encoder.module(td["observation"]), td.get("noise", None))
    shift, action = refinement.module(features.module(td["observation"]), base)
    torch.testing.assert_close((out["base_action"], out["refinement"], out["action"]), (base, shift, action))
    torch.manual_seed(4)
    alone = actor.prior_policy()
    torch.testing.assert_close(alone(td.clone())["action"], base)
    assert {id(parameter) for parameter in alone.parameters()} == {id(parameter) for parameter in prior.parameters()}


def test_the_policy_behind_encoders_is_found_by_what_it_does():
    flow, refinement = make_flow(), make_refinement()
    nested = TensorDictSequential(make_encoder("raw"), TensorDictSequential(make_encoder(in_key="raw"), flow))
    assert last_policy(nested) is last_policy(flow) is flow
    upstream = TensorDictModule(UpstreamModel(), in_keys=["encoded", "noise"], out_keys=["action"])
    assert is_flow(nested)
    assert is_flow(upstream)
    assert not is_flow(refinement)
    assert not is_flow(make_encoder())


def test_an_encoder_that_nothing_reads_is_refused():
    unread = TensorDictSequential(make_encoder(), make_flow(encoded=False))
    with pytest.raises(
        ValueError, match=r"writes \['encoded'\], but the policy behind it reads \['observation', 'noise'\]"
    ):
        check_encoders(unread)
    for prior, refinement in (
        (unread, make_refinement("observation")),
        (make_flow(encoded=False), TensorDictSequential(make_encoder(), make_refinement())),
    ):
        with pytest.raises(ValueError, match="the encoder writes"):
            DeFlowActor(prior, refinement)
    with pytest.raises(TypeError, match="must be a RefinementPolicy, got a TensorDictModule"):
        DeFlowActor(make_flow(), make_encoder())


ROWS = TensorDict(observation=torch.zeros(4, 5, dtype=torch.float64), noise=torch.zeros(4, 2), batch_size=[4])


@pytest.mark.parametrize(
    "policy",
    [
        FlowMatchingPolicy(make_velocity_network(5, 2, (8,)), 2),
        OneStepPolicy(nn.Linear(7, 2), 2),
        GaussianPolicy(nn.Linear(5, 2)),
        DeterministicPolicy(nn.Linear(5, 2), noise_scale=0.1),
        RefinementPolicy(nn.Linear(7, 2), 2, low=-1.0, high=1.0, in_keys=("observation", "noise")),
        make_value_network(5, (8,)),
        TensorDictSequential(OneStepPolicy(nn.Linear(7, 2), 2)),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_an_observation_of_another_dtype_is_named(policy):
    message = (
        "^'observation' is torch.float64, but the network computes in torch.float32: convert the input.*DoubleToFloat"
    )
    with torch.no_grad():
        with pytest.raises(TypeError, match=message):
            policy(ROWS.clone())
        with pytest.raises(TypeError, match=message):
            policy(**{key: ROWS[key] for key in policy.in_keys})
        policy.to(torch.float64)(ROWS.double())
        policy.to(torch.float32)(ROWS.float())
    with pytest.raises(RuntimeError, match="shapes"):
        policy(ROWS.float().apply(lambda entry: torch.cat([entry, entry], -1)))


def test_a_network_that_converts_its_input_itself_is_called():
    class Converting(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    policy = GaussianPolicy(Converting(5, 2))
    assert policy(ROWS.clone())["action"].dtype == torch.float32


@pytest.mark.parametrize("part", ["network", "layer", "velocity"])
def test_a_forward_replaced_on_the_instance_is_called_by_the_sampler(part):
    """As accelerate and libraries that offload weights do."""
    policy = FlowMatchingPolicy(make_velocity_network(OBSERVATION_DIM, ACTION_DIM, (8, 8)), ACTION_DIM)
    td = TensorDict(observation=torch.randn(6, OBSERVATION_DIM), noise=torch.randn(6, ACTION_DIM), batch_size=[6])
    owner = {"network": policy.module.velocity_network, "layer": policy.module.velocity_network[0]}.get(
        part, policy.module
    )
    name = "velocity" if part == "velocity" else "forward"
    original = getattr(owner, name)
    setattr(owner, name, lambda *inputs: -original(*inputs))
    expected = policy(td.clone())["action"]
    with torch.no_grad():
        torch.testing.assert_close(policy(td.clone())["action"], expected)
        delattr(owner, name)
        assert not torch.allclose(policy(td.clone())["action"], expected)
