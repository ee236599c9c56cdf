# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Flow critics: the value as the end of a learned flow over returns (floq, https://arxiv.org/abs/2509.06863).

Where the authors' released code and its options differ:
  1. The time is to be embedded as cos(k pi t), k = 1..64; the released code overwrites that by cos(t), one number. Default here:
     the code (``time_features=64`` is the option as named).
  2. The embedding of a return is 0 / 0 far outside its support (83 bin widths beyond either end in float32). Here it is finite
     everywhere: see :meth:`FlowCriticModel.embed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import _vmap_func

from deflow_torchrl.modules import kernels
from deflow_torchrl.modules.critics import TwinCritic, full_precision
from deflow_torchrl.modules.networks import MLP, PAPER_HIDDEN_DIMS, CheckedModule, is_wrapped, make_mlp

_FARTHEST = 8.0
"""sqrt(2) sigma beyond the support at which the embedding stops to change: erfc has few digits left in float32 behind it."""


def make_flow_critic_network(
    observation_dim: int,
    action_dim: int,
    hidden_dims: Sequence[int] = PAPER_HIDDEN_DIMS,
    *,
    num_bins: int = 51,
    time_features: int | None = None,
) -> nn.Sequential:
    """Velocity field over returns: ``cat([s, a, p(z), time], -1)`` to one number, with LayerNorm as the critics.

    Examples:
        >>> import torch
        >>> make_flow_critic_network(3, 2, (8, 8))(torch.zeros(5, 3 + 2 + 50 + 1)).shape
        torch.Size([5, 1])
    """
    width = observation_dim + action_dim + num_bins - 1 + (time_features or 1)
    return make_mlp(width, 1, hidden_dims, layer_norm=True)


class FlowCriticModel(nn.Module):
    """Tensor-only core of :class:`FlowCritic`; arguments as there.

    Attributes:
        start: (z_min, z_max), the range that the flow starts from, in reward units.
        support: (q_min, q_max), the range that the embedding covers.
    """

    def __init__(
        self,
        velocity_network: nn.Module,
        *,
        reward_range: tuple[float, float],
        gamma: float,
        num_steps: int = 8,
        noise_coverage: float = 0.1,
        num_bins: int = 51,
        sigma: float = 16.0,
        reward_offset: float = 0.01,
        time_features: int | None = None,
    ) -> None:
        super().__init__()
        lowest, highest = (float(reward) for reward in reward_range)
        if not (lowest <= highest and math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(f"reward_range must be (smallest, largest), two finite numbers, got {reward_range}")
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {gamma}")
        if num_steps < 1 or num_bins < 2 or (time_features is not None and time_features < 1):
            raise ValueError(
                "num_steps and time_features must be positive and num_bins at least 2, "
                f"got {num_steps}, {time_features} and {num_bins}"
            )
        for name, value in (("noise_coverage", noise_coverage), ("sigma", sigma), ("reward_offset", reward_offset)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        horizon = 1 / (1 - gamma)
        self.velocity_network = velocity_network
        self.num_steps, self.num_bins, self.sigma, self.time_features = num_steps, num_bins, sigma, time_features
        self.start = (noise_coverage * lowest * horizon, noise_coverage * highest * horizon)
        self.support = ((lowest - reward_offset) * horizon, (highest + reward_offset) * horizon)

    @property
    def settings(self) -> tuple[Any, ...]:
        """Everything but the network: critics of one ensemble agree in it."""
        return self.start, self.support, self.num_steps, self.num_bins, self.sigma, self.time_features

    def embed(self, z: Tensor) -> Tensor:
        """HL-Gauss: the mass of N(z, (sigma bin widths)^2) in each bin of the support, ``[..., 1]`` to ``[..., num_bins - 1]``.

        p_k = (e_{k+1} - e_k) / (e_last - e_0), e_k = erf((c_k - z) / (sqrt(2) sigma w)), in the form 1 - erfc on the side of
        the support on which z lies. It has the digits there that the differences of erf lose, and equals them in exact
        arithmetic. A z more than 8 sqrt(2) sigma bin widths (181 at sigma = 16) beyond an end counts as one at that distance,
        where erf's form has been 0 / 0 for long (from 83 on in float32), so that nothing becomes NaN.
        """
        low, high = self.support
        width = (high - low) / (self.num_bins - 1)
        scale = 1 / (math.sqrt(2) * self.sigma * width)
        far = _FARTHEST / scale
        z = z.clamp(low - far, high + far)
        points = low + width * torch.arange(self.num_bins, dtype=z.dtype, device=z.device)
        side = scale * (1 - 2 * (z > (low + high) / 2).to(z.dtype))
        tails = ((points - z) * side).erfc()
        return (tails[..., 1:] - tails[..., :-1]) / (tails[..., -1:] - tails[..., :1])

    def embed_time(self, t: Tensor) -> Tensor:
        """cos(t) ``[..., 1]``, or cos(k pi t) ``[..., time_features]``."""
        if self.time_features is None:
            return t.cos()
        return (math.pi * torch.arange(1, self.time_features + 1, dtype=t.dtype, device=t.device) * t).cos()

    def starts(self, u: Tensor) -> Tensor:
        """z_0 = (1 - u) z_min + u z_max of u in [0, 1)."""
        lowest, highest = self.start
        return (1 - u) * lowest + u * highest

    def inputs(self, observation: Tensor, action: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """What the network reads; ``observation`` and ``action`` may lack dimensions that ``z [..., 1]`` has."""
        parts = [_rows(observation, z), _rows(action, z), self.embed(z), self.embed_time(t)]
        return torch.cat([part.expand(*z.shape[:-1], part.shape[-1]) for part in parts], -1)

    def velocity(self, observation: Tensor, action: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """v(s, a, z, t): ``[..., O]``, ``[..., A]``, z in reward units ``[..., 1]``, t in [0, 1] ``[..., 1]`` to ``[..., 1]``."""
        return self.velocity_network(self.inputs(observation, action, z, t))

    def forward(self, observation: Tensor, action: Tensor, u: Tensor | None = None) -> Tensor:
        """The return psi ``[..., 1]``: from z_0 (:meth:`starts`; u is drawn if None), z <- z + v(s, a, z, i/M)/M, i = 0..M-1."""
        z = self.starts(torch.rand_like(action[..., :1]) if u is None else u)
        for step in range(self.num_steps):
            z = z + self.velocity(observation, action, z, torch.full_like(z, step / self.num_steps)) / self.num_steps
        return z


class FlowCritic(CheckedModule):
    """One critic of floq: a velocity field over returns, integrated from a uniform start to a return psi(s, a; u).

    The value Q(s, a) is the mean of psi over u ~ U[0, 1).

    Args:
        velocity_network: any ``nn.Module`` called with ONE tensor ``cat([observation, action, p(z), cos t], -1)`` of width
            O + A + num_bins, returning ``[..., 1]`` (:func:`make_flow_critic_network`).

    Keyword Args:
        reward_range: (smallest, largest) reward of one step.
        gamma: discount of one step; 1 / (1 - gamma) times rewards are returns.
        num_steps: Euler steps M of the flow. Defaults to ``8``.
        noise_coverage: kappa, share of the range of returns that the flow starts from. Defaults to ``0.1``.
        num_bins: points of the return's embedding, whose bins are one fewer. Defaults to ``51``.
        sigma: deviation of the embedding, in bin widths. Defaults to ``16.0``.
        reward_offset: what the embedding's support has beyond the rewards on each side. Defaults to ``0.01``.
        time_features: ``None`` (default): the released code's cos t; a number K: cos(k pi t), k = 1..K, which is K wide.
        in_keys: keys of observation, action and u ``[..., 1]``, which is drawn if the input lacks it.
        out_keys: where the return is written, ``[..., 1]``.

    Raises:
        ValueError: on settings that cannot be.
        TypeError: by calls, if an input's dtype does not fit the network's.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> critic = FlowCritic(make_flow_critic_network(3, 2, (16,)), reward_range=(-1.0, 0.0), gamma=0.99)
        >>> data = TensorDict(observation=torch.zeros(4, 3), action=torch.zeros(4, 2), batch_size=[4])
        >>> critic(data)["state_action_return"].shape
        torch.Size([4, 1])
        >>> tuple(round(bound, 6) for bound in critic.module.start + critic.module.support)
        (-10.0, 0.0, -101.0, 1.0)
    """

    module: FlowCriticModel

    def __init__(
        self,
        velocity_network: nn.Module,
        *,
        reward_range: tuple[float, float],
        gamma: float,
        num_steps: int = 8,
        noise_coverage: float = 0.1,
        num_bins: int = 51,
        sigma: float = 16.0,
        reward_offset: float = 0.01,
        time_features: int | None = None,
        in_keys: Sequence[NestedKey] = ("observation", "action", "critic_noise"),
        out_keys: Sequence[NestedKey] = ("state_action_return",),
    ) -> None:
        if len(in_keys) != 3 or len(out_keys) != 1:
            raise ValueError(
                f"in_keys must be (observation, action, u) and out_keys (return,), got {in_keys} and {out_keys}"
            )
        model = FlowCriticModel(
            velocity_network,
            reward_range=reward_range,
            gamma=gamma,
            num_steps=num_steps,
            noise_coverage=noise_coverage,
            num_bins=num_bins,
            sigma=sigma,
            reward_offset=reward_offset,
            time_features=time_features,
        )
        super().__init__(model, in_keys=list(in_keys), out_keys=list(out_keys))

    def integrate(self, observation: Tensor, action: Tensor, u: Tensor) -> Tensor:
        """As ``module(observation, action, u)``."""
        return self.module(observation, action, u)

    def velocity(self, observation: Tensor, action: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """As ``module.velocity(observation, action, z, t)``."""
        return self.module.velocity(observation, action, z, t)


class FlowCriticEnsemble(TwinCritic):
    """E flow critics, which learn returns, and plain critics distilled from them, whose values everything else asks for.

    With n draws j of each transition i, flow critics psi_e, their targets psibar_e and z0 = (1 - u) z_min + u z_max:

    * y_i = mean_j (r_i + gamma (1 - terminated_i) agg_e psibar_e(s'_i, a'_ij; u'_ij)), one number a transition;
    * ``loss_flow_critic`` = mean over e and i of **sum** over j of (v_e(s, a, (1 - t) z0 + t y, t) - (y - z0))^2;
    * ``loss_qvalue`` = mean over k and i of (Q_k(s, a) - mean_{e,j} psi_e(s_i, a_i; u_ij))^2, with the same u.

    The flow loss trains the flow critics, the distillation the plain critics. A loss keeps the former under
    ``flow_critic_network_params`` with targets, the latter under ``qvalue_network_params`` without.

    Draws, read from the input or drawn in this order: ``("next", "noise") [B, n, A]`` by the loss, for n different a';
    ``("next", "critic_noise")``, ``critic_noise`` and ``critic_time [B, n, 1]``, uniform in [0, 1).

    Metadata: ``return_std [B]``, the deviation over j of psi_e(s, a; u), mean over e: how far the flow still spreads its starts.

    Args:
        flow_critics: :class:`FlowCritic` modules of one layout and the same settings.
        distilled_critics: plain critics, as the losses take them.

    Keyword Args:
        noise_samples: n. Defaults to ``8``.
        deactivate_vmap: evaluate them in a loop.

    Raises:
        ValueError: if a list is empty, the flow critics' settings differ or ``noise_samples`` is not positive.

    Examples:
        >>> from deflow_torchrl.modules import make_qvalue_networks
        >>> flow_critics = [
        ...     FlowCritic(make_flow_critic_network(3, 2, (16,)), reward_range=(-1.0, 0.0), gamma=0.99) for _ in range(2)]
        >>> FlowCriticEnsemble(flow_critics, make_qvalue_networks(3, 2, (16,))).loss_names
        ('loss_flow_critic', 'loss_qvalue')
    """

    draw_keys = (("next", "critic_noise"), "critic_noise", "critic_time")
    loss_names = ("loss_flow_critic", "loss_qvalue")
    metadata_names = ("return_std",)

    def __init__(
        self,
        flow_critics: Sequence[FlowCritic],
        distilled_critics: Sequence[TensorDictModuleBase],
        *,
        noise_samples: int = 8,
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__(distilled_critics, deactivate_vmap=deactivate_vmap)
        if len(flow_critics) == 0 or noise_samples < 1:
            raise ValueError(
                f"a flow critic and a positive number of noise samples are needed, got {len(flow_critics)} and {noise_samples}"
            )
        for critic in flow_critics:
            if not isinstance(critic, FlowCritic):
                raise TypeError(f"flow_critics must be FlowCritic modules, got a {type(critic).__name__}")
            if critic.module.settings != flow_critics[0].module.settings or critic.in_keys != flow_critics[0].in_keys:
                raise ValueError("the flow critics of one ensemble must have the same settings and keys")
        self.flow_critics = nn.ModuleList(flow_critics)
        self.next_samples = noise_samples
        self.__dict__["_flow_critic"] = flow_critics[0]
        state, action, _ = flow_critics[0].in_keys
        self.in_keys = list(dict.fromkeys([*self.in_keys, state, action]))

    def bind(self, loss: LossModule, *, create_target_params: bool) -> None:
        """As :meth:`TwinCritic.bind`, of both kinds of critics; the distilled ones have no targets."""
        super().bind(loss, create_target_params=False)
        critics = list(self.flow_critics)
        del self._modules["flow_critics"]
        loss.convert_to_functional(
            critics, "flow_critic_network", expand_dim=len(critics), create_target_params=create_target_params
        )

    def td_terms(
        self,
        tensordict: TensorDictBase,
        next_state: Callable[[], TensorDictBase],
        bootstrap: Callable[[Tensor], Tensor],
        reduce_critics: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """As :meth:`CriticEnsemble.td_terms`, see the class; ``next_state`` gives n actions a' ``[*B, n, A]`` of each s'.

        ``td_error`` is of the distilled critics: the largest |Q_k(s, a) - y|.
        """
        model: Any = self.__dict__["_flow_critic"].module
        with torch.no_grad():
            following = next_state()
            returns = self.returns(following, self._draw(tensordict, ("next", "critic_noise")), target=True)
            target = bootstrap(reduce_critics(returns).mean(-1))  # y: linear in the returns, so the mean may come first
            noise = self._draw(tensordict, "critic_noise")
            returns = self.returns(tensordict, noise)
            time = self._draw(tensordict, "critic_time")
            start = model.starts(noise)
            end = target.to(start.dtype)[..., None, None]
            between = (1 - time) * start + time * end
        velocity = self._evaluate("velocity", *self._of(tensordict), between, time)
        flow_error = (velocity - (end - start)).squeeze(-1).square()
        values = self.values(tensordict)
        return {
            "loss_flow_critic": flow_error.sum(-1).mean(0),
            "loss_qvalue": (values - returns.mean((0, -1))).square().mean(0),
            "return_std": returns.std(-1, correction=0).mean(0),
            "td_error": (values.detach() - target).abs().amax(0),
        }

    def returns(self, tensordict: TensorDictBase, noise: Tensor, *, target: bool = False) -> Tensor:
        """Returns psi_e(s, a; u) ``[E, *B, n]`` of state and action, for u ``[*B, n, 1]`` in [0, 1).

        Args:
            tensordict: the states, and one action ``[*B, A]`` or n ``[*B, n, A]`` of each.
            noise: u. No gradient flows.

        Keyword Args:
            target: by the target critics.
        """
        with torch.no_grad():
            return self._evaluate("integrate", *self._of(tensordict), noise, target=target).squeeze(-1)

    def _of(self, tensordict: TensorDictBase) -> list[Tensor]:
        state, _, _ = self.__dict__["_flow_critic"].in_keys
        return [tensordict[state], tensordict[self.action_key]]

    def _draw(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """U[0, 1) given under ``key``, or drawn ``[*B, n, 1]``."""
        given = tensordict.get(key, None)
        if given is not None:
            return given
        action = tensordict[self.action_key]
        return torch.rand_like(action[..., :1].unsqueeze(-2).expand(*action.shape[:-1], self.next_samples, 1))

    def _evaluate(self, function: str, *inputs: Tensor, target: bool = False) -> Tensor:
        """Call a function of every flow critic ``[E, ...]``; together where their networks are those of this package."""
        critic, loss = self.__dict__["_flow_critic"], self.__dict__.get("_loss")
        if loss is None:
            return torch.stack([getattr(member, function)(*inputs) for member in self.flow_critics])
        params = loss.target_flow_critic_network_params if target else loss.flow_critic_network_params
        parameters = None if self.deactivate_vmap else _kernel_parameters(critic, params, inputs)
        if parameters is not None:
            return _TOGETHER[function](critic.module, parameters, *inputs)
        evaluate = _vmap_func(
            critic,
            (*(None for _ in inputs), 0),
            func=function,
            randomness=getattr(loss, "vmap_randomness", "different"),
            pseudo_vmap=self.deactivate_vmap,
        )
        return full_precision(evaluate(*inputs, params))


def _rows(x: Tensor, z: Tensor) -> Tensor:
    """A state or action ``[*B, ...]`` as a row for each of the samples of ``z [*B, n, 1]``, where it has none."""
    return x.unsqueeze(-2) if x.ndim < z.ndim else x


def _kernel_parameters(critic: FlowCritic, params: TensorDictBase, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Stacked parameters of the velocity networks for the kernels, or None where the networks must be called."""
    model = critic.module
    network = model.velocity_network
    if (
        torch.compiler.is_compiling()
        or type(critic) is not FlowCritic
        or type(model) is not FlowCriticModel
        or vars(model).keys() & {"velocity", "inputs", "embed", "embed_time", "starts"}
        or any(is_wrapped(module) for module in (critic, model, network))
        or not isinstance(network, MLP)
        or not network.layer_norm
        or not network.is_as_built()
    ):
        return None
    layers = params.get(("module", "velocity_network"))
    names = [name for name, layer in network._modules.items() if not isinstance(layer, nn.GELU)]
    parameters = [layers.get((name, kind)) for name in names for kind in ("weight", "bias")]
    return parameters if kernels.usable(*inputs, *parameters) else None


def _velocity_together(model: FlowCriticModel, parameters: Sequence[Tensor], *inputs: Tensor) -> Tensor:
    return kernels.mlp(model.inputs(*inputs), parameters, layer_norm=True)


def _integrate_together(
    model: FlowCriticModel, parameters: Sequence[Tensor], observation: Tensor, action: Tensor, u: Tensor
) -> Tensor:
    # One row of states and actions for all n starts, or for each, where there are n actions.
    rows = (*action.shape[:-1], observation.shape[-1])
    condition = torch.cat([_rows(observation, action).expand(rows), action], -1).flatten(0, -2)
    returns = kernels.integrate_returns(
        condition,
        model.starts(u).reshape(len(condition), -1),
        parameters,
        num_steps=model.num_steps,
        embed=model.embed,
        embed_time=model.embed_time,
    )
    return returns.reshape(-1, *u.shape)


_TOGETHER: dict[str, Callable[..., Tensor]] = {"velocity": _velocity_together, "integrate": _integrate_together}
