# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""What a method is to the command line, free of torch so that settings are checked at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from deflow_torchrl.algorithms.alarms import AlarmRule
from deflow_torchrl.algorithms.panels import Panel
from deflow_torchrl.errors import InputError

if TYPE_CHECKING:
    from deflow_torchrl.algorithms.base import Learner, ProblemSpec

_T = TypeVar("_T")

Need: TypeAlias = Callable[[bool, str, Any, str], None]
"""``need(condition, name, value, expected)`` raises :class:`InputError` where the condition does not hold."""

PRESETS = ("paper", "released")
"""What ``preset=`` chooses between: what the paper prints, and what its authors' code does."""

FOOTINGS = ("common", "original")
"""What ``algo.footing=`` chooses between: the family's steps, batches, networks and optimiser, by which all methods here are
compared, or those of the method's own publication."""

UPDATE_PRECISIONS = ("highest", "high", "medium")
PRECISIONS = (*UPDATE_PRECISIONS, "bfloat16")


@dataclass
class MethodConfig:
    """Settings every method has, ``algo.<name>=...``.

    Attributes:
        name: as in ``algo=NAME``.
        lr: learning rate of the one Adam.
        prior_settings: settings that the base actions of a frozen prior depend on.
        alternatives: settings of which a task of the paper has one; :func:`one_of` says which.
        choices: settings, None by default, whose value is the preset's: name -> preset, None for no preset, -> value.
        needs: settings, None by default, that a task or the user has to give.
        common: settings, None by default, whose value is the footing's: name -> value in the common one.
    """

    prior_settings: ClassVar[tuple[str, ...]] = ()
    alternatives: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[Mapping[str, Mapping[str | None, Any]]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    common: ClassVar[Mapping[str, Any]] = {}

    name: str = "???"
    lr: float = 3e-4

    def settled(self, name: str) -> Any:
        """A setting of :attr:`common`, or its value there where it is None."""
        return given(getattr(self, name), self.common[name])

    def check(self, need: Need) -> None:
        """Raise :class:`InputError`, by ``need``, on a setting out of range."""
        need(self.lr > 0, "algo.lr", self.lr, "a positive number")
        footing = getattr(self, "footing", "common")
        need(footing in FOOTINGS, "algo.footing", footing, " or ".join(FOOTINGS))


@dataclass
class BootstrapConfig(MethodConfig):
    """Settings every method with a value function has; the defaults are the paper's.

    Attributes:
        tau: share of the networks that moves into their targets at each step.
        gamma: discount; the task's where None.
    """

    tau: float = 0.005
    gamma: float | None = None

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(0 < self.tau <= 1, "algo.tau", self.tau, "a number in (0, 1]")
        need(self.gamma is None or 0 <= self.gamma < 1, "algo.gamma", self.gamma, "a number in [0, 1)")


@dataclass
class CriticConfig(BootstrapConfig):
    """Settings every method whose critics' aggregation is the task's has; the defaults are the paper's.

    Attributes:
        q_aggregation: ``mean`` or ``min`` over the target critics; the task's where None.
    """

    q_aggregation: str | None = None

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.q_aggregation in (None, "mean", "min"), "algo.q_aggregation", self.q_aggregation, "mean or min")


@dataclass
class CandidatesConfig(BootstrapConfig):
    """Settings of the methods of QAM's code base, which can take the best of several actions.

    Attributes:
        footing: ``common`` or ``original``, see :data:`FOOTINGS`.
        num_critics: J; the footing's where None: 2, in the original 10.
        pessimism: rho of mean - rho std over the target critics; the footing's where None: 0, in the original 0.5 (0 on
            humanoidmaze).
        best_of_n: candidates N of an action, in targets, evaluation and online.
        flow_steps: Euler steps M of the flow.
    """

    common: ClassVar[Mapping[str, Any]] = {"num_critics": 2, "pessimism": 0.0}

    footing: str = "common"
    num_critics: int | None = None
    pessimism: float | None = None
    best_of_n: int = 1
    flow_steps: int = 10

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.pessimism is None or self.pessimism >= 0, "algo.pessimism", self.pessimism, "a number >= 0")
        for name in ("num_critics", "best_of_n", "flow_steps"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"algo.{name}", value, "at least 1")


@dataclass
class FootedConfig(CriticConfig):
    """Settings of methods that were published with budgets and networks of their own.

    Attributes:
        footing: ``common`` or ``original``, see :data:`FOOTINGS`.
    """

    footing: str = "common"

    @property
    def is_original(self) -> bool:
        """Whether networks and optimiser are those of the method's own publication."""
        return self.footing == "original"


@dataclass
class FlowCriticConfig(CriticConfig):
    """Settings every method has whose critics may be flow critics; the defaults are those of floq's published runs.

    Attributes:
        critic: ``mse``, plain critics that regress on targets, or ``floq``, flow critics and plain ones distilled from them.
            The others are settings of ``floq``.
        noise_samples: draws n of a transition, each with a next action of its own.
        critic_steps: Euler steps of the flow over returns; the task's where None, 8 without one.
        noise_coverage: share of the range of returns that this flow starts from; the task's where None, 0.1 without one.
        critic_hidden_dims: widths of the flow critics' hidden layers; the task's where None, ``hidden_dims`` without one.
        num_flow_critics: flow critics; two plain ones are distilled from them.
        num_bins: points of the embedding of a return.
        sigma: deviation of the embedding, in bins.
        reward_offset: what the embedding's range has beyond the rewards on each side.
        time_features: cosines of the time, cos(k pi t), k = 1 up to this number; None is the released code's cos t alone.
        pad_reward_range: take 0 for a reward that the data has, as the authors' code does, which reads the range from an array
            that is padded with zeros (their runs with balanced sampling do not).
    """

    critic: str = "mse"
    noise_samples: int = 8
    critic_steps: int | None = None
    noise_coverage: float | None = None
    critic_hidden_dims: list[int] | None = None
    num_flow_critics: int = 2
    num_bins: int = 51
    sigma: float = 16.0
    reward_offset: float = 0.01
    time_features: int | None = None
    pad_reward_range: bool = True

    def check(self, need: Need) -> None:
        """As :meth:`MethodConfig.check`."""
        super().check(need)
        need(self.critic in ("mse", "floq"), "algo.critic", self.critic, "mse or floq")
        for name, least in (
            ("noise_samples", 1), ("critic_steps", 1), ("num_flow_critics", 1), ("num_bins", 2), ("time_features", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            need(value is None or value >= least, f"algo.{name}", value, f"at least {least}")
        check_positive(need, self, "noise_coverage", "sigma", "reward_offset")
        widths = self.critic_hidden_dims
        expected = "positive widths"
        need(widths is None or (bool(widths) and min(widths) >= 1), "algo.critic_hidden_dims", widths, expected)


def _no_build(config: Any, problem: ProblemSpec) -> Learner:
    raise InputError(f"the method {config.name!r} was registered without a function that builds it")


@dataclass(frozen=True)
class Algorithm:
    """A method's names, its settings and how to build it.

    Attributes:
        name: as in ``algo=NAME``.
        title: as in tables and figures; the name where it is empty.
        config: dataclass of its settings, each with a default; a :class:`MethodConfig`.
        build: settings and problem to :class:`~deflow_torchrl.algorithms.base.Learner`.
        alarms: what in its rows of metrics says that a run is going wrong.
        run_settings: settings of a run, by name, that are the method's where they are not given.
        trains_offline: whether it learns from data alone; if not, a run with offline steps is refused.
        panels: further panels of a run's report.
        pictures: whether it trains on pictures.
    """

    name: str
    title: str = ""
    config: type[Any] = MethodConfig
    build: Callable[[Any, ProblemSpec], Learner] = _no_build
    alarms: tuple[AlarmRule, ...] = ()
    run_settings: Mapping[str, Any] = field(default_factory=dict)
    trains_offline: bool = True
    panels: tuple[Panel, ...] = ()
    pictures: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.title, str):  # (name, config, build), as in 0.1
            moved: Any = (self.name, self.title, self.config)
            for attribute, value in zip(("title", "config", "build"), moved, strict=True):
                object.__setattr__(self, attribute, value)
        elif not self.title:
            object.__setattr__(self, "title", self.name)


def given(setting: _T | None, task_value: _T) -> _T:
    """The setting, or the task's value where it is None."""
    return task_value if setting is None else setting


def needed(setting: _T | None, name: str) -> _T:
    """A setting that only a task or the user can give.

    Raises:
        InputError: where it is None.
    """
    if setting is None:
        raise InputError(f"algo.{name} has no value: this task names none, so give one")
    return setting


def one_of(config: MethodConfig) -> str:
    """Name of the one alternative setting that has a value.

    Raises:
        InputError: where none has one, or several.
    """
    names = [name for name in config.alternatives if getattr(config, name) is not None]
    if len(names) != 1:
        options = " or ".join(f"algo.{name}" for name in config.alternatives)
        found = f"only one of them can have a value: give either {options}" if names else f"give {options}"
        raise InputError(f"{found}; this task names none" if not names else found)
    return names[0]


def check_expectile(need: Need, value: float | None) -> None:
    """An expectile lies between 0 and 1; None is the footing's."""
    need(value is None or 0 < value < 1, "algo.expectile", value, "a number between 0 and 1")


def check_positive(need: Need, config: MethodConfig, *names: str, optional: bool = True) -> None:
    """Each of these settings is a positive number, or None where ``optional``."""
    for name in names:
        value = getattr(config, name)
        need(
            (optional and value is None) or (value is not None and value > 0),
            f"algo.{name}",
            value,
            "a positive number",
        )
