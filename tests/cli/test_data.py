"""The data verbs as a user meets them: each kind of bad input, and the way from a file to a trained policy."""

import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.support.arrays import arrays, with_successors
from tests.support.command_line import assert_one_line, deflow
from tests.support.generation import DATASET, TASK


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("ending", [".npz", ".hdf5"])
def test_truncated_files_are_one_line(ending, home):
    pytest.importorskip("h5py", reason="needs the extra files")
    from tests.support.arrays import write

    path = write(home / f"set{ending}", with_successors())
    path.write_bytes(path.read_bytes()[:-300])
    for arguments in (["import", path.name, "--out", "out"], ["describe", path.name], ["describe", "nowhere.npz"]):
        assert_one_line(deflow("data", *arguments), arguments[1])
    assert_one_line(deflow("iav", path.name), path.name)
    assert [item.name for item in home.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("file:nowhere", ["nowhere holds no data set"]),
        ("own:nowhere", ["nowhere holds no data set"]),
        ("minary:x", ["unknown source", "did you mean minari"]),
        ("minari:nobody/nothing-v0", ["nobody/nothing-v0"]),
        ("minari:not an id", ["is no Minari id"]),
        ("door-humane-v1", ["did you mean door-human-v1"]),
        ("ogbench:cube-single-play-singletask-task9-v0", ["unknown task"]),
    ],
)
def test_unknown_data_are_one_line_everywhere(task, parts, home, monkeypatch):
    pytest.importorskip("minari", reason="needs the extra minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    for verb in (["train", f"task={task}", "download=false"], ["data", "describe", task, "--no-download"]):
        assert_one_line(deflow(*verb), *parts)
    assert not (home / "runs").exists()


def test_without_network_the_other_ways_are_named(home, monkeypatch):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    monkeypatch.setattr("ogbench.utils.DATASET_URL", "http://127.0.0.1:9")
    for verb in (["train", f"task={TASK}"], ["data", "describe", TASK], ["iav", TASK], ["data", "download", TASK]):
        assert_one_line(deflow(*verb), "Connection refused", f"deflow data generate {DATASET}", "--from-file")


def test_a_full_disk_is_one_line(home, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    np.savez(home / "set.npz", **arrays())
    monkeypatch.setattr("os.posix_fallocate", full)
    assert_one_line(deflow("data", "import", "set.npz", "--out", "out"), "No space left on device")
    assert [item.name for item in home.iterdir()] == ["set.npz"]


def _hold(folder, name, ready, done):
    from deflow_torchrl.paths import only_one_prepares

    with only_one_prepares(name, folder):
        ready.set()
        done.wait(60)


def test_a_second_process_that_prepares_the_same_set_is_one_line(home):
    np.savez(home / "set.npz", **arrays())
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(home, "out", ready, done))
    process.start()
    try:
        assert ready.wait(60)
        assert_one_line(deflow("data", "import", "set.npz", "--out", "out"), "another process is preparing out")
    finally:
        done.set()
        process.join()
    assert deflow("data", "import", "set.npz", "--out", "out").returncode == 0


def test_own_data_come_from_a_file_to_a_trained_and_evaluated_policy(home):
    pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
    rng = np.random.default_rng(0)
    ends = np.arange(1, 401) % 100 == 0
    angle = np.cumsum(rng.normal(size=400) * 0.05)
    np.savez(
        home / "pendulum.npz", obs=np.stack([np.cos(angle), np.sin(angle), np.zeros(400)], 1),
        torque=rng.uniform(-2, 2, 400), reward=-(angle**2), terminated=np.zeros(400), truncated=ends,
    )  # fmt: skip
    result = deflow(
        "data", "import", "pendulum.npz", "--out", "pendulum", "--column", "actions=torque", "--action-bounds", "-2", "2",
        "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["card"]["transitions"] == 396
    assert summary["card"]["provenance"] == "own"
    assert json.loads((home / "pendulum" / "card.json").read_text()) == summary["card"]
    assert "pendulum" in (home / "pendulum" / "card.md").read_text()
    assert_one_line(deflow("data", "import", "pendulum.npz", "--out", "pendulum"), "is in the way")
    small = ["hidden_dims=[8]", "offline_steps=4", "batch_size=8", "eval_episodes=1", "eval_workers=1", "threads=1"]
    small += ["eval_max_steps=5"]
    verb, *printed = summary["train"].split()[1:]
    for number, more in enumerate((["env=Pendulum-v1"], [], ["storage=memmap", "env=Pendulum-v1"])):
        trained = deflow(verb, *printed, *small, *more, f"out=run{number}", "--json")
        assert trained.returncode == 0, trained.stderr
        record = json.loads((home / f"run{number}" / "record.json").read_text())
        assert record["data"]["provenance"] == "own"
        assert set(record["evaluations"]) == ({"prior", "deflow"} if more else set())
        assert ("deflow: return" in trained.stdout) == bool(more)
        result = json.loads(trained.stdout.splitlines()[-1])
        assert result["metric"] == "return"
        assert set(result) >= ({"return"} if more else {"out"})
        assert "success" not in result
    assert_one_line(deflow("eval", "run1"), "nothing to evaluate it in")
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    resumed = deflow("resume", str(home / "run0"), cwd=elsewhere)
    assert resumed.returncode == 0, resumed.stderr
    assert deflow("eval", "run0").returncode == 0
    assert_one_line(deflow(verb, *printed, *small, "env=Pendulum-v9"), "env=Pendulum-v9 cannot be made")
    assert_one_line(deflow(verb, *printed, *small, "env=CartPole-v1"), "a bounded vector of real numbers is needed")
    assert_one_line(deflow(verb, *printed, *small, "env=MountainCarContinuous-v0"), "belong to another environment")
    card = deflow("data", "describe", "pendulum", "--json")
    assert json.loads(card.stdout.splitlines()[-1])["transitions"] == 396
    assert deflow("iav", "pendulum", "--json").returncode == 0


def test_a_task_is_described_with_the_meaning_of_its_rewards_and_where_it_is_from(generated, home):
    result = deflow("data", "describe", TASK, "--data-root", str(generated), "--json")
    assert result.returncode == 0, result.stderr
    card = json.loads(result.stdout.splitlines()[-1])
    assert (card["transitions"], card["episodes"], card["provenance"]) == (180, 3, "unknown")
    assert card["reward"]["meaning"].startswith("sub-goals met")
    (folder,) = (home / "home" / "cards").iterdir()
    assert json.loads((folder / "card.json").read_text()) == card
    file = deflow("data", "describe", str(generated / f"{DATASET}.npz"), "--out", str(home / "here"), "--json")
    assert json.loads(file.stdout.splitlines()[-1])["transitions"] == 180
    (generated / f"{DATASET}.json").write_text(
        json.dumps(
            {"provenance": "regenerated here", "seed": 0, "episodes": {"train": 3}, "versions": {"ogbench": "1"}}
        )
    )
    try:
        made = json.loads(
            deflow("data", "describe", TASK, "--data-root", str(generated), "--json").stdout.splitlines()[-1]
        )
        assert made["provenance"] == "regenerated here"
        assert made["about"]["made_with"] == {"seed": 0, "episodes": {"train": 3}, "ogbench": "1"}
    finally:
        (generated / f"{DATASET}.json").unlink()


def test_a_file_without_simulator_state_is_not_taken_for_ogbenchs(home):
    given = arrays()
    del given["rewards"], given["timeouts"]
    np.savez(home / "norewards.npz", **given)
    for verb in (["data", "describe"], ["iav"]):
        assert_one_line(deflow(*verb, "norewards.npz"), "has no rewards")


def test_sets_folders_and_files_are_described_or_the_right_name_is_hinted_at(generated, home):
    for name in (DATASET, "cube-single-play"):
        result = deflow("data", "describe", name, "--data-root", str(generated), "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["reward"] is None
        assert "none in the file" in result.stdout
    assert deflow("iav", DATASET, "--data-root", str(generated), "--queries", "20").returncode == 0
    assert_one_line(deflow("data", "describe", str(generated)), "holds files", "--data-root")
    assert_one_line(deflow("data", "describe", "data/nothing"), "is no folder")


def test_an_environment_that_cannot_be_made_is_found_before_anything_is_written(home, monkeypatch):
    pytest.importorskip("minari", reason="needs the extra minari")
    from gymnasium import spaces

    from tests.support.minari_sets import write

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    box = spaces.Box(-1, 1, (2,), np.float64)
    rng = np.random.default_rng(0)
    episode = (
        rng.normal(size=(9, 2)),
        rng.uniform(-1, 1, (8, 2)),
        np.ones(8),
        np.zeros(8, bool),
        np.eye(8, dtype=bool)[7],
    )
    write("mine/nowhere-v0", spaces.Box(-np.inf, np.inf, (2,), np.float64), box, [episode])
    small = ["hidden_dims=[8]", "offline_steps=2", "batch_size=4", "threads=1", "out=run"]
    assert_one_line(deflow("train", "task=minari:mine/nowhere-v0", *small), "recorded without one", "env=none")
    assert not (home / "run").exists()
    assert deflow("train", "task=minari:mine/nowhere-v0", "env=none", *small).returncode == 0


def test_memory_mapped_training_equals_training_in_memory(generated, home):
    def rows(storage):
        settings = [
            f"task={TASK}", f"data_root={generated}", f"out={storage}", "hidden_dims=[8]", "offline_steps=6", "log_interval=1",
            "batch_size=16", "eval_episodes=1", "eval_max_steps=5", "eval_workers=1", "threads=1", "eval_interval=0",
            f"storage={storage}",
        ]  # fmt: skip
        result = deflow("train", *settings)
        assert result.returncode == 0, result.stderr
        lines = (home / storage / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]

    assert rows("memmap") == rows("device")
    assert sorted(path.name for path in (home / "home" / "prepared").iterdir()) == [f"{TASK}-train", f"{TASK}-val"]


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_a_set(home):
    np.savez(home / "set.npz", **arrays())
    code = (
        "import os, signal\nfrom deflow_torchrl.data import builder\n"
        "def die(self, *a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
        "builder.ColumnBuilder.add_actions = die\n"
        "from deflow_torchrl.cli import main\nmain(['data', 'import', 'set.npz', '--out', 'out'])"
    )
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, env=os.environ)
    assert process.returncode == -9
    assert not (home / "out").exists()
    began = time.monotonic()
    assert deflow("data", "import", "set.npz", "--out", "out").returncode == 0
    assert time.monotonic() - began < 60
    assert sorted(path.name for path in home.iterdir()) == ["out", "set.npz"]


def test_home_is_expanded_and_a_refused_import_leaves_no_folder(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home / "me"))
    np.savez(home / "set.npz", **arrays(rewards=np.full(12, np.nan)))
    (home / "old").mkdir()
    for out in ("outs/a/b/c", "old/a/b", "~/d"):
        assert_one_line(deflow("data", "import", "set.npz", f"--out={out}"), "NaN")
    assert sorted(path.name for path in home.rglob("*")) == ["old", "set.npz"]
    np.savez(home / "set.npz", **arrays())
    assert deflow("data", "import", "set.npz", "--out=~/d").returncode == 0
    assert (home / "me" / "d" / "card.json").is_file()
    assert not (home / "~").exists()


@pytest.mark.parametrize(
    "out", ["plain/a-b_c.1", "a b", "a,b", "run(1)=x", "it's", "[a]{b}", "a${seed}", "back\\", "ü", "#1", '"q"', "\\'"]
)
def test_the_printed_command_reads_the_folder_whatever_its_name(out, home):
    from deflow_torchrl.runs.overrides import compose_config

    np.savez(home / "set.npz", **arrays())
    result = deflow("data", "import", "set.npz", "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    summary, printed = json.loads(result.stdout.splitlines()[-1]), result.stdout.splitlines()[-2]
    assert printed == f"go on with: {summary['train']}"
    program, verb, *settings = shlex.split(summary["train"])
    assert (program, verb) == ("deflow", "train")
    assert compose_config(settings).task == f"file:{out}"


def test_the_columns_taken_are_printed_and_stand_on_the_card(home):
    given = arrays()
    observations = given.pop("observations")
    np.savez(home / "set.npz", **given, state=observations, obs=observations)
    result = deflow("data", "import", "set.npz", "--out", "out")
    assert "columns: observations=obs, actions=actions, rewards=rewards, terminals=terminals" in result.stdout
    assert json.loads((home / "out" / "card.json").read_text())["about"]["columns"]["observations"] == "obs"


def test_a_set_without_rewards_trains_cloning_methods_only(home):
    given = arrays(terminal=())
    del given["rewards"], given["terminals"]
    np.savez(home / "set.npz", **given)
    assert_one_line(deflow("data", "import", "set.npz", "--out", "out"), "set.npz has no rewards", "--reward zero")
    result = deflow("data", "import", "set.npz", "--out", "out", "--reward", "zero")
    assert result.returncode == 0, result.stderr
    assert "note: none in the files; zeros stand in" in result.stdout
    small = ["task=file:out", "hidden_dims=[8]", "offline_steps=2", "batch_size=4", "threads=1"]
    for method in (["algo=deflow"], ["algo=iql", "algo.temperature=1"]):
        assert_one_line(deflow("train", *small, *method, "out=run"), "learns from rewards", "algo=flow_bc")
        assert not (home / "run").exists()
    for method in ("bc", "flow_bc"):
        trained = deflow("train", *small, f"algo={method}", f"out={method}")
        assert trained.returncode == 0, trained.stderr
