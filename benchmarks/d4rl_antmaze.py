"""The d4rl-antmaze family of the paper's offline tables, by every method of a protocol.

    python benchmarks/d4rl_antmaze.py run --protocol small --jobs 2
    python benchmarks/d4rl_antmaze.py run --protocol paper --device cuda --dry-run
    python benchmarks/d4rl_antmaze.py render

The six antmaze tasks of D4RL; published data, which cannot be generated here: where it is not there the run says so
and ends. What the protocols fix is in deflow_torchrl/tasks/protocols.json; numbers of `small` are not comparable with
the paper's.
"""

from _family import family_benchmark

if __name__ == "__main__":
    family_benchmark("d4rl-antmaze", __doc__)
