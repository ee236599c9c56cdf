"""Importing this leaves the page and its curve out of the runs of a process: they take longer than a tiny run."""

import tests.support.pendulum  # noqa: F401 # the environment
from deflow_torchrl.runs import run

run.plot_learning_curve = run.write_html_report = lambda *_, **__: None
