# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Examine an installation, the program behind ``deflow doctor``: each check tries a part and says what to do about it."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deflow_torchrl.errors import InputError, one_line
from deflow_torchrl.paths import cache_home, make_writable_folder
from deflow_torchrl.processes import available_cores, free_memory
from deflow_torchrl.processes import first_line as _first_line
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.versions import extension_fault, package_versions

PROJECT = "deflow-torchrl"
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    extra: (gives, tuple(modules))
    for extra, gives, *modules in (
        ("cli", "the deflow command", "typer", "rich", "hydra"),
        ("ogbench", "OGBench's tasks and data", "ogbench", "mujoco", "gymnasium", "requests"),
        ("minari", "Minari's sets, D4RL's tasks", "minari", "gymnasium_robotics"),
        ("files", "data from HDF5 and Parquet", "h5py", "pyarrow.parquet"),
        ("reports", "report pages, curves, intervals", "matplotlib.pyplot", "jinja2", "jsonschema", "scipy.stats"),
        ("export", "deflow export", "onnx", "onnxscript", "onnxruntime"),
        ("video", "clips as MP4", "imageio_ffmpeg"),
        ("wandb", "logger=wandb", "wandb"),
        ("tensorboard", "logger=tensorboard", "tensorboard", "torch.utils.tensorboard"),
        ("mlflow", "logger=mlflow", "mlflow"),
        ("ray", "sweeps on a cluster, engine=ray", "ray"),
    )
}
"""Extra -> what it gives, and the modules that must import for it to work."""
_TIMEOUT = 180.0  # seconds for a child process; a cold import of a large package from a network disk takes a minute
_LITTLE_DISK, _LITTLE_MEMORY = 5.0, 4.0  # GB
_DRAW = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    if not renderer.render().any():
        raise SystemExit("the picture is black")
"""


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Args:
        check: what was examined.
        status: ``"ok"``, ``"note"`` (works with a limit, or is not installed) or ``"fault"`` (is installed and cannot work).
        found: what was found.
        advice: what to do about it, or "".
    """

    check: str
    status: Literal["ok", "note", "fault"]
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Run all checks, with a progress bar on standard error; a check that fails itself is a fault."""
    findings: list[Finding] = []
    for check in progress_bar(CHECKS, desc="doctor", leave=False):
        try:
            findings += check()
        except Exception as error:  # such as a torch that does not import
            name = check.__name__.removeprefix("check_")
            findings.append(Finding(name, "fault", f"{type(error).__name__}: {one_line(error)}"))
    return findings


def check_python() -> Iterator[Finding]:
    """Python's version against the package's ``requires-python``."""
    needed = metadata.metadata(PROJECT)["Requires-Python"] or ""
    fits = Requirement(f"python{needed}").specifier.contains(platform.python_version())
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("Python", "ok" if fits else "fault", found, "" if fits else f"install Python {needed}")


def check_versions() -> Iterator[Finding]:
    """Installed versions against what each package requires of the others, and against ``constraints.txt`` of a checkout."""
    versions = package_versions()
    del versions["python"]
    yield Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    for conflict, requirement in _conflicts().items():
        yield Finding("versions", "fault", conflict, f"pip install '{requirement}'")
    file = Path(__file__).parents[1] / "constraints.txt"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        have = {name: version for name in pins if (version := _version(name))}
        other = {
            name: pin
            for name, pin in pins.items()
            if name in have and not Requirement(f"{name}=={pin}").specifier.contains(have[name])
        }
        found = f"{len(have) - len(other)} of {len(have)} packages have the tested version"
        found += "".join(f"; {name} is {have[name]}" for name in other)
        advice = "pip install " + " ".join(f"{name}=={pin}" for name, pin in other.items()) if other else ""
        yield Finding("pins", "note" if other else "ok", found, advice)


def check_extension() -> Iterator[Finding]:
    """TorchRL's compiled extension, which prioritised sampling alone needs."""
    fault = extension_fault()
    if fault is None:
        yield Finding("torchrl's extension", "ok", "loads: PrioritizedSampler works")
    else:
        yield Finding("torchrl's extension", "note", fault, "nothing else needs it")


def check_drawing() -> Iterator[Finding]:
    """One frame drawn by mujoco, with ``MUJOCO_GL`` as it is set, else with the first backend that works."""
    if importlib.util.find_spec("mujoco") is None:
        return
    chosen = os.environ.get("MUJOCO_GL", "")
    backends = [chosen] if chosen or sys.platform != "linux" else ["", "egl", "osmesa"]
    errors = []
    for backend in backends:
        error = _run(_DRAW, MUJOCO_GL=backend)
        if error is None:
            name = f"MUJOCO_GL={backend}" if backend else "mujoco's default backend"
            advice = f"for tasks with pictures: export MUJOCO_GL={backend}" if backend and not chosen else ""
            yield Finding("drawing", "note" if advice else "ok", f"a frame drawn with {name}", advice)
            return
        errors.append(f"{backend or 'default'}: {error}")
    advice = "install a driver or Debian's libegl1 and libgl1-mesa-dri (MUJOCO_GL=egl) or libosmesa6 (MUJOCO_GL=osmesa)"
    if chosen:
        advice = f"unset MUJOCO_GL, or {advice}"
    yield Finding(
        "drawing", "fault", "no frame can be drawn, so tasks with pictures fail; " + "; ".join(errors), advice
    )


def check_cores() -> Iterator[Finding]:
    """Cores that this process may use, by affinity and by a container's limit, and torch's threads."""
    import torch

    cores, threads = available_cores(), torch.get_num_threads()
    quota = _cgroup_cores()
    usable = cores if quota is None else min(cores, math.ceil(quota))
    found = f"{cores} of {os.cpu_count()} cores" + (f", limited to {quota:g} by a control group" if quota else "")
    found += f"; {threads} threads of torch"
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    found += "".join(f", {name}={os.environ[name]}" for name in names if name in os.environ)
    many = threads > usable
    yield Finding("cores", "note" if many else "ok", found, f"export OMP_NUM_THREADS={usable}" if many else "")


def check_gpu() -> Iterator[Finding]:
    """A sum on every GPU, and whether torch's build fits the driver."""
    import torch

    driver = _nvidia_driver()
    build = f"torch for CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA"
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("GPU", "ok", f"none; {build}; runs train on the CPU")
        elif torch.version.cuda:
            yield Finding(
                "GPU", "fault", f"{driver}: {build} cannot use it", "update the driver, or install an older torch"
            )
        else:
            yield Finding("GPU", "note", f"{driver}, {build}", "install a torch with CUDA to train on it")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB; {build}; driver {driver or 'unknown'}"
        try:
            torch.ones(8, device=f"cuda:{index}").sum().item()
        except RuntimeError as error:
            yield Finding(f"GPU {index}", "fault", f"{found}: {one_line(error)}", "install a torch built for this GPU")
        else:
            yield Finding(f"GPU {index}", "ok", found)


def check_room() -> Iterator[Finding]:
    """Free memory and free disk, at ``DEFLOW_HOME`` and here."""
    memory = _free_memory()
    if memory is None:
        yield Finding("memory", "ok", "unknown on this system")
    else:
        little = memory < _LITTLE_MEMORY
        advice = "storage=memmap keeps a data set's columns in files" if little else ""
        yield Finding("memory", "note" if little else "ok", f"{memory:.1f} GB free", advice)
    for folder in dict.fromkeys((cache_home().absolute(), Path.cwd())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        advice = "" if free >= _LITTLE_DISK else "free some for data sets and checkpoints, or set DEFLOW_HOME= and out="
        yield Finding("disk", "note" if advice else "ok", f"{free:.0f} GB free in {folder}", advice)


def check_home() -> Iterator[Finding]:
    """A file written in ``DEFLOW_HOME``."""
    try:
        yield Finding("DEFLOW_HOME", "ok", f"{make_writable_folder(cache_home())} can be written")
    except InputError as error:
        yield Finding("DEFLOW_HOME", "fault", str(error), "export DEFLOW_HOME=FOLDER")


def check_extras() -> Iterator[Finding]:
    """Every extra: whether its packages are there and import, each in a process of its own, and what it gives."""
    there = [extra for extra in EXTRAS if not _missing(extra)]
    with ThreadPoolExecutor(max_workers=available_cores()) as pool:
        errors = dict(
            zip(there, pool.map(lambda extra: _run(f"import {', '.join(EXTRAS[extra][1])}"), there), strict=True)
        )
    for extra, (gives, _) in EXTRAS.items():
        install = f"pip install '{PROJECT}[{extra}]'"
        if missing := _missing(extra):
            yield Finding(f"extra {extra}", "note", f"not installed ({', '.join(missing)}): {gives}", install)
        elif error := errors[extra]:
            yield Finding(f"extra {extra}", "fault", f"does not import: {error}", f"{install} --force-reinstall")
        else:
            yield Finding(f"extra {extra}", "ok", gives)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python, check_versions, check_extension, check_cores, check_gpu, check_room, check_home, check_drawing, check_extras,
)  # fmt: skip


def _run(code: str, **environment: str) -> str | None:
    """Why a child process fails, in one line, or None if it does not."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        result = subprocess.run(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_TIMEOUT:.0f} seconds"
    if result.returncode == 0:
        return None
    raised = [line for line in result.stderr.splitlines() if line and not line[0].isspace()]
    return raised[-1] if raised else f"ended with code {result.returncode}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(name: str, extra: str = "") -> list[Requirement]:
    """What a distribution requires on this machine, of one extra also what it adds."""
    texts = map(Requirement, metadata.requires(name) or [])
    return [it for it in texts if it.marker is None or it.marker.evaluate({"extra": extra})]


def _missing(extra: str) -> list[str]:
    return [it.name for it in _requirements(PROJECT, extra) if _version(it.name) is None]


def _conflicts() -> dict[str, Requirement]:
    """What this package, its installed extras and all they require are missing or have in a version that does not fit."""
    conflicts: dict[str, Requirement] = {}
    waiting = [(PROJECT, extra) for extra in ("", *EXTRAS) if not _missing(extra)]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        for needed in _requirements(name, extra):
            version = _version(needed.name)
            if version is None or not needed.specifier.contains(version, prereleases=True):
                is_there = f"{version} is installed" if version else "which is not installed"
                conflicts[f"{name} needs {needed.name}{needed.specifier}, {is_there}"] = needed
            else:
                found = {(canonicalize_name(needed.name), wanted) for wanted in ("", *needed.extras)} - seen
                seen |= found
                waiting += found
    return conflicts


def _cgroup_cores() -> float | None:
    """Cores that a control group allows, or None where there is no limit."""
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    if not period:  # version 1
        quota = _first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = _first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _free_memory() -> float | None:
    """GB of memory that are free, or None where it is not known."""
    free = free_memory(_first_line)
    return None if free is None else free / 1e9


def _nvidia_driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    return "; ".join(result.stdout.split("\n")).strip("; ") or None if result.returncode == 0 else None
