"""``deflow sweep`` in a process of its own, whose jobs write no report page and draw no curve.

``python -m tests.support.sweep_process KEY=VALUE...``; jobs are forked from a process that has imported what is named here, and
on Ray :func:`run_on_node` is called by whatever process runs one.
"""

import sys
import time
from pathlib import Path

PRELOADED = ["tests.support.without_page", "yaml"]


def run_on_node(job):
    """What the engine sends to Ray; two jobs wait for each other at first, so that they run at the same time."""
    import tests.support.without_page  # noqa: F401 # in the job's process
    from deflow_torchrl.sweep.ray import _run_on_node

    begun = Path(job.out).parents[2] / "begun"
    begun.mkdir(exist_ok=True)
    (begun / job.algo).touch()
    until = time.monotonic() + 120
    while len(list(begun.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    return _run_on_node(job)


if __name__ == "__main__":  # the sweep itself trains nothing
    from deflow_torchrl.cli import main
    from deflow_torchrl.sweep import local

    local._PRELOADED = PRELOADED
    main(["sweep", *sys.argv[1:]])
