"""Environments that are slightly off, registered when this module is imported: ``gym:tests.support.odd_simulators:NAME-v0``."""

import fractions

import gymnasium
import numpy as np
import torch

BOX = gymnasium.spaces.Box
STATE = np.zeros(2, np.float32)
ACTION = BOX(-1.0, 1.0, (1,), np.float32)
EPISODE_STEPS = 10


class Odd(gymnasium.Env):
    """Two numbers, one action, and one thing that is off.

    Args:
        observation: of every step.
        first: of every reset; like ``observation`` by default.
        space: observation space.
        actions: action space.
        reward: of every step.
        terminated: of every step.
        truncated: of every step.
        info: of every step.
        late: the step from which on ``reward`` and ``observation`` are these; right ones before it.
        reset: what a reset returns instead.
        step: what a step returns instead, or raises.
    """

    def __init__(
        self, *, observation=STATE, first=None, space=None, actions=ACTION, reward=1.0, terminated=False, truncated=False,
        info=None, late=0, reset=None, step=None,
    ):  # fmt: skip
        self.observation_space = BOX(-np.inf, np.inf, (2,), np.float32) if space is None else space
        self.action_space = actions
        self.first = observation if first is None else first
        self.steps, self.late, self.on_reset, self.on_step = 0, late, reset, step
        self.outcome = (observation, reward, terminated, truncated, {} if info is None else info)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return (STATE if self.late else self.first, {}) if self.on_reset is None else self.on_reset

    def step(self, action):
        self.steps += 1
        if self.steps < self.late:
            return STATE, 1.0, False, False, {}
        if isinstance(self.on_step, Exception):
            raise self.on_step
        return self.outcome if self.on_step is None else self.on_step


class Drawing(Odd):
    """Draws from NumPy's global generator in every step."""

    def step(self, action):
        _, *rest = super().step(action)
        return np.float32(np.random.normal(size=2)), *rest


class Echo(Odd):
    """Shows the action it executes as its first observation."""

    def step(self, action):
        _, *rest = super().step(action)
        return np.float32([action[0], 0.0]), *rest


gymnasium.register(
    "OddEcho-v0",
    entry_point=Echo,
    max_episode_steps=EPISODE_STEPS,
    kwargs={"actions": BOX(0.0, 255.0, (1,), np.float32)},
)
gymnasium.register("OddDrawing-v0", entry_point=Drawing, max_episode_steps=EPISODE_STEPS)


def box(low, high, dtype=np.float32, width=2):
    return BOX(low, high, (width,), dtype)


NAN = np.array([0.0, np.nan], np.float32)
FINE = {
    "RewardOfOne": {"reward": np.array([1.0])},
    "RewardZeroD": {"reward": np.array(1.0)},
    "RewardInt": {"reward": 1},
    "RewardBool": {"reward": True},
    "RewardNumpyBool": {"reward": np.bool_(True)},
    "RewardTensor": {"reward": torch.ones(1)},
    "RewardFloat16": {"reward": np.float16(1.0)},
    "Bytes": {"observation": np.array([3, 255], np.uint8), "space": box(0, 255, np.uint8)},
    "Integers": {"observation": np.array([3, -4]), "space": box(-10, 10, np.int64)},
    "Doubles": {"observation": np.array([3.0, -4.0]), "space": box(-10, 10, np.float64)},
    "List": {"observation": [3.0, -4.0]},
    "Bits": {"observation": np.array([1, 0], np.int8), "space": gymnasium.spaces.MultiBinary(2)},
    "DoubleActions": {"actions": BOX(-1.0, 1.0, (1,), np.float64)},
    "PixelActions": {"actions": BOX(0.0, 255.0, (1,), np.float32)},
    "FlagsOfNumpy": {"terminated": np.bool_(False), "truncated": np.array([False])},
    "FlagsInt": {"terminated": 0, "truncated": 0},
    "SuccessArray": {"info": {"success": np.array([1.0])}},
    "SuccessNumber": {"info": {"success": 1.0}},
    "NanAtTheEnd": {"observation": NAN, "terminated": True, "late": EPISODE_STEPS},
    "OutsideBounds": {"observation": np.array([3.0, 40.0]), "space": box(-10, 10)},
}
REFUSED = {
    "RewardNan": ({"reward": float("nan")}, "its first step cannot be used: the reward is nan; mend the environment"),
    "RewardText": ({"reward": "much"}, "the reward is 'much', not a number"),
    "RewardOfTwo": ({"reward": np.ones(2)}, "the reward is array([1., 1.]), not a number"),
    "RewardNone": ({"reward": None}, "the reward is None, not a number"),
    "RewardFraction": ({"reward": fractions.Fraction(1, 2)}, "the reward is Fraction(1, 2), not a number"),
    "Wide": ({"observation": np.zeros(3)}, "its reset cannot be used: the observation has shape (3,), observation_space says"),
    "WideInStep": ({"observation": np.zeros(3), "first": STATE}, "its first step cannot be used: the observation has shape (3,)"),
    "ThreeWide": (
        {"observation": np.zeros(3), "space": box(-1, 1, width=3)},
        "observations have shape (3,), those of the data (2,); the data belong to another environment",
    ),
    "NanAtReset": ({"observation": NAN}, "its reset cannot be used: the observation is not finite"),
    "NanInStep": ({"observation": NAN, "first": STATE}, "its first step cannot be used: the observation is not finite"),
    "NanWhereCut": (
        {"observation": NAN, "first": STATE, "truncated": True}, "its first step cannot be used: the observation is not finite"
    ),
    "InfinityAtTheEnd": (
        {"observation": np.array([0, np.inf]), "first": STATE, "terminated": True}, "the observation is not finite"
    ),
    "BeyondFloat32": ({"observation": np.array([0, 1e300])}, "the observation is not finite"),
    "Text": ({"observation": np.array(["a", "b"])}, "the observation has type <U1, expected numbers"),
    "DictObservation": ({"observation": {"position": STATE}}, "the observation is a dictionary of position, not an array"),
    "DictSpace": ({"space": gymnasium.spaces.Dict(position=box(-1, 1))}, "observations are a dictionary of position"),
    "TupleSpace": ({"space": gymnasium.spaces.Tuple([box(-1, 1)])}, "observations are Tuple("),
    "OldReset": ({"reset": STATE}, "its reset cannot be used: reset returns no pair (observation, info)"),
    "OldStep": ({"step": (STATE, 1.0, False, {})}, "its first step cannot be used: it does not return what gymnasium's"),
    "Raises": ({"step": RuntimeError("no\nrobot")}, "its first step cannot be used: RuntimeError: no robot; mend the"),
    "TerminatedText": ({"terminated": "False"}, "terminated is 'False', not a number"),
    "TruncatedNone": ({"truncated": None}, "truncated is None, not a number"),
    "TerminatedTwo": ({"terminated": 2}, "terminated is 2, neither true nor false"),
    "InfoNone": ({"info": "fell"}, "info is 'fell', not a dictionary"),
    "SuccessText": ({"info": {"success": "yes"}}, "info[\"success\"] is 'yes', not a number"),
    "SuccessOfTwo": ({"info": {"success": np.ones(2)}}, 'info["success"] is array([1., 1.]), not a number'),
    "IntegerActions": (
        {"actions": BOX(-1, 1, (1,), np.int64)},
        "takes actions in Box(-1, 1, (1,), int64) of int64; a bounded vector of real numbers is needed",
    ),
    "Choices": ({"actions": gymnasium.spaces.Discrete(3)}, "takes actions in Discrete(3); a bounded vector of real numbers"),
    "Unbounded": ({"actions": BOX(-np.inf, np.inf, (1,))}, "a bounded vector of real numbers is needed"),
    "TwoActions": ({"actions": box(-1, 1)}, "actions have shape (2,), those of the data (1,); the data belong to another"),
}  # fmt: skip
LATE = {"NanAtThree": {"observation": NAN, "late": 3}, "RewardAtThree": {"reward": "much", "late": 3}}

for _name, _options in [*FINE.items(), *((name, options) for name, (options, _) in REFUSED.items()), *LATE.items()]:
    gymnasium.register(f"Odd{_name}-v0", entry_point=Odd, max_episode_steps=EPISODE_STEPS, kwargs=_options)


def odd(name):
    """The gymnasium id of one."""
    return f"tests.support.odd_simulators:Odd{name}-v0"
