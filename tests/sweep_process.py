"""``deflow sweep`` in a process of its own, whose jobs leave the page and its curve out: they take longer than a tiny run.

``python -m tests.sweep_process KEY=VALUE...``; jobs are forked from a process that has imported this module, and on Ray
:func:`run_on_node` is imported by whatever process runs one.
"""

import sys

import tests.killable  # noqa: F401 # the environment
from deflow_torchrl import experiment
from deflow_torchrl.sweep import local, on_ray

experiment.plot_learning_curve = experiment.write_html_report = lambda *_, **__: None
PRELOADED = ["tests.sweep_process", "yaml"]
_run = on_ray._run_on_node


def run_on_node(job):
    """What the engine sends to Ray."""
    return _run(job)


if __name__ == "__main__":
    from deflow_torchrl.cli import main

    local._PRELOADED = PRELOADED
    main(["sweep", *sys.argv[1:]])
