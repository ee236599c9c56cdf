# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A flow whose starting noise a policy chooses (DSRL, https://arxiv.org/abs/2506.15799)."""

from __future__ import annotations

import contextlib

from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey

from deflow_torchrl.modules.policies import encode, last_policy


class SteeredFlowPolicy(TensorDictModuleBase):
    """``a = flow(s, c tanh u)``, tanh u = latent(s; e): a policy over the starting noise of a flow or of any frozen noise policy.

    Args:
        flow_policy: a :class:`FlowMatchingPolicy` or another policy that maps noise to actions.
        latent_policy: a :class:`TanhGaussianPolicy` inside [-1, 1] that reads the state. Encoders may stand before either.

    Keyword Args:
        noise_scale: c.
        flow_params: parameters that the flow computes with, shared, such as a loss's target parameters; its own where None.
        noise_key: key of e ``[..., A]``, drawn where it is missing; None always draws it.
        action_key: where the action is written.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, TanhGaussianPolicy
        >>> from deflow_torchrl.modules import make_tanh_gaussian_network, make_velocity_network
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> policy = SteeredFlowPolicy(flow, TanhGaussianPolicy(make_tanh_gaussian_network(3, 2, (16,))), noise_scale=1.0)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
        latent_policy: TensorDictModuleBase,
        *,
        noise_scale: float,
        flow_params: TensorDictParams | None = None,
        noise_key: NestedKey | None = "noise",
        action_key: NestedKey = "action",
    ) -> None:
        super().__init__()
        self.flow_policy = flow_policy
        self.latent_policy = latent_policy
        self.noise_scale = noise_scale
        self.flow_params = flow_params
        self.noise_key = noise_key
        states = [key for key in flow_policy.in_keys if key not in last_policy(flow_policy).in_keys[1:]]
        self.in_keys = [*dict.fromkeys([*states, *latent_policy.in_keys]), *([] if noise_key is None else [noise_key])]
        self.out_keys = [action_key]

    @property
    def noise_shape(self) -> tuple[int]:
        """Shape of a state's noise: what evaluators and collectors have to give."""
        return (last_policy(self.flow_policy).module.action_dim,)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action of each state into ``tensordict``."""
        state = encode(self.latent_policy, tensordict)[last_policy(self.latent_policy).in_keys[0]]
        noise = None if self.noise_key is None else tensordict.get(self.noise_key, None)
        if noise is None:
            noise = state.new_empty(*state.shape[:-1], *self.noise_shape).normal_()
        latent = self.noise_scale * last_policy(self.latent_policy).module.sample_and_log_prob(state, noise)[0]
        with self._flow_with_its_parameters():
            observation = encode(self.flow_policy, tensordict)[last_policy(self.flow_policy).in_keys[0]]
            action = last_policy(self.flow_policy).module(observation, latent)
        return tensordict.set(self.out_keys[0], action)

    def _flow_with_its_parameters(self) -> contextlib.AbstractContextManager[object]:
        if self.flow_params is None:
            return contextlib.nullcontext()
        return self.flow_params.to_module(self.flow_policy, preserve_module_state=False)
