"""The page of many runs in a real browser."""

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("matplotlib", reason="needs the extra reports")
pytest.importorskip("jsonschema", reason="needs the extra reports")
pytest.importorskip("playwright", reason="needs playwright")

from playwright.sync_api import sync_playwright

from deflow_torchrl.reports import plot_learning_curve, write_html_report
from deflow_torchrl.reports.page import summarize_runs, write_summary_page
from tests.support.killable import ROOT
from tests.support.synthetic import CUBE, metrics_rows, outcome, record_of, write_run

PHONE = {"width": 390, "height": 844}


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("DEFLOW_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no chromium on the path and none named by DEFLOW_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for task in (1, 2):
        for algo, wins in (("fql", 0), ("iql", 10), ("rebrac", 20), ("deflow", 18)):
            for seed in (0, 1):
                record = record_of(
                    min(wins + task - seed, 20), task=CUBE.format(task), algo=algo, seed=seed, before=(1,)
                )
                write_run(folder / "runs" / f"{task}-{algo}-{seed}", record, metrics_rows())
    summary = summarize_runs([folder / "runs"], label="a label with <angle> brackets")
    return write_summary_page(summary, folder / "out.html", title="Results").as_uri()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Address of the docs site, as it is served."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = sorted(path.relative_to(folder).parent.as_posix() for path in folder.rglob("index.html"))
        yield [f"http://127.0.0.1:{server.server_port}/{page}/" for page in pages]
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as api:
        # Neither a sandbox (root in a container) nor shared memory is needed for one local page.
        started = api.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport=PHONE)
    opened = context.new_page()
    opened.problems, opened.requests = [], []
    opened.on("console", lambda message: opened.problems.append(message.text))
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("request", lambda request: opened.requests.append(request.url))
    opened.goto(url)
    yield opened
    context.close()


def column(page, number):
    return page.locator("table.sortable").first.locator(f"tbody tr td:nth-child({number})").all_inner_texts()


def test_the_page_asks_for_nothing_and_reports_no_error(page, url):
    page.locator("details").first.click()
    assert page.problems == []
    assert [asked for asked in page.requests if not asked.startswith("data:")] == [url]
    assert page.locator("p.note").first.inner_text() == "a label with <angle> brackets"


def test_nothing_overflows_a_phone_and_wide_tables_scroll_by_themselves(page):
    page.evaluate("document.querySelectorAll('details').forEach((card) => { card.open = true; })")
    widths = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert widths[0] <= widths[1] == 390
    beyond = page.evaluate(
        "[...document.querySelectorAll('body *')].filter((it) => !it.closest('.scroll table')"
        " && it.getBoundingClientRect().right > 390.5).map((it) => it.outerHTML.slice(0, 80))"
    )
    assert beyond == []
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some((it) => it.scrollWidth > it.clientWidth)")


def test_tables_sort_by_number_and_back_with_averages_below(page):
    header = page.locator("table.sortable").first.locator("th", has_text="FQL")
    number = page.locator("table.sortable").first.locator("th").all_inner_texts().index(header.inner_text()) + 1
    before = column(page, number)
    rows = page.locator("table.sortable").first.locator("tbody tr")
    assert len(before) == 3
    header.locator("button").focus()
    orders = {}
    for order in ("ascending", "descending", "none"):
        page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == order
        orders[order] = column(page, number)
        assert rows.last.get_attribute("class") == "average"
    assert orders["none"] == before
    numbers = {order: [float(re.match(r"\d+", text)[0]) for text in texts[:2]] for order, texts in orders.items()}
    assert numbers["ascending"] == sorted(numbers["ascending"]) != numbers["descending"]
    assert numbers["descending"] == numbers["ascending"][::-1]
    assert page.problems == []


def test_numbers_are_sorted_as_numbers_not_as_text(page):
    table = page.locator("table.sortable", has=page.locator("th", has_text="DeFlow minus method")).first
    table.locator("th", has_text="DeFlow minus method").locator("button").click()
    values = [float(text) for text in table.locator("tbody tr td:nth-child(3)").all_inner_texts()]
    assert values == sorted(values)
    assert values[0] < values[1] < 0, "as text -2 would come before -7"


def test_on_paper_tables_are_whole_and_every_card_is_open(page):
    page.emulate_media(media="print")
    style = page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX")
    assert style == "visible"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.locator("details[open]").count() == 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details[open]").count() == page.locator("details").count() == 16
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_dark_page_is_light_on_dark(page):
    page.emulate_media(color_scheme="dark")
    ink, paper = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    )
    assert ink > 3 * 200 > 3 * 60 > paper


def test_on_a_phone_a_runs_numbers_and_curves_stand_one_under_another(browser, tmp_path):
    evaluations = {name: outcome(wins, mean_score=50.0) for name, wins in (("prior", 2), ("deflow", 18))}
    rows = [row | {"train/divergence": 1e-3} for row in metrics_rows()]
    figure = plot_learning_curve(
        rows, tmp_path / "curve.png", title="a run", final={"deflow": 0.9}, target_divergence=1e-3
    )
    record = record_of(18, evaluations=evaluations)
    path = write_html_report(
        tmp_path / "report.html", title="a run", record=record, rows=rows, figure=figure, target_divergence=1e-3
    )
    for width, stacked in ((390, True), (1280, False)):
        context = browser.new_context(viewport={"width": width, "height": 844})
        page = context.new_page()
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        cells = page.locator(".outcome tbody tr").last.locator("td")
        boxes = [cell.bounding_box() for cell in cells.all()]
        assert len(boxes) == 7
        assert max(box["x"] + box["width"] for box in boxes) <= width
        assert (len({round(box["x"]) for box in boxes}) == 1) == stacked
        assert [cell.is_visible() for cell in cells.all()] == [True] * 7
        curves = page.get_by_alt_text("Learning curves").bounding_box()
        assert (curves["height"] > 4 * curves["width"]) == stacked, "five panels, one under another"
        context.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_of_the_site_fits_and_has_its_pictures(browser, site, width):
    context = browser.new_context(viewport={"width": width, "height": 844})
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda answer: problems.append(answer.url) if answer.status >= 400 else None)
    for address in site:
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, address
        assert page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).length") == 0, address
    assert len(site) > 40
    assert problems == []
    context.close()
