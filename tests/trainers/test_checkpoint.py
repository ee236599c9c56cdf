import pickle

import pytest
import torch

from deflow_torchrl.errors import InputError
from deflow_torchrl.trainers import load_checkpoint, save_checkpoint
from deflow_torchrl.trainers.checkpoint import list_checkpoints


def test_what_is_saved_is_loaded_and_the_last_three_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, step, {"value": torch.tensor([step]), "nested": {"list": [1, "a", 2.5]}})
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step_{n:09d}.pt" for n in (2, 3, 10)]
    state = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert state["value"].item() == 10
    assert state["nested"] == {"list": [1, "a", 2.5]}


def test_a_failed_write_leaves_the_old_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"value": 1})

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, {"value": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000001.pt"]


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, capsys):
    path = tmp_path / "step_000000001.pt"
    for write in (lambda: torch.save({"format": 1, "x": Evil()}, path), lambda: path.write_bytes(pickle.dumps(Evil()))):
        write()
        with pytest.raises(InputError, match="not loaded"):
            load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_checkpoints_are_refused(tmp_path, content):
    path = save_checkpoint(tmp_path, 1, {"value": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)


def test_other_formats_and_missing_files_are_refused(tmp_path):
    torch.save({"format": 99}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="format 99"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(InputError, match="format list"):
        load_checkpoint(tmp_path / "b.pt")
    with pytest.raises(InputError, match="no checkpoint"):
        load_checkpoint(tmp_path / "c.pt")
