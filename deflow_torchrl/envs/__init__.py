# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Task name to environment: OGBench single-task problems, and the environments of Minari sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports

if TYPE_CHECKING:  # what type checkers and editors see
    from deflow_torchrl.envs.adroit import D4RLAdroitReward as D4RLAdroitReward
    from deflow_torchrl.envs.adroit import PenDrop as PenDrop
    from deflow_torchrl.envs.d4rl import normalized_score as normalized_score
    from deflow_torchrl.envs.d4rl import reference_returns as reference_returns
    from deflow_torchrl.envs.factory import make_env as make_env
    from deflow_torchrl.envs.factory import make_gym_env as make_gym_env
    from deflow_torchrl.envs.minari import make_minari_env as make_minari_env
    from deflow_torchrl.envs.online import EpisodeStart as EpisodeStart
    from deflow_torchrl.envs.online import OnlineEpisodes as OnlineEpisodes
    from deflow_torchrl.envs.online import is_replayable as is_replayable
    from deflow_torchrl.envs.online import make_online_env as make_online_env

_EXPORTS = {
    "make_env": ".factory",
    "make_gym_env": ".factory",
    "make_minari_env": ".minari",
    "make_online_env": ".online",
    "is_replayable": ".online",
    "EpisodeStart": ".online",
    "OnlineEpisodes": ".online",
    "D4RLAdroitReward": ".adroit",
    "PenDrop": ".adroit",
    "normalized_score": ".d4rl",
    "reference_returns": ".d4rl",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
