import dataclasses

import pytest
import torch

from deflow_torchrl.algorithms import ALGORITHMS, DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.settings import UPDATE_PRECISIONS
from deflow_torchrl.errors import InputError, NonFiniteLossError
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.trainers import StackedUpdate
from tests.support.networks import make_batch, total
from tests.support.updates import PROBLEM, make_update


def test_an_update_is_one_target_step_then_one_adam_step_on_the_sum():
    update = make_update(lr=1e-2, tau=0.1)
    torch.manual_seed(0)
    learner = get_algorithm("deflow").build(DeFlowConfig(lr=1e-2, tau=0.1), PROBLEM)
    optimizer = torch.optim.Adam(learner.loss.parameters(), lr=1e-2)
    for _ in range(3):
        batch = make_batch(16)
        update(batch.clone())
        optimizer.zero_grad()
        total(learner.loss(batch)).backward()
        learner.target_updater.step()
        optimizer.step()
    torch.testing.assert_close(dict(update.learner.loss.state_dict()), dict(learner.loss.state_dict()))
    assert update.step == 3


def test_settings_that_are_none_are_the_tasks():
    loss = make_update().learner.loss
    assert loss.q_aggregation == "min"
    assert loss.target_divergence.item() == pytest.approx(0.01)
    assert loss.value_estimator.gamma.item() == pytest.approx(0.9)
    other = make_update(q_aggregation="mean", target_divergence=0.5, gamma=0.5).learner.loss
    assert other.q_aggregation == "mean"
    assert other.target_divergence.item() == 0.5
    assert other.value_estimator.gamma.item() == 0.5


def test_every_parameter_is_in_the_optimiser_once():
    update = make_update()
    listed = [id(p) for group in update.optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in update.learner.loss.parameters() if p.requires_grad}


@pytest.mark.parametrize(("key", "term"), [(("next", "reward"), "loss_qvalue"), ("action", "loss_flow")])
def test_a_non_finite_loss_names_the_term_and_the_step(key, term):
    update = make_update()
    update(make_batch())
    bad = make_batch()
    bad[key][0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=rf"{term} became NaN or infinite at gradient step 2"):
        update(bad)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        update.check_finite()


def test_state_restores_networks_targets_and_optimiser():
    batches = [make_batch(16) for _ in range(6)]
    straight, first, second = make_update(), make_update(), make_update()
    for batch in batches:
        straight(batch.clone())
    for batch in batches[:3]:
        first(batch.clone())
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second(batch.clone())
    torch.testing.assert_close(
        dict(second.learner.loss.state_dict()), dict(straight.learner.loss.state_dict()), rtol=0, atol=0
    )
    assert second.step == 6


def changed(update, before):
    """Names of the loss's entries that are not bit for bit what they were."""
    after = update.learner.loss.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def snapshot(update):
    return {name: value.clone() for name, value in update.learner.loss.state_dict().items()}


@pytest.mark.parametrize("freeze", [True, False])
def test_a_frozen_prior_does_not_move_by_a_bit_and_everything_else_goes_on(freeze):
    update = make_update(lr=1e-2)
    for _ in range(3):
        update(make_batch(16))
    flow = set(update.learner.prior.parameters())
    assert all(bool(update.optimizer.state[parameter]["exp_avg"].any()) for parameter in flow), "Adam has momentum"
    kept = {
        parameter: {name: value.clone() for name, value in state.items()}
        for parameter, state in update.optimizer.state.items()
        if parameter not in flow
    }
    if freeze:
        update.freeze_prior()
        update.freeze_prior()  # once is enough, twice is the same
        assert set(update.optimizer.state) == set(kept), "the prior's moments are gone"
        assert not flow & {p for group in update.optimizer.param_groups for p in group["params"]}
        for parameter, state in kept.items():
            torch.testing.assert_close(dict(update.optimizer.state[parameter]), state, rtol=0, atol=0)
    before = snapshot(update)
    for _ in range(5):
        out = update(make_batch(16))
    assert ("loss_flow" in out.to_dict()) is not freeze
    moved = changed(update, before)
    velocity = {name for name in before if "velocity_network" in name}
    trained = {name for name in before if "network" in name and name.endswith(("weight", "bias"))} | {"log_alpha"}
    assert velocity < trained
    assert moved == (trained - velocity if freeze else trained)
    assert all(update.optimizer.state[parameter]["step"] == 8 for parameter in kept)


def test_a_frozen_update_is_the_full_ones_other_parts_bit_for_bit():
    # The three other losses do not see the flow's: freezing changes only the flow, as long as base actions stay the same.
    batches = [make_batch(16) for _ in range(6)]
    results = []
    for freeze in (True, False):
        update = make_update(lr=1e-2)
        for parameter in update.learner.prior.parameters() if not freeze else ():
            parameter.register_hook(torch.zeros_like)  # the same weights, still in the optimiser
        if freeze:
            update.freeze_prior()
        for batch in batches:
            update(batch.clone())
        results.append({name: value for name, value in snapshot(update).items() if name != "_extra_state"})
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_frozen_state_freezes_the_update_that_loads_it():
    batches = [make_batch(16) for _ in range(6)]
    straight, first, second = make_update(), make_update(), make_update()
    for update in (straight, first):
        for batch in batches[:2]:
            update(batch.clone())
        update.freeze_prior()
    for batch in batches[2:]:
        straight(batch.clone())
    for batch in batches[2:4]:
        first(batch.clone())
    second(batches[0].clone())  # with momentum of its own for the prior
    second.load_state_dict(first.state_dict())
    assert second.prior_frozen
    for batch in batches[4:]:
        second(batch.clone())
    torch.testing.assert_close(snapshot(second), snapshot(straight), rtol=0, atol=0)


def test_a_state_from_before_freezing_is_refused_by_a_frozen_update_and_old_states_are_such():
    state, frozen = make_update().state_dict(), make_update()
    old = {name: value for name, value in state.items() if name != "prior_frozen"}
    frozen.freeze_prior()
    before = snapshot(frozen)
    for unfrozen in (state, old):
        with pytest.raises(ValueError, match="load it first, then freeze"):
            frozen.load_state_dict(unfrozen)
    assert not changed(frozen, before)
    fresh = make_update()
    fresh.load_state_dict(old)
    assert not fresh.prior_frozen


def test_a_method_without_a_prior_says_so():
    update = make_update()
    update.learner.prior = None
    with pytest.raises(InputError, match="no prior to freeze"):
        update.freeze_prior()


def test_a_non_finite_loss_of_before_is_not_forgotten_by_freezing():
    update = make_update()
    update._first_bad[0] = 1
    with pytest.raises(NonFiniteLossError):
        update.freeze_prior()


def test_after_freezing_a_non_finite_loss_names_the_right_term():
    update = make_update()
    update.freeze_prior()
    bad = make_batch()
    bad["next", "reward"][0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="loss_qvalue became NaN or infinite at gradient step 1"):
        update(bad)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_method_has_its_settings_in_the_schema_of_the_command_line(name):
    online = [] if ALGORITHMS[name].trains_offline else ["online_steps=1"]
    online += [f"algo.{setting}=1.0" for setting in ALGORITHMS[name].config.alternatives[:1]]
    config = compose_config(["task=cube-single-play-singletask-task2-v0", f"algo={name}", "algo.lr=0.5", *online])
    expected = ALGORITHMS[name].config(lr=0.5)
    given = {item.name: getattr(expected, item.name) for item in dataclasses.fields(expected)}
    given = {setting: value for setting, value in given.items() if value is not None}  # the rest is the task's
    assert type(config.algo) is type(expected)
    assert given == {setting: getattr(config.algo, setting) for setting in given}
    assert config.algo.name == name


def test_an_unknown_method_is_refused_with_the_nearest_names():
    with pytest.raises(InputError, match="unknown method 'deflw'; did you mean deflow"):
        get_algorithm("deflw")
    with pytest.raises(InputError, match="unknown method"):
        get_algorithm("nonsense")


@pytest.mark.parametrize("precision", UPDATE_PRECISIONS)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_precision_is_that_of_the_whole_update_forward_and_backward_and_of_nothing_else(precision, stacked):
    seen = []
    updates = [make_update(precision=precision) for _ in range(2 if stacked else 1)]
    update = StackedUpdate(updates) if stacked else updates[0]

    class Look(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            seen.append(("forward", torch.get_float32_matmul_precision()))
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            seen.append(("backward", torch.get_float32_matmul_precision()))
            return gradient

    flow = update.learner.loss.actor_network.flow_policy.module.velocity_network
    flow.register_forward_hook(lambda module, inputs, output: Look.apply(output))
    update(make_batch(2, 8) if stacked else make_batch(8))
    assert set(seen) == {("forward", precision), ("backward", precision)}
    assert torch.get_float32_matmul_precision() == "highest"
    bad = make_batch(2, 8) if stacked else make_batch(8)
    bad["action"].fill_(float("nan"))
    with pytest.raises(NonFiniteLossError):
        update(bad)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_is_checked_and_seeds_of_two_are_not_stacked():
    with pytest.raises(ValueError, match="highest, high, medium, got 'bfloat16'"):
        make_update(precision="bfloat16")
    with pytest.raises(InputError, match="they differ in precision: highest and medium"):
        StackedUpdate([make_update(), make_update(precision="medium")])
    with pytest.raises(InputError, match="precision=low is out of range; expected one of highest, high, medium"):
        compose_config(["task=cube-single-play-singletask-task2-v0", "algo=deflow", "precision=low"])
