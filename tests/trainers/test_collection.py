import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensordict.nn import TensorDictModule

pytest.importorskip("gymnasium", reason="needs the extra ogbench")

from deflow_torchrl.errors import CollectorError, EnvironmentFaultError, InputError, RestoreError
from deflow_torchrl.trainers import OnlineExperience, OnlineStep
from deflow_torchrl.trainers.collectors import LocalSource
from tests.support.networks import make_actor
from tests.support.simulators import EPISODE_STEPS, simulator

POINT = simulator("Point")


class Rows:
    """Keeps every transition, numbered as a buffer would."""

    def __init__(self):
        self.rows, self.discarded = [], []

    def add(self, transition):
        self.rows.append(transition.clone())
        return torch.tensor([len(self.rows) - 1])

    def discard(self, index):
        self.discarded += index.tolist()


def make_policy():
    torch.manual_seed(0)
    return make_actor(2, 2)


def make(rows, policy=None, task=POINT, **kwargs):
    return OnlineExperience(
        task, policy or make_policy(), **{"seed": 3, "add": rows.add, "discard": rows.discard} | kwargs
    )


def learn(policy, step):
    """Every step's own change of the weights."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.0 + 2e-2 * ((step % 5) - 2))


def act(experience, steps, first=0):
    outcomes = []
    for step in range(first, first + steps):
        learn(experience.policy, step)
        outcomes.append(experience.step())
    return outcomes


def through_a_file(state):
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert (one == other).all()


def uninterrupted(steps, **kwargs):
    rows = Rows()
    experience = make(rows, **kwargs)
    outcomes = act(experience, steps)
    counters = dict(experience.counters)
    experience.close()
    return rows, outcomes, counters


@pytest.mark.parametrize("steps_per_collection", [1, 8])
@pytest.mark.parametrize("task", [POINT, simulator("PointSometimesRaise")])
def test_a_restored_experience_goes_on_bit_for_bit(task, steps_per_collection):
    settings = {"task": task, "steps_per_collection": steps_per_collection, "max_fault_share": 1.0}
    expected, outcomes, counters = uninterrupted(60, **settings)
    for saved_at in (0, 3, 10, 27, 59):
        rows = Rows()
        first = make(rows, **settings)
        done = act(first, saved_at)
        state = through_a_file(first.state_dict())
        first.close()
        second = make(rows, policy=first.policy, **settings)
        second.load_state_dict(state)
        done += act(second, 60 - saved_at, first=saved_at)
        second.close()
        assert_same(rows.rows, expected.rows)
        assert rows.discarded == expected.discarded
        assert done == outcomes
        assert second.counters == counters


def test_saving_changes_nothing():
    expected, _, _ = uninterrupted(30)
    rows = Rows()
    experience = make(rows)
    for step in range(30):
        act(experience, 1, first=step)
        experience.state_dict()
    experience.close()
    assert_same(rows.rows, expected.rows)


def test_transitions_are_ted_and_reproducible_from_the_seed():
    rows, outcomes, _ = uninterrupted(2 * EPISODE_STEPS)
    assert_same(rows.rows, uninterrupted(2 * EPISODE_STEPS)[0].rows)
    assert not (uninterrupted(1, seed=4)[0].rows[0] == rows.rows[0]).all()
    for number, (row, following) in enumerate(zip(rows.rows, rows.rows[1:], strict=False)):
        assert set(row.keys(True, True)) == {
            "observation",
            "action",
            ("next", "observation"),
            ("next", "reward"),
            ("next", "terminated"),
            ("next", "truncated"),
            ("next", "done"),
        }
        assert row.batch_size == (1,)
        assert row["next", "reward"].shape == row["next", "done"].shape == (1, 1)
        assert {value.dtype for value in row.values(True, True)} == {torch.float32, torch.bool}
        last = number % EPISODE_STEPS == EPISODE_STEPS - 1
        assert row["next", "truncated"].item() is row["next", "done"].item() is last
        assert torch.equal(row["next", "observation"], following["observation"]) is not last
    ends = [outcome for outcome in outcomes if outcome.length is not None]
    assert len(ends) == 2
    assert ends[0] is outcomes[EPISODE_STEPS - 1]
    total = sum(row["next", "reward"].item() for row in rows.rows[:EPISODE_STEPS])
    success = rows.rows[EPISODE_STEPS - 1]["next", "reward"].item() > -0.5
    assert ends[0] == OnlineStep(episode_return=pytest.approx(total), length=EPISODE_STEPS, success=success)


def test_every_step_acts_with_the_live_weights():
    seen = []
    policy = make_policy()
    weight = next(policy.parameters())
    policy.register_forward_hook(lambda *_: seen.append(weight.flatten()[0].item()))
    experience = make(Rows(), policy=policy)
    expected = []
    for step in range(12):
        learn(policy, step)
        expected.append(weight.flatten()[0].item())
        experience.step()
    experience.close()
    assert isinstance(experience.policy, type(policy))
    assert seen[-12:] == expected
    assert len(set(expected)) > 3


def test_a_faulty_episode_is_taken_back_and_counted_and_said_once(caplog):
    rows = Rows()
    experience = make(rows, task=simulator("PointSometimesRaise"), max_fault_share=0.9)
    with caplog.at_level(logging.WARNING):
        outcomes = act(experience, 200)
    experience.close()
    faults = [number for number, outcome in enumerate(outcomes) if outcome.fault]
    ends = [number for number, outcome in enumerate(outcomes) if outcome.length is not None]
    assert len(faults) > 3
    assert experience.counters == {
        "episodes": len(faults) + len(ends),
        "faults": len(faults),
        "worker_restarts": 0,
        "env_steps": 200,
    }
    assert len(rows.rows) == 200 - len(faults), "the step that failed adds no transition"
    # Before each fault, four good transitions of the same episode; the rows of good episodes stay.
    expected = []
    for order, fault in enumerate(faults):
        expected += range(fault - 4 - order, fault - order)
    assert rows.discarded == expected
    assert len(caplog.records) == 1
    assert "failed in step 5 of episode" in caplog.text
    assert "the simulator broke at" in caplog.text


def test_too_many_faulty_episodes_stop_the_run_but_not_an_early_one():
    experience = make(Rows(), task=simulator("PointSometimesRaise"), max_fault_share=0.05)
    with pytest.raises(
        EnvironmentFaultError, match=r"of 2\d episodes .* failed .*simulator broke.*max_fault_share=0\.05"
    ):
        act(experience, 1000)
    assert experience.counters["faults"] > 2
    experience.close()


@pytest.mark.parametrize("fault", ["Reset", "Nan"])
def test_an_environment_that_never_works_stops_the_run(fault):
    experience = make(Rows(), task=simulator(f"PointAlways{fault}"), max_fault_share=1.0)
    if fault == "Nan":  # it has its four good steps each time
        assert sum(outcome.fault for outcome in act(experience, 100)) == 20
    else:
        with pytest.raises(EnvironmentFaultError, match=r"10 episodes .* in a row .* does not start"):
            act(experience, 1000)
    experience.close()


def test_resets_that_fail_now_and_then_do_not_stop_the_run():
    experience = make(Rows(), task=simulator("PointSometimesReset"), max_fault_share=0.9)
    while experience.counters["faults"] < 15:
        experience.step()
    assert experience.counters["episodes"] > 30
    experience.close()


def test_rows_given_to_another_transition_are_not_taken_back():
    # A buffer of three rows: of an episode's first four transitions, the first one's row is the fourth's by then.
    taken, discarded = [], []

    def add(transition):
        taken.append(len(taken) % 3)
        return torch.tensor([taken[-1]])

    experience = OnlineExperience(
        simulator("PointAlwaysRaise"), make_policy(), seed=0, add=add, discard=discarded.append
    )
    act(experience, 5)
    experience.close()
    assert [index.tolist() for index in discarded] == [[1, 2, 0]]


def test_an_episode_that_cannot_be_restored_exactly_is_refused():
    experience = make(Rows())
    act(experience, 15)
    state = experience.state_dict()
    experience.close()
    state["simulators"][0]["observation"] += 1e-6
    other = make(Rows())
    other.load_state_dict(state)
    with pytest.raises(RestoreError, match=r"episode 1 .* 5 actions"):
        other.step()
    other.close()


def test_where_an_environment_does_not_repeat_itself_checkpoints_fall_on_episode_ends(caplog):
    experience = make(Rows(), task=simulator("PointUnsteady"))
    restorable = []
    for _ in range(2 * EPISODE_STEPS):
        experience.step()
        restorable.append(experience.restorable)
    assert restorable == 2 * ([False] * (EPISODE_STEPS - 1) + [True])
    act(experience, 3)
    state = experience.state_dict()
    experience.close()
    # All the same, a checkpoint from the middle of an episode costs that episode's rest and no more.
    other = make(Rows(), task=simulator("PointUnsteady"))
    other.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        outcomes = act(other, EPISODE_STEPS)
    other.close()
    assert outcomes[-1].length == EPISODE_STEPS
    assert "episode 2, 3 steps old, cannot be restored" in caplog.text


def test_a_policy_that_draws_its_own_noise_is_reproducible_and_leaves_the_global_generator_alone():
    def policy():
        return TensorDictModule(lambda s: torch.rand(*s.shape[:-1], 2), in_keys=["observation"], out_keys=["action"])

    torch.manual_seed(5)
    first = uninterrupted(12, policy=policy())[0]
    left = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), left)
    assert_same(first.rows, uninterrupted(12, policy=policy())[0].rows)
    assert not torch.equal(first.rows[0]["action"], first.rows[1]["action"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workers": -1}, "collector_workers=-1"),
        ({"workers": 2, "steps_per_collection": 3}, "multiple"),
        ({"steps_per_collection": 0}, "multiple"),
        ({"max_fault_share": 1.5}, "between 0 and 1"),
        ({"task": "gym:NoSuch-v0"}, "NoSuch"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        make(Rows(), **settings)


def test_a_state_of_another_run_is_refused():
    state = make(Rows()).state_dict()
    with pytest.raises(InputError, match="seed=3, this run has 4"):
        make(Rows(), seed=4).load_state_dict(state)


def test_closing_twice_does_no_harm():
    experience = make(Rows())
    experience.step()
    experience.close()
    experience.close()


# With worker processes. Each takes seconds to start, so a test uses it for all it can tell.

TWO = {"workers": 2, "steps_per_collection": 8, "task": simulator("PointSometimesRaise"), "max_fault_share": 1.0}


@pytest.fixture(scope="module")
def by_two_workers():
    return uninterrupted(60, **TWO)


def processes():
    return multiprocessing.active_children()


def test_workers_act_with_weights_of_a_fixed_age_and_leave_nothing_behind(by_two_workers):
    expected, outcomes, _ = by_two_workers
    assert processes() == []
    # The same by hand: a collector in this process for each worker, with the weights of the defined moments. Chunk k is
    # collected with those of the moment when chunk k - 1 began to be delivered, the first two with those of the first step.
    import functools

    from deflow_torchrl.envs import EpisodeStart, make_online_env

    policy = make_policy()
    sources = [
        LocalSource(
            functools.partial(
                make_online_env, TWO["task"], seed=3, stride=2, start=EpisodeStart(w, torch.zeros(0, 2).numpy())
            ),
            policy, torch.device("cpu"), 4,
        )
        for w in range(2)
    ]  # fmt: skip
    learn(policy, 0)
    rows = []
    for chunk in range(8):
        if chunk > 1:
            for step in range(8 * (chunk - 2) + 1, 8 * (chunk - 1) + 1):
                learn(policy, step)
        collected = [source.finish() for source in sources]
        rows += [collected[w][t] for t in range(4) for w in range(2)]
    for source in sources:
        source.close()
    good = [row for row in rows[:60] if not row["next", "fault"]]
    assert len(good) == len(expected.rows)
    for row, delivered in zip(good, expected.rows, strict=True):
        torch.testing.assert_close(row["action"], delivered["action"][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(row["next", "observation"], delivered["next", "observation"][0], rtol=0, atol=1e-5)
    assert [outcome.fault for outcome in outcomes] == [bool(row["next", "fault"]) for row in rows[:60]]


def test_workers_are_restored_bit_for_bit_with_what_they_had_collected(by_two_workers):
    expected, outcomes, counters = by_two_workers
    rows, policy, done, state = Rows(), make_policy(), [], None
    for stop in (11, 24, 60):  # within a chunk, and between two
        experience = make(rows, policy=policy, **TWO)
        if state is not None:
            experience.load_state_dict(state)
        done += act(experience, stop - len(done), first=len(done))
        state = through_a_file(experience.state_dict())
        assert state["ahead"] is not None
        experience.close()
    assert_same(rows.rows, expected.rows)
    assert rows.discarded == expected.discarded
    assert done == outcomes
    assert experience.counters == counters
    assert processes() == []


def test_a_killed_worker_is_started_anew_and_nothing_is_lost_or_doubled(by_two_workers, caplog):
    expected, outcomes, counters = by_two_workers
    rows, threads = Rows(), torch.get_num_threads()
    experience = make(rows, **TWO)
    done = act(experience, 20)
    victims = processes()
    assert len(victims) == 2
    os.kill(victims[0].pid, signal.SIGINT)
    time.sleep(0.5)
    assert victims[0].is_alive(), "Ctrl-C is the parent's"
    os.kill(victims[1].pid, signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        done += act(experience, 40, first=20)
    assert torch.get_num_threads() == threads
    experience.close()
    assert torch.get_num_threads() == threads
    assert_same(rows.rows, expected.rows)
    assert rows.discarded == expected.discarded
    assert done == outcomes
    assert experience.counters == {**counters, "worker_restarts": 1}
    assert "a collector worker died" in caplog.text
    assert "exit code -9" in caplog.text
    assert processes() == []


def test_workers_that_die_again_and_again_stop_the_run(monkeypatch):
    from deflow_torchrl.trainers import collection

    monkeypatch.setattr(collection, "RESTARTS", 1)
    experience = make(Rows(), task=simulator("PointAlwaysExit"), workers=1, steps_per_collection=8)
    with pytest.raises(CollectorError, match=r"died 2 times in a row.*exit code 7"):
        experience.step()
    assert experience.counters["worker_restarts"] == 1
    experience.close()
    assert processes() == []


SCRIPT = """
import multiprocessing, sys, time
import torch
from deflow_torchrl.trainers import OnlineExperience
from tests.trainers.test_collection import POINT, make_policy

if __name__ == "__main__":
    experience = OnlineExperience(
        POINT, make_policy(), seed=0, add=lambda transition: torch.tensor([0]), discard=print, workers=1
    )
    experience.step()
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[1] == "wait":
        time.sleep(600)
    raise RuntimeError("and nothing was closed")
"""


@pytest.mark.parametrize("end", ["wait", "raise"])
def test_workers_end_with_their_parent(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), end], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    try:
        (child,) = map(int, process.stdout.readline().split())
        if end == "wait":
            process.kill()
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    if end == "raise":
        assert process.returncode == 1
        assert said.endswith("RuntimeError: and nothing was closed\n")
    deadline = time.monotonic() + 60
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # an orphan's remains wait for whoever inherits them
