"""The random crop against a loop in NumPy, its draws, and what it leaves alone."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, TransformedEnv

from deflow_torchrl.data import RandomCrop

STATES = ("observation", ("next", "observation"))


def batch(*lead, size=(7, 5, 3), **more):
    def pictures():
        return torch.randint(0, 256, (*lead, *size), dtype=torch.uint8)

    return TensorDict(
        {"observation": pictures(), "action": torch.rand(*lead, 2), "next": {"observation": pictures()}, **more},
        batch_size=lead,
    )


def cropped_in_a_loop(pictures, offsets, padding):
    out = np.empty_like(pictures)
    for number, (row, column) in enumerate(offsets):
        padded = np.pad(pictures[number], ((padding, padding), (padding, padding), (0, 0)), mode="edge")
        height, width, _ = pictures[number].shape
        out[number] = padded[row : row + height, column : column + width]
    return out


@pytest.mark.parametrize("padding", [0, 1, 3, 9])
@pytest.mark.parametrize("size", [(7, 5, 3), (8, 8, 9), (1, 2, 1)], ids=str)
def test_given_offsets_cut_the_window_that_numpy_cuts_from_states_and_next_states(padding, size):
    torch.manual_seed(0)
    data = batch(6, size=size, crop_offset=torch.randint(0, 2 * padding + 1, (6, 2)))
    before = data.clone()
    out = RandomCrop(padding, 0.0)(data)
    for key in STATES:
        expected = cropped_in_a_loop(before[key].numpy(), data["crop_offset"].tolist(), padding)
        assert out[key].dtype == torch.uint8
        np.testing.assert_array_equal(out[key].numpy(), expected)
    assert torch.equal(out["action"], before["action"])


def test_the_middle_offset_is_the_identity_and_the_corner_repeats_the_corner_pixel():
    data = batch(2, crop_offset=torch.tensor([[3, 3], [0, 0]]))
    before = data.clone()
    out = RandomCrop()(data)["observation"]
    assert torch.equal(out[0], before["observation"][0])
    assert (out[1, :4, :4] == before["observation"][1, 0, 0]).all()


def test_one_coin_decides_for_a_batch_and_every_sample_has_an_offset_of_its_own():
    torch.manual_seed(0)
    crop, fell = RandomCrop(padding=3, probability=0.5), []
    for _ in range(60):
        # Every pixel is its own number, so that a crop shows its offset; the picture and its next state are the same.
        pixels = torch.arange(81, dtype=torch.uint8).reshape(9, 9, 1).expand(64, 9, 9, 1)
        data = TensorDict(observation=pixels, next=TensorDict(observation=pixels, batch_size=[64]), batch_size=[64])
        out = crop(data)
        assert torch.equal(out["observation"], out["next", "observation"])
        moved = (out["observation"] != pixels).flatten(1).any(1)
        middle = out["observation"][:, 4, 4, 0].long()
        offsets = torch.stack([middle // 9, middle % 9], 1) - 4 + 3
        fell.append(bool(moved.any()))
        if fell[-1]:
            assert moved.float().mean() > 0.8, "all of a batch or nothing; one offset in 49 is the identity"
            assert len(offsets.unique(dim=0)) > 20
            assert offsets.min() == 0
            assert offsets.max() == 6
        else:
            assert (offsets == 3).all()
    assert 15 < sum(fell) < 45


def test_the_coin_is_drawn_first_and_then_the_offsets():
    data = batch(6)
    before = data.clone()
    for seed in range(8):
        torch.manual_seed(seed)
        coin, offsets = torch.rand(()), torch.randint(0, 7, (6, 2))
        after = torch.rand(())
        torch.manual_seed(seed)
        out = RandomCrop()(before.clone())
        assert torch.rand(()) == after, "the generator moves on alike, whatever the coin says"
        expected = before["observation"].numpy()
        if coin < 0.5:
            expected = cropped_in_a_loop(expected, offsets.tolist(), 3)
        np.testing.assert_array_equal(out["observation"].numpy(), expected)


def test_of_several_batches_at_once_each_has_a_coin_of_its_own():
    torch.manual_seed(0)
    data = batch(40, 16)
    out = RandomCrop()(data.clone())
    moved = (out["observation"] != data["observation"]).flatten(2).any(2)
    assert {bool(row.any()) for row in moved} == {True, False}
    assert (moved.float().mean(1)[moved.any(1)] > 0.6).all()


def test_probabilities_of_zero_and_one_never_and_always_crop():
    data = batch(32)
    for probability, same in ((0.0, True), (1.0, False)):
        out = RandomCrop(probability=probability)(data.clone())
        assert torch.equal(out["observation"], data["observation"]) is same


def test_what_is_no_picture_stays_and_nothing_is_drawn_for_it():
    data = TensorDict(observation=torch.randn(4, 6), next=TensorDict(observation=torch.randn(4, 6)), batch_size=[4])
    state = torch.get_rng_state()
    out = RandomCrop(probability=1.0)(data.clone())
    assert (out == data).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_further_dimensions_and_other_keys():
    data = TensorDict(cameras={"front": batch(2, 3)["observation"]}, vector=torch.randn(2, 3, 5), batch_size=[2, 3])
    data["crop_offset"] = torch.randint(0, 3, (2, 3, 2))
    before = data.clone()
    out = RandomCrop(1, in_keys=[("cameras", "front"), "vector", "missing"])(data)
    expected = cropped_in_a_loop(
        before["cameras", "front"].flatten(0, 1).numpy(), data["crop_offset"].flatten(0, 1).tolist(), 1
    )
    np.testing.assert_array_equal(out["cameras", "front"].flatten(0, 1).numpy(), expected)
    assert torch.equal(out["vector"], before["vector"])


def test_a_replay_buffer_crops_what_it_samples_and_its_storage_stays():
    data = batch(20)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=8, transform=RandomCrop(probability=1.0))
    buffer.extend(data)
    torch.manual_seed(0)
    sample = buffer.sample()
    assert not torch.equal(sample["observation"], data["observation"][sample["index"]])
    assert torch.equal(buffer.storage[:]["observation"], data["observation"])


def test_an_environment_refuses_it():
    with pytest.raises(ValueError, match="transform of replay buffers"):
        TransformedEnv(GymEnv("Pendulum-v1"), RandomCrop()).reset()


@pytest.mark.parametrize(
    "offset",
    [torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 2), torch.full((4, 2), 7), torch.full((4, 2), -1)],
    ids=["shape", "type", "large", "small"],
)
def test_offsets_that_cannot_be_are_refused(offset):
    with pytest.raises(ValueError, match=r"crop_offset must be integers \[4, 2\] from 0 to 6"):
        RandomCrop()(batch(4, crop_offset=offset))


@pytest.mark.parametrize("arguments", [(-1, 0.5), (3, 1.5)])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="padding must not be negative"):
        RandomCrop(*arguments)
