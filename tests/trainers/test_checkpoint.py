import io
import json
import os
import pickle
import random
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from tensordict import MemoryMappedTensor, TensorDict

from deflow_torchrl.errors import InputError
from deflow_torchrl.generators import capture_generators, restore_generators
from deflow_torchrl.trainers import load_checkpoint, save_checkpoint
from deflow_torchrl.trainers.checkpoint import (
    CheckpointNotWritten,
    _write,
    best_checkpoint,
    is_whole,
    list_checkpoints,
    read_header,
    step_of,
)
from deflow_torchrl.trainers.resume import changed_settings, run_identity
from tests.support.updates import make_update

IDENTITY = {
    "task": "cube", "algo": "deflow", "version": "0.1.0", "data_sha256": "ab", "settings": {"seed": 0, "algo": {"lr": 0.1}},
}  # fmt: skip


def steps(folder):
    return [step_of(path) for path in list_checkpoints(folder)]


def write(path, state, header):
    """A file with a right digest, whatever it holds."""
    with path.open("w+b") as file:
        _write(file, state, header)


def test_what_is_saved_is_loaded_and_the_last_three_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, {"value": torch.tensor([step]), "nested": {"list": [1, "a", 2.5]}})
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{n:09d}.pt" for n in (2, 3, 10)]
    state = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert state["value"].item() == 10
    assert state["nested"] == {"list": [1, "a", 2.5]}


def test_the_best_by_score_stays_beside_the_last_and_the_later_of_equals_is_the_best(tmp_path):
    scores = {1: None, 2: 0.9, 3: 0.2, 4: float("nan"), 5: 0.9, 6: 0.1, 7: None, 8: 0.3, 9: -1.0}
    for step, score in scores.items():
        save_checkpoint(tmp_path, step, {}, keep_last=2, score=score)
        if step == 4:
            assert steps(tmp_path) == [2, 3, 4]
    assert steps(tmp_path) == [5, 8, 9]
    assert step_of(best_checkpoint(tmp_path)) == 5
    assert read_header(tmp_path / "step_000000005.pt")["score"] == 0.9
    assert best_checkpoint(tmp_path / "nowhere") is None


def test_the_header_is_read_without_the_state_and_comes_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"big": torch.zeros(1000)}, identity=IDENTITY, score=0.5)
    assert read_header(path) == {"format": 2, "step": 3, "score": 0.5, "identity": IDENTITY}


def test_an_optimiser_a_loss_and_numpys_numbers_come_back_bit_for_bit(tmp_path):
    update = make_update()
    state = {
        "update": update.state_dict(), "numpy": [np.float64(0.1), np.str_("a")], "size": torch.Size([2, 3]), "none": None,
        "half": torch.randn(3).bfloat16(), "flags": (True, False), "parameter": torch.nn.Parameter(torch.ones(2)),
        "ordered": OrderedDict(b=1, a=2), "transposed": torch.arange(6).reshape(2, 3).T, "device": torch.device("cpu"),
    }  # fmt: skip
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, state))
    update.load_state_dict(loaded["update"])
    assert [type(value) for value in loaded["numpy"]] == [float, str]
    assert loaded["flags"] == (True, False)
    assert loaded["half"].dtype == torch.bfloat16
    for name in ("half", "parameter", "transposed"):
        assert torch.equal(loaded[name], state[name])
    assert {name: loaded[name] for name in ("size", "none", "ordered", "device")} == {
        name: state[name] for name in ("size", "none", "ordered", "device")
    }


def test_a_part_of_a_large_tensor_costs_the_size_of_the_part(tmp_path):
    storage = torch.arange(1_000_000)
    mapped = MemoryMappedTensor.from_tensor(storage, filename=tmp_path / "mapped.memmap")
    state = {"part": storage[10:20], "mapped": mapped[10:20], "strided": storage[::100_000]}
    path = save_checkpoint(tmp_path, 1, state)
    assert path.stat().st_size < 10_000
    for name, value in load_checkpoint(path).items():
        assert type(value) is torch.Tensor
        assert torch.equal(value, torch.as_tensor(state[name]))


@pytest.mark.parametrize(
    ("value", "where"),
    [({"a": [object()]}, r"state\['x'\]\['a'\]\[0\]"), (TensorDict(), "TensorDict"), ({1.5: 1}, "1.5")],
)
def test_what_would_have_to_be_pickled_is_refused_when_it_is_saved(tmp_path, value, where):
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path / "new", 1, {"x": value})
    assert not (tmp_path / "new").exists()


def test_a_failed_write_leaves_the_old_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"value": 1})

    def full_disk(state, file):
        file.file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointNotWritten, match=r"step_000000002.pt was not written \(No space"):
        save_checkpoint(tmp_path, 2, {"value": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001.pt"]


FULL_DISK = """
import pathlib, resource, signal, sys, torch
from deflow_torchrl.trainers.checkpoint import CheckpointNotWritten, list_checkpoints, load_checkpoint, save_checkpoint
folder = pathlib.Path(sys.argv[1])
save_checkpoint(folder, 1, {"value": torch.ones(1000)}, score=1.0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 3, 100, 5_000, 300_000, 1_000_000):  # bytes a file may have: the header, a tensor, the end
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for sizes in ((250_000,), (10, 10, 10, 250_000), (1_000,) * 300):
        try:
            save_checkpoint(folder, 2, {"values": [torch.zeros(size) for size in sizes]})
        except CheckpointNotWritten as error:
            assert "File too large" in str(error), error
            assert isinstance(error.__cause__, OSError)
        else:
            raise SystemExit(f"written within {limit} bytes")
        assert [path.name for path in folder.iterdir()] == ["step_000000001.pt"]
        assert load_checkpoint(folder / "step_000000001.pt")["value"].sum() == 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save_checkpoint(folder, 2, {"values": torch.zeros(250_000)})
assert len(list_checkpoints(folder)) == 2
"""


def test_a_file_the_system_refuses_to_extend_costs_that_checkpoint_only(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "checkpoints")],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


ON_A_SMALL_DISK = """
import pathlib, sys, torch
from deflow_torchrl.errors import CheckpointNotWritten
from deflow_torchrl.trainers import MetricsLog
from deflow_torchrl.trainers.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, step_of
folder = pathlib.Path(sys.argv[1])
log = MetricsLog(folder)
state = {"values": torch.zeros(50_000)}  # 200 kB: a disk of 1 MB holds three and a fourth in writing
written, failed, unwritten = [], [], 0
for step in range(1, 8):
    if step == 5:
        (folder / "ballast").unlink()
    log.write({"step": step, "phase": "offline"})
    try:
        log.sync()
        save_checkpoint(folder / "checkpoints", step, state)
        written.append(step)
    except CheckpointNotWritten as error:
        assert "No space left on device" in str(error), error
        failed.append(step)
    if step == 2:
        with (folder / "ballast").open("wb", buffering=0) as file:
            try:
                while file.write(b"x" * 1000):
                    pass
            except OSError:
                pass
    assert [step_of(path) for path in list_checkpoints(folder / "checkpoints")] == written[-3:]
    assert all(load_checkpoint(path)["values"].sum() == 0 for path in list_checkpoints(folder / "checkpoints"))
    assert not list((folder / "checkpoints").glob(".*"))
assert failed == [3, 4], failed
assert [row["step"] for row in MetricsLog(folder).rows] == list(range(1, 8))
"""


def test_a_full_disk_costs_the_checkpoints_it_had_no_room_for_and_no_row_of_metrics(tmp_path):
    mount = f"mount -t tmpfs -o size=1m tmpfs {shlex.quote(str(tmp_path))}"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], check=False, capture_output=True).returncode:
        pytest.skip("a small disk of one's own needs Linux with user namespaces")
    script = shlex.join([sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)])
    done = subprocess.run([*inside, f"{mount} && {script}"], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_a_killed_process_left_half_written_is_no_checkpoint_and_goes_with_the_next(tmp_path):
    left = tmp_path / ".step_000000001.pt.4711.part"
    left.write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000002.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_old_ones_go(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {})
    seen = []
    fsync, replace = os.fsync, os.replace

    def names():
        return sorted(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(("sync", names())), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(("rename", names())), replace(*paths)))
    save_checkpoint(tmp_path, 2, {}, keep_last=1)
    part = f".step_000000002.pt.{os.getpid()}.part"
    assert seen == [
        ("sync", [part, "step_000000001.pt"]),
        ("rename", [part, "step_000000001.pt"]),
        ("sync", ["step_000000001.pt", "step_000000002.pt"]),
    ]
    assert names() == ["step_000000002.pt"]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["pickle", "archive", "archive with a right digest", "hand-made archive"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, kind):
    marker, path = tmp_path / "executed", tmp_path / "step_000000001.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    elif kind == "archive":
        torch.save({"format": 2, "x": Evil(marker)}, path)
    elif kind == "archive with a right digest":
        write(path, {"x": Evil(marker)}, read_header(save_checkpoint(tmp_path, 1, {})))
    else:
        good = save_checkpoint(tmp_path, 1, {"value": torch.zeros(3)})
        with zipfile.ZipFile(good) as archive:
            comment, parts = archive.comment, {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, pickle.dumps(Evil(marker)) if name.endswith("data.pkl") else part)
            archive.comment = comment
    with pytest.raises(InputError, match="not loaded"):
        load_checkpoint(path)
    assert not marker.exists()
    torch.load(_evil_archive(marker), weights_only=False)  # the other way it would have run
    assert marker.exists()


def _evil_archive(marker):
    file = io.BytesIO()
    torch.save(Evil(marker), file)
    file.seek(0)
    return file


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_checkpoints_are_refused(tmp_path, content):
    path = save_checkpoint(tmp_path, 1, {"value": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)


def test_every_single_flipped_byte_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"value": torch.arange(20), "number": 1}, identity=IDENTITY, score=0.5)
    good = path.read_bytes()
    assert is_whole(path)
    for position in range(0, len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << random.Random(position).randrange(8)
        path.write_bytes(flipped)
        assert not is_whole(path), position
        if position % 50 == 0:
            with pytest.raises(InputError, match=r"not loaded|checkpoint format"):
                load_checkpoint(path)
    path.write_bytes(good + b"\0")
    assert not is_whole(path)
    path.write_bytes(good)
    assert load_checkpoint(path)["number"] == 1


def test_a_number_altered_with_torchs_own_tools_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"value": torch.zeros(3), "step": 1})
    state = torch.load(path, weights_only=True)
    state["step"] = 2
    torch.save(state, path)
    with pytest.raises(InputError, match="altered"):
        load_checkpoint(path)


def test_an_altered_score_or_setting_in_the_header_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {}, identity=IDENTITY, score=0.5)
    path.write_bytes(path.read_bytes().replace(b'"lr": 0.1', b'"lr": 0.2'))
    assert read_header(path)["identity"]["settings"]["algo"]["lr"] == 0.2
    with pytest.raises(InputError, match="altered"):
        load_checkpoint(path)


def test_the_message_about_a_damaged_checkpoint_names_the_newest_whole_one_and_how_to_go_on_from_it(tmp_path):
    folder = tmp_path / "my run" / "checkpoints"
    paths = [save_checkpoint(folder, step, {"value": torch.zeros(100)}) for step in (4, 8, 12)]
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError) as error:
        load_checkpoint(paths[-1])
    assert f"the newest whole one is of step 4: deflow resume '{folder.parent}' --step 4" in str(error.value)
    paths[0].unlink()
    with pytest.raises(InputError, match=r"it was not loaded$"):
        load_checkpoint(paths[-1])


def test_other_formats_and_missing_files_are_refused(tmp_path):
    write(tmp_path / "a.pt", {}, {"format": 99, "step": 1, "score": None, "identity": {}})
    with pytest.raises(InputError, match="format 99, this version reads 2"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save({"format": 1}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="checkpoint format 1; this version reads 2"):
        load_checkpoint(tmp_path / "b.pt")
    with pytest.raises(InputError, match="no checkpoint"):
        load_checkpoint(tmp_path / "c.pt")
    write(tmp_path / "d.pt", [1], {"format": 2, "step": 1, "score": None, "identity": {}})
    with pytest.raises(InputError, match="holds a list"):
        load_checkpoint(tmp_path / "d.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "scene"}, "task cube there, scene here"),
        ({"algo": "fql"}, "algo deflow there, fql here"),
        ({"version": "0.3.0"}, "version 0.1.0 there, 0.3.0 here"),
        ({"data_sha256": "cd", "task": "scene"}, "task cube there, scene here; data_sha256 ab there, cd here"),
    ],
)
def test_a_checkpoint_of_another_task_method_version_or_data_is_refused_with_what_differs(tmp_path, change, said):
    path = save_checkpoint(tmp_path, 1, {"value": 1}, identity=IDENTITY)
    with pytest.raises(InputError, match="of another run") as error:
        load_checkpoint(path, identity=IDENTITY | change)
    assert f"({said})" in str(error.value)


def test_a_patch_release_and_an_identity_with_gaps_fit(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"value": 1}, identity=IDENTITY)
    for ours in (
        IDENTITY | {"version": "0.1.7"},
        IDENTITY | {"version": "0.2.3"},
        {"task": "cube"},
        IDENTITY | {"data_sha256": None},
    ):
        assert load_checkpoint(path, identity=ours) == {"value": 1}


def test_changed_settings_are_listed_but_for_those_that_change_no_result():
    theirs = {"seed": 0, "out": "a", "hidden_dims": [8, 8], "algo": {"name": "deflow", "lr": 3e-4}, "eval_workers": 1}
    ours = theirs | {
        "out": "b",
        "hidden_dims": (8, 16),
        "algo": {"name": "deflow", "lr": 1e-3},
        "eval_workers": 2,
        "new": 1,
    }
    changes = changed_settings(
        {"settings": theirs, "packages": {"torch": "2.12"}}, {"settings": ours, "packages": {"torch": "2.13"}}
    )
    assert changes == [
        "hidden_dims: [8, 8] -> [8, 16]", "algo.lr: 0.0003 -> 0.001", "new: None -> 1", "torch: 2.12 -> 2.13",
    ]  # fmt: skip
    assert changed_settings({"settings": theirs}, {"settings": theirs | {"hidden_dims": (8, 8)}}) == []


def test_the_identity_of_a_run_is_plain_and_names_what_the_numbers_depend_on():
    settings = {"task": "cube", "seed": 0, "algo": {"name": "deflow", "lr": 0.1}}
    identity = run_identity(settings, data_sha256="ab")
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["task"], identity["algo"], identity["data_sha256"]) == ("cube", "deflow", "ab")
    assert {"torch", "torchrl", "numpy"} <= set(identity["packages"])
    assert changed_settings(identity, identity) == []


def test_every_global_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random(), random.gauss(0, 1)

    torch.manual_seed(1)
    draw()
    path = save_checkpoint(tmp_path, 1, {"generators": capture_generators()})
    expected = [draw(), draw()]
    restore_generators(load_checkpoint(path)["generators"])
    assert [draw(), draw()] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generators_of_a_gpu_go_on_where_they_were(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"generators": capture_generators()})
    expected = torch.rand(3, device="cuda").tolist()
    restore_generators(load_checkpoint(path)["generators"])
    assert torch.rand(3, device="cuda").tolist() == expected
