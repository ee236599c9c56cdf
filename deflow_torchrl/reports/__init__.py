# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Records of runs, figures and the HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports

if TYPE_CHECKING:  # what type checkers and editors see
    from deflow_torchrl.reports.extra import check_report_extra as check_report_extra
    from deflow_torchrl.reports.figures import plot_learning_curve as plot_learning_curve
    from deflow_torchrl.reports.html import write_html_report as write_html_report
    from deflow_torchrl.reports.records import build_record as build_record

_EXPORTS = {
    "build_record": ".records",
    "check_report_extra": ".extra",
    "plot_learning_curve": ".figures",
    "write_html_report": ".html",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
