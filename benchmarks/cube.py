"""The cube family of the paper's offline tables, by every method of a protocol.

    python benchmarks/cube.py run --protocol small --jobs 2
    python benchmarks/cube.py run --protocol paper --device cuda --dry-run
    python benchmarks/cube.py render

Cube-single and cube-double of OGBench; play; `small` is three tasks of cube-single, on noisy data it generates. What the
protocols fix is in deflow_torchrl/tasks/protocols.json; numbers of `small` are not comparable with the paper's.
"""

from _family import family_benchmark

if __name__ == "__main__":
    family_benchmark("cube", __doc__)
