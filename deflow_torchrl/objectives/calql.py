# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Cal-QL (https://arxiv.org/abs/2303.05479): conservative Q-learning whose penalty stops at the return of the data.

Where released code and papers differ, and what is done here:

1. the target is the maximum over n next actions of the minimum over critics (Cal-QL's and CORL's code);
2. one set of draws serves all terms, where the authors' code draws anew for each part that it optimises: the same estimator;
3. the gap is clipped nowhere (Cal-QL's code; CORL's clips it below at -200);
4. actions of pi(s') are valued at s, and of terminated rows, too: their s' is read here, unless it is not finite.
"""

from __future__ import annotations

import functools
import math
from typing import cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn

from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import Critics, OffPolicyLoss, Reduction, Terms, next_key, term

_LAGRANGE_SCALE = 5.0
_ALPHA_PRIME_MAX = 1e6


class CalQLLoss(OffPolicyLoss):
    """The losses of Cal-QL, all at the same weights, with n actions in each set of samples.

    * ``loss_actor = mean(sg[alpha] log pi(a|s) - min_j Q_j(s, a))``, a ~ pi(s), critics fixed;
    * ``loss_alpha = -log_alpha mean(sg[log pi(a|s)] + H)``, H the target entropy;
    * ``loss_qvalue = mean_{B,j}((Q_j(s, a_data) - y)^2 + w (D_j - target_gap))`` with
      y = r + gamma (1 - terminated) max_i min_j Qbar_j(s', a'_i) and the gap
      D_j = log sum exp of {Q_j(s, u_i) + A log 2; max(Q_j(s, b_i), G) - log pi(b_i|s'); max(Q_j(s, c_i), G) - log pi(c_i|s)}
      - Q_j(s, a_data): u uniform in [-1, 1]^A, b ~ pi(s'), c ~ pi(s), without gradient, G the return to go;
    * with a ``target_gap`` w = 5 alpha', alpha' = min(exp(log_alpha_prime), 1e6), and
      ``loss_alpha_prime = -5 alpha' mean_{B,j}(sg[D_j] - target_gap)``; else w = ``cql_alpha`` and no gap is subtracted.

    Each is also a method: ``actor_loss``, ``alpha_loss``, ``qvalue_loss``, ``alpha_prime_loss``. Metadata: ``alpha``,
    ``entropy``, ``q`` (mean of min_j Q_j(s, a)), ``cql_gap`` (mean of D_j) and, with a target, ``alpha_prime``.

    Args:
        actor_network (TanhGaussianPolicy): the acting policy; encoders may stand before it.
        qvalue_network: see :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Keyword Args:
        cql_alpha (float, optional): weight w of the gap. Defaults to ``5.0``.
        target_gap (float, optional): gap that alpha' aims at, in units of scaled rewards; w is fixed where None (default).
        num_cql_samples (int, optional): n. Defaults to ``10``.
        calibrated (bool, optional): bound the values of b and c by G; False is CQL. Defaults to ``True``.
        target_entropy (float, optional): in nats. Defaults to -A.
        reward_scale (float, optional): factor of rewards and returns. Defaults to ``1.0``.
        delay_qvalue, num_qvalue_nets, reduction, deactivate_vmap: see
            :class:`~deflow_torchrl.objectives.base.OffPolicyLoss`.

    Raises:
        TypeError: if the policy is of another kind.
        ValueError: on an option out of range.

    Reads ``mc_return [..., 1]``, the return to go of (s, a) in units of the data's rewards, if ``calibrated``. Draws are read
    from the input where given, else made in this order: ``noise [..., A]`` of a, ``("next", "noise") [..., n, A]`` of a',
    ``cql_random_action [..., n, A]`` u, ``cql_noise [..., n, A]`` of c and ``("next", "cql_noise") [..., n, A]`` of b.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from deflow_torchrl.modules import TanhGaussianPolicy, make_qvalue_networks, make_tanh_gaussian_network
        >>> policy = TanhGaussianPolicy(make_tanh_gaussian_network(3, 2, (16,)), log_std_min=-20.0, log_std_affine=(1.0, -1.0))
        >>> loss = CalQLLoss(policy, make_qvalue_networks(3, 2, (16,)), target_gap=0.8)
        >>> loss.out_keys[:4]
        ['loss_actor', 'loss_alpha', 'loss_qvalue', 'loss_alpha_prime']
    """

    _schedulable_buffers = frozenset({"cql_alpha"})

    log_alpha: nn.Parameter
    log_alpha_prime: nn.Parameter
    cql_alpha: Tensor

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        qvalue_network: Critics,
        *,
        cql_alpha: float = 5.0,
        target_gap: float | None = None,
        num_cql_samples: int = 10,
        calibrated: bool = True,
        target_entropy: float | None = None,
        reward_scale: float = 1.0,
        delay_qvalue: bool = True,
        num_qvalue_nets: int = 2,
        reduction: Reduction | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        acting.check_tanh_gaussian_policy(actor_network)
        if num_cql_samples < 1:
            raise ValueError(f"num_cql_samples must be positive, got {num_cql_samples}")
        learned = target_gap is not None
        self.out_keys = [
            *("loss_actor", "loss_alpha", "loss_qvalue", *(("loss_alpha_prime",) if learned else ())),
            *("alpha", "entropy", "q", "cql_gap", *(("alpha_prime",) if learned else ())),
        ]
        super().__init__(reduction=reduction)
        self._add_policy(actor_network, "actor_network")
        self._add_critics(
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            deactivate_vmap=deactivate_vmap,
            create_target_params=delay_qvalue,
        )
        self._add_coefficient("cql_alpha", cql_alpha)
        example = next(self.parameters())
        self.log_alpha = nn.Parameter(example.new_zeros(()))
        if learned:
            self.log_alpha_prime = nn.Parameter(example.new_ones(()))
        self.target_gap = target_gap
        self.num_cql_samples = num_cql_samples
        self.calibrated = calibrated
        self.target_entropy = target_entropy
        self.reward_scale = reward_scale

    def _required_keys(self, tensordict: TensorDictBase | None = None) -> list[NestedKey]:
        states = [*acting.state_keys(self.actor_network), *self.critics.state_keys]
        returns = ["mc_return"] if self.calibrated else []
        return [*states, self.tensor_keys.action, *returns, *self._next_keys(*states)]

    def _optional_keys(self) -> list[NestedKey]:
        noise = self.tensor_keys.noise
        draws = [noise, next_key(noise), "cql_random_action", "cql_noise", ("next", "cql_noise")]
        return [*draws, *self.critics.draw_keys, self.tensor_keys.valid]

    def _compute(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        # In this order: draws that the input lacks come from one generator.
        action, log_prob = self._sample(tensordict)
        critic_terms, gap = self._critic_terms(tensordict)
        loss_actor, actor_metadata = self._actor_term(tensordict, action, log_prob)
        loss_alpha, alpha_metadata = self._alpha_term(tensordict, log_prob)
        out = {"loss_actor": loss_actor, "loss_alpha": loss_alpha, **actor_metadata, **alpha_metadata, **critic_terms}
        if self.target_gap is not None:
            loss, metadata = self._alpha_prime_term(tensordict, gap)
            out |= {"loss_alpha_prime": loss, **metadata}
        return out

    # -- actor and temperature ----------------------------------------------------------------------------------------

    def _sample(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        noise = self._draw(tensordict, self.tensor_keys.noise)
        return acting.sample_and_log_prob(self.actor_network, tensordict, noise)

    def _actor_term(self, tensordict: TensorDictBase, action: Tensor, log_prob: Tensor) -> Terms:
        # sg: the critics and alpha
        qvalue = self.critics.values(self._with_action(tensordict, action), frozen=True).amin(0)
        alpha = self.log_alpha.detach().exp()
        return self._reduce(alpha * log_prob - qvalue, tensordict), {"q": self._statistic(qvalue, tensordict)}

    def _alpha_term(self, tensordict: TensorDictBase, log_prob: Tensor) -> Terms:
        entropy = -tensordict[self.tensor_keys.action].shape[-1] if self.target_entropy is None else self.target_entropy
        loss = terms.multiplier(self.log_alpha, log_prob + entropy)
        metadata = {"alpha": self.log_alpha.detach().exp(), "entropy": self._statistic(-log_prob, tensordict)}
        return self._reduce(loss, tensordict), metadata

    # -- critics ------------------------------------------------------------------------------------------------------

    @property
    def _alpha_prime(self) -> Tensor:
        return self.log_alpha_prime.exp().clamp(max=_ALPHA_PRIME_MAX)

    def _draws(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """Noise ``[..., n, A]`` given under ``key``, or drawn."""
        noise = tensordict.get(key, None)
        return torch.randn_like(self._repeated_action(tensordict)) if noise is None else noise

    def _repeated_action(self, tensordict: TensorDictBase) -> Tensor:
        action = tensordict[self.tensor_keys.action]
        return action.unsqueeze(-2).expand(*action.shape[:-1], self.num_cql_samples, -1)

    def _actions(self, state: TensorDictBase, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions ``[..., n, A]`` of the policy at a state and their log densities ``[..., n]``, without gradient."""
        with torch.no_grad():
            return acting.sample_and_log_prob(self.actor_network, state, noise)

    def _values(self, tensordict: TensorDictBase, actions: Tensor) -> Tensor:
        """Q_j(s, a_i) ``[J, ..., n]``."""
        return self.critics.values(self._with_actions(tensordict, actions))

    def _with_actions(self, state: TensorDictBase, actions: Tensor) -> TensorDictBase:
        """The critics' input ``[..., n]``: a state with n actions ``[..., n, A]``."""
        return self._with_action(acting.repeated(self.critics.state_of(state), actions), actions)

    def _critic_terms(self, tensordict: TensorDictBase) -> tuple[dict[str, Tensor], Tensor]:
        """Return the critics' reduced terms with their metadata, and the gap D_j ``[J, ...]``."""
        following, keys = self._next(tensordict), self.tensor_keys
        next_actions, _ = self._actions(following, self._draws(tensordict, next_key(keys.noise)))
        scaled = tensordict.copy()
        reward_key = next_key(keys.reward)
        scaled.set(reward_key, self.reward_scale * tensordict[reward_key])
        gap = self._gap(tensordict)
        critic_terms = self.critics.td_terms(
            tensordict,
            lambda: self._with_actions(following, next_actions),
            functools.partial(self._bootstrap, scaled),
            lambda qvalues: qvalues.amin(0).amax(-1),
        )
        if self.target_gap is None:
            critic_terms["loss_qvalue"] = critic_terms["loss_qvalue"] + self.cql_alpha * gap.mean(0)
        else:
            weight = _LAGRANGE_SCALE * self._alpha_prime.detach()
            critic_terms["loss_qvalue"] = critic_terms["loss_qvalue"] + weight * (gap.mean(0) - self.target_gap)
        metadata = {"cql_gap": self._statistic(gap.mean(0), tensordict)}
        return {**self._reduce_critic_terms(critic_terms, tensordict), **metadata}, gap

    def _gap(self, tensordict: TensorDictBase) -> Tensor:
        uniform = tensordict.get("cql_random_action", None)
        if uniform is None:
            uniform = torch.rand_like(self._repeated_action(tensordict)) * 2 - 1
        current, log_prob = self._actions(tensordict, self._draws(tensordict, "cql_noise"))
        later, next_log_prob = self._actions(
            _finite(tensordict["next"]), self._draws(tensordict, ("next", "cql_noise"))
        )
        values = [self._values(tensordict, actions) for actions in (later, current)]
        if self.calibrated:
            bound = self.reward_scale * tensordict["mc_return"]
            values = [torch.maximum(value, bound) for value in values]
        likely = [value - density for value, density in zip(values, (next_log_prob, log_prob), strict=True)]
        log_volume = uniform.shape[-1] * math.log(2.0)
        every = torch.cat([self._values(tensordict, uniform) + log_volume, *likely], -1)
        return every.logsumexp(-1) - self.critics.values(tensordict)

    def _alpha_prime_term(self, tensordict: TensorDictBase, gap: Tensor) -> Terms:
        excess = gap.detach().mean(0) - cast("float", self.target_gap)
        loss = self._reduce(-_LAGRANGE_SCALE * self._alpha_prime * excess, tensordict)
        return loss, {"alpha_prime": self._alpha_prime.detach()}

    # -- terms by themselves ------------------------------------------------------------------------------------------

    @term
    def actor_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_actor``.

        Args:
            tensordict: the policy's and critics' observations and ``action [..., A]`` (for its shape and type);
                optionally ``noise [..., A]``.

        Returns:
            The loss and metadata ``q``, detached.
        """
        return self._actor_term(tensordict, *self._sample(tensordict))

    @term
    def alpha_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_alpha``; inputs as in :meth:`actor_loss`.

        Returns:
            The loss and metadata ``alpha`` and ``entropy``, detached.
        """
        with torch.no_grad():
            log_prob = self._sample(tensordict)[1]
        return self._alpha_term(tensordict, log_prob)

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``.

        Args:
            tensordict: a batch with ``mc_return [..., 1]``, if calibrated; optionally the draws of a', u, b and c.

        Returns:
            The loss and metadata ``cql_gap`` and ``td_error``, detached.
        """
        out = self._critic_terms(tensordict)[0]
        return out.pop("loss_qvalue"), out

    @term
    def alpha_prime_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_alpha_prime``; inputs as in :meth:`qvalue_loss`, without those of the target.

        Returns:
            The loss and metadata ``alpha_prime``, detached.

        Raises:
            AttributeError: without a ``target_gap``.
        """
        if self.target_gap is None:
            raise AttributeError("there is no loss_alpha_prime without a target_gap")
        with torch.no_grad():
            gap = self._gap(tensordict)
        return self._alpha_prime_term(tensordict, gap)


def _finite(state: TensorDictBase) -> TensorDictBase:
    """The state with zeros where it is not finite, as compact recorders leave it behind the end of a trajectory."""
    return state.apply(lambda entry: entry.nan_to_num(0.0, 0.0, 0.0) if entry.is_floating_point() else entry)
