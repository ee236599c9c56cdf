# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""The model card of an exported policy: Markdown with the front matter that model hubs read (``deflow export --card``)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from deflow_torchrl.errors import InputError
from deflow_torchrl.paths import file_sha256, write_text
from deflow_torchrl.reports.figures import check_report_extra
from deflow_torchrl.reports.records import METRICS, load_record, without_places
from deflow_torchrl.reports.runs import as_setting, flat_settings
from deflow_torchrl.reports.statistics import mean_interval
from deflow_torchrl.sources.card import table_cell

CARD_FILE = "README.md"
_OURS = "library_name: deflow_torchrl"


def card_record(run: Path, folder: Path, *, step: int, force: bool = False) -> dict[str, Any]:
    """Check that a card can be written into a folder, before the policy is; returns the run's record.

    Raises:
        InputError: if the run has no record of this step, or the folder holds a ``README.md``: a card is overwritten with
            ``force`` only, another text never.
        MissingExtraError: without the ``reports`` extra.
    """
    check_report_extra("jinja2")
    record, path = without_places(load_record(run)), folder / CARD_FILE
    last = record["history"][-1]["step"] if record["history"] else step
    if last != step:
        raise InputError(
            f"the last checkpoint of {run} is of step {step} and its record of step {last}; deflow resume finishes the run"
        )
    if path.exists() and not (force and _OURS in path.read_text(encoding="utf-8", errors="replace")):
        raise InputError(
            f"{path} exists already; --out names a file in another folder, --force overwrites a model card"
        )
    return record


def write_model_card(file: Path, manifest: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Write ``README.md`` beside an exported policy.

    Args:
        file: the policy.
        manifest: its manifest.
        record: of the run, from :func:`card_record`.

    Returns:
        ``card``, the path, and ``upload``, the hub client's command, in which OWNER/NAME is to be replaced.

    Raises:
        InputError: if it cannot be written.
    """
    import yaml
    from jinja2 import Environment, StrictUndefined

    played = file.suffix == ".onnx" and manifest["environment"] is not None
    outcomes = {policy: _outcome(outcome, record["metric"]) for policy, outcome in record["evaluations"].items()}
    values = {
        "file": file.name,
        "sha256": file_sha256(file),
        "manifest": manifest,
        "record": record,
        "outcomes": outcomes,
        "played": played,
        "extras": "cli,export,reports,ogbench,minari" if played else "export",
        "settings": {name: as_setting(value) for name, value in flat_settings(record).items()},
        "front": yaml.safe_dump(_front_matter(manifest, record, outcomes), sort_keys=False, width=1000),
    }
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = table_cell
    source = resources.files(__package__).joinpath("model_card.md.j2").read_text(encoding="utf-8")
    card = file.parent / CARD_FILE
    write_text(card, environment.from_string(source).render(values))
    upload = ["hf", "upload", "OWNER/NAME", str(file.parent)]
    if {path.name for path in file.parent.iterdir()} != {file.name, CARD_FILE}:
        upload += [".", "--include", file.name, "--include", CARD_FILE]
    return {"card": str(card), "upload": shlex.join(upload)}


def _outcome(outcome: Mapping[str, Any], metric: str) -> dict[str, Any]:
    found = mean_interval(outcome[METRICS[metric].episodes], rate=metric == "success")
    interval = "-" if found.low is None else f"{found.low:.4g} to {found.high:.4g}"
    return {"mean": found.value, "interval": interval, "episodes": outcome["episodes"]}


def _front_matter(
    manifest: Mapping[str, Any], record: Mapping[str, Any], outcomes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What model hubs index: tags and, of an evaluated policy, its result."""
    task = manifest["task"]
    front: dict[str, Any] = {
        "library_name": "deflow_torchrl",
        "pipeline_tag": "reinforcement-learning",
        "tags": ["reinforcement-learning", "offline-rl", "robotics", "torchrl", manifest["method"], task],
    }
    if (found := outcomes.get(manifest["policy"])) is not None:
        result = {
            "task": {"type": "reinforcement-learning", "name": "reinforcement learning"},
            "dataset": {"name": task, "type": task},
            "metrics": [
                {"type": METRICS[record["metric"]].key, "value": round(found["mean"], 4), "name": record["metric"]}
            ],
        }
        front["model-index"] = [{"name": manifest["policy"], "results": [result]}]
    return front
