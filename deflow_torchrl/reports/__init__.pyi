# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.

from .figures import check_report_extra as check_report_extra
from .figures import plot_learning_curve as plot_learning_curve
from .page import write_html_report as write_html_report
from .records import build_record as build_record
from .records import load_record as load_record
from .records import upgrade_record as upgrade_record
from .records import without_places as without_places
from .statistics import inside_noise as inside_noise
from .statistics import interquartile_mean as interquartile_mean
from .statistics import mean_and_std as mean_and_std
from .statistics import paired_difference as paired_difference
from .statistics import probability_of_improvement as probability_of_improvement
from .statistics import sign_test as sign_test
from .statistics import stratified_bootstrap as stratified_bootstrap
from .statistics import success_standard_error as success_standard_error
