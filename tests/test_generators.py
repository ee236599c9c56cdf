import torch

from deflow_torchrl.generators import generators_set_aside


def test_draws_in_a_block_leave_the_generator_outside_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with generators_set_aside():
        assert torch.equal(torch.rand(2), expected)
    with generators_set_aside(seed=1):
        drawn = torch.rand(2)
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), drawn)
