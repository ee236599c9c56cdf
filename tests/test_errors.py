import pickle

from deflow_torchrl.errors import MissingExtraError


def test_a_missing_extra_is_told_across_processes():
    error = MissingExtraError("h5py", "files")
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is MissingExtraError
    assert str(arrived) == str(error)
    assert "h5py is not installed" in str(arrived)
    assert "[files]" in str(arrived)
