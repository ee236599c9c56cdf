"""The antsoccer family of the paper's offline tables, by every method of a protocol.

    python benchmarks/antsoccer.py run --protocol small --jobs 2
    python benchmarks/antsoccer.py run --protocol paper --device cuda --dry-run
    python benchmarks/antsoccer.py render

Antsoccer-arena of OGBench; navigate, published data, which cannot be generated here: where it is not there the run
says so and ends. What the protocols fix is in deflow_torchrl/tasks/protocols.json; numbers of `small` are not
comparable with the paper's.
"""

from _family import family_benchmark

if __name__ == "__main__":
    family_benchmark("antsoccer", __doc__)
