import csv
import json

import pytest

from deflow_torchrl.errors import CheckpointNotWritten
from deflow_torchrl.trainers import MetricsLog


def read(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with (folder / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return rows, table


def test_jsonl_and_csv_hold_the_same_rows_also_when_a_column_comes_later(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "phase": "offline", "train/a": 0.5})
    log.write({"step": 2, "phase": "offline", "train/a": 0.25, "eval/success": 1.0})
    log.write({"step": 3, "phase": "offline", "train/a": 0.125})
    rows, table = read(tmp_path)
    assert [row["train/a"] for row in rows] == [0.5, 0.25, 0.125]
    assert [float(row["train/a"]) for row in table] == [0.5, 0.25, 0.125]
    assert [row["eval/success"] for row in table] == ["", "1.0", ""]


def test_a_resumed_log_drops_the_rows_it_will_write_again_and_a_line_cut_by_a_kill(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step, "phase": "offline"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "pha')
    log = MetricsLog(tmp_path, resume_step=2)
    log.write({"step": 3, "phase": "offline"})
    rows, table = read(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in table] == ["1", "2", "3"]


def test_a_logger_receives_each_number_with_its_step(tmp_path):
    class Logger:
        def __init__(self):
            self.seen = []

        def log_scalar(self, name, value, step=None):
            self.seen.append((name, value, step))

    logger = Logger()
    MetricsLog(tmp_path, logger=logger).write({"step": 7, "phase": "offline", "train/a": 0.5})
    assert logger.seen == [("train/a", 0.5, 7)]


def test_torchrls_tensorboard_logger_takes_them(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from deflow_torchrl.trainers.metrics import make_logger

    MetricsLog(tmp_path, logger=make_logger("tensorboard", tmp_path)).write({"step": 1, "phase": "x", "train/a": 0.5})
    assert list((tmp_path / "tensorboard").rglob("events*"))


def test_wandb_without_a_key_logs_offline_and_says_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from deflow_torchrl.trainers import metrics

    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(metrics, "_wandb_has_key", lambda: False)
    logger = metrics.make_logger("wandb", tmp_path)
    MetricsLog(tmp_path, logger=logger).write({"step": 1, "phase": "x", "train/a": 0.5})
    logger.experiment.finish()
    assert "wandb has no key: logging offline" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_rows_that_could_not_be_written_come_with_the_next_one(tmp_path, monkeypatch, caplog):
    log = MetricsLog(tmp_path)
    log.write({"step": 1, "phase": "x"})
    with monkeypatch.context() as patch:

        def append_half(row):
            with log.jsonl.open("a") as file:
                file.write('{"step": 2, "ph')
            raise OSError(28, "No space left on device")

        patch.setattr(log, "_append", append_half)
        patch.setattr(log, "_write_csv", lambda: append_half(None))
        for step in (2, 3):
            log.write({"step": step, "phase": "x"})
        with pytest.raises(CheckpointNotWritten, match=r"metrics.jsonl was not written \(No space"):
            log.sync()
    assert caplog.text.count("No space left on device") == 1
    log.write({"step": 4, "phase": "x", "train/a": 0.5})
    rows, table = read(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in table] == ["1", "2", "3", "4"]
    log.sync()


def test_a_resumed_tensorboard_hides_the_numbers_that_are_written_again(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from deflow_torchrl.trainers.metrics import logger_state, make_logger

    state = None
    for resume_step, steps in ((None, (1, 2, 3, 4)), (2, (3, 4, 5))):
        logger = make_logger("tensorboard", tmp_path, state=state, step=resume_step)
        for step in steps:
            logger.log_scalar("train/a", step / 2 + (0 if resume_step is None else 10), step)
        state = logger_state("tensorboard", logger)
        logger.experiment.close()
    (folder,) = {path.parent for path in (tmp_path / "tensorboard").rglob("events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/a")] == [
        (1, 0.5), (2, 1.0), (3, 11.5), (4, 12.0), (5, 12.5),
    ]  # fmt: skip


def test_a_resumed_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from deflow_torchrl.trainers import metrics
    from deflow_torchrl.trainers.metrics import logger_state, make_logger

    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(metrics, "_wandb_has_key", lambda: False)
    state = None
    for step in (None, 3):
        logger = make_logger("wandb", tmp_path, state=state, step=step)
        again, state = state, logger_state("wandb", logger)
        logger.experiment.finish()
    assert again == state
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert {folder.name.split("-")[3] for folder in folders} == {state["id"]}
    assert make_logger("none", tmp_path, state=state) is None


def test_a_resumed_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from deflow_torchrl.trainers.metrics import logger_state, make_logger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    state = None
    for step in (None, 3):
        logger = make_logger("mlflow", tmp_path, state=state, step=step)
        again, state = state, logger_state("mlflow", logger)
        mlflow.end_run()
    assert again == state


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_names_its_extra(name, tmp_path, monkeypatch):
    from deflow_torchrl.errors import MissingExtraError
    from deflow_torchrl.trainers import metrics

    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=rf"deflow-torchrl\[{name}\]"):
        metrics.make_logger(name, tmp_path)
