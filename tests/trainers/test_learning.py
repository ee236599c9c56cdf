"""Learning regressions: each method gets well beyond a clone of its data where the optimum is known; with a fault it does not.

The task does not show every fault: ``UNSEEN`` of the support module names those that it misses, and why.
"""

import pytest

from deflow_torchrl.errors import NonFiniteLossError
from tests.support.obstacle import FAULTS, UNSEEN, faulty, logged_score, score, train

# Shares of the shortest way's return; `python -m tests.support.obstacle 0,1,2` prints what seeds reach, whole and with faults.
REACHED = {"deflow": 0.5, "fql": 0.5, "ifql": 0.42, "floq": 0.45}


def test_the_driver_is_far_from_the_shortest_way():
    assert logged_score() == pytest.approx(0.491, abs=1e-3)


def test_a_clone_of_the_data_is_not_enough():
    assert score(train("flow_bc", seed=0).policy) < min(REACHED.values()) - 0.05


@pytest.mark.parametrize("method", REACHED)
def test_a_method_learns_the_way_round_the_obstacle(method):
    assert score(train(method, seed=0).policy) > REACHED[method]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fault"),
    [(method, fault) for method, faults in FAULTS.items() for fault in faults if fault not in UNSEEN[method]],
)
def test_a_fault_misses_the_score(method, fault):
    with faulty(FAULTS[method][fault]):
        try:
            reached = score(train(method, seed=0).policy)
        except NonFiniteLossError:
            return
    assert reached < REACHED[method] - 0.1
