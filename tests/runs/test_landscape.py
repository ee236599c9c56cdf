"""Landscapes of actions: the numbers on samples whose answers are known, and real runs drawn."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("matplotlib", reason="needs the extra reports")

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data.dataset import make_folder
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.evaluate import load_run
from deflow_torchrl.runs.landscape import (
    critic_values,
    data_distances,
    dimension_slice,
    distances_to_data,
    draw_landscape,
    effective_modes,
    nearest_states,
    principal_slice,
    sample_actions,
)
from deflow_torchrl.sources.card import data_card, write_card
from deflow_torchrl.sources.files import import_files
from tests.support.command_line import assert_one_line, deflow
from tests.support.pendulum import ENVIRONMENT, record_pendulum

OBSERVATION_DIM, ACTION_DIM, TRANSITIONS = 3, 4, 40


def clusters(sizes, *, spread=1e-4, apart=1.9):
    """Clusters of ``sizes`` samples at corners of the square that are ``apart``."""
    rng = np.random.default_rng(0)
    corners = apart * (np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) - 0.5)
    return np.concatenate(
        [corner + spread * rng.standard_normal((size, 2)) for corner, size in zip(corners, sizes, strict=False)]
    )


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_effective_number_of_modes_counts_tight_clusters_of_equal_weight(number):
    assert effective_modes(clusters([50] * number), bandwidth=0.1) == pytest.approx(number, rel=1e-3)


def test_unequal_clusters_count_by_the_entropy_of_their_weights():
    weights = np.array([0.5, 0.25, 0.25])
    expected = math.exp(-(weights * np.log(weights)).sum())
    assert effective_modes(clusters([100, 50, 50]), bandwidth=0.1) == pytest.approx(expected, rel=1e-3)


def test_a_gaussian_counts_by_the_spectrum_of_its_kernel():
    # Density N(0, s^2), kernel exp(-d^2 / 2h^2): the eigenvalues are (1 - B) B^k, with a = 1 / 4s^2, b = 1 / 2h^2,
    # c = sqrt(a^2 + 2ab), B = b / (a + b + c) (Zhu et al. 1998; Rasmussen and Williams, Eq. 4.39); their entropy by hand.
    scale, bandwidth = 0.5, 0.2
    a, b = 1 / (4 * scale**2), 1 / (2 * bandwidth**2)
    ratio = b / (a + b + math.sqrt(a**2 + 2 * a * b))
    expected = math.exp(-math.log(1 - ratio) - ratio / (1 - ratio) * math.log(ratio))
    samples = scale * np.random.default_rng(0).standard_normal((1500, 1))
    assert effective_modes(samples, bandwidth=bandwidth) == pytest.approx(expected, rel=0.05)


def test_a_policy_that_averages_two_modes_has_one_that_lies_outside_the_data():
    data, average = clusters([32, 32], spread=0.02), np.tile([0.0, -0.95], (64, 1))
    far = distances_to_data(average, data)
    assert (far > np.quantile(data_distances(data), 0.95)).all()
    assert far == pytest.approx(0.95 / math.sqrt(2), abs=0.05)  # per dimension: the two clusters differ in one of two
    assert effective_modes(average) == pytest.approx(1.0)
    assert effective_modes(data) == pytest.approx(2.0, rel=0.05)


def test_distances_are_to_the_k_nearest_actions_and_the_datas_own_leave_themselves_out():
    data = np.array([[0.0], [0.1], [0.4], [1.0]])
    assert distances_to_data(np.array([[0.0]]), data, k=2) == pytest.approx([0.05])
    assert data_distances(data, k=2) == pytest.approx([0.25, 0.2, 0.35, 0.75])
    assert data_distances(data, k=9) == pytest.approx([0.5, 1.3 / 3, 1.3 / 3, 2.5 / 3]), "all, where there are fewer"


def test_principal_directions_are_those_of_the_variance_whatever_the_order_of_the_samples():
    rng = np.random.default_rng(0)
    actions = rng.standard_normal((500, 4)) * [0.02, 0.3, 0.02, 0.1] + [0.0, 0.1, 0.2, 0.3]
    plane = principal_slice(actions)
    assert np.abs(plane.directions) == pytest.approx(np.array([[0, 1, 0, 0], [0, 0, 0, 1]]), abs=0.05)
    assert (plane.directions.max(1) > 0.9).all()
    assert 0.98 < plane.explained < 1
    assert principal_slice(actions[::-1]).directions == pytest.approx(plane.directions)
    there = rng.standard_normal((7, 2))
    assert plane.coordinates(plane.actions(there)) == pytest.approx(there)
    assert plane.coordinates(actions).mean(0) == pytest.approx(np.zeros(2), abs=1e-12)


def test_a_slice_of_two_dimensions_has_the_actions_own_values_for_coordinates():
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 4))
    plane = dimension_slice(actions, (3, 1))
    assert plane.coordinates(actions) == pytest.approx(actions[:, [3, 1]])
    assert plane.actions(np.zeros((1, 2)))[0, [0, 2]] == pytest.approx(actions.mean(0)[[0, 2]])
    for dims in ((1, 1), (0, 4)):
        with pytest.raises(InputError, match="two different numbers from 0 to 3"):
            dimension_slice(actions, dims)


def test_the_nearest_states_begin_with_the_state_itself_even_among_copies():
    states = torch.tensor([[0.0], [5.0], [5.0], [6.0], [9.0]])
    assert nearest_states(states, 2, 3).tolist() == [2, 1, 3]
    assert len(nearest_states(states, 0, 99)) == 5


PROBLEM = ProblemSpec(OBSERVATION_DIM, ACTION_DIM, (8,), 0.99, "mean", 1e-3, torch.device("cpu"))


def learner():
    algorithm = get_algorithm("deflow")
    return algorithm.build(algorithm.config(), PROBLEM)


def test_q_is_the_mean_of_the_losss_critics():
    method, actions = learner(), torch.rand(6, ACTION_DIM)
    observation = torch.randn(OBSERVATION_DIM)
    values = critic_values(method, observation, actions)
    inputs = torch.cat([observation.expand(6, -1), actions], -1)
    networks = [method.loss.qvalue_network_params[member] for member in (0, 1)]
    by_hand = []
    for params in networks:
        with params.to_module(method.loss.qvalue_network), torch.no_grad():
            by_hand.append(method.loss.qvalue_network(observation=inputs[:, :3], action=inputs[:, 3:]))
    assert torch.allclose(values, torch.stack(by_hand).mean(0).squeeze(-1))
    assert not torch.allclose(by_hand[0], by_hand[1])


def test_samples_depend_on_the_seed_alone_and_leave_the_generator_alone():
    method, observation = learner(), torch.randn(OBSERVATION_DIM)
    before = torch.random.get_rng_state()
    first, again, other = (
        sample_actions(method, observation, 5, action_dim=ACTION_DIM, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.keys() == {"policy", "base"}
    assert all(torch.equal(first[role], again[role]) for role in first)
    assert not torch.equal(first["base"], other["base"])
    shifted = method.policy.refinement_policy.module(observation.expand(5, -1), first["base"])[1]
    assert torch.allclose(first["policy"], shifted), "the policy's actions are these very base actions, refined"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on data whose actions have two modes at every state."""
    folder, rng = tmp_path_factory.mktemp("landscape"), np.random.default_rng(0)
    modes = rng.choice([-0.7, 0.7], (TRANSITIONS, 1)) + 0.02 * rng.standard_normal((TRANSITIONS, ACTION_DIM))
    ends = np.zeros(TRANSITIONS, bool)
    ends[-1] = True
    observations = 0.01 * rng.standard_normal((TRANSITIONS + 1, OBSERVATION_DIM))
    np.savez(
        folder / "modes.npz", observations=observations[:-1], next_observations=observations[1:], actions=modes,
        rewards=np.ones(TRANSITIONS), timeouts=ends, terminals=np.zeros(TRANSITIONS, bool),
    )  # fmt: skip
    make_folder(
        folder / "modes",
        lambda into: import_files(folder / "modes.npz", folder=into),
        describe=lambda dataset, into: write_card(data_card(dataset, name="modes"), into),
    )
    for seed in (0, 1):
        train(folder, f"task=file:{folder / 'modes'}", f"seed={seed}", f"out={folder / f'run{seed}'}")
    return folder


def train(folder, *settings):
    done = deflow(
        "train", "hidden_dims=[16]", "batch_size=8", "offline_steps=3", "eval_interval=0", "threads=1",
        "algo.flow_steps=3", *settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_landscape_is_drawn_and_measured_and_the_same_twice(runs, tmp_path):
    out = tmp_path / "new" / "figure.svg"
    arguments = ("landscape", str(runs / "run0"), str(runs / "run1"), "--state", "7", "--samples", "50", "--json")
    done = deflow(*arguments, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["file"] == str(out)
    samples = result["samples"]
    assert list(samples) == ["data", "base", "policy", "second"]
    assert [group["number"] for group in samples.values()] == [TRANSITIONS, 50, 50, 50]
    assert samples["data"]["effective_modes"] == pytest.approx(2, rel=0.1), "as the data were made"
    assert samples["data"]["outside_data"] <= 0.05
    assert samples["base"]["outside_data"] > 0.5, "three steps have taught the prior nothing"
    assert result["slice"]["kind"] == "principal"
    assert result["refinement_rms"] > 0

    drawn = out.read_text(encoding="utf-8")
    for words in ("state 7 of the data, step 3", "action units", "Q (mean of the critics)", "second run (deflow)"):
        assert words in drawn
    assert deflow(*arguments, "--out", str(out)).stdout == done.stdout
    assert out.read_text(encoding="utf-8") == drawn
    other = json.loads(deflow(*arguments, "--out", str(out), "--seed", "1").stdout.splitlines()[-1])
    assert other["samples"]["base"]["mean_q"] != samples["base"]["mean_q"]


def test_the_numbers_are_those_of_the_runs_networks(runs, tmp_path):
    result = draw_landscape(runs / "run0", state=3, dims=(2, 0), samples=20, neighbours=5, out=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert result["second"] is None
    assert result["neighbours"] == 5
    assert result["slice"]["dims"] == [2, 0]
    loaded = load_run(runs / "run0", device="cpu")
    with np.load(runs / "modes.npz") as arrays:
        observation = torch.from_numpy(arrays["observations"][3].astype(np.float32))
    drawn = sample_actions(loaded.learner, observation, 20, action_dim=ACTION_DIM, seed=0)
    for role in ("base", "policy"):
        mean = critic_values(loaded.learner, observation, drawn[role]).mean()
        assert result["samples"][role]["mean_q"] == pytest.approx(float(mean))
    shift = (drawn["policy"] - drawn["base"]).square().mean().sqrt()
    assert result["refinement_rms"] == pytest.approx(float(shift), rel=1e-5)


def test_what_cannot_be_drawn_is_refused_in_one_line_and_leaves_nothing(runs, tmp_path):
    run, out = str(runs / "run0"), str(tmp_path / "figure.png")
    for arguments, said in (
        (
            (run, "--state", str(TRANSITIONS)),
            f"state {TRANSITIONS} is out of range; the data has {TRANSITIONS} transitions",
        ),
        ((run, "--state", "-1"), "state -1 is out of range"),
        ((str(tmp_path / "nothing"), "--state", "0"), "is not a run folder"),
        ((run, str(tmp_path / "nothing"), "--state", "0"), "is not a run folder"),
        ((run, "--state", "0", "--dims", "0,9"), "expected two different numbers from 0 to 3"),
        ((run, "--state", "0", "--dims", "0"), "write two action dimensions, for example 0,1"),
        ((run, "--state", "0", "--dims", "0,1", "--principal"), "not both"),
    ):
        assert_one_line(deflow("landscape", *arguments, "--out", out), said)
    assert_one_line(deflow("landscape", run, "--state", "0", "--out", str(tmp_path / "figure.bmp")), ".png or .svg")
    assert_one_line(deflow("landscape", run, "--state", "0", "--out", "/proc/nowhere/figure.png"), "/proc/nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(runs / "run0", copy)
    shutil.rmtree(copy / "checkpoints")
    assert_one_line(deflow("landscape", str(copy), "--state", "0"), "has no checkpoint yet")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_one_action_dimension_and_another_task_are_refused(runs, tmp_path):
    train(tmp_path, f"task={record_pendulum(tmp_path, episodes=2)}", f"env={ENVIRONMENT}", f"out={tmp_path / 'pendulum'}",
          "eval_episodes=1", "eval_workers=1")  # fmt: skip
    assert_one_line(deflow("landscape", str(tmp_path / "pendulum"), "--state", "0"), "one dimension; a slice needs two")
    both = (str(runs / "run0"), str(tmp_path / "pendulum"))
    assert_one_line(deflow("landscape", *both, "--state", "0"), "only runs of one task share a landscape")


GIVEN = {  # what a method has no default for
    "fql": {"alpha": 10.0},
    "fbrac": {"alpha": 10.0},
    "fawac": {"temperature": 1.0},
    "iql": {"temperature": 1.0},
    "ifql": {"num_samples": 4},
    "rebrac": {"actor_bc_coef": 0.1, "critic_bc_coef": 0.1},
}


@pytest.mark.parametrize("name", ["fql", "fbrac", "fawac", "iql", "ifql", "rebrac", "bc", "flow_bc"])
def test_every_method_is_sampled_and_those_with_critics_have_a_landscape(name):
    algorithm = get_algorithm(name)
    method = algorithm.build(algorithm.config(**GIVEN.get(name, {})), PROBLEM)
    observation = torch.randn(OBSERVATION_DIM)
    drawn = sample_actions(method, observation, 6, action_dim=ACTION_DIM, seed=0)
    assert drawn["policy"].shape == (6, ACTION_DIM)
    assert torch.isfinite(drawn["policy"]).all()
    assert ("base" in drawn) == (method.prior is not None)
    if name in ("bc", "flow_bc"):
        with pytest.raises(InputError, match=f"{name} has no critics"):
            critic_values(method, observation, drawn["policy"])
    else:
        values = critic_values(method, observation, drawn["policy"])
        assert values.shape == (6,)
        assert (values.max() - values.min() < 1e-5) == (name in ("rebrac", "iql")), "two act without noise"
