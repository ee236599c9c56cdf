# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""FAN, assembled: a cloned flow, a one-step policy anchored to it, critics with noise and marginal critics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from deflow_torchrl.algorithms.settings import Algorithm, FootedConfig, Need, given, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class FANConfig(FootedConfig):
    """Settings of FAN, ``algo.<name>=...``; ``q_aggregation`` is that of the marginal critics in the target.

    Attributes:
        alpha: weight of the actor's anchor; the task's where None.
        critic_alpha: weight of the anchor in the target; the task's where None.
        alpha_online: ``alpha`` in the online phase; the task's where None, as before without one.
        critic_alpha_online: the same of ``critic_alpha``.
        expectile: of the marginal critics' regression.
        normalize_q_loss: scale each of the actor's value terms by 1 / mean|.|.
    """

    needs: ClassVar[tuple[str, ...]] = (
        "alpha",
        "critic_alpha",
    )

    name: str = "fan"
    alpha: float | None = None
    critic_alpha: float | None = None
    alpha_online: float | None = None
    critic_alpha_online: float | None = None
    expectile: float = 0.9
    normalize_q_loss: bool = False

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        for name in ("alpha", "critic_alpha", "alpha_online", "critic_alpha_online"):
            value = getattr(self, name)
            need(value is None or value >= 0, f"algo.{name}", value, "a number >= 0")
        need(0 < self.expectile < 1, "algo.expectile", self.expectile, "a number between 0 and 1")


def build_fan(config: FANConfig, problem: ProblemSpec) -> Learner:
    """Build FAN for a problem; settings that are None are the task's.

    Raises:
        InputError: where neither the settings nor the task have the weights of the anchor.
    """
    from deflow_torchrl.algorithms.base import learner_with_critics, one_step_policy
    from deflow_torchrl.modules import make_noisy_qvalue_networks
    from deflow_torchrl.objectives import FANLoss

    alpha, critic_alpha = needed(config.alpha, "alpha"), needed(config.critic_alpha, "critic_alpha")
    flow = problem.flow_policy(1)  # of which the velocity alone is read
    actor = one_step_policy(problem)
    noisy = make_noisy_qvalue_networks(*problem.sizes, observation_key=problem.state_key)
    loss = FANLoss(
        flow,
        actor,
        problem.encoded_critics(noisy),
        problem.critics(),
        alpha=alpha,
        critic_alpha=critic_alpha,
        expectile=config.expectile,
        marginal_aggregation=cast("Literal['mean', 'min']", given(config.q_aggregation, problem.q_aggregation)),
        normalize_q_loss=config.normalize_q_loss,
    )
    online = {"alpha": config.alpha_online, "critic_alpha": config.critic_alpha_online}
    online = {name: value for name, value in online.items() if value is not None}
    return learner_with_critics(config, problem, loss, actor, online=online)


ALGORITHM = Algorithm(name="fan", title="FAN", config=FANConfig, build=build_fan)
