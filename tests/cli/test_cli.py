import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest

from deflow_torchrl.algorithms import ALGORITHMS
from deflow_torchrl.cli import app
from deflow_torchrl.envs import online
from deflow_torchrl.errors import InputError
from deflow_torchrl.reports import load_record
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.runs.settings import config_from_dict, config_to_dict
from deflow_torchrl.sources.oracles import GENERATED_DATASETS
from deflow_torchrl.trainers import collection
from tests.support.command_line import assert_one_line, deflow, heed_ctrl_c
from tests.support.generation import DATASET, TASK
from tests.support.runs import drawn


def settings(generated, out, *more):
    return [
        f"task={TASK}", f"data_root={generated}", f"out={out}", "hidden_dims=[16,16]", "batch_size=16", "offline_steps=6",
        "log_interval=2", "eval_interval=3", "save_interval=3", "eval_episodes=1", "eval_max_steps=5",
        "eval_workers=1", "threads=1", *more,
    ]  # fmt: skip


def test_help_lists_the_verbs_without_importing_torch():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "deflow_torchrl.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for verb in ("demo", "train", "resume", "eval", "data", "iav"):
        assert verb in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "torchrl", "ogbench", "hydra"}


def test_the_help_of_train_lists_every_method_and_its_settings():
    text = " ".join(deflow("train", "--help").stdout.split())
    for name, algorithm in ALGORITHMS.items():
        listed = text.split(f" {name} (")[1].split(")")[0].split(", ")
        assert {"name", *listed} == {field.name for field in dataclasses.fields(algorithm.config)}


def test_train_then_eval_then_resume(generated, tmp_path, monkeypatch):
    drawn(monkeypatch)
    out = tmp_path / "run"
    trained = deflow("train", *settings(generated, out), "--json")
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout.splitlines()[-1])
    assert set(summary["success"]) == {"prior", "deflow"}
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "metrics.jsonl", "metrics.csv", "checkpoints", "record.json", "report.html", "learning_curve.png",
    }  # fmt: skip
    record = load_record(out)
    assert record["config"]["seed"] == 0
    assert record["data"]["transitions"] == 180
    assert (record["acting"], record["success_timing"]) == ("deflow", "pre")
    assert record["seeds"] == {"training": 0, "evaluation": record["evaluations"]["deflow"]["seeds"][0]}
    assert summary["out"] == str(out)
    assert str(generated) not in json.dumps({**record, "command": "", "commands": []})
    assert len(record["evaluations"]["deflow"]["success"]) == 1
    assert record["versions"]["torchrl"]
    again = [deflow("eval", str(out), "--json") for _ in range(2)]
    assert again[0].returncode == 0, again[0].stderr
    first, second = (json.loads(result.stdout.splitlines()[-1]) for result in again)
    assert first == second
    assert first["evaluations"]["deflow"] == record["evaluations"]["deflow"], "eval repeats the run's own numbers"
    assert_one_line(deflow("train", *settings(generated, out)), "already holds a run", "deflow resume")
    assert deflow("resume", str(out)).returncode == 0


def test_ctrl_c_saves_says_how_to_go_on_and_the_resumed_run_equals_the_uninterrupted(generated, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    more = ("offline_steps=150", "eval_interval=0", "save_interval=0", "log_interval=1")
    assert deflow("train", *settings(generated, straight, *more)).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "deflow_torchrl.cli", "train", *settings(generated, stopped, *more)],
        stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (stopped / "metrics.jsonl").exists() or len((stopped / "metrics.jsonl").read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"go on with: deflow resume {stopped}" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert deflow("resume", str(stopped)).returncode == 0

    def rows(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]

    assert rows(stopped) == rows(straight)
    assert len(rows(straight)) == 150


def test_a_damaged_checkpoint_and_a_folder_that_is_no_run_are_refused(generated, tmp_path):
    out = tmp_path / "run"
    assert deflow("train", *settings(generated, out)).returncode == 0
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(b"nonsense")
    assert_one_line(deflow("eval", str(out)), "damaged")
    assert_one_line(deflow("resume", str(out)), "damaged")
    assert_one_line(deflow("eval", str(tmp_path / "nowhere")), "not a run folder")
    (out / "config.yaml").write_text("a: [")
    assert_one_line(deflow("resume", str(out)), "config.yaml is damaged")


def test_bad_input_is_one_line_and_leaves_nothing_behind(generated, tmp_path):
    out = tmp_path / "run"
    bad = {
        "task=cube-single-play-singletask-task9-v0": "did you mean cube-single-play-singletask",
        "devise=cpu": "did you mean device",
        "data_root=/nonexistent": f"/nonexistent/{DATASET}.npz",
        "device=warp": "device=warp cannot be used",
        "algo.gamma=1.5": "expected a number in [0, 1)",
        "logger=mlflow": "deflow-torchrl[mlflow]",
    }
    for setting, message in bad.items():
        assert_one_line(deflow("train", *settings(generated, out, "download=false", setting)), message)
        assert not out.exists(), setting


def test_generated_data_is_the_same_for_any_workers_and_trains_with_the_printed_command(tmp_path):
    # A set of few and cheap episodes; the demo's tests generate with the arm.
    sets = []
    for workers in ("1", "2"):
        result = deflow(
            "data", "generate", "pointmaze-medium-stitch", "--episodes", "3", "--seed", "5", "--workers", workers, "--json",
            env={"DEFLOW_HOME": str(tmp_path / workers)},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        *_, line, summary = result.stdout.splitlines()
        summary = json.loads(summary)
        length = GENERATED_DATASETS["pointmaze-medium-stitch-v0"].episode_steps - 1  # other tests may have shortened it
        assert summary["transitions"] == {"train": 3 * length, "val": length}
        folder = tmp_path / workers / "generated" / "pointmaze-medium-stitch-v0-3-1-seed5"
        assert [Path(file).parent for file in summary["files"]] == [folder, folder]
        assert all(file in line for file in summary["files"])
        assert line.endswith(summary["train"])
        sets.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sets[0] == sets[1]
    home = {"DEFLOW_HOME": str(tmp_path / "2")}
    verb, *printed = summary["train"].split()[1:]
    small = [
        setting for setting in settings(folder, tmp_path / "run") if not setting.startswith(("task=", "data_root="))
    ]
    assert deflow(verb, *printed, *small, env=home).returncode == 0
    elsewhere = deflow(verb, printed[0], *small[:-1], f"out={tmp_path / 'other'}", "download=false", env=home)
    assert_one_line(elsewhere, "no data file", f"data_root={folder}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cube-sinle-play"], "did you mean cube-single-play-v0"),
        (["antmaze-large-navigate"], "there are cube-single-play-v0"),
        (["scene-play", "--episodes", "0"], "at least 1"),
        (["scene-play", "--workers", "0"], "at least 1"),
        (["scene-play", "--seed", "-1"], "at least 0"),
        (["scene-play", "--out", "FILE/data"], "cannot write in"),
        (["scene-play", "--out", "TAKEN"], "was not generated here"),
    ],
)
def test_generate_refuses_in_one_line_and_writes_nothing(arguments, message, tmp_path):
    (tmp_path / "FILE").touch()
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "scene-play-v0.npz").write_text("published")
    before = sorted(tmp_path.rglob("*"))
    result = deflow("data", "generate", *arguments, cwd=tmp_path, env={"DEFLOW_HOME": str(tmp_path / "home")})
    assert_one_line(result, message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_read_only_cache_folder_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path / "file"))
    assert_one_line(deflow("demo", "--quick"), "cannot write in", "DEFLOW_HOME")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def run_iav(capsys, *arguments):
    """The verb in this process, to import torch once: exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as done:
        app(["iav", *map(str, arguments)], prog_name="deflow")
    return SimpleNamespace(
        returncode=done.value.code, **dict(zip(("stdout", "stderr"), capsys.readouterr(), strict=True))
    )


def test_iav_prints_values_suggestion_and_the_papers_and_one_json_object(generated, capsys):
    result = run_iav(capsys, TASK, "--data-root", str(generated), "--queries", "100", "--seed", "1", "--json")
    assert result.returncode == 0, result.stderr
    assert "neighbours: 100%" in result.stderr
    *text, last = result.stdout.splitlines()
    summary = json.loads(last)
    assert len(summary["per_dimension"]) == 5
    assert summary["mean"] == pytest.approx(sum(summary["per_dimension"]) / 5)
    assert (summary["k"], summary["queries"], summary["transitions"], summary["seed"]) == (5, 100, 180, 1)
    assert summary["suggested_target_divergence"] == {"manipulation": pytest.approx(0.1 * summary["mean"])}
    assert summary["paper"]["action_variance"]["cube-double"] == 0.013
    text = "\n".join(text)
    assert f"mean: {summary['mean']:.3g} (95%" in text
    assert "action 4: " in text
    assert f"manipulation: {summary['suggested_target_divergence']['manipulation']:.2g} (0.1 x the mean)" in text
    assert "copied from the paper" in text
    assert "antmaze-large 0.018" in text
    assert "deflow train uses target_divergence 0.001" in text


def test_iav_of_a_file_equals_that_of_the_task_and_options_reach_it(generated, capsys):
    from deflow_torchrl.data import intrinsic_action_variance, load_ogbench_dataset

    path = generated / f"{DATASET}.npz"
    result = run_iav(capsys, str(path), "--k", "3", "--include-self", "--normalize", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    transitions = load_ogbench_dataset(TASK, root=generated)[:]
    expected = intrinsic_action_variance(
        transitions["observation"], transitions["action"], k=3, include_self=True, normalize=True
    )
    assert summary["mean"] == pytest.approx(expected.mean, rel=1e-4), "up to the loader's clipping of the actions"
    assert set(summary["suggested_target_divergence"]) == {"manipulation", "navigation", "d4rl"}


def test_iav_refuses_bad_input_in_one_line(generated, tmp_path, capsys):
    path = str(generated / f"{DATASET}.npz")
    assert_one_line(run_iav(capsys, "cube-single-play-singletask-task9-v0"), "did you mean cube-single-play-singletask")
    assert_one_line(run_iav(capsys, TASK, "--data-root", str(tmp_path), "--no-download"), f"{tmp_path}/{DATASET}.npz")
    assert_one_line(run_iav(capsys, path, "--k", "180"), "180 transitions are too few for k=180")
    assert_one_line(run_iav(capsys, path, "--domain", "cooking"), "unknown domain 'cooking'")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "no task given"),
        (["task=x", "algo.lrr=1"], "did you mean algo.lr"),
        (["task=x", "algo=sac"], "unknown method 'sac'"),
        (["task=x", "+new=1"], "only set"),
        (["task=x", "seed"], "write key=value"),
        (["task=x", "seed=abc"], "seed"),
        (["task=x", "seed=-1"], "at least 0"),
        (["task=x", "seed=99999999999999999999999"], "below 2\\*\\*63"),
        (["task=x", "algo.log_alpha_init=nan"], "finite"),
        (["task=x", "algo.lr=inf"], "finite"),
        (["task=x", "out=''"], "a folder"),
        (["task=x", "algo.fixed_alpha=1", "algo.min_alpha=0.1"], "no bounds beside"),
        (["task=x", "hidden_dims=[]"], "positive widths"),
        (["task=x", "hidden_dims=[a"], "hidden_dims"),
        (["task=x", "offline_steps=0"], "at least 1"),
        (["task=x", "online_steps=5", "utd=0"], "utd=0"),
        (["task=x", "online_steps=5", "mixing=half"], "mixing=half"),
        (["task=x", "online_steps=5", "mixing=annealed"], "two shares"),
        (["task=x", "online_steps=5", "offline_fraction=2"], "offline_fraction=2"),
        (["task=x", "online_steps=5", "overwrite=offline"], "overwrite=offline"),
        (["task=x", "online_steps=5", "collector_workers=2"], "multiple of collector_workers=2"),
        (["task=x", "online_steps=5", "max_fault_share=7"], "max_fault_share=7"),
        (["task=x", "online_steps=5", "env=none"], "env=none asks for none"),
        (["task=x", "freeze_prior=true"], "set online_steps too"),
        (["task=x", "algo.tau=0"], r"\(0, 1\]"),
        (["task=x", "algo.min_alpha=2", "algo.max_alpha=1"], "at most algo.max_alpha"),
        (["task=x", "algo.q_aggregation=max"], "mean or min"),
        (["task=x", "logger=stdout"], "one of none, wandb"),
    ],
)
def test_wrong_settings_are_refused_with_a_hint(overrides, message):
    with pytest.raises(InputError, match=message) as error:
        compose_config(overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [{}, {"algo": None}, {"task": "x", "algo": {"name": "deflow"}, "batch_size": "abc"},
     {"task": "x", "algo": {"name": "deflow", "lr": "fast"}}, None],
)  # fmt: skip
def test_edited_run_settings_are_refused(values):
    with pytest.raises(InputError, match="do not fit"):
        config_from_dict(values)


def test_run_settings_of_an_unknown_method_are_refused_by_its_name():
    with pytest.raises(InputError, match="unknown method 'deflov'; did you mean deflow"):
        config_from_dict({"task": "x", "algo": {"name": "deflov"}})


def test_settings_survive_the_run_folder():
    config = compose_config(["task=file:x", "hidden_dims=[8,8]", "algo.fixed_alpha=0.5", "device=cpu"])
    assert config.hidden_dims == [8, 8]
    assert config_to_dict(config_from_dict(config_to_dict(config))) == config_to_dict(config)


@pytest.mark.parametrize("options", [[], ["freeze_prior=true", "base_actions=2", "mixing=balanced", "utd=0.5"]])
def test_train_goes_on_online(generated, tmp_path, options):
    out = tmp_path / "run"
    trained = deflow("train", *settings(generated, out, "online_steps=8", *options), "--json")
    assert trained.returncode == 0, trained.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["phase"]) for row in rows] == [
        (2, "offline"), (3, "offline"), (4, "offline"), (6, "offline"), (8, "online"), (9, "online"), (10, "online"),
        (12, "online"), (14, "online"),
    ]  # fmt: skip
    assert rows[-1]["online/env_steps"] == 8
    assert ("train/loss_flow" in rows[-1]) == (not options)
    assert {"train/divergence_ratio", "train/saturation", "train/q_base", "train/q_refined", "train/td_error"} <= set(
        rows[0]
    )
    logged = [row for row in rows if row["phase"] == "online" and "train/alpha" in row]
    assert logged
    assert all(0 <= row["train/online_share"] <= 1 for row in logged)
    record = json.loads((out / "record.json").read_text())
    assert record["online"] == {"episodes": 0, "faults": 0, "worker_restarts": 0, "env_steps": 8}
    assert [(note["step"], note["phase"]) for note in record["history"]] == [
        (3, "offline"), (6, "offline"), (9, "online"), (12, "online"), (14, "online"),
    ]  # fmt: skip
    assert deflow("eval", str(out), "--episodes", "1").returncode == 0
    again = deflow("resume", str(out), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "record.json").read_text())["online"] == record["online"]


class BrokenInMidEpisode(gymnasium.Wrapper):
    def reset(self, **options):
        self.steps = 0
        return self.env.reset(**options)

    def step(self, action):
        self.steps += 1
        if self.steps > 1:  # a first step that fails is found before the training
            raise RuntimeError("mj_step failed")
        return self.env.step(action)


def test_an_environment_that_keeps_failing_ends_the_run_in_one_line(generated, tmp_path, monkeypatch):
    make = online.make_gym_env
    monkeypatch.setattr(collection, "MINIMUM_EPISODES", 3)
    monkeypatch.setattr(online, "make_gym_env", lambda task, **kwargs: BrokenInMidEpisode(make(task, **kwargs)))
    out = tmp_path / "run"
    result = deflow("train", *settings(generated, out, "online_steps=100", "eval_interval=0", "offline_steps=2"))
    assert result.returncode == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("deflow: ")
    assert "mj_step failed" in line
    assert "deflow resume" in line
    assert max(path.name for path in (out / "checkpoints").iterdir()) > "step_000000002.pt"
