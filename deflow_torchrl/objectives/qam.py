# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""QAM and TRQAM: a second flow, tuned by adjoint matching towards the cloned one tilted by exp(Q).

The equations are those of the methods' released code: QAM with its variants QAM-E (an edit on top) and QAM-F (a one-step policy
on top), and TRQAM, which moves the weight of Q so that the path KL meets a budget. The numbers here are held against these
equations, written out by hand; they were not compared with runs of that code, and the proofs of TRQAM's paper were not read.
Where the released code differs from what its equations suggest, and what is done here as there:

1. the last step of the chain has no noise and follows the prior, not the tuned flow;
2. the adjoint of step i takes the prior at the state of time t_i and at the time t_i + 1/M;
3. the noise of TRQAM's chain does not depend on its multiplier, only the loss does;
4. one clip to gradient norm 1 covers all parameters of all terms, critics included; the caller applies it
   (``Stage(max_grad_norm=1.0)`` of :mod:`deflow_torchrl.algorithms.base`).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, Reduction, Terms, next_key, term
from deflow_torchrl.objectives.best_of_n import EDIT_NOISE, BestOfNLoss

_SDE_NOISE = "sde_noise"


class QAMLoss(BestOfNLoss):
    """The losses of QAM, each with gradients to its own part only.

    With prior v, target prior vbar and tuned flow f, all with M Euler steps, and act(s; z) = f's action, clipped (v's at
    ``inverse_temperature=0``):

    * ``loss_flow`` trains v on the data's actions: :class:`FlowMatchingLoss`;
    * ``loss_actor = mean sum_{i<M} |(2 / sigma_i) (f(s, x_i, t_i) - vbar(s, x_i, t_i)) + sigma_i g_i|^2`` trains f, t_i = i/M,
      sigma_i^2 = 2 (1 - t_i + 1/M) / (t_i + 1/M), on states x_i of a memoryless chain
      ``x_{i+1} = x_i + (2 f(s, x_i, t_i) - x_i / (t_i + 1/M)) / M + sigma_i e_{i+1} / sqrt(M)``, whose last step is
      ``x_M = x_{M-1} + vbar(s, x_{M-1}, t_{M-1}) / M``, and adjoints
      ``g_i = g_{i+1} + (d/dx [2 vbar(s, x, t_i + 1/M) - x / (t_i + 1/M)] at x_i)^T g_{i+1} / M`` from
      ``g_M = -tau d/dx mean_j Qbar_j(s, clip(x))`` at x_M; sg: all states, g and vbar;
    * ``loss_qvalue`` as that of :class:`FEditLoss`, with a' = act(s').

    QAM-E, with an ``edit_policy``: act = clip(f's action + c tanh u), and the terms ``loss_edit`` and ``loss_alpha``, which are
    ``loss_actor`` and ``loss_alpha`` of :class:`FEditLoss` on b = sg(f's action). QAM-F, with a ``one_step_policy`` mu:
    act = clip(mu(s, z)), and ``loss_one_step = alpha mean_d (mu(s, z) - sg(f's action))^2 - mean_j Q_j(s, clip(mu(s, z)))``,
    with alpha the ``distillation_coef`` and the critics fixed.

    Each is also a method. Metadata: ``path_kl``, mean sum_i 2 / (M sigma_i^2) |f - vbar|^2; with edits ``alpha``, ``entropy``,
    ``edit_size``; with a one-step policy ``distillation`` and ``q``.

    Args:
        flow_policy (FlowMatchingPolicy): the prior v.
        actor_network (FlowMatchingPolicy): the tuned flow f, of as many steps.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        inverse_temperature (float): tau.
        best_of_n (int, optional): candidates N. Defaults to ``1``.
        pessimism (float, optional): rho of mean - rho std over the target critics. Defaults to ``0.5``.
        clip_adjoint (bool, optional): Q's gradient passes through the clip, and is zero beyond a bound. Defaults to ``True``.
        edit_policy (TanhGaussianPolicy, optional): reads ``cat([s, b], -1)``.
        edit_scale (float, optional): c. Defaults to ``0.0``.
        target_entropy (float, optional): of the edit. Defaults to -A / 2.
        alpha_init (float, optional): start of the edit's temperature. Defaults to ``1.0``.
        one_step_policy (OneStepPolicy, optional): mu.
        distillation_coef (float, optional): alpha of mu's term. Defaults to ``0.0``.
        delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if a policy is of another kind.
        ValueError: on an option out of range, flows of different numbers of steps, or an edit and a one-step policy.

    Random draws may be given in the input, else they are drawn from torch's global generator in this order, all N(0, I) but
    the time: ``("next", "noise") [..., N, A]`` and, with edits, ``("next", "edit_noise") [..., N, A]``; ``flow_noise [..., A]``,
    ``flow_time [..., 1]`` (U[0, 1)); ``sde_noise [..., M, A]``, of which [:, 0] is x_0 and [:, i + 1] is added in step i < M - 1;
    ``noise [..., A]`` of the edit or the one-step policy, and ``edit_noise [..., A]``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, make_qvalue_networks, make_velocity_network
        >>> prior, tuned = (FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, 4) for _ in range(2))
        >>> loss = QAMLoss(prior, tuned, make_qvalue_networks(3, 2, (16,)), inverse_temperature=3.0)
        >>> data = TensorDict(observation=torch.randn(4, 3), action=torch.rand(4, 2), batch_size=[4])
        >>> loss_actor, metadata = loss.actor_loss(data)
        >>> sorted(metadata)
        ['path_kl']
    """

    _schedulable_buffers = frozenset({"inverse_temperature", "edit_scale", "target_entropy", "distillation_coef"})

    one_step_policy: TensorDictModuleBase | None
    one_step_policy_params: TensorDictParams
    target_one_step_policy_params: TensorDictParams
    inverse_temperature: Tensor
    distillation_coef: Tensor

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        inverse_temperature: float,
        best_of_n: int = 1,
        pessimism: float = 0.5,
        clip_adjoint: bool = True,
        edit_policy: TensorDictModuleBase | None = None,
        edit_scale: float = 0.0,
        target_entropy: float | None = None,
        alpha_init: float = 1.0,
        one_step_policy: TensorDictModuleBase | None = None,
        distillation_coef: float = 0.0,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_flow_policy(flow_policy)
        acting.check_flow_policy(actor_network)
        steps = [acting.num_steps(flow) for flow in (flow_policy, actor_network)]
        if steps[0] != steps[1]:
            raise ValueError(f"flow_policy and actor_network must have as many steps, got {steps}")
        if edit_policy is not None and one_step_policy is not None:
            raise ValueError("edit_policy and one_step_policy exclude each other")
        self.out_keys = ["loss_flow", "loss_actor", "loss_qvalue", "path_kl"]
        if edit_policy is not None:
            acting.check_tanh_gaussian_policy(edit_policy)
            self.out_keys += ["loss_edit", "loss_alpha", "alpha", "entropy", "edit_size"]
        if one_step_policy is not None:
            acting.check_one_step_policy(one_step_policy)
            self.out_keys += ["loss_one_step", "distillation", "q"]
        super().__init__(reduction=reduction)
        self._add_policy(flow_policy, "flow_policy", create_target_params=True)
        self._add_policy(actor_network, "actor_network")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        if edit_policy is None:
            self.edit_policy = None
        else:
            self._add_policy(edit_policy, "edit_policy")
            self._add_coefficient("edit_scale", edit_scale)
            self._add_temperature(alpha_init, target_entropy)
        if one_step_policy is None:
            self.one_step_policy = None
        else:
            self._add_policy(one_step_policy, "one_step_policy")
            self._add_coefficient("distillation_coef", distillation_coef)
        self._add_coefficient("inverse_temperature", inverse_temperature)
        self._set_choice(best_of_n, pessimism)
        self.clip_adjoint = clip_adjoint
        self._uses_prior = inverse_temperature == 0

    @property
    def base_policy(self) -> TensorDictModuleBase:
        """The flow that acts, is edited or teaches: f, or v at ``inverse_temperature=0``."""
        return self.flow_policy if self._uses_prior else self.actor_network

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        action, flow = acting.state_keys(self.base_policy), acting.state_keys(self.flow_policy)
        if self.edit_policy is not None:
            action = [*action, *acting.edit_state_keys(self.edit_policy)]
        if self.one_step_policy is not None:
            action = acting.state_keys(self.one_step_policy)
        critics = self.critics.state_keys
        states = [*flow, *acting.state_keys(self.actor_network), *action, *critics]
        return [*states, self.tensor_keys.action, *self._next_keys(*action, *critics)]

    def _optional_keys(self) -> list[NestedKey]:
        return [*self._sampling_keys(), _SDE_NOISE, EDIT_NOISE, next_key(EDIT_NOISE)]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        # In this order: draws that the input lacks are taken from one generator.
        of_critics = self.critics.encode(tensordict)
        critic_terms = self._critic_terms(of_critics)
        out = {"loss_flow": self._flow_term(tensordict), **self._matching_terms(tensordict)}
        if self.edit_policy is not None:
            out |= self._edit_terms("loss_edit", self.base_policy, tensordict, of_critics)
        if self.one_step_policy is not None:
            out |= self._one_step_terms(tensordict, of_critics)
        return {**out, **critic_terms}

    def _candidates(self, tensordict: TensorDictBase, following: TensorDictBase) -> Tensor:
        noise = self._draw_candidates(tensordict, self.tensor_keys.noise)
        if self.edit_policy is not None:
            return self._edited(self.base_policy, following, noise, self._draw_candidates(tensordict, EDIT_NOISE))[0]
        return acting.act(self.one_step_policy or self.base_policy, following, noise)

    # -- adjoint matching ---------------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Steps M of the chain."""
        return acting.num_steps(self.actor_network)

    def _strengths(self) -> tuple[Tensor | float, Tensor | float]:
        """(tau, L): what scales Q's gradient, and 1 / L the square of sigma in the loss."""
        return self.inverse_temperature, 1.0

    def _matching_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        steps, action = self.num_steps, tensordict[self.tensor_keys.action]
        noise = tensordict.get(_SDE_NOISE, None)
        if noise is None:
            noise = torch.randn_like(action.unsqueeze(-2).expand(*action.shape[:-1], steps, action.shape[-1]))
        times = torch.arange(steps, dtype=action.dtype, device=action.device).unsqueeze(-1) / steps
        sigmas = (2 * (1 - times + 1 / steps) / (times + 1 / steps)).sqrt()
        weight, strength = self._strengths()
        tuned = acting.velocity(self.actor_network, tensordict)
        with torch.no_grad(), self._target_flow():  # sg: the states, the adjoints and the prior
            prior = acting.velocity(self.flow_policy, tensordict)
            *states, last = self._chain(tuned, prior, noise, sigmas)
            adjoints = torch.stack(self._adjoints(prior, states, -weight * self._value_gradient(tensordict, last)), -2)
            x = torch.stack(states, -2)
            t = times.expand(*x.shape[:-1], 1)
            drift = prior(x, t)
        difference = tuned(x, t) - drift
        scaled = sigmas / strength**0.5
        loss = (2 / scaled * difference + scaled * adjoints).square().sum((-2, -1))
        path_kl = (2 / (steps * sigmas.square()) * difference.detach().square()).sum((-2, -1))
        return {
            "loss_actor": self._reduce(loss, tensordict),
            "path_kl": self._statistic(path_kl, tensordict),
        }

    def _chain(self, tuned: acting.Velocity, prior: acting.Velocity, noise: Tensor, sigmas: Tensor) -> list[Tensor]:
        """States x_0 .. x_M, each ``[*B, A]``."""
        steps = self.num_steps
        x, *noises = noise.unbind(-2)
        states = [x]
        for i, e in enumerate(noises):
            drift = 2 * tuned(x, _time(x, i / steps)) - x / ((i + 1) / steps)
            x = x + drift / steps + sigmas[i] * e / math.sqrt(steps)
            states.append(x)
        return [*states, x + prior(x, _time(x, 1 - 1 / steps)) / steps]

    def _value_gradient(self, tensordict: TensorDictBase, action: Tensor) -> Tensor:
        """d/dx mean_j Qbar_j(s, clip(x)) ``[*B, A]``."""
        state = self.critics.encode(tensordict, target=True)

        def value(x: Tensor) -> Tensor:
            x = acting.clip(self.actor_network, x) if self.clip_adjoint else x
            return self.critics.values(self._with_action(state, x), target=True).mean(0).sum()

        return cast("Tensor", torch.func.grad(value)(action))

    def _adjoints(self, prior: acting.Velocity, states: list[Tensor], last: Tensor) -> list[Tensor]:
        """g_0 .. g_{M-1} from g_M, each ``[*B, A]``."""
        steps, adjoints = self.num_steps, [last]
        for i in reversed(range(steps)):
            time = (i + 1) / steps

            def drift(x: Tensor, time: float = time) -> Tensor:
                return 2 * prior(x, _time(x, time)) - x / time

            pull_back = torch.func.vjp(drift, states[i])[1]
            adjoints.append(adjoints[-1] + pull_back(adjoints[-1])[0] / steps)
        return adjoints[:0:-1]

    # -- one-step policy ----------------------------------------------------------------------------------------------

    def _one_step_terms(self, tensordict: TensorDictBase, of_critics: TensorDictBase) -> dict[str, Tensor]:
        assert self.one_step_policy is not None
        noise = self._draw(tensordict, self.tensor_keys.noise)
        with torch.no_grad():  # sg: the tuned flow teaches and does not learn here
            taught = acting.act(self.base_policy, tensordict, noise)
        output = acting.unclipped(self.one_step_policy, tensordict, noise)
        distillation = terms.distillation(output, taught)
        action = acting.clip(self.one_step_policy, output)
        # sg: the critics
        qvalue = self.critics.values(self._with_action(of_critics, action), frozen=True).mean(0)
        return {
            "loss_one_step": self._reduce(self.distillation_coef * distillation - qvalue, tensordict),
            "distillation": self._statistic(distillation, tensordict),
            "q": self._statistic(qvalue, tensordict),
        }

    # -- terms by themselves ------------------------------------------------------------------------------------------

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the flows' and critics' observations and ``action [..., A]`` (for its shape and type); optionally
                ``sde_noise [..., M, A]``.

        Returns:
            The loss and metadata ``path_kl``, detached.
        """
        return self._one_term("loss_actor", self._matching_terms(tensordict))

    @term
    def edit_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_edit``; inputs and metadata as in :meth:`FEditLoss.actor_loss`.

        Raises:
            AttributeError: without an ``edit_policy``.
        """
        return self._variant_term("edit_policy", "loss_edit", tensordict)

    @term
    def alpha_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_alpha``; as :meth:`edit_loss`."""
        return self._variant_term("edit_policy", "loss_alpha", tensordict)

    @term
    def one_step_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_one_step``; inputs as in :meth:`FQLLoss.actor_loss`.

        Returns:
            The loss and metadata ``distillation`` and ``q``, detached.

        Raises:
            AttributeError: without a ``one_step_policy``.
        """
        return self._variant_term("one_step_policy", "loss_one_step", tensordict)

    def _variant_term(self, part: str, name: str, tensordict: TensorDictBase) -> Terms:
        if getattr(self, part) is None:
            raise AttributeError(f"there is no {name} without {part}")
        if part == "edit_policy":
            return self._one_term(name, self._edit_terms("loss_edit", self.base_policy, tensordict))
        return self._one_term(name, self._one_step_terms(tensordict, tensordict))


class TRQAMLoss(QAMLoss):
    """QAM whose weight of Q follows a budget of path KL: tau = 1 / L, L = ``lambda_scale`` lambda.

    ``loss_actor`` is that of :class:`QAMLoss` with g_M = -d/dx mean_j Qbar_j and sigma_i / sqrt(L) in the place of sigma_i, which
    is L times QAM's loss at tau = 1 / L; the chain's noise stays. The other terms are QAM's. Metadata: ``path_kl``, here divided
    by the ``horizon``, and ``trust_lambda``.

    lambda stands in the buffer ``trust_lambda`` and moves in :meth:`update_trust_region`, which the caller calls after each
    optimiser step.

    Args:
        flow_policy, actor_network, qvalue_network: see :class:`QAMLoss`.

    Keyword Args:
        kl_budget (float): eps, path KL for each step of an action sequence.
        horizon (int, optional): length h of the action sequences. Defaults to ``1``.
        lambda_scale (float, optional): L / lambda. Defaults to ``3.0``.
        lambda_rate (float, optional): step of lambda. Defaults to ``0.01``.
        lambda_min, lambda_max (float, optional): bounds of lambda. Default to ``0.01`` and ``100.0``.
        kl_rate (float, optional): share of a batch's KL in its moving average. Defaults to ``0.1``.
        kl_clip (float, optional): a batch's KL counts as at most this times eps. Defaults to ``2.0``.
        best_of_n, pessimism, clip_adjoint: see :class:`QAMLoss`.
        delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError, ValueError: as :class:`QAMLoss`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import FlowMatchingPolicy, make_qvalue_networks, make_velocity_network
        >>> prior, tuned = (FlowMatchingPolicy(make_velocity_network(3, 2, (16,)), 2, 4) for _ in range(2))
        >>> loss = TRQAMLoss(prior, tuned, make_qvalue_networks(3, 2, (16,)), kl_budget=1.0)
        >>> for _ in range(30):  # a path KL of five times the budget
        ...     loss.update_trust_region(torch.tensor(5.0))
        >>> loss.trust_lambda > 1.0
        tensor(True)
    """

    _schedulable_buffers = frozenset({"kl_budget", "trust_lambda", "kl_average"})
    state_buffers = ("trust_lambda", "kl_average")

    kl_budget: Tensor
    trust_lambda: Tensor
    kl_average: Tensor

    def __init__(
        self,
        flow_policy: TensorDictModuleBase,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        kl_budget: float,
        horizon: int = 1,
        best_of_n: int = 1,
        pessimism: float = 0.5,
        lambda_scale: float = 3.0,
        lambda_rate: float = 0.01,
        lambda_min: float = 0.01,
        lambda_max: float = 100.0,
        kl_rate: float = 0.1,
        kl_clip: float = 2.0,
        clip_adjoint: bool = True,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        if not (horizon >= 1 and lambda_scale > 0 and 0 < lambda_min <= lambda_max):
            raise ValueError(
                "horizon, lambda_scale and lambda_min <= lambda_max must be positive, got "
                f"{horizon}, {lambda_scale}, {lambda_min} and {lambda_max}"
            )
        super().__init__(
            flow_policy,
            actor_network,
            qvalue_network,
            inverse_temperature=1.0,
            best_of_n=best_of_n,
            pessimism=pessimism,
            clip_adjoint=clip_adjoint,
            delay_qvalue=delay_qvalue,
            num_qvalue_nets=num_qvalue_nets,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
        )
        self.out_keys = [*self.out_keys, "trust_lambda"]
        self._add_coefficient("kl_budget", kl_budget)
        example = next(iter(self.parameters()))
        self.register_buffer("trust_lambda", example.new_ones(()).detach())
        self.register_buffer("kl_average", example.new_zeros(()).detach())
        self.horizon = horizon
        self.lambda_scale, self.lambda_rate = lambda_scale, lambda_rate
        self.lambda_min, self.lambda_max = lambda_min, lambda_max
        self.kl_rate, self.kl_clip = kl_rate, kl_clip

    def _strengths(self) -> tuple[Tensor | float, Tensor | float]:
        return 1.0, self.lambda_scale * self.trust_lambda

    def _matching_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        out = super()._matching_terms(tensordict)
        return {**out, "path_kl": out["path_kl"] / self.horizon, "trust_lambda": self.trust_lambda.clone()}

    @torch.no_grad()
    def update_trust_region(self, path_kl: Tensor) -> None:
        """Move the multiplier by projected dual ascent on a moving average of the path KL, whose batch value is ``path_kl``.

        ``kl_average <- (1 - kl_rate) kl_average + kl_rate min(path_kl, kl_clip eps)``, then
        ``lambda <- clip(lambda + lambda_rate (kl_average - eps), lambda_min, lambda_max)``.
        """
        clipped = torch.minimum(path_kl.detach(), self.kl_clip * self.kl_budget)
        self.kl_average.copy_((1 - self.kl_rate) * self.kl_average + self.kl_rate * clipped)
        moved = self.trust_lambda + self.lambda_rate * (self.kl_average - self.kl_budget)
        self.trust_lambda.copy_(moved.clamp(self.lambda_min, self.lambda_max))


def _time(x: Tensor, time: float) -> Tensor:
    return x.new_full((*x.shape[:-1], 1), time)
