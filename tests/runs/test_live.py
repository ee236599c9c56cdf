"""The page of runs that still train."""

import time
from contextlib import ExitStack

import pytest

pytest.importorskip("matplotlib", reason="needs the extra reports")
pytest.importorskip("hydra", reason="needs the extra cli")

from deflow_torchrl.runs import folder
from tests.support.command_line import assert_one_line, deflow
from tests.support.synthetic import metrics_rows, record_of, write_run


@pytest.fixture
def runs(tmp_path):
    """A finished run and one at step 75 of 100, whose folder is held until the stack is closed."""
    with ExitStack() as held:
        for seed, rows in ((0, metrics_rows()), (1, metrics_rows()[:3])):
            record = record_of(18, seed=seed, before=(1,))
            run = write_run(tmp_path / f"seed{seed}", record, rows)
            settings = {"config": record["config"] | {"out": str(run)}, "final_episodes": 20}
            folder.write_settings(run / folder.CONFIG_FILE, settings)
        (run / "record.json").unlink()
        held.enter_context(folder.hold_folders([run]))
        yield tmp_path, held


def test_the_page_loads_itself_anew_until_the_last_run_ends(runs, monkeypatch):
    path, held = runs
    pages = []

    def sleep(seconds):
        assert seconds == 30
        pages.append((path / "live.html").read_text())
        if len(pages) == 2:
            held.close()

    monkeypatch.setattr(time, "sleep", sleep)
    done = deflow("report", str(path), "--refresh", "30")
    assert done.returncode == 0, done.stderr
    assert "1 finished, 1 stopped" in done.stdout
    for page in pages:
        assert '<meta http-equiv="refresh" content="30' in page
        assert "<td>trains</td>" in page
        assert "Learning curves of seed1 so far" in page
        assert "success 0.25" in page, "its last evaluation"
    last = (path / "live.html").read_text()
    assert "http-equiv" not in last
    assert "<td>stopped</td>" in last
    assert len(pages) == 2


def test_ctrl_c_leaves_a_page_that_stays_as_it_is(runs, monkeypatch):
    path, _ = runs

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    done = deflow("report", str(path / "seed1"), "--refresh", "5", "--html", str(path / "own.html"))
    assert done.returncode == 130
    assert done.stderr.startswith("deflow: interrupted; ")
    assert "http-equiv" not in (path / "own.html").read_text()
    assert (path / "seed1" / folder.LOCK_FILE).is_file(), "the run goes on"


def test_what_cannot_be_watched_is_refused(tmp_path):
    assert_one_line(deflow("report", str(tmp_path), "--refresh", "5"), "holds no run")
    assert_one_line(deflow("report", str(tmp_path / "no"), "--refresh", "5"), "is missing")
    assert_one_line(deflow("report", str(tmp_path), "--refresh", "5", "--md", "x.md"), "--md is for finished runs")
