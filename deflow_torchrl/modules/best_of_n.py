# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""More computation where a policy acts: the best of N actions by the online critics, and repeated refinement.

The best of N of a flow by the minimum of the critics is how IFQL acts (FQL, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.critics import CriticEnsemble, TwinCritic, aggregate, check_aggregation
from deflow_torchrl.modules.flow import FlowMatchingModel
from deflow_torchrl.modules.policies import encode, last_policy, parts


class BestOfNModel(nn.Module):
    """Tensor-only core of :class:`BestOfNPolicy`; arguments as there."""

    qvalue_network: nn.Module
    qvalue_network_params: TensorDictParams

    def __init__(
        self,
        flow: FlowMatchingModel | TensorDictModuleBase,
        qvalue_network: nn.Module,
        qvalue_network_params: TensorDictParams,
        num_samples: int,
        *,
        q_aggregation: str | float = "min",
        action_key: NestedKey = "action",
        value_key: NestedKey = "state_action_value",
    ) -> None:
        super().__init__()
        check_aggregation(q_aggregation)
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        self.flow = flow
        # Of the network the layout alone is wanted, not parameters: those are qvalue_network_params.
        self.__dict__["qvalue_network"] = qvalue_network
        self.qvalue_network_params = qvalue_network_params
        self.num_samples = num_samples
        self.q_aggregation = q_aggregation
        self._keys = {"action_key": action_key, "value_key": value_key}

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """``observation [..., O]`` and ``noise [..., N, A]`` (drawn if None) to the best action ``[..., A]``."""
        state_keys = self.critics.state_keys
        if len(state_keys) != 1:
            raise ValueError(f"the critics must read one observation beside the action, got {state_keys}")
        state = TensorDict({state_keys[0]: observation}, batch_size=observation.shape[:-1])
        return self.choose(state, observation, noise)

    def choose(self, state: TensorDictBase, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """The best action, where the critics read ``state [...]`` and the flow ``observation [..., O]``."""
        candidates = (*observation.shape[:-1], self.num_samples)
        # One batch of all candidates: rows are what the samplers and critics are fast in.
        observations = observation.unsqueeze(-2).expand(*candidates, observation.shape[-1]).flatten(0, -2)
        noise = self.flow.draw_noise(observations).unflatten(0, candidates) if noise is None else noise
        if noise.shape != (*candidates, self.flow.action_dim):
            raise ValueError(
                f"noise of shape {[*candidates, self.flow.action_dim]} is needed, one row for each candidate, "
                f"got {list(noise.shape)}"
            )
        actions = self.flow(observations, noise.flatten(0, -2))
        actions = actions.reshape(noise.shape)
        return self.pick(state, actions, actions)

    def pick(self, state: TensorDictBase, scored: Tensor, actions: Tensor) -> Tensor:
        """Of ``actions [..., N, A]`` of each ``state [...]`` the one at which ``scored [..., N, A]`` has the best value."""
        candidates = scored.shape[:-1]
        state = self.critics.state_of(self.critics.encode(state))  # encoders run once per state, not per candidate
        rows = (
            state.unsqueeze(-1).expand(*candidates).reshape(candidates.numel())
        )  # -1 is ambiguous where there is no state
        rows.set(self.critics.action_key, scored.flatten(0, -2))
        best = self.rank(self.critics.values(rows)).reshape(candidates).argmax(-1)
        chosen = best[..., None, None].expand(*best.shape, 1, actions.shape[-1])
        return actions.gather(-2, chosen).squeeze(-2)

    def rank(self, values: Tensor) -> Tensor:
        """What is maximised ``[R]``, of values of J critics ``[J, R]``: their aggregate."""
        return aggregate(values, self.q_aggregation)

    @property
    def critics(self) -> CriticEnsemble:
        """The critics, with the parameters of now."""
        return TwinCritic.of(self.qvalue_network, self.qvalue_network_params, **self._keys)


class BestOfNPolicy(TensorDictModule):
    """Draw N actions from a policy and take the one with the best value: for a flow argmax_i min_j Q_j(s, a_i).

    The noise of a state has a row for each candidate, ``[..., N, A]`` (:attr:`noise_shape`), and is drawn where the input
    lacks it, whatever the exploration mode. With ``in_keys=("observation",)`` it is always drawn.

    Args:
        policy: proposes the actions: a flow or one-step policy, or any policy that maps noise to actions, such as a
            :class:`DeFlowActor`.
        qvalue_network: the layout of a critic that reads an observation and ``action`` and writes
            ``state_action_value [..., 1]``; a loss's ``qvalue_network``.
        qvalue_network_params: parameters of J critics, stacked; a loss's ``qvalue_network_params``, shared, so that the policy
            acts with the critics of now.
        num_samples: N.

    Keyword Args:
        selection: choose by the value of the action that would be executed (``"final"``, default), or by that of the base
            action it was made of (``"base"``; of policies that have one, as DeFlow's).
        q_aggregation: of the J critics, ``"min"`` (default), ``"mean"`` or a number rho of mean - rho std.
        in_keys: observation key and, optionally, noise key; ``("observation", "noise")`` for a flow and the policy's own
            keys else, by default.
        out_keys: the action key.
        noise_key: where a policy that is no flow reads its noise.
        critic_action_key: where the critics read the action.
        value_key: where they write their value.

    Raises:
        ValueError: on a number of samples, keys or a policy that cannot be; by calls, on noise of another shape.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy
        >>> from deflow_torchrl.modules import make_qvalue_networks, make_value_network, make_velocity_network
        >>> from deflow_torchrl.objectives import IFQLLoss
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> loss = IFQLLoss(flow, make_qvalue_networks(3, 2, (16,)), make_value_network(3, (16,)))
        >>> policy = BestOfNPolicy(flow, loss.qvalue_network, loss.qvalue_network_params, num_samples=8)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
    """

    module: BestOfNModel

    def __init__(
        self,
        policy: TensorDictModuleBase,
        qvalue_network: nn.Module,
        qvalue_network_params: TensorDictParams,
        num_samples: int,
        *,
        selection: Literal["final", "base"] = "final",
        q_aggregation: str | float = "min",
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] = ("action",),
        noise_key: NestedKey = "noise",
        critic_action_key: NestedKey = "action",
        value_key: NestedKey = "state_action_value",
    ) -> None:
        core = getattr(last_policy(policy), "module", None)
        # A flow or one-step policy on tensors; others, and those whose noise has a shape of its own, as TensorDict modules.
        samples_tensors = hasattr(core, "draw_noise") and selection == "final" and not hasattr(policy, "noise_shape")
        if selection not in ("final", "base"):
            raise ValueError(f"selection must be 'final' or 'base', got {selection!r}")
        if selection == "base" and not hasattr(policy, "base_action_key"):
            raise ValueError(
                f"selection='base' needs a policy with a base action, and a {type(policy).__name__} has none"
            )
        if in_keys is None:
            in_keys = ("observation", "noise") if samples_tensors else policy.in_keys
        if len(out_keys) != 1 or (samples_tensors and len(in_keys) not in (1, 2)):
            raise ValueError(
                f"in_keys must be (observation,) or (observation, noise) and out_keys (action,), got {in_keys} and {out_keys}"
            )
        if not samples_tensors and noise_key not in policy.in_keys:
            raise ValueError(f"a {type(policy).__name__} reads no {noise_key!r}: its candidates would all be the same")
        model = BestOfNModel(
            core if samples_tensors else policy,
            qvalue_network,
            qvalue_network_params,
            num_samples,
            q_aggregation=q_aggregation,
            action_key=critic_action_key,
            value_key=value_key,
        )
        super().__init__(model, in_keys=list(in_keys), out_keys=list(out_keys))
        # Encoders of a flow run once per state, not per candidate.
        self.__dict__["_flow_policy"] = policy if samples_tensors and len(parts(policy)) > 1 else None
        self.__dict__["_policy"] = None if samples_tensors else policy
        self._noise_key, self._scored_key = noise_key, out_keys[0]
        if selection == "base":
            self._scored_key = policy.base_action_key

    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Write the best action of each state into ``tensordict``."""
        flow = self.__dict__["_flow_policy"]
        if self.__dict__["_policy"] is not None:
            return tensordict.set(self.out_keys[0], self._best_of_any(tensordict))
        if flow is None:
            return super().forward(tensordict, *args, **kwargs)
        observation = encode(flow, tensordict)[last_policy(flow).in_keys[0]]
        noise = tensordict.get(self.in_keys[1], None) if len(self.in_keys) == 2 else None
        state = tensordict.select(*self.module.critics.state_keys)
        return tensordict.set(self.out_keys[0], self.module.choose(state, observation, noise))

    def _best_of_any(self, tensordict: TensorDictBase) -> Tensor:
        policy = self.__dict__["_policy"]
        candidates = (*tensordict.batch_size, self.module.num_samples)
        shape = (*tensordict.batch_size, *self.noise_shape)
        states = tensordict.select(*(key for key in policy.in_keys if key != self._noise_key))
        noise = tensordict.get(self._noise_key, None) if self._noise_key in self.in_keys else None
        if noise is None:
            example = next(iter(states.values(True, True)))
            noise = torch.randn(shape, device=example.device, dtype=example.dtype)
        if noise.shape != shape:
            raise ValueError(
                f"noise of shape {list(shape)} is needed, one row for each candidate, got {list(noise.shape)}"
            )
        rows = states.unsqueeze(-1).expand(*candidates).reshape(math.prod(candidates))
        rows.set(self._noise_key, noise.flatten(0, len(candidates) - 1))
        acted = policy(rows)
        scored, actions = (acted[key].unflatten(0, candidates) for key in (self._scored_key, self.out_keys[0]))
        return self.module.pick(tensordict, scored, actions)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of a state's noise, (N, A): what evaluators and collectors have to give."""
        policy = self.__dict__["_policy"]
        return (
            self.module.num_samples,
            *(noise_shape(policy) if policy is not None else (self.module.flow.action_dim,)),
        )


def noise_shape(policy: TensorDictModuleBase) -> tuple[int, ...]:
    """Shape of the noise that a policy reads for a state: its ``noise_shape``, else (A,) of the part that draws it."""
    own = getattr(policy, "noise_shape", None)
    if own is not None:
        return own
    cores: Iterable[Any] = (getattr(part, "module", None) for part in parts(policy))
    return next((core.action_dim,) for core in cores if hasattr(core, "draw_noise"))


class RefinedPolicy(TensorDictModuleBase):
    """Repeat DeFlow's refinement: b_0 = flow(s, z), b_{k+1} = clip(b_k + f(s, b_k)), k = 0..K-1; the action is b_K.

    With one iteration it is the actor. Nothing is trained for it: each further step leaves the trust region by as much again.

    Args:
        actor: a :class:`DeFlowActor`, whose keys are kept; ``refinement`` is then the last shift.

    Keyword Args:
        iterations: K.

    Raises:
        TypeError: if ``actor`` is no DeFlowActor.
        ValueError: if ``iterations`` is not positive.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, RefinementPolicy
        >>> from deflow_torchrl.modules import make_refinement_network, make_velocity_network
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, out_keys=("base_action",))
        >>> actor = DeFlowActor(flow, RefinementPolicy(make_refinement_network(3, 2, (16,)), 2, low=-1.0, high=1.0))
        >>> policy = RefinedPolicy(actor, iterations=5)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
    """

    def __init__(self, actor: DeFlowActor, *, iterations: int) -> None:
        super().__init__()
        if not isinstance(actor, DeFlowActor):
            raise TypeError(f"only a DeFlowActor can be refined again, got a {type(actor).__name__}")
        if iterations < 1:
            raise ValueError(f"iterations must be positive, got {iterations}")
        self.actor = actor
        self.iterations = iterations
        self.in_keys, self.out_keys = list(actor.in_keys), list(actor.out_keys)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of a state's noise, the actor's."""
        return noise_shape(self.actor)

    @property
    def base_action_key(self) -> NestedKey:
        """Key of the prior's action."""
        return self.actor.base_action_key

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write base action, last shift and action of each state into ``tensordict``."""
        actor = self.actor
        acted = actor(tensordict)
        base = acted[actor.base_action_key]
        for _ in range(self.iterations - 1):
            acted.set(actor.base_action_key, acted[actor.action_key])
            acted = actor.refinement_policy(acted)
        return acted.set(actor.base_action_key, base)
