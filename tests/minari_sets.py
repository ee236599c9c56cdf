"""Small real Minari sets, recorded in real environments."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np

from deflow_torchrl.envs.minari import import_minari


def record(env, dataset_id, episodes=3, *, low=-1.0, high=1.0, **metadata):
    """Act at random in ``env`` for whole episodes; with minari's DataCollector where jax, which it needs, is installed."""
    minari = import_minari()
    try:
        import jax  # noqa: F401

        with_collector = True
    except ImportError:
        with_collector = False
    generator = np.random.default_rng(0)

    def act():
        return generator.uniform(low, high, env.action_space.shape).astype(env.action_space.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minari misses an author, an e-mail address, ...
        if with_collector:
            plain, env = env, minari.DataCollector(env)
            for seed in range(episodes):
                env.reset(seed=seed)
                done = False
                while not done:
                    _, _, terminated, truncated, _ = env.step(act())
                    done = terminated or truncated
            dataset = env.create_dataset(dataset_id, **metadata)
            env._tmp_dir.cleanup()  # its own close() removes the folder behind tempfile's back, which then warns
            plain.close()
            return dataset
        return minari.create_dataset_from_buffers(
            dataset_id, [episode(env, seed, act) for seed in range(episodes)], env=env, **metadata
        )


def episode(env, seed, act):
    """One episode as minari keeps it."""
    from minari.data_collector.episode_buffer import EpisodeBuffer

    observations, steps, done = [env.reset(seed=seed)[0]], [], False
    while not done:
        action = act()
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        steps.append((action, float(reward), terminated, truncated))
        done = terminated or truncated
    actions, rewards, terminations, truncations = (np.array(column) for column in zip(*steps, strict=True))
    return EpisodeBuffer(
        id=seed,
        seed=seed,
        observations=stack(observations),
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
    )


def stack(observations):
    if isinstance(observations[0], dict):
        return {key: stack([each[key] for each in observations]) for key in observations[0]}
    return np.stack(observations)


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
