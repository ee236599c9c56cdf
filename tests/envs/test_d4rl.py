import logging

import numpy as np
import pytest
import torch

from deflow_torchrl.envs.d4rl import d4rl_task, d4rl_task_names, normalized_score, reference_returns
from deflow_torchrl.errors import InputError


def test_the_papers_eighteen_tasks_are_there():
    names = d4rl_task_names()
    assert len(names) == 18
    for name in names:
        task = d4rl_task(name)
        assert task.name == name
        assert d4rl_task(task.dataset_id) is task
        assert d4rl_task(task.dataset_id[:-1] + "7") is task, "whatever the set's version"


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("pen-cloned-v1", 96.262799, 3076.8331017826877),
        ("D4RL/door/human-v2", -56.512833, 2880.5693087298737),
        ("D4RL/hammer/mine-v0", -274.856578, 12794.134825156867),
        ("AdroitHandRelocate-v1", -6.425911, 4233.877797728884),
        ("AdroitHandRelocateDense-v2", -6.425911, 4233.877797728884),
        ("D4RL/antmaze/large-diverse-v1", 0.0, 1.0),
    ],
)
def test_reference_returns_are_d4rls(name, low, high):
    assert reference_returns(name) == (low, high)
    np.testing.assert_allclose(normalized_score(np.array([low, high, (low + high) / 2]), low, high), [0, 100, 50])


def test_a_set_of_another_name_has_its_environments_or_its_own_references(caplog):
    assert reference_returns("mine/door-v0", environment_id="AdroitHandDoor-v1") == reference_returns("door-human-v1")
    metadata = {"ref_min_score": -1.0, "ref_max_score": 3.0}
    assert reference_returns("mine/other-v0", metadata=metadata) == (-1.0, 3.0)
    assert reference_returns("mine/other-v0", metadata={"ref_min_score": None, "ref_max_score": 1.0}) is None
    assert reference_returns("mine/other-v0") is None
    with caplog.at_level(logging.WARNING):
        assert reference_returns("D4RL/door/human-v2", metadata=metadata) == reference_returns("door-human-v1")
    assert "are not D4RL's" in caplog.text


def test_scores_keep_the_type_of_the_returns():
    assert normalized_score(0.5, 0.0, 1.0) == 50.0
    assert torch.equal(normalized_score(torch.tensor([0.0, 1.0]), 0.0, 1.0), torch.tensor([0.0, 100.0]))
    with pytest.raises(InputError, match="cannot normalise"):
        normalized_score(1.0, 2.0, 2.0)
    with pytest.raises(InputError, match="cannot normalise"):
        normalized_score(1.0, float("nan"), 2.0)
