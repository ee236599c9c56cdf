# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The intrinsic action variance of a named data set, and what the paper's rule makes of it: ``deflow iav``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deflow_torchrl.data.action_variance import intrinsic_action_variance, paper_values, suggest_target_divergence
from deflow_torchrl.errors import InputError
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.tasks.data import load_any


def measure_action_variance(
    name: str,
    *,
    domain: str | None = None,
    root: str | Path | None = None,
    download: bool = True,
    allow_jumps: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Measure a data set's intrinsic action variance and suggest ``target_divergence`` (delta) by the paper's rule.

    Args:
        name: a task, a data set, an imported folder or a file, as :func:`~deflow_torchrl.tasks.data.load_any` takes it.

    Keyword Args:
        domain: the rule to apply, ``manipulation``, ``navigation`` or ``d4rl``; the task's by default, all three where it has
            none.
        root: folder of OGBench's files.
        download: fetch what is missing.
        allow_jumps: accept a file whose observations jump inside an episode.
        options: ``k``, ``queries``, ``include_self``, ``normalize`` and ``seed`` of
            :func:`~deflow_torchrl.data.intrinsic_action_variance`.

    Returns:
        The fields of :class:`~deflow_torchrl.data.ActionVariance` (``per_dimension`` as a list), ``name``, ``observation_dim``,
        ``suggested_target_divergence`` (domain -> delta), ``task_target_divergence`` and ``task_in_paper`` (None where ``name``
        is no task), and ``paper``, the values copied from there.

    Raises:
        InputError: on an unknown domain, data that cannot be used, or images for observations.
    """
    if domain is not None:
        suggest_target_divergence(0.0, domain=domain)  # an unknown domain is refused before the work
    dataset, task = load_any(name, root=root, download=download, allow_jumps=allow_jumps, images=False)
    if dataset.observation.ndim != 2:
        raise InputError(
            f"{name} has images for observations; distances between pictures say little about their states"
        )
    states = dataset.states()
    variance = intrinsic_action_variance(
        states,
        dataset.action,
        progress=lambda blocks, total: progress_bar(blocks, total=total, desc="neighbours", unit="block"),
        **options,
    )
    domain = task.domain if task is not None and domain is None else domain
    paper = paper_values()
    domains = list(paper["rule"]) if domain is None else [domain]
    return {
        **vars(variance),
        "name": name,
        "observation_dim": states.shape[1],
        "per_dimension": variance.per_dimension.tolist(),
        "suggested_target_divergence": {rule: suggest_target_divergence(variance, domain=rule) for rule in domains},
        "task_target_divergence": None if task is None else task.target_divergence,
        "task_in_paper": None if task is None else task.in_paper,
        "paper": paper,
    }
