import pytest
import torch

from deflow_torchrl.algorithms import ALGORITHMS, DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.config import ALGORITHM_CONFIGS
from deflow_torchrl.errors import InputError, NonFiniteLossError
from deflow_torchrl.trainers import UpdateStep
from tests.conftest import ACTION_DIM, OBSERVATION_DIM, make_batch, total

PROBLEM = ProblemSpec(
    observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM, hidden_dims=(16, 16), gamma=0.9, q_aggregation="min",
    target_divergence=0.01, device=torch.device("cpu"),
)  # fmt: skip


def make_update(**settings):
    torch.manual_seed(0)
    return UpdateStep(get_algorithm("deflow").build(DeFlowConfig(**settings), PROBLEM))


def test_an_update_is_one_target_step_then_one_adam_step_on_the_sum():
    update = make_update(lr=1e-2, tau=0.1)
    torch.manual_seed(0)
    learner = get_algorithm("deflow").build(DeFlowConfig(lr=1e-2, tau=0.1), PROBLEM)
    optimizer = torch.optim.Adam(learner.loss.parameters(), lr=1e-2)
    for _ in range(3):
        batch = make_batch(16)
        update(batch.clone())
        optimizer.zero_grad()
        total(learner.loss(batch)).backward()
        learner.target_updater.step()
        optimizer.step()
    torch.testing.assert_close(dict(update.learner.loss.state_dict()), dict(learner.loss.state_dict()))
    assert update.step == 3


def test_settings_that_are_none_are_the_tasks():
    loss = make_update().learner.loss
    assert loss.q_aggregation == "min"
    assert loss.target_divergence.item() == pytest.approx(0.01)
    assert loss.value_estimator.gamma.item() == pytest.approx(0.9)
    other = make_update(q_aggregation="mean", target_divergence=0.5, gamma=0.5).learner.loss
    assert other.q_aggregation == "mean"
    assert other.target_divergence.item() == 0.5
    assert other.value_estimator.gamma.item() == 0.5


def test_every_parameter_is_in_the_optimiser_once():
    update = make_update()
    listed = [id(p) for group in update.optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in update.learner.loss.parameters() if p.requires_grad}


@pytest.mark.parametrize(("key", "term"), [(("next", "reward"), "loss_qvalue"), ("action", "loss_flow")])
def test_a_non_finite_loss_names_the_term_and_the_step(key, term):
    update = make_update()
    update(make_batch())
    bad = make_batch()
    bad[key][0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=rf"{term} became NaN or infinite at step 2"):
        update(bad)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        update.check_finite()


def test_state_restores_networks_targets_and_optimiser():
    batches = [make_batch(16) for _ in range(6)]
    straight, first, second = make_update(), make_update(), make_update()
    for batch in batches:
        straight(batch.clone())
    for batch in batches[:3]:
        first(batch.clone())
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second(batch.clone())
    torch.testing.assert_close(
        dict(second.learner.loss.state_dict()), dict(straight.learner.loss.state_dict()), rtol=0, atol=0
    )
    assert second.step == 6


def test_every_method_has_its_settings_in_the_schema_of_the_command_line():
    assert {name: algorithm.config for name, algorithm in ALGORITHMS.items()} == ALGORITHM_CONFIGS
    with pytest.raises(InputError, match="unknown method"):
        get_algorithm("nonsense")
