# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""A run as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deflow_torchrl.paths import write_text
from deflow_torchrl.reports.extra import check_report_extra
from deflow_torchrl.reports.figures import draw_diagnostics

if TYPE_CHECKING:
    from jinja2 import Template


def write_html_report(
    path: Path,
    *,
    title: str,
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
    figure: Path,
    target_divergence: float | None,
) -> Path:
    """Write the page: outcome, curves, alarms, diagnostics, command, numbers, settings, versions.

    Everything is in the one file; it loads nothing from anywhere.

    Args:
        path: HTML file to write, beside and renamed.

    Keyword Args:
        title: heading.
        record: see :func:`deflow_torchrl.reports.build_record`.
        rows: rows of ``metrics.jsonl``, for the diagnostics.
        figure: PNG to embed.
        target_divergence: delta, for the explanation.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    template = page_template("report.html.j2")
    page = template.render(
        title=title,
        record=record,
        figure=as_base64(figure.read_bytes()),
        diagnostics=[(diagnostic, as_base64(png)) for diagnostic, png in draw_diagnostics(rows)],
        settings=_flatten(record["config"]),
        target_divergence=target_divergence,
    )
    write_text(path, page)
    return path


def page_template(name: str) -> Template:
    """A page's template of this folder; what a page does not give it is an error.

    Raises:
        MissingExtraError: without the ``reports`` extra.
    """
    check_report_extra()
    from jinja2 import Environment, StrictUndefined

    source = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)


def as_base64(png: bytes) -> str:
    """For a data URI."""
    return base64.b64encode(png).decode("ascii")


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
