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
    from deflow_torchrl.reports.statistics import paired_difference as paired_difference
    from deflow_torchrl.reports.statistics import sign_test as sign_test

_EXPORTS = {
    "build_record": ".records",
    "check_report_extra": ".extra",
    "paired_difference": ".statistics",
    "plot_learning_curve": ".figures",
    "sign_test": ".statistics",
    "write_html_report": ".html",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
