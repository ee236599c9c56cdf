"""Stages of an update: their order, targets, clipping, phases, and what works with them."""

import dataclasses
import math

import pytest
import torch
from tensordict import TensorDict

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.algorithms.base import SoftTarget, Stage
from deflow_torchrl.objectives import IQLLoss
from deflow_torchrl.trainers import StackedUpdate, UpdateStep
from deflow_torchrl.trainers.graphed import GraphedUpdate
from tests.support.networks import make_batch
from tests.support.updates import PROBLEM

TERMS = ("loss_value", "loss_qvalue", "loss_actor")
STAGES = (
    Stage(("loss_value",)),
    Stage(("loss_qvalue",), [SoftTarget("qvalue_network", 0.1)]),
    Stage(("loss_actor",)),
)


def make_update(stages=STAGES, *, seed=0, groups=None, **fields):
    """IQL in double precision, whose three terms train three networks."""
    torch.manual_seed(seed)
    iql = get_algorithm("iql")
    learner = iql.build(iql.config(temperature=2.0, lr=1e-2), PROBLEM)
    learner.loss.double()
    learner.loss.make_value_estimator(gamma=0.9)
    parameters = [parameter for parameter in learner.loss.parameters() if parameter.requires_grad]
    return UpdateStep(
        dataclasses.replace(
            learner,
            target_updater=None,
            stages=stages,
            param_groups=groups or [{"params": parameters, "lr": 1e-2}],
            **fields,
        )
    )


def batch(rows=16):
    return make_batch(rows).apply(lambda entry: entry.double() if entry.is_floating_point() else entry)


def weights(update, *names):
    return [
        leaf.detach().clone()
        for name in names or ("qvalue_network", "value_network", "actor_network", "target_qvalue_network")
        for leaf in getattr(update.learner.loss, f"{name}_params").values(True, True)
    ]


def assert_same(update, other, *names):
    torch.testing.assert_close(weights(update, *names), weights(other, *names), rtol=0, atol=0)


def test_each_stage_computes_at_the_weights_that_the_stages_before_left():
    update, other = make_update(), make_update()
    loss: IQLLoss = other.learner.loss
    optimizers = {
        name: torch.optim.Adam(list(getattr(loss, f"{name}_params").parameters()), lr=1e-2)
        for name in ("value_network", "qvalue_network", "actor_network")
    }
    for _ in range(4):
        data = batch()
        update(data.clone())
        for name, optimizer in optimizers.items():
            loss.zero_grad()
            getattr(loss, f"{name.removesuffix('_network')}_loss")(data.clone())[0].backward()
            optimizer.step()
            if name == "qvalue_network":
                with torch.no_grad():
                    pairs = zip(weights(other, "target_qvalue_network"), weights(other, name), strict=True)
                    moved = [0.9 * target + 0.1 * source for target, source in pairs]
                    for leaf, value in zip(loss.target_qvalue_network_params.values(True, True), moved, strict=True):
                        leaf.copy_(value)
    torch.testing.assert_close(weights(update), weights(other))


def test_stages_differ_from_all_terms_at_once():
    staged, at_once = make_update(), make_update([Stage(TERMS, STAGES[1].targets)])
    data = [batch() for _ in range(3)]
    for one in data:
        staged(one.clone())
        at_once(one.clone())
    assert any(not torch.allclose(one, other) for one, other in zip(weights(staged), weights(at_once), strict=True))


def test_a_stage_of_all_terms_is_the_update_without_stages():
    plain, staged = make_update(()), make_update([Stage()])
    for data in [batch() for _ in range(3)]:
        out = plain(data.clone())
        assert dict(out.items()).keys() == dict(staged(data.clone()).items()).keys()
    assert_same(plain, staged)


def test_the_rows_of_a_staged_update_have_every_term_and_the_batch_has_its_priority():
    update, data = make_update(), batch()
    out = update(data)
    assert set(TERMS) <= set(out.keys())
    assert "td_error" not in out
    assert data["td_error"].shape == (16,)


def test_an_average_starts_late_and_moves_every_nth_update():
    update = make_update([Stage(TERMS, [SoftTarget("qvalue_network", 0.5, period=2, first=4)])])
    moved = []
    for _ in range(7):
        before = weights(update, "target_qvalue_network")
        update(batch())
        after = weights(update, "target_qvalue_network")
        moved.append(any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)))
    assert moved == [False, False, False, True, False, True, False]


def test_the_gradient_of_a_stage_is_bounded_by_its_norm():
    limit = 1e-3
    update = make_update([Stage(("loss_value",)), Stage(("loss_qvalue", "loss_actor"), max_grad_norm=limit)])
    update(batch())
    loss = update.learner.loss
    last = [*loss.qvalue_network_params.parameters(), *loss.actor_network_params.parameters()]
    norm = torch.stack([parameter.grad.square().sum() for parameter in last]).sum().sqrt()
    assert norm.item() == pytest.approx(limit, rel=1e-9)


def test_a_small_gradient_is_not_scaled():
    update, free = make_update([Stage(max_grad_norm=1e6)]), make_update([Stage()])
    for data in [batch() for _ in range(2)]:
        update(data.clone())
        free(data.clone())
    assert_same(update, free)


def test_a_rate_falls_along_half_a_cosine():
    probe = make_update()
    parameters = [parameter for parameter in probe.learner.loss.parameters() if parameter.requires_grad]
    update = UpdateStep(
        dataclasses.replace(
            probe.learner, param_groups=[{"params": parameters, "lr": 0.5, "cosine_steps": 4}], stages=[Stage()]
        )
    )
    rates = []
    for _ in range(6):
        update(batch())
        rates.append(float(update.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * min(n, 4) / 4)) / 2 for n in range(6)], abs=1e-7)


PHASES = (
    Stage(("loss_value",), end=3),
    Stage(("loss_value", "loss_qvalue"), [SoftTarget("qvalue_network", 0.1)], begin=3),
    Stage(("loss_actor",), begin=3),
)


def test_phases_train_their_terms_alone():
    update = make_update(PHASES)
    begun = weights(update, "qvalue_network", "actor_network")
    for step in range(5):
        out = update(batch())
        assert ("loss_actor" in out) == (step >= 3)
        now = weights(update, "qvalue_network", "actor_network")
        assert all(torch.equal(one, other) for one, other in zip(begun, now, strict=True)) == (step < 3)
    assert len(update.optimizer.state) == len([p for p in update.learner.loss.parameters() if p.requires_grad])


def test_a_phase_begins_with_copied_weights():
    stages = (Stage(("loss_qvalue",), end=2), Stage(TERMS, begin=2, copies={"target_qvalue_network": "qvalue_network"}))
    update = make_update(stages)
    for _ in range(2):
        update(batch())
    trained = weights(update, "qvalue_network")
    assert not all(map(torch.equal, trained, weights(update, "target_qvalue_network")))
    update(batch())
    assert all(map(torch.equal, trained, weights(update, "target_qvalue_network")))


@pytest.mark.parametrize("interrupted", range(1, 6))
def test_a_run_resumed_inside_a_phase_or_at_its_border_is_the_run_without_the_break(interrupted):
    stages = (*PHASES[:2], Stage(("loss_actor",), begin=3, copies={"target_qvalue_network": "qvalue_network"}))
    straight, first, second = (make_update(stages) for _ in range(3))
    data = [batch() for _ in range(6)]
    for one in data:
        straight(one.clone())
    for one in data[:interrupted]:
        first(one.clone())
    second.load_state_dict(first.state_dict())
    for one in data[interrupted:]:
        second(one.clone())
    assert_same(straight, second)


def test_several_updates_at_once_stop_at_the_border_of_a_phase():
    data = [batch() for _ in range(7)]
    straight, update = make_update(PHASES), make_update(PHASES)
    for one in data:
        straight(one.clone())
    rest = iter(data)
    graphed = GraphedUpdate(update, lambda: next(rest).clone(), updates_per_replay=2, self_check=False)
    assert update.updates_to_next_phase == 3
    with pytest.raises(ValueError, match="next phase"):
        graphed(4)
    graphed(3)
    assert update.updates_to_next_phase == math.inf
    graphed(4)
    assert update.step == 7
    assert_same(straight, update)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_stacked_seeds_are_the_separate_runs(clip):
    stages = [dataclasses.replace(stage, max_grad_norm=clip) for stage in PHASES]
    separate = [make_update(stages, seed=seed) for seed in range(3)]
    stack = StackedUpdate([make_update(stages, seed=seed) for seed in range(3)])
    for _ in range(6):
        data = TensorDict.stack([batch() for _ in range(3)])
        out = stack(data.clone())
        for seed, update in enumerate(separate):
            own = update(data[seed].clone())
            torch.testing.assert_close(out[seed].to_dict(), own.to_dict())
    for update, other in zip(stack.updates, separate, strict=True):
        torch.testing.assert_close(weights(update), weights(other))


def test_hooks_are_called_with_the_number_of_the_update_and_with_its_results():
    numbers, results = [], []
    update = make_update(
        before_update=lambda number: numbers.append(int(number)),
        after_update=lambda out: results.append(out["loss_actor"].item()),
    )
    outs = [update(batch())["loss_actor"].item() for _ in range(3)]
    assert numbers == [1, 2, 3]
    assert results == outs


def test_a_stage_of_an_unknown_term_is_refused():
    with pytest.raises(ValueError, match=r"loss_nonsense.*loss_actor"):
        make_update([Stage(("loss_nonsense",))])


def test_stages_compile():
    update, compiled = make_update(), make_update()
    compiled._losses = torch.compile(compiled._call_loss, fullgraph=True, backend="eager")
    for data in [batch() for _ in range(2)]:
        update(data.clone())
        compiled(data.clone())
    torch.testing.assert_close(weights(update), weights(compiled))
