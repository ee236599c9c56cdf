# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A policy's actions in the landscape of its critics at one state (Figure 2 of the paper), drawn and measured.

The paper shows in a picture that a one-step policy can average modes or leave the data. Here both are measured at one state s of
the data, for the data's actions at similar states, the prior's (base) samples, the policy's, and a second run's:

* **distance to the data**: of an action, the mean of its root-mean-square differences per dimension to the k nearest of the
  actions that the data took at the states nearest to s. An action is **outside the data** if that distance is larger than 95%
  of those actions' own, each measured against the others.
* **effective number of modes**: the Vendi score of order 1 (Friedman and Dieng, TMLR 2023), the exponential of the entropy of
  the eigenvalues of K / n, where K_ij = exp(-d_ij^2 / (2 h^2)), d being the same root-mean-square difference and h a bandwidth.
  n samples in m tight, equally heavy clusters further apart than a few h give m; a policy that always does the same gives 1; a
  broad cluster counts for more than one, so compare scores at the same h.
* **mean Q** of the run's critics: of RUN's, also for the second run's samples.

States are compared as :func:`~deflow_torchrl.data.intrinsic_action_variance` does: Euclidean, on observations as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from deflow_torchrl.algorithms import Learner
from deflow_torchrl.errors import InputError
from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.paths import make_writable_folder
from deflow_torchrl.reports.figures import FORMATS, Points, check_report_extra, plot_landscape
from deflow_torchrl.runs.evaluate import LoadedRun, load_run
from deflow_torchrl.tasks.data import load_task_data

LOW, HIGH = -1.0, 1.0
"""Bounds of every action: data are mapped to them when they are loaded."""

BANDWIDTH = 0.3
NEAREST_ACTIONS = 5
_QUANTILE = 0.95
_RESOLUTION = 81
_MARGIN = 0.15
_SMALLEST_WIDTH = 0.05


@dataclass(frozen=True, eq=False)
class ActionSlice:
    """A plane in action space.

    Attributes:
        origin: a point of it, ``[A]``.
        directions: two orthonormal directions, ``[2, A]``.
        labels: names of the two coordinates.
        explained: share of the variance of the samples they were computed from that lies in the plane; None for two action
            dimensions.
    """

    origin: np.ndarray
    directions: np.ndarray
    labels: tuple[str, str]
    explained: float | None = None

    def coordinates(self, actions: np.ndarray) -> np.ndarray:
        """Orthogonal projection of actions ``[n, A]`` to the plane, ``[n, 2]`` in action units."""
        return (actions - self.origin) @ self.directions.T

    def actions(self, coordinates: np.ndarray) -> np.ndarray:
        """The actions ``[n, A]`` at coordinates ``[n, 2]``."""
        return self.origin + coordinates @ self.directions


def dimension_slice(actions: np.ndarray, dims: tuple[int, int]) -> ActionSlice:
    """The plane of two action dimensions, the others at the mean of ``actions [n, A]``.

    Raises:
        InputError: if the two are no different dimensions of the actions.
    """
    action_dim = actions.shape[1]
    if len(set(dims)) != 2 or not all(0 <= dim < action_dim for dim in dims):
        raise InputError(f"dims {dims[0]},{dims[1]}: expected two different numbers from 0 to {action_dim - 1}")
    origin = actions.mean(0)
    origin[list(dims)] = 0.0  # so that a coordinate is the action's own value
    return ActionSlice(
        origin, np.eye(action_dim)[list(dims)], (f"action dimension {dims[0]}", f"action dimension {dims[1]}")
    )


def principal_slice(actions: np.ndarray) -> ActionSlice:
    """The plane through the mean of ``actions [n, A]`` along their two leading principal directions.

    A direction's largest entry is positive, so that the picture does not depend on the sign an eigenvector happens to have.
    """
    origin = actions.mean(0)
    variances, directions = np.linalg.eigh(np.atleast_2d(np.cov(actions.T, ddof=0)))
    leading = directions.T[::-1][:2]
    leading = leading * np.sign(leading[[0, 1], np.abs(leading).argmax(1)])[:, None]
    total = float(variances.sum())
    explained = float(variances[-2:].sum()) / total if total > 0 else None
    return ActionSlice(origin, leading, ("first principal direction", "second principal direction"), explained)


def effective_modes(actions: np.ndarray, *, bandwidth: float = BANDWIDTH) -> float:
    """Effective number of modes of ``actions [n, A]``: the Vendi score of order 1 with a Gaussian kernel.

    Args:
        actions: the samples.

    Keyword Args:
        bandwidth: h, in action units per dimension.

    Returns:
        Between 1 (all alike) and n (all far apart).

    Examples:
        >>> import numpy as np
        >>> round(effective_modes(np.array([[-0.9, 0.0]] * 3 + [[0.9, 0.0]] * 3)), 6)
        2.0
    """
    squared = np.square(_differences(actions, actions))
    eigenvalues = np.linalg.eigvalsh(np.exp(-squared / (2 * bandwidth**2)) / len(actions))
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def distances_to_data(actions: np.ndarray, data: np.ndarray, *, k: int = NEAREST_ACTIONS) -> np.ndarray:
    """Mean root-mean-square difference per dimension to the k nearest of the data's actions.

    Args:
        actions: ``[n, A]``.
        data: ``[m, A]``.

    Keyword Args:
        k: how many of them; all where there are fewer.

    Returns:
        ``[n]``, in action units.
    """
    return np.sort(_differences(actions, data), axis=1)[:, :k].mean(1)


def data_distances(data: np.ndarray, *, k: int = NEAREST_ACTIONS) -> np.ndarray:
    """:func:`distances_to_data` of each of the data's actions ``[m, A]`` to the others, ``[m]``."""
    differences = _differences(data, data)
    np.fill_diagonal(differences, np.inf)
    return np.sort(differences, axis=1)[:, : min(k, len(data) - 1)].mean(1)


def _differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Root-mean-square difference per dimension of each pair, ``[n, m]``."""
    left, right = torch.from_numpy(first), torch.from_numpy(second)
    # The way by matrix products loses the small differences, which decide here.
    distances = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances / first.shape[1] ** 0.5).numpy()


def critic_values(learner: Learner, observation: Tensor, actions: Tensor) -> Tensor:
    """Q(s, a), the mean of a method's critics.

    Args:
        learner: a method whose loss has ``critics``.
        observation: s, ``[O]``.
        actions: ``[n, A]``.

    Returns:
        ``[n]``.

    Raises:
        InputError: if the method has no critics.
    """
    critics = getattr(learner.loss, "critics", None)
    if critics is None:
        raise InputError(
            f"{learner.acting_policy} has no critics, so there is no landscape of Q to draw its actions in"
        )
    inputs = TensorDict(observation=observation.expand(len(actions), -1), action=actions, batch_size=[len(actions)])
    with torch.no_grad():
        return critics.values(inputs).mean(0)


def sample_actions(
    learner: Learner, observation: Tensor, number: int, *, action_dim: int, seed: int
) -> dict[str, Tensor]:
    """Sample a method's actions at one state; torch's global generators are left as they were.

    Args:
        learner: the method.
        observation: s, ``[O]``.
        number: n.

    Keyword Args:
        action_dim: A.
        seed: of the noise. Prior and policy, and two methods, draw the same first numbers.

    Returns:
        ``policy [n, A]``; where the method has a prior also ``base [n, A]``, which the policy has shifted where it writes it.
    """

    def draw(policy: TensorDictModuleBase) -> TensorDictBase:
        inputs = TensorDict(observation=observation.repeat(number, 1), batch_size=[number])
        with torch.no_grad(), generators_set_aside(seed):
            if "noise" in policy.in_keys:
                # A policy that chooses among several candidates reads a row of noise for each.
                inputs["noise"] = torch.randn(number, *getattr(policy, "noise_shape", (action_dim,)))
            return policy(inputs)

    acted = draw(learner.policy)
    samples = {"policy": acted["action"]}
    if "base_action" in learner.policy.out_keys:
        samples["base"] = acted["base_action"]
    elif learner.prior is not None:
        samples["base"] = draw(learner.prior)[learner.prior.out_keys[-1]]
    return samples


def nearest_states(states: Tensor, state: int, number: int) -> Tensor:
    """Indices of the states ``[N, O]`` nearest to one of them, that one first: ``[number]``, or ``[N]`` if there are fewer."""
    distances = (states - states[state]).square().sum(-1)
    distances[state] = -1.0
    return distances.topk(min(number, len(states)), largest=False).indices


def draw_landscape(
    run: Path,
    second: Path | None = None,
    *,
    state: int,
    out: Path | None = None,
    dims: tuple[int, int] | None = None,
    samples: int = 256,
    neighbours: int = 64,
    bandwidth: float = BANDWIDTH,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw a run's actions at one state of its data over a slice of Q, and measure them.

    Args:
        run: run folder of a method with critics.
        second: run folder of the same task; its samples are drawn and measured too, by ``run``'s critics.

    Keyword Args:
        state: which transition of the training data.
        out: ``.png`` or ``.svg``, overwritten; ``RUN/landscape-stateN.png`` by default.
        dims: two action dimensions; the leading principal directions of the base samples (of the data's actions, where the
            method has no prior) by default.
        samples: actions of each policy.
        neighbours: states of the data, this one included, whose actions are "the data's".
        bandwidth: h of the effective number of modes.
        seed: of the noise.

    Returns:
        The measurements; ``samples``: role (``data``, ``base``, ``policy``, ``second``) -> label, ``mean_q``,
        ``distance_to_data`` (mean and largest), ``outside_data`` (share) and ``effective_modes``; and the ``file``.

    Raises:
        InputError: if a folder is no run or has no checkpoint, the runs are of different tasks, the method has no critics, the
            actions have one dimension, or a number is out of range.
        MissingExtraError: without the ``reports`` extra.
    """
    check_report_extra()
    out = _file(out, run, state)
    if samples < 2 or neighbours < 2 or not bandwidth > 0:
        raise InputError(
            f"samples={samples} and neighbours={neighbours} must be at least 2, bandwidth={bandwidth} positive"
        )
    loaded = load_run(run, device="cpu")
    if loaded.config.chunk > 1:
        raise InputError(
            f"{run}: its actions are chunks of {loaded.config.chunk} steps; a landscape is of single actions"
        )
    if not isinstance(loaded.state["observation_dim"], int):
        raise InputError(
            f"{run}: its observations are pictures, of which no nearest states are known; a landscape needs vectors"
        )
    action_dim = loaded.state["action_dim"]
    if action_dim < 2:
        raise InputError(f"{run}: the actions of {loaded.task.name} have one dimension; a slice needs two")
    if dims is not None:
        dimension_slice(np.zeros((1, action_dim)), dims)  # refused before the data is read
    other = None if second is None else load_run(second, device="cpu")
    if other is not None:
        _check_same_task(run, loaded, second, other)
    critic_values(loaded.learner, torch.zeros(loaded.state["observation_dim"]), torch.zeros(1, action_dim))
    observation, data = _data_at(loaded, state, neighbours)

    drawn = sample_actions(loaded.learner, observation, samples, action_dim=action_dim, seed=seed)
    groups: dict[str, Tensor] = {"data": data, **{role: drawn[role] for role in ("base", "policy") if role in drawn}}
    if other is not None:
        groups["second"] = sample_actions(other.learner, observation, samples, action_dim=action_dim, seed=seed)[
            "policy"
        ]
    actions = {role: group.double().numpy() for role, group in groups.items()}
    centre = actions.get("base", actions["data"])
    plane = principal_slice(centre) if dims is None else dimension_slice(centre, dims)
    method = loaded.config.algo.name
    refines = "base_action" in loaded.learner.policy.out_keys
    names = {
        "data": "data, nearest states",
        "base": f"{method}, base",
        "policy": f"{method}, actions{' (arrows from base)' if refines else ''}",
    }
    if other is not None:
        names["second"] = f"second run ({other.config.algo.name}), actions"
    within = float(np.quantile(data_distances(actions["data"]), _QUANTILE))
    measured = {}
    for role, group in groups.items():
        far = data_distances(actions[role]) if role == "data" else distances_to_data(actions[role], actions["data"])
        measured[role] = {
            "label": names[role],
            "number": len(group),
            "mean_q": float(critic_values(loaded.learner, observation, group).mean()),
            "distance_to_data": {"mean": float(far.mean()), "max": float(far.max())},
            "outside_data": float((far > within).mean()),
            "effective_modes": effective_modes(actions[role], bandwidth=bandwidth),
        }
    coordinates = {role: plane.coordinates(group) for role, group in actions.items()}
    grid = _grid(np.concatenate(list(coordinates.values())), limited=dims is not None)
    result = {
        "run": str(run),
        "second": None if second is None else str(second),
        "task": loaded.config.task,
        "method": method,
        "step": loaded.state["step"],
        "state": state,
        "slice": {
            "kind": "principal" if dims is None else "dimensions",
            "dims": None if dims is None else list(dims),
            "origin": plane.origin.tolist(),
            "directions": plane.directions.tolist(),
            "explained_variance": plane.explained,
        },
        "seed": seed,
        "neighbours": len(data),
        "nearest_actions": NEAREST_ACTIONS,
        "data_distance_95": within,
        "bandwidth": bandwidth,
        "refinement_rms": float(np.sqrt(np.square(actions["policy"] - actions["base"]).mean())) if refines else None,
        "samples": measured,
    }
    make_writable_folder(out.parent)
    try:
        plot_landscape(
            out,
            title=f"{loaded.config.task}\nstate {state} of the data, step {loaded.state['step']}",
            labels=(f"{plane.labels[0]} (action units)", f"{plane.labels[1]} (action units)"),
            grid=grid,
            qvalues=_qvalues_on(grid, plane, loaded.learner, observation),
            points=[
                Points(role, f"{names[role]}: {_in_words(measured[role])}", coordinates[role])
                for role in ("base", "second", "policy", "data")
                if role in groups
            ],
            arrows=(coordinates["base"], coordinates["policy"]) if refines else None,
        )
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror or error}); choose another file with --out") from error
    return {**result, "file": str(out)}


def _file(out: Path | None, run: Path, state: int) -> Path:
    out = run / f"landscape-state{state}.png" if out is None else out
    if out.suffix not in FORMATS:
        raise InputError(f"{out} ends in {out.suffix or 'nothing'}; a landscape is written as .png or .svg")
    if out.is_dir():
        raise InputError(f"{out} is a folder; --out takes the file to write")
    return out


def _check_same_task(run: Path, loaded: LoadedRun, second: Path | None, other: LoadedRun) -> None:
    sizes = [{name: it.state[name] for name in ("observation_dim", "action_dim")} for it in (loaded, other)]
    if loaded.task.identity != other.task.identity or sizes[0] != sizes[1]:
        raise InputError(
            f"{run} is about {loaded.task.name}, {second} about {other.task.name}: only runs of one task share a landscape"
        )


def _data_at(loaded: LoadedRun, state: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """The observation ``[O]`` of a transition, and the actions of the states nearest to it ``[m, A]``."""
    config = loaded.config
    dataset = load_task_data(
        loaded.task, root=config.data_root, download=config.download, memmap=config.storage == "memmap"
    )
    assert dataset is not None
    if not 0 <= state < len(dataset):
        raise InputError(
            f"state {state} is out of range; the data has {len(dataset)} transitions, 0 to {len(dataset) - 1}"
        )
    states = dataset.states()
    return states[state], dataset.action[nearest_states(states, state, neighbours)]


def _in_words(numbers: dict[str, Any]) -> str:
    return f"{numbers['effective_modes']:.1f} effective modes, {numbers['outside_data']:.0%} outside the data"


def _grid(coordinates: np.ndarray, *, limited: bool) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows of a square grid around the points ``[n, 2]``; ``limited`` to the actions' bounds."""
    low, high = coordinates.min(0), coordinates.max(0)
    half = max(float((high - low).max()), _SMALLEST_WIDTH) * (0.5 + _MARGIN)
    first, last = (low + high) / 2 - half, (low + high) / 2 + half
    if limited:
        first, last = first.clip(min=LOW), last.clip(max=HIGH)
    columns, rows = np.linspace(first, last, _RESOLUTION).T
    return columns, rows


def _qvalues_on(
    grid: tuple[np.ndarray, np.ndarray], plane: ActionSlice, learner: Learner, observation: Tensor
) -> np.ndarray:
    """Q on the grid, ``[H, W]``; NaN outside the action space."""
    columns, rows = np.meshgrid(*grid)
    actions = plane.actions(np.stack([columns.ravel(), rows.ravel()], axis=1))
    values = critic_values(learner, observation, torch.from_numpy(actions.astype(np.float32))).double().numpy()
    values[(np.abs(actions) > HIGH + 1e-6).any(1)] = np.nan
    return values.reshape(columns.shape)
