"""``deflow report``: pages, Markdown, and numbers in Markdown held to their records."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the extra reports")
pytest.importorskip("jsonschema", reason="needs the extra reports")
pytest.importorskip("typer", reason="needs the extra cli")

from deflow_torchrl import cli
from deflow_torchrl.errors import InputError
from deflow_torchrl.reports.check import check_file, default_files
from tests.support.synthetic import CUBE, CUBE2, metrics_rows, record_of, write_run

ROOT = Path(__file__).parents[2]
END = "<!-- /deflow-report -->"


@pytest.fixture
def results(tmp_path):
    """Results of 20 episodes: deflow wins 16, 18, fql 15 (seed 0)."""
    for algo, seed, wins in (("deflow", 0, 16), ("deflow", 1, 18), ("fql", 0, 15)):
        write_run(
            tmp_path / "results" / algo / f"seed{seed}",
            record_of(wins, algo=algo, seed=seed, before=(4,)),
            metrics_rows(),
        )
    return tmp_path / "results"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["report", *map(str, arguments)])
    output = capsys.readouterr()
    return exit_.value.code or 0, output.out, output.err


def document(results, text):
    path = results.parent / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def value(settings, text):
    return f"<!-- deflow-report: value results {settings} -->{text}{END}"


def test_written_blocks_pass_the_check_and_a_changed_number_fails_it(results, capsys):
    path = document(results, f"# Title\n\n<!-- deflow-report: table results -->\nold\n{END}\n\nend\n")
    code, out, _ = run(capsys, "--check", path)
    assert code == 1
    assert f"{path}:4: found 'old', expected " in out
    code, out, _ = run(capsys, "--write", path)
    assert (code, out.splitlines()[-1].startswith("1 blocks and 0 values in 1 files checked")) == (0, True)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- deflow-report: table results -->\n**Offline**: ")
    assert text.endswith(f"\n{END}\n\nend\n")
    assert "**85±7 (5.6)**" in text
    assert run(capsys, "--check", path)[0] == 0
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "85±7" in line)
    path.write_text(text.replace("85±7", "86±7"), encoding="utf-8")
    code, out, _ = run(capsys, "--check", path)
    assert code == 1
    first, last = out.splitlines()
    assert first.startswith(f"{path}:{line}: found ")
    assert first.index("86±7") < first.index("expected") < first.index("85±7")
    assert last == "1 blocks and 0 values in 1 files checked; 1 lines differ"


def test_a_block_of_results_is_the_results_of_a_table_alone(results, capsys):
    path = document(
        results, f"<!-- deflow-report: results results -->\n{END}\n<!-- deflow-report: table results -->\n{END}\n"
    )
    run(capsys, "--write", path)
    _, alone, whole = path.read_text(encoding="utf-8").split("<!-- deflow-report: ")
    lines = [line for line in alone.splitlines()[1:] if line.startswith("|")]
    assert len(lines) == 3
    assert alone.startswith("results results -->\n**Offline**: ")
    assert set(lines) < set(whole.splitlines())
    assert alone.count("**:") == 1
    assert whole.count("**:") > 1


def test_a_changed_record_fails_the_check(results, capsys):
    path = document(results, f"success {value('algo=deflow', '0.85')}\n")
    assert run(capsys, "--check", path)[0] == 0
    record = results / "deflow" / "seed0" / "record.json"
    record.write_text(json.dumps(record_of(10, before=(4,))))
    code, out, _ = run(capsys, "--check", path)
    assert (code, out.splitlines()[0]) == (1, f"{path}:1: found '0.85', expected '0.70'")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ("algo=deflow", "0.85"),
        ("algo=deflow", "0.8500"),
        ("algo=deflow percent=true", "85"),
        ("algo=deflow stat=std", "0.071"),
        ("algo=deflow stat=stderr percent=true", "5.6"),
        ("algo=deflow stat=seeds", "2"),
        ("algo=deflow stat=episodes", "40"),
        ("algo=deflow seed=1", "0.90"),
        ("algo=deflow at=offline last=2 seed=0", "0.50"),
        (f"task={CUBE2} algo=fql offline_steps=100 algo.lr=0.0003", "+0.75"),
    ],
)
def test_a_value_is_compared_to_as_many_decimals_as_it_has(results, settings, text):
    checked = check_file(document(results, f"a {value(settings, text)} b {value(settings, text)}.\n"))
    assert (checked.values, checked.differences) == (2, ())
    # One in the last digit is a difference, and is written back.
    last = str((int(text[-1]) + 1) % 10)
    wrong = check_file(document(results, f"a {value(settings, text[:-1] + last)} b\n"))
    assert len(wrong.differences) == 1
    assert wrong.text == f"a {value(settings, text)} b\n"


def test_the_kinds_of_blocks(results):
    write_run(results / "online", record_of(12, seed=4, before=(3,), online=(5, 12)))
    for kind, expected in (
        ("table", "| family | task | FQL | DeFlow |"),
        ("paper", "**Copied from the paper: offline**: "),
        ("online", "| full | 4 | 100 | 0.15 +- 0.08 | 0.60 +- 0.11 (200) | 0.60 +- 0.11 (200) | +0.45 | +0.45 |"),
    ):
        checked = check_file(document(results, f"<!-- deflow-report: {kind} results -->\n{END}\n"))
        assert checked.blocks == 1
        assert any((difference.expected or "").startswith(expected) for difference in checked.differences)
        assert check_file(document(results, checked.text)).differences == ()


def test_examples_in_code_are_no_markers_and_line_ends_are_kept(results):
    path = results.parent / "page.md"
    text = f"```\n<!-- deflow-report: nonsense -->\n```\r\n<!-- deflow-report: online results -->\r\nx\r\n{END}\r\n"
    write_run(results / "online", record_of(12, before=(3,), online=(5, 12)))
    path.write_bytes(text.encode())
    checked = check_file(path)
    assert checked.blocks == 1
    # The lines of the block end as its marker does; what is outside is as it was.
    assert checked.text.startswith("```\n<!-- deflow-report: nonsense -->\n```\r\n<!--")
    assert all(line.endswith("\r") for line in checked.text.split("\n")[2:-1])
    path.write_bytes(checked.text.encode())
    assert check_file(path).differences == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"<!-- deflow-report: tabel results -->\n{END}", "'tabel' is no kind of marker"),
        (f"<!-- deflow-report: table -->\n{END}", "table names no folder"),
        (f"<!-- deflow-report: table results -->0.5{END}", "a table needs lines of its own"),
        ("<!-- deflow-report: table results -->\n", "the block is not closed"),
        ("<!-- deflow-report: value results -->0.5\n", "in one line"),
        (f"<!-- deflow-report: table results frob=1 -->\n{END}", "a table has no frob"),
        (value("algo=deflow stat=median", "1"), "stat=median is none of"),
        (value("algo=deflow last=x", "1"), "last=x"),
        (value("algo=deflow at=noon", "1"), "at=noon"),
        (value("algo=bc", "1"), "no run has these settings"),
        (value("stat=mean", "1"), "deflow offline; cube"),
        (value("algo=fql stat=std", "1"), "one seed has no standard deviation"),
        (f"<!-- deflow-report: table nowhere -->\n{END}", "nowhere is missing"),
    ],
)
def test_a_marker_that_cannot_be_understood_is_one_line_and_exit_code_2(results, capsys, text, message):
    path = document(results, f"first\n{text}\n")
    code, _, err = run(capsys, "--check", path)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    if "nowhere" not in text and "noon" not in text:
        assert f"{path}:2: " in err


def test_a_table_beside_records_without_markers_fails_the_check(results, capsys):
    path = document(results, "| a | b |\n|---|---|\n| 1 | 2 |\n")
    code, out, _ = run(capsys, "--check", path)
    assert (code, out.splitlines()[0].startswith(f"{path}:2: found 'a table beside records'")) == (1, True)
    (path.parent / "pyproject.toml").touch()
    code, out, _ = run(capsys, "--check", path)
    assert (code, out.splitlines()[0]) == (0, f"{path}: no marker, nothing was checked")


def test_this_checkouts_numbers_are_those_of_its_records(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names = [str(path) for path in default_files(Path())]
    pages = [
        f"benchmarks/results/{name}/README.md"
        for name in ("choice", "claims", "lite", "offline_to_online", "precision", "small")
    ]
    assert names[:7] == ["README.md", *pages]
    code, out, _ = run(capsys, "--check", "--json")
    assert code == 0, out
    assert json.loads(out.splitlines()[-1])["blocks"] >= 1


def test_a_folder_without_files_to_check_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "--check")
    assert (code, "has no README.md" in err) == (2, True)


def test_page_and_markdown_say_the_same_and_lead_with_the_label(results, tmp_path, capsys):
    page, md = tmp_path / "out.html", tmp_path / "out.md"
    generated = record_of(15, algo="iql")
    generated["data"]["provenance"] = "regenerated <here>"
    write_run(results / "iql", generated)
    code, out, _ = run(capsys, results, "--html", page, "--md", md, "--label", "small protocol", "--json")
    assert code == 0
    told = json.loads(out.splitlines()[-1])
    assert told["notes"][0] == "small protocol"
    cell = told["tables"][0]["rows"][0]["cells"]["deflow"]
    assert (cell["mean"], cell["seeds"]) == (0.85, {"0": 0.8, "1": 0.9})
    text, html = md.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    assert text.index("**small protocol**") < text.index("Data: regenerated <here>") < text.index("## Offline")
    assert html.index("small protocol</p>") < html.index("Data: regenerated &lt;here&gt;") < html.index("<table")
    for shown in ("85±7 (5.6)", "Copied from the paper: offline", "99±1"):
        assert shown in text
        assert shown in html
    assert not re.search(r"(src|href)=\"(?!data:)", html), "nothing is loaded from anywhere"
    assert html.count('alt="Outcomes of each method') == 1
    assert html.count('<img alt="multiplier alpha') == 1
    card = html[html.index("<summary>DeFlow, seed 0: 80% at the end") :]
    for fact in (
        record_of(1)["config_sha256"],
        generated["versions"]["torch"],
        "ab" * 32,
        "before the step",
        "deflow train task=",
    ):
        assert fact in card


def test_without_files_the_tables_are_printed(results, capsys):
    code, out, _ = run(capsys, results, "--last", "2")
    assert code == 0
    assert "A seed's score is the mean of those at steps 50, 100, of 20 episodes each" in out
    assert "52±4" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a folder"),
        (["{none}"], "is missing"),
        (["{results}", "--html", "{none}/out.html"], "does not exist"),
        (["{results}", "--md", "{results}"], "is a folder"),
        (["{results}", "--last", "3"], "3 evaluation(s) asked for"),
        (["{results}", "--check", "--html", "x.html"], "--check and --write take Markdown files"),
        (["--check", "{none}"], "cannot read"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(results, tmp_path, capsys, arguments, message):
    places = {"none": str(tmp_path / "none"), "results": str(results)}
    code, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_record_of_another_schema_stops_the_report(results, capsys):
    write_run(results / "old", {**record_of(3, task=CUBE.format(5)), "schema": 3})
    code, _, err = run(capsys, results)
    assert (code, err.count("\n")) == (2, 1)
    assert "old/record.json is a record of schema 3" in err


def test_damaged_rows_of_metrics_are_named(results, tmp_path):
    from deflow_torchrl.reports.page import summarize_runs, write_summary_page

    (results / "fql" / "seed0" / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(InputError, match=r"metrics.jsonl is damaged"):
        write_summary_page(summarize_runs([results]), tmp_path / "x.html", title="x")


def test_without_the_extra_the_command_says_which(results):
    code = (
        "import sys; sys.modules['jsonschema'] = None\nfrom deflow_torchrl import cli\n"
        f"cli.main(['report', {str(results)!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (
        2, "deflow: jsonschema is not installed; install it with: pip install 'deflow-torchrl[reports]'\n",
    )  # fmt: skip
