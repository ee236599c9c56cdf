"""The puzzle family of the paper's offline tables, by every method of a protocol.

    python benchmarks/puzzle.py run --protocol small --jobs 2
    python benchmarks/puzzle.py run --protocol paper --device cuda --dry-run
    python benchmarks/puzzle.py render

Puzzle-3x3 and puzzle-4x4 of OGBench; play; `small` is task 1 of puzzle-3x3, on data it generates. What the protocols
fix is in deflow_torchrl/tasks/protocols.json; numbers of `small` are not comparable with the paper's.
"""

from _family import family_benchmark

if __name__ == "__main__":
    family_benchmark("puzzle", __doc__)
