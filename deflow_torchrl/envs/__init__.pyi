# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .adroit import D4RLAdroitReward as D4RLAdroitReward
from .adroit import PenDrop as PenDrop
from .d4rl import normalized_score as normalized_score
from .d4rl import reference_returns as reference_returns
from .factory import make_env as make_env
from .factory import make_gym_env as make_gym_env
from .online import EpisodeStart as EpisodeStart
from .online import OnlineEpisodes as OnlineEpisodes
from .online import is_replayable as is_replayable
from .online import make_online_env as make_online_env
from .reexports import make_minari_env as make_minari_env
