# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""How one episode of an OGBench data set is collected: OGBench's settings as a table, and its two protocols.

Manipulation (``cube``, ``scene``, ``puzzle``): a scripted oracle pursues one random target after another. In ``play`` sets it
follows an open-loop plan that carries smoothed noise; in ``noisy`` sets it is closed-loop and Gaussian noise of a per-episode
level is added to its actions. Mazes (``pointmaze``): the point follows the maze's shortest path with Gaussian noise, to one
random goal after another (``navigate``) or to one goal four cells away, where it stays (``stitch``).

The values and the order of random draws follow ``data_gen_scripts/`` of https://github.com/seohongpark/ogbench (1d41409).
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from deflow_torchrl.envs.factory import make_env_by_id

# Noise of the Markov oracle relative to its level: x, y, z, yaw, gripper.
_MARKOV_NOISE_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])
# What a step's info says of the simulator's state before the step, by the name of the array it is stored in.
_STATE_BEFORE = {"qpos": "prev_qpos", "qvel": "prev_qvel", "button_states": "prev_button_states"}
_DTYPES = {"terminals": np.dtype(bool), "button_states": np.dtype(np.int64)}


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings(ABC):
    """What every generated data set has.

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
        """Make the simulator and what acts in it."""


@dataclass(frozen=True)
class OracleSettings:
    """One scripted policy: ``module:class`` and its options."""

    path: str
    options: dict[str, float | bool]


@dataclass(frozen=True)
class VisibleCube:
    """Where the scene's cube must stay, in metres: goal images would be ambiguous if it were hidden outside the drawer.

    Attributes:
        below_y: it never gets this far to the right.
        drawer_y: this far to the left it can only be in the drawer...
        drawer_z: ...that is, at a height in this closed interval.
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
        visible_cube: condition on an episode; one that fails it is made anew.
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
    """A maze set of the point agent, which acts by the direction it is to go.

    Attributes:
        noise: standard deviation of the Gaussian action noise.
        goal_distance: path length in cells from the start to the episode's one goal (``stitch``); with ``None`` goals are
            drawn from the corners, junctions and dead ends, a new one whenever one is reached (``navigate``).
    """

    noise: float = 0.5
    goal_distance: int | None = None

    def collector(self) -> EpisodeCollector:  # noqa: D102
        return PointMazeCollector(self)


class EpisodeCollector(ABC):
    """A simulator, kept between episodes, and what acts in it. Draws come from numpy's global generator."""

    @abstractmethod
    def run(self, seed: int) -> dict[str, np.ndarray] | None:
        """Run one episode whose reset has this seed; ``None`` if it fails the set's condition and is to be made anew."""


class _Rows:
    """The rows of one episode, with the types of the published files."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Any]] = {}

    def add(self, observation: np.ndarray, action: np.ndarray, done: bool, info: Mapping[str, Any]) -> None:
        state = {name: info[key] for name, key in _STATE_BEFORE.items() if key in info}
        row = {"observations": observation, "actions": action, "terminals": done, **state}
        for name, value in row.items():
            self._rows.setdefault(name, []).append(value)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(rows, dtype=_DTYPES.get(name, np.float32)) for name, rows in self._rows.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._rows[name])


class ManipulationCollector(EpisodeCollector):
    """Pursue one target after another with the oracle for its kind."""

    _CUBE_POSITION = slice(14, 17)  # of the first cube in qpos

    def __init__(self, settings: ManipulationSettings) -> None:
        self.settings = settings
        self.env: Any = make_env_by_id(
            settings.environment_id,
            terminate_at_goal=False,
            mode="data_collection",
            max_episode_steps=settings.episode_steps,
        )
        self.oracles = {task: self._make(oracle) for task, oracle in settings.oracles.items()}

    def _make(self, settings: OracleSettings) -> Any:
        module, name = settings.path.split(":")
        return getattr(importlib.import_module(module), name)(env=self.env, **settings.options)

    def run(self, seed: int) -> dict[str, np.ndarray] | None:  # noqa: D102
        settings, env = self.settings, self.env
        observation, info = env.reset(seed=seed)
        low, high = settings.stacking_probability
        stacking = np.random.uniform(low, high) if low < high else low
        noise = np.random.uniform(0, settings.max_noise) * _MARKOV_NOISE_SCALE if settings.markovian else None
        oracle = self.oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        rows = _Rows()
        done = False
        while not done:
            if np.random.rand() < settings.random_action_probability:
                action = env.action_space.sample()
            else:
                action = np.array(oracle.select_action(observation, info))
                if noise is not None:
                    action = action + np.random.normal(0, noise, action.shape)
            action = np.clip(action, -1, 1)
            following, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            if oracle.done:
                target_observation, target_info = env.unwrapped.set_new_target(p_stack=stacking)
                oracle = self.oracles[target_info["privileged/target_task"]]
                oracle.reset(target_observation, target_info)
            rows.add(observation, action, done, info)
            observation = following
        condition = settings.visible_cube
        if condition is not None and not condition.holds(rows["qpos"][:, self._CUBE_POSITION]):
            return None
        return rows.arrays()


class PointMazeCollector(EpisodeCollector):
    """Follow the shortest path through the maze, with noise."""

    def __init__(self, settings: PointMazeSettings) -> None:
        self.settings = settings
        self.env: Any = make_env_by_id(
            settings.environment_id, terminate_at_goal=False, max_episode_steps=settings.episode_steps
        )
        self.maze = cast("Any", self.env.unwrapped)
        self.walls: np.ndarray = self.maze.maze_map
        self.free_cells = [(int(i), int(j)) for i, j in np.argwhere(self.walls == 0)]
        self.goal_cells = [cell for cell in self.free_cells if not self._in_hallway(cell)]

    def _in_hallway(self, cell: tuple[int, int]) -> bool:
        """Whether the way leads straight on: free on two opposite sides, walls on the others."""
        (i, j), walls = cell, self.walls
        sides = [int(walls[i - 1, j]), int(walls[i + 1, j]), int(walls[i, j - 1]), int(walls[i, j + 1])]
        return sides in ([0, 0, 1, 1], [1, 1, 0, 0])

    def cells_at(self, start: tuple[int, int], distance: int) -> list[tuple[int, int]]:
        """The cells whose shortest path from ``start`` has this many steps."""
        position = self.maze.ij_to_xy(start)
        _, distances = self.maze.get_oracle_subgoal(position, position)
        return [(int(i), int(j)) for i, j in np.argwhere(distances == distance)]

    def run(self, seed: int) -> dict[str, np.ndarray]:  # noqa: D102
        settings, env, maze = self.settings, self.env, self.maze
        start = _draw(self.free_cells)
        if settings.goal_distance is None:
            goal = _draw(self.goal_cells)
        else:
            goal = _draw(self.cells_at(start, settings.goal_distance) or [start])
        observation, _ = env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})
        rows = _Rows()
        done = False
        while not done:
            position = maze.get_xy()
            way = maze.get_oracle_subgoal(position, maze.cur_goal_xy)[0] - position
            action = way / (np.linalg.norm(way) + 1e-6)
            action = np.clip(action + np.random.normal(0, settings.noise, action.shape), -1, 1)
            following, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            if info["success"] and settings.goal_distance is None:
                # The environment draws a goal near the cell too, but then marks it at a NaN position in its model.
                maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(_draw(self.goal_cells))))
            rows.add(observation, action, done, info)
            observation = following
        return rows.arrays()


def _draw(cells: list[tuple[int, int]]) -> tuple[int, int]:
    return cells[np.random.randint(len(cells))]


@dataclass(frozen=True)
class _Manipulation:
    """What the sets of one manipulation environment differ in; the rest is common to the family."""

    kinds: tuple[str, ...]
    published_episodes: int = 1000
    stacking_probability: tuple[float, float] = (0.5, 0.5)
    random_action_probability: float = 0.1
    visible_cube: VisibleCube | None = None
    options: dict[str, float | bool] = field(default_factory=dict)

    def settings(self, environment_id: str, *, markovian: bool) -> ManipulationSettings:
        style, common = ("markov", {"min_norm": 0.4}) if markovian else ("plan", {"noise": 0.1, "noise_smoothing": 0.5})
        return ManipulationSettings(
            environment_id=environment_id,
            published_episodes=self.published_episodes,
            oracles={
                kind: OracleSettings(
                    f"ogbench.manipspace.oracles.{style}.{kind}_{style}:{kind.capitalize()}{style.capitalize()}Oracle",
                    {**common, **self.options},
                )
                for kind in self.kinds
            },
            markovian=markovian,
            random_action_probability=self.random_action_probability if markovian else 0.0,
            stacking_probability=self.stacking_probability,
            visible_cube=self.visible_cube,
        )


_MANIPULATION = {
    "cube-single": _Manipulation(("cube",), stacking_probability=(0.0, 0.0)),
    "cube-double": _Manipulation(("cube",), stacking_probability=(0.0, 0.25)),
    "cube-triple": _Manipulation(("cube",), stacking_probability=(0.05, 0.35), published_episodes=3000),
    "scene": _Manipulation(("cube", "button", "drawer", "window"), visible_cube=VisibleCube()),
    "puzzle-3x3": _Manipulation(("button",), random_action_probability=0.2, options={"gripper_always_closed": True}),
    "puzzle-4x4": _Manipulation(("button",), random_action_probability=0.2, options={"gripper_always_closed": True}),
}
_POINT_MAZES = ("pointmaze-medium", "pointmaze-large")

GENERATED_DATASETS: dict[str, EpisodeSettings] = {
    **{
        f"{environment}-{data}-v0": row.settings(f"{environment}-v0", markovian=markovian)
        for environment, row in _MANIPULATION.items()
        for data, markovian in (("play", False), ("noisy", True))
    },
    **{f"{maze}-navigate-v0": PointMazeSettings(environment_id=f"{maze}-v0") for maze in _POINT_MAZES},
    **{
        f"{maze}-stitch-v0": PointMazeSettings(
            environment_id=f"{maze}-v0", published_episodes=5000, episode_steps=201, goal_distance=4
        )
        for maze in _POINT_MAZES
    },
}
"""Data sets that can be generated here, by the name of their file."""
