"""``deflow sweep`` in a process of its own, whose jobs leave the page and its curve out: they take longer than a tiny run.

``python -m tests.sweep_process KEY=VALUE...``; jobs are forked from a process that has imported this module, and on Ray
:func:`run_on_node` is imported by whatever process runs one.
"""

import sys
import time
from pathlib import Path

PRELOADED = ["tests.sweep_process", "yaml"]

if __name__ == "__main__":  # the sweep itself trains nothing
    from deflow_torchrl.cli import main
    from deflow_torchrl.sweep import local

    local._PRELOADED = PRELOADED
    main(["sweep", *sys.argv[1:]])
else:
    import deflow_torchrl.group  # noqa: F401 # what the jobs need
    import tests.killable  # noqa: F401 # the environment
    from deflow_torchrl import experiment
    from deflow_torchrl.sweep import on_ray

    experiment.plot_learning_curve = experiment.write_html_report = lambda *_, **__: None
    _run = on_ray._run_on_node

    def run_on_node(job):
        """What the engine sends to Ray; two jobs wait for each other at first, so that they run at the same time."""
        begun = Path(job.out).parents[2] / "begun"
        begun.mkdir(exist_ok=True)
        (begun / job.algo).touch()
        until = time.monotonic() + 120
        while len(list(begun.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        return _run(job)
