"""Seeds trained together: ordinary run folders, gone on with bit for bit, together or, once finished, alone."""

import json
import shutil
import signal
import sys

import pytest
import torch

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")
pytest.importorskip("jsonschema", reason="needs the extra reports")

from deflow_torchrl import cli
from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.errors import CheckpointNotWritten, InputError, NonFiniteLossError, RunInterrupted
from deflow_torchrl.reports import load_record
from deflow_torchrl.runs import run as runs_of
from deflow_torchrl.runs.evaluate import evaluate_run
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.run import Run
from deflow_torchrl.runs.settings import TrainConfig, config_from_dict, config_to_dict, default_out, with_task_defaults
from deflow_torchrl.trainers import StackedTrainer, StackedUpdate
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, step_of
from tests.support.killable import Children
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_bitwise, rows, steps, undrawn, without_times
from tests.support.runs import go_on as go_on_alone

SEEDS = [2, 0, 5]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


def settings(task, out, **changes):
    return TrainConfig(
        **{
            "task": task, "env": ENVIRONMENT, "batch_size": 8, "hidden_dims": [8], "log_interval": 1, "eval_interval": 4,
            "eval_episodes": 1, "eval_workers": 1, "save_interval": 3, "offline_steps": 9, "out": str(out), "seeds": SEEDS,
            "algo": DeFlowConfig(flow_steps=2), **changes,
        }
    )  # fmt: skip


def train(task, out, **changes):
    return runs_of.train(settings(task, out, **changes), command="deflow train", show_progress=False)


def go_on(out, *overrides, **options):
    return runs_of.resume(out, command="deflow resume", overrides=overrides, show_progress=False, **options)


def folders(out):
    return [out / f"seed{seed}" for seed in SEEDS]


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """Three seeds of nine steps, checkpoints every three steps and after each seed's best evaluation."""
    out = tmp_path_factory.mktemp("runs") / "group"
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        train(task, out)
    return out


@pytest.fixture
def group(finished, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    return shutil.copytree(finished, tmp_path / "group")


def assert_equal_groups(one, other):
    for run, same in zip(folders(one), folders(other), strict=True):
        assert rows(run) == rows(same)
        assert steps(run) == steps(same)
        states = [load_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (run, same)]
        assert_bitwise(*map(without_times, states))
        records = [json.loads((folder / "record.json").read_text()) for folder in (run, same)]
        assert records[0]["evaluations"] == records[1]["evaluations"]


def test_each_seed_leaves_an_ordinary_run_and_the_group_its_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    finals = []
    for seed, run in zip(SEEDS, folders(finished), strict=True):
        record = load_record(run)
        assert (record["config"]["seed"], record["config"]["seeds"]) == (seed, None)
        assert (record["seeds"]["training"], record["success_timing"]) == (seed, None)
        assert record["variant"] == {"flow_steps": 2}, "neither the method's default nor the task's"
        assert record["stacked"] == SEEDS
        assert len(record["history"]) == 3
        assert [row["step"] for row in rows(run)] == list(range(1, 10))
        finals.append(record["evaluations"]["deflow"]["mean_return"])
        assert summary["seeds"][str(seed)]["return"]["deflow"] == finals[-1]
        evaluated = evaluate_run(run, episodes=None, show_progress=False)
        assert evaluated["evaluations"] == record["evaluations"], "eval repeats the run's own numbers"
    assert len({json.dumps(rows(run)[-1]) for run in folders(finished)}) == len(SEEDS), "the seeds are different runs"
    assert summary["mean"]["deflow"] == pytest.approx(sum(finals) / 3)
    assert summary["std"]["deflow"] == pytest.approx(torch.tensor(finals, dtype=torch.float64).std().item())
    assert len({tuple(steps(run)) for run in folders(finished)}) == 1, "all save whenever one does"


def test_a_seed_starts_from_the_networks_of_its_separate_run(task, tmp_path, monkeypatch):
    started = {}

    def look(trainer):
        started.update(
            {seed: update.state_dict()["loss"] for seed, update in zip(SEEDS, trainer.update.updates, strict=True)}
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(StackedTrainer, "run", look)
    with pytest.raises(RunInterrupted, match=r"before anything was trained of 9; go on with: deflow resume .*group"):
        train(task, tmp_path / "group")
    for seed in SEEDS:
        config = with_task_defaults(settings(task, tmp_path / "alone", seeds=None, seed=seed))
        alone = Run(config, tmp_path / "alone", commands=["x"], final_episodes=1, show_progress=False)
        assert_bitwise(dict(alone.learner.loss.state_dict()), dict(started[seed]))


@pytest.mark.parametrize("where", ["update 1", "update 5", "update 8", "evaluation 4", "evaluation 9"])
def test_ctrl_c_saves_every_seed_at_one_step_and_the_resumed_group_is_the_uninterrupted_one(
    task, finished, tmp_path, monkeypatch, where
):
    moment, at = where.split()[0], int(where.split()[1])
    undrawn(monkeypatch)
    out = tmp_path / "group"
    kept = {"update": StackedTrainer._train_step, "evaluation": Run._evaluate}

    def interrupted_update(trainer):
        if trainer.step == at:
            raise KeyboardInterrupt
        kept["update"](trainer)

    def interrupted_evaluation(run):
        if (
            run.trainer.step >= at and run.config.seed == SEEDS[1]
        ):  # the first seed has its evaluation, the others have not
            raise KeyboardInterrupt
        return kept["evaluation"](run)

    with monkeypatch.context() as patch:
        if moment == "update":
            patch.setattr(StackedTrainer, "_train_step", interrupted_update)
        else:
            patch.setattr(Run, "_evaluate", interrupted_evaluation)
        with pytest.raises(RunInterrupted, match=r"saved at step \d of 9; go on with: deflow resume .*group"):
            train(task, out)
    assert {steps(run)[-1] for run in folders(out)} == {at}
    go_on(out)
    for run, straight in zip(folders(out), folders(finished), strict=True):
        assert rows(run) == rows(straight)
        states = [load_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (run, straight)]
        assert_bitwise(*map(without_times, states))


def test_a_group_killed_between_two_seeds_checkpoints_goes_on_from_the_step_before(group, finished):
    for run in folders(group)[1:]:
        list_checkpoints(run / "checkpoints")[-1].unlink()
    go_on(group)
    assert_equal_groups(group, finished)
    for run in folders(group):
        record = json.loads((run / "record.json").read_text())
        assert record["commands"] == ["deflow train", "deflow resume"]


def test_a_group_killed_while_it_writes_checkpoints_is_bit_for_bit_the_uninterrupted_one(task, finished, tmp_path):
    out = tmp_path / "group"
    config = config_to_dict(settings(task, out))
    with Children(tmp_path / "log") as children:
        for moment, number in (("writing", 2), ("written", 5), ("renamed", 4), ("renamed", 2)):
            assert children.run(out, None if out.exists() else config, die=(moment, number)) == -signal.SIGKILL
        assert children.run(out) == 0, children.log.read_text()
    assert_equal_groups(out, finished)


def test_a_group_that_was_killed_in_its_first_save_begins_again(group, finished):
    shutil.rmtree(folders(group)[1])
    (group / "group.yaml").write_text((group / "group.yaml").read_text().replace("finished: true", "finished: false"))
    with pytest.raises(InputError, match=r"seed.* lacks it.*; put the missing folders back"):
        go_on(group)
    for folder in folders(group):
        for path in list_checkpoints(folder / "checkpoints")[1:]:
            path.unlink()
    go_on(group)
    assert_equal_groups(group, finished)


def test_a_finished_group_only_reports_again_and_goes_on_further_with_force(group, finished):
    go_on(group)
    assert_equal_groups(group, finished)
    with pytest.raises(
        InputError, match="offline_steps: 9 -> 12; put them back, or go on with the new ones with --force"
    ):
        go_on(group, "offline_steps=12")
    go_on(group, "offline_steps=12", "algo.lr=0.001", force=True)
    for run in folders(group):
        assert [row["step"] for row in rows(run)] == list(range(1, 13))
        state = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
        assert {part["lr"] for part in state["update"]["optimizer"]["param_groups"]} == {0.001}
    go_on(group)  # what was forced once needs no force again


def test_an_older_step_is_gone_on_from_by_all(group, finished):
    older = steps(folders(group)[0])[-2]
    with pytest.raises(InputError, match="no checkpoint of step 2"):
        go_on(group, step=2)
    go_on(group, step=older)
    assert_equal_groups(group, finished)


def test_a_damaged_checkpoint_is_refused_with_the_newest_step_that_is_whole_in_all(group):
    (*_, before, last) = list_checkpoints(folders(group)[2] / "checkpoints")
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(InputError, match=rf"damaged.*step {step_of(before)}: deflow resume .*group --step") as error:
        go_on(group)
    assert "\n" not in str(error.value)


def test_a_seed_of_an_unfinished_group_does_not_go_on_alone_and_one_of_a_finished_group_does(group):
    run = folders(group)[0]
    finished = (group / "group.yaml").read_text()
    (group / "group.yaml").write_text(finished.replace("finished: true", "finished: false"))
    with pytest.raises(InputError, match=rf"seeds \[2, 0, 5\].*deflow resume {group}$"):
        go_on_alone(run, "online_steps=4", force=True)
    (group / "group.yaml").write_text(finished)
    record = go_on_alone(run, "online_steps=4", force=True)
    assert record["online"]["env_steps"] == 4
    assert record["stacked"] == SEEDS
    assert [row["phase"] for row in rows(run)] == ["offline"] * 9 + ["online"] * 4
    with pytest.raises(InputError, match=rf"{run} has gone on by itself .*online_steps: 0 -> 4"):
        go_on(group)
    shutil.rmtree(run)
    with pytest.raises(InputError, match="is missing"):
        go_on(group)


def test_a_non_finite_loss_of_one_seed_names_it_and_keeps_every_seeds_checkpoints(task, tmp_path, monkeypatch):
    update = StackedUpdate.__call__

    def poisoned(stack, batch):
        if stack.updates[0].step == 7:
            batch = batch.clone()
            batch["next", "reward"][1] = float("nan")
        return update(stack, batch)

    monkeypatch.setattr(StackedUpdate, "__call__", poisoned)
    with pytest.raises(
        NonFiniteLossError, match=r"seed 0: loss_qvalue became .* step 8; the last good checkpoints are of step \d"
    ):
        train(task, tmp_path / "group", eval_interval=0)
    assert {tuple(steps(run)) for run in folders(tmp_path / "group")} == {(3, 6)}


def test_weights_that_are_not_finite_name_the_seed_and_leave_no_half_a_step_behind(task, tmp_path, monkeypatch):
    close = StackedTrainer._finish_step

    def break_weights(trainer):
        if trainer.step == 6:
            trainer.update.updates[2].learner.loss.log_alpha.data.fill_(float("nan"))
        close(trainer)

    monkeypatch.setattr(StackedTrainer, "_finish_step", break_weights)
    with pytest.raises(NonFiniteLossError, match="seed 5: the weights became NaN or infinite at step 6"):
        train(task, tmp_path / "group", eval_interval=0)
    assert {tuple(steps(run)) for run in folders(tmp_path / "group")} == {(3,)}


def test_a_full_disk_costs_all_seeds_a_checkpoint_and_not_the_run(task, finished, tmp_path, monkeypatch, caplog):
    from deflow_torchrl.trainers import loop

    undrawn(monkeypatch)

    def save(folder, at, state, **kwargs):
        if at == 6 and folder.parent.name == "seed0":
            raise CheckpointNotWritten(folder / "x", OSError(28, "No space left on device"))
        return save_checkpoint(folder, at, state, **kwargs)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    train(task, tmp_path / "group")
    assert "No space left on device" in caplog.text
    kept = {tuple(steps(run)) for run in folders(tmp_path / "group")}
    assert len(kept) == 1
    assert 6 not in next(iter(kept))
    assert [rows(run) for run in folders(tmp_path / "group")] == [rows(run) for run in folders(finished)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seeds=[0,0]"], "each seed once"),
        (["seeds=[]"], "at least one"),
        (["seeds=[0,-1]"], "numbers from 0"),
        (["seeds=[a]"], "could not be converted"),
        (["seeds=3"], "seeds"),
        (["seeds=[0,1]", "seed=0"], "give seed= or seeds=, not both"),
        (["seeds=[1,2]", "online_steps=5"], r"deflow resume OUT/seed1 online_steps=5 --force"),
        (["seeds=[1,2]", "logger=wandb"], "one run in a process"),
        (["seeds=[1,2]", "compile=true"], "leave it off"),
    ],
)
def test_seeds_that_cannot_be_trained_are_refused_in_one_line(overrides, said):
    with pytest.raises(InputError, match=said) as error:
        compose_config(["task=file:x", *overrides])
    assert "\n" not in str(error.value)


def test_what_cannot_change_and_folders_that_are_taken_are_refused(task, group, tmp_path):
    for override in ("seeds=[1]", "seed=1", "out=x"):
        with pytest.raises(InputError, match="cannot be changed"):
            go_on(group, override, force=True)
    with pytest.raises(InputError, match="already holds a run"):
        train(task, group)
    with pytest.raises(InputError, match="already holds a run"):
        runs_of.train(settings(task, group, seeds=None), command="x", show_progress=False)
    with pytest.raises(InputError, match="holds the runs of seeds"):
        evaluate_run(group, episodes=1)
    with pytest.raises(InputError, match="is a run of one seed"):
        go_on_alone(folders(group)[0], "seeds=[1]", force=True)
    (group / "group.yaml").write_text("nonsense")
    with pytest.raises(InputError, match="damaged"):
        go_on(group)


def test_settings_with_seeds_go_to_a_file_and_back_and_name_a_folder():
    config = compose_config(["task=file:x", "seeds=[3,1]"])
    assert config.seeds == [3, 1]
    assert config_from_dict(config_to_dict(config)) == config
    assert str(default_out(config)) == "runs/file-x-deflow-seeds3-1"


def test_the_command_line_trains_resumes_and_prints_every_seed(task, tmp_path, capsys, monkeypatch):
    undrawn(monkeypatch)

    def deflow(*arguments):
        monkeypatch.setattr(sys, "argv", ["deflow", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.app(prog_name="deflow")
        return left.value.code or 0, capsys.readouterr()

    out = tmp_path / "group"
    code, printed = deflow(
        "train", f"task='{task}'", f"env='{ENVIRONMENT}'", f"out={out}", "seeds=[0,1]", "offline_steps=2", "batch_size=4",
        "hidden_dims=[8]", "eval_episodes=1", "eval_workers=1", "--json",
    )  # fmt: skip
    assert code == 0, printed.err
    summary = json.loads(printed.out.splitlines()[-1])
    assert set(summary["seeds"]) == {"0", "1"}
    assert set(summary["mean"]) == set(summary["std"]) == {"prior", "deflow"}
    assert "seed 1: prior" in printed.out
    code, printed = deflow("resume", str(out), "--json")
    assert code == 0, printed.err
    again = json.loads(printed.out.splitlines()[-1])
    assert again["seeds"] == summary["seeds"]
    code, printed = deflow("eval", str(out / "seed1"), "--json")
    assert code == 0, printed.err
    assert json.loads(printed.out.splitlines()[-1])["return"] == summary["seeds"]["1"]["return"]
    code, printed = deflow("eval", str(out))
    assert code == 2
    assert len(printed.err.splitlines()) == 1
