# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Collect one episode of an OGBench data set: OGBench's settings as a table, and its two protocols.

Manipulation (``cube``, ``scene``, ``puzzle``): a scripted oracle pursues one random target after another. In ``play`` sets it
follows an open-loop plan that carries smoothed noise; in ``noisy`` sets it is closed-loop and Gaussian noise of a per-episode
level is added to its actions. Mazes (``pointmaze``): the point follows the maze's shortest path with Gaussian noise, to one
random goal after another (``navigate``) or to one goal four cells away, where it stays (``stitch``).

The values and the order of random draws follow ``data_gen_scripts/`` of https://github.com/seohongpark/ogbench (1d41409).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from deflow_torchrl.envs.factory import make_env_by_id

# Noise of the Markov oracle relative to its level: x, y, z, yaw, gripper.
_MARKOV_NOISE_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])
# Array of a data set -> entry of a step's info with the simulator's state before the step.
_STATE_BEFORE = {"qpos": "prev_qpos", "qvel": "prev_qvel", "button_states": "prev_button_states"}
_DTYPES = {"terminals": np.dtype(bool), "button_states": np.dtype(np.int64)}


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings(ABC):
    """Settings that every generated data set has.

    Attributes:
        environment_id: goal-conditioned environment of ``ogbench``.
        published_episodes: training episodes of the published set; its validation split has a tenth of them.
        episode_steps: steps of an episode; its last row has no successor, so it yields one transition less.
    """

    environment_id: str
    published_episodes: int = 1000
    episode_steps: int = 1001

    @abstractmethod
    def collector(self) -> EpisodeCollector:
        """Make the simulator and the policy that acts in it."""


@dataclass(frozen=True)
class OracleSettings:
    """One scripted policy: ``module:class`` and its options."""

    path: str
    options: dict[str, float | bool]


@dataclass(frozen=True)
class VisibleCube:
    """Region in which the scene's cube must stay, in metres; outside it the cube may be hidden and goal images ambiguous.

    Attributes:
        below_y: bound of y; the cube stays below it.
        drawer_y: at this y and below, the cube must be in the drawer.
        drawer_z: heights (closed interval) at which it is in the drawer.
    """

    below_y: float = 0.29
    drawer_y: float = -0.3
    drawer_z: tuple[float, float] = (0.06, 0.08)

    def holds(self, cube: np.ndarray) -> bool:
        """Whether the positions ``[T, 3]`` of an episode are all allowed."""
        y, z = cube[:, 1], cube[:, 2]
        hidden = (y <= self.drawer_y) & ((z < self.drawer_z[0]) | (z > self.drawer_z[1]))
        return not ((y >= self.below_y) | hidden).any()


@dataclass(frozen=True, kw_only=True)
class ManipulationSettings(EpisodeSettings):
    """A manipulation set.

    Attributes:
        oracles: the scripted policy for each kind of target.
        markovian: closed-loop oracles and action noise (``noisy`` sets), else plan oracles (``play`` sets).
        max_noise: upper end of the noise level, which is drawn once per episode.
        random_action_probability: share of uniformly random actions.
        stacking_probability: interval from which an episode's probability of stacking cubes is drawn.
        visible_cube: condition on an episode; an episode that fails it is generated again.
    """

    oracles: dict[str, OracleSettings]
    markovian: bool = False
    max_noise: float = 0.1
    random_action_probability: float = 0.0
    stacking_probability: tuple[float, float] = (0.5, 0.5)
    visible_cube: VisibleCube | None = None

    def collector(self) -> EpisodeCollector:  # noqa: D102 # described in the base class
        return ManipulationCollector(self)


@dataclass(frozen=True, kw_only=True)
class PointMazeSettings(EpisodeSettings):
    """A maze set of the point agent, whose action is the direction of its next step.

    Attributes:
        noise: standard deviation of the Gaussian action noise.
        goal_distance: path length in cells from the start to the only goal of an episode (``stitch``). If ``None``, goals are
            corners, junctions and dead ends, and a new one is drawn when one is reached (``navigate``).
    """

    noise: float = 0.5
    goal_distance: int | None = None

    def collector(self) -> EpisodeCollector:  # noqa: D102
        return PointMazeCollector(self)


class EpisodeCollector(ABC):
    """A simulator, which is kept between episodes, and the policy that acts in it. Draws use numpy's global generator.

    Args:
        settings: the data set's.
        **options: further ones for the environment.
    """

    def __init__(self, settings: EpisodeSettings, **options: Any) -> None:
        self.env: Any = make_env_by_id(
            settings.environment_id, terminate_at_goal=False, max_episode_steps=settings.episode_steps, **options
        )

    def run(self, seed: int, on_step: Callable[[], object] = lambda: None) -> dict[str, np.ndarray] | None:
        """Run one episode from a reset with this seed; ``None`` if it fails the set's condition and must be generated again.

        Args:
            seed: of the reset.
            on_step: called after each step.
        """
        observation = self.begin(seed)
        rows = defaultdict(list)
        done = False
        while not done:
            action = np.clip(self.act(observation), -1, 1)
            following, _, terminated, truncated, info = self.env.step(action)
            done = terminated or truncated
            self.after_step(info)
            state = {name: info[key] for name, key in _STATE_BEFORE.items() if key in info}
            row = {"observations": observation, "actions": action, "terminals": done, **state}
            for name, value in row.items():
                rows[name].append(value)
            observation = following
            on_step()
        if not self.accepts(np.asarray(rows["qpos"])):
            return None
        pictures = {"observations": np.dtype(np.uint8)} if observation.dtype == np.uint8 else {}
        dtypes = _DTYPES | pictures
        return {name: np.asarray(values, dtype=dtypes.get(name, np.float32)) for name, values in rows.items()}

    @abstractmethod
    def begin(self, seed: int) -> np.ndarray:
        """Reset the simulator with this seed and choose the episode's targets; returns the first observation."""

    @abstractmethod
    def act(self, observation: np.ndarray) -> np.ndarray:
        """Choose an action, noise included; it is clipped afterwards."""

    @abstractmethod
    def after_step(self, info: dict[str, Any]) -> None:
        """Set a new target if the step has reached the current one."""

    def accepts(self, qpos: np.ndarray) -> bool:
        """Whether an episode with these positions ``[T, Q]`` belongs in the set."""
        return True


class ManipulationCollector(EpisodeCollector):
    """Pursue one target after another with the oracle for its kind."""

    _CUBE_POSITION = slice(14, 17)  # of the first cube in qpos

    def __init__(self, settings: ManipulationSettings) -> None:
        super().__init__(settings, mode="data_collection")
        self.settings = settings
        self.oracles = {}
        for kind, oracle in settings.oracles.items():
            module, name = oracle.path.split(":")
            self.oracles[kind] = getattr(importlib.import_module(module), name)(env=self.env, **oracle.options)

    def begin(self, seed: int) -> np.ndarray:  # noqa: D102 # described in the base class
        settings = self.settings
        observation, self._info = self.env.reset(seed=seed)
        low, high = settings.stacking_probability
        self._stacking = np.random.uniform(low, high) if low < high else low
        self._noise = np.random.uniform(0, settings.max_noise) * _MARKOV_NOISE_SCALE if settings.markovian else None
        self._pursue(observation, self._info)
        return observation

    def act(self, observation: np.ndarray) -> np.ndarray:  # noqa: D102
        if np.random.rand() < self.settings.random_action_probability:
            return self.env.action_space.sample()
        action = np.array(self._oracle.select_action(observation, self._info))
        return action if self._noise is None else action + np.random.normal(0, self._noise, action.shape)

    def after_step(self, info: dict[str, Any]) -> None:  # noqa: D102
        self._info = info
        if self._oracle.done:
            self._pursue(*self.env.unwrapped.set_new_target(p_stack=self._stacking))

    def accepts(self, qpos: np.ndarray) -> bool:  # noqa: D102
        condition = self.settings.visible_cube
        return condition is None or condition.holds(qpos[:, self._CUBE_POSITION])

    def _pursue(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        self._oracle = self.oracles[info["privileged/target_task"]]
        self._oracle.reset(observation, info)


class PointMazeCollector(EpisodeCollector):
    """Follow the shortest path through the maze, with noise."""

    def __init__(self, settings: PointMazeSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.maze = cast("Any", self.env.unwrapped)
        self.free_cells = [(int(i), int(j)) for i, j in np.argwhere(self.maze.maze_map == 0)]
        self.goal_cells = [cell for cell in self.free_cells if not self._in_hallway(cell)]

    def _in_hallway(self, cell: tuple[int, int]) -> bool:
        """Whether the cell is free on two opposite sides and has walls on the others."""
        (i, j), walls = cell, self.maze.maze_map
        sides = [int(walls[i - 1, j]), int(walls[i + 1, j]), int(walls[i, j - 1]), int(walls[i, j + 1])]
        return sides in ([0, 0, 1, 1], [1, 1, 0, 0])

    def cells_at(self, start: tuple[int, int], distance: int) -> list[tuple[int, int]]:
        """The cells whose shortest path from ``start`` has this many steps."""
        position = self.maze.ij_to_xy(start)
        _, distances = self.maze.get_oracle_subgoal(position, position)
        return [(int(i), int(j)) for i, j in np.argwhere(distances == distance)]

    def begin(self, seed: int) -> np.ndarray:  # noqa: D102
        start, distance = _draw(self.free_cells), self.settings.goal_distance
        goal = _draw(self.goal_cells if distance is None else self.cells_at(start, distance) or [start])
        return self.env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})[0]

    def act(self, observation: np.ndarray) -> np.ndarray:  # noqa: D102
        position = self.maze.get_xy()
        way = self.maze.get_oracle_subgoal(position, self.maze.cur_goal_xy)[0] - position
        action = way / (np.linalg.norm(way) + 1e-6)
        return action + np.random.normal(0, self.settings.noise, action.shape)

    def after_step(self, info: dict[str, Any]) -> None:  # noqa: D102
        if info["success"] and self.settings.goal_distance is None:
            # The environment's own method draws a goal near the cell too, but marks it at a NaN position in its model.
            goal = self.maze.ij_to_xy(_draw(self.goal_cells))
            self.maze.set_goal(goal_xy=self.maze.add_noise(goal))


def _draw(cells: list[tuple[int, int]]) -> tuple[int, int]:
    return cells[np.random.randint(len(cells))]


def _manipulation(
    environment: str,
    *kinds: str,
    random_actions: float = 0.1,
    options: Mapping[str, float | bool] = MappingProxyType({}),
    **common: Any,
) -> dict[str, EpisodeSettings]:
    """The play and the noisy set of an environment; ``kinds`` are the kinds of targets."""
    play, noisy = {"noise": 0.1, "noise_smoothing": 0.5}, {"min_norm": 0.4}
    return {
        f"{environment}-{data}-v0": ManipulationSettings(
            environment_id=f"{environment}-v0",
            oracles={
                kind: OracleSettings(
                    f"ogbench.manipspace.oracles.{style}.{kind}_{style}:{kind.capitalize()}{style.capitalize()}Oracle",
                    {**own, **options},
                )
                for kind in kinds
            },
            markovian=data == "noisy",
            random_action_probability=random_actions if data == "noisy" else 0.0,
            **common,
        )
        for data, style, own in (("play", "plan", play), ("noisy", "markov", noisy))
    }


def _point_maze(environment: str) -> dict[str, EpisodeSettings]:
    stitch = {"published_episodes": 5000, "episode_steps": 201, "goal_distance": 4}
    return {
        f"{environment}-{data}-v0": PointMazeSettings(environment_id=f"{environment}-v0", **settings)
        for data, settings in (("navigate", {}), ("stitch", stitch))
    }


_BUTTONS: dict[str, Any] = {"random_actions": 0.2, "options": {"gripper_always_closed": True}}
GENERATED_DATASETS: dict[str, EpisodeSettings] = {
    **_manipulation("cube-single", "cube", stacking_probability=(0.0, 0.0)),
    **_manipulation("cube-double", "cube", stacking_probability=(0.0, 0.25)),
    **_manipulation("cube-triple", "cube", stacking_probability=(0.05, 0.35), published_episodes=3000),
    **_manipulation("scene", "cube", "button", "drawer", "window", visible_cube=VisibleCube()),
    **_manipulation("puzzle-3x3", "button", **_BUTTONS),
    **_manipulation("puzzle-4x4", "button", **_BUTTONS),
    **_point_maze("pointmaze-medium"),
    **_point_maze("pointmaze-large"),
}
"""Data sets that can be generated here, by the name of their file."""

VISUAL_DATASETS = {
    f"visual-{name}": name
    for name in (
        "cube-single-play-v0",
        "cube-double-play-v0",
        "scene-play-v0",
        "puzzle-3x3-play-v0",
        "puzzle-4x4-play-v0",
    )
}
"""The paper's sets of pictures -> the sets of states that have the same episodes."""


def episode_settings(dataset: str) -> EpisodeSettings:
    """Settings of a set that can be generated; those of a set of pictures are its set of states', drawn."""
    if dataset in GENERATED_DATASETS or dataset not in VISUAL_DATASETS:
        return GENERATED_DATASETS[dataset]
    states = GENERATED_DATASETS[VISUAL_DATASETS[dataset]]
    return replace(states, environment_id=f"visual-{states.environment_id}")
