"""Sweeps on this machine: nothing finished is run again, whatever ends the sweep costs nothing, a job's failure is its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl.algorithms import ALGORITHMS
from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import hold_lock
from deflow_torchrl.runs.overrides import compose_config
from deflow_torchrl.sweep import estimate_costs, jobs, local, parse_sweep, plan_jobs, run_sweep
from deflow_torchrl.sweep.costs import _wall, describe_costs, describe_left_out
from deflow_torchrl.sweep.jobs import JobProgress, run_job
from deflow_torchrl.sweep.progress import SweepProgress
from deflow_torchrl.trainers.metrics import read_rows
from tests.support.command_line import assert_one_line, deflow, heed_ctrl_c
from tests.support.killable import ROOT
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs
from tests.support.sweep_process import PRELOADED

STEPS = 150
ALGOS = "deflow:flow_steps=2,deflow:flow_steps=2:fixed_alpha=0.3"
CUBE = "cube-single-play-singletask-task1-v0"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    monkeypatch.setattr(local, "_PRELOADED", PRELOADED)


def settings(task, out, *more, algos=ALGOS, seeds="0,1"):
    return [
        f"tasks={task}", f"env={ENVIRONMENT}", f"algos={algos}", f"seeds={seeds}", f"out={out}", f"offline_steps={STEPS}",
        "batch_size=8", "hidden_dims=[8]", "log_interval=1", "eval_interval=75", "eval_episodes=1", "save_interval=20", "jobs=2",
        *more,
    ]  # fmt: skip


def sweep(arguments):
    return run_sweep(parse_sweep(arguments), show_progress=False)


@pytest.fixture(scope="module")
def swept(task, tmp_path_factory):
    """Two methods with two seeds each, undisturbed: folder and summary."""
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "_PRELOADED", PRELOADED)
        return out, sweep(settings(task, out))


def run_folders(out):
    return sorted(path.parent.relative_to(out) for path in out.glob("*/*/seed*/record.json"))


def test_every_run_of_a_sweep_has_its_folder_and_the_sweep_its_plan_and_states(swept, task):
    out, summary = swept
    assert (summary["done"], summary["ran"], summary["failed"]) == (4, 4, [])
    name = task.replace(":", "-").replace("/", "-").replace("file--", "file-")
    algos = ["deflow-flow_steps=2", "deflow-flow_steps=2-fixed_alpha=0.3"]
    expected = [Path(name) / algo / f"seed{seed}" for algo in algos for seed in (0, 1)]
    assert run_folders(out) == expected
    record = json.loads((out / expected[3] / "record.json").read_text())
    assert (record["config"]["seed"], record["config"]["algo"]["fixed_alpha"], record["stacked"]) == (1, 0.3, None)
    plans = json.loads((out / "sweep.json").read_text())["plans"]
    assert [(plan["seeds"], plan["algos"]) for plan in plans] == [([0, 1], algos)]
    states = [json.loads(line) for line in (out / "status.jsonl").read_text().splitlines()]
    assert [row["state"] for row in states if row["job"] == str(expected[0])] == ["running", "done"]
    assert not list(out.rglob("*.lock"))


def test_what_is_finished_is_not_run_again_and_new_seeds_are_added(swept, task, tmp_path):
    out = shutil.copytree(swept[0], tmp_path / "sweep")
    for config in out.glob("*/*/seed*/config.yaml"):
        config.write_text(config.read_text().replace(str(swept[0]), str(out)))
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*/seed*/*") if path.is_file()}
    assert sweep(settings(task, out))["ran"] == 0
    more = sweep(settings(task, out, seeds="0..2", algos="deflow:flow_steps=2"))
    assert (more["done"], more["ran"]) == (3, 1)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(json.loads((out / "sweep.json").read_text())["plans"]) == 2


def test_other_settings_in_a_folder_are_refused_before_anything_runs(swept, task):
    before = (swept[0] / "status.jsonl").read_text()
    result = deflow("sweep", *settings(task, swept[0], "algo.lr=0.1", seeds="0..3"))
    assert_one_line(result, "was begun with other settings (algo.lr: 0.0003 -> 0.1)", "out=")
    assert (swept[0] / "status.jsonl").read_text() == before


def start(arguments, log):
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.sweep_process", *arguments],
            cwd=ROOT, stderr=file, stdout=subprocess.DEVNULL, preexec_fn=heed_ctrl_c,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip


def wait_for(condition, process=None, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it took too long"
        assert process is None or process.poll() is None, "the sweep ended too early"
        time.sleep(0.02)


def test_ctrl_c_and_a_kill_of_the_sweep_cost_nothing(swept, task, tmp_path):
    out = tmp_path / "sweep"
    arguments = settings(task, out, algos="deflow:flow_steps=2")
    runs = [Path(job.out) for job in plan_jobs(parse_sweep(arguments))]

    def trained(run, steps):
        return len(read_rows(run / "metrics.jsonl")) > steps

    first = start(arguments, tmp_path / "first")
    wait_for(lambda: trained(runs[0], 25), first)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    said = (tmp_path / "first").read_text()
    assert (
        "interrupted, 0 of 2 jobs are done and the others kept; the same command goes on: deflow sweep tasks=" in said
    )
    assert "Traceback" not in said
    begun = len(read_rows(runs[0] / "metrics.jsonl"))
    assert list((runs[0] / "checkpoints").glob("step_*.pt")), "Ctrl-C has saved"

    second = start(arguments, tmp_path / "second")
    wait_for(lambda: trained(runs[0], begun + 10), second)
    workers = [int(path.read_text().split()[1]) for path in runs[0].parent.glob("*/.lock")]
    assert workers
    second.kill()
    second.wait()
    for worker in workers:  # nobody is left behind that would go on with the runs
        wait_for(lambda worker=worker: not Path(f"/proc/{worker}").exists() or _is_zombie(worker))

    summary = sweep(arguments)
    assert (summary["done"], summary["failed"], len(run_folders(out))) == (2, [], 2)
    for folder in run_folders(out):
        assert_equal_runs(swept[0] / folder, out / folder)
    assert len(json.loads((runs[0] / "record.json").read_text())["commands"]) >= 2, "it went on, and did not start anew"


def _is_zombie(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_job_that_fails_is_tried_again_and_named_while_the_others_go_on(swept, task, tmp_path):
    out = tmp_path / "sweep"
    arguments = settings(task, out, algos="deflow:lr=1e30,deflow:flow_steps=2", seeds="0")
    broken, healthy = plan_jobs(parse_sweep(arguments))

    def kill_once():
        wait_for(lambda: len(read_rows(Path(healthy.out) / "metrics.jsonl")) > 25)
        os.kill(int(healthy.lock.read_text().split()[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill_once)
    killer.start()
    result = deflow("sweep", *arguments, "--json")
    killer.join()
    assert result.returncode == 1, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["failed"] == [broken.name]
    assert f"failed: {broken.name} after 2 attempts: " in result.stdout
    assert "became NaN or infinite" in summary["jobs"][broken.name]["message"]
    assert (summary["jobs"][healthy.name]["state"], summary["jobs"][healthy.name]["attempts"]) == ("done", 2)
    states = [json.loads(line) for line in (out / "status.jsonl").read_text().splitlines()]
    assert any("the process was ended by SIGKILL" in row["message"] for row in states if row["job"] == healthy.name)
    assert_equal_runs(swept[0] / "/".join(healthy.name.split("/")), Path(healthy.out))


def test_seeds_that_train_together_are_one_job_and_stay_one(task, tmp_path):
    out = tmp_path / "sweep"
    arguments = settings(task, out, "stacked=true", algos="deflow:flow_steps=2")
    summary = sweep(arguments)
    assert (summary["done"], summary["ran"], len(summary["jobs"])) == (1, 1, 1)
    records = [json.loads(path.read_text()) for path in out.glob("*/*/seed*/record.json")]
    assert [record["stacked"] for record in records] == [[0, 1], [0, 1]]
    again = sweep(settings(task, out, algos="deflow:flow_steps=2"))
    assert (again["ran"], list(again["jobs"])) == (0, list(summary["jobs"])), "whatever stacked= says now"
    wider = plan_jobs(parse_sweep(settings(task, out, "stacked=true", algos="deflow:flow_steps=2", seeds="0..2")))
    assert [(job.seeds, job.stacked) for job in wider] == [((0, 1), True), ((2,), False)]


def test_two_sweeps_on_one_folder_are_refused(task, tmp_path):
    with hold_lock(tmp_path / ".sweep.lock", busy="busy"):
        assert_one_line(deflow("sweep", *settings(task, tmp_path)), f"another sweep works in {tmp_path}")


def test_a_job_whose_folder_somebody_works_in_waits_for_him_and_finds_it_done(swept, task, monkeypatch):
    monkeypatch.setattr(jobs, "_LOOK", 0.05)
    job = plan_jobs(parse_sweep(settings(task, swept[0])))[0]
    outcomes = []
    with hold_lock(job.lock, busy="busy"):
        thread = threading.Thread(target=lambda: outcomes.append(run_job(job)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive(), "it waits"
    thread.join(30)
    assert [outcome.kind for outcome in outcomes] == ["done"]
    monkeypatch.setattr(jobs, "_PATIENCE", 0.2)
    with hold_lock(job.lock, busy="busy"):
        outcome = run_job(job)
    assert (outcome.kind, outcome.message) == ("refused", f"somebody else works on {job.name}")


def test_the_cost_is_measured_first_and_then_taken_from_the_records(swept, task, tmp_path):
    estimate = estimate_costs(parse_sweep(settings(task, tmp_path / "new")), show_progress=False)
    assert {speed["source"] for speed in estimate["speeds"]} == {"measured"}
    assert [(row["steps"], row["seeds"], row["seeds_done"]) for row in estimate["cells"]] == [(STEPS, [0, 1], 0)] * 2
    rate = estimate["cells"][0]["updates_per_second"]
    assert estimate["cells"][0]["hours"] == pytest.approx(2 * STEPS / rate / 3600, abs=1e-4)
    assert not (tmp_path / "new").exists(), "an estimate writes nothing"
    assert "2 cells, 4 jobs; 0 cells left out" in describe_costs(estimate)

    known = estimate_costs(parse_sweep(settings(task, swept[0], seeds="0..2")), show_progress=False)
    assert {speed["source"] for speed in known["speeds"]} == {"records"}
    record = json.loads((swept[0] / run_folders(swept[0])[0] / "record.json").read_text())
    assert known["cells"][0]["updates_per_second"] == pytest.approx(STEPS / record["time"]["updates"], rel=0.9)
    assert [row["seeds_done"] for row in known["cells"]] == [2, 2]


def test_cells_that_cannot_be_trained_take_a_line_for_each_reason(tmp_path):
    plan = parse_sweep(["tasks=all", "algos=iql,rebrac", "seeds=0", f"out={tmp_path}"])
    left_out = {cell.name: cell.left_out for cell in plan.cells if cell.left_out}
    lines = describe_left_out(left_out)
    assert (len(left_out), len(lines)) == (36, 2)
    assert not any("visual" in line for line in lines), "the visual tasks have values and encoders"


@pytest.mark.parametrize("download", ["false", "true"])
def test_data_that_cannot_be_had_is_noticed_before_anything_starts(tmp_path, monkeypatch, download):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    monkeypatch.setattr("ogbench.utils.DATASET_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("deflow_torchrl.sources.download.BACKOFF_S", 0.0)
    arguments = ["tasks=antmaze-large,scene", "algos=deflow,fql", "seeds=0", f"out={tmp_path / 'sweep'}"]
    plan = parse_sweep([*arguments, f"download={download}", f"data_root={tmp_path / 'data'}"])
    with pytest.raises(InputError, match="no data for antmaze-large-navigate-v0, nothing was started") as error:
        run_sweep(plan, show_progress=False)
    assert "\n" not in str(error.value)
    expected = "its download failed" if download == "true" else "1 more are missing: scene-play-v0"
    assert expected in str(error.value)
    assert not (tmp_path / "sweep" / "status.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here_is_noticed_before_anything_starts(task, tmp_path):
    plan = parse_sweep(settings(task, tmp_path, "device=cuda"))
    for run in (run_sweep, estimate_costs):
        with pytest.raises(InputError, match="device=cuda cannot be used here: 0 CUDA devices"):
            run(plan, show_progress=False)


def test_the_wall_clock_is_that_of_jobs_beside_each_other():
    assert _wall([5, 3, 3, 1], 2) == 6
    assert _wall([5, 3, 3, 1], 1) == 12
    assert _wall([5], 4) == 5


def test_progress_is_read_from_rows_as_they_come_and_again_where_a_run_writes_them_anew(swept, task, tmp_path):
    job = plan_jobs(parse_sweep(settings(task, tmp_path / "sweep")))[0]
    progress, file = JobProgress(job, state="running"), Path(job.out) / "metrics.jsonl"
    progress.look()
    assert (progress.step, progress.score) == (0, None)
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 10, "eval/return": -5.0}\n{"step": 20}\n{"step": 3')
    progress.look()
    assert (progress.step, progress.score) == (20, -5.0), "a half-written row waits"
    with file.open("a") as more:
        more.write("0}\n")
    progress.look()
    assert progress.step == 30
    file.write_text('{"step": 10, "eval/return": -5.0}\n')
    progress.look()
    assert progress.step == 10


def test_a_bar_shows_every_job_and_counts_what_finds_no_room(swept, task, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    jobs = {job.name: JobProgress(job, state="done") for job in plan_jobs(parse_sweep(settings(task, swept[0])))}
    next(iter(jobs.values())).state = "running"
    with SweepProgress(jobs, live=True) as shown:
        shown.show()
    drawn = capsys.readouterr().err
    assert "1 running, 3 done" in drawn
    assert drawn.count("150/150") >= len(jobs)
    many = {f"{name}-{copy}": JobProgress(value.job) for name, value in jobs.items() for copy in range(10)}
    with SweepProgress(many, live=True) as shown:
        shown.show()
    assert "and 10 more" in capsys.readouterr().err


def test_the_whole_paper_is_its_tasks_with_every_method_and_its_own_settings():
    plan = parse_sweep(["tasks=all", "algos=deflow,deflow:fixed_alpha=3", "seeds=0..7", "out=x"])
    assert (len(plan.cells), len(plan.trained), list(plan.seeds)) == (146, 146, list(range(8)))
    first = plan.trained[0].config
    assert (first.offline_steps, first.algo.target_divergence, first.algo.fixed_alpha) == (1_000_000, 0.01, None)
    assert {cell.config.algo.fixed_alpha for cell in plan.trained} == {None, 3.0}
    assert {cell.config.offline_steps for cell in plan.trained} == {1_000_000, 500_000}, "D4RL has half the steps"
    online = parse_sweep(["tasks=o2o", "algos=deflow", "seeds=0", "out=x"])
    assert {cell.config.online_steps for cell in online.cells} == {1_000_000}
    assert len(online.cells) == 15


def test_a_protocol_gives_seeds_and_settings_that_the_command_may_change():
    plan = parse_sweep(["tasks=cube-single", "algos=deflow", "protocol=small", "out=x", "batch_size=64"])
    config = plan.cells[0].config
    assert list(plan.seeds) == [0, 1, 2]
    assert (config.offline_steps, config.hidden_dims, config.algo.lr, config.batch_size) == (
        8_000,
        [256] * 3,
        1e-3,
        64,
    )
    assert config.protocol is None, "with another batch it is not the protocol"
    plan = parse_sweep(["tasks=cube-single", "algos=deflow", "protocol=small", "out=x", "device=cpu"])
    assert plan.cells[0].config.protocol == "small"


def test_a_single_run_takes_no_protocol():
    with pytest.raises(InputError, match="deflow sweep protocol=small"):
        compose_config([f"task={CUBE}", "protocol=small"])


@pytest.mark.parametrize(("text", "seeds"), [("0..3", [0, 1, 2, 3]), ("2,0", [2, 0]), ("[0,1]", [0, 1]), ("5", [5])])
def test_seeds_are_a_range_or_a_list(text, seeds):
    assert parse_sweep([f"tasks={CUBE}", "algos=deflow", f"seeds={text}", "out=x"]).seeds == seeds


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tasks=cube-singel"], ["unknown task 'cube-singel'", "cube-single"]),
        (["algos=deflaw"], ["unknown method 'deflaw'", "deflow"]),
        (["algos=deflow:fixed_alfa=1"], ["no setting 'fixed_alfa'", "fixed_alpha"]),
        (["algos=deflow,deflow"], ["deflow is there twice"]),
        (["seeds=3..1"], ["seeds=3..1 is out of range"]),
        (["seeds=0..99999999999"], ["at most 1000 seeds"]),
        (["seeds=a"], ["seeds=a are no seeds"]),
        (["out="], ["out= is empty"]),
        (["seed=1"], ["write seeds="]),
        (["batch_sise=3"], ["unknown setting 'batch_sise'", "batch_size"]),
        (["batch_size=0"], ["batch_size=0 is out of range"]),
        (["engine=rey"], ["engine=rey is out of range"]),
        (["jobs=0"], ["jobs=0 is out of range"]),
        (["ray_address=auto"], ["ray_address= is for engine=ray"]),
        (["stacked=true", "online_steps=5"], ["cannot train its seeds together"]),
        (["protocol=smoll"], ["unknown protocol 'smoll'", "small"]),
        (["tasks="], ["tasks="]),
        (["nonsense"], ["'nonsense' is not a setting"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, parts):
    given = {text.partition("=")[0] for text in arguments}
    usual = [f"tasks={CUBE}", "algos=deflow", "seeds=0", f"out={tmp_path / 'sweep'}"]
    result = deflow("sweep", *[text for text in usual if text.partition("=")[0] not in given], *arguments)
    assert_one_line(result, *parts)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("name", ["tasks", "algos", "seeds", "out"])
def test_what_a_sweep_needs_is_asked_for(name):
    usual = [f"tasks={CUBE}", "algos=deflow", "seeds=0", "out=x"]
    assert_one_line(deflow("sweep", *[text for text in usual if not text.startswith(name)]), f"{name}= is missing")


def test_all_methods_are_planned_and_every_cell_that_is_left_out_has_its_reason(tmp_path):
    plan = parse_sweep(["tasks=all", "algos=all", "seeds=0", f"out={tmp_path}"])
    assert {cell.variant.method for cell in plan.cells} == set(ALGORITHMS)
    reasons = {(cell.variant.method, cell.left_out) for cell in plan.cells if cell.left_out is not None}
    by_method = {method: reason for method, reason in reasons if method in ("rlpd", "idql", "bc")}
    assert "no offline phase" in by_method["rlpd"] or "no version for images" in by_method["rlpd"]
    assert "has no value" in by_method["idql"]
    assert "bc" not in by_method
    assert ("dsrl", "algo.noise_scale has no value: this task names none, so give one") in reasons
    online = parse_sweep(["tasks=o2o", "algos=all", "seeds=0", f"out={tmp_path}", "protocol=paper"])
    settled = {cell.task: cell.settled for cell in online.trained if cell.variant.method == "rlpd"}
    assert len(settled) == 15
    assert {config.offline_steps for config in settled.values()} == {0}
