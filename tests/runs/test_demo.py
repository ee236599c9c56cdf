import base64
import csv
import dataclasses
import json
import re

import pytest

pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.envs.drawing import check_drawing
from deflow_torchrl.runs.demo import FULL, DemoScale, describe, run_demo
from deflow_torchrl.runs.evaluate import evaluate_run
from tests.support.rendering import missing_renderer
from tests.support.runs import drawn

TINY = DemoScale(
    episodes=1,
    val_episodes=1,
    steps=8,
    log_interval=2,
    eval_interval=4,
    eval_episodes=1,
    final_episodes=2,
    hidden_dims=(16, 16),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory, short_episodes):
    folder = tmp_path_factory.mktemp("demo")
    if (why := missing_renderer()) is not None:
        pytest.skip(f"no EGL renderer here: {why}")
    with pytest.MonkeyPatch.context() as patch:
        # Evaluated in this process: two others are slow to start.
        patch.setattr("deflow_torchrl.runs.evaluate.available_cores", lambda: 1)
        patch.setenv("DEFLOW_HOME", str(folder / "home"))
        patch.delenv("MUJOCO_GL", raising=False)
        patch.chdir(folder)
        with pytest.MonkeyPatch.context() as pages:
            drawn(pages)
            result = run_demo(TINY, seed=0, command="deflow demo", show_progress=False)
        yield folder, result


def test_the_pipeline_runs_from_generation_to_the_report(demo, short_episodes):
    folder, result = demo
    assert result["transitions"] == short_episodes - 1
    assert result["steps"] == 8
    assert 0 <= result["prior_success"] <= 1
    assert 0 <= result["deflow_success"] <= 1
    run = folder / "runs" / "demo-seed0"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "metrics.csv", "checkpoints", "record.json", "report.html", "learning_curve.png",
        "videos",
    }  # fmt: skip
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert describe(result).startswith("On 2 common starts")


def test_the_numbers_it_prints_are_those_of_its_record(demo):
    folder, result = demo
    record = json.loads((folder / "runs" / "demo-seed0" / "record.json").read_text())
    for policy in ("prior", "deflow"):
        outcome = record["evaluations"][policy]
        assert result[f"{policy}_success"] == sum(outcome["success"]) / 2
    assert record["evaluations"]["prior"]["seeds"] == record["evaluations"]["deflow"]["seeds"]
    assert "regenerated" in record["data"]["provenance"]
    assert len(record["data"]["sha256"]) == 64
    assert record["time"]["generate_data"] > 0
    assert (
        evaluate_run(folder / "runs" / "demo-seed0", episodes=None, show_progress=False)["evaluations"]
        == record["evaluations"]
    )


def test_the_page_is_self_contained_and_names_what_a_reader_needs(demo):
    folder, _ = demo
    page = (folder / "runs" / "demo-seed0" / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", page), "nothing is loaded from elsewhere"
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]
    assert pictures[0][:4] + pictures[0][8:12] == b"RIFFWEBP", "the clip"
    assert len(pictures[0]) < 2_000_000
    assert all(picture.startswith(b"\x89PNG") for picture in pictures[1:])
    for text in ("regenerated", "deflow demo", "torchrl", "target_divergence", "prior", "sha256"):
        assert text in page


def test_metrics_hold_curves_and_wall_clock_only_under_time(demo):
    folder, _ = demo
    with (folder / "runs" / "demo-seed0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    assert all(row["train/loss_flow"] for row in rows)
    assert [bool(row["eval/success"]) for row in rows] == [False, True, False, True]
    assert rows[-1]["eval/prior/success"]
    assert [name for name in rows[0] if "second" in name] == ["time/trained_seconds"]


def test_a_second_run_finds_the_data_and_takes_a_folder_of_its_own(demo, monkeypatch, caplog):
    folder, _ = demo
    monkeypatch.setenv("DEFLOW_HOME", str(folder / "home"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("deflow_torchrl.runs.demo.generate_ogbench_dataset", None)  # a call would fail
    monkeypatch.setenv("MUJOCO_GL", "glfw")  # without a display nothing can be drawn
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    check_drawing.cache_clear()
    shorter = dataclasses.replace(TINY, steps=2, eval_interval=2, final_episodes=1)
    run_demo(shorter, seed=0, command="deflow demo", show_progress=False)
    assert (folder / "runs" / "demo-seed0-2" / "record.json").exists()
    assert not (folder / "runs" / "demo-seed0-2" / "videos").exists()
    assert "no clip" in caplog.text


def test_training_says_where_generated_data_lies(demo, monkeypatch):
    from deflow_torchrl.errors import InputError
    from deflow_torchrl.runs.overrides import compose_config
    from deflow_torchrl.runs.run import train

    folder, _ = demo
    monkeypatch.setenv("DEFLOW_HOME", str(folder / "home"))
    config = compose_config(["task=cube-single-noisy-singletask-task2-v0", "download=false", f"out={folder / 'x'}"])
    with pytest.raises(InputError, match=r"generated by the demo lies in data_root=.*cube-single-noisy"):
        train(config, command="x", show_progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_full_demo_keeps_its_promise(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_demo(FULL, seed=seed, command="deflow demo", show_progress=False)
    assert result["transitions"] >= 100_000
    assert result["episodes"] == 50
    assert result["deflow_success"] >= 0.4
    assert result["deflow_success"] >= result["prior_success"] + 0.3
