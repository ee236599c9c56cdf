# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Records of runs, statistics, tables, figures and HTML pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deflow_torchrl._lazy import lazy_exports

if TYPE_CHECKING:  # what type checkers and editors see
    from deflow_torchrl.reports.figures import check_report_extra as check_report_extra
    from deflow_torchrl.reports.figures import plot_learning_curve as plot_learning_curve
    from deflow_torchrl.reports.page import write_html_report as write_html_report
    from deflow_torchrl.reports.records import build_record as build_record
    from deflow_torchrl.reports.records import load_record as load_record
    from deflow_torchrl.reports.records import upgrade_record as upgrade_record
    from deflow_torchrl.reports.records import without_places as without_places
    from deflow_torchrl.reports.statistics import inside_noise as inside_noise
    from deflow_torchrl.reports.statistics import interquartile_mean as interquartile_mean
    from deflow_torchrl.reports.statistics import mean_and_std as mean_and_std
    from deflow_torchrl.reports.statistics import paired_difference as paired_difference
    from deflow_torchrl.reports.statistics import probability_of_improvement as probability_of_improvement
    from deflow_torchrl.reports.statistics import sign_test as sign_test
    from deflow_torchrl.reports.statistics import stratified_bootstrap as stratified_bootstrap
    from deflow_torchrl.reports.statistics import success_standard_error as success_standard_error

_EXPORTS = {
    "build_record": ".records",
    "check_report_extra": ".figures",
    "inside_noise": ".statistics",
    "interquartile_mean": ".statistics",
    "load_record": ".records",
    "mean_and_std": ".statistics",
    "paired_difference": ".statistics",
    "plot_learning_curve": ".figures",
    "probability_of_improvement": ".statistics",
    "sign_test": ".statistics",
    "stratified_bootstrap": ".statistics",
    "success_standard_error": ".statistics",
    "upgrade_record": ".records",
    "without_places": ".records",
    "write_html_report": ".page",
}
__all__ = list(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
