# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What the losses of this package share: keys, masks, reductions, random draws and functional critics.

Every loss is written as per-sample terms of shape ``td.shape`` which :meth:`OffPolicyLoss._reduce_term` reduces, so
masks, priority weights and ``reduction="none"`` mean the same in all of them.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import _vmap_func

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.flow import FlowMatchingPolicy, Precision, matmul_precision
from deflow_torchrl.modules.networks import StateActionValue, is_wrapped

Reduction = Literal["mean", "sum", "none"]


Critics: TypeAlias = TensorDictModule | Sequence[TensorDictModule] | LossModule


def next_key(key: NestedKey) -> NestedKey:
    """Return the key of the same entry one step later: ``("next", *key)``."""
    return unravel_key(("next", key))


class OffPolicyLoss(LossModule):
    """Base of the losses here: a sum of independent terms, each a public method ``..._loss(td) -> (loss, metadata)``.

    A subclass says which entries it reads (:meth:`_required_keys`, :meth:`_optional_keys`), names its ``out_keys`` and
    computes all its terms in :meth:`_compute`.
    """

    @dataclass
    class _AcceptedKeys:
        """Maintains default values for all configurable tensordict keys.

        This class defines which tensordict keys can be set using '.set_keys(key_name=key_value)' and their default
        values. Observation keys are not among them: they are those of the networks.

        Attributes:
            action (NestedKey): action of the data, and the entry the critics read it from. Defaults to ``"action"``.
            state_action_value (NestedKey): entry the critics write. Defaults to ``"state_action_value"``.
            reward (NestedKey): reward under ``"next"``. Defaults to ``"reward"``.
            done (NestedKey): end of trajectory under ``"next"``. Defaults to ``"done"``.
            terminated (NestedKey): end without bootstrap under ``"next"``. Defaults to ``"terminated"``.
            priority (NestedKey): where ``forward`` writes |TD error|, the largest of the ensemble. Defaults to
                ``"td_error"``.
            priority_weight (NestedKey): importance weights of a prioritised sampler. Defaults to ``"priority_weight"``.
            noise (NestedKey): noise z of the sampled actions, optional, at the root for s and under ``"next"`` for s'.
                Defaults to ``"noise"``.
            flow_noise (NestedKey): noise z of flow matching, optional. Defaults to ``"flow_noise"``.
            flow_time (NestedKey): time t of flow matching, ``[..., 1]`` in [0, 1], optional. Defaults to ``"flow_time"``.
        """

        action: NestedKey = "action"
        state_action_value: NestedKey = "state_action_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"
        noise: NestedKey = "noise"
        flow_noise: NestedKey = "flow_noise"
        flow_time: NestedKey = "flow_time"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    actor_network: DeFlowActor
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    reduction: str
    normalize_q_loss: bool
    num_qvalue_nets: int
    prior_frozen: bool = False
    sampler_precision: Precision = "highest"
    """Of the matrix products that sample base actions; everything that has a gradient is computed in full."""

    def __init__(self, *, reduction: Reduction | None = None) -> None:
        self._in_keys: list[NestedKey] | None = None
        super().__init__()
        reduction = "mean" if reduction is None else reduction
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.reduction = reduction

    # -- keys ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        """Entries the loss cannot do without, from the current keys: fewer where ``tensordict`` gives base actions."""

    @abstractmethod
    def _optional_keys(self) -> list[NestedKey]:
        """Random draws, and base actions of a frozen prior, that the caller may give."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """Required entries of the input, from the current ``set_keys`` and the networks' own keys."""
        if self._in_keys is not None:
            return self._in_keys
        return list(dict.fromkeys(unravel_key(key) for key in self._required_keys()))

    @in_keys.setter
    def in_keys(self, values: Sequence[NestedKey] | None) -> None:
        self._in_keys = None if values is None else list(values)

    @property
    def _dispatch_keys(self) -> list[NestedKey]:
        """What keyword arguments may name: the required entries, then the optional ones and the weights."""
        optional = [*self._optional_keys(), self.tensor_keys.priority_weight]
        return list(dict.fromkeys([*self.in_keys, *(unravel_key(key) for key in optional)]))

    # -- forward ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """Compute every term and its metadata from an input whose masked rows are zero."""

    @dispatch(source="_dispatch_keys")
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return a TensorDict of all terms (``loss_*``) and the detached metadata named in ``out_keys``.

        The input is left as it is, but for the priority entry that losses with a TD error write.

        Raises:
            KeyError: naming every required entry that is missing.
        """
        missing = [key for key in dict.fromkeys(self._required_keys(tensordict)) if tensordict.get(key, None) is None]
        if missing:
            raise KeyError(
                f"{type(self).__name__} needs {missing}, which the input lacks; rename keys with set_keys, and observation "
                "and action keys in the networks too"
            )
        with self._acting():
            out = self._compute(self._blank_masked_rows(tensordict))
        priority = out.pop(self.tensor_keys.priority, None)
        if priority is not None:
            tensordict.set(self.tensor_keys.priority, priority)
        if self.reduction == "none":
            out = {name: value.expand(tensordict.shape) for name, value in out.items()}
        td_out = TensorDict(out, batch_size=tensordict.batch_size if self.reduction == "none" else [])
        self._clear_weakrefs(
            tensordict,
            td_out,
            "actor_network_params",
            "qvalue_network_params",
            "target_actor_network_params",
            "target_qvalue_network_params",
        )
        return td_out

    # -- masks and reductions -----------------------------------------------------------------------------------------

    def _mask(self, tensordict: TensorDictBase) -> Tensor | None:
        """Validity of each row, of shape ``td.shape``, or None where the input carries no mask."""
        mask = None
        for key in self._loss_mask_keys():
            found = tensordict.get(key, None)
            if found is not None:
                found = found.reshape(tensordict.shape)
                mask = found if mask is None else mask & found
        return mask

    def _blank_masked_rows(self, tensordict: TensorDictBase) -> TensorDictBase:
        # A NaN in a masked row survives torch.where at the loss: the backward pass multiplies it by zero. Blanking the
        # inputs is what keeps the gradients finite.
        mask = self._mask(tensordict)
        if mask is None:
            return tensordict
        invalid = ~mask

        def blank(entry: Tensor) -> Tensor:
            if not entry.is_floating_point():
                return entry
            return entry.masked_fill(invalid.reshape(*invalid.shape, *(1,) * (entry.ndim - invalid.ndim)), 0.0)

        return tensordict.apply(blank)

    def _reduce_term(self, term: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Reduce a per-sample term of shape ``td.shape``, honouring masks and priority weights."""
        weights = self._maybe_get_priority_weight(tensordict)
        if weights is None:
            return self._reduce_loss(term, tensordict)
        weights = weights.reshape(term.shape)
        mask = self._mask(tensordict)
        if self.reduction == "mean":
            # TorchRL's weighted mean divides by the sum of the weights left, which may be zero.
            if mask is not None:
                term, weights = torch.where(mask, term, 0.0), weights * mask
            return (term * weights).sum() / weights.sum().clamp_min(tiny(term))
        return self._reduce_loss(term, tensordict, weights=weights)

    def _batch_mean(self, value: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Mean of a per-sample value over the rows that are valid, for statistics of the batch (never weighted)."""
        mask = self._mask(tensordict)
        if mask is None:
            return value.mean()
        return torch.where(mask, value, 0.0).sum() / mask.sum().clamp_min(1)

    def _statistic(self, value: Tensor, tensordict: TensorDictBase) -> Tensor:
        """A per-sample value as metadata: its mean over the batch, or as it is where nothing is reduced."""
        return value if self.reduction == "none" else self._batch_mean(value, tensordict)

    def _q_scale(self, qvalue: Tensor, tensordict: TensorDictBase) -> Tensor | float:
        """Lambda of an actor's Q term: sg(1 / mean|Q|) where ``normalize_q_loss``, else 1."""
        if not self.normalize_q_loss:
            return 1.0
        return 1 / self._batch_mean(qvalue.detach().abs(), tensordict).clamp_min(tiny(qvalue))

    # -- actor --------------------------------------------------------------------------------------------------------

    def _set_actor(self, actor_network: DeFlowActor, *, freeze_prior: bool) -> None:
        if not (hasattr(actor_network, "flow_policy") and hasattr(actor_network, "refinement_policy")):
            raise TypeError(f"actor_network must be a DeFlowActor, got {type(actor_network).__name__}")
        self.convert_to_functional(actor_network, "actor_network")
        if freeze_prior:
            self.freeze_prior_()

    def freeze_prior_(self) -> Self:
        """Fix the prior for good: its parameters require no gradient any more, in every module that shares them.

        From then on base actions are read from the input where it has them, under the refinement's base action key for s and
        under ``("next", that key)`` for s', and drawn from the prior where it has not. Of an unfrozen prior they are never
        read: it has moved on since they were drawn.

        An optimiser made before keeps the prior's parameters but, finding no gradient, leaves them alone;
        :meth:`deflow_torchrl.trainers.UpdateStep.freeze_prior` takes them out of it.
        """
        self.prior_frozen = True
        with self._acting():
            for parameter in self.actor_network.flow_policy.parameters():
                parameter.requires_grad_(False)
                # A gradient left over from the last step would be applied once more.
                parameter.grad = None
        return self

    def _acting(self) -> AbstractContextManager[Any]:
        """Context in which the policy has its parameters: terms are computed inside, and one swap serves them all."""
        return self.actor_network_params.to_module(self.actor_network, preserve_module_state=False)

    @property
    def _base_action_key(self) -> NestedKey:
        return self.actor_network.refinement_policy.base_action_key

    def _given_base_action(self, observations: TensorDictBase | None) -> Tensor | None:
        """Base actions of a frozen prior in ``observations``: the input for s, its ``"next"`` for s'."""
        if not self.prior_frozen or observations is None:
            return None
        return observations.get(self._base_action_key, None)

    def _draw_keys(self) -> list[NestedKey]:
        """What may be given of a base action: its noise, and of a frozen prior's itself."""
        return [self.tensor_keys.noise, *([self._base_action_key] if self.prior_frozen else [])]

    def _actor_keys(self, observations: TensorDictBase | None = None) -> list[NestedKey]:
        """Entries the actor needs: its inputs less the optional noise, or the refinement's where base actions are given."""
        actor = self.actor_network
        if self._given_base_action(observations) is not None:
            return [actor.refinement_policy.observation_key]
        return [key for key in actor.in_keys if unravel_key(key) != unravel_key(_noise_key(actor))]

    def _noise(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """Noise z given under ``key``, or drawn: shape and type of the data's action."""
        noise = tensordict.get(key, None)
        return torch.randn_like(tensordict[self.tensor_keys.action]) if noise is None else noise

    def _base_action(self, observations: TensorDictBase, noise: Tensor) -> Tensor:
        """B = sg(flow(s, z)): the prior's action, no gradient. ``observations`` holds the actor's keys."""
        actor = self.actor_network
        with torch.no_grad(), matmul_precision(self.sampler_precision, noise.device):
            prior = actor.flow_policy
            if isinstance(prior, FlowMatchingPolicy):
                return prior.module(observations[prior.observation_key], noise)
            # A prior of another kind explores in its own way; under the deterministic mode of losses it would not.
            with set_exploration_type(ExplorationType.RANDOM):
                return prior(observations.copy()).get(actor.refinement_policy.base_action_key)

    def _refine(self, observations: TensorDictBase, base_action: Tensor) -> tuple[Tensor, Tensor]:
        """(d, a) = (f(s, b), clip(b + d)), with gradient to the refinement."""
        refinement = self.actor_network.refinement_policy
        return refinement.module(observations[refinement.observation_key], base_action)

    # -- critics ------------------------------------------------------------------------------------------------------

    def _set_critic(
        self,
        qvalue_network: Critics,
        *,
        num_qvalue_nets: int,
        create_target_params: bool,
        deactivate_vmap: bool,
    ) -> None:
        if isinstance(qvalue_network, OffPolicyLoss):
            # The critics another loss trains: the same parameters, not a copy that nothing would ever move.
            self.__dict__["qvalue_network"] = qvalue_network.qvalue_network
            self.qvalue_network_params = qvalue_network.qvalue_network_params
            self.num_qvalue_nets = qvalue_network.num_qvalue_nets
            self.deactivate_vmap = deactivate_vmap
            self._make_vmap()
            return
        critics = _critic_list(qvalue_network, num_qvalue_nets)
        self.convert_to_functional(
            critics, "qvalue_network", expand_dim=len(critics), create_target_params=create_target_params
        )
        self.num_qvalue_nets = len(critics)
        self.deactivate_vmap = deactivate_vmap
        self._make_vmap()

    def _make_vmap(self) -> None:
        self._vmap_qvalue_network = _vmap_func(
            self.qvalue_network, (None, 0), randomness=self.vmap_randomness, pseudo_vmap=self.deactivate_vmap
        )

    def __getstate__(self) -> dict[str, Any]:
        # The vmapped critic is a closure: it neither pickles nor follows a copy. It is made again instead.
        return {name: value for name, value in super().__getstate__().items() if name != "_vmap_qvalue_network"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "qvalue_network" in self.__dict__:
            self._make_vmap()

    def _critic_keys(self) -> list[NestedKey]:
        """Entries the critics read besides the action."""
        return [key for key in self.qvalue_network.in_keys if unravel_key(key) != unravel_key(self.tensor_keys.action)]

    @property
    def _is_plain(self) -> bool:
        """Whether calling the critics is calling their module, nothing else."""
        return type(self.qvalue_network) is TensorDictModule and not is_wrapped(self.qvalue_network)

    def _qvalues(
        self, observations: TensorDictBase, action: Tensor, params: TensorDictBase, *, frozen: bool = False
    ) -> Tensor:
        """Q_j(s, a) of the whole ensemble, ``[N, *td.shape]``, without gradient to its parameters if they are frozen."""
        critic = getattr(self.qvalue_network, "module", None)
        if (
            isinstance(critic, StateActionValue)
            and self.num_qvalue_nets > 1
            and not self.deactivate_vmap
            and self._is_plain
        ):
            observation = observations[self.qvalue_network.in_keys[0]]
            values = critic.ensemble(observation, action, params.get("module"), frozen=frozen)
            if values is not None:
                return values.squeeze(-1)
        if frozen:
            # Not params.detach(): a locked TensorDict remembers its result, which a later .to(dtype) leaves stale.
            params = params.apply(torch.Tensor.detach)
        inputs = observations.select(*self._critic_keys()).set(self.tensor_keys.action, action)
        return self._vmap_qvalue_network(inputs, params).get(self.tensor_keys.state_action_value).squeeze(-1)


def tiny(tensor: Tensor) -> float:
    """Smallest normal number of the tensor's type, a divisor's lower bound that changes no quotient worth having."""
    return torch.finfo(tensor.dtype).tiny


def _noise_key(actor: DeFlowActor) -> NestedKey:
    prior = actor.flow_policy
    key = prior.noise_key if isinstance(prior, FlowMatchingPolicy) else None
    return "noise" if key is None else key


def _critic_list(
    qvalue_network: TensorDictModule | Sequence[TensorDictModule], num_qvalue_nets: int
) -> list[TensorDictModule]:
    """A list of critics as given, or copies of one module: the first as it is, the others re-initialised by their layers."""
    if not isinstance(qvalue_network, torch.nn.Module) or isinstance(qvalue_network, torch.nn.ModuleList):
        if len(qvalue_network) == 0:
            raise ValueError("qvalue_network is an empty list: give at least one critic")
        return list(qvalue_network)
    if num_qvalue_nets < 1:
        raise ValueError(f"num_qvalue_nets must be positive, got {num_qvalue_nets}")
    copies = [copy.deepcopy(qvalue_network) for _ in range(num_qvalue_nets)]
    for critic in copies[1:]:
        reset = [layer for layer in critic.modules() if callable(getattr(layer, "reset_parameters", None))]
        for layer in reset:
            layer.reset_parameters()  # type: ignore[operator]
        if not reset:
            warnings.warn(
                "qvalue_network has no layer with reset_parameters: its copies start identical and stay so; "
                "pass a list of critics instead",
                stacklevel=2,
            )
    return copies
