"""The scene family of the paper's offline tables, by every method of a protocol.

    python benchmarks/scene.py run --protocol small --jobs 2
    python benchmarks/scene.py run --protocol paper --device cuda --dry-run
    python benchmarks/scene.py render

Scene of OGBench; play; `small` is its task 1, on data it generates. What the protocols fix is in
deflow_torchrl/tasks/protocols.json; numbers of `small` are not comparable with the paper's.
"""

from _family import family_benchmark

if __name__ == "__main__":
    family_benchmark("scene", __doc__)
