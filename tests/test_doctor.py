import json
import os
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch

from deflow_torchrl import doctor
from tests.support import house
from tests.support.command_line import deflow


def rows(check):
    return [(finding.status, finding.found, finding.advice) for finding in check()]


def distribution(folder, name, version):
    """A distribution of which nothing but the name and the version is there."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_every_part_of_this_installation_is_examined_and_what_the_tests_use_works():
    result = deflow("doctor", "--json")
    *table, line = result.stdout.splitlines()
    report = json.loads(line)
    faults = {finding["check"] for finding in report["findings"] if finding["status"] == "fault"}
    assert faults <= {"drawing"}, result.stdout  # a machine may have no OpenGL
    assert (report["ok"], result.returncode) == ((False, 1) if faults else (True, 0))
    checks = [finding["check"] for finding in report["findings"]]
    assert {"Python", "versions", "torchrl's extension", "cores", "memory", "disk", "DEFLOW_HOME"} < set(checks)
    assert [check for check in checks if check.startswith("extra ")] == [f"extra {name}" for name in doctor.EXTRAS]
    for name in ("cli", "files", "reports"):
        assert {"check": f"extra {name}", "status": "ok", "found": doctor.EXTRAS[name][0], "advice": ""} in report[
            "findings"
        ]
    for check in checks:
        assert any(check in row for row in table)


def test_every_extra_of_pyproject_is_known():
    project = tomllib.loads((house.ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert doctor.EXTRAS.keys() == project["optional-dependencies"].keys() - {"all", "dev", "docs"}


def test_an_extra_that_is_installed_and_does_not_import_is_a_fault(tmp_path, monkeypatch):
    (tmp_path / "h5py.py").write_text("raise ImportError('libhdf5.so.310: cannot open shared object file')")
    monkeypatch.setattr(doctor, "EXTRAS", {name: doctor.EXTRAS[name] for name in ("files", "cli")})
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_extras,))
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    result = deflow("doctor", "--json", env={"PYTHONPATH": search})
    assert result.returncode == 1
    report = json.loads(result.stdout.splitlines()[-1])
    assert not report["ok"]
    files, cli = report["findings"]
    assert (files["status"], cli["status"]) == ("fault", "ok")
    assert "ImportError: libhdf5.so.310: cannot open shared object file" in files["found"]
    assert files["advice"] == "pip install 'deflow-torchrl[files]' --force-reinstall"


def test_an_extra_that_is_not_installed_is_a_note_with_the_way_to_install_it(monkeypatch):
    version = doctor.metadata.version
    missing = doctor.metadata.PackageNotFoundError("h5py")
    monkeypatch.setattr(doctor, "EXTRAS", {"files": doctor.EXTRAS["files"]})
    monkeypatch.setattr(doctor.metadata, "version", lambda name: version(name) if name != "h5py" else _raise(missing))
    install = "pip install 'deflow-torchrl[files]'"
    assert rows(doctor.check_extras) == [("note", "not installed (h5py): data from HDF5 and Parquet", install)]


def _raise(error):
    raise error


def test_versions_that_do_not_fit_are_faults(tmp_path, monkeypatch):
    assert "fault" not in {status for status, _, _ in rows(doctor.check_versions)}
    distribution(tmp_path, "tensordict", "0.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    findings = rows(doctor.check_versions)
    faults = [found for status, found, _ in findings if status == "fault"]
    assert len(faults) == 1
    assert "torchrl needs tensordict" in faults[0]
    assert faults[0].endswith("0.1.0 is installed")
    ((found, advice),) = [(found, advice) for _, found, advice in findings if "tested version" in found]
    assert "; tensordict is 0.1.0" in found
    assert " tensordict==0.14" in advice


@pytest.mark.skipif(
    torch.version.cuda is not None or os.name == "nt", reason="of a torch without CUDA; writes a script"
)
def test_a_gpu_that_this_torch_cannot_use_is_a_note(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200, 580.1\n")
    tool.chmod(0o755)
    assert rows(doctor.check_gpu)[0][0] == "ok"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    advice = "install a torch with CUDA to train on it"
    assert rows(doctor.check_gpu) == [("note", "NVIDIA H200, 580.1, torch without CUDA", advice)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems draw in a window")
def test_a_backend_that_cannot_draw_is_a_fault(monkeypatch):
    pytest.importorskip("mujoco", reason="needs the extra ogbench")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    ((status, found, advice),) = rows(doctor.check_drawing)
    assert status == "fault"
    assert "no frame can be drawn" in found
    assert "glfw: " in found
    assert advice.startswith("unset MUJOCO_GL")


def test_a_home_that_cannot_be_written_is_a_fault(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path / "file"))
    ((status, found, _),) = rows(doctor.check_home)
    assert status == "fault"
    assert str(tmp_path / "file") in found


@pytest.mark.parametrize("version", [1, 2])
def test_more_threads_than_a_container_may_use_are_a_note(version, monkeypatch):
    folder = "/sys/fs/cgroup"
    files = {f"{folder}/cpu.max": "150000 100000"}
    if version == 1:
        files = {f"{folder}/cpu/cpu.cfs_quota_us": "150000", f"{folder}/cpu/cpu.cfs_period_us": "100000"}
    monkeypatch.setattr(doctor, "_first_line", lambda file: files.get(file, ""))  # these files are the system's
    monkeypatch.setattr(doctor, "available_cores", lambda: 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        ((status, found, advice),) = rows(doctor.check_cores)
    finally:
        torch.set_num_threads(threads)
    assert (status, advice) == ("note", "export OMP_NUM_THREADS=2")
    assert "limited to 1.5 by a control group; 4 threads of torch" in found


def test_free_memory_is_that_of_the_container(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB"}
    monkeypatch.setattr(doctor, "_first_line", lambda *names: next((files[it] for it in names if it in files), ""))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e9))
    assert rows(doctor.check_room)[0] == ("ok", "4.1 GB free", "")
    files |= {"/sys/fs/cgroup/memory.max": "3000000000", "/sys/fs/cgroup/memory.current": "1000000000"}
    memory, disk, *_ = rows(doctor.check_room)
    assert memory[:2] == ("note", "2.0 GB free")
    assert (disk[0], disk[1][:10]) == ("note", "2 GB free ")


def test_a_check_that_fails_itself_is_a_fault_and_the_others_go_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_cores, doctor.check_python))
    assert [(finding.check, finding.status) for finding in doctor.examine()] == [("cores", "fault"), ("Python", "ok")]
