# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Data cards: source, size and contents of a data set, as JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deflow_torchrl.data.dataset import TransitionDataset
from deflow_torchrl.paths import make_writable_folder, write_text
from deflow_torchrl.versions import package_versions

CARD_SCHEMA = 1
_ROWS = 1 << 16
_MOST_VALUES = 20


def data_card(dataset: TransitionDataset, *, name: str, reward_meaning: str | None = None) -> dict[str, Any]:
    """Describe a set.

    Args:
        dataset: the transitions.

    Keyword Args:
        name: name of the set.
        reward_meaning: what the reward's values mean, where it is known.

    Returns:
        Plain values: source and provenance, versions, sizes, episode lengths, reward values, counts, action statistics.
    """
    about, report, rows = dataset.about, dataset.report, len(dataset)
    action, reward = dataset.action.cpu(), dataset.reward.cpu()
    lengths = dataset.episode_lengths
    lengths = lengths[lengths > 0].double().cpu()
    ended = torch.searchsorted(dataset.episode_starts, dataset.terminated.nonzero().squeeze(-1), right=True)
    total, squares = torch.zeros(2, action.shape[1], dtype=torch.float64)
    for part in action.split(_ROWS):  # memory-mapped actions may be larger than memory
        total += part.double().sum(0)
        squares += part.double().square().sum(0)
    mean = total / rows
    return {
        "schema": CARD_SCHEMA,
        "name": name,
        "source": dataset.source,
        "provenance": about.get("provenance", "unknown"),
        "about": {key: value for key, value in about.items() if key not in ("provenance", "fingerprint")},
        "versions": package_versions(),
        "transitions": rows,
        "episodes": len(lengths),
        "episode_length": {
            "min": int(lengths.min()),
            "median": float(lengths.median()),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
        "observation": {
            "shape": list(dataset.observation.shape[1:]),
            "dtype": str(dataset.observation.dtype).removeprefix("torch."),
        },
        "reward": None
        if "rewards" in about
        else {
            "min": float(reward.min()),
            "max": float(reward.max()),
            "mean": float(reward.double().mean()),
            "values": _counts(reward),
            "meaning": reward_meaning,
        },
        "terminated": {"transitions": int(dataset.terminated.sum()), "episodes": len(ended.unique())},
        "action": {
            "dimensions": action.shape[1],
            "mean": mean.tolist(),
            "std": (squares / rows - mean.square()).clamp_min(0).sqrt().tolist(),
            "min": action.amin(0).tolist(),
            "max": action.amax(0).tolist(),
            "clipped_numbers": None if report is None else report.clipped_actions,
        },
        "duplicated_transitions": None if report is None else report.duplicated_transitions,
        "jump": None if report is None or report.jump is None else str(report.jump),
        "bytes": dataset.nbytes,
    }


def _counts(reward: torch.Tensor) -> dict[str, int] | None:
    """How often each value occurs, in ascending order; ``None`` where there are many."""
    values, counts = reward.unique(return_counts=True)
    if len(values) > _MOST_VALUES:
        return None
    return {_shortest(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


def _shortest(value: float) -> str:
    """The shortest decimal that tells a float32 from every other."""
    return np.format_float_positional(np.float32(value), trim="-") if abs(value) < 1e6 else repr(value)


def write_card(card: Mapping[str, Any], folder: Path) -> None:
    """Write ``card.json`` and ``card.md`` into a folder, beside and renamed.

    Raises:
        InputError: if the folder cannot be written.
    """
    make_writable_folder(folder)
    write_text(folder / "card.json", json.dumps(card, indent=2) + "\n")
    write_text(folder / "card.md", card_markdown(card))


def card_markdown(card: Mapping[str, Any]) -> str:
    """Render the card as a page of Markdown."""
    reward, action, length, ended = card["reward"], card["action"], card["episode_length"], card["terminated"]
    clipped, duplicated = (
        "not counted" if number is None else number
        for number in (action["clipped_numbers"], card["duplicated_transitions"])
    )
    if reward is None:
        earned = {"reward": card["about"]["rewards"]}
    else:
        values = f"more than {_MOST_VALUES} different values"
        if reward["values"] is not None:
            values = ", ".join(f"{value} ({count})" for value, count in reward["values"].items())
        earned = {
            "reward": f"{reward['min']:g} to {reward['max']:g}, mean {reward['mean']:.4g}: {values}",
            "reward's meaning": reward["meaning"] or "not known here",
        }
    rows = {
        "source": card["source"],
        "provenance": card["provenance"],
        "transitions": card["transitions"],
        "episodes": f"{card['episodes']}, of {length['min']} to {length['max']} transitions (median {length['median']:g})",
        "observation": f"{card['observation']['dtype']} {card['observation']['shape']}",
        "action": f"{action['dimensions']} numbers in [-1, 1]; {clipped} clipped to +-(1 - 1e-5)",
        **earned,
        "terminated": f"{ended['transitions']} transitions, in {ended['episodes']} episodes",
        "duplicated transitions": duplicated,
        "jumps inside episodes": card["jump"] or "none found",
        "size": f"{card['bytes'] / 1e6:.1f} MB, observations stored once",
        "versions": card["versions"],
    }
    lines = [f"# {card['name']}", "", "| | |", "|---|---|"]
    about = [(name.replace("_", " "), value) for name, value in card["about"].items()]
    lines += [f"| {name} | {table_cell(value)} |" for name, value in [*rows.items(), *about]]
    lines += ["", "| action | mean | std | min | max |", "|---|---|---|---|---|"]
    columns = zip(action["mean"], action["std"], action["min"], action["max"], strict=True)
    lines += [f"| {i} | " + " | ".join(f"{value:.4g}" for value in column) + " |" for i, column in enumerate(columns)]
    return "\n".join(lines) + "\n"


def table_cell(value: Any) -> str:
    """A value as one cell of a Markdown table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")
