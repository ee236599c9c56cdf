"""``deflow resume``: what may change, what must not, and what a run remembers of its past."""

import json
import shutil
import sys

import pytest
import torch
import yaml

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl import cli
from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.errors import CheckpointNotWritten, InputError, RunInterrupted
from deflow_torchrl.runs.overrides import apply_overrides, compose_config
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import TrainConfig, config_to_dict
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint, read_header, save_checkpoint
from deflow_torchrl.trainers.resume import RunHistory, check_resumable
from tests.support.networks import make_batch
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_bitwise, assert_equal_runs, go_on, rows, steps, undrawn, without_times
from tests.support.updates import make_update


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """Offline for 6 steps, online for 6, checkpoints at 3, 6, 9 and 12 of which the last three are kept."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        train(
            TrainConfig(
                task=task, env=ENVIRONMENT, batch_size=8, hidden_dims=[8], log_interval=1, eval_interval=0, eval_episodes=1,
                eval_workers=1, save_interval=3, offline_steps=6, online_steps=6, out=str(out),
                algo=DeFlowConfig(flow_steps=2),
            ), command="deflow train", show_progress=False,
        )  # fmt: skip
    return out


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run, to be resumed without the drawing of its report."""
    undrawn(monkeypatch)
    return shutil.copytree(finished, tmp_path / "finished")


def edit(run, **changes):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in changes.items():
        where = settings["config"]["algo"] if name in settings["config"]["algo"] else settings["config"]
        where[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def contents(run):
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("how", ["override", "edit"])
def test_changed_settings_are_listed_and_nothing_is_touched_without_force(run, how):
    if how == "edit":
        edit(run, lr=0.001, online_steps=9)
    before = contents(run)
    with pytest.raises(InputError) as error:
        go_on(run, *(["algo.lr=0.001", "online_steps=9"] if how == "override" else []))
    assert "online_steps: 6 -> 9; algo.lr: 0.0003 -> 0.001; put them back" in str(error.value)
    assert "--force" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(run) == before


def test_with_force_the_new_settings_count_and_are_written_down(run):
    record = go_on(run, "algo.lr=0.001", "algo.target_divergence=0.5", "algo.gamma=0.5", "online_steps=9", force=True)
    saved = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert (saved["algo"]["lr"], saved["online_steps"]) == (0.001, 9)
    assert record["config"]["online_steps"] == 9
    assert [row["step"] for row in rows(run)] == list(range(1, 16))
    state = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    assert {group["lr"] for group in state["update"]["optimizer"]["param_groups"]} == {0.001}
    assert state["update"]["loss"]["target_divergence"].item() == 0.5
    assert state["update"]["loss"]["_value_estimator.gamma"].item() == 0.5
    assert read_header(list_checkpoints(run / "checkpoints")[-1])["identity"]["settings"]["algo"]["lr"] == 0.001
    go_on(run)  # the new settings are the run's own now


def test_settings_that_change_no_result_may_change_and_are_written_down(run):
    record = go_on(run, "save_interval=2", "download=false")
    assert record["config"]["save_interval"] == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["config"]["download"] is False


def test_an_offline_run_goes_on_online_with_force(task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    out = tmp_path / "run"
    small = [
        "batch_size=8",
        "hidden_dims=[8]",
        "eval_episodes=1",
        "eval_workers=1",
        "log_interval=1",
        "offline_steps=4",
    ]
    where = [f"task='{task}'", f"env='{ENVIRONMENT}'", f"out='{out}'"]
    train(compose_config([*where, *small]), command="train", show_progress=False)
    record = go_on(out, "online_steps=4", "freeze_prior=true", force=True)
    assert record["online"]["env_steps"] == 4
    assert [row["phase"] for row in rows(out)] == ["offline"] * 4 + ["online"] * 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=cube-single-play-singletask-task2-v0"], "of another run"),
        (["algo=sac"], "unknown method"),
        (["out=elsewhere"], "out= cannot be changed"),
        (["offline_steps=7"], "offline_steps: 6 -> 7: cannot change any more, the run is in its online phase"),
        (["freeze_prior=true"], "freeze_prior: False -> True: cannot change any more"),
        (["online_steps=5"], "at step 12 already, past the 11"),
        (["hidden_dims=[16]"], "does not fit this run's networks"),
        (["sed=1"], "unknown setting 'sed'; did you mean seed?"),
        (["seed=1,2"], "names several values"),
        (["batch_size=0"], "out of range"),
    ],
)
def test_what_cannot_change_is_refused_with_force_too_and_nothing_is_touched(run, overrides, said):
    before = contents(run)
    with pytest.raises(InputError, match=said):
        go_on(run, *overrides, force=True)
    assert contents(run) == before


def test_steps_that_were_trained_offline_stay_offline(run):
    before = contents(run)
    with pytest.raises(InputError, match="offline_steps=4: the run has trained 6 steps offline already") as error:
        go_on(run, "offline_steps=4", "online_steps=8", step=6, force=True)
    assert "\n" not in str(error.value)
    assert contents(run) == before


def test_other_data_another_version_and_another_torch_are_said(run, tmp_path):
    path = list_checkpoints(run / "checkpoints")[-1]
    identity, state = read_header(path)["identity"], load_checkpoint(path)
    for change, said, force in (
        ({"data_sha256": "other"}, "data_sha256 other there", True),
        ({"version": "9.1.0"}, "version 9.1.0 there", True),
        ({"algo": "fql"}, "algo fql there", True),
        ({"packages": identity["packages"] | {"torch": "1.0"}}, "torch: 1.0 -> ", False),
    ):
        save_checkpoint(path.parent, 12, state, identity=identity | change)
        with pytest.raises(InputError, match=said):
            go_on(run, force=force)


def test_a_run_of_an_earlier_version_goes_on_with_settings_that_came_later_at_their_defaults(run, finished):
    path = list_checkpoints(run / "checkpoints")[1]
    identity, state = read_header(path)["identity"], load_checkpoint(path)
    written = yaml.safe_load((run / "config.yaml").read_text())
    for settings in (identity["settings"], written["config"]):
        del settings["precision"], settings["algo"]["critic"]
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    save_checkpoint(path.parent, 9, state, identity=identity | {"version": "0.1.0"})
    go_on(run, step=9)
    assert rows(run) == rows(finished)


def test_an_older_checkpoint_is_gone_on_from_exactly_and_the_later_ones_are_given_up(run, finished):
    assert steps(run) == [6, 9, 12]
    with pytest.raises(InputError, match="no checkpoint of step 7; it has 6, 9, 12"):
        go_on(run, step=7)
    damaged = list_checkpoints(run / "checkpoints")[-1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"damaged.* the newest whole one is of step 9: deflow resume .* --step 9"):
        go_on(run)
    go_on(run, step=9)
    assert steps(run) == [6, 9, 12]
    assert rows(run) == rows(finished)
    same = [load_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (run, finished)]
    assert_bitwise(*map(without_times, same))
    go_on(run, "algo.lr=0.001", force=True, step=6)
    assert steps(run) == [6, 9, 12]
    assert rows(run)[:6] == rows(finished)[:6]
    assert rows(run)[6:] != rows(finished)[6:]


def test_what_was_given_up_is_not_gone_on_from_if_the_resumed_run_stops_at_once(run, monkeypatch):
    from deflow_torchrl.trainers import Trainer

    def stop(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", stop)
        with pytest.raises(RunInterrupted, match="saved at step 9 of 12"):
            go_on(run, "algo.lr=0.001", force=True, step=9)
    assert steps(run) == [6, 9]
    assert [row["step"] for row in rows(run)] == list(range(1, 10))
    go_on(run)  # what was forced once needs no force again
    assert steps(run) == [6, 9, 12]
    settings = [read_header(path)["identity"]["settings"] for path in list_checkpoints(run / "checkpoints")]
    assert [setting["algo"]["lr"] for setting in settings] == [0.0003, 0.001, 0.001]


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_the_same_rules(run, finished):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match=r"those of .*config.yaml: seed: 0 -> 1"):
        go_on(run, "seed=1")
    record = go_on(run)
    assert record["commands"] == ["deflow train", "deflow resume"]
    assert rows(run) == rows(finished)


def test_the_record_keeps_every_command_and_the_time_of_every_process(run, finished):
    first = json.loads((finished / "record.json").read_text())
    record = go_on(run)
    assert record["command"] == "deflow train"
    assert record["commands"] == ["deflow train", "deflow resume"]
    assert record["time"]["load_data"] > first["time"]["load_data"]
    assert record["time"]["cpu"] > first["time"]["cpu"] > 0
    assert record["time"]["updates"] == first["time"]["updates"]  # nothing was left to train
    assert record["history"] == first["history"]


def test_wall_times_add_up_over_processes_and_running_phases_count():
    first = RunHistory(["a"], seconds={"generate": 5.0})
    with first.timed("train"):
        state = first.state_dict()
        assert 0 < state["seconds"]["train"] <= first.seconds["train"]
    assert first.seconds["train"] >= state["seconds"]["train"]
    second = RunHistory(["a", "b"])
    with second.timed("load"):
        pass
    second.load_state_dict({"commands": ["a"], "seconds": {"generate": 5.0, "train": 2.0}})
    with second.timed("train"):
        pass
    assert second.commands == ["a", "b"]
    assert second.seconds["generate"] == 5.0
    assert second.seconds["train"] > 2.0
    assert second.seconds["load"] > 0


@pytest.mark.parametrize("step", [9, 12])
def test_a_full_disk_is_a_warning_on_the_way_and_an_error_at_the_end(run, finished, monkeypatch, caplog, step):
    from deflow_torchrl.trainers import loop

    def save(folder, at, state, **kwargs):
        if at == step:
            raise CheckpointNotWritten(folder / "x", OSError(28, "No space left on device"))
        return save_checkpoint(folder, at, state, **kwargs)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    if step == 12:
        with pytest.raises(CheckpointNotWritten, match="make room and go on with: deflow resume"):
            go_on(run, step=6)
        assert steps(run) == [6, 9]
        monkeypatch.undo()
        undrawn(monkeypatch)
        go_on(run)
    else:
        go_on(run, step=6)
        assert steps(run) == [6, 12]
        assert "No space left on device" in caplog.text
    assert rows(run) == rows(finished)


def test_overrides_are_read_as_on_a_new_run_and_on_top_of_the_runs_own():
    base = compose_config(["task=file:x", "seed=3", "algo.lr=0.01", "hidden_dims=[8]"])
    config = apply_overrides(base, ["hidden_dims=[4,4]", "algo.gamma=0.9", "threads=null", "algo=deflow", "env='a b'"])
    expected = config_to_dict(base) | {"hidden_dims": [4, 4], "env": "a b"}
    expected["algo"] = expected["algo"] | {"gamma": 0.9}
    assert config_to_dict(config) == expected
    assert apply_overrides(base, []) is base
    for bad, said in {
        "seed=x": "could not be converted", "algo.lr=fast": "could not be converted", "hidden_dims=3": "cannot read",
        "seed": "is not a setting", "+new=1": "cannot be added", "seed=[": "cannot read",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=said):
            apply_overrides(base, [bad])


def test_a_release_before_the_online_phase_compares_as_one_without_it():
    theirs = {"task": "a", "offline_steps": 5, "algo": {"name": "deflow"}}
    changes = check_resumable(
        theirs | {"offline_steps": 8}, saved=theirs, checkpoint=None, config_file="config.yaml", force=True
    )
    assert changes == ["offline_steps: 5 -> 8"]


def test_the_command_line_lists_changes_with_exit_code_2_and_takes_force_and_step(run, capsys, monkeypatch):
    def deflow(*arguments):
        monkeypatch.setattr(sys, "argv", ["deflow", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.app(prog_name="deflow")
        return left.value.code or 0, capsys.readouterr()

    code, printed = deflow("resume", str(run), "algo.lr=0.001")
    assert code == 2
    assert printed.err.startswith("deflow: settings differ from those of")
    assert len(printed.err.splitlines()) == 1
    code, printed = deflow("resume", str(run), "algo.lr=0.001", "--force", "--step", "9", "--json")
    assert code == 0, printed.err
    assert json.loads(printed.out.splitlines()[-1])["out"] == str(run)
    commands = json.loads((run / "record.json").read_text())["commands"]
    assert commands == ["deflow train", f"deflow resume {run} algo.lr=0.001 --force --step 9 --json"]


def test_an_update_keeps_its_own_settings_only_when_asked():
    theirs, plain, forced = make_update(lr=1e-3), make_update(lr=1e-2), make_update(lr=1e-2, target_divergence=0.5)
    theirs(make_batch())
    plain.load_state_dict(theirs.state_dict())
    forced.load_state_dict(theirs.state_dict(), keep_settings=True)
    assert plain.optimizer.param_groups[0]["lr"] == 1e-3
    assert forced.optimizer.param_groups[0]["lr"] == 1e-2
    assert forced.learner.loss.target_divergence.item() == 0.5
    for name, value in theirs.learner.loss.named_parameters():
        assert torch.equal(dict(forced.learner.loss.named_parameters())[name], value)
    assert_bitwise(forced.optimizer.state_dict()["state"], theirs.optimizer.state_dict()["state"])


def test_stacked_states_go_on_online_and_resume_bit_for_bit(task, tmp_path, monkeypatch):
    undrawn(monkeypatch)
    out = tmp_path / "run"
    train(
        TrainConfig(
            task=task, env=ENVIRONMENT, frame_stack=2, batch_size=8, hidden_dims=[8], log_interval=1, eval_interval=0,
            eval_episodes=1, eval_workers=1, save_interval=7, offline_steps=2, online_steps=18, eval_max_steps=3, out=str(out),
            algo=DeFlowConfig(flow_steps=2),
        ), command="deflow train", show_progress=False,
    )  # fmt: skip
    stored = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])["online"]["buffer"]["_storage"]["online"]
    observation, following, done = (stored[name] for name in ("observation", "next.observation", "next.done"))
    assert observation.shape == (18, 6)
    starts = [0, *(done.flatten().nonzero().flatten() + 1).tolist()]
    assert torch.equal(following[:, :3], observation[:, 3:]), "the older frame of s' is the newer one of s"
    for row in range(18):
        older = observation[row, 3:] if row in starts else following[row - 1, :3]
        assert torch.equal(observation[row, :3], older), "before an episode's start its first frame is repeated"
    other = shutil.copytree(out, tmp_path / "other")
    go_on(other, step=14)
    assert_equal_runs(out, other)
