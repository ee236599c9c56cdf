"""Shared parts: small networks, batches and a generated data set made once."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from deflow_torchrl.processes import STOP_SIGNALS
from tests.support.generation import DATASET, generation_in_process
from tests.support.runs import undrawn

for _number in STOP_SIGNALS:  # a suite started in the background or by nohup, whose tests interrupt runs
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

# Importing it, as the search for doctests does, changes what a process's runs write.
collect_ignore = ["support/without_page.py"]


@pytest.fixture(scope="session", autouse=True)
def _undrawn():
    """Runs of this process draw neither page nor curve, which take seconds; tests that read them bring them back (``drawn``)."""
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals():
    """The command line takes the signals that stop a process and keeps them: here it is not the process's end."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def short_episodes():
    """Episodes of 61 rows instead of 1001, for the whole session's generated data."""
    from deflow_torchrl.sources import generation

    saved = dict(generation.GENERATED_DATASETS)
    for name, settings in saved.items():
        generation.GENERATED_DATASETS[name] = dataclasses.replace(settings, episode_steps=61)
    yield 61
    generation.GENERATED_DATASETS.update(saved)


@pytest.fixture
def in_process():
    """Generated episodes are made in this process, with its settings."""
    with generation_in_process() as patch:
        yield patch


@pytest.fixture(scope="session")
def generated(tmp_path_factory, short_episodes) -> Path:
    """A folder with a small cube-single-play set made by the real oracle in the real simulator."""
    import numpy as np

    from deflow_torchrl.sources.generation import generate_episode

    folder = tmp_path_factory.mktemp("data")
    for suffix, split, number in (("", "train", 3), ("-val", "val", 1)):
        episodes = [generate_episode(DATASET, seed=0, split=split, episode=episode) for episode in range(number)]
        arrays = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
        np.savez(folder / f"{DATASET}{suffix}.npz", **arrays)
    return folder
