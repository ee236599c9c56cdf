# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What a method hands to the trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.objectives import SoftUpdate, ValueEstimators
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from deflow_torchrl.algorithms.settings import BootstrapConfig, CandidatesConfig, FlowCriticConfig, given
from deflow_torchrl.errors import InputError
from deflow_torchrl.modules.best_of_n import BestOfNPolicy
from deflow_torchrl.modules.critics import CriticEnsemble, EncodedCritics
from deflow_torchrl.modules.diffusion import ContinuousNoiseNetwork, DiffusionPolicy, NoiseNetwork, Schedule
from deflow_torchrl.modules.encoders import ImpalaEncoder, JoinedEncoder, make_encoder
from deflow_torchrl.modules.flow import FlowMatchingPolicy
from deflow_torchrl.modules.flow_critic import FlowCritic, FlowCriticEnsemble, make_flow_critic_network
from deflow_torchrl.modules.networks import (
    MakeMLP,
    make_one_step_network,
    make_qvalue_networks,
    make_value_network,
    make_velocity_network,
)
from deflow_torchrl.modules.normalizer import ObservationNormalizer
from deflow_torchrl.modules.policies import OneStepPolicy, parts
from deflow_torchrl.modules.tanh_gaussian import TanhGaussianPolicy, make_tanh_gaussian_network

_STATE = "state"
"""Key of the one vector that an encoder makes of the observations."""


@dataclass(frozen=True)
class ProblemSpec:
    """What a method builds its networks for: specs of the data, and the settings that the task gives.

    Attributes:
        observation_dim: O, the width of all observations together, of pictures encoded; from ``observation_spec`` where that is
            given.
        action_dim: A; from ``action_spec`` where that is given.
        hidden_dims: widths of the hidden layers of every network.
        gamma: the task's discount.
        q_aggregation: the task's aggregation of target critics.
        target_divergence: the task's delta.
        device: where the parameters live.
        observation_spec: entries of the state, each a vector ``[n]`` or a picture ``[H, W, C]``; ``observation [O]`` where it is
            not given.
        action_spec: the action, a bounded vector ``[A]``; inside [-1, 1] where it is not given.
        normalizer: of all observations together, ``[O]``; each part has a copy; None leaves them as they are.
        encoder: name of the encoder of pictures (:func:`~deflow_torchrl.modules.make_encoder`); each part has one of its own.
        reward_range: smallest and largest reward of a step in the data; None where nothing is known.
        reward_moments: mean and standard deviation of the data's rewards; None where nothing is known.
        chunk: steps h of an action, whose A numbers are those of all steps.
        num_updates: updates of the run, over which a method may move a learning rate or a schedule.

    Raises:
        InputError: if an observation is neither a vector nor a picture, pictures come with a normaliser, or neither widths nor
            specs are given.
    """

    observation_dim: int | None = None
    action_dim: int | None = None
    hidden_dims: Sequence[int] = (512, 512, 512, 512)
    gamma: float = 0.99
    q_aggregation: str = "mean"
    target_divergence: float = 1e-3
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    observation_spec: Composite | None = None
    action_spec: Bounded | None = None
    normalizer: ObservationNormalizer | None = None
    encoder: str = "impala_small"
    reward_range: tuple[float, float] | None = None
    reward_moments: tuple[float, float] | None = None
    chunk: int = 1
    num_updates: int = 1_000_000

    def __post_init__(self) -> None:
        observation, action = self.observation_spec, self.action_spec
        if observation is None and self.observation_dim is not None:
            observation = Composite(observation=Unbounded((self.observation_dim,)))
        if action is None and self.action_dim is not None:
            action = Bounded(-1.0, 1.0, (self.action_dim,))
        if observation is None or action is None:
            raise InputError("a problem needs observation_spec and action_spec, or observation_dim and action_dim")
        for name, value in (
            ("observation_spec", observation),
            ("action_spec", action),
            ("action_dim", action.shape[-1]),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "observation_dim", self._encoded_width())

    def _encoded_width(self) -> int:
        if not self.has_pictures:
            return sum(spec.shape[0] for spec in cast("Composite", self.observation_spec).values(True, True))
        if self.normalizer is not None:
            raise InputError("pictures are scaled by their encoder and have no normalisation; leave normalize=none")
        with torch.device("meta"):  # nothing is computed or drawn
            return self._picture_encoder().out_features

    def _picture_encoder(self) -> ImpalaEncoder | JoinedEncoder:
        try:
            return make_encoder(self.encoder, cast("Composite", self.observation_spec))
        except ValueError as error:
            raise InputError(str(error)) from error

    @property
    def has_pictures(self) -> bool:
        """Whether an observation is a picture."""
        return any(len(spec.shape) != 1 for spec in cast("Composite", self.observation_spec).values(True, True))

    @property
    def sizes(self) -> tuple[int, int, Sequence[int]]:
        """(O, A, hidden_dims), as the ``make_..._network`` functions take them."""
        return cast("int", self.observation_dim), cast("int", self.action_dim), self.hidden_dims

    @property
    def state_key(self) -> NestedKey:
        """Where policies and critics read the state."""
        return _STATE if self._is_encoded else self._keys[0]

    @property
    def bounds(self) -> dict[str, Any]:
        """``low`` and ``high`` of the actions: numbers where they are the same in every dimension."""
        space = cast("Bounded", self.action_spec).space
        named = {"low": space.low, "high": space.high}
        return {name: bound[0].item() if bool((bound == bound[0]).all()) else bound for name, bound in named.items()}

    def make_encoder(self) -> TensorDictModule | None:
        """Make an encoder that writes ``state_key``, for one part; None where the parts read the one observation as it is."""
        if not self._is_encoded:
            return None
        module = self._picture_encoder() if self.has_pictures else _Join(copy.deepcopy(self.normalizer))
        return TensorDictModule(module, in_keys=self._keys, out_keys=[_STATE])

    def encoded(self, module: TensorDictModule) -> TensorDictModule:
        """A policy or value network that reads ``state_key``, on the device, behind its encoder."""
        encoder = self.make_encoder()
        return (module if encoder is None else TensorDictSequential(encoder, module)).to(self.device)

    def flow_policy(
        self, num_steps: int, out_keys: Sequence[NestedKey] = ("action",), *, layer_norm: bool = False
    ) -> TensorDictModule:
        """A flow over the paper's velocity network, or that with LayerNorm."""
        flow = FlowMatchingPolicy(
            make_velocity_network(*self.sizes, layer_norm=layer_norm),
            self.sizes[1],
            num_steps,
            in_keys=(self.state_key, "noise"),
            out_keys=out_keys,
            **self.bounds,
        )
        return self.encoded(flow)

    def diffusion_policy(self, num_steps: int, *, dropout: float, schedule: Schedule = "ddpm") -> TensorDictModule:
        """A diffusion policy over IDQL's noise network, in continuous time over that of SRPO's authors."""
        observation_dim, action_dim, _ = self.sizes
        kind = NoiseNetwork if schedule == "ddpm" else ContinuousNoiseNetwork
        network = kind(observation_dim, action_dim, dropout=dropout)
        keys = (self.state_key, "noise")
        return self.encoded(
            DiffusionPolicy(network, action_dim, num_steps, schedule=schedule, in_keys=keys, **self.bounds)
        )

    def value_network(self, mlp: MakeMLP | None = None) -> TensorDictModule:
        """The critics' network without an action, V(s), or another one."""
        key = self.state_key
        return self.encoded(make_value_network(self.sizes[0], self.hidden_dims, observation_key=key, mlp=mlp))

    def critics(self, number: int = 2, *, mlp: MakeMLP | None = None) -> list[TensorDictModule] | CriticEnsemble:
        """The paper's twin critics, more of them, or other networks; an encoder before them is the ensemble's."""
        return self.encoded_critics(
            make_qvalue_networks(*self.sizes, num_qvalue_nets=number, observation_key=self.state_key, mlp=mlp)
        )

    def encoded_critics(self, critics: Sequence[TensorDictModule]) -> list[TensorDictModule] | CriticEnsemble:
        """Critics that read ``state_key``, on the device; an encoder before them is the ensemble's."""
        encoder = self.make_encoder()
        if encoder is None:
            return [critic.to(self.device) for critic in critics]
        return EncodedCritics(encoder, critics).to(self.device)

    def edit_policy(self) -> TensorDictModule:
        """The policy of a bounded edit: it reads the state and the base action."""
        width, action_dim, hidden_dims = self.sizes
        policy = TanhGaussianPolicy(
            make_tanh_gaussian_network(width + action_dim, action_dim, hidden_dims),
            log_std_min=-20.0,
            in_keys=(self.state_key, "base_action"),
            out_keys=("edit",),
        )
        return self.encoded(policy)

    def critics_of(self, config: FlowCriticConfig) -> list[TensorDictModule] | CriticEnsemble:
        """The critics that a method's settings name: the plain ones, or flow critics with those distilled from them.

        Raises:
            InputError: if flow critics are to read several observations, or the range of rewards is not known.
        """
        if config.critic == "mse":
            return self.critics()
        if len(self._keys) > 1 or self.has_pictures:
            raise InputError(f"algo.critic={config.critic} reads one vector, no pictures and no several observations")
        if self.reward_range is None:
            raise InputError(
                f"algo.critic={config.critic} needs the range of rewards: ProblemSpec(reward_range=(MIN, MAX))"
            )
        lowest, highest = self.reward_range
        if config.pad_reward_range:
            lowest, highest = min(lowest, 0.0), max(highest, 0.0)
        observation_dim, action_dim, hidden_dims = self.sizes

        def flow_critic() -> FlowCritic:
            network: nn.Module = make_flow_critic_network(
                observation_dim,
                action_dim,
                hidden_dims if config.critic_hidden_dims is None else config.critic_hidden_dims,
                num_bins=config.num_bins,
                time_features=config.time_features,
            )
            if self.normalizer is not None:
                network = _Normalized(copy.deepcopy(self.normalizer), network, observation_dim)
            return FlowCritic(
                network,
                reward_range=(lowest, highest),
                gamma=given(config.gamma, self.gamma),
                num_steps=given(config.critic_steps, 8),
                noise_coverage=given(config.noise_coverage, 0.1),
                num_bins=config.num_bins,
                sigma=config.sigma,
                reward_offset=config.reward_offset,
                time_features=config.time_features,
                in_keys=(self._keys[0], "action", "critic_noise"),
            )

        distilled = [
            self.encoded(critic) for critic in make_qvalue_networks(*self.sizes, observation_key=self.state_key)
        ]
        flow_critics = [flow_critic().to(self.device) for _ in range(config.num_flow_critics)]
        return FlowCriticEnsemble(flow_critics, distilled, noise_samples=config.noise_samples)

    @property
    def _keys(self) -> list[NestedKey]:
        return list(cast("Composite", self.observation_spec).keys(True, True))

    @property
    def _is_encoded(self) -> bool:
        return len(self._keys) > 1 or self.normalizer is not None or self.has_pictures


class _Join(nn.Module):
    """Concatenate vectors, and normalise the result."""

    def __init__(self, normalizer: ObservationNormalizer | None) -> None:
        super().__init__()
        self.normalizer = normalizer

    def forward(self, *observations: Tensor) -> Tensor:
        joined = torch.cat(observations, -1)
        return joined if self.normalizer is None else self.normalizer(joined)


class _Normalized(nn.Module):
    """A network behind the normalisation of the first O columns that it reads."""

    def __init__(self, normalizer: ObservationNormalizer, network: nn.Module, observation_dim: int) -> None:
        super().__init__()
        self.normalizer, self.network, self.observation_dim = normalizer, network, observation_dim

    def forward(self, x: Tensor) -> Tensor:
        observation, rest = x.split([self.observation_dim, x.shape[-1] - self.observation_dim], -1)
        return self.network(torch.cat([self.normalizer(observation), rest], -1))


class Diagnostics(Protocol):
    """Numbers that explain a run, computed on steps that log. Neither call touches the global random generators."""

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Scalars of ``batch``, which the update was just called with; rows of metrics carry them as ``train/NAME``."""

    def use_data(self, transitions: TensorDictBase) -> None:
        """Compare with these transitions of the data from now on."""


@dataclass(frozen=True)
class SoftTarget:
    """A target network, or an average of weights, that moves by its own rate after a stage's step.

    Attributes:
        name: X of ``target_X_params``, which follow ``X_params``.
        rate: share of the network that moves into the target.
        period: it moves at every n-th update only.
        first: update before which it does not move.
    """

    name: str
    rate: float
    period: int = 1
    first: int = 0


@dataclass(frozen=True)
class Stage:
    """A part of an update: some terms at the weights of now, a step on the parameters they train, then the targets.

    Attributes:
        terms: names of losses, each a public method ``NAME_loss`` of the loss; all of them where empty.
        targets: what moves after the step.
        max_grad_norm: bound of the 2-norm of all of the stage's gradients together.
        begin: updates before the first that has the stage.
        end: updates after which it is left out; never where None.
        copies: name of a network -> name of the network whose weights it gets before the stage's first update.
        rows: it reads so many rows of the batch, the first; all of them where None.
    """

    terms: Sequence[str] = ()
    targets: Sequence[SoftTarget] = ()
    max_grad_norm: float | None = None
    begin: int = 0
    end: int | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    rows: int | None = None


@dataclass
class Learner:
    """A method, built.

    Attributes:
        loss: computes every ``loss_*`` of a batch; their sum is minimised.
        policy: the acting policy.
        evaluated_policies: name -> policy, everything worth evaluating at the end of a run.
        param_groups: optimiser groups over the loss's parameters, in the form of ``torch.optim.Adam``. A group's
            ``cosine_steps`` N lets its learning rate fall to 0 along a half cosine over N updates, after ``cosine_begin`` ones.
        target_updater: moves target networks before the optimiser step (of the last stage); None where there are none, or
            the stages move them.
        prior: the part that writes the base action, which :meth:`~deflow_torchrl.trainers.UpdateStep.freeze_prior` fixes; None
            in a method that has none.
        diagnostics: explains a batch the update has just seen, in scalars; None where a method has nothing to say.
        exploration_policy: acts in the online phase, where that is not how ``policy`` acts; None where it is.
        term_periods: name of a loss -> n: it counts at every n-th update only, and is zero at the others (whose gradient is then
            zero too, not absent: Adam's momentum goes on moving what the term trains).
        target_period: the target networks move at every n-th update only.
        stages: parts of an update, in this order; one of all terms where empty. Stages that begin or end in mid-run are the
            method's phases.
        before_update: called with the number of the update, from 1, as a tensor on the device.
        after_update: called with losses and metadata at the end of the update.
        next_action: the loss reads ``("next", "action")``: buffers are to deliver the action of the transition that follows each
            in its trajectory, the transition's own at the trajectory's end.
        returns: the loss reads ``mc_return``: buffers are to deliver returns to go, whose trajectories end like this
            (:class:`~deflow_torchrl.data.returns.ReturnsToGo`).
        online: coefficients of the loss, by name, that have other values in the online phase.
        whole_episodes: online, the updates of an episode are made when it has ended, all at once.
    """

    loss: LossModule
    policy: TensorDictModuleBase
    evaluated_policies: Mapping[str, TensorDictModuleBase]
    param_groups: Sequence[Mapping[str, Any]]
    target_updater: TargetNetUpdater | None
    prior: TensorDictModuleBase | None = None
    diagnostics: Diagnostics | None = None
    exploration_policy: TensorDictModuleBase | None = None
    term_periods: Mapping[str, int] = field(default_factory=dict)
    target_period: int = 1
    stages: Sequence[Stage] = ()
    before_update: Callable[[Tensor], None] | None = None
    after_update: Callable[[TensorDictBase], None] | None = None
    next_action: bool = False
    returns: Literal["last_reward", "cut"] | None = None
    online: Mapping[str, float] = field(default_factory=dict)
    whole_episodes: bool = False

    @property
    def online_policy(self) -> TensorDictModuleBase:
        """The policy that acts in the online phase."""
        return self.policy if self.exploration_policy is None else self.exploration_policy

    @property
    def loss_names(self) -> list[str]:
        """Names of the summed terms."""
        return [key for key in self.loss.out_keys if key.startswith("loss_")]

    @property
    def acting_policy(self) -> str:
        """Name of the acting policy among the evaluated ones."""
        return next(name for name, policy in self.evaluated_policies.items() if policy is self.policy)


def learner_with_critics(
    config: BootstrapConfig,
    problem: ProblemSpec,
    loss: LossModule,
    policy: TensorDictModuleBase,
    *,
    evaluated_policies: Mapping[str, TensorDictModuleBase] | None = None,
    optimizer_groups: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> Learner:
    """What every method with critics ends in: the discount, one Adam over all parameters, and targets that move softly.

    Args:
        config: the method's settings; a discount that is None is the task's.
        problem: what the method is built for.
        loss: its loss, whose value estimator is set here (TD(0)).
        policy: the acting policy.

    Keyword Args:
        evaluated_policies: as of :class:`Learner`; the acting policy under the method's name by default.
        optimizer_groups: network or parameter of the loss, by name -> options of an optimiser group of its own.
        more: further fields of :class:`Learner`; where its stages move the targets, nothing else does.
    """
    gamma = given(config.gamma, problem.gamma)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma, device=problem.device)
    updater = SoftUpdate(loss, tau=config.tau)
    staged = any(stage.targets for stage in more.get("stages", ()))
    return Learner(
        loss=loss,
        policy=policy,
        evaluated_policies={config.name: policy} if evaluated_policies is None else evaluated_policies,
        param_groups=_groups(loss, config.lr, optimizer_groups or {}),
        target_updater=None if staged else updater,
        **more,
    )


def _groups(loss: LossModule, lr: float, own: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One optimiser group of all parameters, but for those that have options of their own."""
    groups: list[dict[str, Any]] = []
    for name, options in own.items():
        part = getattr(loss, name)
        params = [part] if isinstance(part, Tensor) else trainable(part)
        groups.append({"params": params, "lr": lr, **options})
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in trainable(loss) if id(parameter) not in taken]
    return [{"params": rest, "lr": lr}, *groups]


def best_of_n_learner(
    config: CandidatesConfig,
    problem: ProblemSpec,
    loss: LossModule,
    policy: Any,
    *,
    drawing: TensorDictModuleBase | None = None,
    **more: Any,
) -> Learner:
    """As :func:`learner_with_critics`; it acts by the best of ``best_of_n`` actions by the mean of the online critics.

    Args:
        config: the method's settings.
        problem: what the method is built for.
        loss: its loss.
        policy: proposes the actions.

    Keyword Args:
        drawing: the policy that always draws its noise, where that is wider than an action.
        more: further fields of :class:`Learner`.
    """
    if config.best_of_n == 1:
        return learner_with_critics(config, problem, loss, policy, exploration_policy=drawing, **more)
    best, explorer = (
        BestOfNPolicy(
            policy,
            loss.qvalue_network,
            cast("Any", loss).qvalue_network_params,
            config.best_of_n,
            q_aggregation="mean",
            in_keys=in_keys,
        )
        for in_keys in (policy.in_keys, policy.in_keys[:-1])
    )
    # The collector's noise is one row a state: this form draws its own, from a seed made of that row.
    return learner_with_critics(config, problem, loss, best, exploration_policy=explorer, **more)


def one_step_policy(problem: ProblemSpec) -> TensorDictModule:
    """FQL's policy: noise to action in one pass."""
    network = make_one_step_network(*problem.sizes)
    return problem.encoded(
        OneStepPolicy(network, problem.sizes[1], in_keys=(problem.state_key, "noise"), **problem.bounds)
    )


def exploring(policy: TensorDictModule, *args: float) -> TensorDictModule:
    """The policy whose last module explores; encoders before it stay."""
    *encoders, head = parts(policy)
    explorer = head.exploring(*args)
    return TensorDictSequential(*encoders, explorer) if encoders else explorer


def trainable(module: nn.Module) -> list[Tensor]:
    """The module's parameters that require gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
