"""The page of a run, from rows that a real short training wrote."""

import html
import re

import pytest

pytest.importorskip("matplotlib", reason="needs the extra reports")
pytest.importorskip("jinja2", reason="needs the extra reports")

from deflow_torchrl.algorithms import Panel
from deflow_torchrl.reports import build_record, plot_learning_curve, write_html_report
from deflow_torchrl.reports.figures import DIAGNOSTICS, draw_diagnostics, online_boundary
from tests.support.updates import rows_of_training

EVALUATION = {
    "success_rate": 0.5, "mean_return": -3.0, "episodes": 2, "success": [0, 1], "episode_return": [-4.0, -2.0],
    "length": [5, 3], "seeds": [1, 2],
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """Six rows, the last three of them of an online phase."""
    rows, _ = rows_of_training(60)
    for row in rows[3:]:
        row |= {"phase": "online", "train/online_share": 0.1, "online/return": -5.0}
    return rows


def write_page(folder, rows, **entries):
    record = build_record(
        commands=["deflow train task=x", "deflow resume x"],
        config={"task": "x", "seed": 0, "algo": {"name": "deflow", "lr": 1e-3}},
        data={"name": "x", "provenance": "official"}, metric="success", acting="deflow", variant={}, success_timing=None,
        evaluation_seed=1, evaluations={"deflow": EVALUATION}, seconds={"updates": 1.0}, **entries,
    )  # fmt: skip
    figure = plot_learning_curve(rows, folder / "curve.png", title="x", final={"deflow": 0.5}, target_divergence=1e-3)
    path = write_html_report(
        folder / "report.html", title="x", record=record, rows=rows, figure=figure, target_divergence=1e-3
    )
    return path.read_text(encoding="utf-8")


def test_each_diagnostic_has_a_panel_and_a_sentence_in_the_one_file(tmp_path, rows):
    page = write_page(
        tmp_path, rows, alarms=[], online={"env_steps": 30, "episodes": 4, "faults": 1, "worker_restarts": 0}
    )
    shown = [item for item in DIAGNOSTICS if "action_distance" not in str(item.curves)]  # no data was given
    assert len(shown) == len(DIAGNOSTICS) - 1
    for diagnostic in shown:
        assert html.escape(diagnostic.reading, quote=True).replace("&#x27;", "&#39;") in page, diagnostic.title
        assert diagnostic.reading.count(". ") == 0, "one sentence"
    assert page.count("<img") == 1 + len(shown)
    assert not re.search(r"(src|href)=\"(?!data:)", page), "nothing is loaded from anywhere"
    assert "No alarms." in page
    assert "<pre>deflow train task=x\ndeflow resume x</pre>" in page
    assert re.search(r"worker restarts</th><td class=\"number\">0<", page)
    assert re.search(r"faults</th><td class=\"number\">1<", page)


def test_alarms_are_listed_with_what_they_mean_and_whether_they_are_over(tmp_path, rows):
    alarms = [
        {"name": "q", "step": 20, "message": "Q is <19> & more; try less", "cleared": 40},
        {"name": "saturation", "step": 30, "message": "corners", "cleared": None},
    ]
    page = write_page(tmp_path, rows, alarms=alarms)
    assert "No alarms" not in page
    assert "Q is &lt;19&gt; &amp; more; try less</td><td>40<" in page
    assert "corners</td><td>goes on<" in page


def test_an_offline_run_of_a_method_without_diagnostics_says_nothing_of_them(tmp_path, rows):
    plain = [{"step": row["step"], "phase": "offline", "train/loss_qvalue": 1.0} for row in rows]
    page = write_page(tmp_path, plain)
    for word in ("Alarms", "Diagnostics", "Online phase", "environment steps online"):
        assert word not in page


def test_the_boundary_is_the_last_offline_step_of_a_run_that_went_online(rows):
    assert online_boundary(rows) == rows[2]["step"]
    assert online_boundary(rows[:3]) is None
    assert online_boundary(rows[3:]) is None


def test_only_diagnostics_that_the_rows_have_are_drawn(rows):
    drawn = draw_diagnostics([{"step": 1, "phase": "offline", "train/alpha": 0.0}, {"step": 2, "train/alpha": 0.0}])
    assert [diagnostic.title for diagnostic, _ in drawn] == ["multiplier alpha"]
    assert drawn[0][1].startswith(b"\x89PNG"), "an alpha fixed at zero has no logarithm and is drawn all the same"
    assert draw_diagnostics([]) == []


def test_a_method_brings_panels_of_its_own():
    own = Panel("entropy", "how much the policy still explores", {"train/entropy": "entropy"}, "nats")
    row = {"step": 1, "phase": "offline", "train/entropy": 1.0}
    assert draw_diagnostics([row]) == []
    assert [panel for panel, _ in draw_diagnostics([row], [own])] == [own]
