"""The numbers of version 0.1.0 stay; ``tests/support/frozen.py`` says how they are derived and how to record them again."""

import pytest

from deflow_torchrl.algorithms import ALGORITHMS
from tests.support import frozen


def assert_close(found, stored, *, rtol, atol, where="value"):
    """Equal names, lengths and types; floats within the tolerance."""
    if isinstance(stored, dict):
        assert found.keys() == stored.keys(), where
        for name, value in stored.items():
            assert_close(found[name], value, rtol=rtol, atol=atol, where=f"{where}: {name}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for number, value in enumerate(stored):
            assert_close(found[number], value, rtol=rtol, atol=atol, where=f"{where}[{number}]")
    elif isinstance(stored, float):
        assert abs(found - stored) <= atol + rtol * abs(stored), f"{where}: {found!r}, stored {stored!r}"
    else:
        assert found == stored, where


def test_every_method_is_held():
    assert set(frozen.METHODS) <= set(ALGORITHMS)


@pytest.mark.parametrize(("case", "draws"), frozen.UPDATE_CASES, ids=str)
def test_twenty_updates_in_float64_give_the_stored_losses_and_weights(case, draws):
    stored = frozen.stored("updates")[frozen.case_name(case, draws)]
    assert_close(frozen.measure_updates(case, draws=draws), stored, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", frozen.METHODS)
def test_single_updates_in_float32_with_kernels_give_the_stored_losses_and_weights(method):
    found, stored = frozen.measure_single_updates(method), frozen.stored("single")[method]
    assert_close(found["losses"], stored["losses"], rtol=1e-5, atol=1e-6)
    # A parameter's dot product with a vector of N(0, 1) is of the size of its norm, which is near the root of its entries.
    assert_close(found["weights"], stored["weights"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", frozen.METHODS)
def test_masks_weights_reductions_terms_seeds_and_actions_give_the_stored_values(method):
    assert_close(frozen.measure_once(method), frozen.stored("once")[method], rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    for extra in ("hydra", "gymnasium", "ogbench", "matplotlib", "onnxruntime", "onnxscript"):
        pytest.importorskip(extra, reason="needs the extras cli, ogbench, reports and export")
    return frozen.measure_commands(tmp_path_factory.mktemp("commands"))


@pytest.mark.parametrize("run", frozen.stored("commands")["runs"])
def test_runs_log_the_stored_names_steps_phases_and_values(found, run):
    assert_close(found["runs"][run], frozen.stored("commands")["runs"][run], rtol=2e-5, atol=1e-6)


def test_a_killed_and_resumed_run_logs_what_the_uninterrupted_one_does(found):
    assert found["runs"]["killed"] == found["runs"]["frozen"]


def test_a_sweep_plans_the_stored_cells_and_jobs(found):
    assert found["plan"] == frozen.stored("commands")["plan"]


def test_a_report_has_the_stored_tables(found):
    assert found["report"] == frozen.stored("commands")["report"]


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_an_exported_policy_gives_the_stored_actions(found, format):
    assert_close(found["actions"][format], frozen.stored("commands")["actions"][format], rtol=1e-5, atol=1e-5)


def test_these_tests_can_fail():
    with pytest.raises(AssertionError, match="loss_flow"):
        assert_close([{"loss_flow": 1.0 + 1e-9}], [{"loss_flow": 1.0}], rtol=1e-10, atol=1e-10)
    with pytest.raises(AssertionError):
        assert_close({"a": 1, "b": 1}, {"a": 1}, rtol=1, atol=1)
