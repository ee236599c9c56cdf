"""The online phase inside the training loop, on a real environment (Pendulum)."""

import json

import gymnasium
import numpy as np
import pytest
import torch

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data import BaseActionBank, OfflineOnlineReplayBuffer, TransitionDataset
from deflow_torchrl.errors import NonFiniteLossError
from deflow_torchrl.trainers import (
    Evaluator,
    MetricsLog,
    OnlineExperience,
    OnlinePhase,
    Trainer,
    TrainerSchedule,
    UpdateStep,
)
from deflow_torchrl.trainers.checkpoint import list_checkpoints, step_of
from tests.support.pendulum import ENVIRONMENT as SHORT
from tests.support.pendulum import EPISODE_STEPS
from tests.support.runs import without_time

ENVIRONMENT = "gym:Pendulum-v1"
OFFLINE, ONLINE = 6, 14


@pytest.fixture(scope="module")
def pendulum():
    """Two episodes of random actions."""
    env = gymnasium.make("Pendulum-v1")
    env.action_space.seed(0)
    columns = {"observations": [], "actions": [], "rewards": [], "terminals": [], "timeouts": []}
    for episode in range(2):
        observation, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            action = env.action_space.sample()
            following, reward, _, truncated, _ = env.step(action)
            for name, value in zip(columns, (observation, action / 2, reward, 0, truncated), strict=True):
                columns[name].append(value)
            observation = following
    env.close()
    return TransitionDataset.from_arrays(**{name: np.array(values, np.float32) for name, values in columns.items()})


def make_trainer(
    folder,
    dataset,
    *,
    freeze=False,
    offline=OFFLINE,
    online=ONLINE,
    evaluate=None,
    environment=ENVIRONMENT,
    reward_shift=0.0,
    **options,
):
    folder.mkdir(exist_ok=True)
    schedule = {"log_interval": 4, "eval_interval": 5, "save_interval": 5}
    schedule |= {name: options.pop(name) for name in list(options) if name in TrainerSchedule.__dataclass_fields__}
    torch.manual_seed(0)
    problem = ProblemSpec(3, 1, (8, 8), 0.99, "mean", 0.01, torch.device("cpu"))
    update = UpdateStep(get_algorithm("deflow").build(DeFlowConfig(flow_steps=3, lr=1e-3), problem))
    buffer = OfflineOnlineReplayBuffer(dataset, online_capacity=max(online, 1), batch_size=8)
    bank = BaseActionBank(update.learner.prior, buffer, num_actions=4) if freeze else None
    phase = OnlinePhase(
        buffer,
        lambda add, discard: OnlineExperience(
            environment, update.learner.policy, seed=0, add=add, discard=discard, device="cpu", **options
        ),
        bank=bank,
        bank_file=folder / "base_actions.pt",
        reward_shift=reward_shift,
    )
    torch.manual_seed(3)
    return Trainer(
        update,
        buffer,
        schedule=TrainerSchedule(offline_steps=offline, online_steps=online, **schedule),
        checkpoints=folder / "checkpoints",
        online=phase,
        metrics=MetricsLog(folder),
        evaluate=evaluate,
        show_progress=False,
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.update.learner.loss.state_dict().items()}


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_each_online_step_acts_once_and_updates_once(tmp_path, pendulum):
    trainer = make_trainer(tmp_path, pendulum)
    trainer.run()
    assert trainer.step == OFFLINE + ONLINE
    assert trainer.update.step == OFFLINE + ONLINE
    assert trainer.buffer.num_online == trainer.online.counters["env_steps"] == ONLINE
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["phase"] for row in rows} == {
        4: "offline", 6: "offline", 8: "online", 12: "online", 16: "online", 20: "online",
    }  # fmt: skip
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")][-1] == OFFLINE + ONLINE
    assert "train/online_share" in rows[-1]
    assert "train/online_share" not in rows[0]


def test_nothing_of_the_learner_starts_anew_at_the_boundary(tmp_path, pendulum):
    trainer = make_trainer(tmp_path, pendulum, online=1)
    trainer.run()
    steps = {int(state["step"]) for state in trainer.update.optimizer.state.values()}
    assert steps == {OFFLINE + 1}
    offline = make_trainer(tmp_path / "offline", pendulum, online=0)
    offline.run()
    before = offline.update.learner.loss.log_alpha
    assert abs(trainer.update.learner.loss.log_alpha - before) < 2e-3  # one Adam step of lr 1e-3 from where it was
    assert before != 1.0


@pytest.mark.parametrize(("utd", "warmup", "expected"), [(2.0, 0, 28), (0.5, 0, 7), (1.0, 10, 4), (0.3, 3, 3)])
def test_gradient_steps_follow_utd_after_the_warm_up(tmp_path, pendulum, utd, warmup, expected):
    trainer = make_trainer(tmp_path, pendulum, utd=utd, warmup_steps=warmup)
    trainer.run()
    assert trainer.update.step == OFFLINE + expected
    assert trainer.buffer.num_online == ONLINE


def test_a_methods_updates_can_wait_for_the_end_of_an_episode_also_across_a_resume(tmp_path, pendulum):
    def make(name):
        trainer = make_trainer(tmp_path / name, pendulum, environment=f"gym:{SHORT}", online=EPISODE_STEPS + 5, utd=2.0)
        trainer.update.learner.whole_episodes = True
        return trainer

    straight, counts = make("straight"), []
    act = straight.online.step

    def counted():
        counts.append(straight.update.step)
        act()

    straight.online.step = counted
    straight.run()
    assert counts == [OFFLINE] * EPISODE_STEPS + [OFFLINE + 2 * EPISODE_STEPS] * 5
    assert straight.update.step == OFFLINE + 2 * (EPISODE_STEPS + 5)
    stopped = make("stopped")
    train_step = stopped._train_step

    def interrupted():
        if stopped.step == OFFLINE + 9:
            raise KeyboardInterrupt
        return train_step()

    stopped._train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = make("stopped")
    resumed.resume(list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1])
    assert resumed.step == OFFLINE + 9
    resumed.run()
    assert_equal(weights(resumed), weights(straight))


def test_a_frozen_prior_stays_as_it_was_and_everything_else_learns(tmp_path, pendulum):
    offline = make_trainer(tmp_path / "offline", pendulum, online=0)
    offline.run()
    frozen = make_trainer(tmp_path / "frozen", pendulum, freeze=True)
    frozen.run()
    before, after = weights(offline), weights(frozen)
    for name, value in before.items():
        if value.is_floating_point() and not name.endswith(("low", "high", "gamma", "target_divergence")):
            assert torch.equal(value, after[name]) == ("velocity" in name), name
    rows = frozen.metrics.rows
    assert "train/loss_flow" in rows[0]
    assert "train/loss_flow" not in rows[-1]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("at", [5, 6, 7, 11, 19])
def test_ctrl_c_and_resume_across_the_boundary_is_bit_for_bit_the_uninterrupted_run(tmp_path, pendulum, at, freeze):
    straight = make_trainer(tmp_path / "straight", pendulum, freeze=freeze)
    straight.run()
    stopped = make_trainer(tmp_path / "stopped", pendulum, freeze=freeze)
    train_step = stopped._train_step

    def interrupted():
        if stopped.step + 1 == at:
            raise KeyboardInterrupt
        return train_step()

    stopped._train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = make_trainer(tmp_path / "stopped", pendulum, freeze=freeze)
    (*_, checkpoint) = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    assert step_of(checkpoint) == at - 1
    torch.manual_seed(12345)  # what the run starts with must not matter
    resumed.resume(checkpoint)
    resumed.run()
    assert_equal(weights(resumed), weights(straight))
    assert_equal(resumed.buffer[:].to_dict(), straight.buffer[:].to_dict())
    assert without_time(resumed.metrics.rows) == without_time(straight.metrics.rows)


def test_evaluations_do_not_change_an_online_run(tmp_path, pendulum):
    plain = make_trainer(tmp_path / "plain", pendulum)
    plain.run()
    with Evaluator(ENVIRONMENT, num_envs=1) as evaluator:

        def evaluate():
            return {"eval/return": float(evaluator.run(often.update.learner.policy, episodes=1).episode_return.mean())}

        often = make_trainer(tmp_path / "often", pendulum, eval_interval=4, evaluate=evaluate)
        often.run()
    assert sum("eval/return" in row for row in often.metrics.rows) == 6
    assert_equal(weights(often), weights(plain))
    assert_equal(often.buffer[:].to_dict(), plain.buffer[:].to_dict())


def test_a_step_that_fails_half_way_is_never_saved_as_a_step(tmp_path, pendulum):
    trainer = make_trainer(tmp_path, pendulum, utd=2.0)
    update, calls = trainer.update.optimizer.step, []

    def failing():
        calls.append(trainer.step)
        if calls.count(OFFLINE + 2) == 2:  # the second update of the third online step
            raise RuntimeError("out of memory")
        update()

    trainer.update.optimizer.step = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.run()
    (*_, last) = list_checkpoints(tmp_path / "checkpoints")
    assert step_of(last) == OFFLINE  # the boundary; nothing of the steps after it, the last of which is torn


def test_steps_without_an_update_are_logged_and_logging_changes_nothing(tmp_path, pendulum):
    options = {"utd": 0.5, "warmup_steps": 1}
    often = make_trainer(tmp_path / "often", pendulum, log_interval=1, **options)
    often.run()
    rows = [row for row in often.metrics.rows if row["phase"] == "online"]
    assert len(rows) == ONLINE
    assert all({"train/loss_qvalue", "train/q_refined", "train/online_share"} <= set(row) for row in rows)
    seldom = make_trainer(tmp_path / "seldom", pendulum, log_interval=100, **options)
    seldom.run()
    assert_equal(weights(often), weights(seldom))


def test_rewards_are_shifted_as_the_datas_were_before_they_are_stored(tmp_path, pendulum):
    stored = []
    for shift in (0.0, -1.0):
        trainer = make_trainer(tmp_path / f"{shift}", pendulum, reward_shift=shift)
        trainer.run()
        stored.append(trainer.buffer[len(pendulum) :]["next", "reward"][0])
    assert_equal(stored[1], stored[0] - 1.0)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, pendulum):
    trainer = make_trainer(tmp_path, pendulum, online=0)
    with torch.no_grad():
        next(trainer.update.learner.loss.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="weights"):
        trainer.save()
    assert not list_checkpoints(tmp_path / "checkpoints")
