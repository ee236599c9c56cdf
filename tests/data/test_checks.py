import numpy as np
import pytest

pytest.importorskip("ogbench", reason="needs the extra ogbench")

from deflow_torchrl.data import GENERATED_DATASETS, TransitionDataset
from deflow_torchrl.sources.generation import generate_episode

# One set of each kind; the 16 are the same simulators with more of the same objects.
SETS = (
    "cube-single-play-v0",
    "cube-double-noisy-v0",
    "scene-play-v0",
    "puzzle-3x3-play-v0",
    "pointmaze-large-stitch-v0",
)


def read(parts, *, marked):
    observations = np.concatenate(parts)
    length = len(observations)
    ends = np.zeros(length)
    ends[np.cumsum([len(part) for part in parts]) - 1] = 1
    if not marked:
        ends[: len(parts[0])] = 0
    return TransitionDataset.from_arrays(
        observations=observations, actions=np.zeros((length, 1)), rewards=np.zeros(length), terminals=np.zeros(length),
        timeouts=ends, final_observation_rows=True, allow_jumps=True,
    ).report.jump  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_simulated_episodes_do_not_jump_and_an_unmarked_end_does(name, short_episodes):
    assert name in GENERATED_DATASETS
    parts = [generate_episode(name, seed=3, split="train", episode=number)["observations"] for number in range(5)]
    assert read(parts, marked=True) is None
    jump = read(parts, marked=False)
    assert jump is not None
    assert (jump.episode, jump.step, jump.count) == (0, len(parts[0]) - 1, 1)


def test_a_set_without_slow_dimensions_is_not_judged():
    rng = np.random.default_rng(0)
    assert read([rng.normal(size=(200, 4)) for _ in range(3)], marked=False) is None


def arm(targets, gain, steps, seed=0):
    """A joint controller that follows set points: fast after each, then slower and slower."""
    rng = np.random.default_rng(seed)
    q, rows = np.zeros(7), []
    for _ in range(targets):
        goal = rng.uniform(-2, 2, 7)
        for _ in range(steps):
            q = q + gain * (goal - q) + 1e-3 * rng.normal(size=7)
            rows.append(q)
    return np.array(rows)


@pytest.mark.parametrize(("steps", "gain"), [(500, 0.5), (200, 0.2), (100, 0.3)])
def test_a_fast_start_towards_a_new_set_point_is_no_jump(steps, gain):
    assert read([arm(20, gain, steps, seed) for seed in range(2)], marked=True) is None


def test_an_idle_arm_that_moves_now_and_then_does_not_jump():
    rows = np.zeros((1000, 7)) + np.random.default_rng(0).normal(size=(1000, 7)) * 1e-3
    rows[500:] += np.clip(np.arange(500)[:, None] / 10, 0, 1)
    assert read([rows, rows], marked=True) is None
