"""A sweep on a Ray cluster: a node that dies in mid-sweep costs nothing and doubles nothing."""

import json
import socket
import threading
import time

import pytest

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.runs.folder import read_settings
from deflow_torchrl.runs.run import train
from deflow_torchrl.runs.settings import config_from_dict
from deflow_torchrl.sweep import parse_sweep, plan_jobs, run_sweep
from deflow_torchrl.sweep import ray as sweep_on_ray
from deflow_torchrl.trainers.metrics import read_rows
from tests.support.killable import ROOT
from tests.support.pendulum import ENVIRONMENT, record_pendulum
from tests.support.runs import assert_equal_runs, undrawn

STEPS = 160
STORE = 80 << 20  # about the least that Ray takes; nothing is stored


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return record_pendulum(tmp_path_factory.mktemp("data"), episodes=4)


def settings(task, out, *more):
    return [
        f"tasks={task}", f"env={ENVIRONMENT}", "algos=deflow:flow_steps=2,deflow:flow_steps=2:fixed_alpha=0.3", "seeds=0,1",
        f"out={out}", f"offline_steps={STEPS}", "batch_size=8", "hidden_dims=[8]", "log_interval=1", "eval_interval=80",
        "eval_episodes=1", "save_interval=20", "engine=ray", *more,
    ]  # fmt: skip


def test_without_ray_the_extra_is_named(task, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deflow-torchrl\[ray\]'"):
        run_sweep(parse_sweep(settings(task, tmp_path / "sweep")), show_progress=False)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at ray_address=127.0.0.1:1"),
        ("nowhere:port", "ray_address=nowhere:port is no address"),
    ],
)
def test_an_address_where_nothing_answers_is_one_line_at_once(task, tmp_path, address, message):
    pytest.importorskip("ray", reason="needs the extra ray")
    began = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        run_sweep(parse_sweep(settings(task, tmp_path / "sweep", f"ray_address={address}")), show_progress=False)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 20


def test_a_port_that_is_not_rays_is_given_up_in_bounded_time(task, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.setattr(sweep_on_ray, "_CONNECT_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"no Ray cluster answers at ray_address={address}"):
            run_sweep(parse_sweep(settings(task, tmp_path / "sweep", f"ray_address={address}")), show_progress=False)


@pytest.mark.slow
def test_a_node_killed_in_mid_sweep_loses_nothing_and_doubles_nothing(task, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    from ray.cluster_utils import Cluster

    from tests.support.sweep_process import run_on_node

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sweep_on_ray, "_run_on_node", run_on_node)
    noticed = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}  # 15 s by default
    cluster, over, killed = Cluster(initialize_head=False), threading.Event(), []
    try:
        cluster.add_node(num_cpus=0, object_store_memory=STORE, include_dashboard=False, _system_config=noticed)
        first = cluster.add_node(num_cpus=1, object_store_memory=STORE)
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        plan = parse_sweep(settings(task, tmp_path / "sweep", f"ray_address={cluster.address}"))
        jobs = plan_jobs(plan)
        assert [job.seeds for job in jobs] == [(0, 1)] * 2, "the seeds of a cell are one job"

        def kill_when_two_run():
            while not over.wait(0.05):
                rows = [len(read_rows(job.folders[0] / "metrics.jsonl")) for job in jobs]
                if min(rows) > 25 and max(rows) < STEPS - 60:
                    killed.extend(rows)
                    cluster.remove_node(first, allow_graceful=False)
                    return

        killer = threading.Thread(target=kill_when_two_run, daemon=True)
        killer.start()
        summary = run_sweep(plan, show_progress=False)
        over.set()
        killer.join()
        again = run_sweep(plan, show_progress=False)
    finally:
        over.set()
        try:
            ray.shutdown()
        finally:
            cluster.shutdown()
    assert killed, "two jobs were running when the node died"
    assert (summary["done"], summary["failed"]) == (2, [])
    assert sorted(job["attempts"] for job in summary["jobs"].values()) == [1, 2], "one was lost and sent again"
    assert (again["done"], again["ran"]) == (2, 0), "nothing is run twice"
    notes = [json.loads(line) for line in (tmp_path / "sweep" / "status.jsonl").read_text().splitlines()]
    assert [note["outcome"] for note in notes if note["outcome"]].count("lost") == 1

    undrawn(monkeypatch)
    for job in jobs:
        assert len(list((tmp_path / "sweep").glob(f"{job.name}/seed*/record.json"))) == 2
        for folder in job.folders:
            assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
            assert not list(folder.rglob("*.part"))
    lost = next(job for job in jobs if summary["jobs"][job.name]["attempts"] == 2)
    undisturbed = tmp_path / "undisturbed"
    train(config_from_dict({**lost.config, "out": str(undisturbed)}), command="deflow train", show_progress=False)
    for folder in lost.folders:
        assert_equal_runs(undisturbed / folder.name, folder)
    assert read_settings(jobs[0].folders[0].parent / "group.yaml")["finished"]
