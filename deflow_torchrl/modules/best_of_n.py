# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The best of N actions that a flow proposes, by the minimum of the online critics: how IFQL acts (FQL, appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.modules.critics import CriticEnsemble, TwinCritic
from deflow_torchrl.modules.flow import FlowMatchingModel
from deflow_torchrl.modules.policies import encode, last_policy, parts


class BestOfNModel(nn.Module):
    """Tensor-only core of :class:`BestOfNPolicy`; arguments as there."""

    qvalue_network: nn.Module
    qvalue_network_params: TensorDictParams

    def __init__(
        self,
        flow: FlowMatchingModel,
        qvalue_network: nn.Module,
        qvalue_network_params: TensorDictParams,
        num_samples: int,
        *,
        action_key: NestedKey = "action",
        value_key: NestedKey = "state_action_value",
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        self.flow = flow
        # Of the network the layout alone is wanted, not parameters: those are qvalue_network_params.
        self.__dict__["qvalue_network"] = qvalue_network
        self.qvalue_network_params = qvalue_network_params
        self.num_samples = num_samples
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
        state = self.critics.state_of(self.critics.encode(state))  # encoders run once per state, not per candidate
        rows = state.unsqueeze(-1).expand(*candidates).reshape(-1).set(self.critics.action_key, actions)
        best = self.critics.values(rows).amin(0).reshape(candidates).argmax(-1)
        chosen = best[..., None, None].expand(*best.shape, 1, actions.shape[-1])
        return actions.reshape(noise.shape).gather(-2, chosen).squeeze(-2)

    @property
    def critics(self) -> CriticEnsemble:
        """The critics, with the parameters of now."""
        return TwinCritic.of(self.qvalue_network, self.qvalue_network_params, **self._keys)


class BestOfNPolicy(TensorDictModule):
    """Draw N actions from a flow and take the one whose smallest Q is largest: argmax_i min_j Q_j(s, a_i).

    The noise of a state has a row for each candidate, ``[..., N, A]`` (:attr:`noise_shape`), and is drawn where the input
    lacks it, whatever the exploration mode. With ``in_keys=("observation",)`` it is always drawn.

    Args:
        flow_policy: proposes the actions.
        qvalue_network: the layout of a critic that reads an observation and ``action`` and writes
            ``state_action_value [..., 1]``; a loss's ``qvalue_network``.
        qvalue_network_params: parameters of J critics, stacked; a loss's ``qvalue_network_params``, shared, so that the policy
            acts with the critics of now.
        num_samples: N.

    Keyword Args:
        in_keys: observation key and, optionally, noise key.
        out_keys: the action key.
        critic_action_key: where the critics read the action.
        value_key: where they write their value.

    Raises:
        ValueError: on a number of samples or keys that cannot be; by calls, on noise of another shape.

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
        flow_policy: TensorDictModuleBase,
        qvalue_network: nn.Module,
        qvalue_network_params: TensorDictParams,
        num_samples: int,
        *,
        in_keys: Sequence[NestedKey] = ("observation", "noise"),
        out_keys: Sequence[NestedKey] = ("action",),
        critic_action_key: NestedKey = "action",
        value_key: NestedKey = "state_action_value",
    ) -> None:
        if len(in_keys) not in (1, 2) or len(out_keys) != 1:
            raise ValueError(
                f"in_keys must be (observation,) or (observation, noise) and out_keys (action,), got {in_keys} and {out_keys}"
            )
        model = BestOfNModel(
            last_policy(flow_policy).module,
            qvalue_network,
            qvalue_network_params,
            num_samples,
            action_key=critic_action_key,
            value_key=value_key,
        )
        super().__init__(model, in_keys=list(in_keys), out_keys=list(out_keys))
        # Encoders of the flow run once per state, not per candidate.
        self.__dict__["_flow_policy"] = flow_policy if len(parts(flow_policy)) > 1 else None

    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Write the best action of each state into ``tensordict``."""
        policy = self.__dict__["_flow_policy"]
        if policy is None:
            return super().forward(tensordict, *args, **kwargs)
        observation = encode(policy, tensordict)[last_policy(policy).in_keys[0]]
        noise = tensordict.get(self.in_keys[1], None) if len(self.in_keys) == 2 else None
        state = tensordict.select(*self.module.critics.state_keys)
        return tensordict.set(self.out_keys[0], self.module.choose(state, observation, noise))

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of a state's noise, (N, A): what evaluators and collectors have to give."""
        return self.module.num_samples, self.module.flow.action_dim
