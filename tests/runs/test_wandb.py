"""A real run that logs with wandb, offline, is killed and goes on."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="needs the extra wandb")
pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl.trainers.metrics import read_rows
from tests.support.pendulum import ENVIRONMENT, record_pendulum

STEPS = 60
BLOCK = 32_768  # bytes; a record is in parts, none across a block's end, as in LevelDB's log


def records(path):
    """Records of a run's transaction log, up to one that a kill has cut short."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""  # behind the file's header
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part = data[position + 7 : position + 7 + length]
        position += 7 + length
        if len(part) < length or kind == 0:
            return
        record = part if kind in (1, 2) else record + part
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)


def logged(out):
    """Ids of the runs in a run folder's wandb logs, and the steps of all their rows in the order of the processes."""
    ids, steps = [], []
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                if any(name.startswith("train/") for name in items):
                    steps.append(items["_step"])
    return ids, steps


def start(arguments, home, **options):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(home), "WANDB_SILENT": "true"}
    return subprocess.Popen([sys.executable, "-m", "deflow_torchrl.cli", *arguments], env=environment, **options)


def wait_for_rows(out, step, process):
    deadline = time.monotonic() + 240
    while (read_rows(out / "metrics.jsonl") or [{"step": 0}])[-1]["step"] < step:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"))


@pytest.mark.slow  # half a minute, and wandb is optional
def test_without_a_key_it_logs_offline_and_after_kills_the_run_is_the_same_and_no_step_comes_twice(task, tmp_path):
    out = tmp_path / "run"
    arguments = [
        "train", f"task={task}", f"env={ENVIRONMENT}", "batch_size=8", "hidden_dims=[8]", "algo.flow_steps=2", "log_interval=1",
        "eval_interval=30", "eval_episodes=1", "eval_workers=1", "save_interval=20", "threads=1", f"offline_steps={STEPS}",
        "logger=wandb", f"out={out}",
    ]  # fmt: skip
    # In a terminal, where wandb would ask for a key.
    master, slave = pty.openpty()
    for kill_at, number in ((8, signal.SIGKILL), (33, signal.SIGTERM), (None, None)):
        process = start(arguments, tmp_path, stdin=slave, stdout=slave, stderr=subprocess.PIPE)
        if kill_at is not None:
            wait_for_rows(out, kill_at, process)
            process.send_signal(number)
        said = process.communicate(timeout=240)[1].decode()
        assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130, None: 0}[number], said
        assert "wandb has no key: logging offline" in said
        arguments = ["resume", str(out)]
    for descriptor in (master, slave):
        os.close(descriptor)
    deadline = time.monotonic() + 60
    while _of_a_run(out):  # wandb's processes end with their runs
        assert time.monotonic() < deadline
        time.sleep(0.2)
    folders = list(out.glob("wandb/offline-run-*"))
    ids, steps = logged(out)
    assert (len(folders), len({folder.name.split("-")[3] for folder in folders} | set(ids))) == (3, 1)
    assert steps == sorted(set(steps)), "no step comes twice"
    # wandb keeps up to 32 KB in memory, which a SIGKILL costs; nothing else is missing.
    ended = json.loads((out / "logger.json").read_text())["step"]
    assert steps[-(STEPS - ended) :] == list(range(ended + 1, STEPS + 1))


def _of_a_run(out):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={out.parent}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder.name)
    return found
