import csv
import json
import os
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from deflow_torchrl.data import ActionVariance, intrinsic_action_variance, suggest_target_divergence
from deflow_torchrl.data.action_variance import _nearest, paper_values
from deflow_torchrl.errors import InputError
from deflow_torchrl.tasks import get_task, ogbench_task_names


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(states):
    """A function of the state that hardly moves between neighbours of a dense set."""
    return torch.stack([torch.sin(states.sum(-1)), 0.5 * states[:, 0]], dim=-1)


def dense_states(rows=4000):
    return torch.rand(rows, 2, generator=torch.Generator().manual_seed(1))


def brute_force(observations, actions, k, *, include_self=False, normalize=False, unbiased=True):
    """Row by row: differences of coordinates, a stable sort, the lower row first where distances tie."""
    s, a = observations.double().numpy(), actions.double().numpy()
    if normalize:
        s = s / np.where(s.std(0) > 0, s.std(0), 1)
    total = np.zeros(a.shape[1])
    for row in range(len(s)):
        order = np.argsort(((s - s[row]) ** 2).sum(1), kind="stable")
        others = order[order != row]
        chosen = [row, *others[: k - 1]] if include_self else others[:k]
        total += a[chosen].var(0, ddof=int(unbiased))
    return torch.from_numpy(total / len(s))


@pytest.mark.parametrize("std", [0.03, 0.2])
def test_noise_of_known_variance_on_a_smooth_policy_is_recovered(std):
    states = dense_states()
    scale = torch.tensor([std, 2 * std])
    variance = intrinsic_action_variance(states, smooth(states) + scale * draw(len(states), 2))
    torch.testing.assert_close(variance.per_dimension, (scale**2).double(), rtol=0.1, atol=5e-4)
    assert variance.mean == pytest.approx(2.5 * std**2, rel=0.1, abs=5e-4)
    assert variance.mean == pytest.approx(float(variance.per_dimension.mean()))


def test_a_deterministic_smooth_policy_has_almost_no_variance():
    states = dense_states()
    assert intrinsic_action_variance(states, smooth(states)).mean < 5e-4


def test_two_equally_likely_modes_add_their_squared_half_distance():
    states = dense_states()
    mode = torch.where(draw(len(states), 1, seed=2) > 0, 0.4, -0.4)
    actions = mode + 0.1 * draw(len(states), 1)
    assert intrinsic_action_variance(states, actions).mean == pytest.approx(0.4**2 + 0.1**2, rel=0.05)


def test_modes_that_the_state_tells_apart_add_nothing():
    states = dense_states()
    actions = torch.where(states[:, :1] > 0.5, 0.4, -0.4) + 0.1 * draw(len(states), 1)
    assert intrinsic_action_variance(states, actions).mean == pytest.approx(0.1**2, rel=0.35)


def duplicated_states():
    states = draw(400, 3)
    states[200:] = states[:200]
    states[5:8] = states[0]
    return states


CASES = {  # more rows than the search keeps as candidates, so that what it throws away is tested
    "normal": draw(333, 7),
    "duplicated": duplicated_states(),
    "far from the origin": draw(300, 4).double() * 1e-3 + 1e4,
    "one outlier": torch.cat([draw(300, 3), torch.full((1, 3), 1e8)]),
    "sorted": torch.linspace(0, 1, 500).unsqueeze(-1) ** 2,
    "few": draw(6, 2),
}


@pytest.mark.parametrize("options", [{}, {"include_self": True}, {"normalize": True}, {"unbiased": False}], ids=str)
@pytest.mark.parametrize("states", CASES.values(), ids=CASES)
def test_neighbours_are_those_of_a_brute_force_search(states, options):
    states = torch.cat([states, torch.ones(len(states), 1)], dim=1)  # a constant column must not divide by zero
    actions = draw(len(states), 3, seed=3)
    expected = brute_force(states, actions, 5, **options)
    for chunk_size in (7, 50, 4096):
        found = intrinsic_action_variance(states, actions, chunk_size=chunk_size, bootstrap=1, **options)
        torch.testing.assert_close(found.per_dimension, expected, rtol=1e-10, atol=0)


def test_near_neighbours_of_large_numbers_are_not_lost_to_rounding():
    # Two far clusters: centring cannot help, and float32 distances between rows of one cluster would all be noise.
    states = 1e-3 * draw(300, 3)
    states[150:] += 1e3
    actions = draw(300, 2, seed=3)
    found = intrinsic_action_variance(states, actions, bootstrap=1)
    torch.testing.assert_close(found.per_dimension, brute_force(states, actions, 5), rtol=1e-10, atol=0)


def test_of_any_number_of_equal_distances_some_are_taken_and_none_further():
    states = torch.randint(0, 3, (900, 2), generator=torch.Generator().manual_seed(4)).double()
    shift, scale = torch.zeros(2), torch.ones(2)
    rows = torch.arange(900)
    found = _nearest(
        states, rows, k=150, include_self=False, shift=shift.double(), scale=scale.double(), chunk_size=128
    )
    distances = (states[found] - states[:, None]).square().sum(-1)
    every = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist").square().round()
    every.fill_diagonal_(torch.inf)
    assert torch.equal(distances, every.sort(dim=1).values[:, :150])
    assert not (found == rows[:, None]).any()
    assert all(len(row.unique()) == 150 for row in found)


def test_a_state_is_left_out_by_its_row_and_its_duplicate_counts():
    # Pairs of equal states, far from one another: with k=2 the duplicate is a neighbour, the state itself only on request.
    states = torch.arange(4.0).repeat_interleave(2).unsqueeze(-1) ** 2 * 10
    actions = torch.tensor([0.0, 0.2] * 4).unsqueeze(-1)
    counted = intrinsic_action_variance(states, actions, k=2, include_self=True)
    assert counted.mean == pytest.approx(0.02), "the pair 0.0, 0.2"
    left_out = intrinsic_action_variance(states, actions, k=2)
    torch.testing.assert_close(left_out.per_dimension, brute_force(states, actions, 2))
    assert left_out.mean < counted.mean, (
        "for rows with action 0.0 the duplicate is 0.2 and the next row's is 0.0 or 0.2"
    )


def test_with_equal_states_everywhere_including_self_changes_nothing_but_the_draw():
    states, actions = torch.zeros(400, 2), draw(400, 1, seed=3)
    for include_self in (False, True):
        assert intrinsic_action_variance(states, actions, k=300, include_self=include_self).mean == pytest.approx(
            1, rel=0.2
        )


def test_dividing_by_k_is_the_unbiased_value_times_k_minus_one_over_k():
    states, actions = draw(100, 2), draw(100, 2, seed=3)
    unbiased, biased = (intrinsic_action_variance(states, actions, unbiased=flag).mean for flag in (True, False))
    assert biased == pytest.approx(0.8 * unbiased)


def test_normalising_undoes_a_rescaled_observation():
    states, actions = draw(300, 3), draw(300, 2, seed=3)
    rescaled = states * torch.tensor([1.0, 1000.0, 0.01])
    plain, undone = (intrinsic_action_variance(s, actions, normalize=True).mean for s in (states, rescaled))
    assert undone == pytest.approx(plain, rel=1e-12)
    assert intrinsic_action_variance(rescaled, actions).mean != pytest.approx(plain, rel=1e-3)


def test_a_seed_fixes_states_and_interval_and_the_global_generators_are_untouched():
    states, actions = draw(500, 2), draw(500, 2, seed=3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = (intrinsic_action_variance(states, actions, queries=50, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
    assert (first.mean, first.interval) == (again.mean, again.interval)
    assert first.mean != other.mean
    assert (first.queries, first.transitions, first.seed) == (50, 500, 3)


def test_the_interval_holds_the_mean_and_narrows_with_the_root_of_the_states():
    states, actions = draw(4000, 2), draw(4000, 2, seed=3)
    few, many = (intrinsic_action_variance(states, actions, queries=queries) for queries in (200, 3200))
    assert all(result.interval[0] < result.mean < result.interval[1] for result in (few, many))
    width = [result.interval[1] - result.interval[0] for result in (few, many)]
    assert 3 < width[0] / width[1] < 5.3


def test_arrays_and_half_precision_give_what_tensors_give_and_inputs_stay_unchanged():
    states, actions = draw(100, 2).half(), draw(100, 2, seed=3)
    kept = states.clone()
    expected = intrinsic_action_variance(states, actions, normalize=True).mean
    array = states.numpy()
    array.flags.writeable = False
    assert intrinsic_action_variance(array, actions.numpy(), normalize=True).mean == expected
    assert intrinsic_action_variance(array.astype(">f2"), actions.numpy(), normalize=True).mean == expected
    assert torch.equal(states, kept)


def test_progress_sees_every_block():
    seen = []

    def progress(blocks, total):
        for block in blocks:
            seen.append((len(block), total))
            yield block

    intrinsic_action_variance(draw(600, 2), draw(600, 2), progress=progress)
    assert seen == [(256, 3), (256, 3), (88, 3)]


def test_the_number_of_torch_threads_changes_nothing_and_is_put_back():
    before = torch.get_num_threads()
    try:
        means = set()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            means.add(intrinsic_action_variance(draw(900, 2), draw(900, 2, seed=3)).mean)
            assert torch.get_num_threads() == threads
            with pytest.raises(ZeroDivisionError):
                intrinsic_action_variance(
                    draw(900, 2), draw(900, 2), progress=lambda blocks, _: [1 / 0 for _ in blocks]
                )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(means) == 1


def broken(values, row, value):
    values = values.clone()
    values[row, 0] = value
    return values


GOOD = {"observations": draw(20, 3), "actions": draw(20, 2, seed=3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": broken(draw(20, 3), 7, torch.nan)}, "observations have a NaN or infinite value in row 7"),
        ({"actions": broken(draw(20, 2), 3, torch.inf)}, "actions have a NaN or infinite value in row 3"),
        ({"observations": draw(5, 3), "actions": draw(5, 2)}, "5 transitions are too few for k=5"),
        ({"observations": draw(0, 3), "actions": draw(0, 2)}, "0 transitions are too few"),
        ({"actions": draw(19, 2)}, "observations have 20 rows, actions 19"),
        ({"actions": draw(20)}, r"actions have shape \(20,\)"),
        ({"observations": draw(20, 0)}, r"observations have shape \(20, 0\)"),
        ({"observations": draw(20, 4, 4, 3)}, r"observations have shape \(20, 4, 4, 3\)"),
        ({"actions": torch.ones(20, 2, dtype=torch.int64)}, "actions have type int64, expected floating point"),
        ({"actions": np.ones((20, 2), dtype=np.int32)}, "actions have type int32, expected floating point"),
        ({"observations": np.full((20, 2), None)}, "observations have type object"),
        ({"observations": [[0.0]] * 20}, "observations are a list"),
        ({"k": 1}, "k must be at least 2"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"bootstrap": 0}, "bootstrap must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "below 2"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        intrinsic_action_variance(**{**GOOD, **changes})
    assert "\n" not in str(error.value)


def test_suggestions_follow_the_papers_rule():
    variance = intrinsic_action_variance(**GOOD)
    assert isinstance(variance, ActionVariance)
    assert suggest_target_divergence(variance, domain="manipulation") == pytest.approx(0.1 * variance.mean)
    assert suggest_target_divergence(variance, domain="navigation") == variance.mean
    assert suggest_target_divergence(0.013, domain="manipulation") == pytest.approx(0.0013)
    assert suggest_target_divergence(variance, domain="d4rl") == 1e-3
    with pytest.raises(
        InputError, match="unknown domain 'cooking'; the paper's rule knows manipulation, navigation, d4rl"
    ):
        suggest_target_divergence(variance, domain="cooking")


def test_every_task_has_a_domain_of_the_rule():
    assert {get_task(name).domain for name in ogbench_task_names()} == {"manipulation", "navigation"}
    assert get_task("antsoccer-arena-navigate-singletask-v0").domain == "navigation"
    assert get_task("puzzle-3x3-play-singletask-v0").domain == "manipulation"


def test_the_papers_values_are_copied_and_agree_with_the_tasks():
    text = resources.files("deflow_torchrl.data").joinpath("action_variance.json").read_text()
    assert json.loads(text)["comment"].startswith("Copied from the paper")
    values = paper_values()
    assert values["action_variance"] == {
        "cube-double": 0.013, "antmaze-large": 0.018, "puzzle-3x3": 0.007, "antsoccer": 0.026,
    }  # fmt: skip
    deltas = values["target_divergence"]
    tasks = [get_task(name) for name in ogbench_task_names()]
    for family, delta in deltas.items():
        matching = {task.target_divergence for task in tasks if task.in_paper and task.name.startswith(f"{family}-")}
        assert matching == ({delta} if not family.startswith(("D4RL", "visual")) else set()), family


def test_deltas_are_those_of_the_papers_table_6():
    table = os.environ.get("DEFLOW_TEST_DATA")
    path = Path(table or "").parent / "spec" / "tables" / "table6_hyperparameters.csv"
    if not table or not path.is_file():
        pytest.skip("DEFLOW_TEST_DATA does not lie beside the paper's tables")
    deltas = paper_values()["target_divergence"]
    first = {
        "D4RL antmaze": "antmaze-umaze-v2", "D4RL pen": "pen-human-v1", "D4RL door/hammer/relocate": "door-human-v1",
        "visual cube/scene": "visual-cube-single", "visual puzzle": "visual-puzzle-3x3",
    }  # fmt: skip
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for family, delta in deltas.items():
        start, d4rl = first.get(family, f"{family}-"), family.startswith("D4RL")
        of_family = [r for r in rows if r["task"].startswith(start) and r["benchmark"].startswith("d4rl") == d4rl]
        matching = {float(row["deflow_delta_paper"]) for row in of_family}
        assert matching == {delta}, family


def test_states_that_single_precision_cannot_tell_apart_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    # 40 places a thousand apart, 50 states within a millimetre of each.
    places = 1000 * torch.arange(40.0, dtype=torch.float64).repeat_interleave(50)
    states = torch.stack([places, torch.zeros_like(places)], 1)
    states += 1e-3 * torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    actions = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    found = intrinsic_action_variance(states, actions, k=5, queries=2000, chunk_size=512)
    distances = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    expected = actions[distances.topk(5, largest=False).indices].var(dim=1).mean(0)
    torch.testing.assert_close(found.per_dimension, expected)
