"""The humanoidmaze family of the paper's offline tables, by every method of a protocol.

    python benchmarks/humanoidmaze.py run --protocol small --jobs 2
    python benchmarks/humanoidmaze.py run --protocol paper --device cuda --dry-run
    python benchmarks/humanoidmaze.py render

Humanoidmaze-medium and humanoidmaze-large of OGBench; navigate, published data, which cannot be generated here: where
it is not there the run says so and ends. What the protocols fix is in deflow_torchrl/tasks/protocols.json; numbers of
`small` are not comparable with the paper's.
"""

from _family import family_benchmark

if __name__ == "__main__":
    family_benchmark("humanoidmaze", __doc__)
