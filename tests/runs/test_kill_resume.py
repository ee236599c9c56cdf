"""A run that is killed at any moment and resumed is, bit for bit, the run that was not killed."""

from __future__ import annotations

import collections
import contextlib
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl.algorithms import DeFlowConfig
from deflow_torchrl.runs.folder import LOCK_FILE
from deflow_torchrl.runs.settings import TrainConfig, config_to_dict
from deflow_torchrl.trainers.checkpoint import list_checkpoints
from tests.support.killable import Children
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs

# Episodes have 15 steps, so that checkpoints every 7 fall inside them and the phases' boundary on none.
KINDS = {
    "offline": {"offline_steps": 120},
    "across": {"offline_steps": 60, "online_steps": 60},
    "frozen": {"offline_steps": 30, "online_steps": 90, "freeze_prior": True, "base_actions": 2},
    "fifo": {  # the paper's array is full at once: offline rows go
        "offline_steps": 30, "online_steps": 90, "freeze_prior": True, "base_actions": 2, "overwrite": "fifo",
        "online_capacity": 20,
    },
    "online": {
        "offline_steps": 0, "online_steps": 120, "warmup_steps": 10, "utd": 0.5, "mixing": "balanced", "online_capacity": 40,
    },
    "workers": {"offline_steps": 30, "online_steps": 60, "collector_workers": 2, "steps_per_collection": 8},
    "processes": {  # of every kind
        "offline_steps": 14, "online_steps": 30, "freeze_prior": True, "base_actions": 2, "collector_workers": 2,
        "steps_per_collection": 8, "eval_workers": 2,
    },
}  # fmt: skip
PHASES = {  # name -> its moments, each with the number of times that it surely comes to
    "loading": {"loading": 1},
    "offline": {"offline": 10},
    "between": {"between": 1},
    "online": {"online": 20},
    "evaluation": {"evaluating": 15},
    "saving": {"writing": 2, "written": 2, "renamed": 2},
    "report": {"reporting": 1},
}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL]
SLOW = pytest.mark.slow
_TWENTY = [(kind, 20) for kind in KINDS if kind != "processes"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    with Children(tmp_path_factory.mktemp("children") / "log") as group:
        yield group


@pytest.fixture(scope="module")
def uninterrupted(task, children, tmp_path_factory):
    """Kind of run -> its settings, folder and wall seconds, each made once."""
    made = {}

    def run(kind):
        if kind not in made:
            config = config_to_dict(
                TrainConfig(
                    task=task, env=ENVIRONMENT, seed=1, batch_size=8, hidden_dims=[8], log_interval=3, eval_interval=40,
                    eval_episodes=2, save_interval=7, algo=DeFlowConfig(flow_steps=2), **{"eval_workers": 1, **KINDS[kind]},
                )
            )  # fmt: skip
            folder = tmp_path_factory.mktemp("runs") / kind
            began = time.perf_counter()
            assert children.run(folder, config) == 0, children.log.read_text()
            made[kind] = config, folder, time.perf_counter() - began
        return made[kind]

    return run


def finish(children, out, config):
    """Resume what is there, or start what never came to be."""
    started = (out / "config.yaml").exists()
    assert children.run(out, None if started else config) == 0, children.log.read_text()


def next_of(out, config):
    return None if (out / "config.yaml").exists() else config


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        *((kind, 4) for kind in ("across", "frozen")),
        *(pytest.param(kind, kills, marks=SLOW) for kind, kills in (("offline", 4), ("online", 4), *_TWENTY)),
    ],
)
def test_a_run_killed_at_random_moments_is_bit_for_bit_the_uninterrupted_one(
    kind, kills, children, uninterrupted, tmp_path
):
    config, straight, seconds = uninterrupted(kind)
    rng, killed, trial = random.Random(f"{kind} {kills}"), 0, 0
    while killed < kills:
        out = tmp_path / f"trial{trial}" / straight.name
        for _ in range(min(4, kills - killed)):  # more than one of a run: what was resumed is killed too
            if not children.kill_after(out, rng.uniform(0.02, 0.9) * seconds, next_of(out, config)):
                break  # it was done before
            killed += 1
        else:
            finish(children, out, config)
        assert_equal_runs(straight, out)
        trial += 1


@SLOW
def test_no_collecting_process_outlives_a_killed_run_and_the_resumed_run_is_the_uninterrupted_one(
    children, uninterrupted, tmp_path
):
    config, straight, _ = uninterrupted("workers")
    out = tmp_path / straight.name
    assert children.run(out, config, die=("written", 5)) == -signal.SIGKILL
    wait_until_alone(children)
    finish(children, out, config)
    assert_equal_runs(straight, out)


@pytest.mark.parametrize(
    ("kind", "interruptions"),
    [("frozen", 7), *(pytest.param(*case, marks=SLOW) for case in (("frozen", 84), ("processes", 16)))],
)
def test_a_run_interrupted_in_any_phase_by_any_signal_is_bit_for_bit_the_uninterrupted_one(  # noqa: PLR0917 # fixtures
    kind, interruptions, children, uninterrupted, tmp_path, capsys
):
    config, straight, _ = uninterrupted(kind)
    rng = random.Random(f"{kind} {interruptions}")
    phases = rng.sample(list(PHASES), len(PHASES))
    # Every phase as often as every other, and in each phase every signal.
    plan = [(phases[number % 7], SIGNALS[(number % 7 + number // 7) % 6]) for number in range(interruptions)]
    seen, trial = collections.Counter(), 0
    while plan:
        out = tmp_path / f"trial{trial}" / straight.name
        for phase, by in plan[:4]:  # more than one of a run: what was resumed is interrupted too
            moment, most = rng.choice(list(PHASES[phase].items()))
            delay, before = rng.choice([0.0, rng.uniform(0.001, 0.05)]), len(children.log.read_text())
            done = children.run(out, next_of(out, config), die=(moment, rng.randint(1, most)), by=by, delay=delay)
            if done == 0:
                break  # the rest of the run does not come to this moment, or the signal was late
            said = children.log.read_text()[before:]
            assert done == (-by if by == signal.SIGKILL else 130), said
            if done == 130:
                assert re.search("^interrupted, .*; go on with: (deflow resume .*|train)$", said, re.MULTILINE), said
                assert not (out / LOCK_FILE).exists()
                wait_until_alone(children)
            seen[phase, by.name] += 1
            plan.remove((phase, by))
        else:
            finish(children, out, config)
        assert_equal_runs(straight, out)
        trial += 1
    with capsys.disabled():
        sys.stdout.write(f"\n{kind}: {sum(seen.values())} interruptions of {trial} runs, none lost or changed:")
        for phase in PHASES:
            sys.stdout.write(f"\n  {phase:10} " + ", ".join(f"{by.name} {seen[phase, by.name]}" for by in SIGNALS))


def wait_until_alone(children):
    deadline = time.monotonic() + 60
    while of_a_dead_run(children):
        assert time.monotonic() < deadline, of_a_dead_run(children)
        time.sleep(0.2)


def of_a_dead_run(children):
    """Processes other than the server with its name in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(children.log) in (folder / "environ").read_text() and int(folder.name) != children.number:
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("kind", ["across", *(pytest.param(kind, marks=SLOW) for kind in KINDS if kind != "across")])
def test_a_run_killed_while_it_writes_checkpoints_is_bit_for_bit_the_uninterrupted_one(
    kind, children, uninterrupted, tmp_path
):
    config, straight, _ = uninterrupted(kind)
    out = tmp_path / straight.name
    checkpoints = out / "checkpoints"
    left_before = 0
    for moment, number in (
        ("writing", 1),
        ("written", 1),
        ("renamed", 1),
        ("writing", 3),
        ("written", 4),
        ("renamed", 5),
    ):
        assert children.run(out, next_of(out, config), die=(moment, number)) == -signal.SIGKILL
        left = list(checkpoints.glob(".step_*.pt.*.part"))
        assert len(left) == (moment != "renamed")
        assert all(path.stat().st_size > 4096 for path in left)
        kept = len(list_checkpoints(checkpoints))
        assert kept == {("writing", 1): 0, ("written", 1): 0, ("renamed", 1): 1}.get((moment, number), kept)
        assert kept >= left_before
        left_before = kept
    finish(children, out, config)
    assert_equal_runs(straight, out)
