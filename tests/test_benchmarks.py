import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deflow_torchrl.sweep import parse_sweep
from deflow_torchrl.tasks import protocols
from deflow_torchrl.tasks.protocols import get_protocol
from tests.support.command_line import BENCHMARKS, benchmark, benchmark_apart, deflow, heed_ctrl_c

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "data_memory.py"
REPLAY_BUFFER = SCRIPT.with_name("replay_buffer.py")
TINY = ("--updates", "4", "--batches", "6", "--batch-size", "32", "--hidden-dims", "8", "--json")


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return functools.partial(benchmark, monkeypatch, capsys)


@pytest.fixture
def throughput(script):
    """throughput.py on a problem of small sizes: code, out, err."""
    sizes = "--obs-dim 4 --action-dim 2 --batch-size 8 --hidden-dims 8 8 --steps 2 --warmup 1 --json"
    return lambda *arguments: script("throughput", *arguments, *sizes.split())


def command(folder, *arguments):
    return [sys.executable, str(SCRIPT), "--folder", str(folder), *TINY, *arguments]


@pytest.mark.slow
def test_the_memory_of_data_sets_is_measured_and_nothing_is_left_behind(tmp_path):
    arguments = ("--transitions", "4000", "2000", "--frames", "200")
    result = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    measured = json.loads(result.stdout.splitlines()[-1])
    visual = measured["visual"]
    assert visual["bytes_ratio"] == pytest.approx(0.5, abs=0.01)
    assert visual["sampled_values_equal"]
    assert visual["once"]["dtype"] == "torch.uint8"
    state = measured["state"]
    assert [entry["transitions"] for entry in state["sets"]] == [2000, 4000]
    for entry in state["sets"]:
        assert entry["preparing"]["bytes"] > 137 * entry["transitions"]
        training = entry["training"]
        assert training["before"] <= training["peak"] == training["before"] + training["growth"]
        assert training["pages_read"] > 0.5
    assert state["peak_ratio"] == pytest.approx(1.0, abs=0.05)
    assert set(state["two_copies"]) == {"memory-mapped", "in memory"}
    assert all(cost["milliseconds"] > 0 for cost in state["sampling"].values())


def test_a_full_disk_is_said_before_anything_is_written(tmp_path):
    result = subprocess.run(
        command(tmp_path, "--transitions", str(10**13)), capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("data_memory.py: ")
    assert result.stderr.count("\n") == 1
    assert "GB are needed" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_collectors_are_compared_in_turns():
    pytest.importorskip("gymnasium", reason="needs the extra ogbench")
    tiny = (
        "--task gym:Pendulum-v1 --workers 1 --chunks 1 4 --steps 8 --rounds 2 --hidden-dims 8 --batch-size 8 --rows 20"
    )
    script = SCRIPT.with_name("collectors.py")
    result = subprocess.run(
        [sys.executable, str(script), *tiny.split(), "--json"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    arms = json.loads(result.stdout.splitlines()[-1])["arms"]
    assert [(arm["collector"], arm["workers"], arm["steps_per_collection"]) for arm in arms] == [
        ("Collector", 0, 1),
        ("Collector", 0, 4),
        ("MultiSyncCollector", 1, 1),
        ("MultiSyncCollector", 1, 4),
    ]
    for arm in arms:
        assert len(arm["steps_per_second_all"]) == 2
        assert min(arm["steps_per_second_all"]) > 0
        assert all(0 <= share < 1 for share in arm["waiting_share_all"])


@pytest.mark.slow
def test_an_interrupted_measurement_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "state", "--transitions", "3000000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/.state*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to the script and its children
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("data_memory.py: interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["uniform", pytest.param("balanced", marks=pytest.mark.slow)])
def test_the_union_buffer_is_timed_against_torchrls_storages(mode, tmp_path):
    sizes = ("--offline", "3000", "--online", "2000", "--repeats", "5", "--warmup", "1", "--batch-size", "16")
    result = subprocess.run(
        [sys.executable, str(REPLAY_BUFFER), *sizes, "--mode", mode, "--folder", str(tmp_path), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    measured = json.loads(result.stdout.splitlines()[-1])
    assert (measured["offline"], measured["online"], measured["batch_size"]) == (3000, 2000, 16)
    for name in ("memory", "files"):
        assert measured[name]["ms"] > 0
        assert measured[name]["ratio"] == pytest.approx(measured[name]["ms"] / measured[name]["torchrl_ms"])


@pytest.mark.slow
def test_the_offline_to_online_runs_are_made_once_and_rendered_without_places(generated, script, tmp_path):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    tiny = "offline_steps=6 online_steps=4 batch_size=4 hidden_dims=[8] eval_interval=5 eval_episodes=1 save_interval=5"
    tiny += " eval_max_steps=5"

    def call(*arguments):
        code, out, err = script("offline_to_online", *arguments)
        assert code == 0, err
        return out

    make = ("run", "--seeds", 3, "--data-root", generated, "--out", runs, "--set", *tiny.split())
    call(*make)
    records = {path: path.read_bytes() for path in runs.glob("*/record.json")}
    assert sorted(path.parent.name for path in records) == ["frozen-seed3", "full-seed3"]
    call(*make)
    assert all(path.read_bytes() == content for path, content in records.items())

    page = call("render", "--runs", runs, "--out", kept)
    rate = r"(0|1).00 \+- 0.00"
    assert re.search(
        rf"\| frozen \| 3 \| 6 \| {rate} \| {rate} \(4\) \| {rate} \(4\) \| [+-]\d.00 \| [+-]\d.00 \|", page
    )
    assert (
        "deflow train task=cube-single-play-singletask-task2-v0 data_root=DATA offline_steps=6 online_steps=4" in page
    )
    assert (kept / "curves.png").stat().st_size > 10_000
    for path in kept.rglob("*.*"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(generated).encode() not in path.read_bytes()
    again = call("render", "--runs", kept, "--out", kept)  # the kept records are enough
    assert again == page


def run_script(name, *arguments, check=True):
    command = [sys.executable, str(SCRIPT.with_name(name)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_the_roofline_counts_products_and_says_how_far_each_part_is_from_them(throughput):
    code, out, err = throughput("roofline")
    assert code == 0, err
    parts = json.loads(out.splitlines()[-1])["parts"]
    assert list(parts) == ["flow sampling", "flow loss", "actor", "critic", "optimiser", "update"]
    for name, part in parts.items():
        assert part["measured_ms"] > 0
        assert part["floor_ms"] > 0
        assert (part["gflop"] > 0) == (name != "optimiser")
        assert f"| {name} | " in out
    assert parts["update"]["gflop"] == pytest.approx(sum(part["gflop"] for part in parts.values()) / 2)
    # Sampling by hand: [s; s'] in 16 rows, 10 steps of 3 -> 8 -> 8 -> 2, the observation's share of 4 -> 8 once.
    assert parts["flow sampling"]["gflop"] * 1e9 == pytest.approx(2 * 16 * (10 * (3 * 8 + 8 * 8 + 8 * 2) + 4 * 8))
    # The prior's loss: 8 rows through 7 -> 8 -> 8 -> 2; weights of all layers, inputs of all but the first.
    assert parts["flow loss"]["gflop"] * 1e9 == pytest.approx(2 * 8 * (2 * (7 * 8 + 8 * 8 + 8 * 2) + 8 * 8 + 8 * 2))


def test_the_update_is_timed_with_and_without_the_kernels(throughput):
    code, out, err = throughput("update", "--plain")
    assert code == 0, err
    printed = json.loads(out.splitlines()[-1])
    assert printed["ms_per_update"] > 0
    assert printed["plain_ms_per_update"] > 0
    assert printed["to_plain"] > 0


def test_an_update_on_pictures_is_timed_beside_the_floor_of_its_convolutions(throughput):
    code, out, err = throughput("update", "--pixels", "--image-shape", "6", "6", "2", "--encoder", "impala_debug")
    assert code == 0, err
    printed = json.loads(out.splitlines()[-1])
    assert printed["ms_per_update"] > 0
    # Multiply-adds of the convolutions of one picture: 6x6 and 3x3 pixels into 4 channels, then two of a block behind each pool.
    first, second = 36 * 2 * 4 + 2 * 9 * 4 * 4, 9 * 4 * 4 + 2 * 4 * 4 * 4
    forward = 2 * 9 * (first + second) * 8
    # Gradients of weights cost as much again, and so do those of inputs, which pictures have none of.
    expected = 6 * forward + 3 * (2 * forward - 2 * 9 * 36 * 2 * 4 * 8)
    assert printed["encodings"]["gflop"] * 1e9 == pytest.approx(expected)
    assert "| encodings | " in out


def test_the_activation_is_timed_in_several_forms(throughput):
    code, out, err = throughput("gelu")
    assert code == 0, err
    assert all(milliseconds > 0 for milliseconds in json.loads(out.splitlines()[-1]).values())


def test_a_comparison_with_jax_that_cannot_be_made_is_refused_in_one_line(throughput, tmp_path):
    code, _, err = throughput("update", "--against-jax", str(tmp_path))
    assert code == 2
    assert err.splitlines()[-1].endswith("is no checkout of the authors' repository: no agents/deflow.py")
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "deflow.py").write_text("import a_module_that_is_not_there\n")
    code, _, err = benchmark_apart("throughput", "update", "--against-jax", tmp_path)
    assert code == 2
    assert re.search(r"cannot run .*: No module named '\w+'; give one that can with --jax-python$", err.strip())
    assert "Traceback" not in err


def test_ratios_are_compared_with_the_stored_ones(throughput):
    code, out, err = throughput("bench")
    assert code == 0, err
    printed = json.loads(out.splitlines()[-1])
    assert printed["now"].keys() == printed["stored"].keys() > {"update / floor", "full / plain", "frozen / full"}
    assert "the stored ratios are of other sizes" in out
    assert " ms" not in out


def test_the_wheelhouse_holds_what_the_extras_need_and_not_torch():
    script = SCRIPT.parents[1] / ".ci" / "wheelhouse.py"
    names = "import sys, wheelhouse; print(*sorted(set(wheelhouse.closure(set(sys.argv[1:]), '3.12'))))"

    def needed(*extras):
        command = [sys.executable, "-c", names, *extras]
        return set(
            subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent).stdout.split()
        )

    bare = needed()
    assert {"deflow-torchrl", "torchrl", "tensordict", "numpy", "tqdm"} <= bare
    assert not {"torch", "ogbench", "mujoco", "minari", "typer"} & bare
    assert {"ogbench", "mujoco", "typer", "h5py"} <= needed("ogbench", "cli", "files")
    with_pytest = "import wheelhouse; print(*wheelhouse.closure(set(), '3.12', ['pytest']))"
    found = subprocess.run(
        [sys.executable, "-c", with_pytest], capture_output=True, text=True, check=True, cwd=script.parent
    )
    assert set(found.stdout.split()) >= bare | {"pytest", "pluggy"}
    for bad, said in (("--python=3", "takes a version such as 3.12"), ("--extras=clii", "there is no extra clii")):
        arguments = [sys.executable, str(script), "--python=3.12", bad]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert said in result.stderr.splitlines()[-1]


def test_the_latency_of_an_action_is_measured_in_turns(script):
    pytest.importorskip("onnxscript", reason="needs the extra export")
    tiny = "--obs-dim 4 --action-dim 2 --hidden-dims 8 8 --batch-sizes 1 3 --turns 2 --in-a-row 3 --json"
    code, out, err = script("latency", *tiny.split())
    assert code == 0, err
    printed = json.loads(out.splitlines()[-1])["batch"]
    assert list(printed) == ["1", "3"]
    for rows, policies in printed.items():
        assert list(policies) == ["eager", "onnx", "pt2"]
        assert policies["eager"]["to_eager"] == 1
        for name, taken in policies.items():
            assert min(taken.values()) > 0
            assert f"| {rows} | {name} | " in out
    code, _, err = script("latency", *tiny.split(), "--in-a-row", "1")
    assert code == 2
    assert err.splitlines()[-1].endswith("--in-a-row at least 2")


def test_the_cost_of_each_size_is_timed_against_the_sizes_given(throughput):
    code, out, err = throughput("cost")
    assert code == 0, err
    cost = json.loads(out.splitlines()[-1])["cost"]
    assert cost.pop("as given")["ratio"] == 1
    assert {name.split()[0] for name in cost} == {"flow_steps", "batch_size", "width", "action_dim", "seeds"}
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in cost.values())


def test_stacked_seeds_are_timed_against_separate_updates_in_turns(script, throughput):
    code, out, err = throughput("seeds", "--seeds", "2")
    assert code == 0, err
    measured = json.loads(out.splitlines()[-1])
    assert measured["seeds"] == 2
    assert all(measured[name] > 0 for name in ("stacked_ms", "separate_ms", "one_ms", "to_separate", "to_one"))
    code, _, _ = script("throughput", "seeds", "--seeds", "0")
    assert code == 2


CLOCK = """#!{python}
import sys
print('{{"jax": "0", "device": "none"}}', flush=True)
for line in sys.stdin:
    assert int(line) == (1 if "--latency" in sys.argv else 5)
    print(1e9, flush=True)
"""
STAND_IN = """#!{python}
import json, sys
import numpy as np
arguments = sys.argv[1:]
found = np.load(arguments[arguments.index("--arrays") + 1])
assert arguments[1] == "train" and "--batch-size 4" in " ".join(arguments)
settings = json.loads(arguments[arguments.index("--settings") + 1])
assert (settings["target_divergence"], settings["discount"], settings["q_agg"]) == (0.02, 0.9, "min")
assert found["start/critic/0"].shape == (2, 8, found["data/observations"].shape[1] + found["data/actions"].shape[1])
out, done = sys.stdout.buffer, 0
out.write(json.dumps({{"jax": "0", "device": "none"}}).encode() + b"\\n")
out.flush()
for line in sys.stdin.buffer:
    verb, number = line.split()
    if verb == b"update":
        done += int(number)
        names = ["actor/bc_flow_loss", "actor/alpha_loss", "critic/critic_loss", "actor/distill_loss", "actor/alpha_value"]
        out.write(json.dumps({{"seconds": 0.5, "info": dict.fromkeys(names, float(done))}}).encode() + b"\\n")
    else:
        sys.stdin.buffer.read(4 * int(number) * found["data/observations"].shape[1])
        out.write(np.zeros((int(number), found["data/actions"].shape[1]), "float32").tobytes())
    out.flush()
"""


def authors_code(folder, worker):
    """A checkout, and a stand-in for an interpreter with JAX, which the tests have not; the real agents: docs/performance.md."""
    checkout, python = folder / "checkout", folder / "python"
    (checkout / "agents").mkdir(parents=True)
    (checkout / "agents" / "deflow.py").touch()
    python.write_text(worker.format(python=sys.executable))
    python.chmod(0o755)
    return "--against-jax", checkout, "--jax-python", python


def test_the_authors_agent_is_asked_for_a_row_of_updates_or_for_single_actions(script, throughput, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra export")
    against = authors_code(tmp_path, CLOCK)
    code, out, err = throughput("update", *against, "--in-a-row", "5")
    assert code == 0, err
    assert 0 < json.loads(out.splitlines()[-1])["to_jax"] < 1
    tiny = "--obs-dim 4 --action-dim 2 --hidden-dims 8 8 --batch-sizes 1 --turns 2 --in-a-row 3 --json"
    code, out, err = script("latency", *tiny.split(), *against)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["batch"]["1"]["jax"]["ms"] == 1e9


def test_the_authors_agent_is_trained_like_a_run_of_ours_and_recorded_beside_it(script, generated, tmp_path):
    task = "cube-single-play-singletask-task2-v0"
    ours = tmp_path / "runs" / task / "deflow" / "seed1"
    settings = (
        f"task={task} algo=deflow seed=1 offline_steps=6 eval_interval=3 eval_episodes=2 eval_max_steps=5 batch_size=4"
    )
    settings += " hidden_dims=[8] algo.gamma=0.9 algo.target_divergence=0.02 algo.q_aggregation=min eval_workers=1"
    trained = deflow("train", *settings.split(), f"data_root={generated}", f"out={ours}")
    assert trained.returncode == 0, trained.stderr
    against = authors_code(tmp_path, STAND_IN)
    _, checkout, _, python = against
    command = ("train", ours, *against, "--at-once", "2")
    code, out, err = script("against_jax", *command)
    assert code == 0, err
    assert re.search(r"^\| 6 \| \d+ \| \d+ \| \d+ / \d+ \|$", out, re.MULTILINE)
    theirs = tmp_path / "runs" / task / "deflow,code=authors" / "seed1"
    mine, record = (json.loads((folder / "record.json").read_text()) for folder in (ours, theirs))
    assert [note["step"] for note in record["history"]] == [note["step"] for note in mine["history"]] == [3, 6]
    for note, other in zip(record["history"], mine["history"], strict=True):
        assert note["policies"]["deflow"]["seeds"] == other["policies"]["deflow"]["seeds"]
    assert record["variant"] == {**mine["variant"], "code": "authors"}
    assert (record["config"], record["data"], record["time"]["updates"]) == (mine["config"], mine["data"], 2.0)
    assert record["versions"]["authors' code"] == "checkout"
    rows = [json.loads(line) for line in (theirs / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss_flow"]) for row in rows] == [(3, 3.0), (6, 6.0)]
    shown = deflow("report", str(tmp_path / "runs"), "--md", str(tmp_path / "report.md"))
    assert shown.returncode == 0, shown.stderr
    assert "| code = authors |" in (tmp_path / "report.md").read_text()

    python.unlink()
    code, again, err = script("against_jax", *command)
    assert (code, again) == (0, out), err
    code, _, err = script("against_jax", "train", theirs, "--against-jax", checkout)
    assert (code, err.count("\n")) == (2, 1)
    assert "is no run of ours" in err


def test_the_gpu_script_runs_to_its_end_on_a_cpu(script, tmp_path):
    pytest.importorskip("gymnasium", reason="needs the extra ogbench")
    out = tmp_path / "gpu.json"
    run = run_script("gpu.py", "--tiny", "--device", "cpu", "--out", str(out))
    parts = json.loads(out.read_text())["parts"]
    outcomes = {name: part["status"] for name, part in parts.items()}
    assert outcomes.pop("jax") == "left out"
    assert set(outcomes) == {"machine", "updates", "seeds", "pixels", "tests", "run"}
    assert set(outcomes.values()) == {"done"}, parts
    for name, kinds in (("updates", 5), ("seeds", 2), ("pixels", 3)):
        figures = parts[name]["figures"]
        assert len(figures) == kinds
        assert all(row["ms"] > 0 for row in figures.values()), figures
    assert parts["tests"]["figures"]["outcomes"] == {"skipped": 1}, "they need a GPU"
    curve = parts["run"]["figures"]["curve"]
    assert curve[-1]["step"] > curve[0]["step"] == 0
    assert all(row["deflow"] < 0 for row in curve)
    code, shown, _ = script("gpu", "--show", out)
    assert code == 0
    assert shown == run.stdout
    assert "| updates | graph, TF32 | " in shown


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_part_of_the_gpu_script_that_fails_or_hangs_keeps_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    gpu = importlib.import_module("gpu")

    def fails(task, emit):
        emit("one", 1)
        raise RuntimeError("no such kernel")

    def dies(task, emit):
        emit("one", 1)
        os.kill(os.getpid(), signal.SIGKILL)  # as a system that is out of memory

    def hangs(task, emit):
        emit("one", 1)
        subprocess.run(["sleep", "60"], check=False)

    for work, seconds, status, said in (
        (fails, 20, "failed", "RuntimeError: no such kernel"),
        (dies, 20, "failed", "exit code -9"),
        (hangs, 0.5, "cut off after 0.5 s", "exit code -9"),
    ):
        kept = []
        task = gpu.Task(gpu.TINY, "cpu", seconds, None, "")
        found = gpu.run_part(gpu.Part(work, seconds), task, "fork", lambda found, kept=kept: kept.append(dict(found)))
        assert (found["status"], found["error"]) == (status, said)
        assert found["seconds"] < 20
        assert found["figures"] == {"one": 1}
        assert kept[-1]["figures"] == {"one": 1}, "kept when it was known"


@pytest.mark.slow
def test_evaluation_in_a_batch_is_timed_against_a_loop_with_the_same_results(script):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    code, out, err = script("evaluation", "--task", "cube-single-play-singletask-task1-v0", "--hidden-dims", "8",
                            "--episodes", "3", "--num-envs", "2", "--workers", "2", "--rounds", "1", "--json")  # fmt: skip
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["same"]["success"] == 1.0
    assert result["faster"] > 0
    code, _, err = script("evaluation", "--task", "nothing-v0")
    assert code == 2
    assert err.startswith("evaluation.py: ")


def test_startup_is_timed_and_a_failing_command_passes_its_code_on(tmp_path):
    refused = run_script("startup.py", "--rounds", "1", "--data-root", str(tmp_path), check=False)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


FAMILIES = {
    "antmaze": "antmaze-large-navigate-singletask-task1-v0",
    "humanoidmaze": "humanoidmaze-medium-navigate-singletask-task1-v0",
    "antsoccer": "antsoccer-arena-navigate-singletask-task4-v0",
    "cube": "cube-single-noisy-singletask-task2-v0",
    "pointmaze": "pointmaze-medium-navigate-singletask-task5-v0",
    "scene": "scene-play-singletask-task1-v0",
    "puzzle": "puzzle-3x3-play-singletask-task1-v0",
    "d4rl_antmaze": "antmaze-umaze-v2",
    "adroit": "pen-human-v1",
}
TINY_RUNS = ("hidden_dims=[8]", "batch_size=4")


@pytest.fixture
def commands(script, monkeypatch):
    """The `deflow` commands a script would run, and the plan of its sweep as `deflow sweep` reads it."""

    def call(name, *arguments):
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module("_family"), "deflow", lambda command: made.append(command) or 0)
            code, out, err = script(name, *arguments)
        assert code == 0, err
        *before, sweep = [shlex.split(line)[2:] for line in out.splitlines()]
        assert made == ([sweep] if "--dry-run" in arguments else [*before, sweep]), "what runs is printed before"
        assert sweep[0] == "sweep"
        return before, parse_sweep([part for part in sweep[1:] if part != "--dry-run"])

    return call


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("d4rl_antmaze", "adroit")])
def test_a_familys_script_sweeps_its_small_tasks_by_every_method_once_it_has_their_data(commands, name, tmp_path):
    before, plan = commands(name, "run", "--out", tmp_path / "runs", "--jobs", "2")
    dataset = re.sub(r"-singletask-task\d", "", FAMILIES[name])
    if name in ("cube", "pointmaze", "scene", "puzzle"):
        episodes = "300" if name == "pointmaze" else "100"
        numbers = ["--episodes", episodes, "--val-episodes", "2", "--seed", "0"]
        assert before == [["data", "generate", dataset, *numbers]]
        root = str(tmp_path / "home" / "generated" / f"{dataset}-{episodes}-2-seed0")
    else:
        assert before == [["data", "download", dataset]]
        root = None
    assert [(cell.task, cell.variant.label) for cell in plan.cells] == [
        (task, method)
        for task in get_protocol("small").tasks[name]
        for method in ("deflow", "fql", "fedit", "ifql", "iql", "rebrac", "flow_bc")
        if (name, method) != ("antsoccer", "fedit")
    ]
    assert (plan.seeds, plan.jobs, plan.out) == ([0, 1, 2], 2, tmp_path / "runs")
    for cell in plan.cells:
        assert cell.left_out is None
        assert (cell.config.offline_steps, cell.config.online_steps, cell.config.hidden_dims) == (8_000, 0, [256] * 3)
        assert (cell.config.data_root, cell.config.algo.lr, cell.config.precision) == (root, 1e-3, "medium")


@pytest.mark.parametrize("name", ["d4rl_antmaze", "adroit"])
def test_a_familys_script_on_d4rl_takes_the_methods_that_have_values_there(commands, name, tmp_path):
    # Without --dry-run the sets are fetched first: see the test of one that cannot be had.
    before, plan = commands(name, "run", "--out", tmp_path, "--dry-run")
    assert before == []
    assert [(cell.task, cell.variant.label, cell.left_out) for cell in plan.cells] == [
        (FAMILIES[name], method, None) for method in ("deflow", "fql", "ifql", "flow_bc")
    ]


def test_a_familys_script_does_all_its_tasks_by_the_papers_protocol(commands, tmp_path):
    before, plan = commands(
        "cube", "run", "--protocol", "paper", "--out", tmp_path, "--device", "cpu", "--seeds", "0..1"
    )
    assert before == [["data", "download", f"cube-{name}-play-v0"] for name in ("single", "double")]
    tasks = [f"cube-{name}-play-singletask-task{number}-v0" for name in ("single", "double") for number in range(1, 6)]
    assert list(dict.fromkeys(cell.task for cell in plan.cells)) == tasks
    assert len(plan.cells) == 10 * len(get_protocol("paper").methods)
    assert all(cell.left_out is None for cell in plan.cells)
    assert {cell.settled.offline_steps + cell.settled.online_steps for cell in plan.cells} == {1_000_000}
    assert plan.seeds == [0, 1]


def test_the_ablations_variants_are_the_tables(commands, tmp_path):
    _, plan = commands("alpha_ablation", "run", "--out", tmp_path)
    alphas = [cell.config.algo.fixed_alpha for cell in plan.cells]
    assert alphas == [None, 0.03, 0.1, 0.3, 1.0, 3.0]
    assert {cell.task for cell in plan.cells} == {FAMILIES["cube"]}
    before, plan = commands("alpha_ablation", "run", "--protocol", "paper", "--out", tmp_path)
    assert before == [["data", "download", f"{name}-play-v0"] for name in ("cube-double", "puzzle-3x3")]
    steps = {(cell.task, cell.config.offline_steps, cell.config.online_steps) for cell in plan.cells}
    assert steps == {(f"{name}-play-singletask-v0", 1_000_000, 1_000_000) for name in ("cube-double", "puzzle-3x3")}
    assert (len(plan.cells), len(plan.seeds)) == (12, 8)


def test_table_threes_script_compares_its_four_methods_with_what_floqs_authors_published(commands, tmp_path):
    before, plan = commands("floq", "run", "--out", tmp_path)
    methods = ["fql", "floq", "deflow", "deflow_floq"]
    (cubes,) = (command for command in before if command[0] == "sweep")  # each set of data has a folder of its own
    assert cubes[1:3] == [f"tasks={','.join(get_protocol('small').tasks['cube'])}", f"algos={','.join(methods)}"]
    assert [(cell.task, cell.variant.label) for cell in plan.cells] == [(FAMILIES["puzzle"], it) for it in methods]
    _, plan = commands("floq", "run", "--protocol", "paper", "--out", tmp_path)
    assert {cell.left_out for cell in plan.cells} == {None}
    settled = {(cell.task.split("-singletask")[0], cell.variant.label): cell.settled.algo for cell in plan.cells}
    assert len(plan.cells) == 2 * 5 * 4
    cube, puzzle = (settled[family, "floq"] for family in ("cube-double-play", "puzzle-3x3-play"))
    assert (cube.alpha, cube.critic_hidden_dims, cube.critic) == (300, [512, 512], "floq")
    assert (puzzle.alpha, puzzle.critic_hidden_dims) == (1000, None)
    assert settled["cube-double-play", "deflow_floq"].target_divergence == 0.001


def test_offline_to_online_by_the_papers_protocol_is_its_fifteen_tasks(commands, script, tmp_path):
    before, plan = commands(
        "offline_to_online", "run", "--protocol", "paper", "--out", tmp_path, "--dry-run", "--jobs", "3"
    )
    assert ["data", "download", "puzzle-4x4-play-v0"] in before
    assert len({cell.task for cell in plan.cells}) == 15
    assert len(plan.cells) == 15 * len(get_protocol("paper").online_methods)
    assert {(cell.config.offline_steps, cell.config.online_steps) for cell in plan.trained} == {(1_000_000, 1_000_000)}
    assert (len(plan.seeds), plan.jobs) == (8, 3)
    code, out, err = script("offline_to_online", "run", "--dry-run", "--seeds", "5")
    assert code == 0, err
    assert [("freeze_prior=true" in line, "seed=5" in line) for line in out.splitlines()] == [
        (False, True),
        (True, True),
    ]


def test_finished_runs_are_kept_without_places_on_a_page_that_its_check_accepts(script, tmp_path):
    pytest.importorskip("jsonschema", reason="needs the extra reports")
    pytest.importorskip("matplotlib", reason="needs the extra reports")
    from deflow_torchrl.reports.check import check_file
    from tests.support.synthetic import CUBE2, record_of, write_run

    runs, kept = tmp_path / "runs", tmp_path / "kept"
    for cell, wins, variant in (("deflow", 18, {}), ("fql", 10, {}), ("deflow,fixed_alpha=3", 4, {"fixed_alpha": 3.0})):
        command = f"deflow sweep tasks={CUBE2} out={tmp_path}/runs data_root=/secret/data"
        algo = cell.partition(",")[0]
        record = record_of(wins, algo=algo, before=(2,), variant=variant, commands=[command])
        folder = write_run(runs / CUBE2 / cell / "seed0", record, [{"step": 100, "train/alpha": 1.0}])
        (folder / "config.yaml").touch()
    unfinished = runs / CUBE2 / "iql" / "seed0"
    unfinished.mkdir(parents=True)
    (unfinished / "config.yaml").touch()

    code, _, err = script("collect", runs, "--out", kept)
    assert (code, err.count("\n")) == (2, 1)
    assert f"1 of 4 runs are not finished: {unfinished};" in err
    assert not kept.exists()

    arguments = ("collect", runs, "--out", kept, "--finished", "--label", "small data")
    code, out, err = script(*arguments)
    assert code == 0, err
    assert out.splitlines()[-1] == f"left out, not finished: {unfinished}"
    page = kept / "README.md"
    text = page.read_text(encoding="utf-8")
    assert "**small data.**" in text
    assert "| cube-single-play | cube-single-play-singletask-task2-v0 | 50 (11.2) | **90 (6.7)** |" in text
    assert "fixed_alpha = 3" in text
    assert "Copied from the paper" in text
    everything = "".join(path.read_text(encoding="utf-8") for path in kept.rglob("*.json")) + text
    assert "/secret" not in everything
    assert str(tmp_path) not in everything
    assert check_file(page).differences == ()
    assert all((kept / name).is_file() for name in re.findall(r"\]\((.+?\.png)\)", text))

    page.write_text(
        text.replace("<!-- The author's", "As in the paper.\n\n<!-- The author's").replace("90 (6.7)", "91 (6.7)")
    )
    assert check_file(page).differences[0].line > 1
    code, _, err = script(*arguments)
    assert code == 0, err
    assert page.read_text(encoding="utf-8") == text.replace(
        "<!-- The author's", "As in the paper.\n\n<!-- The author's"
    )

    write_run(tmp_path / "more" / CUBE2 / "iql" / "seed0", record_of(5, algo="iql", before=(2,)))
    code, out, err = script("collect", tmp_path / "more", "--out", kept)
    assert code == 0, err
    assert out.splitlines()[-1] == f"{page} has no table of {kept / CUBE2 / 'iql'}; write a marker for it"
    other = record_of(1, before=(2,), settings={"precision": "medium"})
    write_run(tmp_path / "other" / CUBE2 / "deflow" / "seed0", other)
    code, _, err = script("collect", tmp_path / "other", "--out", kept)
    assert (code, err.count("\n")) == (2, 1)
    assert "has other settings or data than" in err


def test_folders_that_hold_nothing_to_keep_are_one_line(script, tmp_path):
    from tests.support.synthetic import CUBE, record_of, write_run

    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "runs" / "elsewhere" / "deflow" / "seed0", record_of(5, task=CUBE.format(1)))
    for place, said in (
        ("none", "there is no folder"),
        ("empty", "no finished run in"),
        ("runs", "is no TASK/ALGO/seedN"),
    ):
        code, _, err = script("collect", tmp_path / place, "--out", tmp_path / "kept")
        assert (code, err.count("\n")) == (2, 1), err
        assert said in err


def test_runs_of_two_precisions_are_compared_seed_by_seed(script, tmp_path):
    from tests.support.synthetic import metrics_rows, record_of, write_run

    for name, wins, alpha in (("highest", (10, 12), 1.0), ("medium", (11, 15), 1.5)):
        for seed, count in enumerate(wins):
            record = record_of(count, seed=seed, before=(count, count), settings={"precision": name})
            write_run(tmp_path / name / f"seed{seed}", record, metrics_rows(alpha))
    code, out, err = script("precision", tmp_path / "highest", tmp_path / "medium")
    assert code == 0, err
    cells = {row[3]: row[4:8] for line in out.splitlines() if len(row := line.strip("| ").split(" | ")) == 8}
    assert cells["success"] == ["0.55", "0.65", "0.112", "+0.1 ± 0.05"]
    assert cells["alpha"] == ["1", "1.5", "0", "+0.5 ± 0"], "of the last third of the rows: the last of four"
    assert "divergence" not in cells, "which these rows lack"
    code, _, err = script("precision", tmp_path / "highest", write_run(tmp_path / "x" / "seed5", record_of(5, seed=5)))
    assert (code, err.count("\n")) == (2, 1)
    assert "no run of the same task, method and seed" in err
    authors = record_of(1, before=(1, 1), variant={"code": "authors"}, settings={"precision": "medium"})
    write_run(tmp_path / "medium" / "authors" / "seed0", authors)
    write_run(tmp_path / "high" / "seed0", record_of(5, before=(5, 5), settings={"precision": "highest"}))
    assert script("precision", tmp_path / "highest", tmp_path / "medium")[1] == out, "not of this code"
    code, _, err = script("precision", tmp_path / "highest", tmp_path / "high")
    assert (code, err.count("\n")) == (2, 1)
    assert "are both of precision=highest" in err
    write_run(tmp_path / "highest" / "again", record_of(5, before=(5, 5), variant={"fixed_alpha": 1.0}))
    code, _, err = script("precision", tmp_path / "highest", tmp_path / "medium")
    assert (code, err.count("\n")) == (2, 1)
    assert "are of one task, method and seed" in err


def test_the_kept_runs_in_both_precisions_say_what_their_page_says(script):
    results = BENCHMARKS / "results"
    code, out, err = script("precision", results / "precision", results / "small")
    assert code == 0, err
    assert out.strip() in (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")


def test_numbers_without_a_simulator_are_ranked_against_success_over_all_runs_and_within_methods(script, tmp_path):
    values = {
        ("deflow", 0): (0.9, -10.0),
        ("deflow", 1): (0.7, -12.0),
        ("fql", 0): (0.1, -9.0),
        ("fql", 1): (0.3, -8.0),
    }
    runs = {
        f"{column}{seed}": {
            "task": "maze", "column": column, "seed": seed, "success": success,
            "offline": {
                "fitted_q": {"value": value, "low": value - 1, "high": value + 1, "halfway": value - 2 * seed},
                "critics": None, "cloning": None, "held_out": {"episodes": 2 + seed},
                "actions": {"mean_square_distance_to_data": success},
            },
        }
        for (column, seed), (success, value) in values.items()
    }  # fmt: skip
    path = tmp_path / "choice.json"
    path.write_text(json.dumps(runs), encoding="utf-8")
    code, out, err = script("offline_choice", "--read", path)
    assert code == 0, err
    rows = {
        cells[0]: cells[1:] for line in out.splitlines() if (cells := [it.strip() for it in line.strip("|").split("|")])
    }
    # Four pairs of six the wrong way round, both within methods right; of four orders two are as far from 0.
    first, *rest = zip(
        *(re.fullmatch(r"(\S+) \(p (\S+), cannot tell\)", it).groups() for it in rows["fitted Q"][2:]), strict=True
    )
    assert first == ("-0.33", "+1.00")
    assert [float(it) for it in rest[0]] == pytest.approx([0.75, 0.5], abs=0.1)
    assert [it.split(" ")[0] for it in rows["- distance to the data's actions"][2:]] == ["-1.00", "-1.00"]
    assert out.splitlines()[-1] == "2 to 3 held-out episodes; fitted Q evaluation still moved in 2 of 4 runs."
    assert rows["ranks of Q and observed returns"] == ["maze", "0", "", ""]
    code, _, err = script("offline_choice", "--read", tmp_path / "none.json")
    assert (code, err.count("\n")) == (2, 1)


def test_the_page_says_how_the_numbers_without_a_simulator_ranked_the_kept_runs(script):
    code, out, err = script("offline_choice", "--read", BENCHMARKS / "results" / "offline_choice.json")
    assert code == 0, err
    assert out.strip() in (BENCHMARKS.parent / "docs" / "train.md").read_text(encoding="utf-8")


def test_a_claim_holds_where_the_interval_over_seeds_leaves_out_zero(script, tmp_path):
    from tests.support.synthetic import CUBE2, record_of, write_run

    wins = {"deflow": (18, 17, 19), "fql": (5, 9, 6), "deflow-normalize_q_loss=false": (12, 20, 18)}
    online = {"freeze_prior=false": (10, 11, 12), "freeze_prior=true": (15, 16, 17)}
    for column, counts in wins.items():
        algo, _, setting = column.partition("-")
        variant = {"normalize_q_loss": False} if setting else {}
        for seed, count in enumerate(counts):
            record = record_of(count, algo=algo, seed=seed, before=(count, count), variant=variant)
            write_run(tmp_path / CUBE2 / column / f"seed{seed}", record)
    for place, counts in online.items():
        for seed, count in enumerate(counts):
            settings = {"freeze_prior": place.endswith("true")}
            record = record_of(count, seed=seed, online=(count, count, count), settings=settings)
            write_run(tmp_path / place / CUBE2 / "deflow" / f"seed{seed}", record)

    # An online run of another claim, and one of the authors' code beside ours, are of no row.
    ablation = record_of(1, online=(1, 1, 1), variant={"fixed_alpha": 3.0}, settings={"freeze_prior": False})
    write_run(tmp_path / "alpha" / CUBE2 / "deflow-fixed_alpha=3" / "seed0", ablation)
    authors = record_of(1, before=(1, 1), variant={"code": "authors"})
    write_run(tmp_path / CUBE2 / "deflow,code=authors" / "seed0", authors)
    page = tmp_path / "claims.md"
    files = [tmp_path / f"test_time{seed}.json" for seed in range(2)]
    for file, gain in zip(files, (0.01, 0.012), strict=True):
        said = {"deflow, best of 10": gain, "deflow, 5 iterations": 20 * gain, "deflow, worst of 10": -1.0}
        gains = {name: {"mean": mean, "low": mean - 0.001, "high": mean + 0.001} for name, mean in said.items()}
        found = {"run": file.stem, "plain": "deflow", "task": CUBE2, "metric": "success", "differences": gains}
        file.write_text(f"a line for people\n{json.dumps(found)}\n", encoding="utf-8")
    arguments = ("claims", "render", "--runs", tmp_path, "--delta-iav", "0.01")
    code, out, err = script(*arguments, "--test-time", *files, "--out", page)
    assert code == 0, err
    rows = {cells[1]: cells[2:-1] for line in out.splitlines() if (cells := [it.strip() for it in line.split("|")])[1:]}
    assert rows["DeFlow is better than FQL (Tables 1 and 7)"] == [CUBE2, "+56.7", "+20.8 to +92.5", "3", "holds"]
    row = rows["normalising Q is better than not"]
    assert row[1:2] + row[-1:] == ["+6.7", "cannot tell"]
    little, much = ([*cells] for said, cells in rows.items() if said.startswith("more computation"))
    assert little == [CUBE2, "+1.1", "-0.2 to +2.4", "2", "holds"]
    assert much == [CUBE2, "+22.0", "-3.4 to +47.4", "2", "cannot tell"]
    (online,) = (cells for said, cells in rows.items() if said.startswith("online"))
    # Three equal differences: the episodes' noise is left.
    assert (online[0], online[1], online[3:]) == (CUBE2, "-25.0", ["3", "the opposite"])
    low, high = map(float, online[2].split(" to "))
    assert -45 < low < -30 < -20 < high < 0
    assert sum(cells[1] == "not run" for cells in rows.values()) == 11
    assert out.strip() in page.read_text(encoding="utf-8")
    assert script(*arguments, "--test-time", *files, "--out", page)[0] == 0, "its own page is written anew"
    (other := tmp_path / "notes.md").write_text("<!-- claims -->\nmine\n", encoding="utf-8")
    for wrong, said in (
        (("--out", other), "has no <!-- claims --> and"),
        (("--test-time", files[0], files[0]), "leave one out"),
    ):
        code, _, err = script(*arguments, *wrong)
        assert (code, err.count("\n"), said in err) == (2, 1, True), err
    assert other.read_text(encoding="utf-8") == "<!-- claims -->\nmine\n"

    other = record_of(2, seed=0, before=(2, 2), settings={"precision": "high"})
    second = write_run(tmp_path / "again" / CUBE2 / "deflow" / "seed0", other)
    code, _, err = script(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "are both deflow on" in err
    assert "leave one out" in err
    second.rename(tmp_path / CUBE2 / "deflow" / "seed3")
    record = record_of(2, algo="fql", seed=3, before=(2, 2))
    write_run(tmp_path / CUBE2 / "fql" / "seed3", record)
    code, _, err = script(*arguments)
    assert (code, err.count("\n")) == (2, 1), "another precision, of a seed of its own"


def test_the_claims_in_readme_are_what_the_kept_records_say(script, tmp_path):
    readme, copy = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8"), tmp_path / "README.md"
    begin, end = "<!-- claims -->\n", "<!-- /claims -->"
    assert "| DeFlow is better than FQL " in readme.partition(begin)[2].partition(end)[0]
    copy.write_text(readme.partition(begin)[0] + begin + end + readme.partition(end)[2], encoding="utf-8")
    kept = BENCHMARKS / "results"
    test_time = sorted((kept / "test_time").glob("*.json"))
    runs = ("--runs", kept / "small", kept / "claims", "--test-time", *test_time)
    code, _, err = script("claims", "render", *runs, "--out", copy)
    assert code == 0, err
    assert copy.read_text(encoding="utf-8") == readme


def test_over_several_tasks_a_claim_is_tested_by_the_means_of_seeds_in_their_unit(script, tmp_path):
    from tests.support.synthetic import outcome, record_of, write_run

    for task, gap, seeds in (("door-human-v1", 1.0, 3), ("pen-human-v1", 21.0, 4)):
        for seed in range(seeds):
            for algo, mean in (("deflow", 50.0 + gap + 2 * seed), ("fql", 50.0)):
                scored = {algo: outcome(5, mean_score=mean, score=[mean] * 20)}
                record = record_of(5, task=task, algo=algo, seed=seed, metric="score", evaluations=scored, history=[
                    {"step": step, "phase": "offline", "policies": scored} for step in (80, 90, 100)
                ])  # fmt: skip
                write_run(tmp_path / task / algo / f"seed{seed}", record)
    code, out, err = script("claims", "render", "--runs", tmp_path)
    assert code == 0, err
    first = [[it.strip() for it in line.split("|")[2:-1]] for line in out.splitlines()[2:5]]
    assert [(row[1], row[3]) for row in first] == [("+3.0", "3"), ("+24.0", "4"), ("+13.0", "3")]
    # Means over tasks of 11, 13 and 15 for the seeds that both tasks have: 13 +- 4.303 x 2 / sqrt(3).
    assert first[2] == ["mean of 2 tasks", "+13.0", "+8.0 to +18.0", "3", "holds"]


def test_claims_take_no_methods(script):
    code, _, err = script("claims", "run", "--methods", "fql", "--dry-run")
    assert (code, err) == (2, "claims.py: --methods is not for claims: each says what it compares\n")


@pytest.mark.parametrize("name", ["cube", "alpha_ablation", "offline_to_online"])
def test_tables_leave_the_evaluations_to_the_report_and_are_labelled(script, monkeypatch, name, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    made = []
    monkeypatch.setattr(importlib.import_module("_family"), "deflow", lambda command: made.append(command) or 0)
    for protocol in ("paper", "small")[: 1 if name == "offline_to_online" else 2]:
        code, _, err = script(name, "render", "--protocol", protocol, "--runs", tmp_path)
        assert code == 0, err
        pages = ["--html", str(tmp_path / "report.html"), "--md", str(tmp_path / "report.md")]
        more = ["--last", "3", "--label", "small protocol, not comparable with the paper's numbers"]
        assert made.pop() == ["report", str(tmp_path), *pages, *(more if protocol == "small" else [])]


def test_a_dry_run_prints_commands_and_cost_and_does_nothing(script, tmp_path):
    arguments = ("run", "--methods", "deflow", "--out", tmp_path / "runs", "--dry-run", "--set", *TINY_RUNS)
    code, out, err = script("puzzle", *arguments)
    assert code == 0, err
    assert "$ deflow data generate puzzle-3x3-play-v0 " in out
    assert f"tasks={FAMILIES['puzzle']} algos=deflow protocol=small" in out
    assert re.search(rf"^{FAMILIES['puzzle']} +deflow +0\.\.2 +8,000 ", out, re.MULTILINE), out
    assert list(tmp_path.iterdir()) == []


def test_a_familys_script_generates_data_and_trains_and_goes_on(script, short_episodes, in_process, tmp_path):
    tiny = (
        "offline_steps=2",
        "eval_interval=0",
        "eval_episodes=1",
        "eval_max_steps=5",
        "eval_workers=1",
        "save_interval=0",
    )
    tiny = (*tiny, *TINY_RUNS)
    arguments = (
        "run",
        "--methods",
        "deflow",
        "--seeds",
        "3",
        "--jobs",
        "1",
        "--out",
        tmp_path / "runs",
        "--set",
        *tiny,
    )
    with pytest.MonkeyPatch.context() as patch:
        protocol = get_protocol("small")
        made = dict.fromkeys(protocol.generated.datasets, 1)
        small = dataclasses.replace(protocol.generated, datasets=made, val_episodes=1)
        tasks = {"cube": (FAMILIES["cube"],)}
        one = dataclasses.replace(protocol, generated=small, tasks=tasks)
        patch.setattr(protocols, "_protocols", lambda: {"small": one})
        code, out, err = script("cube", *arguments)
        assert code == 0, err
        (record,) = (tmp_path / "runs").rglob("record.json")
        assert record.parent.relative_to(tmp_path / "runs").parts == (FAMILIES["cube"], "deflow", "seed3")
        config = json.loads(record.read_text())["config"]
        assert (config["algo"]["lr"], config["algo"]["tau"]) == (1e-3, 0.02)
        written = record.stat().st_mtime_ns
        code, out, err = script("cube", *arguments)
    assert code == 0, err
    assert "data generate" not in out, "it is there"
    assert record.stat().st_mtime_ns == written, "and so is the run"


@pytest.mark.parametrize("name", [*FAMILIES, "alpha_ablation", "floq", "offline_to_online", "runtime"])
def test_a_scripts_help_shows_how_to_call_it(script, name):
    code, out, _ = script(name, "--help")
    assert code == 0
    assert f"python benchmarks/{name}.py " in out
    assert ("--protocol paper" in out) == (name != "pointmaze"), "a maze that the paper does not have"
    assert "small" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cube", "run", "--protocol", "smal"), "unknown protocol 'smal'; did you mean small?"),
        (("cube", "run", "--methods", "deflow,fqll"), "unknown method 'fqll'; did you mean fql"),
        (("cube", "render", "--runs", "nowhere"), "there is no folder nowhere; make the runs with:"),
        (("alpha_ablation", "run", "--protocol", "x"), "unknown protocol 'x'; there are paper, small"),
        (("offline_to_online", "run", "--protocol", "papr"), "unknown protocol 'papr'; did you mean paper?"),
        (("offline_to_online", "run", "--methods", "fql"), "--methods and --device are for --protocol paper"),
        (("runtime", "--protocol", "papr"), "unknown protocol 'papr'; did you mean paper?"),
    ],
)
def test_what_a_script_does_not_know_is_one_line(script, arguments, said):
    code, out, err = script(*arguments)
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"{arguments[0]}.py: {said}")


def test_data_that_cannot_be_had_are_refused_before_any_run(script, monkeypatch, tmp_path):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr("deflow_torchrl.sources.minari_sets._check_network", refuse_network)
    code, _, err = script("adroit", "run", "--methods", "deflow", "--out", tmp_path / "runs")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("adroit.py: Minari set D4RL/pen/human-v2 could not be downloaded (no network")
    assert not (tmp_path / "runs").exists()


def refuse_network():
    raise OSError("no network")


def test_the_steps_of_two_methods_are_timed_in_turns_beside_the_papers_copied_numbers(script):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    tiny = (
        "--protocol",
        "small",
        "--steps",
        "2",
        "--warmup",
        "1",
        "--transitions",
        "300",
        "--hidden-dims",
        "8",
        "--json",
    )
    code, out, err = script("runtime", *tiny)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert {phase: list(times) for phase, times in result["ms"].items()} == {
        "offline": ["fql", "deflow"],
        "online": ["fql", "deflow", "deflow, frozen prior"],
        "inference": ["fql", "deflow"],
    }
    for phase, times in result["ms"].items():
        assert min(times.values()) > 0
        assert result["to_fql"][phase]["fql"] == 1
    assert "| ms, copied from the paper |" in out
    assert re.search(r"^\| online \| deflow, frozen prior \| [\d.]+ \| [\d.]+ \| 5\.2 \| 1\.02 \|$", out, re.MULTILINE)
