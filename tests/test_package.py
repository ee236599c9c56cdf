import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import deflow_torchrl

ROOT = Path(deflow_torchrl.__file__).parent
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


# Which rooms a room may import from (design: arrows run one way).
ALLOWED = {
    "modules": set(),
    "objectives": {"modules"},
    "envs": set(),
    "data": {"envs"},
    "tasks": {"data", "envs"},
    "algorithms": {"objectives", "modules"},
    "trainers": {"algorithms", "objectives", "modules", "data", "envs"},
    "reports": {"tasks"},
}
SHARED = {"errors", "generators", "locks", "paths", "processes", "progress", "versions", "__version__"}


@pytest.mark.parametrize("room", list(ALLOWED))
def test_arrows_between_rooms_run_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "deflow_torchrl":
                    names = [f"deflow_torchrl.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
            for name in names:
                parts = name.split(".")
                if parts[0] == "deflow_torchrl" and len(parts) > 1:
                    assert parts[1] in ALLOWED[room] | SHARED | {room}, f"{path}: {name}"


def test_every_module_imports():
    for module in pkgutil.walk_packages([str(ROOT)], "deflow_torchrl."):
        importlib.import_module(module.name)
