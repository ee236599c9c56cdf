import ast
import importlib
import pkgutil
import re
import subprocess
import sys

import pytest

import deflow_torchrl
from tests.support import house

OPTIONAL = (
    "typer",
    "rich",
    "hydra",
    "omegaconf",
    "ogbench",
    "mujoco",
    "gymnasium",
    "minari",
    "gymnasium_robotics",
    "h5py",
    "wandb",
    "matplotlib",
    "jinja2",
    "jsonschema",
    "ray",
    "yaml",
    "requests",
    "onnx",
    "onnxruntime",
    "onnxscript",
)


def test_public_names_resolve():
    for name in deflow_torchrl.__all__:
        assert getattr(deflow_torchrl, name) is not None
    with pytest.raises(AttributeError):
        deflow_torchrl.nonsense  # noqa: B018


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert deflow_torchrl.__version__ == version("deflow-torchrl")


def test_losses_and_modules_need_torch_torchrl_and_tensordict_only():
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in OPTIONAL)
    code = (
        f"import sys\n{block}import deflow_torchrl\nfrom deflow_torchrl import *\n"
        "import deflow_torchrl.data\nprint(DeFlowLoss.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "DeFlowLoss"


def test_importing_the_package_does_not_import_torch():
    code = "import sys, deflow_torchrl; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


@pytest.mark.parametrize(
    "order",
    ["import deflow_torchrl\n{}\ndeflow_torchrl.register()", "{}\nimport deflow_torchrl"],
    ids=["before", "after"],
)
def test_torchrls_load_dataset_knows_the_sets_once_registered_or_imported_after_it(order):
    torchrl = "from torchrl.data.datasets import load_dataset"
    code = (
        order.format(torchrl)
        + "\ntry:\n    load_dataset('ogbench:nonsense')\nexcept ValueError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "'nonsense' is no OGBench single-task name" in result.stdout, result.stderr


def test_command_line_without_its_extra_says_which_one():
    code = "import sys; sys.modules['typer'] = None\nimport deflow_torchrl.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "deflow: typer is not installed; install it with: pip install 'deflow-torchrl[cli]'\n"


# Arrows run one way: a room may import from the rooms named here and from those they may import from.
ARROWS = {
    "cli": {"sweep", "export", "play", "doctor"},
    "doctor": set(),
    "sweep": {"runs"},
    "export": {"runs", "deploy"},
    "play": {"deploy", "reports"},
    "deploy": set(),
    "configs": {"objectives"},
    "runs": {"trainers", "tasks", "reports"},
    "reports": {"tasks", "algorithms"},
    "trainers": {"algorithms", "data", "envs"},
    "algorithms": {"objectives"},
    "objectives": {"modules"},
    "modules": set(),
    "tasks": {"sources"},
    "sources": {"data", "envs"},
    "data": set(),
    "envs": set(),
}
SHARED = {"entries", "errors", "generators", "open_loop", "paths", "plugins", "processes", "progress", "versions"}
# Names that another room has now and these still export.
REEXPORTS = {"deflow_torchrl.data.reexports", "deflow_torchrl.envs.reexports"}


def allowed(room):
    return ARROWS[room].union(*map(allowed, ARROWS[room]))


def test_every_file_is_in_a_known_room():
    assert {house.room(module) for module in house.FILES} == ARROWS.keys() | SHARED | {""}


@pytest.mark.parametrize("room", list(ARROWS))
def test_arrows_between_rooms_run_one_way(room):
    for module in house.FILES:
        if house.room(module) == room and module not in REEXPORTS:
            for name, line in house.imports(module).items():
                assert house.room(name) in allowed(room) | SHARED | {room, ""}, f"{module}:{line} imports {name}"


def test_imports_are_absolute():
    for module in house.FILES:
        for node in ast.walk(house.tree(module)):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}:{node.lineno}"


def test_what_all_rooms_share_imports_no_room():
    for module in house.FILES:
        if house.room(module) in SHARED:
            assert {house.room(name) for name in house.imports(module)} <= SHARED | {""}, module


def test_no_modules_import_each_other_not_even_inside_functions():
    assert house.circles() == []


@pytest.mark.parametrize("room", ["modules", "objectives", "data"])
def test_rooms_that_others_import_need_torch_tensordict_torchrl_and_numpy_only(room):
    for module in house.FILES:
        if house.room(module) == room:
            foreign = house.foreign_imports(module) - sys.stdlib_module_names
            assert foreign <= {"torch", "tensordict", "torchrl", "numpy", "lazy_loader"}, module


@pytest.mark.parametrize("kind", ["algorithms", "sources"])
def test_names_of_methods_and_sources_are_compared_in_their_own_room_only(kind):
    from deflow_torchrl.algorithms import ALGORITHMS

    names = {
        "algorithms": set(ALGORITHMS),
        "sources": {"ogbench", "minari", "own", "ogbench:", "minari:", "own:", "file:"},
    }
    for module in house.FILES:
        if house.room(module) == kind:
            continue
        for line, text in house.compared_strings(module):
            assert text not in names[kind], f"{module}:{line} compares with {text!r}"
        for line, keys in house.tables(module):
            assert len(keys & names[kind]) < 2, f"{module}:{line} is a table of names"


def test_the_map_of_the_architecture_page_names_every_file():
    page = (house.ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", page.partition("## The map")[2].partition("```\n\n")[0]))
    methods = house.ROOT / "algorithms"
    for path in house.FILES.values():
        known = path.stem in words or path.parent.name == "union" or path.stem in ("reexports", "__init__", "__main__")
        assert known or path.parent == methods, f"{path} is not on the map"
    for folder in ("docs", "examples", "benchmarks"):
        for path in (house.ROOT.parent / folder).glob("[a-z]*.*"):
            assert path.stem in words, f"{path} is not on the map"


def test_helpers_of_tests_live_in_support():
    for path in (house.ROOT.parent / "tests").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            own = f"{path.parent.name}.{path.stem}"  # a script that a test writes may import that test's module
            assert not re.match(r"\s*(from|import) tests\.(\w+\.)?(test_|conftest)", line) or own in line, (
                f"{path}: {line}"
            )


def test_every_module_imports():
    for module in pkgutil.walk_packages([str(house.ROOT)], "deflow_torchrl."):
        importlib.import_module(module.name)
