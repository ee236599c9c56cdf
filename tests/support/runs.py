"""Run folders: resumed, read and compared."""

from __future__ import annotations

import json

import torch

from deflow_torchrl.reports import plot_learning_curve, write_html_report
from deflow_torchrl.runs.run import resume
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint, step_of


def undrawn(patch):
    """Leave the page and its curve out of the runs of this process: they take longer than a tiny run."""
    for name in ("plot_learning_curve", "write_html_report"):
        patch.setattr(f"deflow_torchrl.runs.run.{name}", lambda *_, **__: None)


def drawn(patch):
    """Bring back the page and its curve, which the suite leaves out of all runs of its process (tests/conftest.py)."""
    for function in (plot_learning_curve, write_html_report):
        patch.setattr(f"deflow_torchrl.runs.run.{function.__name__}", function)


def go_on(run, *overrides, **options):
    return resume(run, command="deflow resume", overrides=overrides, show_progress=False, **options)


def steps(run):
    return [step_of(path) for path in list_checkpoints(run / "checkpoints")]


def rows(run):
    """Rows of metrics without wall times."""
    return without_time(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())


def without_time(rows):
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def assert_equal_runs(one, other):
    assert rows(one) == rows(other)
    last, same = (list_checkpoints(folder / "checkpoints")[-1] for folder in (one, other))
    assert step_of(last) == step_of(same)
    assert_bitwise(without_times(load_checkpoint(last)), without_times(load_checkpoint(same)))
    evaluations = [json.loads((folder / "record.json").read_text())["evaluations"] for folder in (one, other)]
    assert evaluations[0] == evaluations[1]
    assert not list((other / "checkpoints").glob(".*"))


def without_times(state):
    """A state without wall times and commands, which are of the processes."""
    if not isinstance(state, dict):
        return state
    return {
        name: without_times(value)
        for name, value in state.items()
        if name != "history" and not str(name).endswith("seconds")
    }


def assert_bitwise(one, other, where="state"):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert one.shape == other.shape, where
        assert one.numpy().tobytes() == other.numpy().tobytes(), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_bitwise(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_bitwise(*pair, f"{where}[{index}]")
    else:
        assert one == other, where
