import csv
import json

import pytest

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
    from deflow_torchrl.trainers.loggers import make_logger

    MetricsLog(tmp_path, logger=make_logger("tensorboard", tmp_path)).write({"step": 1, "phase": "x", "train/a": 0.5})
    assert list((tmp_path / "tensorboard").rglob("events*"))


def test_wandb_without_a_key_logs_offline_and_says_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from deflow_torchrl.trainers import loggers

    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(loggers, "_wandb_has_key", lambda: False)
    logger = loggers.make_logger("wandb", tmp_path)
    MetricsLog(tmp_path, logger=logger).write({"step": 1, "phase": "x", "train/a": 0.5})
    logger.experiment.finish()
    assert "wandb has no key: logging offline" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_names_its_extra(name, tmp_path, monkeypatch):
    from deflow_torchrl.errors import MissingExtraError
    from deflow_torchrl.trainers import loggers

    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=rf"deflow-torchrl\[{name}\]"):
        loggers.make_logger(name, tmp_path)
