"""Normalised observations: every method on columns of any unit, best-of-N, diagnostics, stacked seeds and a frozen prior."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data.base_actions import BaseActionBank
from deflow_torchrl.modules import ObservationNormalizer
from deflow_torchrl.runs.landscape import critic_values
from deflow_torchrl.trainers import StackedUpdate, UpdateStep
from tests.support.networks import ACTION_DIM, NEEDED, OBSERVATION_DIM, make_batch

METHODS = ["bc", "deflow", "fawac", "fbrac", "flow_bc", "fql", "ifql", "iql", "rebrac"]
FACTORS = torch.tensor([1e3, 1e-3, 255.0, 1.0])
OFFSETS = torch.tensor([5e3, -4e-3, 127.0, 0.0])
UPDATES = 10


def learner(method, normalizer=None):
    torch.manual_seed(0)
    problem = ProblemSpec(OBSERVATION_DIM, ACTION_DIM, (32, 32), 0.9, "mean", 0.01, normalizer=normalizer)
    algorithm = get_algorithm(method)
    return algorithm.build(algorithm.config(**NEEDED.get(method, {})), problem)


def standard_batches():
    """Batches whose observations together have mean 0 and standard deviation 1 in every column."""
    torch.manual_seed(1)
    batches = torch.stack([make_batch(64) for _ in range(UPDATES)])
    batches["next", "action"] = torch.rand(UPDATES, 64, ACTION_DIM) * 2 - 1
    states = batches["observation"].double()
    mean, std = states.mean((0, 1)), states.std((0, 1), correction=0)
    for key in ("observation", ("next", "observation")):
        batches[key] = ((batches[key] - mean) / std).float()
    return batches


def scaled(batches):
    out = batches.clone()
    for key in ("observation", ("next", "observation")):
        out[key] = out[key] * FACTORS + OFFSETS
    return out


def updated(learner, batches):
    update = UpdateStep(learner)
    torch.manual_seed(2)
    return [dict(update(batch.clone()).items()) for batch in batches.unbind(0)]


@pytest.mark.parametrize("method", METHODS)
def test_columns_of_any_unit_train_to_the_losses_and_actions_of_standard_ones(method):
    batches = standard_batches()
    wide = scaled(batches)
    plain, normalized = learner(method), learner(method, ObservationNormalizer.fit(wide["observation"]))
    for expected, found in zip(updated(plain, batches), updated(normalized, wide), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, policy in plain.evaluated_policies.items():
        shape = getattr(policy, "noise_shape", (ACTION_DIM,))
        noise = torch.randn(64, *shape)
        acted = [
            policy(TensorDict(observation=batch["observation"], noise=noise, batch_size=[64]))["action"]
            for policy, batch in ((policy, batches[0]), (normalized.evaluated_policies[name], wide[0]))
        ]
        torch.testing.assert_close(acted[1], acted[0], rtol=1e-4, atol=1e-4)
    acted = []
    for one, batch in ((plain, batches[0]), (normalized, wide[0])):
        torch.manual_seed(3)
        acted.append(one.online_policy(batch.select("observation").clone())["action"])
    torch.testing.assert_close(acted[1], acted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_normalisation_is_in_the_state_and_nothing_trains_or_moves_it(method):
    batches = scaled(standard_batches())
    normalizer = ObservationNormalizer.fit(batches["observation"])
    trained = learner(method, normalizer)
    updated(trained, batches)
    state = trained.loss.state_dict()
    buffers = {name: tensor for name, tensor in state.items() if name.endswith(("normalizer.loc", "normalizer.scale"))}
    assert buffers
    for name, tensor in buffers.items():
        torch.testing.assert_close(tensor, normalizer.state_dict()[name.rpartition(".")[2]], rtol=0, atol=0)
    assert not any("normalizer" in name for name, _ in trained.loss.named_parameters())
    fresh = learner(method, ObservationNormalizer(torch.zeros(OBSERVATION_DIM), torch.ones(OBSERVATION_DIM)))
    fresh.loss.load_state_dict(state)
    td = TensorDict(observation=batches[0]["observation"], batch_size=[64])
    td["noise"] = torch.randn(64, *getattr(trained.policy, "noise_shape", (ACTION_DIM,)))
    assert torch.equal(fresh.policy(td.clone())["action"], trained.policy(td.clone())["action"])


@pytest.mark.parametrize("method", ["deflow", "ifql"])
def test_stacked_seeds_train_as_each_alone(method):
    batches = scaled(standard_batches())
    normalizer = ObservationNormalizer.fit(batches["observation"])
    alone, stacked = learner(method, normalizer), [UpdateStep(learner(method, normalizer)) for _ in range(2)]
    stack = StackedUpdate(stacked)
    for expected, batch in zip(updated(alone, batches), batches.unbind(0), strict=True):
        found = stack(torch.stack([batch, batch]))
        for name in alone.loss_names:
            torch.testing.assert_close(found[name][0], expected[name], rtol=1e-3, atol=1e-4)


def test_diagnostics_and_the_landscape_see_what_the_networks_see():
    batches = standard_batches()
    wide = scaled(batches)
    plain, normalized = learner("deflow"), learner("deflow", ObservationNormalizer.fit(wide["observation"]))
    for one, data in ((plain, batches), (normalized, wide)):
        updated(one, data)
        one.diagnostics.use_data(data[0])
    expected, found = (
        one.diagnostics(data[1].clone().set("td_error", torch.ones(64)))
        for one, data in ((plain, batches), (normalized, wide))
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    actions = batches[0]["action"]
    torch.testing.assert_close(
        critic_values(normalized, wide[0]["observation"][0], actions),
        critic_values(plain, batches[0]["observation"][0], actions), rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def test_the_bank_of_a_frozen_prior_normalises_too():
    batches = standard_batches()
    banks = []
    for data, normalizer in (
        (batches, None),
        (scaled(batches), ObservationNormalizer.fit(scaled(batches)["observation"])),
    ):
        buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(64), batch_size=8)
        buffer.extend(data[0].select("observation", ("next", "observation")))
        bank = BaseActionBank(learner("deflow", normalizer).prior, buffer, num_actions=2)
        bank.fill()
        torch.manual_seed(0)
        banks.append(bank(buffer.sample()))
    for key in ("base_action", ("next", "base_action")):
        torch.testing.assert_close(banks[1][key], banks[0][key], rtol=1e-4, atol=1e-4)


def test_a_constant_column_keeps_its_unit_and_a_small_spread_beside_a_large_offset_is_found():
    generator = torch.Generator().manual_seed(0)
    small = 1e6 + torch.randn(4096, generator=generator).double()
    rounded = torch.full((4096,), 0.1)
    rounded[::2] = torch.nextafter(rounded[0], torch.tensor(1.0))
    states = torch.stack([rounded, small.float(), torch.zeros(4096)], 1)
    fitted = ObservationNormalizer.fit(states.split(1000))
    assert fitted.scale.tolist() == [1.0, pytest.approx(1.0, rel=0.05), 1.0]
    assert fitted.loc.tolist() == [pytest.approx(0.1), pytest.approx(1e6), 0.0]
    torch.testing.assert_close(fitted.scale[1].double(), small.float().double().std(correction=0), rtol=1e-6, atol=0)
