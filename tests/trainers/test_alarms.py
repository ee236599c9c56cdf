"""Alarms on rows of real short trainings, and their rules at the edges."""

import json

import pytest

from deflow_torchrl.algorithms import get_algorithm
from deflow_torchrl.algorithms.alarms import AlarmRule
from deflow_torchrl.trainers import Alarms
from tests.support.updates import rows_of_training


def raised(rows, bound, *, gamma=0.9):
    alarms = Alarms(gamma=gamma, reward_bound=bound)
    new = [alarm for row in rows for alarm in alarms.check(row)]
    assert [(alarm.name, alarm.step) for alarm in new] == [(alarm.name, alarm.step) for alarm in alarms.raised]
    assert all("\n" not in alarm.message and "try" in alarm.message for alarm in new)
    return new


def test_a_healthy_training_raises_nothing():
    rows, bound = rows_of_training(250, lr=3e-3)
    ratios = [row["train/divergence_ratio"] for row in rows]
    assert ratios[0] > 4
    assert min(ratios) < 2, "brought to delta"
    assert raised(rows, bound) == []


def test_a_refinement_without_a_price_raises_saturation():
    rows, bound = rows_of_training(200, lr=3e-3, fixed_alpha=0.0)
    assert rows[-1]["train/saturation"] > 0.5
    (alarm,) = raised(rows, bound)
    assert (alarm.name, alarm.step) == ("saturation", 100)
    assert "10 delta for 10 rows" in alarm.message
    # Looked at once it is in the corners, that is what is said.
    in_corners = [row for row in rows if row["train/saturation"] > 0.5]
    assert "lie at a bound (0% of the data's)" in raised(in_corners, bound)[0].message


def test_an_absurd_learning_rate_raises_all_three():
    rows, bound = rows_of_training(100, lr=2.9, gamma=0.5, tau=0.5)
    found = {alarm.name: alarm for alarm in raised(rows, bound, gamma=0.5)}
    assert set(found) == {"alpha", "q", "saturation"}
    assert found["q"].step < found["saturation"].step
    assert "alpha rose to" in found["alpha"].message


def test_a_delta_out_of_reach_lets_alpha_fall_and_raises_alpha():
    rows, bound = rows_of_training(120, lr=0.1, target_divergence=1e4)
    (alarm,) = [alarm for alarm in raised(rows, bound) if alarm.name == "alpha"]
    assert rows[-1]["train/alpha"] < 1e-4
    assert "alpha fell to" in alarm.message


def test_a_price_that_rises_without_effect_raises_alpha():
    def keep_the_refinement_out(update):
        (group,) = update.optimizer.param_groups
        refinement = update.learner.loss.actor_network_params["module", "1"]
        out = {id(parameter) for parameter in refinement.values(True, True)}
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in out]

    rows, bound = rows_of_training(120, lr=0.1, prepare=keep_the_refinement_out)
    assert rows[-1]["train/divergence_ratio"] > 2
    assert "does not yield" in next(alarm for alarm in raised(rows, bound) if alarm.name == "alpha").message


HEALTHY = {"alpha": 2.0, "divergence_ratio": 1.0, "saturation": 0.1, "saturation_data": 0.1, "q_base": 1.0}


def row(step, **values):
    return {"step": step, **{f"train/{name}": value for name, value in (HEALTHY | values).items()}}


def test_an_alarm_is_raised_once_until_it_has_cleared():
    alarms = Alarms(gamma=0.9, reward_bound=1.0)
    values = {10: 1.0, 20: 21.0, 30: -30.0, 40: 19.0, 50: 25.0, 60: 25.0}
    assert [step for step, value in values.items() if alarms.check(row(step, q_base=value))] == [20, 50]
    assert [(alarm.step, alarm.cleared) for alarm in alarms.raised] == [(20, 40), (50, None)]


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_resumed_run_raises_what_the_uninterrupted_one_raises(stop):
    rows = [
        row(step, divergence_ratio=20.0, alpha=3.0, q_base=30.0 if step in (4, 5) else 1.0) for step in range(1, 13)
    ]
    straight, before, after = (Alarms(gamma=0.9, reward_bound=1.0) for _ in range(3))
    expected = [alarm for row in rows for alarm in straight.check(row)]
    assert [(alarm.name, alarm.step) for alarm in expected] == [("q", 4), ("saturation", 10)]
    found = [alarm for row in rows[:stop] for alarm in before.check(row)]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    found += [alarm for row in rows[stop:] for alarm in after.check(row)]
    assert found == expected
    assert after.raised == straight.raised


def test_what_is_seen_online_widens_what_q_may_be():
    alarms = Alarms(gamma=0.9, reward_bound=1.0)
    alarms.see_reward(-5.0)
    alarms.see_reward(2.0)
    assert alarms.check(row(1, q_base=-99.0)) == []
    assert [alarm.name for alarm in alarms.check(row(2, q_base=101.0))] == ["q"]


def test_corners_that_are_the_datas_own_are_no_alarm():
    alarms = Alarms(gamma=0.9, reward_bound=1.0)
    rows = [row(step, saturation=0.9, saturation_data=0.8) for step in range(5)]
    assert not any(alarms.check(row) for row in rows)
    rows = [row(step, saturation=0.9, saturation_data=0.6) for step in range(5, 10)]
    assert [step for step, row in enumerate(rows, 5) if alarms.check(row)] == [7], "at the third row"


def test_a_divergence_on_its_way_down_while_alpha_rises_is_no_alarm():
    alarms = Alarms(gamma=0.9, reward_bound=1.0)
    # Where the refinement yields, D goes with 1 / alpha^2.
    rows = [row(step, alpha=1.3**step, divergence_ratio=1e5 / 1.3 ** (2 * step)) for step in range(20)]
    assert rows[-1]["train/divergence_ratio"] > 2
    assert not any(alarms.check(row) for row in rows)


def test_rows_of_a_method_without_these_numbers_raise_nothing():
    alarms = Alarms(gamma=0.9, reward_bound=1.0)
    assert alarms.check({"step": 1, "train/loss_qvalue": 1e9, "eval/success": 0.0}) == []
    assert alarms.check(row(2, q_base=50.0)) != []
    assert alarms.check({"step": 3, "eval/success": 0.0}) == []
    assert alarms.raised[0].cleared is None, "a row that does not say neither raises nor clears"


def test_a_method_describes_its_own_alarms():
    def look(seen):
        rows, first = seen.above("loss", 1.0)
        return f"the loss rose from {first['loss']:g}; try less" if rows == 3 else "" if rows == 0 else None

    alarms = Alarms(gamma=0.9, reward_bound=1.0, rules=[AlarmRule("loss", ("loss",), look, watches=(("loss", 1.0),))])
    losses = [0.5, 2.0, 3.0, 4.0, 5.0, 0.5, 2.0]
    new = [alarm for step, loss in enumerate(losses) for alarm in alarms.check(row(step, loss=loss, q_base=1e9))]
    assert [(alarm.name, alarm.step, alarm.message) for alarm in new] == [
        ("loss", 3, "the loss rose from 2; try less"),
    ]  # fmt: skip
    assert alarms.raised[0].cleared == 5
    assert [rule.name for rule in get_algorithm("deflow").alarms] == ["alpha", "q", "saturation"]
    assert get_algorithm("fql").alarms == ()
