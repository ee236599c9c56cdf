"""Fill a folder with the wheels deflow-torchrl needs at run time, torch and what only torch needs left out.

    make wheelhouse PYTHON=3.12                      # for that Python on Linux x86-64, into wheelhouse/
    make wheelhouse PYTHON=3.12 EXTRAS=cli,ogbench   # fewer extras
    make wheelhouse PYTHON=3.12 ALSO="pytest"        # and further packages with what they need

For machines without a package registry that have a torch (2.9 or newer) of their own. Versions are those of constraints.txt.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "deflow-torchrl"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def closure(extras: set[str], python: str, also: Sequence[str] = ()) -> Iterator[str]:
    """Names of all that ``deflow-torchrl[extras]`` and ``also`` need on that Python, torch's own requirements not followed."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    seen, waiting = set(), [(PROJECT, extra) for extra in ("", *sorted(extras))]
    waiting += [(canonicalize_name(name), "") for name in also]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name == "torch":
            continue
        if not any(name == other for other, _ in seen):
            yield name
        seen.add((name, extra))
        for requirement in map(Requirement, requirements_of(name)):
            if requirement.marker is None or requirement.marker.evaluate(environment | {"extra": extra}):
                waiting += [(canonicalize_name(requirement.name), wanted) for wanted in ("", *requirement.extras)]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements_of(name: str) -> list[str]:
    if name == PROJECT:  # as the checkout says, not as it was installed once
        extras = project()["optional-dependencies"].items()
        return project()["dependencies"] + [f"{text}; extra == '{extra}'" for extra, texts in extras for text in texts]
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        raise SystemExit(
            f"wheelhouse: {name} is not installed here, so what it needs is unknown; run `make install`"
        ) from None


def pinned() -> dict[str, str]:
    """Name to version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def add(name: str, version: str, python: str, out: Path) -> None:
    """Put one package's wheel into the folder: its published one, or one built here where it is pure Python."""
    tag = f"cp{python.replace('.', '')}"
    target = ["--python-version", python, "--implementation", "cp", "--abi", tag, "--abi", "abi3", "--abi", "none"]
    target += [text for platform in PLATFORMS for text in ("--platform", platform)]
    wanted = f"{name}=={version}"
    downloaded = pip("download", "--no-deps", "--only-binary=:all:", *target, "-d", str(out), wanted)
    if downloaded.returncode == 0:
        return
    with tempfile.TemporaryDirectory() as folder:
        built = pip("wheel", "--no-deps", "-w", folder, wanted)
        wheels = list(Path(folder).glob("*.whl"))
        if built.returncode or not wheels or not wheels[0].name.endswith("-none-any.whl"):
            reason = (downloaded.stderr.strip() or built.stderr.strip()).splitlines()[-1]
            raise SystemExit(f"wheelhouse: there is no wheel of {wanted} for Python {python}: {reason}")
        shutil.move(str(wheels[0]), out / wheels[0].name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="version of the machine's Python, such as 3.12")
    parser.add_argument("--extras", default="cli,ogbench,minari,files,reports", help="extras to include (%(default)s)")
    parser.add_argument("--also", nargs="*", default=[], metavar="PACKAGE", help="further packages, installed here too")
    parser.add_argument("--out", type=Path, default=ROOT / "wheelhouse", help="the folder (%(default)s)")
    arguments = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", arguments.python):
        parser.error(f"--python takes a version such as 3.12, got {arguments.python!r}; make wheelhouse PYTHON=3.12")
    extras = set(filter(None, arguments.extras.split(",")))
    unknown = extras - set(project()["optional-dependencies"])
    if unknown:
        parser.error(f"there is no extra {', '.join(sorted(unknown))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    versions = pinned()
    names = sorted(set(closure(extras, arguments.python, arguments.also)) - {PROJECT})
    for name in tqdm(names, desc="wheelhouse", unit="wheel"):
        add(name, versions.get(name) or distribution(name).version, arguments.python, arguments.out)
    with tempfile.TemporaryDirectory() as folder:  # setuptools would leave a build folder in the checkout
        source = Path(folder) / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "wheelhouse", "build", "*.egg-info"))
        built = pip("wheel", "--no-deps", "-w", str(arguments.out), str(source))
    if built.returncode:
        raise SystemExit(f"wheelhouse: the package itself could not be built: {built.stderr.strip().splitlines()[-1]}")
    size = sum(path.stat().st_size for path in arguments.out.glob("*.whl")) / 1e6
    print(f"{len(names) + 1} wheels, {size:.0f} MB, in {arguments.out}. There, in an environment that has torch:")
    wanted = " ".join([f"'{PROJECT}[{arguments.extras}]'", *arguments.also])
    print(f"pip install --no-index --find-links {arguments.out.name} {wanted}")


if __name__ == "__main__":
    main()
