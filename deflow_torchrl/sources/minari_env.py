# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The environment of a Minari set, in the conventions of its data."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deflow_torchrl.envs.d4rl import d4rl_task, scoring_task
from deflow_torchrl.envs.observations import ObservationLayout, observation_layout
from deflow_torchrl.errors import InputError, one_line
from deflow_torchrl.sources.minari_sets import check_spec, minari_episodes, open_minari_dataset, quiet

if TYPE_CHECKING:
    import gymnasium
    from minari import MinariDataset

_LOG = logging.getLogger(__name__)
_EPISODES_MEASURED = 20  # enough to tell a convention, little beside reading the set
_SAME_BOUND = 1e-6
_GONE_FROM_SPECIFICATIONS = ("apply_api_compatibility", "autoreset")  # of gymnasium before 1.0


def minari_layout(
    dataset_id: str, space: Any, observation_keys: Sequence[str] | None = None, *, source: str | None = None
) -> ObservationLayout:
    """Lay out the observations of a set, or of its environment, as one array.

    Goal observations of ``D4RL/antmaze/*`` become D4RL's 29 numbers: ``achieved_goal`` (x, y), then ``observation`` (27). The
    desired goal is left out, as in D4RL: evaluation has one fixed goal. Other dictionaries give all their entries in the
    space's own, sorted order. ``observation_keys`` overrides both; see
    :func:`deflow_torchrl.envs.observations.observation_layout`.

    Args:
        dataset_id: the set's id.
        space: observation space of the set or of its environment.
        observation_keys: entries of goal observations, in order.

    Keyword Args:
        source: owner of the space, for error messages; the set by default.

    Raises:
        InputError: if observations are not numbers, or a key is unknown.
    """
    task = d4rl_task(dataset_id)
    if observation_keys is None and task is not None and hasattr(space, "spaces"):
        observation_keys = task.observation_keys
    return observation_layout(space, observation_keys, source=source or f"Minari set {dataset_id}")


def action_bounds(space: Any, *, rescale_actions: bool, source: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Check that policies, whose actions are in [-1, 1], can act in a space.

    Args:
        space: action space.

    Keyword Args:
        rescale_actions: accept other finite bounds, to be mapped onto [-1, 1].
        source: owner of the space, for error messages.

    Returns:
        (low, high), each ``[A]``, if actions are to be rescaled; ``None`` if they are in [-1, 1] already.

    Raises:
        InputError: if actions are not a vector of real numbers, or have other bounds and are not to be rescaled.
    """
    from gymnasium import spaces

    if not isinstance(space, spaces.Box) or space.dtype.kind != "f" or len(space.shape) != 1:
        raise InputError(
            f"{source}: actions are {space}; DeFlow's policies give vectors of real numbers (a Box of floating point)"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if (low == -1).all() and (high == 1).all():
        return None
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise InputError(f"{source}: actions are {space}, without finite bounds that could be mapped onto [-1, 1]")
    if not rescale_actions:
        alike = (low == low[0]).all() and (high == high[0]).all()
        bounds = f"[{low[0]:g}, {high[0]:g}]" if alike else f"{low.tolist()} and {high.tolist()}"
        raise InputError(
            f"{source}: actions are bounded by {bounds}, policies act in [-1, 1]; "
            "pass rescale_actions=True to map the data's and the environment's onto it"
        )
    return low, high


def _conventions(dataset: MinariDataset, env: gymnasium.Env) -> tuple[type[gymnasium.Wrapper] | None, str | None]:
    """Compare the conventions of a set's first episodes with those of its environment.

    * door, hammer, relocate: the sign of the hand-to-object term. The environment gets the sign of the data; if the data do
      not show it, D4RL's sets have D4RL's.
    * pen: whether an episode ends when it is dropped, as in the data; D4RL's always end.
    * ``D4RL/antmaze/*``: reaching the goal ends an episode of the environment, as in D4RL.

    Args:
        dataset: the set.
        env: its environment as :mod:`gymnasium` makes it.

    Returns:
        The wrapper that gives the environment the conventions of the data or of D4RL, if it needs one; a line for the log.
    """
    from deflow_torchrl.envs import adroit
    from deflow_torchrl.envs.wrappers import EndAtSuccess

    known = d4rl_task(dataset.id)
    if known is not None and known.ends_early == "success":
        if not getattr(env.unwrapped, "continuing_task", True):
            return None, None
        return EndAtSuccess, "the environment goes on at the goal; its episodes are ended there, as in D4RL"
    task = adroit.adroit_task(env.spec.name if env.spec else None)
    if env.spec is None or task is None:
        return None, None
    episodes = [
        (observations, episode)
        for episode in itertools.islice(minari_episodes(dataset), _EPISODES_MEASURED)
        if (observations := np.asarray(episode.observations)).shape[1:] == (task.observation_dim,)
    ]
    if task.name == "pen":
        dropped = [(adroit.pen_dropped(observations[1:]), episode) for observations, episode in episodes]
        ended = [episode.terminations[low].any() for low, episode in dropped if low.any()]
        if not any(ended) and known is None:
            return None, None
        note = "the environment goes on when the pen is dropped; its episodes are ended there, as in D4RL"
        return adroit.PenDrop, note + (", though the data's are not" if ended and not any(ended) else "")
    data = adroit.hand_to_object_sign(task, [(observations, episode.rewards) for observations, episode in episodes])
    simulated, name = adroit.environment_sign(env), env.spec.id
    wanted = -1 if data is None and known is not None else data
    if (wanted, simulated) == (-1, 1):
        return adroit.D4RLAdroitReward, (
            f"{name} rewards the distance from hand to object with +0.1, {'the data' if data == -1 else 'D4RL'} with -0.1; "
            "D4RLAdroitReward corrects the environment"
        )
    if (wanted, simulated) == (1, -1):
        return None, (
            f"the data reward the distance from hand to object with +0.1, {name} with -0.1 as D4RL does; returns of both "
            "differ slightly"
        )
    if wanted == 1 or (wanted is None and simulated == 1):
        return None, (
            f"{'data and environment reward' if wanted else 'the environment rewards'} the distance from hand to object with "
            "+0.1, D4RL with -0.1; scores normalised with D4RL's returns are a little too high"
        )
    return None, None


_measured: dict[tuple[str, int, bool], type[gymnasium.Wrapper] | None] = {}


def _wrapper_of(dataset: MinariDataset, env: gymnasium.Env, *, eval_env: bool) -> type[gymnasium.Wrapper] | None:
    """The wrapper of :func:`_conventions`; computed and logged once per process and state of the set's files."""
    path = Path(dataset.spec.data_path)
    key = (str(path), max((file.stat().st_mtime_ns for file in path.iterdir()), default=0), eval_env)
    if key not in _measured:
        _measured[key], note = _conventions(dataset, env)
        if note is not None:
            _LOG.warning(f"{dataset.id}: {note}")
    return _measured[key]


def make_minari_env(
    dataset_id: str,
    *,
    eval_env: bool = True,
    observation_keys: Sequence[str] | None = None,
    rescale_actions: bool = False,
    download: bool = True,
    **kwargs: Any,
) -> gymnasium.Env:
    """Make the gymnasium environment a Minari set belongs to, in the conventions of its data.

    Observations are one float32 array, laid out as the data's (:func:`minari_layout`: D4RL's antmaze is ``achieved_goal`` then
    ``observation``, other dictionaries are in sorted order); images stay uint8. ``info["success"]`` is always there, false
    where the environment knows none. ``reset(seed=...)`` fixes the whole episode. Adroit and D4RL antmaze are brought to
    the data's or D4RL's conventions where they differ (:func:`_conventions`), and episodes of D4RL's sets are as long
    as D4RL's; each change is logged in one line.

    Args:
        dataset_id: for example ``D4RL/door/human-v2``.

    Keyword Args:
        eval_env: the environment the set names for evaluation, where it names one, instead of the one it was recorded in.
        observation_keys: entries of goal observations, in order.
        rescale_actions: map [-1, 1] onto the environment's own finite action bounds.
        download: fetch a missing set.
        **kwargs: forwarded to ``gymnasium.make``; ``max_episode_steps`` overrides D4RL's.

    Raises:
        InputError: as :func:`open_minari_dataset`; if the set names no environment, or the environment is not installed or
            does not fit the data.
        MissingExtraError: if the ``minari`` extra is not installed.
    """
    dataset = open_minari_dataset(dataset_id, download=download)
    return adapt_environment(
        dataset,
        recover_environment(dataset, eval_env=eval_env, **kwargs),
        eval_env=eval_env,
        observation_keys=observation_keys,
        rescale_actions=rescale_actions,
    )


make_rescaled_minari_env = functools.partial(make_minari_env, rescale_actions=True)
"""Makes the environment of ``minari:ID`` for :func:`deflow_torchrl.envs.make_gym_env`, with actions in [-1, 1]."""


def adapt_environment(
    dataset: MinariDataset,
    env: gymnasium.Env,
    *,
    eval_env: bool = True,
    observation_keys: Sequence[str] | None = None,
    rescale_actions: bool = False,
) -> gymnasium.Env:
    """Give an environment the conventions of a set's data; see :func:`make_minari_env`.

    Args:
        dataset: the set.
        env: its environment as gymnasium makes it; closed if it does not fit.

    Keyword Args:
        eval_env: whether it is the set's environment for evaluation.
        observation_keys: entries of goal observations, in order.
        rescale_actions: map [-1, 1] onto the environment's own finite action bounds.

    Raises:
        InputError: if widths or action bounds of data and environment differ, or policies cannot act in it.
    """
    from gymnasium.wrappers import RescaleAction

    from deflow_torchrl.envs.seeding import SeededReset
    from deflow_torchrl.envs.wrappers import FlatObservation, ReportSuccess

    name = env.spec.id if env.spec else "the environment"
    source = f"{name}, the environment of Minari set {dataset.id}"
    try:
        layout = minari_layout(dataset.id, dataset.observation_space, observation_keys)
        own = minari_layout(dataset.id, env.observation_space, observation_keys, source=source)
        shapes = [list(space.shape or ()) for space in (dataset.action_space, env.action_space)]
        for what, data, simulated in (("observations", layout, own), ("actions", *shapes)):
            if data != simulated:
                raise InputError(
                    f"Minari set {dataset.id}: {what} are {data} in the data, {simulated} in {name}; "
                    "the data belong to another environment or another version of it"
                )
        bounds = action_bounds(env.action_space, rescale_actions=rescale_actions, source=source)
        # Data and environment are each mapped onto [-1, 1] by their own bounds.
        for side in ("low", "high"):
            of_data, of_env = getattr(dataset.action_space, side, np.nan), getattr(env.action_space, side)
            if not np.allclose(np.asarray(of_data, np.float64), of_env, rtol=0.0, atol=_SAME_BOUND):
                raise InputError(
                    f"Minari set {dataset.id}: actions are {dataset.action_space} in the data, {env.action_space} in {name}; "
                    "the same action would mean something else, the data belong to another environment or another version of it"
                )
        wrapper = _wrapper_of(dataset, env, eval_env=eval_env)
    except BaseException:
        env.close()
        raise
    if wrapper is not None:
        env = wrapper(env)
    if bounds is not None:
        env = RescaleAction(env, np.float32(-1.0), np.float32(1.0))
    return SeededReset(FlatObservation(ReportSuccess(env), layout))


def recover_environment(dataset: MinariDataset, *, eval_env: bool = True, **kwargs: Any) -> gymnasium.Env:
    """Make the set's environment as gymnasium makes it; every error is one line.

    Episodes of D4RL's sets are as long as D4RL's, because scores are of whole episodes (``max_episode_steps`` overrides it).

    Raises:
        InputError: if the set names none, or it cannot be made on this machine.
    """
    import gymnasium

    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="glfw")
        # minari warns if versions differ from those at recording; widths and rewards are compared instead.
        try:
            said = dataset.storage.metadata.get("eval_env_spec") if eval_env else None
            said = said or dataset.storage.metadata.get("env_spec")
            if not said:
                raise InputError("it was recorded without one")
            fields = {name: value for name, value in json.loads(said).items() if name not in _GONE_FROM_SPECIFICATIONS}
            name = fields["id"]
            if name not in gymnasium.registry:  # gymnasium would call its entry point anyway
                raise gymnasium.error.NameNotFound(f"{name} is not registered; import the package that registers it")
            check_spec(fields, dataset.id, exact=False)
            specification = gymnasium.envs.registration.EnvSpec.from_json(json.dumps(fields))
            specification.entry_point = gymnasium.registry[name].entry_point
            if "max_episode_steps" not in kwargs:
                kwargs |= _episode_limit(dataset.id, name, specification.max_episode_steps)
            return gymnasium.make(specification, **{"disable_env_checker": True, **kwargs})
        except InputError as error:
            raise InputError(f"the environment of Minari set {dataset.id} cannot be made ({error})") from error
        except Exception as error:
            raise InputError(
                f"the environment of Minari set {dataset.id} cannot be made ({type(error).__name__}: {one_line(error)}); "
                "install what it needs, for gymnasium-robotics: pip install 'deflow-torchrl[minari]'"
            ) from error


def _episode_limit(dataset_id: str, environment_id: str, own: int | None) -> dict[str, int]:
    """Options of ``gymnasium.make``: D4RL's time limit for D4RL's sets, none for others."""
    scored = scoring_task(dataset_id, environment_id)
    if scored is None or own == scored.max_steps:
        return {}
    steps = own or "any number of"
    if d4rl_task(dataset_id) is None:
        _say_once(
            f"{dataset_id}: episodes of its environment have {steps} steps, D4RL's have {scored.max_steps}; scores normalised "
            "with D4RL's returns do not compare with D4RL's"
        )
        return {}
    _say_once(
        f"{dataset_id}: the set's environment cuts episodes after {steps} steps, D4RL after {scored.max_steps}; they are cut "
        "as in D4RL"
    )
    return {"max_episode_steps": scored.max_steps}


@functools.cache
def _say_once(line: str) -> None:
    _LOG.warning(line)
