# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Critics as one object: what a loss, a policy that chooses by value, or a diagnostic asks of an ensemble of critics.

Nobody else knows how an ensemble is evaluated. A critic of another kind is a subclass of :class:`CriticEnsemble`: see
``examples/extending_critic.py``.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Literal, get_args

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import _vmap_func

from deflow_torchrl.modules.networks import CheckedModule, StateActionValue, is_wrapped
from deflow_torchrl.modules.policies import run_encoders

Aggregation = Literal["mean", "min"]


def aggregate(values: Tensor, how: str | float) -> Tensor:
    """Reduce values of J critics ``[J, *B]`` to ``[*B]``: their ``"mean"`` or ``"min"``, or mean - rho std for a number rho.

    The standard deviation has the divisor J.
    """
    if how == "min":
        return values.amin(0)
    mean = values.mean(0)
    return mean if how == "mean" else mean - float(how) * values.std(0, correction=0)


def check_aggregation(how: object) -> None:
    """Raise ValueError unless :func:`aggregate` takes it."""
    if how not in get_args(Aggregation) and not (isinstance(how, float | int) and how >= 0):
        raise ValueError(f"q_aggregation must be 'mean', 'min' or a number rho >= 0 of mean - rho std, got {how!r}")


class CriticEnsemble(nn.Module):
    """J critics of a state and an action, evaluated together.

    A subclass holds its networks as submodules, names what it reads in ``in_keys`` and returns the values in :meth:`forward`.
    A loss that is given the object keeps its parameters under ``loss.qvalue_network_params`` and their targets under
    ``loss.target_qvalue_network_params``. From then on :meth:`values` evaluates with what stands there.

    Attributes:
        in_keys: entries of the state and the action that :meth:`values` reads.
        action_key: which of them is the action.
        draw_keys: random draws that :meth:`td_terms` reads from the input where it has them.
        loss_names: terms that :meth:`td_terms` returns.
        metadata_names: what else it returns of every sample, detached; metadata of the loss.
        next_samples: how many actions a' of s' its target needs: ``[*B, n, A]``; None is one, ``[*B, A]``. Losses whose
            acting policy is a function of noise draw n of them.
        network_name: X of ``loss.X_params``, which hold its parameters inside a loss.
    """

    in_keys: list[NestedKey]
    action_key: NestedKey = "action"
    draw_keys: Sequence[NestedKey] = ()
    loss_names: Sequence[str] = ("loss_qvalue",)
    metadata_names: Sequence[str] = ()
    next_samples: int | None = None
    network_name: str = "qvalue_network"

    def forward(self, tensordict: TensorDictBase) -> Tensor:
        """Return Q_j(s, a) ``[J, *B]`` by the parameters that the networks hold now."""
        raise NotImplementedError

    def values(self, tensordict: TensorDictBase, *, target: bool = False, frozen: bool = False) -> Tensor:
        """Return Q_j(s, a) of the whole ensemble.

        Args:
            tensordict: what ``in_keys`` names, ``[*B]``; it is left as it is.

        Keyword Args:
            target: by the target critics; by the critics themselves in a loss without targets.
            frozen: no gradient reaches the critics' parameters; one to the action may still flow.

        Returns:
            ``[J, *B]``; float32 under autocast.
        """
        with self._using(self._parameters_of(target=target, frozen=frozen)):
            return full_precision(self(tensordict))

    def encode(self, tensordict: TensorDictBase, *, target: bool = False) -> TensorDictBase:
        """Return ``tensordict`` with what the ensemble's encoder makes of the state in the place of the state.

        It can be given to :meth:`values` and :meth:`td_terms` in the state's place, so that the encoder runs once for several of
        them. Critics without an encoder of the ensemble's return ``tensordict``.
        """
        return tensordict

    def state_of(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Select what :meth:`values` reads besides the action, of a state or a result of :meth:`encode`."""
        return tensordict.select(*self.state_keys)

    def td_terms(
        self,
        tensordict: TensorDictBase,
        next_state: Callable[[], TensorDictBase],
        bootstrap: Callable[[Tensor], Tensor],
        reduce_critics: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Return the terms that train the critics, and ``td_error``, each of every sample ``[*B]``.

        Here: the mean over critics of (Q_j(s, a) - sg(y))^2 with y = bootstrap(reduce_critics(Qbar(s', a'))), and |TD error|,
        the largest of the ensemble, detached.

        Args:
            tensordict: state and action of the data.
            next_state: gives s' with the action a' that the policy takes there, without gradient.
            bootstrap: turns values of (s', a') ``[*B]`` into targets y = r + gamma (1 - terminated) value.
            reduce_critics: turns values of the target critics ``[J, *B]`` into ``[*B]``.
        """
        with torch.no_grad():
            target = bootstrap(reduce_critics(self.values(next_state(), target=True)))
        error = self.values(tensordict) - target
        return {"loss_qvalue": error.square().mean(0), "td_error": error.detach().abs().amax(0)}

    # -- inside a loss ------------------------------------------------------------------------------------------------

    def bind(self, loss: LossModule, *, create_target_params: bool) -> None:
        """Put the parameters under ``loss.X_params``, X the ``network_name``, and evaluate with those from now on."""
        loss.convert_to_functional(self, self.network_name, create_target_params=create_target_params)
        self.__dict__["_loss"] = loss

    def reset_parameters_recursive(self) -> None:
        """Initialise every layer anew; the loss's method of this name calls it."""
        for layer in _resettable(self):
            layer.reset_parameters()  # type: ignore[operator]

    @property
    def state_keys(self) -> list[NestedKey]:
        """Entries :meth:`values` reads besides the action."""
        return [key for key in self.in_keys if unravel_key(key) != unravel_key(self.action_key)]

    def _using(self, params: TensorDictBase | None) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if params is None else params.to_module(self, preserve_module_state=False)

    def _parameters_of(self, *, target: bool, frozen: bool) -> TensorDictBase | None:
        loss = self.__dict__.get("_loss")
        if loss is None:
            return None
        params = getattr(loss, f"{'target_' if target else ''}{self.network_name}_params")
        # Not params.detach(): a locked TensorDict keeps its result, which a later .to(dtype) leaves stale.
        return params.apply(Tensor.detach) if frozen else params


class TwinCritic(CriticEnsemble):
    """Critics of one layout, evaluated by ``torch.vmap`` over their stacked parameters.

    The losses make it of a list of TensorDictModules, whose initialisation it keeps.

    Args:
        critics: modules that read a state and an action and write a value ``[*B, 1]``. Each may be a
            ``TensorDictSequential`` that begins with an encoder of its own.

    Keyword Args:
        action_key: which of their ``in_keys`` is the action.
        value_key: where they write the value.
        deactivate_vmap: evaluate them in a loop.

    Raises:
        ValueError: if there is no critic.
    """

    def __init__(
        self,
        critics: Sequence[TensorDictModuleBase],
        *,
        action_key: NestedKey = "action",
        value_key: NestedKey = "state_action_value",
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__()
        if len(critics) == 0:
            raise ValueError("qvalue_network is an empty list: give at least one critic")
        self.critics = nn.ModuleList(critics)
        self.in_keys = list(critics[0].in_keys)
        self.action_key = action_key
        self.value_key = value_key
        self.deactivate_vmap = deactivate_vmap

    @classmethod
    def of(
        cls,
        network: nn.Module,
        params: TensorDictParams,
        *,
        action_key: NestedKey = "action",
        value_key: NestedKey = "state_action_value",
    ) -> CriticEnsemble:
        """Return a loss's critics from its ``qvalue_network`` and ``qvalue_network_params``, whose parameters it shares."""
        if isinstance(network, CriticEnsemble):
            critics = copy.copy(network)
        else:
            critics = cls([network], action_key=action_key, value_key=value_key)
            del critics._modules["critics"]
            critics.__dict__["_network"] = network
        critics.__dict__["_loss"] = SimpleNamespace(qvalue_network_params=params, target_qvalue_network_params=params)
        return critics

    def bind(self, loss: LossModule, *, create_target_params: bool) -> None:
        """As :meth:`CriticEnsemble.bind`; the parameters of the critics are stacked, ``[J, ...]``."""
        critics = list(self.critics)
        del self._modules["critics"]
        shared = [count for count in Counter(id(p) for it in critics for p in it.parameters()).values() if count > 1]
        if shared:
            warnings.warn(
                "critics of the list share parameters, which would not be trained; give the shared part as the encoder of "
                "EncodedCritics",
                stacklevel=4,
            )
        loss.convert_to_functional(
            critics, self.network_name, expand_dim=len(critics), create_target_params=create_target_params
        )
        self.__dict__["_network"] = critics[0]
        self.__dict__["_loss"] = loss
        # Looked up once now: the first look-up writes to the loss, which a compiled loss must not do.
        _ = loss.vmap_randomness

    def forward(self, tensordict: TensorDictBase) -> Tensor:
        """As :meth:`CriticEnsemble.forward`, one critic after the other."""
        inputs = tensordict.select(*self.in_keys)
        return torch.stack([critic(inputs.copy())[self.value_key].squeeze(-1) for critic in self.critics])

    def values(self, tensordict: TensorDictBase, *, target: bool = False, frozen: bool = False) -> Tensor:
        """As :meth:`CriticEnsemble.values`."""
        params = self._parameters_of(target=target, frozen=frozen)
        if params is None:
            return super().values(tensordict, target=target, frozen=frozen)
        network = self.__dict__["_network"]
        if params.batch_size[0] > 1 and not self.deactivate_vmap and not is_wrapped(network):
            core = network.module if type(network) in (TensorDictModule, CheckedModule) else None
            if isinstance(core, StateActionValue):
                observation, action = (tensordict[key] for key in network.in_keys)
                together = core.stacked(observation, action, params.get("module"))
                if together is not None:
                    return together.squeeze(-1)
        evaluate = _vmap_func(
            network,
            (None, 0),
            randomness=getattr(self.__dict__["_loss"], "vmap_randomness", "different"),
            pseudo_vmap=self.deactivate_vmap,
        )
        return full_precision(evaluate(tensordict.select(*self.in_keys), params).get(self.value_key).squeeze(-1))


class EncodedCritics(CriticEnsemble):
    """Critics behind one encoder, which runs once for all of them.

    Args:
        encoder: reads the state and writes what the critics read.
        critics: modules that read the encoded state and the action and write a value ``[*B, 1]``.

    Keyword Args:
        action_key: the critics' key of the action.
        value_key: where they write the value.

    Raises:
        ValueError: if there is no critic, or the critics read nothing that the encoder writes.
    """

    def __init__(
        self,
        encoder: TensorDictModuleBase,
        critics: Sequence[TensorDictModuleBase],
        *,
        action_key: NestedKey = "action",
        value_key: NestedKey = "state_action_value",
    ) -> None:
        super().__init__()
        if len(critics) == 0:
            raise ValueError("EncodedCritics needs at least one critic")
        self._reads = [unravel_key(key) for key in critics[0].in_keys]
        writes = {unravel_key(key) for key in encoder.out_keys}
        if not writes & set(self._reads):
            raise ValueError(f"the encoder writes {encoder.out_keys}, but the critics read {critics[0].in_keys}")
        self.encoder = encoder
        self.critics = nn.ModuleList(critics)
        self.in_keys = list(dict.fromkeys([*encoder.in_keys, *(key for key in self._reads if key not in writes)]))
        self.action_key = action_key
        self.value_key = value_key

    def forward(self, tensordict: TensorDictBase) -> Tensor:
        """As :meth:`CriticEnsemble.forward`."""
        encoded = self._encode(tensordict).select(*self._reads)
        return torch.stack([critic(encoded.copy())[self.value_key].squeeze(-1) for critic in self.critics])

    def values(self, tensordict: TensorDictBase, *, target: bool = False, frozen: bool = False) -> Tensor:
        """As :meth:`CriticEnsemble.values`; of a result of :meth:`encode` ``frozen`` fixes the encoding too."""
        written = [key for key in self.encoder.out_keys if tensordict.get(key, None) is not None]
        if frozen and written:
            tensordict = tensordict.copy()
            for key in written:
                tensordict.set(key, tensordict[key].detach())
        return super().values(tensordict, target=target, frozen=frozen)

    def encode(self, tensordict: TensorDictBase, *, target: bool = False) -> TensorDictBase:
        """As :meth:`CriticEnsemble.encode`."""
        with self._using(self._parameters_of(target=target, frozen=False)):
            return self._encode(tensordict)

    def state_of(self, tensordict: TensorDictBase) -> TensorDictBase:
        """As :meth:`CriticEnsemble.state_of`."""
        return tensordict.select(*self.state_keys, *self._reads, strict=False).exclude(self.action_key)

    def _encode(self, tensordict: TensorDictBase) -> TensorDictBase:
        return run_encoders([self.encoder], self._reads, tensordict)


def copies(critic: TensorDictModuleBase, number: int) -> list[TensorDictModuleBase]:
    """Return copies of one critic: the first as it is, the others initialised anew by their own layers.

    Raises:
        ValueError: if ``number`` is not positive.
    """
    if number < 1:
        raise ValueError(f"num_qvalue_nets must be positive, got {number}")
    critics = [copy.deepcopy(critic) for _ in range(number)]
    for other in critics[1:]:
        layers = _resettable(other)
        for layer in layers:
            layer.reset_parameters()  # type: ignore[operator]
        if not layers:
            warnings.warn(
                "qvalue_network has no layer with reset_parameters: its copies start identical and stay so; pass a list of "
                "critics instead",
                stacklevel=4,
            )
    return critics


def _resettable(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if callable(getattr(layer, "reset_parameters", None))]


def full_precision(values: Tensor) -> Tensor:
    """Values that autocast computed with fewer digits in float32, so that targets and TD errors are not rounded once more."""
    lowered = torch.is_autocast_enabled(values.device.type) and values.dtype in (torch.bfloat16, torch.float16)
    return values.float() if lowered else values
