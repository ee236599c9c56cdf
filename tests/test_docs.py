"""The pages of docs/: what they name exists, and what exists is named."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from deflow_torchrl.algorithms import ALGORITHMS, get_algorithm
from deflow_torchrl.trainers import UpdateStep
from tests.support.networks import NEEDED, make_batch
from tests.support.updates import PROBLEM

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
VARIANTS = {"calql": [{}, {"target_gap": None, "alpha": 5.0}]}
# method -> the page that has it beside another
TOGETHER = {"deflow_floq": "floq", "flow_bc": "bc", "trqam": "qam", "qam_e": "qam", "qam_f": "qam"}
PAGES = {
    page: [name for name in ALGORITHMS if TOGETHER.get(name, name) == page] for page in {*ALGORITHMS} - {*TOGETHER}
}


def metrics_of(name, settings):
    """The names of the numbers of an update, as the trainer writes them."""
    algorithm = get_algorithm(name)
    learner = algorithm.build(algorithm.config(**{**NEEDED.get(name, {}), **settings}), PROBLEM)
    batch = make_batch(8, noise=False)
    batch["next", "action"] = torch.zeros_like(batch["action"])
    batch["mc_return"] = torch.zeros_like(batch["next", "reward"])
    out = UpdateStep(learner)(batch)
    if learner.diagnostics is not None:
        learner.diagnostics.use_data(batch)
        out.update(learner.diagnostics(batch))
    return {f"train/{metric}" for metric in out.keys()}  # noqa: SIM118


def section(text, heading):
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading!r}"
    return found[1]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_methods_page_explains_exactly_the_metrics_that_its_updates_write(page):
    written = set().union(
        *(metrics_of(name, settings) for name in PAGES[page] for settings in VARIANTS.get(name, [{}]))
    )
    table = section((METHODS / f"{page}.md").read_text(), "Logged metrics")
    rows = re.findall(r"^\| `(train/\w+)` \|(?:.*\|)? (.+) \|$", table, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(written)
    assert all(len(meaning) > 4 for _, meaning in rows)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_methods_page_has_command_equations_differences_and_what_was_not_checked(page):
    text = (METHODS / f"{page}.md").read_text()
    for name in PAGES[page]:
        assert re.search(rf"^deflow train task=\S+ algo={name}\b", text, re.MULTILINE), f"no command for {name}"
    assert "$" in section(text, "Equations")
    numbers = [
        int(number) for number in re.findall(r"^(\d+)\. ", section(text, "Differences from the original"), re.MULTILINE)
    ]
    assert numbers == list(range(1, len(numbers) + 1)) != []
    named = re.findall(r"`(tests/\S+\.py)`", section(text, "Reproduced and not checked"))
    assert all((ROOT / path).is_file() for path in named)
    assert f"({page}.md)" in (METHODS / "index.md").read_text()


def test_the_reference_has_every_public_name():
    named = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for path, members in re.findall(
            r"^::: (\S+)\n    options:\n      members:((?:\n        - \w+)+)", page.read_text(), re.MULTILINE
        ):
            module = importlib.import_module(path)
            for name in re.findall(r"- (\w+)", members):
                assert hasattr(module, name), f"{page.name}: {path}.{name}"
                named.add(name)
    rooms = ["", *(f".{room}" for room in ("modules", "objectives", "data", "algorithms", "trainers", "sources"))]
    public = {name for room in rooms for name in importlib.import_module(f"deflow_torchrl{room}").__all__}
    assert public - named - {"register", "__version__"} == set()
