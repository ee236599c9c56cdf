# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A data set's card: what it is, where it is from, and what is in it, as JSON and Markdown."""

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
        dataset: the transitions, read once, a chunk at a time.

    Keyword Args:
        name: what the set is called.
        reward_meaning: what the reward's values mean, where it is known.

    Returns:
        Plain values: source and provenance, versions, sizes, episode lengths, reward values, counts, action statistics.
    """
    lengths = dataset.episode_lengths
    lengths = lengths[lengths > 0].double().cpu()
    values: dict[float, int] | None = {}
    reward_sum = 0.0
    dimensions = dataset.action.shape[1]
    total, squares = torch.zeros(dimensions, dtype=torch.float64), torch.zeros(dimensions, dtype=torch.float64)
    low, high = torch.full((dimensions,), torch.inf), torch.full((dimensions,), -torch.inf)
    for begin in range(0, len(dataset), _ROWS):
        reward = dataset.reward[begin : begin + _ROWS].cpu()
        reward_sum += float(reward.double().sum())
        unique, counts = reward.unique(return_counts=True)
        if values is not None:
            for value, count in zip(unique.tolist(), counts.tolist(), strict=True):
                values[value] = values.get(value, 0) + count
            values = None if len(values) > _MOST_VALUES else values
        action = dataset.action[begin : begin + _ROWS].cpu()
        total += action.double().sum(0)
        squares += action.double().square().sum(0)
        low, high = torch.minimum(low, action.amin(0)), torch.maximum(high, action.amax(0))
    mean = total / len(dataset)
    episode = torch.searchsorted(dataset.episode_starts, dataset.terminated.nonzero().squeeze(-1), right=True)
    report = dataset.report
    return {
        "schema": CARD_SCHEMA,
        "name": name,
        "source": dataset.source,
        "provenance": dataset.about.get("provenance", "unknown"),
        "about": {key: value for key, value in dataset.about.items() if key not in ("provenance", "fingerprint")},
        "versions": package_versions(),
        "transitions": len(dataset),
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
        if "rewards" in dataset.about
        else {
            "min": float(dataset.reward.min()),
            "max": float(dataset.reward.max()),
            "mean": reward_sum / len(dataset),
            "values": None if values is None else {_number(value): values[value] for value in sorted(values)},
            "meaning": reward_meaning,
        },
        "terminated": {
            "transitions": int(dataset.terminated.sum()),
            "episodes": len(episode.unique()),
        },
        "action": {
            "dimensions": dimensions,
            "mean": mean.tolist(),
            "std": (squares / len(dataset) - mean.square()).clamp_min(0).sqrt().tolist(),
            "min": low.tolist(),
            "max": high.tolist(),
            "clipped_numbers": None if report is None else report.clipped_actions,
        },
        "duplicated_transitions": None if report is None else report.duplicated_transitions,
        "jump": None if report is None or report.jump is None else str(report.jump),
        "bytes": dataset.nbytes,
    }


def write_card(card: Mapping[str, Any], folder: Path) -> None:
    """Write ``card.json`` and ``card.md`` into a folder, beside and renamed.

    Raises:
        InputError: if the folder cannot be written.
    """
    make_writable_folder(folder)
    write_text(folder / "card.json", json.dumps(card, indent=2) + "\n")
    write_text(folder / "card.md", card_markdown(card))


def card_markdown(card: Mapping[str, Any]) -> str:
    """The card as a page of Markdown."""
    reward, action, length, ended = card["reward"], card["action"], card["episode_length"], card["terminated"]
    if reward is None:
        earned = [("reward", card["about"]["rewards"])]
    else:
        earned = [
            (
                "reward",
                f"{reward['min']:g} to {reward['max']:g}, mean {reward['mean']:.4g}: {_values(reward['values'])}",
            ),
            ("reward's meaning", reward["meaning"] or "not known here"),
        ]
    rows = [
        ("source", card["source"]),
        ("provenance", card["provenance"]),
        ("transitions", card["transitions"]),
        (
            "episodes",
            f"{card['episodes']}, of {length['min']} to {length['max']} transitions (median {length['median']:g})",
        ),
        ("observation", f"{card['observation']['dtype']} {card['observation']['shape']}"),
        (
            "action",
            f"{action['dimensions']} numbers in [-1, 1]; {_count(action['clipped_numbers'])} clipped to +-(1 - 1e-5)",
        ),
        *earned,
        ("terminated", f"{ended['transitions']} transitions, in {ended['episodes']} episodes"),
        ("duplicated transitions", _count(card["duplicated_transitions"])),
        ("jumps inside episodes", card["jump"] or "none found"),
        ("size", f"{card['bytes'] / 1e6:.1f} MB, observations stored once"),
        ("versions", ", ".join(f"{name} {version}" for name, version in card["versions"].items())),
        *((name.replace("_", " "), value) for name, value in card["about"].items()),
    ]
    lines = [f"# {card['name']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows]
    lines += ["", "| action | mean | std | min | max |", "|---|---|---|---|---|"]
    columns = zip(action["mean"], action["std"], action["min"], action["max"], strict=True)
    lines += [f"| {i} | " + " | ".join(f"{value:.4g}" for value in column) + " |" for i, column in enumerate(columns)]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """As short as tells it apart from every other float32."""
    return np.format_float_positional(np.float32(value), trim="-") if abs(value) < 1e6 else repr(value)


def _values(values: Mapping[str, int] | None) -> str:
    if values is None:
        return f"more than {_MOST_VALUES} different values"
    return ", ".join(f"{value} ({count})" for value, count in values.items())


def _count(number: int | None) -> str:
    return "not counted" if number is None else str(number)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")
