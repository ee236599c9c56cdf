import math
from dataclasses import fields

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from deflow_torchrl.algorithms import Learner
from deflow_torchrl.trainers import Alarms, MetricsLog, Trainer, TrainerSchedule
from tests.support.networks import make_batch
from tests.support.updates import make_update


def draw(rows=64):
    return make_batch(rows, noise=False)


def seen(update, batch):
    """The diagnostics of a batch the update was just called with."""
    update(batch)
    return update.learner.diagnostics(batch)


@torch.no_grad()
def act(update, batch):
    """The policy with the noise a call of the diagnostics draws: the first of seed 0."""
    noise = torch.randn(batch["action"].shape, generator=torch.Generator().manual_seed(0))
    inputs = {"observation": batch["observation"], "noise": noise}
    return update.learner.policy(TensorDict(inputs, batch_size=batch.shape))


@torch.no_grad()
def let_return(network, *values):
    """Let a network answer everything with these values."""
    last = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)][-1]
    last.weight.zero_()
    last.bias.copy_(torch.tensor(values))


@pytest.mark.parametrize("interval", [1, 3])
def test_how_often_a_run_looks_changes_neither_weights_nor_generators(interval):
    ends = []
    for looks in (False, True):
        update = make_update(lr=1e-2)
        update.learner.diagnostics.use_data(draw(200))
        torch.manual_seed(5)
        for step in range(1, 10):
            batch = draw(16)
            update(batch)
            if looks and step % interval == 0:
                update.learner.diagnostics(batch)
        ends.append((dict(update.learner.loss.state_dict()), torch.random.get_rng_state()))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_a_run_that_logs_every_step_ends_with_the_weights_of_one_that_never_does(tmp_path):
    ends = []
    for interval in (1, 0):
        update = make_update(lr=1e-2)
        update.learner.diagnostics.use_data(draw(200))
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=8)
        buffer.extend(draw())
        torch.manual_seed(5)
        schedule = TrainerSchedule(offline_steps=8, log_interval=interval, eval_interval=0, save_interval=0)
        folder = tmp_path / str(interval)
        folder.mkdir()
        metrics = MetricsLog(folder)
        Trainer(
            update, buffer, schedule=schedule, checkpoints=folder, metrics=metrics,
            alarms=Alarms(gamma=0.9, reward_bound=1.0), show_progress=False,
        ).run()  # fmt: skip
        assert len(metrics.rows) == (8 if interval else 1)
        assert "train/action_distance" in metrics.rows[-1]
        ends.append((dict(update.learner.loss.state_dict()), torch.random.get_rng_state()))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_the_same_batch_gives_the_same_numbers_and_they_are_finite_scalars_without_gradient():
    update, batch = make_update(), draw()
    update.learner.diagnostics.use_data(draw(500))
    first = seen(update, batch)
    second = update.learner.diagnostics(batch)
    assert set(first) == {
        "divergence_ratio", "saturation", "saturation_data", "q_base", "q_refined", "td_error", "action_distance",
        "action_distance_base",
    }  # fmt: skip
    for name, value in first.items():
        assert value.shape == (), name
        assert value.isfinite(), name
        assert not value.requires_grad, name
        assert value == second[name], name


def test_values_are_what_they_say():
    update, batch = make_update(target_divergence=0.04), draw()
    update(batch)
    learner = update.learner
    out = learner.diagnostics(batch)
    loss = learner.loss
    acted = act(update, batch)
    assert out["divergence_ratio"].item() == pytest.approx(acted["refinement"].square().mean().item() / 0.04, rel=1e-5)
    critics = loss.qvalue_network_params

    def value(action):
        td = TensorDict({"observation": batch["observation"], "action": action}, batch_size=batch.shape)
        each = []
        for number in range(2):
            with critics[number].to_module(loss.qvalue_network):
                each.append(loss.qvalue_network(td.clone())["state_action_value"])
        return torch.stack(each).mean().item()

    assert out["q_base"].item() == pytest.approx(value(acted["base_action"]), rel=1e-4)
    assert out["q_refined"].item() == pytest.approx(value(acted["action"]), rel=1e-4)
    assert out["td_error"].item() == pytest.approx(batch["td_error"].mean().item())


def test_saturation_counts_dimensions_at_a_bound_beside_those_of_the_data():
    update, batch = make_update(), draw()
    batch["action"][:, 0] = 1 - 1e-5  # as near a bound as the loaders leave any action
    update(batch)
    let_return(update.learner.policy.refinement_policy.module.refinement_network, 9.0, -9.0, 0.0)
    out = update.learner.diagnostics(batch)
    third = act(update, batch)["action"][:, 2].abs() == 1
    assert 0 < third.sum() < 64, "the prior's own"
    assert out["saturation"].item() == pytest.approx((2 + third.float().mean().item()) / 3)
    assert out["saturation_data"].item() == pytest.approx(1 / 3, abs=0.01)


def test_the_distance_is_that_to_the_nearest_action_at_the_nearest_states():
    update, batch = make_update(), draw(32)
    diagnostics = update.learner.diagnostics
    # Data in two places, far apart in states, with another action in each; the second dimension never changes.
    states = torch.zeros(40, 4)
    states[20:, 0] = 100.0
    actions = torch.full((40, 3), 0.5)
    actions[20:] = -0.5
    diagnostics.use_data(TensorDict({"observation": states, "action": actions}, batch_size=[40]))
    batch["observation"] = states[torch.arange(32)]
    update(batch)
    let_return(update.learner.policy.refinement_policy.module.refinement_network, 5.0, 5.0, 5.0)
    out = diagnostics(batch)
    expected = (20 * 0.5 + 12 * 1.5) / 32
    assert out["action_distance"].item() == pytest.approx(expected, rel=1e-5)
    assert out["action_distance_base"].item() != pytest.approx(expected)


def test_the_distance_of_the_datas_own_actions_is_zero():
    update, batch = make_update(), draw(16)
    update.learner.diagnostics.use_data(batch)
    update(batch)
    update.freeze_prior()
    batch["base_action"] = batch["action"]
    out = update.learner.diagnostics(batch)
    assert out["action_distance_base"].item() == 0.0
    assert out["action_distance"].item() > 0.0


def test_large_data_is_sampled_evenly_and_without_chance():
    update, batch = make_update(), draw(8)
    rows = 30_000
    data = TensorDict({"observation": torch.randn(rows, 4), "action": torch.rand(rows, 3)}, batch_size=[rows])
    update.learner.diagnostics.use_data(data)
    assert len(update.learner.diagnostics._states) == 10_000
    torch.testing.assert_close(update.learner.diagnostics._actions[[0, -1]], data["action"][[0, -1]], rtol=0, atol=0)
    assert math.isfinite(seen(update, batch)["action_distance"].item())


def test_a_frozen_priors_base_actions_are_those_of_the_batch():
    update, batch = make_update(), draw(8)
    update.freeze_prior()
    batch["base_action"] = torch.full_like(batch["action"], 0.25)
    batch["next", "base_action"] = torch.zeros_like(batch["action"])
    out = seen(update, batch)
    refined = update.learner.policy.refinement_policy(batch.select("observation", "base_action"))
    assert out["divergence_ratio"].item() == pytest.approx(
        refined["refinement"].square().mean().item() / 0.01, rel=1e-5
    )


def test_a_method_need_not_have_diagnostics():
    learner = make_update().learner
    values = {field.name: getattr(learner, field.name) for field in fields(learner) if field.name != "diagnostics"}
    assert Learner(**values).diagnostics is None
