# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""DSRL, assembled: a cloned flow, a policy over its starting noise, critics of actions and of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deflow_torchrl.algorithms.settings import Algorithm, CandidatesConfig, Need, check_positive, needed

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec


@dataclass
class DSRLConfig(CandidatesConfig):
    """Settings of DSRL, ``algo.<name>=...``.

    Attributes:
        noise_scale: c, the largest starting noise of a dimension; the task's where None.
        target_entropy: of the noise before it is scaled; -A / 2 where None.
    """

    needs: ClassVar[tuple[str, ...]] = ("noise_scale",)

    name: str = "dsrl"
    noise_scale: float | None = None
    target_entropy: float | None = None

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        check_positive(need, self, "noise_scale")


def build_dsrl(config: DSRLConfig, problem: ProblemSpec) -> Learner:
    """Build DSRL for a problem; settings that are None are the task's.

    Raises:
        InputError: where neither the settings nor the task have a scale of the noise.
    """
    from torchrl.objectives import SoftUpdate

    from deflow_torchrl.algorithms.base import best_of_n_learner
    from deflow_torchrl.modules import SteeredFlowPolicy, TanhGaussianPolicy, make_tanh_gaussian_network
    from deflow_torchrl.objectives import DSRLLoss

    noise_scale = needed(config.noise_scale, "noise_scale")
    flow = problem.flow_policy(config.flow_steps)
    network = make_tanh_gaussian_network(*problem.sizes)
    latent = problem.encoded(
        TanhGaussianPolicy(network, log_std_min=-20.0, in_keys=(problem.state_key,), out_keys=("latent",))
    )
    loss = DSRLLoss(
        flow,
        latent,
        problem.critics(config.settled("num_critics")),
        problem.critics(config.settled("num_critics")),
        noise_scale=noise_scale,
        best_of_n=config.best_of_n,
        pessimism=config.settled("pessimism"),
        target_entropy=config.target_entropy,
    )
    SoftUpdate(loss, tau=config.tau)  # before targets are read: the loss warns where nothing moves them
    policy = SteeredFlowPolicy(flow, latent, noise_scale=noise_scale, flow_params=loss.target_flow_policy_params)
    return best_of_n_learner(config, problem, loss, policy)


ALGORITHM = Algorithm(name="dsrl", title="DSRL", config=DSRLConfig, build=build_dsrl)
