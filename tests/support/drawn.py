"""A small environment that draws its state: a bright point in a square is to be moved onto a dim one."""

import gymnasium
import numpy as np


class DrawnPoint(gymnasium.Env):
    """Pictures ``[size, size, 3]`` uint8; actions move the point by up to a tenth of the square."""

    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, size=16):
        self.size = size
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.goal = self.np_random.uniform(0, 1, (2, 2))
        return self._draw(), {}

    def step(self, action):
        self.point = np.clip(self.point + 0.1 * np.asarray(action), 0, 1)
        distance = float(np.linalg.norm(self.point - self.goal))
        return self._draw(), -distance, distance < 0.1, False, {"success": distance < 0.1}

    def _draw(self):
        picture = np.zeros(self.observation_space.shape, np.uint8)
        for place, colour in ((self.goal, (0, 90, 0)), (self.point, (255, 200, 0))):
            row, column = np.round(place * (self.size - 1)).astype(int)
            picture[row, column] = colour
        return picture


class TwoCameras(DrawnPoint):
    """The same point seen by two cameras and a vector of its place."""

    def __init__(self):
        super().__init__()
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            wrist=box(0, 255, (8, 8, 3), np.uint8), front=self.observation_space, joints=box(0, 1, (2,), np.float64)
        )

    def _draw(self):
        front = np.zeros((16, 16, 3), np.uint8)
        for place, colour in ((self.goal, (0, 90, 0)), (self.point, (255, 200, 0))):
            row, column = np.round(place * 15).astype(int)
            front[row, column] = colour
        return {"front": front, "wrist": front[::2, ::2], "joints": self.point.copy()}


class StatePoint(DrawnPoint):
    """The same point as four numbers; pictures are drawn on demand. Its window counts what it shows."""

    metadata = {"render_modes": ["rgb_array", "human"]}
    shown = 0

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, 1, (4,), np.float64)

    def _draw(self):
        StatePoint.shown += self.render_mode == "human"
        return np.concatenate([self.point, self.goal])

    def render(self):
        picture = np.zeros((16, 16, 3), np.uint8)
        for place, colour in ((self.goal, (0, 90, 0)), (self.point, (255, 200, 0))):
            row, column = np.round(place * 15).astype(int)
            picture[row, column] = colour
        return picture


ID, TWO_CAMERAS, STATES = (f"tests.support.drawn:{name}-v0" for name in ("DrawnPoint", "TwoCameras", "StatePoint"))
_KINDS = {
    "DrawnPoint-v0": (DrawnPoint, {}),
    "LargePoint-v0": (DrawnPoint, {"size": 24}),
    "TwoCameras-v0": (TwoCameras, {}),
    "StatePoint-v0": (StatePoint, {}),
}
for _name, (_kind, _options) in _KINDS.items():
    if _name not in gymnasium.registry:
        gymnasium.register(_name, _kind, max_episode_steps=12, kwargs=_options)


def drawn_arrays(environment="DrawnPoint-v0", *, episodes=6, seed=0):
    """Arrays of a random policy's episodes, as ``deflow data import`` takes them; every episode is cut at its end."""
    env = gymnasium.make(environment)
    rng = np.random.default_rng(seed)
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    rows = {name: [] for name in names}
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            values = (observation, action, reward, terminated, truncated and not terminated, following)
            for name, value in zip(names, values, strict=True):
                rows[name].append(value)
            observation = following
    return {name: values if isinstance(values[0], dict) else np.array(values) for name, values in rows.items()}


def two_camera_arrays():
    """The same with an array for each camera and the vector."""
    arrays = drawn_arrays("TwoCameras-v0")
    for name, prefix in (("observations", ""), ("next_observations", "next_")):
        steps = arrays.pop(name)
        arrays |= {f"{prefix}{key}": np.array([step[key] for step in steps]) for key in steps[0]}
    return arrays | {name: arrays[name].astype(np.float32) for name in ("joints", "next_joints")}
