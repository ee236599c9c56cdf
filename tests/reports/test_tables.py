"""Tables computed from records, and the paper's figures beside them."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jsonschema", reason="needs the extra reports")

from deflow_torchrl.algorithms.registry import ALGORITHMS
from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.paper import (
    averaged_evaluations,
    family_of,
    find_paper_task,
    method_order,
    paper_grids,
    paper_tables,
    table_methods,
    task_order,
)
from deflow_torchrl.reports.runs import find_runs, score_of
from deflow_torchrl.reports.statistics import inside_noise
from deflow_torchrl.reports.tables import (
    aggregate_grid,
    column_name,
    column_order,
    cost_grid,
    make_tables,
    online_progress,
    paired_grid,
    ranking_grid,
    results_grid,
    time_grid,
    unlike_notes,
    untuned_note,
    variant_grids,
)
from deflow_torchrl.tasks import paper_tasks
from tests.support.synthetic import CUBE, CUBE2, outcome, record_of, write_run


def write_all(folder, *records):
    for number, record in enumerate(records):
        write_run(folder / f"run{number}", record)
    return folder


def texts(grid, column):
    at = grid.headers.index(column)
    return {row.entries[1].text: row.entries[at] for row in grid.rows}


@pytest.fixture
def two_tasks(tmp_path):
    """Wins of 20: deflow 16, 18, 20 and 10, 12, 14; fql 15, 16, 17 and 2, 3, 4 on tasks 1 and 2."""
    wins = {("deflow", 1): 18, ("deflow", 2): 12, ("fql", 1): 16, ("fql", 2): 3}
    steps = {"deflow": 2, "fql": 1}
    records = [
        record_of(middle + (seed - 1) * steps[algo], task=CUBE.format(task), algo=algo, seed=seed)
        for (algo, task), middle in wins.items()
        for seed in range(3)
    ]
    return find_runs([write_all(tmp_path / "runs", *records)])


def test_a_cell_is_mean_and_deviation_over_seeds_with_the_error_of_its_episodes(two_tasks):
    (table,) = make_tables(two_tasks)
    cell = table.rows[0].cells["deflow"]
    assert cell.scores == {0: 0.8, 1: 0.9, 2: 1.0}
    assert (cell.mean, cell.std) == pytest.approx((0.9, 0.1))
    assert cell.error == pytest.approx((0.9 * 0.1 / 60) ** 0.5)
    assert (cell.steps, cell.episodes) == ((100,), (20, 20))
    assert texts(results_grid(table), "DeFlow")[CUBE.format(1)].text == "90±10 (3.9)"


def test_the_familys_deviation_is_over_seeds_of_the_tasks_average(two_tasks):
    (table,) = make_tables(two_tasks)
    average = table.rows[-1]
    assert (average.kind, average.family, average.name) == ("average", "cube-single-play", "average of 2 tasks")
    by_seed = np.array([[16, 18, 20], [10, 12, 14]]).mean(0) / 20
    assert average.cells["deflow"].mean == pytest.approx(by_seed.mean())
    assert average.cells["deflow"].std == pytest.approx(by_seed.std(ddof=1))


def test_bold_from_95_percent_of_the_best_and_a_mark_for_gaps_inside_the_noise(tmp_path):
    wins = {"iql": 4, "fql": 18, "ifql": 19, "deflow": 19}
    records = [record_of(number, algo=algo, seed=0) for algo, number in wins.items()]
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records)]))
    entries = {column: texts(results_grid(table), column_name(column))[CUBE2] for column in table.columns}
    assert {name: entry.bold for name, entry in entries.items()} == {
        "iql": False, "fql": False, "ifql": True, "deflow": True,
    }  # fmt: skip
    assert not entries["iql"].text.endswith("≈")
    assert entries["fql"].text == "90 (6.7)≈", "a gap of 5 with errors of 6.7 and 4.9; one seed has no ±"
    (line,) = [line for line in results_grid(table).markdown() if CUBE2 in line]
    assert "**95 (4.9)" in line


def test_equal_means_are_marked_alike_whatever_their_sign(tmp_path):
    records = [record_of(0, algo=algo) for algo in ("deflow", "fql")]
    records += [
        record_of(wins, task="minari:x/y-v0", metric="return", algo=algo) for algo, wins in (("deflow", 0), ("fql", 1))
    ]
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records)]))
    bold = {
        row.entries[1].text.split(" (")[0]: [entry.bold for entry in row.entries[2:]]
        for row in results_grid(table).rows
    }
    assert bold == {CUBE2: [True, True], "minari:x/y-v0": [True, False]}, "columns fql, deflow; returns of -9.5 and -10"
    assert [entry.text[-1] for entry in results_grid(table).rows[0].entries[2:]].count("≈") == 1


def test_runs_alike_but_for_the_seed_share_a_column_others_say_how_they_differ(tmp_path):
    shared = {"lr": 1e-3}
    records = [record_of(5, seed=seed, variant=shared) for seed in (0, 1)]
    records += [record_of(5, seed=0, variant={**shared, "fixed_alpha": 3.0})]
    records += [record_of(5, algo="fql", seed=0, settings={"offline_steps": steps}) for steps in (100, 200)]
    records += [
        record_of(5, algo="iql", seed=0),
        record_of(5, algo="iql", task=CUBE.format(1), settings={"offline_steps": 7}),
    ]
    records += [record_of(5, algo="bc"), record_of(5, algo="bc", data={**record_of(5)["data"], "sha256": "cd" * 32})]
    runs = find_runs([write_all(tmp_path / "runs", *records)])
    assert {run.column for run in runs} == {
        "deflow", "deflow (fixed_alpha=3)", "fql (offline_steps=100)", "fql (offline_steps=200)", "iql",
        "bc (data=abababab)", "bc (data=cdcdcdcd)",
    }  # fmt: skip


def test_the_same_run_twice_is_refused_and_one_folder_named_twice_is_not(tmp_path):
    folder = write_all(tmp_path / "runs", record_of(5), record_of(6))
    with pytest.raises(InputError, match=r"run0 and .*run1 are both deflow on cube.* with seed 0; leave one out"):
        find_runs([folder])
    assert len(find_runs([folder / "run0", folder / "run0", folder / ".." / "runs" / "run0"])) == 1


def test_folders_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "none", "is missing"), (tmp_path / "empty", "holds no record.json")):
        with pytest.raises(InputError, match=message):
            find_runs([path])
    closed = write_run(tmp_path / "runs" / "closed", record_of(5))
    scandir = os.scandir

    def forbid(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbid)  # root may read everything
    with pytest.raises(InputError, match=r"cannot read .*closed \(Permission denied\)"):
        find_runs([closed.parent])


def test_a_score_is_the_last_evaluation_or_the_mean_of_the_last_few():
    record = record_of(10, before=(2, 6))
    assert score_of(record).value == 0.5
    assert score_of(record, last=3).value == pytest.approx(0.3)
    assert len(score_of(record, last=3).episodes) == 60
    with pytest.raises(InputError, match=r"4 evaluation\(s\) asked for .* there are 3"):
        score_of(record, last=4)
    with pytest.raises(InputError, match="at=start"):
        score_of(record, at="start")


def test_runs_of_the_papers_length_are_judged_by_the_evaluations_it_averages(tmp_path):
    def of_length(steps, wins, *, task=CUBE2, algo="deflow"):
        record = record_of(wins[-1], task=task, algo=algo, before=wins[:-1], settings={"offline_steps": steps[-1]})
        for note, step in zip(record["history"], steps, strict=True):
            note["step"] = step
        return record

    whole = of_length([700_000, 800_000, 900_000, 1_000_000], [0, 10, 12, 17])
    assert score_of(whole).value == pytest.approx(0.65)
    assert score_of(whole).steps == (800_000, 900_000, 1_000_000)
    assert score_of(whole, last=1).value == 0.85
    assert score_of(of_length([400_000, 500_000], [2, 8], task="antmaze-umaze-v2")).steps == (500_000,)
    assert score_of(of_length([5_000, 10_000], [2, 8])).steps == (10_000,)
    with pytest.raises(InputError, match="the run has none at 800000, 900000; with last=1"):
        score_of(of_length([500_000, 1_000_000], [2, 8]))
    short = of_length([5_000, 10_000], [2, 8], algo="fql")
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", whole, short)]))
    said = results_grid(table).caption
    assert f"the mean of those at steps 800,000, 900,000, 1,000,000, of 20 episodes each (DeFlow on {CUBE2})" in said
    assert f"the evaluation at step 10,000, of 20 episodes each (FQL on {CUBE2})" in said


def test_seeds_judged_by_other_evaluations_make_no_cell(tmp_path):
    records = [record_of(5, before=(1,)), record_of(5, seed=1, before=(1, 2))]
    runs = find_runs([write_all(tmp_path / "runs", *records)])
    assert make_tables(runs)[0].rows[0].cells["deflow"].steps == (100,)
    with pytest.raises(InputError, match="are of evaluations at 50, 100 and 66, 100; --last 1"):
        make_tables(runs, last=2)


def test_the_steps_the_paper_averages_are_the_tasks():
    for task in paper_tasks("offline"):
        assert averaged_evaluations(task.name) == task.eval_checkpoints, task.name
    assert averaged_evaluations("own:mine") == ()


def test_variants_have_a_table_of_their_own_by_value(tmp_path):
    records = [record_of(5, algo=algo) for algo in ("deflow", "fql")]
    records += [record_of(5, variant={"fixed_alpha": alpha}) for alpha in (3.0, 0.1, 0.03, 0.3, 1.0)]
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records)]))
    assert results_grid(table).headers[2:] == ("FQL", "DeFlow")
    (grid,) = variant_grids(table)
    alphas = [f"fixed_alpha = {value}" for value in ("0.03", "0.1", "0.3", "1", "3")]
    assert (grid.title, list(grid.headers[2:])) == ("Variants of DeFlow, offline", ["DeFlow", *alphas])
    assert len(grid.rows[0].entries) == len(grid.headers)


def test_no_success_at_all_does_not_make_four_of_150_a_difference(tmp_path):
    """Fisher's exact p of 0 and 4 of 150 is 0.12, though the plain errors of 0 and 1.3 points leave the gap of 2.7 outside."""
    records = [record_of(0, algo="fql"), record_of(4, algo="deflow")]
    for record, wins in zip(records, (0, 4), strict=True):
        record["evaluations"][record["algo"]] = outcome(wins, episodes=150)
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records)]))
    cells = table.rows[0].cells
    assert not inside_noise(4 / 150, cells["fql"].error, cells["deflow"].error)
    assert cells["fql"].near(cells["deflow"])


def test_seeds_that_spread_make_a_gap_noise_that_their_episodes_do_not(tmp_path):
    wins = {"fql": (0, 10, 20), "deflow": (12, 18, 20)}
    records = [
        record_of(number, algo=algo, seed=seed) for algo, each in wins.items() for seed, number in enumerate(each)
    ]
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records)]))
    cells = table.rows[0].cells
    assert not inside_noise(cells["deflow"].mean - cells["fql"].mean, cells["fql"].careful, cells["deflow"].careful)
    assert cells["fql"].near(cells["deflow"])
    assert texts(results_grid(table), "FQL")[CUBE2].text.endswith("≈")


def test_the_ranking_is_held_against_the_papers_pair_by_pair(tmp_path):
    # The paper on this task: DeFlow 99, FQL 97, ReBRAC 92, IQL 85; ours turns FQL and ReBRAC round and puts IQL level with FQL.
    wins = {"deflow": 20, "fql": 10, "rebrac": 12, "iql": 10, "flow_bc": 0}
    records = [record_of(number, algo=algo) for algo, number in wins.items()]
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records, record_of(5, task="own:mine"))]))
    (row,) = ranking_grid(table).rows
    task, ours, papers, tau, near, agreeing = (entry.text for entry in row.entries)
    assert (task, papers) == (CUBE2, "DeFlow > FQL > ReBRAC > IQL")
    assert ours == "DeFlow > ReBRAC > IQL = FQL"
    # Six pairs: four as in the paper, one against, one level: (4 - 1) / sqrt(5 * 6).
    assert tau == f"{3 / 30**0.5:+.2f}"
    assert (near, agreeing) == ("3 of 6", "3 of 3"), "only DeFlow is clear of the others"
    alone = make_tables(find_runs([tmp_path / "runs" / "run0"]))[0]
    assert ranking_grid(alone) is None


def test_a_method_with_a_footing_of_its_own_is_ranked_in_that_alone(tmp_path):
    # The paper on this task: DeFlow 49, FQL 36, IDQL 16.
    records = [record_of(20), record_of(12, algo="fql"), record_of(18, algo="idql")]
    (table,) = make_tables(find_runs([write_all(tmp_path / "common", *records)]))
    grid = ranking_grid(table)
    assert grid.rows[0].entries[1].text == "DeFlow > FQL"
    assert grid.caption.endswith("Left out, as the paper's numbers are of algo.footing=original: IDQL")
    original = record_of(4, algo="idql", variant={"footing": "original"})
    (table,) = make_tables(find_runs([write_all(tmp_path / "both", *records, original)]))
    assert ranking_grid(table).rows[0].entries[1].text == "DeFlow > FQL > IDQL"
    assert "Left out" in ranking_grid(table).caption
    (table,) = make_tables(find_runs([write_all(tmp_path / "original", *records[:2], original)]))
    assert "Left out" not in ranking_grid(table).caption


def test_runs_that_went_online_have_a_table_of_their_own_with_both_ends(tmp_path):
    records = [
        record_of(8 + seed, seed=seed, before=(1, 2), online=(3, 12, 8), settings={"freeze_prior": True})
        for seed in (0, 2)
    ]
    runs = find_runs([write_all(tmp_path / "runs", *records, record_of(5))])
    offline, online = make_tables(runs)
    assert (offline.online, online.online) == (False, True)
    assert texts(results_grid(online), "DeFlow")[CUBE2].text == "10±0 → 45±7 (7.9)"
    assert online_progress([run.record for run in runs if run.online])[2] == (
        "| frozen | 0 | 100 | 0.10 +- 0.07 | 0.60 +- 0.11 (200) | 0.40 +- 0.11 (300) | +0.50 | +0.30 |"
    )


def test_runs_without_an_environment_are_in_no_table(tmp_path):
    runs = find_runs([write_all(tmp_path / "runs", record_of(5, evaluations={}, history=[]))])
    assert make_tables(runs) == []


def test_statistics_over_tasks_and_paired_differences_are_of_the_same_runs(two_tasks):
    (table,) = make_tables(two_tasks)
    rows = {row.entries[0].text: [entry.text for entry in row.entries] for row in aggregate_grid(table).rows}
    # By hand: of 50 60 70 80 90 100 the middle four; fql wins no pair on task 2 and 3.5 of 9 less than half on task 1.
    assert rows["DeFlow"][:3] == ["DeFlow", "2", "75.0"]
    wins = np.mean([np.mean([(a > b) + 0.5 * (a == b) for a in (16, 18, 20) for b in (15, 16, 17)]), 1.0])
    assert rows["FQL"][4] == f"{wins:.2f}"
    pairs = {row.entries[0].text: [entry.text for entry in row.entries] for row in paired_grid(table).rows}
    assert pairs[CUBE.format(2)][1:3] == ["FQL", "+45.0"]
    assert pairs[CUBE.format(2)][4] == "60"


def test_pairs_are_of_the_evaluations_that_make_the_score(tmp_path):
    records = [record_of(20, before=(10,)), record_of(20, before=(0,), algo="fql")]
    runs = find_runs([write_all(tmp_path / "runs", *records)])
    for last, gap in ((1, "+0.0"), (2, "+25.0")):
        (row,) = paired_grid(make_tables(runs, last=last)[0]).rows
        assert [row.entries[2].text, row.entries[4].text] == [gap, "20"]


def test_tasks_with_unequal_numbers_of_seeds_have_no_mean_over_tasks(tmp_path):
    records = [record_of(18, seed=seed) for seed in range(3)] + [record_of(2, task=CUBE.format(1))]
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records)]))
    (row,) = aggregate_grid(table).rows
    assert [entry.text for entry in row.entries[:3]] == ["DeFlow", "2", ""]


def test_others_are_compared_with_the_column_of_the_fewest_settings(tmp_path):
    deltas = [{"target_divergence": value} for value in (0.005, 0.01)]
    fixed = {"fixed_alpha": 0.03, "target_divergence": 0.005}
    records = [record_of(9, variant=variant) for variant in (fixed, *deltas)]
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records)]))
    assert table.reference == "deflow (target_divergence=0.005)"


def test_what_methods_of_one_row_do_not_share_is_said(tmp_path):
    other = {"precision": "medium", "batch_size": 1024}
    records = [record_of(9, settings={"batch_size": 256}), record_of(9, algo="fql", settings={**other})]
    (note,) = unlike_notes(find_runs([write_all(tmp_path / "runs", *records)]))
    assert note == (
        f"Not alike on {CUBE2}: batch_size 1024 of FQL, 256 of DeFlow; precision medium of FQL, highest of DeFlow."
    )
    alone = [record_of(9, algo="fql", settings=settings) for settings in (other, {"precision": "high"})]
    assert unlike_notes(find_runs([write_all(tmp_path / "alone", *alone)])) == []


def test_an_online_runs_last_evaluations_are_of_its_online_phase(tmp_path):
    record = record_of(18, before=(2, 4), online=(16, 18))
    assert score_of(record, last=2).value == pytest.approx(0.85)
    with pytest.raises(InputError, match=r"3 evaluation\(s\) asked for \(at=end\), there are 2"):
        score_of(record, last=3)


def test_unequal_numbers_of_episodes_are_said(tmp_path):
    few = record_of(20, seed=1, evaluations={"deflow": outcome(5, episodes=5)})
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", record_of(20), few)]))
    assert "of 5 to 20 episodes each" in results_grid(table).caption
    assert "over 2 seeds (by S - 1)" in results_grid(table).caption
    one = record_of(20, algo="fql", seed=1)
    (table,) = make_tables(find_runs([write_all(tmp_path / "more", record_of(20), few, one)]))
    assert "over 1 to 2 seeds (by S - 1)" in results_grid(table).caption


def test_other_starts_are_not_paired(tmp_path):
    other = {"deflow": outcome(5, seed=7)}
    runs = find_runs([write_all(tmp_path / "runs", record_of(5, evaluations=other), record_of(9, algo="fql"))])
    assert paired_grid(make_tables(runs)[0]) is None


def test_time_is_milliseconds_a_gradient_step(tmp_path):
    records = [record_of(5, seed=seed, seconds={"updates": 1.0 + seed}) for seed in (0, 1)]
    stacked = record_of(5, algo="fql", stacked=[0, 1])
    rows = time_grid(find_runs([write_all(tmp_path / "runs", *records, stacked)])).rows
    assert [row.entries[0].text for row in rows] == ["FQL", "DeFlow"]
    assert rows[1].entries[3].text == "15.00±7.07"
    assert "2 seeds in one process, time of all" in rows[0].entries[1].text


def test_cost_is_minutes_of_processor_time_a_run_where_records_have_it(tmp_path):
    records = [record_of(5, seed=seed, seconds={"cpu": 60.0 + 120 * seed}) for seed in (0, 1)]
    stacked = record_of(5, algo="fql", stacked=[0, 1], seconds={"cpu": 240.0})
    earlier = record_of(5, algo="iql", seconds={"updates": 1.0})
    rows = cost_grid(find_runs([write_all(tmp_path / "runs", *records, stacked, earlier)])).rows
    assert [[entry.text for entry in row.entries] for row in rows] == [["FQL", "1", "2.0"], ["DeFlow", "2", "2.0±1.4"]]
    assert cost_grid(find_runs([write_all(tmp_path / "earlier", earlier)])) is None
    phases = [record_of(5, seconds={"cpu": 60.0}), record_of(5, before=(5,), online=(5,), seconds={"cpu": 600.0})]
    rows = cost_grid(find_runs([write_all(tmp_path / "phases", *phases)])).rows
    shown = [["DeFlow", "1", "1.0"], ["DeFlow, offline to online", "1", "10.0"]]
    assert [[entry.text for entry in row.entries] for row in rows] == shown


def test_what_nobody_published_is_named_in_a_note(tmp_path):
    records = [record_of(5, untuned=["target_divergence"]), record_of(5, algo="fql", untuned=["alpha", "q_agg"])]
    records += [record_of(5, algo="fql", untuned=["alpha"], seed=1), record_of(5, algo="iql")]
    runs = find_runs([write_all(tmp_path / "runs", *records)])
    said = "Untuned: nobody published a value for these tasks of FQL: alpha, q_agg; DeFlow: target_divergence."
    assert untuned_note(runs) == said
    assert untuned_note([run for run in runs if run.record["algo"] == "iql"]) is None


def test_scores_and_returns_keep_their_own_units(tmp_path):
    door = {"mean_score": 55.0, "score": [float(2 * number) for number in range(20)]}
    records = [
        record_of(5, task="door-human-v1", metric="score", evaluations={"deflow": outcome(5, **door)}),
        record_of(5, task="minari:x/y-v0", metric="return"),
    ]
    (table,) = make_tables(find_runs([write_all(tmp_path / "runs", *records)]))
    shown = texts(results_grid(table), "DeFlow")
    assert shown["door-human-v1 (normalised score)"].text.startswith("55 (2.6)")
    assert shown["minari:x/y-v0 (return)"].text.startswith("-8 (1.0)")
    assert [row.family for row in table.rows] == ["d4rl-adroit", "other"]


def test_families_and_names_of_default_tasks():
    assert task_order("cube-single-play-singletask-v0")[0] == task_order(CUBE2)[0]
    assert family_of("scene-play-singletask-v0") == "scene-play"
    assert family_of("cube-triple-noisy-singletask-task3-v0") == "cube-triple-noisy"
    assert family_of("minari:mujoco/hopper/medium-v0") == "other"


def test_the_papers_tables_are_marked_as_copied_and_only_of_the_tasks_asked_for():
    grids = paper_grids([CUBE2, "own:mine"], ["antmaze-umaze-v2", "own:mine"], ablation=True)
    assert [grid.title for grid in grids] == [
        f"Copied from the paper: {what}" for what in ("offline", "offline to online", "fixed alpha")
    ]
    assert all(grid.copied for grid in grids)
    deflow = texts(grids[0], "DeFlow")
    assert [entry.text for entry in deflow.values()] == ["99±1", "96±2"]
    assert texts(grids[1], "IQL")["antmaze-umaze-v2"].text == "77 → 96"
    assert paper_grids(["own:mine"], [], ablation=False) == []


def test_the_papers_table_of_flow_critics_is_shown_beside_runs_of_them_in_its_order():
    (grid,) = paper_grids([], [], ablation=False, flow_critics=True)
    assert grid.title == "Copied from the paper: flow critics"
    assert grid.copied
    assert "unequal budgets" in grid.caption
    assert list(grid.headers) == ["family", "task", "FQL", "floq", "DeFlow", "DeFlow + floq"]
    assert sorted(["deflow_floq", "floq", "deflow", "fql"], key=column_order) == [
        "fql",
        "floq",
        "deflow",
        "deflow_floq",
    ]


def test_columns_have_one_order_which_is_that_of_each_of_the_papers_tables():
    tables = {
        "offline_families": "BC IQL ReBRAC IDQL SRPO CAC FAWAC FBRAC IFQL FQL DeFlow",
        "offline_to_online": "IQL ReBRAC Cal-QL RLPD IFQL FQL DeFlow",
        "flow_critics": "FQL floq DeFlow DeFlow+floq",
        "qam_authors": "ReBRAC FAWAC FBRAC IFQL FQL FEdit QAM QAM-E QAM-F DSRL",
    }
    for table, titles in tables.items():
        expected = [title.replace("+", " + ") for title in titles.split()]
        assert table_methods(table) == expected
        assert [title for title in method_order() if title in expected] == expected
    assert method_order()[0] == "flow BC"
    assert method_order()[-7:] == ("FEdit", "QAM", "QAM-E", "QAM-F", "TRQAM", "DSRL", "FAN")
    assert {ALGORITHMS[name].title for name in ALGORITHMS} <= set(method_order())
    columns = sorted(
        ["nobodys", "fan", "qam (edit_scale=0.1)", "qam", "deflow", "calql", "flow_bc", "iql"], key=column_order
    )
    assert columns == ["flow_bc", "iql", "calql", "deflow", "qam", "qam (edit_scale=0.1)", "fan", "nobodys"]


def test_copied_columns_stand_in_this_order_whatever_the_first_row_lacks():
    (grid,) = paper_grids(["visual-cube-single-play-singletask-task1-v0", CUBE2], [], ablation=False)
    assert grid.headers[2:] == tuple(table_methods("offline_families"))


def test_results_of_qams_authors_are_a_table_of_their_own_that_says_its_protocol():
    scene, triple = "scene-play-singletask-task1-v0", "cube-triple-play-singletask-task2-v0"
    *_, grid = paper_grids([scene, scene.replace("task1", "task2")], [triple], ablation=False)
    assert grid.title == "Copied from QAM's authors, under a protocol of their own"
    for part in ("Not comparable", "12 seeds", "chunks of 5", "sparse rewards", "scene and puzzle", "10 critics"):
        assert part in grid.caption
    assert grid.copied
    assert [[entry.text for entry in row.entries[:2]] for row in grid.rows] == [
        ["scene-play", "five tasks"],
        ["cube-triple-play", "five tasks"],
    ]
    assert texts(grid, "QAM-E")["five tasks"].text == "4.5±2 → 79.2±0.6"


def test_the_results_of_qams_authors_are_theirs():
    ours, rows = paper_tables()["qam_authors"], rows_of("extra_qam_results.csv")
    assert sum(map(len, ours.values())) == len(rows)
    for row in rows:
        expected = [float(row[f"{phase}_{what}"]) for phase in ("off", "on") for what in ("mean", "std")]
        assert ours[row["task"]][row["method"]] == expected


def test_the_flow_critics_are_table_threes():
    expected = {}
    for row in rows_of("table3_floq.csv"):
        names = {"FQL": "FQL", "floq": "floq", "DeFlow": "DeFlow", "DeFlow_floq": "DeFlow + floq"}
        expected[row["task"].removesuffix(" (5 tasks)")] = {
            title: [number(row[f"{name}_mean"]), number(row[f"{name}_std"])] for name, title in names.items()
        }
    assert paper_tables()["flow_critics"] == expected


def rows_of(name):
    data = os.environ.get("DEFLOW_TEST_DATA")
    path = Path(data or "nowhere").parent / "spec" / "tables" / name
    if not path.is_file():
        pytest.skip("DEFLOW_TEST_DATA does not lie beside the paper's tables")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(text):
    return float(text) if text else None


@pytest.mark.parametrize(
    ("table", "key", "file"),
    [("offline", "task", "table7_offline.csv"), ("offline_families", "family", "table1_aggregate.csv")],
)
def test_the_offline_figures_are_the_papers(table, key, file):
    rows, ours = rows_of(file), paper_tables()[table]
    assert list(ours) == [row[key] for row in rows]
    for row in rows:
        methods = [name.removesuffix("_mean") for name in row if name.endswith("_mean")]
        expected = {name: [number(row[f"{name}_mean"]), number(row[f"{name}_std"])] for name in methods}
        assert ours[row[key]] == {name: cell for name, cell in expected.items() if cell[0] is not None}
    if table == "offline":
        assert [family_of(row["task"]) for row in rows] == [row["family"] for row in rows]
        assert sorted(ours, key=task_order) == list(ours)
        default = [row["task"] for row in rows if row["is_default_task"] == "1"]
        assert [find_paper_task(re.sub(r"-task\d", "", task)).name for task in default] == default


def test_the_offline_to_online_figures_are_the_papers_and_what_it_does_not_show_is_empty():
    rows, ours = rows_of("table2_o2o.csv"), paper_tables()["offline_to_online"]
    assert list(ours) == [row["task"] for row in rows]
    parts = [f"{phase}_{what}" for phase in ("offline", "online") for what in ("mean", "std")]
    for row in rows:
        methods = [name.removesuffix("_offline_mean") for name in row if name.endswith("_offline_mean")]
        expected = {name: [number(row[f"{name}_{part}"]) for part in parts] for name in methods}
        if "unreadable" in row["note"]:
            del expected["DeFlow"]  # the table has it from another paper
        assert ours[row["task"]] == expected


def test_times_and_the_ablation_are_the_papers():
    expected = [
        [row["method"], row["phase"], number(row["ms_per_step"]), number(row["std"])]
        for row in rows_of("table4_runtime.csv")
    ]
    assert paper_tables()["runtime_ms"] == expected
    cells = {}
    for row in rows_of("table5_alpha_ablation.csv"):
        cell = [number(row[f"{phase}_{what}"]) for phase in ("offline", "online") for what in ("mean", "std")]
        if cell[0] is not None:
            cells.setdefault(row["task"], {})[row["alpha_label"]] = cell
    assert paper_tables()["alpha_ablation"] == cells
