import dataclasses
import functools
import itertools
import json
import signal

import pytest
import torch
from torchrl.data import LazyTensorStorage, RandomSampler, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.objectives import HardUpdate

from deflow_torchrl.errors import InputError, NonFiniteLossError
from deflow_torchrl.trainers import MetricsLog, StackedTrainer, StackedUpdate, Trainer, TrainerSchedule
from deflow_torchrl.trainers.checkpoint import (
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_header,
    save_checkpoint,
)
from deflow_torchrl.trainers.graphed import GraphedUpdate
from tests.support.networks import make_batch
from tests.support.runs import without_time
from tests.support.updates import make_update


def make_buffer(rows=64, batch_size=8, **options):
    torch.manual_seed(7)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), batch_size=batch_size, **options)
    buffer.extend(make_batch(rows, noise=False))
    return buffer


def make_trainer(
    folder,
    *,
    steps=12,
    buffer=None,
    evaluate=None,
    save_interval=4,
    eval_interval=6,
    validation=None,
    make_graphed=lambda update, sample: None,
    updater=None,
    **options,
):
    folder.mkdir(exist_ok=True)
    buffer = buffer or make_buffer()
    update = make_update()
    if updater is not None:
        update.learner = dataclasses.replace(update.learner, target_updater=updater(update.learner.loss))
    torch.manual_seed(3)
    schedule = TrainerSchedule(
        offline_steps=steps, log_interval=3, eval_interval=eval_interval, save_interval=save_interval
    )
    return Trainer(
        update,
        buffer,
        schedule=schedule,
        checkpoints=folder / "checkpoints",
        metrics=MetricsLog(folder),
        validation=validation,
        evaluate=evaluate,
        show_progress=False,
        graphed=make_graphed(update, buffer.sample),
        **options,
    )


def test_rows_checkpoints_and_evaluations_come_when_they_are_due(tmp_path):
    evaluated = []
    trainer = make_trainer(tmp_path, evaluate=lambda: evaluated.append(trainer.step) or {"eval/success": 0.5})
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert evaluated == [6, 12]
    assert [row["step"] for row in rows if "eval/success" in row] == [6, 12]
    assert [int(path.stem[5:]) for path in list_checkpoints(tmp_path / "checkpoints")] == [4, 8, 12]
    assert {"train/loss_flow", "train/loss_actor", "train/loss_alpha", "train/loss_qvalue", "train/alpha"} <= set(
        rows[0]
    )


def test_a_run_with_evaluations_ends_with_the_weights_of_one_without(tmp_path):
    plain = make_trainer(tmp_path / "a", eval_interval=0)
    plain.run()
    other = make_trainer(tmp_path / "b", eval_interval=2, validation=make_buffer(16))
    other.run()
    assert any("val/loss_flow" in row for row in other.metrics.rows)
    torch.testing.assert_close(
        dict(other.update.learner.loss.state_dict()), dict(plain.update.learner.loss.state_dict()), rtol=0, atol=0
    )


class Interrupted:
    """A buffer at whose n-th sample the user presses Ctrl-C."""

    def __init__(self, buffer, at):
        self.buffer, self.count, self.at = buffer, itertools.count(1), at

    def sample(self):
        if next(self.count) == self.at:
            raise KeyboardInterrupt
        return self.buffer.sample()


@pytest.mark.parametrize("at", [1, 5, 6, 12])
def test_ctrl_c_saves_and_the_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, at):
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    stopped = make_trainer(tmp_path / "stopped", buffer=Interrupted(make_buffer(), at))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    checkpoints = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    assert [int(path.stem[5:]) for path in checkpoints][-1:] == ([at - 1] if at > 1 else [])
    resumed = make_trainer(tmp_path / "stopped")
    if checkpoints:
        resumed.resume(checkpoints[-1])
    resumed.run()
    torch.testing.assert_close(
        dict(resumed.update.learner.loss.state_dict()), dict(straight.update.learner.loss.state_dict()), rtol=0, atol=0
    )
    assert without_time(resumed.metrics.rows) == without_time(straight.metrics.rows)


STATEFUL = {
    "sampler": (lambda: make_buffer(sampler=SamplerWithoutReplacement()), None),
    "generator": (lambda: make_buffer(generator=torch.Generator().manual_seed(4)), None),
    "hard update": (make_buffer, lambda loss: HardUpdate(loss, value_network_update_interval=2)),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_samplers_generators_and_hard_updates_go_on_where_they_were(tmp_path, kind):
    new_buffer, updater = STATEFUL[kind]
    first = make_trainer(tmp_path, buffer=new_buffer(), updater=updater)
    first.run()
    other = make_trainer(tmp_path, buffer=new_buffer(), updater=updater)
    other.resume(list_checkpoints(tmp_path / "checkpoints")[0])
    assert other.step == 4
    other.run()
    states = [dict(trainer.update.learner.loss.state_dict()) for trainer in (first, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_checkpoint_of_another_sampler_and_a_state_that_cannot_be_saved_are_one_line(tmp_path):
    make_trainer(tmp_path, buffer=make_buffer(sampler=SamplerWithoutReplacement())).run()
    with pytest.raises(InputError, match="sampler is a SamplerWithoutReplacement, here a RandomSampler"):
        make_trainer(tmp_path).restore(list_checkpoints(tmp_path / "checkpoints")[-1])

    class Odd(RandomSampler):
        def state_dict(self):
            return {"rule": object()}

    with pytest.raises(InputError, match="the state of Odd holds a object, which cannot be saved"):
        make_trainer(tmp_path, buffer=make_buffer(sampler=Odd()))


def test_a_checkpoint_that_is_rewritten_with_new_settings_keeps_its_score(tmp_path):
    make_trainer(tmp_path, evaluate=lambda: {"eval/success": 0.5}, score="eval/success").run()
    (*_, last) = list_checkpoints(tmp_path / "checkpoints")
    other = make_trainer(tmp_path, steps=16, eval_interval=0, score="eval/success")
    other.resume(last, keep_settings=True)
    assert read_header(last)["score"] == 0.5
    other.run()
    assert read_header(list_checkpoints(tmp_path / "checkpoints")[-1])["score"] is None
    assert best_checkpoint(tmp_path / "checkpoints") == last


@pytest.mark.parametrize("moment", ["update", "evaluation"])
def test_a_signal_in_mid_step_waits_for_the_step_and_one_in_an_evaluation_is_made_good(tmp_path, moment):
    def evaluations(raise_at):
        count = itertools.count(1)

        def evaluate():
            if next(count) == raise_at:
                signal.raise_signal(signal.SIGINT)
            return {"eval/success": 0.5}

        return evaluate

    straight = make_trainer(tmp_path / "straight", evaluate=evaluations(None))
    straight.run()
    stopped = make_trainer(tmp_path / "stopped", evaluate=evaluations(1 if moment == "evaluation" else None))
    if moment == "update":
        optimizer_step = stopped.update.optimizer.step

        def step():
            if stopped.update.step == 6:
                signal.raise_signal(signal.SIGTERM)
            optimizer_step()

        stopped.update.optimizer.step = step
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    (*_, checkpoint) = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    assert checkpoint.name == "step_000000006.pt"
    resumed = make_trainer(tmp_path / "stopped", evaluate=evaluations(None))
    resumed.resume(checkpoint)
    resumed.run()
    torch.testing.assert_close(
        dict(resumed.update.learner.loss.state_dict()), dict(straight.update.learner.loss.state_dict()), rtol=0, atol=0
    )
    assert without_time(resumed.metrics.rows) == without_time(straight.metrics.rows)
    # Killed for good before its next checkpoint and resumed once more: no row twice.
    again = make_trainer(tmp_path / "stopped", evaluate=evaluations(None))
    again.resume(checkpoint)
    again.run()
    assert without_time(again.metrics.rows) == without_time(straight.metrics.rows)


def test_a_failing_evaluation_costs_no_steps(tmp_path):
    def evaluate():
        raise RuntimeError("an evaluation process died")

    trainer = make_trainer(tmp_path, evaluate=evaluate)
    with pytest.raises(RuntimeError, match="died"):
        trainer.run()
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step_000000006.pt"


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    buffer = make_buffer()

    class Poisoned(Interrupted):
        def sample(self):
            batch = self.buffer.sample()
            if next(self.count) == self.at:
                batch["next", "reward"][0] = float("inf")
            return batch

    trainer = make_trainer(tmp_path, buffer=Poisoned(buffer, 7))
    with pytest.raises(NonFiniteLossError, match="loss_qvalue became NaN or infinite at gradient step 7"):
        trainer.run()
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    assert checkpoint.name == "step_000000004.pt"
    fresh = make_trainer(tmp_path)
    fresh.restore(checkpoint)
    assert all(value.isfinite().all() for value in fresh.update.learner.loss.parameters())
    with pytest.raises(NonFiniteLossError):
        trainer.save()


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run()
    path = list_checkpoints(tmp_path / "checkpoints")[-1]
    state = load_checkpoint(path)
    key = next(name for name in state["update"]["loss"] if "weight" in name)
    state["update"]["loss"][key] = torch.zeros(3, 3)
    save_checkpoint(path.parent, 12, state)
    with pytest.raises(InputError, match="does not fit"):
        make_trainer(tmp_path).restore(path)


@pytest.mark.parametrize("updates_per_replay", [2, 5])
def test_steps_trained_several_at_once_leave_the_run_of_single_steps(tmp_path, updates_per_replay):
    single = make_trainer(tmp_path / "single", validation=make_buffer(16))
    single.run()
    counts = []

    class Counted(GraphedUpdate):
        def __call__(self, count):
            counts.append(count)
            return super().__call__(count)

    def make_several(folder, **options):
        make_graphed = functools.partial(Counted, updates_per_replay=updates_per_replay)
        return make_trainer(folder, validation=make_buffer(16), make_graphed=make_graphed, **options)

    stopped = make_several(tmp_path / "several", evaluate=lambda: signal.raise_signal(signal.SIGINT) or {})
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert counts == [3, 1, 2]
    resumed = make_several(tmp_path / "several")
    resumed.resume(list_checkpoints(tmp_path / "several" / "checkpoints")[-1])
    resumed.run()
    assert counts == [3, 1, 2, 2, 1, 3]
    assert without_time(resumed.metrics.rows) == without_time(single.metrics.rows)
    torch.testing.assert_close(
        dict(resumed.update.learner.loss.state_dict()), dict(single.update.learner.loss.state_dict()), rtol=0, atol=0
    )


def test_steps_ahead_end_where_something_is_due():
    schedule = TrainerSchedule(offline_steps=25, log_interval=10, eval_interval=0, save_interval=7, online_steps=5)
    assert [schedule.steps_ahead(step) for step in (0, 7, 10, 14, 21, 24, 25)] == [7, 3, 4, 6, 4, 1, 3]


def test_stacked_seeds_trained_several_steps_at_once_leave_the_rows_of_single_steps(tmp_path):
    def make_group(folder, *, several):
        folder.mkdir()
        trainers = [make_trainer(folder / f"seed{seed}") for seed in range(2)]
        with torch.no_grad():
            for parameter in trainers[1].update.learner.loss.parameters():
                parameter.mul_(1.5)
        stack = StackedUpdate([trainer.update for trainer in trainers])
        buffer = make_buffer(batch_size=16)
        torch.manual_seed(4)
        graphed = GraphedUpdate(stack, lambda: buffer.sample().reshape(2, 8), updates_per_replay=2) if several else None
        StackedTrainer(stack, buffer, trainers, show_progress=False, graphed=graphed).run()
        return trainers

    single, several = (make_group(tmp_path / str(several), several=several) for several in (False, True))
    for one, other in zip(single, several, strict=True):
        assert without_time(one.metrics.rows) == without_time(other.metrics.rows)
        assert len(one.metrics.rows) == 4
        names = [path.name for path in list_checkpoints(one.checkpoints)]
        assert names == [path.name for path in list_checkpoints(other.checkpoints)]
        states = [dict(trainer.update.learner.loss.state_dict()) for trainer in (one, other)]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    assert without_time(single[0].metrics.rows) != without_time(single[1].metrics.rows)
