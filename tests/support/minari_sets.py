"""Small real Minari sets, recorded in real environments."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from deflow_torchrl.sources.minari_sets import import_minari


def record(env, dataset_id, episodes=3, *, low=-1.0, high=1.0, **metadata):
    """Act at random in ``env`` for whole episodes, recorded by minari's DataCollector."""
    pytest.importorskip("jax", reason="minari's DataCollector needs jax (minari[create])")
    generator = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minari misses an author, an e-mail address, ...
        collector = import_minari().DataCollector(env)
        for seed in range(episodes):
            collector.reset(seed=seed)
            done = False
            while not done:
                action = generator.uniform(low, high, env.action_space.shape).astype(env.action_space.dtype)
                _, _, terminated, truncated, _ = collector.step(action)
                done = terminated or truncated
        dataset = collector.create_dataset(dataset_id, **metadata)
        collector._tmp_dir.cleanup()  # its own close() removes the folder behind tempfile's back, which then warns
        env.close()
    return dataset


def write(dataset_id, observation_space, action_space, episodes, **kwargs):
    """A set of given arrays: each episode is (observations, actions, rewards, terminations, truncations)."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    minari = import_minari()
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    buffers = [EpisodeBuffer(id=i, **dict(zip(names, arrays, strict=True))) for i, arrays in enumerate(episodes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(
            dataset_id, buffers, observation_space=observation_space, action_space=action_space, **kwargs
        )


def data_folder(dataset_id) -> Path:
    return Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id / "data"


def edit_metadata(dataset_id, **changes):
    path = data_folder(dataset_id) / "metadata.json"
    metadata = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))
