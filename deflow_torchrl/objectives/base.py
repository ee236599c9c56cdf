# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What every loss here has from its base: keys, random draws, masks, weights, reductions, coefficients and ``forward``."""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import TD0Estimator, ValueEstimatorBase

from deflow_torchrl.modules.actor import DeFlowActor
from deflow_torchrl.modules.critics import CriticEnsemble, TwinCritic, aggregate, copies
from deflow_torchrl.objectives import acting, terms

Reduction = Literal["mean", "sum", "none"]

Critics: TypeAlias = TensorDictModuleBase | Sequence[TensorDictModuleBase] | CriticEnsemble

Terms: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""A loss and its metadata, detached."""

_Method = TypeVar("_Method", bound=Callable[..., Terms])


_CRITICS = ("qvalue_network", "flow_critic_network", "latent_qvalue_network", "marginal_qvalue_network")


def next_key(key: NestedKey) -> NestedKey:
    """Return the key of the same entry one step later: ``("next", *key)``."""
    return unravel_key(("next", key))


def term(method: _Method) -> _Method:
    """Make ``NAME_loss(self, td)`` public: it runs with the policies' parameters in place and without invalid rows."""

    @functools.wraps(method)
    def public(self: OffPolicyLoss, tensordict: TensorDictBase) -> Terms:
        with self._functional_policies():
            return method(self, self._without_masked_rows(tensordict))

    return public  # type: ignore[return-value]


class OffPolicyLoss(LossModule):
    """Base of the losses here: a sum of independent terms, each also a public method ``NAME_loss(td) -> (loss, metadata)``.

    A subclass converts its networks, names its ``out_keys``, says which entries it reads (:meth:`_required_keys`,
    :meth:`_optional_keys`) and computes all its terms in :meth:`_compute`. Terms are computed for every sample and reduced by
    :meth:`_reduce`, so that masks, priority weights and ``reduction="none"`` mean the same everywhere.

    Arguments that many losses share:

    Args:
        qvalue_network (list of TensorDictModule, TensorDictModule or CriticEnsemble): critics that read the state and
            ``action`` and write ``state_action_value [..., 1]``. A list is stacked into a copy that keeps its
            initialisation; one module is copied ``num_qvalue_nets`` times, all but the first copy initialised anew by their
            own layers. Critics of another kind come as a :class:`~deflow_torchrl.modules.critics.CriticEnsemble`.

    Keyword Args:
        reduction (str, optional): ``"mean"`` (default), ``"sum"`` over the batch, or ``"none"`` (one number a sample).
        q_aggregation (str or float, optional): ``"mean"`` or ``"min"`` over the target critics, or a number rho for
            mean - rho std. Defaults to ``"mean"``.
        delay_qvalue (bool, optional): bootstrap from target critics, which ``SoftUpdate`` moves. Defaults to ``True``.
        num_qvalue_nets (int, optional): copies of a single critic. Ignored for a list. Defaults to ``2``.
        deactivate_vmap (bool, optional): evaluate the critics in a loop. Defaults to ``False``.

    Coefficients (delta, alpha, temperature, ...) are buffers: ``loss.alpha = 0.1`` changes one in mid-training, also inside a
    captured graph. The discount belongs to the value estimator:
    ``loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)``.

    The next state of a terminated row reaches no number. Of chunks of h actions ``valid`` is read: ``[..., h]`` or
    ``[..., 1]``, 1 up to the end of the trajectory; it masks ``loss_flow`` step by step, or row by row, and its last column
    ``loss_qvalue``. Both still divide by the number of rows.
    """

    @dataclass
    class _AcceptedKeys:
        """Maintains default values for all configurable tensordict keys.

        This class defines which tensordict keys can be set using '.set_keys(key_name=key_value)' and their default
        values. Observation keys are not among them: they are those of the networks.

        Attributes:
            action (NestedKey): action of the data, and the entry the critics read it from. Defaults to ``"action"``.
            state_action_value (NestedKey): entry the critics write; TorchRL's FQLLoss calls it ``value``, which is taken too.
                Defaults to ``"state_action_value"``.
            reward (NestedKey): reward under ``"next"``. Defaults to ``"reward"``.
            done (NestedKey): end of trajectory under ``"next"``. Defaults to ``"done"``.
            terminated (NestedKey): end without bootstrap under ``"next"``; where it is missing, ``done``. Defaults to
                ``"terminated"``.
            priority (NestedKey): where ``forward`` writes |TD error|, the largest of the ensemble. Defaults to
                ``"td_error"``.
            priority_weight (NestedKey): importance weights of a prioritised sampler. Defaults to ``"priority_weight"``.
            noise (NestedKey): noise z of the sampled actions, optional, at the root for s and under ``"next"`` for s'.
                Defaults to ``"noise"``.
            flow_noise (NestedKey): noise z of flow matching, optional. Defaults to ``"flow_noise"``.
            flow_time (NestedKey): time t of flow matching, ``[..., 1]`` in [0, 1], optional. Defaults to ``"flow_time"``.
            valid (NestedKey): which steps of a chunk lie inside the trajectory, optional. Defaults to ``"valid"``.
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
        valid: NestedKey = "valid"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0

    actor_network: Any
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    diffusion_policy: TensorDictModuleBase
    diffusion_policy_params: TensorDictParams
    target_diffusion_policy_params: TensorDictParams
    flow_policy: TensorDictModuleBase
    flow_policy_params: TensorDictParams
    target_flow_policy_params: TensorDictParams
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams
    qvalue_network: nn.Module
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams
    flow_critic_network: nn.Module
    flow_critic_network_params: TensorDictParams
    target_flow_critic_network_params: TensorDictParams

    out_keys: list[str]
    reduction: str
    q_aggregation: str | float = "mean"
    normalize_q_loss: bool = False
    state_buffers: tuple[str, ...] = ()
    """Buffers of its own that training moves, as parameters of a seed; all others are settings."""
    _functional: tuple[str, ...] = ()
    _gives_samples: bool = False
    """Whether it draws as many a' of s' as the critics want (``CriticEnsemble.next_samples``)."""

    def __init__(self, *, reduction: Reduction | None = None) -> None:
        self._in_keys: list[NestedKey] | None = None
        super().__init__()
        reduction = "mean" if reduction is None else reduction
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.reduction = reduction

    # -- networks and coefficients ------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            isinstance(value, (int, float))
            and name in type(self)._all_schedulable_buffers
            and getattr(self, name, value) is None
        ):  # a coefficient that was not set so far
            self.__dict__.pop(name, None)
            self._buffers.pop(name, None)
            self._register_coefficient(name, float(value))
            return
        super().__setattr__(name, value)

    def _keep_apart(self, name: str, part: nn.Module) -> None:
        """Note a part's parameters.

        Raises:
            ValueError: if another part would train one of them too: the gradient of one would move the other.
        """
        owners = self.__dict__.setdefault("_owners", {})
        for parameter in part.parameters():
            owner = owners.setdefault(id(parameter), name)
            if owner != name and parameter.requires_grad:
                raise ValueError(
                    f"{owner} and {name} share parameters, and what trains the one would move the other; give each a copy "
                    "(an encoder too: copy.deepcopy)"
                )

    def _add_policy(self, policy: nn.Module, name: str, *, create_target_params: bool = False) -> None:
        """Convert a policy or value network; it computes with ``NAME_params`` inside :meth:`_functional_policies`."""
        if isinstance(policy, DeFlowActor):
            self._keep_apart("flow_policy", policy.flow_policy)
            self._keep_apart("refinement_policy", policy.refinement_policy)
        else:
            self._keep_apart(name, policy)
        self.convert_to_functional(policy, name, create_target_params=create_target_params)
        self._functional = (*self._functional, name)

    @contextlib.contextmanager
    def _functional_policies(self, first: int = 0) -> Iterator[None]:
        """Context in which the policies compute with their ``NAME_params``, from the ``first`` one on."""
        if first == len(self._functional):
            yield
            return
        name = self._functional[first]
        params = getattr(self, f"{name}_params")
        with params.to_module(getattr(self, name), preserve_module_state=False), self._functional_policies(first + 1):
            yield

    def _add_critics(
        self,
        qvalue_network: Critics | OffPolicyLoss,
        *,
        num_qvalue_nets: int,
        deactivate_vmap: bool,
        create_target_params: bool = True,
    ) -> None:
        if isinstance(qvalue_network, OffPolicyLoss):
            # The critics that another loss trains: the same parameters, not a copy that nothing would move.
            self.__dict__["qvalue_network"] = qvalue_network.qvalue_network
            self.qvalue_network_params = qvalue_network.qvalue_network_params
            self.__dict__["_critics"] = [qvalue_network.critics]
            return
        critics = _ensemble(qvalue_network, num_qvalue_nets=num_qvalue_nets, deactivate_vmap=deactivate_vmap)
        if critics.next_samples is not None and not self._gives_samples:
            raise TypeError(
                f"a {type(critics).__name__} wants {critics.next_samples} actions of each next state, and {type(self).__name__} "
                "gives one"
            )
        self._keep_apart("the critics", critics)
        critics.bind(self, create_target_params=create_target_params)
        self.__dict__["_critics"] = [critics]  # in a list: a module here would be listed among the networks
        own = [*critics.loss_names, *critics.metadata_names]
        if "loss_qvalue" in self.out_keys and own != ["loss_qvalue"]:
            place = self.out_keys.index("loss_qvalue")
            terms_of = [*self.out_keys[:place], *critics.loss_names, *self.out_keys[place + 1 :]]
            self.out_keys = [*terms_of, *critics.metadata_names]
        self._forward_value_estimator_keys()

    def _add_further_critics(
        self, critics: Critics, name: str, *, num_qvalue_nets: int, deactivate_vmap: bool
    ) -> CriticEnsemble:
        """Keep an ensemble beside the critics, without targets, with its parameters under ``NAME_params``."""
        ensemble = _ensemble(critics, num_qvalue_nets=num_qvalue_nets, deactivate_vmap=deactivate_vmap)
        ensemble.network_name = name
        self._keep_apart(name, ensemble)
        ensemble.bind(self, create_target_params=False)
        self.__dict__["_critics"].append(ensemble)
        self._forward_value_estimator_keys()
        return ensemble

    @property
    def critics(self) -> CriticEnsemble:
        """The critics, to be evaluated: ``loss.critics.values(td) -> [J, *B]``."""
        if "_critics" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no critics")
        return self.__dict__["_critics"][0]

    def _add_coefficient(self, name: str, value: float | None, *, exact: bool = True) -> None:
        """Keep a number as a buffer that can be assigned to; its class lists it in ``_schedulable_buffers``.

        Args:
            name: of the attribute, which is None where the value is.
            value: the number.

        Keyword Args:
            exact: in double precision, where the device has it, as a Python number; else in the type of the parameters.

        Raises:
            ValueError: if it is negative or NaN.
        """
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
        self._register_coefficient(name, None if value is None else float(value), exact=exact)

    def _register_coefficient(self, name: str, value: float | None, *, exact: bool = True) -> None:
        example = next(iter(self.parameters()))
        dtype = torch.float64 if exact and example.device.type != "mps" else example.dtype
        self.register_coeff_buffer(name, value, device=example.device, dtype=dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # In states of before 0.2 some coefficients were no buffers: those stay as they are here.
        for name in self._all_schedulable_buffers & self._buffers.keys():
            state_dict.setdefault(f"{prefix}{name}", self._buffers[name])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- keys ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        """Entries the loss cannot do without, from the current keys: fewer where ``tensordict`` gives base actions."""

    @abstractmethod
    def _optional_keys(self) -> list[NestedKey]:
        """Random draws, and base actions of a frozen prior, that the caller may give."""

    def _sampling_keys(self) -> list[NestedKey]:
        """Optional entries of a loss with a flow, critics and a policy that maps noise to actions."""
        keys = self.tensor_keys
        draws = [keys.noise, next_key(keys.noise), keys.flow_noise, keys.flow_time]
        return [*draws, *self.critics.draw_keys, keys.valid]

    def _next_keys(self, *states: NestedKey) -> list[NestedKey]:
        """Entries under ``"next"`` of a TD target: those of the state and what ends and rewards it."""
        keys = self.tensor_keys
        return [next_key(key) for key in (*states, keys.reward, keys.done, keys.terminated)]

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

    def set_keys(self, **kwargs: Any) -> None:
        """As :meth:`torchrl.objectives.LossModule.set_keys`; ``value`` names the critics' entry where there is no V."""
        if "value" in kwargs and "value" not in self._AcceptedKeys.__dataclass_fields__:
            kwargs["state_action_value"] = kwargs.pop("value")
        super().set_keys(**kwargs)

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        keys = self.tensor_keys
        if self._value_estimator is not None:
            self._value_estimator.set_keys(reward=keys.reward, done=keys.done, terminated=keys.terminated)
        for critics in self.__dict__.get("_critics", ()):
            critics.action_key = keys.action
            critics.value_key = keys.state_action_value

    def make_value_estimator(
        self,
        value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None,
        **hyperparams: Any,
    ) -> Self:
        """Set gamma: ``make_value_estimator(ValueEstimators.TD0, gamma=0.99)``.

        Raises:
            NotImplementedError: for any estimator but TD0.
        """
        kind = value_type if isinstance(value_type, type) else type(value_type)
        if issubclass(kind, ValueEstimatorBase) and not issubclass(kind, TD0Estimator):
            raise NotImplementedError(f"{kind.__name__} is not for {type(self).__name__}, whose targets are TD0's")
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is not None:
            dispatch_value_estimator(
                self, value_type, supported=(ValueEstimators.TD0,), value_network=None, **hyperparams
            )
        self._forward_value_estimator_keys()
        return self

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
        may_lack = next_key(self.tensor_keys.terminated)
        missing = [
            key
            for key in dict.fromkeys(self._required_keys(tensordict))
            if key != may_lack and tensordict.get(key, None) is None
        ]
        if missing:
            raise KeyError(
                f"{type(self).__name__} needs {missing}, which the input lacks; rename keys with set_keys, and observation "
                "and action keys in the networks too"
            )
        with self._functional_policies():
            out = self._compute(self._without_masked_rows(tensordict))
        priority = out.pop("td_error", None)
        if priority is not None:
            tensordict.set(self.tensor_keys.priority, priority)
        if self.reduction == "none":
            out = {
                name: value if value.ndim > tensordict.ndim else value.expand(tensordict.shape)
                for name, value in out.items()
            }
        td_out = TensorDict(out, batch_size=tensordict.batch_size if self.reduction == "none" else [])
        names = [f"{prefix}{name}_params" for name in (*self._functional, *_CRITICS) for prefix in ("", "target_")]
        self._clear_weakrefs(tensordict, td_out, *names)
        return td_out

    # -- states, draws and targets ------------------------------------------------------------------------------------

    def _draw(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """Noise N(0, I) given under ``key``, or drawn: shape and type of the data's action."""
        noise, action = tensordict.get(key, None), tensordict[self.tensor_keys.action]
        return torch.randn_like(action) if noise is None else _as_wide(noise, key, action.shape[-1])

    def _draw_next(self, tensordict: TensorDictBase) -> Tensor:
        """Noise of the target's actions a', given or drawn: one ``[*B, A]``, or as many as the critics want ``[*B, n, A]``."""
        key, samples = next_key(self.tensor_keys.noise), self.critics.next_samples
        given = tensordict.get(key, None)
        if samples is None or given is not None:
            return self._draw(tensordict, key)
        action = tensordict[self.tensor_keys.action]
        return torch.randn_like(action.unsqueeze(-2).expand(*action.shape[:-1], samples, action.shape[-1]))

    def _flow_error(self, flow_policy: TensorDictModuleBase, tensordict: TensorDictBase) -> Tensor:
        """Flow matching error of every sample, with gradient to the flow; draws ``flow_noise``, then ``flow_time``."""
        keys = self.tensor_keys
        action = tensordict[keys.action]
        noise = self._draw(tensordict, keys.flow_noise)
        time = tensordict.get(keys.flow_time, None)
        time = torch.rand_like(action[..., :1]) if time is None else _as_wide(time, keys.flow_time, 1)
        velocity = acting.velocity(flow_policy, tensordict)
        return terms.flow_matching(velocity, action, noise, time, tensordict.get(keys.valid, None))

    def _next(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What stands under ``"next"``, zero in the rows that have terminated."""
        following = tensordict["next"].copy()
        terminated = following.get(self.tensor_keys.terminated, following.get(self.tensor_keys.done, None))
        if terminated is None:
            return following
        invalid = _drop_last(terminated.bool(), tensordict.ndim)
        for key, entry in list(following.items(True, True)):
            if key != unravel_key(self.tensor_keys.reward):
                following.set(key, _zero(entry, invalid))
        return following

    def _with_action(self, state: TensorDictBase, action: Tensor) -> TensorDictBase:
        """The critics' input: a state, or what their encoder made of it, with this action."""
        return self.critics.state_of(state).set(self.tensor_keys.action, action)

    def _bootstrap(self, tensordict: TensorDictBase, next_value: Tensor) -> Tensor:
        """Target y = r + gamma (1 - terminated) V(s') ``[*B]``; gamma to the power of ``steps_to_next_obs``, where given."""
        for name in (self.tensor_keys.done, self.tensor_keys.terminated):
            flag = tensordict.get(next_key(name), None)
            # Of a number the estimator would take the bits' complement.
            if flag is not None and flag.dtype != torch.bool:
                tensordict = tensordict.copy().set(next_key(name), flag.bool())
        return self.value_estimator.value_estimate(tensordict, next_value=next_value.unsqueeze(-1)).squeeze(-1)

    def _td_terms(
        self,
        tensordict: TensorDictBase,
        next_state: Callable[[], TensorDictBase],
        reduce_critics: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the critics' terms, reduced, and ``td_error`` of every sample.

        Args:
            tensordict: the batch.
            next_state: gives s' with the action a' of the target, without gradient.
            reduce_critics: target critics ``[J, *B]`` to one value; by ``q_aggregation`` if None.
        """
        critic_terms = self.critics.td_terms(
            tensordict,
            next_state,
            functools.partial(self._bootstrap, tensordict),
            functools.partial(aggregate, how=self.q_aggregation) if reduce_critics is None else reduce_critics,
        )
        return self._reduce_critic_terms(critic_terms, tensordict)

    def _reduce_critic_terms(self, critic_terms: dict[str, Tensor], tensordict: TensorDictBase) -> dict[str, Tensor]:
        """Reduce terms of every sample, without the chunks that leave their trajectory; ``td_error`` stays as it is."""
        valid = tensordict.get(self.tensor_keys.valid, None)
        if valid is not None:
            critic_terms = {name: value * valid[..., -1] for name, value in critic_terms.items()}
        mask = self._mask(tensordict)
        error = critic_terms.pop("td_error")
        reduced = {
            name: self._reduce(value, tensordict) if name.startswith("loss_") else self._statistic(value, tensordict)
            for name, value in critic_terms.items()
        }
        # A masked row has no error: a prioritised sampler must not come back for padding.
        return {**reduced, "td_error": error if mask is None else torch.where(_expand(mask, error), error, 0.0)}

    def _one_term(self, name: str, out: dict[str, Tensor]) -> Terms:
        """One of several terms that are computed together, and their metadata.

        Raises:
            RuntimeError: if there is no such term: critics of another kind have other ones.
        """
        if name not in out:
            raise RuntimeError(f"these critics have no {name}, they have {', '.join(self.critics.loss_names)}")
        return out[name], {key: value for key, value in out.items() if not key.startswith("loss_")}

    def _q_scale(self, qvalue: Tensor, tensordict: TensorDictBase) -> Tensor | float:
        """Lambda of an actor's Q term: sg(1 / mean|Q|) where ``normalize_q_loss``, else 1."""
        if not self.normalize_q_loss:
            return 1.0
        return 1 / self._batch_mean(qvalue.detach().abs(), tensordict).clamp_min(tiny(qvalue))

    # -- masks and reductions -----------------------------------------------------------------------------------------

    def _mask(self, tensordict: TensorDictBase) -> Tensor | None:
        """Which rows are valid, of shape ``td.shape`` or more; None where the input carries no mask."""
        mask = None
        for key in self._loss_mask_keys():
            found = tensordict.get(key, None)
            if found is not None:
                found = _drop_last(found, tensordict.ndim)
                mask = found if mask is None else mask & found
        return mask

    def _without_masked_rows(self, tensordict: TensorDictBase) -> TensorDictBase:
        # A NaN in a masked row survives torch.where at the loss: the backward pass multiplies it by zero. Zeros in the
        # inputs are what keeps the gradients finite.
        mask = self._mask(tensordict)
        return tensordict if mask is None else tensordict.apply(lambda entry: _zero(entry, ~mask))

    def _maybe_get_priority_weight(self, tensordict: TensorDictBase) -> Tensor | None:
        # TorchRL's looks a nested key up in a way that raises.
        asked = self.use_prioritized_weights in (True, "auto")
        return tensordict.get(self.tensor_keys.priority_weight, None) if asked else None

    def _reduce(self, value: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Reduce a term of every sample, honouring masks and priority weights."""
        weights = self._maybe_get_priority_weight(tensordict)
        if weights is None:
            return self._reduce_loss(value, tensordict)
        weights = _expand(weights, value)
        mask = self._mask(tensordict)
        if mask is not None:
            mask = _expand(mask, value)
            value, weights = torch.where(mask, value, 0.0), torch.where(mask, weights, 0.0)
        if self.reduction == "mean":
            # TorchRL's weighted mean divides by the sum of the weights left, which may be zero.
            return (value * weights).sum() / weights.sum().clamp_min(tiny(value))
        return self._reduce_loss(value, weights=weights)

    def _batch_mean(self, value: Tensor, tensordict: TensorDictBase) -> Tensor:
        """Mean of a value of every sample over the rows that are valid, for statistics of the batch (never weighted)."""
        mask = self._mask(tensordict)
        if mask is None:
            return value.mean()
        mask = _expand(mask, value)
        return torch.where(mask, value, 0.0).sum() / mask.sum().clamp_min(1)

    def _statistic(self, value: Tensor, tensordict: TensorDictBase) -> Tensor:
        """A value of every sample as metadata: its mean over the batch, or as it is where nothing is reduced."""
        value = value.detach()
        return value if self.reduction == "none" else self._batch_mean(value, tensordict)


def _ensemble(critics: Critics, *, num_qvalue_nets: int, deactivate_vmap: bool) -> CriticEnsemble:
    if isinstance(critics, CriticEnsemble):
        return critics
    single = isinstance(critics, nn.Module) and not isinstance(critics, nn.ModuleList)
    listed = copies(critics, num_qvalue_nets) if single else list(critics)
    return TwinCritic(listed, deactivate_vmap=deactivate_vmap)


def tiny(tensor: Tensor) -> float:
    """Smallest normal number of the tensor's type, a divisor's lower bound that changes no quotient worth having."""
    return torch.finfo(tensor.dtype).tiny


def _as_wide(draw: Tensor, key: NestedKey, width: int) -> Tensor:
    """A draw of the input, refused where broadcasting would hide that it has another last dimension."""
    if draw.shape[-1:] != (width,):
        raise ValueError(f"{key!r} has the shape {list(draw.shape)}, and its last dimension must be {width}")
    return draw


def _drop_last(flags: Tensor, ndim: int) -> Tensor:
    """Flags ``[*B, 1]``, as rewards have them, to ``[*B]``."""
    return flags.squeeze(-1) if flags.ndim > ndim and flags.shape[-1] == 1 else flags


_expand = LossModule._expand_loss_mask
"""Flags or weights of rows, to the shape of a term that may have more dimensions."""


def _zero(entry: Tensor, rows: Tensor) -> Tensor:
    """Zero the floating-point numbers of these rows, in an entry that has a dimension behind them."""
    if not entry.is_floating_point() or entry.ndim <= rows.ndim or entry.shape[: rows.ndim] != rows.shape:
        return entry
    return entry.masked_fill(rows.reshape(*rows.shape, *(1,) * (entry.ndim - rows.ndim)), 0.0)
