# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""How IDQL and CAC act: candidates of a policy, chosen by the values of target critics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from deflow_torchrl.modules.critics import TwinCritic
from deflow_torchrl.modules.policies import encode, last_policy


class ValueChosenPolicy(TensorDictModuleBase):
    """Draw N actions from a policy and take the one with the largest min_j Q_j(s, a_i), or draw one by a softmax of these.

    The noise of a state is ``[..., N, K, A]`` for a policy whose noise is ``[..., K, A]``; with ``softmax`` it has a row more,
    K + 1, whose first number draws the candidate. It is drawn where the input lacks it.

    Args:
        policy: a :class:`DiffusionPolicy` or :class:`ConsistencyPolicy`; encoders may stand before it and run once per state.
        qvalue_network: the layout of a critic; a loss's ``qvalue_network``.
        qvalue_network_params: parameters of J critics, stacked; a loss's ``target_qvalue_network_params``, shared.
        num_samples: N.

    Keyword Args:
        policy_params: parameters that the policy acts with; its own where None. IDQL acts with an average, a loss's
            ``target_diffusion_policy_params``.
        softmax: draw a candidate with probability proportional to exp(min_j Q_j(s, a_i)) (CAC). Defaults to ``False``.
        reads_noise: take the noise from the input where it has it. Defaults to ``True``.
        keys: action key and value key of the critics, by the names ``action_key`` and ``value_key``.

    Raises:
        ValueError: on a number of samples that is not positive; by calls, on noise of another shape.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import DiffusionPolicy, NoiseNetwork, make_qvalue_networks, make_value_network
        >>> from deflow_torchrl.objectives import IDQLLoss
        >>> policy = DiffusionPolicy(NoiseNetwork(3, 2, width=8), 2)
        >>> loss = IDQLLoss(policy, make_qvalue_networks(3, 2, (16,)), make_value_network(3, (16,)))
        >>> chosen = ValueChosenPolicy(
        ...     policy, loss.qvalue_network, loss.target_qvalue_network_params, 4,
        ...     policy_params=loss.target_diffusion_policy_params)
        >>> chosen(TensorDict(observation=torch.zeros(5, 3), batch_size=[5]))["action"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        qvalue_network: nn.Module,
        qvalue_network_params: TensorDictParams,
        num_samples: int,
        *,
        policy_params: TensorDictParams | None = None,
        softmax: bool = False,
        reads_noise: bool = True,
        keys: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        self.policy = policy if policy_params is None else None
        self.policy_params = policy_params
        # Of these the layout alone is wanted, not parameters.
        self.__dict__["_layouts"] = (policy, qvalue_network)
        self.qvalue_network_params = qvalue_network_params
        self.num_samples = num_samples
        self.softmax = softmax
        self._keys = dict(keys or {})
        head = last_policy(policy)
        own = head.in_keys[1] if len(head.in_keys) == 2 else None
        self._noise_key = own if reads_noise else None
        self.in_keys = [key for key in policy.in_keys if key != own or reads_noise]
        self.out_keys = list(head.out_keys)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Shape of a state's noise, (N, K, A), or (N, K + 1, A) with ``softmax``."""
        core = last_policy(self.__dict__["_layouts"][0]).module
        return self.num_samples, core.num_steps + self.softmax, core.action_dim

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the chosen action of each state into ``tensordict``."""
        policy, network = self.__dict__["_layouts"]
        if self.policy_params is None:
            action = self._act(policy, network, tensordict)
        else:
            with self.policy_params.to_module(policy, preserve_module_state=False):
                action = self._act(policy, network, tensordict)
        return tensordict.set(self.out_keys[0], action)

    def _act(self, policy: TensorDictModuleBase, network: nn.Module, tensordict: TensorDictBase) -> Tensor:
        core = last_policy(policy).module
        observation = encode(policy, tensordict)[last_policy(policy).in_keys[0]]
        shape = (*observation.shape[:-1], *self.noise_shape)
        noise = None if self._noise_key is None else tensordict.get(self._noise_key, None)
        if noise is None:
            noise = torch.randn(shape, device=observation.device, dtype=core.low.dtype)
        if noise.shape != shape:
            raise ValueError(f"noise of shape {list(shape)} is needed, one for each candidate, got {list(noise.shape)}")
        candidates = shape[:-2]
        observations = observation.unsqueeze(-2).expand(*candidates, observation.shape[-1])
        actions = core(observations, noise[..., : core.num_steps, :])
        critics = TwinCritic.of(network, self.qvalue_network_params, **self._keys)
        states = tensordict.select(*critics.state_keys).unsqueeze(-1).expand(*candidates)
        scores = critics.values(states.reshape(-1).set(critics.action_key, actions.flatten(0, -2))).amin(0)
        scores = scores.reshape(candidates)
        if self.softmax:  # the largest of value + Gumbel noise is a draw from the softmax
            uniform = torch.special.ndtr(noise[..., -1, 0]).clamp(1e-12, 1 - 1e-7)
            scores = scores - (-uniform.log()).log()
        best = scores.argmax(-1)[..., None, None].expand(*candidates[:-1], 1, actions.shape[-1])
        return actions.gather(-2, best).squeeze(-2)
