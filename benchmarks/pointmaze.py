"""The maze of the protocol `small`, which the paper does not have, by every method: data made here, actions in chunks of five.

    python benchmarks/pointmaze.py run --protocol small --jobs 2
    python benchmarks/pointmaze.py render

Medium maze, navigate data, task 5. What the protocol fixes is in deflow_torchrl/tasks/protocols.json; the methods take the
paper's values for antmaze-large. Nothing here can be compared with the paper's numbers.
"""

from _family import family_benchmark

if __name__ == "__main__":
    family_benchmark("pointmaze", __doc__)
