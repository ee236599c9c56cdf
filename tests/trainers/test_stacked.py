"""Stacked seeds are, to rounding, the separate runs given the same batches and noise."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import HardUpdate

from deflow_torchrl.algorithms import ALGORITHMS, get_algorithm
from deflow_torchrl.errors import InputError, NonFiniteLossError
from deflow_torchrl.modules.kernels import use_kernels
from deflow_torchrl.trainers import StackedUpdate, UpdateStep, load_checkpoint, save_checkpoint
from tests.support.networks import NEEDED, add_draws, make_batch
from tests.support.updates import PROBLEM

SEEDS = 3
ALPHAS = {"free": {}, "bounded": {"min_alpha": 2.5, "max_alpha": 2.8}, "fixed": {"fixed_alpha": 0.5}}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_updates(seeds=SEEDS, *, name="deflow", problem=PROBLEM, **settings):
    updates = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        algorithm = get_algorithm(name)
        updates.append(UpdateStep(algorithm.build(algorithm.config(**{**NEEDED.get(name, {}), **settings}), problem)))
    return updates


def assert_close(updates, others, **tolerance):
    for update, other in zip(updates, others, strict=True):
        states = [it.learner.loss.state_dict() for it in (update, other)]
        torch.testing.assert_close(*map(dict, states), **tolerance)
        moments = [it.optimizer.state_dict()["state"] for it in (update, other)]
        torch.testing.assert_close(*moments, **tolerance)
        assert update.step == other.step


def train_both(stack, separate, batches, **tolerance):
    for batch in batches:
        out = stack(batch)
        for seed, update in enumerate(separate):
            own = batch[seed].exclude("td_error").clone()
            alone = update(own)
            torch.testing.assert_close(out[seed].to_dict(), alone.to_dict(), **tolerance)
            # What the loss writes into its batch too: the priority, of a method with a critic.
            torch.testing.assert_close(batch[seed].to_dict(), own.to_dict(), **tolerance)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("alpha", list(ALPHAS))
def test_a_hundred_updates_of_three_seeds_are_those_of_three_runs(double, alpha, kernels):
    settings = {"lr": 1e-2, "tau": 0.1, **ALPHAS[alpha]}
    separate, stack = make_updates(**settings), StackedUpdate(make_updates(**settings))
    batches = [make_batch(SEEDS, 8) for _ in range(100)]
    with use_kernels(kernels):
        train_both(stack, separate, batches, rtol=1e-10, atol=1e-10)
    assert_close(stack.updates, separate, rtol=1e-10, atol=1e-10)
    alphas = [update.learner.loss.alpha.item() for update in stack.updates]
    if alpha == "bounded":
        assert max(alphas) == pytest.approx(2.8)
        assert min(alphas) < 2.79
    else:
        assert len(set(alphas)) == (SEEDS if alpha == "free" else 1), "each seed has its own multiplier"


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_method_stacks(double, name):
    settings = NEEDED.get(name, {})
    separate, stack = make_updates(name=name, **settings), StackedUpdate(make_updates(name=name, **settings))
    batches = [make_batch(SEEDS, 8) for _ in range(5)]
    for batch in batches:
        batch["next", "action"] = torch.rand_like(batch["action"]) * 2 - 1
        add_draws(batch, name)
    train_both(stack, separate, batches, rtol=1e-10, atol=1e-10)
    assert_close(stack.updates, separate, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernels", [True, False])
def test_twenty_updates_in_single_precision_with_the_papers_layers(kernels):
    problem = dataclasses.replace(PROBLEM, hidden_dims=(64,) * 4)
    separate, stack = make_updates(problem=problem), StackedUpdate(make_updates(problem=problem))
    with use_kernels(kernels):
        train_both(stack, separate, [make_batch(SEEDS, 32) for _ in range(20)], rtol=1e-3, atol=1e-3)
    assert_close(stack.updates, separate, rtol=1e-3, atol=1e-4)


def test_a_stack_of_frozen_priors_is_the_frozen_runs(double):
    separate, members = make_updates(lr=1e-2), make_updates(lr=1e-2)
    batches = [make_batch(SEEDS, 8) for _ in range(6)]
    stack = StackedUpdate(members)
    train_both(stack, separate, batches[:3], rtol=1e-10, atol=1e-10)
    for update in (*separate, *members):
        update.freeze_prior()
    stack.gather()
    train_both(stack, separate, batches[3:], rtol=1e-10, atol=1e-10)
    assert_close(members, separate, rtol=1e-10, atol=1e-10)


def test_targets_that_are_not_moved_softly_are_moved_by_their_own_updaters(double):
    groups = []
    for _ in range(2):
        updates = make_updates(2, lr=1e-2)
        for update in updates:
            update.learner.target_updater = HardUpdate(update.learner.loss, value_network_update_interval=2)
        groups.append(updates)
    separate, stack = groups[0], StackedUpdate(groups[1])
    train_both(stack, separate, [make_batch(2, 8) for _ in range(7)], rtol=1e-10, atol=1e-10)
    assert_close(stack.updates, separate, rtol=1e-10, atol=1e-10)


def test_draws_differ_between_seeds_and_come_from_the_global_generator():
    def losses():
        updates = make_updates(1) + make_updates(1)  # equal networks, equal rows: the noise alone differs
        stack = StackedUpdate(updates)
        batch = make_batch(8, noise=False)
        torch.manual_seed(5)
        return stack(torch.stack([batch, batch]))["loss_flow"].tolist()

    torch.manual_seed(1)
    first = losses()
    torch.manual_seed(1)
    assert first == losses()
    assert first[0] != first[1]


@pytest.mark.parametrize("through_a_file", [True, False])
def test_a_seed_goes_on_alone_as_if_it_had_never_been_stacked(double, tmp_path, through_a_file):
    separate, stack = make_updates(lr=1e-2), StackedUpdate(make_updates(lr=1e-2))
    batches = [make_batch(SEEDS, 8) for _ in range(6)]
    train_both(stack, separate, batches[:3], rtol=1e-10, atol=1e-10)
    alone = stack.updates
    if through_a_file:
        alone = make_updates(lr=1e-2)
        for update, member in zip(alone, stack.updates, strict=True):
            update.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 3, member.state_dict())))
    for batch in batches[3:]:
        for update, other, own in zip(alone, separate, batch, strict=True):
            torch.testing.assert_close(update(own.clone()), other(own.clone()))
    assert_close(alone, separate, rtol=1e-10, atol=1e-10)
    moved = [update.step for update in stack.updates]
    assert moved == [3 if through_a_file else 6] * SEEDS, "what was saved is a copy"


@pytest.mark.parametrize("steps", [0, 3])
def test_a_gathered_stack_goes_on_bit_for_bit(steps):
    batches = [make_batch(SEEDS, 8) for _ in range(steps + 3)]
    straight, first, second = (StackedUpdate(make_updates(lr=1e-2)) for _ in range(3))
    for batch in batches:
        straight(batch.clone())
    for batch in batches[:steps]:
        first(batch.clone())
    second(batches[-1].clone())  # with moments of its own
    for update, other in zip(second.updates, first.updates, strict=True):
        update.load_state_dict(other.state_dict())
    second.gather()
    for batch in batches[steps:]:
        second(batch.clone())
    assert_close(second.updates, straight.updates, rtol=0, atol=0)


def test_what_a_seed_evaluates_with_is_what_is_trained():
    stack = StackedUpdate(make_updates(lr=1e-2))
    observation = TensorDict(observation=torch.randn(5, 4), noise=torch.randn(5, 3), batch_size=[5])
    policies = [update.learner.policy for update in stack.updates]
    before = [policy(observation.clone())["action"].detach() for policy in policies]
    for _ in range(3):
        stack(make_batch(SEEDS, 8))
    after = [policy(observation.clone())["action"].detach() for policy in policies]
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    for seed, update in enumerate(stack.updates):
        alone = make_updates()[seed]
        alone.load_state_dict(update.state_dict())
        assert torch.equal(alone.learner.policy(observation.clone())["action"], after[seed])


@pytest.mark.parametrize(("key", "term"), [(("next", "reward"), "loss_qvalue"), ("action", "loss_flow")])
def test_a_non_finite_loss_names_the_seed_the_term_and_the_step(key, term):
    stack = StackedUpdate(make_updates(), seeds=[4, 7, 9])
    stack(make_batch(SEEDS, 8))
    bad = make_batch(SEEDS, 8)
    bad[key][1] = float("nan")
    with pytest.raises(NonFiniteLossError, match=rf"seed 7: {term} became NaN or infinite at gradient step 2"):
        stack(bad)
    with pytest.raises(NonFiniteLossError, match="seed 7"):
        stack.check_finite()
    assert [update.is_finite() for update in stack.updates] == [True, False, True], "the others are untouched"


def test_what_differs_in_more_than_the_seed_is_refused():
    (first,) = make_updates(1)

    def refused(said, *others, **settings):
        with pytest.raises(InputError, match=said) as error:
            StackedUpdate([first, *others, *make_updates(1, **settings)], seeds=[0, 1])
        assert "\n" not in str(error.value)

    refused("seeds 0 and 1 cannot be stacked, they differ in lr of optimiser group 0: 0.0003 and 0.1", lr=0.1)
    refused("_value_estimator.gamma", gamma=0.5)
    refused("target_divergence", target_divergence=0.5)
    refused("rate", tau=0.5)
    refused("q_aggregation", q_aggregation="mean")
    refused("the shape of actor_network_params", problem=dataclasses.replace(PROBLEM, hidden_dims=(8, 8)))
    (ahead,) = make_updates(1)
    ahead(make_batch(8))
    with pytest.raises(InputError, match="steps done"):
        StackedUpdate([first, ahead])
    with pytest.raises(ValueError, match=r"a batch \[3, B\] is needed, got \[8\]"):
        StackedUpdate(make_updates())(make_batch(8))
    with pytest.raises(InputError, match="share a tensor"):
        StackedUpdate([first, first])
    with pytest.raises(InputError, match="no updates"):
        StackedUpdate([])


def test_one_seed_is_a_stack_too(double):
    separate, stack = make_updates(1), StackedUpdate(make_updates(1))
    train_both(stack, separate, [make_batch(1, 8) for _ in range(3)], rtol=1e-10, atol=1e-10)
    assert_close(stack.updates, separate, rtol=1e-10, atol=1e-10)
