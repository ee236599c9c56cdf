# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Numbers of a run from held-out data alone, where there is no simulator to try the policy in.

None of them is a success rate, and over eleven runs of one task none ranked the runs by success (docs/train.md).

* **Cloning**: of a flow, the matching loss of DeFlow Eq. 5 on held-out actions and their negative log-likelihood under the
  continuous flow, by its divergence (instantaneous change of variables, Chen et al. 2018); of a Gaussian policy its
  log-likelihood.
* **Actions**: mean-square shift of the base action, and the share of action dimensions at their bounds.
* **Critics**: Q of the held-out actions against the returns that were observed after them, where the last reward of an episode
  that was cut goes on. Those are returns of whoever made the data: a critic of a better policy is larger.
* **Fitted Q evaluation** (Le et al. 2019): new critics of the fixed policy, each trained on its own bootstrap sample of the
  training episodes, and its value at the starts of the held-out episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.algorithms import Learner
from deflow_torchrl.algorithms.base import ProblemSpec, learner_with_critics
from deflow_torchrl.algorithms.settings import BootstrapConfig
from deflow_torchrl.data import TransitionDataset
from deflow_torchrl.data.returns import ReturnsToGo
from deflow_torchrl.errors import InputError
from deflow_torchrl.generators import generators_set_aside
from deflow_torchrl.modules.policies import is_flow, last_policy
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import OffPolicyLoss
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports.statistics import kendall_tau, stratified_bootstrap
from deflow_torchrl.runs.build import make_problem, step_gamma
from deflow_torchrl.runs.evaluate import ACTING, LoadedRun, load_run
from deflow_torchrl.tasks import get_task
from deflow_torchrl.tasks.data import load_task_data
from deflow_torchrl.trainers import UpdateStep

ROWS = 2_000
"""Most held-out transitions that are read, evenly spaced."""
_LIKELIHOOD_STEPS = 50
_AT_BOUND = 1 - 1e-4  # data are clipped to 1 - 1e-5 when they are loaded
_BINS = 5
_TAU_RESAMPLES = 200
_MEMBERS = 8
_STUDENT = 2.364624  # 97.5% quantile of Student's distribution of one degree of freedom fewer
_FIT_TAU = 0.1
_TIME_CONSTANTS = 5  # after so many of 1 / (tau (1 - gamma)) updates less than 1% of the value is missing
FEW_EPISODES = 10
"""Below so many held-out episodes an interval over them says little."""


def evaluate_offline(
    out: Path,
    *,
    data: str | None = None,
    updates: int | None = None,
    device: str | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Judge a run's acting policy by held-out episodes; no environment is stepped.

    Args:
        out: run folder.

    Keyword Args:
        data: task, Minari set or folder whose episodes are the held-out ones; the validation split of the run's by default.
        updates: of the fitted Q evaluation; by default 50 / (1 - gamma), as many as its targets need to settle.
        device: of the networks; the run's own by default.
        seed: of all draws; torch's global generators are left as they were.
        show_progress: show progress bars on standard error.

    Returns:
        ``step``, ``held_out`` (``data``, ``episodes``, ``transitions``), ``gamma``, and ``cloning``, ``actions``, ``critics`` and
        ``fitted_q``, each None where the method has no such part.

    Raises:
        InputError: if ``out`` is no run folder, its actions are chunks, or there are no held-out episodes that fit it.
    """
    loaded = load_run(out, policy=ACTING, device=device)
    config = loaded.config
    if config.chunk > 1:
        raise InputError(f"{out} acts in chunks of {config.chunk} actions; --offline reads single steps")
    held, name = _held_out(loaded, out, data)
    rows = torch.linspace(0, len(held) - 1, min(ROWS, len(held)), device=held.device).round().long().unique()
    transitions = held[rows].to(loaded.device)
    gamma = step_gamma(config, loaded.task)
    with generators_set_aside(seed):
        found = {
            "step": loaded.state["step"],
            "held_out": {"data": name, "episodes": len(held.start_rows), "transitions": len(held)},
            "gamma": gamma,
            "cloning": _cloning(loaded.learner, transitions),
            "actions": _actions(loaded.learner, transitions),
            "critics": None,
            "fitted_q": None,
        }
        if "rewards" not in held.about:
            returns = ReturnsToGo(held, gamma=gamma).returns
            found["critics"] = _critics(loaded.learner, transitions, returns[rows], _episode(held, rows))
            train = _load(loaded, loaded.task, "train")
            assert train is not None
            sizes: dict[str, Any] = {
                key: loaded.state[key] for key in ("observation_dim", "action_dim", "reward_range")
            }
            problem = make_problem(config, **sizes, device=loaded.device, data=train)
            policy = loaded.learner.policy
            count = updates or settling_updates(gamma)
            fitted = fit_q(policy, problem, train, held, gamma=gamma, updates=count, show_progress=show_progress)
            found["fitted_q"] = {**fitted, "observed": float(returns[held.start_rows].mean())}
    return found


def _held_out(loaded: LoadedRun, out: Path, data: str | None) -> tuple[TransitionDataset, str]:
    """The held-out episodes and their name."""
    task = loaded.task if data is None else get_task(data)
    held = _load(loaded, task, "val" if data is None else "train")
    if held is None:
        raise InputError(
            f"{out} has no held-out episodes: {task.dataset} has no validation split; name data that it was not trained on "
            "with --held-out"
        )
    expected = loaded.state["observation_dim"], loaded.state["action_dim"]
    size = held.observation_shape[-1] if len(held.observation_shape) == 1 else list(held.observation_shape)
    if not held.entries and (size, held.action.shape[-1]) != expected:
        raise InputError(
            f"{task.dataset}: observations and actions are {size} and {held.action.shape[-1]} wide, those of {out} {expected[0]} "
            f"and {expected[1]}"
        )
    return held, task.dataset


def _load(loaded: LoadedRun, task: Any, split: Any) -> TransitionDataset | None:
    config = loaded.config
    found = load_task_data(task, split=split, root=config.data_root, download=config.download, device=loaded.device)
    return None if found is None else found.stacked(config.frame_stack or 1)


def _episode(dataset: TransitionDataset, rows: Tensor) -> Tensor:
    return torch.searchsorted(dataset.episode_starts, rows, right=True) - 1


def _cloning(learner: Learner, transitions: TensorDict) -> dict[str, Any] | None:
    """How well the policy that clones the data predicts held-out actions; per action dimension, in nats."""
    candidates = (learner.prior, getattr(learner.loss, "flow_policy", None), learner.policy)
    for policy in candidates:
        if policy is not None and is_flow(policy):
            return {"kind": "flow", **flow_likelihood(policy, transitions)}
    if hasattr(last_policy(learner.policy).module, "log_prob"):
        with torch.no_grad():
            found = acting.log_prob(learner.policy, transitions, transitions["action"])
        return {"kind": "gaussian", "negative_log_likelihood": float(-found.mean()) / transitions["action"].shape[-1]}
    return None


def flow_likelihood(
    policy: TensorDictModuleBase, transitions: TensorDictBase, *, steps: int = _LIKELIHOOD_STEPS
) -> dict[str, float]:
    """Matching loss of a flow and negative log-likelihood of actions under it, both the mean over action dimensions.

    log p(a) = log N(x_0) - integral of div v(x_t, t) dt along dx/dt = v from x_0 at t = 0 to a at t = 1, by the midpoint rule
    backwards in time; the divergence is exact, by one backward pass for each action dimension. The policy's own Euler steps are
    fewer, and it clips.

    Args:
        policy: a flow policy.
        transitions: its observations and ``action [B, A]``.

    Keyword Args:
        steps: of the integration.

    Examples:
        >>> from deflow_torchrl.modules import FlowMatchingPolicy
        >>> class Still(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 0 * x[..., -3:-1]
        >>> data = TensorDict(observation=torch.zeros(1, 1), action=torch.zeros(1, 2), batch_size=[1])
        >>> round(flow_likelihood(FlowMatchingPolicy(Still(), 2), data)["negative_log_likelihood"], 4)  # log(2 pi) / 2
        0.9189
    """
    action = transitions["action"]
    with torch.no_grad():
        velocity = acting.velocity(policy, transitions)
        matching = terms.flow_matching(velocity, action, torch.randn_like(action), torch.rand_like(action[..., :1]))
    divergence = torch.zeros(len(action), device=action.device)
    x = action
    for step in range(steps, 0, -1):
        with torch.no_grad():
            slope = velocity(x, torch.full_like(x[..., :1], step / steps))
        middle = (x - slope / (2 * steps)).requires_grad_()
        slope = velocity(middle, torch.full_like(x[..., :1], (step - 0.5) / steps))
        for dimension in range(action.shape[-1]):
            (gradient,) = torch.autograd.grad(slope[..., dimension].sum(), middle, retain_graph=True)
            divergence += gradient[..., dimension] / steps
        x = x - slope.detach() / steps
    likelihood = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1) - divergence
    return {
        "matching_loss": float(matching.mean()),
        "negative_log_likelihood": float(-likelihood.mean()) / action.shape[-1],
    }


def _actions(learner: Learner, transitions: TensorDict) -> dict[str, Any]:
    """Where the policy's actions are: at the bounds, and how far from the base action that they were made of."""
    policy, action = learner.policy, transitions["action"]
    state = transitions.exclude("action", "next")
    key = acting.noise_key(policy)
    if key is not None and not hasattr(policy, "noise_shape"):
        state.set(key, torch.randn_like(action))
    with torch.no_grad():
        acted = policy(state.copy())
        flow = getattr(learner.loss, "flow_policy", None)
        base = acted.get("base_action", None)
        if base is None and flow is not None and flow is not policy and key in state.keys(True):
            base = acting.act(flow, state, state[key])
    shift = acted.get("refinement", None)
    if shift is None and base is not None:
        shift = acted["action"] - base
    delta = getattr(learner.loss, "target_divergence", None)
    return {
        "mean_square_shift": None if shift is None else float(shift.square().mean()),
        "target_divergence": None if delta is None else float(delta),
        "at_bounds": float((acted["action"].abs() >= _AT_BOUND).float().mean()),
        "data_at_bounds": float((action.abs() >= _AT_BOUND).float().mean()),
        "mean_square_distance_to_data": float((acted["action"] - action).square().mean()),
    }


def _critics(learner: Learner, transitions: TensorDict, returns: Tensor, episode: Tensor) -> dict[str, Any] | None:
    """Q(s, a) of the data's actions against observed returns to go."""
    critics = getattr(learner.loss, "critics", None)
    if critics is None:
        return None
    with torch.no_grad():
        values = critics.values(transitions).mean(0)
    q, g = values.double().cpu().numpy(), returns.double().cpu().numpy()
    by_episode = [np.flatnonzero(episode.cpu().numpy() == number) for number in episode.unique().tolist()]

    def agreement(drawn: np.ndarray) -> np.ndarray:
        rows = [np.concatenate([by_episode[int(number)] for number in numbers]) for numbers in drawn]
        return np.asarray([kendall_tau(q[some], g[some]) or 0.0 for some in rows])

    order = np.argsort(q, kind="stable")
    parts = [part for part in np.array_split(order, _BINS) if len(part)]
    tau = stratified_bootstrap([list(range(len(by_episode)))], agreement, resamples=_TAU_RESAMPLES)
    return {
        "bias": float((q - g).mean()),
        "root_mean_square_error": float(np.sqrt(np.square(q - g).mean())),
        "kendall_tau": asdict(tau),
        "calibration": [{"q": float(q[part].mean()), "return": float(g[part].mean())} for part in parts],
    }


class FittedQLoss(OffPolicyLoss):
    """Critics of a fixed policy, each with targets and weights of its own (fitted Q evaluation by TD(0)).

    Args:
        critics: J critics.
        policy: the policy; it is not trained.

    The input has ``weight [*B, J]``: how often a row's episode is in each critic's bootstrap sample.
    """

    out_keys = ["loss_qvalue"]

    def __init__(self, critics: Any, policy: TensorDictModuleBase) -> None:
        super().__init__(reduction="mean")
        self._add_critics(critics, num_qvalue_nets=1, deactivate_vmap=False)
        self.__dict__["policy"] = policy

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states = self.critics.state_keys
        return [*states, self.tensor_keys.action, "weight", *self._next_keys(*states)]

    def _optional_keys(self) -> list[NestedKey]:
        return []

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        following = self._next(tensordict)
        with torch.no_grad():
            values = self.critics.values(self.acting(following), target=True)
            target = torch.stack([self._bootstrap(tensordict, value) for value in values])
        error = (self.critics.values(tensordict) - target).square() * tensordict["weight"].movedim(-1, 0)
        return {"loss_qvalue": self._reduce(error.mean(0), tensordict)}

    def acting(self, state: TensorDictBase) -> TensorDictBase:
        """A state with an action of the policy."""
        return self._with_action(state, self.policy(state.copy())[self.tensor_keys.action])


def settling_updates(gamma: float) -> int:
    """Updates after which targets that follow by 0.1 hold all but 1% of a discounted return.

    Examples:
        >>> settling_updates(0.98)
        2500
    """
    return round(_TIME_CONSTANTS / (_FIT_TAU * max(1 - gamma, 1e-3)))


def fit_q(
    policy: TensorDictModuleBase,
    problem: ProblemSpec,
    train: TransitionDataset,
    held: TransitionDataset,
    *,
    gamma: float,
    updates: int,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Value of a policy at the starts of held-out episodes by fitted Q evaluation on the training episodes.

    Args:
        policy: maps observations to actions.
        problem: what the critics are built for.
        train: whose transitions they learn from.
        held: at whose starts they are asked.

    Keyword Args:
        gamma: discount of a step.
        updates: of the critics.
        show_progress: show a progress bar on standard error.

    Returns:
        ``value`` (mean over critics and starts of the discounted return); its 95% interval ``low``, ``high``, Student's for the
        spread of the critics, each of its own bootstrap sample of the episodes, and that of the starts' mean; ``halfway``, the
        value after half of the updates, from which it should not differ by more than the interval; and ``updates``.
    """
    device = problem.device
    loss = FittedQLoss(problem.critics(_MEMBERS), policy)
    settings = BootstrapConfig(lr=1e-3, tau=_FIT_TAU, gamma=gamma)
    update = UpdateStep(learner_with_critics(settings, problem, loss, policy, evaluated_policies={}))
    number = train.num_episodes
    drawn = torch.randint(number, (_MEMBERS, number), device=device)
    weights = torch.stack([member.bincount(minlength=number) for member in drawn], -1).float()
    starts = held[held.start_rows].to(device).exclude("next")

    def values() -> Tensor:
        with torch.no_grad():
            return loss.critics.values(loss.acting(starts))

    halfway = values()
    for step in progress_bar(range(updates), desc="fitted Q evaluation", unit="update", disable=not show_progress):
        rows = torch.randint(len(train), (256,), device=device)
        update(train[rows].set("weight", weights[_episode(train, rows)]))
        if step == updates // 2:
            halfway = values()
    update.check_finite()
    found = values().double()
    value, of_starts = float(found.mean()), found.mean(0)
    variance = float(found.mean(1).var()) + (float(of_starts.var()) / len(of_starts) if len(of_starts) > 1 else 0.0)
    half = _STUDENT * variance**0.5
    return {
        "value": value, "low": value - half, "high": value + half, "halfway": float(halfway.mean()), "updates": updates,
    }  # fmt: skip


def describe(result: dict[str, Any]) -> Sequence[str]:
    """The result in lines for a reader."""
    held, cloning, actions = result["held_out"], result["cloning"], result["actions"]
    lines = [f"{held['episodes']} held-out episodes ({held['transitions']:,} transitions) of {held['data']}"]
    if held["episodes"] < FEW_EPISODES:
        lines.append("so few episodes make every interval below a guess: name more with --held-out")
    if cloning is None:
        lines.append("cloning: the method has no policy with a likelihood")
    else:
        matching = f"matching loss {cloning['matching_loss']:.4f}, " if cloning["kind"] == "flow" else ""
        nats = cloning["negative_log_likelihood"]
        lines.append(
            f"cloning ({cloning['kind']}): {matching}negative log-likelihood {nats:.3f} nats per action dimension"
        )
    shift, delta = actions["mean_square_shift"], actions["target_divergence"]
    moved = "" if shift is None else f"mean-square shift of the base action {shift:.3g}"
    moved += "" if shift is None or delta is None else f" (delta {delta:g})"
    lines.append(
        f"actions: {moved}{', ' if moved else ''}{actions['at_bounds']:.1%} of the dimensions at the bounds "
        f"(data {actions['data_at_bounds']:.1%})"
    )
    if (critics := result["critics"]) is not None:
        tau = critics["kendall_tau"]
        interval = "" if tau["low"] is None else f" ({tau['low']:.2f} to {tau['high']:.2f})"
        lines.append(
            f"Q - observed return of the data's actions: {critics['bias']:+.3g} on average, root mean square "
            f"{critics['root_mean_square_error']:.3g}; ranks agree by Kendall's tau {tau['value']:.2f}{interval}"
        )
        bins = ", ".join(f"{it['q']:.3g}: {it['return']:.3g}" for it in critics["calibration"])
        lines.append(f"calibration, mean Q: mean return, by fifths of Q: {bins}")
    if (fitted := result["fitted_q"]) is not None:
        lines.append(
            f"fitted Q evaluation: discounted return {fitted['value']:.4g} (95% {fitted['low']:.4g} to {fitted['high']:.4g}), "
            f"after half of the updates {fitted['halfway']:.4g}; observed in the data {fitted['observed']:.4g}"
        )
        if not fitted["low"] <= fitted["halfway"] <= fitted["high"]:
            lines.append("it still moves by more than its interval: give it more updates before you compare")
    else:
        lines.append("the data have no rewards: no returns, no fitted Q evaluation")
    return lines
