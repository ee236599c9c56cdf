# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The acting policy of FEdit: a flow's action and a bounded random edit of it."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey

from deflow_torchrl.modules.policies import encode, last_policy


class EditedFlowPolicy(TensorDictModuleBase):
    """``action = clip(b + c tanh u)``, b = flow(s, z), tanh u = edit(s, b; e): random also in evaluation.

    The noise of a state is z and e behind one another, ``[..., 2 A]`` (:attr:`noise_shape`), and is drawn where the input lacks
    it. The base action b is written too.

    Args:
        flow_policy: a :class:`FlowMatchingPolicy`.
        edit_policy: a :class:`TanhGaussianPolicy` that reads ``cat([s, b], -1)``. Encoders may stand before either.

    Keyword Args:
        edit_scale: c, in action units.
        noise_key: key of the noise; None always draws it.
        base_action_key: where b is written.
        action_key: where the action is written.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, TanhGaussianPolicy
        >>> from deflow_torchrl.modules import make_tanh_gaussian_network, make_velocity_network
        >>> flow = FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2)
        >>> edit = TanhGaussianPolicy(make_tanh_gaussian_network(3 + 2, 2, (16,)), in_keys=("observation", "base_action"))
        >>> policy = EditedFlowPolicy(flow, edit, edit_scale=0.2)
        >>> policy(TensorDict(observation=torch.zeros(4, 3), noise=torch.zeros(4, 4), batch_size=[4]))["action"].shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
        edit_policy: TensorDictModuleBase,
        *,
        edit_scale: float,
        noise_key: NestedKey | None = "noise",
        base_action_key: NestedKey = "base_action",
        action_key: NestedKey = "action",
    ) -> None:
        super().__init__()
        self.flow_policy = flow_policy
        self.edit_policy = edit_policy
        self.edit_scale = edit_scale
        flow, edit = last_policy(flow_policy), last_policy(edit_policy)
        own = {*flow.in_keys[1:], *edit.in_keys[1:]}
        states = [key for key in (*flow_policy.in_keys, *edit_policy.in_keys) if key not in own]
        self.noise_key = noise_key
        self.in_keys = [*dict.fromkeys(states), *([] if noise_key is None else [noise_key])]
        self.out_keys = [base_action_key, action_key]

    @property
    def base_action_key(self) -> NestedKey:
        """Key of the flow's action."""
        return self.out_keys[0]

    @property
    def noise_shape(self) -> tuple[int]:
        """Shape of a state's noise: what evaluators and collectors have to give."""
        return (2 * last_policy(self.flow_policy).module.action_dim,)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write base action and action of each state into ``tensordict``."""
        flow, edit = last_policy(self.flow_policy), last_policy(self.edit_policy)
        states: list[Any] = [
            encode(it, tensordict)[last_policy(it).in_keys[0]] for it in (self.flow_policy, self.edit_policy)
        ]
        noise = None if self.noise_key is None else tensordict.get(self.noise_key, None)
        if noise is None:
            noise = states[0].new_empty(*states[0].shape[:-1], *self.noise_shape).normal_()
        z, e = noise.chunk(2, -1)
        base = flow.module(states[0], z)
        shift = edit.module.sample_and_log_prob(torch.cat([states[1], base], -1), e)[0]
        action = flow.module.clip(base + self.edit_scale * shift)
        return tensordict.set(self.out_keys[0], base).set(self.out_keys[1], action)

    def drawing(self) -> EditedFlowPolicy:
        """Return the policy that always draws its noise, with the same networks: a collector's noise has one row of A."""
        return EditedFlowPolicy(
            self.flow_policy,
            self.edit_policy,
            edit_scale=self.edit_scale,
            noise_key=None,
            base_action_key=self.out_keys[0],
            action_key=self.out_keys[1],
        )
