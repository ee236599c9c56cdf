# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""IDQL (https://arxiv.org/abs/2304.10573): IQL's values, and the best of N actions of a diffusion model of the data.

Where the released code and the paper differ, and what is done here:

1. the noise net's class that the repository exports: swish, 64 frequencies (:class:`~deflow_torchrl.modules.NoiseNetwork`);
2. actor and values are updated 1:1 (code; the paper trains values for half of the steps);
3. candidates come from an average of the noise net and are ranked by the minimum of the *target* critics (code);
4. the order inside an update is the noise net, V, then Q with the new V (code): the learner's stages. ``forward`` computes all
   terms at the weights of now.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.chosen import ValueChosenPolicy
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, term
from deflow_torchrl.objectives.implicit_q import ImplicitQLoss


class DenoisingValueLoss(ImplicitQLoss):
    """:class:`ImplicitQLoss` and the loss of a diffusion model of the data, which IDQL and SRPO share.

    ``loss_score = mean_batch sum_d (eps(s, x_k, k) - z)^2``, x_k = sqrt(abar_k) a + sqrt(1 - abar_k) z; with continuous time
    t of [0.001, 1] in the place of k.

    Arguments are those of :class:`ImplicitQLoss`, and ``policies``, among them the ``diffusion_policy``.
    """

    out_keys = ["loss_score", "loss_value", "loss_qvalue"]

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        return [*super()._required_keys(tensordict), *acting.state_keys(self.diffusion_policy)]

    def _optional_keys(self) -> list[NestedKey]:
        return [*super()._optional_keys(), "diffusion_time", "diffusion_noise"]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        return {"loss_score": self._score_term(tensordict), **super()._compute(tensordict)}

    def _score_term(self, tensordict: TensorDictBase) -> Tensor:
        action = tensordict[self.tensor_keys.action]
        time = tensordict.get("diffusion_time", None)
        time = acting.draw_time(self.diffusion_policy, action, low=1e-3) if time is None else time
        noise = tensordict.get("diffusion_noise", None)
        noise = torch.randn_like(action) if noise is None else noise
        predicted = acting.predicted_noise(self.diffusion_policy, tensordict, action, noise, time)
        return self._reduce(terms.noise_prediction(predicted, noise), tensordict)

    @term
    def score_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_score``.

        Args:
            tensordict: the diffusion policy's observations and ``action [..., A]``; optionally ``diffusion_time [..., 1]`` (a
                step 0..T-1, or a time in [0, 1]) and ``diffusion_noise [..., A]``.

        Returns:
            The loss and an empty metadata dictionary.
        """
        return self._score_term(tensordict), {}


class IDQLLoss(DenoisingValueLoss):
    """The losses of IDQL: ``loss_score``, ``loss_value`` and ``loss_qvalue``, with disjoint gradients.

    * ``loss_score = mean_batch sum_d (eps(s, x_k, k) - z)^2``, x_k = sqrt(abar_k) a + sqrt(1 - abar_k) z, k uniform;
    * ``loss_value`` and ``loss_qvalue`` as :class:`ImplicitQLoss`.

    Each is also a method: ``score_loss``, ``value_loss``, ``qvalue_loss``. ``target_diffusion_policy_params`` is an average of
    the diffusion policy's parameters, which acts.

    Args:
        diffusion_policy (DiffusionPolicy): proposes actions; trained by ``loss_score`` alone. Encoders may stand before it.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.
        value_network (TensorDictModule): reads an observation and writes ``state_value [..., 1]``.

    Keyword Args:
        expectile (float, optional): in (0, 1). Defaults to ``0.7``.
        num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if ``diffusion_policy`` is of another kind.
        ValueError: on an expectile outside (0, 1) or an unknown option.

    Draws are read from the input where given, else made in this order: ``diffusion_time [..., 1]`` (integer),
    ``diffusion_noise [..., A]``; dropout follows the module's mode.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import DiffusionPolicy, NoiseNetwork, make_qvalue_networks, make_value_network
        >>> policy = DiffusionPolicy(NoiseNetwork(3, 2, width=8), 2)
        >>> loss = IDQLLoss(policy, make_qvalue_networks(3, 2, (16,)), make_value_network(3, (16,)))
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss.score_loss(data)[0].shape
        torch.Size([])
    """

    _averaged = ("diffusion_policy",)

    def __init__(
        self,
        diffusion_policy: TensorDictModuleBase,
        qvalue_network: Critics,
        value_network: TensorDictModuleBase,
        *,
        expectile: float = 0.7,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_diffusion_policy(diffusion_policy)
        super().__init__(
            qvalue_network,
            value_network,
            expectile=expectile,
            num_qvalue_nets=num_qvalue_nets,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            policies={"diffusion_policy": diffusion_policy},
        )

    @property
    def actor_network(self) -> ValueChosenPolicy:
        """The averaged policy, with one candidate; the best of several is :class:`~deflow_torchrl.modules.ValueChosenPolicy`."""
        average = self.target_diffusion_policy_params
        critics = self.qvalue_network, self.target_qvalue_network_params
        keys = {"action_key": self.tensor_keys.action, "value_key": self.tensor_keys.state_action_value}
        return ValueChosenPolicy(self.diffusion_policy, *critics, 1, policy_params=average, keys=keys)
