import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch):
    pytest.importorskip("gymnasium", reason="the examples use gymnasium's pendulum")

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / name))["main"]()

    return call


def test_the_drop_in_script_is_short_and_runs_to_its_evaluation(run, capsys):
    assert len((EXAMPLES / "drop_in.py").read_text().splitlines()) < 100
    learned = run("drop_in.py", "--steps", "10", "--episodes", "2")
    out = capsys.readouterr().out
    assert f"DeFlow {learned:.0f}" in out
    assert out.count("loss_qvalue") == 5


def test_torchrls_trainer_drives_the_loss(run):
    trainer = run("drop_in_trainer.py", "--frames", "300")
    assert trainer.collected_frames == 300
    loss = trainer.loss_module
    moved = [
        not bool((source == target).all())
        for source, target in zip(
            loss.qvalue_network_params.values(True, True),
            loss.target_qvalue_network_params.values(True, True),
            strict=True,
        )
    ]
    assert all(moved), "the optimiser and the target hook both ran"
    assert loss.log_alpha.item() != 1.0


def test_the_benchmark_prints_milliseconds_per_update():
    import json

    script = Path(__file__).parents[1] / "benchmarks" / "throughput.py"
    arguments = [
        "update",
        "--obs-dim",
        "4",
        "--action-dim",
        "2",
        "--batch-size",
        "8",
        "--hidden-dims",
        "8",
        "--steps",
        "2",
        "--json",
    ]
    out = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1])["ms_per_update"] > 0
