# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What FEdit, DSRL and QAM share, as in QAM's code base: the best of N actions in the target, a flow, a learned temperature."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from deflow_torchrl.modules.critics import check_aggregation
from deflow_torchrl.objectives import acting, terms
from deflow_torchrl.objectives.base import OffPolicyLoss, Terms, next_key, term

EDIT_NOISE = "edit_noise"


class BestOfNLoss(OffPolicyLoss):
    """Base of losses with a cloned flow and targets at a' = act(s'), the best of N actions by the mean of the online critics.

    A subclass proposes the actions of a state in :meth:`_candidates`.
    """

    edit_policy: TensorDictModuleBase | None
    edit_policy_params: TensorDictParams
    target_edit_policy_params: TensorDictParams
    edit_scale: Tensor
    target_entropy: Tensor | None
    log_alpha: Tensor

    def _set_choice(self, best_of_n: int, pessimism: float) -> None:
        check_aggregation(pessimism)
        if best_of_n < 1:
            raise ValueError(f"best_of_n must be positive, got {best_of_n}")
        self.best_of_n = best_of_n
        self.q_aggregation = float(pessimism)

    def _add_temperature(self, alpha_init: float, target_entropy: float | None) -> None:
        if not alpha_init > 0:
            raise ValueError(f"alpha_init must be positive, got {alpha_init}")
        example = next(iter(self.parameters()))
        entropy = None if target_entropy is None else float(target_entropy)
        self.register_coeff_buffer("target_entropy", entropy, device=example.device, dtype=example.dtype)
        self.log_alpha = torch.nn.Parameter(example.new_full((), math.log(alpha_init)))

    @property
    def alpha(self) -> Tensor:
        """The temperature, detached scalar."""
        return self.log_alpha.detach().exp()

    @abstractmethod
    def _candidates(self, tensordict: TensorDictBase, following: TensorDictBase) -> Tensor:
        """Actions ``[*B, N, A]`` that compete at s'; their draws are under ``"next"`` of ``tensordict``, or made in order."""

    def _flow_term(self, tensordict: TensorDictBase) -> Tensor:
        valid = tensordict.get(self.tensor_keys.valid, None)
        if valid is not None:  # the last step's flag, for the row as a whole: as the QAM authors' code
            tensordict = tensordict.copy().set(self.tensor_keys.valid, valid[..., -1:])
        return self._reduce(self._flow_error(self.flow_policy, tensordict), tensordict)

    def _critic_terms(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        """Targets at a' = act(s'), without gradient."""
        following = self._next(tensordict)

        def next_state() -> TensorDictBase:
            candidates = self._candidates(tensordict, following)
            if self.best_of_n == 1:
                return self._with_action(following, candidates.squeeze(-2))
            rows = self._with_action(acting.each_state(following, candidates), candidates)
            best = self.critics.values(rows).mean(0).argmax(-1)
            chosen = best[..., None, None].expand(*best.shape, 1, candidates.shape[-1])
            return self._with_action(following, candidates.gather(-2, chosen).squeeze(-2))

        return self._td_terms(tensordict, next_state)

    def _draw_candidates(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """Noise ``[*B, N, A]`` of the target's candidates."""
        given, action = tensordict.get(next_key(key), None), tensordict[self.tensor_keys.action]
        if given is not None:
            return given if given.ndim > action.ndim else given.unsqueeze(-2)
        return torch.randn_like(action.unsqueeze(-2).expand(*action.shape[:-1], self.best_of_n, action.shape[-1]))

    @contextlib.contextmanager
    def _target_flow(self) -> Iterator[None]:
        """Context in which the flow policy computes with its target parameters."""
        with self.target_flow_policy_params.to_module(self.flow_policy, preserve_module_state=False):
            yield

    def _temperature_terms(self, log_prob: Tensor, tensordict: TensorDictBase) -> dict[str, Tensor]:
        action_dim = tensordict[self.tensor_keys.action].shape[-1]
        entropy = -action_dim / 2 if self.target_entropy is None else self.target_entropy
        return {
            "loss_alpha": self._reduce(terms.temperature(self.log_alpha.exp(), log_prob, entropy), tensordict),
            "alpha": self.alpha,
            "entropy": self._statistic(-log_prob, tensordict),
        }

    # -- edits --------------------------------------------------------------------------------------------------------

    def _edited(
        self, base_policy: TensorDictModuleBase, state: TensorDictBase, noise: Tensor, edit_noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(clip(b + c tanh u), c tanh u, log p), b = sg(base(s, z)), with gradient to the edit."""
        assert self.edit_policy is not None
        with torch.no_grad():
            base = acting.act(base_policy, state, noise)
        edit, log_prob = acting.sample_and_log_prob(self.edit_policy, state, edit_noise, base)
        shift = self.edit_scale * edit
        return acting.clip(base_policy, base + shift), shift, log_prob

    def _edit_terms(
        self,
        name: str,
        base_policy: TensorDictModuleBase,
        tensordict: TensorDictBase,
        of_critics: TensorDictBase | None = None,
    ) -> dict[str, Tensor]:
        """The edit's term under ``name``, and the temperature's."""
        noise, edit_noise = (self._draw(tensordict, key) for key in (self.tensor_keys.noise, EDIT_NOISE))
        action, shift, log_prob = self._edited(base_policy, tensordict, noise, edit_noise)
        # sg: the critics and alpha
        qvalue = self.critics.values(
            self._with_action(tensordict if of_critics is None else of_critics, action), frozen=True
        ).mean(0)
        return {
            name: self._reduce(self.alpha * log_prob - qvalue, tensordict),
            **self._temperature_terms(log_prob, tensordict),
            "edit_size": self._statistic(shift.square().mean(-1), tensordict),
        }

    @term
    def flow_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_flow``; inputs as in :meth:`FlowMatchingLoss.flow_loss`."""
        return self._flow_term(tensordict), {}

    @term
    def qvalue_loss(self, tensordict: TensorDictBase) -> Terms:
        """Compute ``loss_qvalue``; inputs and metadata as in :meth:`DeFlowLoss.qvalue_loss`."""
        return self._one_term("loss_qvalue", self._critic_terms(tensordict))
