"""Frame stacks against the authors' rule, written down once more in NumPy on two arrays of copies."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from deflow_torchrl.data import BaseActionBank, OfflineOnlineReplayBuffer, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.errors import InputError
from deflow_torchrl.modules import FlowMatchingPolicy, make_velocity_network
from tests.support.episodes import LENGTHS, build, episodes


def authors_stacks(parts, rows, k):
    """Observations and next observations of ``rows``, from arrays that hold both of every transition."""
    observations = np.concatenate([frames[:-1] for frames, *_ in parts])
    next_observations = np.concatenate([frames[1:] for frames, *_ in parts])
    terminals = np.concatenate([[0] * (len(actions) - 1) + [1] for _, actions, *_ in parts])
    stacks, next_stacks = [], []
    for row in rows:
        start = max([0, *(i + 1 for i in range(row) if terminals[i])])
        before = [observations[max(row - back, start)] for back in range(k - 1, -1, -1)]
        stacks.append(np.concatenate(before, axis=-1))
        next_stacks.append(np.concatenate([*before[1:], next_observations[row]], axis=-1))
    return np.stack(stacks), np.stack(next_stacks)


def assert_equals_authors(batch, parts, k=3):
    stacks, next_stacks = authors_stacks(parts, batch["index"].tolist(), k)
    np.testing.assert_array_equal(batch["observation"], stacks)
    np.testing.assert_array_equal(batch["next", "observation"], next_stacks)
    assert batch["observation"].dtype == torch.uint8


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_batch_equals_the_authors_bit_for_bit(k, mapped, tmp_path):
    parts = episodes(images=True)
    buffer = TransitionReplayBuffer(build(parts, tmp_path if mapped else None), batch_size=64, frame_stack=k)
    batch = buffer.sample()
    assert batch["observation"].shape == (64, 3, 3, k)
    assert_equals_authors(batch, parts, k)


def test_the_first_frame_stands_for_those_before_it_and_the_last_is_seen_as_next_only():
    dataset = build([(np.full((3, 2, 2, 1), 9, np.uint8) + np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1),
                      np.zeros((2, 2)), np.zeros(2), np.zeros(2, bool))] * 2).stacked(3)  # fmt: skip
    batch = dataset[:]
    assert batch["observation"][:, 0, 0].tolist() == [[9, 9, 9], [9, 9, 10]] * 2
    assert batch["next", "observation"][:, 0, 0].tolist() == [[9, 9, 10], [9, 10, 11]] * 2


def test_the_set_itself_can_be_stacked_and_keeps_each_frame_once(tmp_path):
    parts = episodes(images=True)
    dataset = build(parts).stacked(3)
    assert dataset.observation_shape == (3, 3, 3)
    assert dataset.observation.nbytes == (sum(LENGTHS) + len(LENGTHS)) * 9
    batch = dataset[:]
    batch["index"] = torch.arange(len(dataset))
    assert_equals_authors(batch, parts)
    torch.testing.assert_close(dataset.states(), batch["observation"])
    arrays = [np.concatenate([part[i] for part in parts]) for i in range(3)]
    ends = np.concatenate([np.eye(1, len(part[1]), len(part[1]) - 1)[0] for part in parts])
    with pytest.raises(InputError, match="frame_stack=0"):
        TransitionDataset.from_arrays(arrays[0][: len(ends)], *arrays[1:], ends, frame_stack=0)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_stacked_set_survives_copies_pickles_and_processes(mapped, tmp_path):
    dataset = build(episodes(images=True), tmp_path if mapped else None).stacked(3)
    if mapped:
        dataset.write_about(tmp_path)
    expected = dataset[:]["next", "observation"]
    saved = TransitionDataset.load(dataset.save(tmp_path / "saved"))
    for other in (saved, copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset)), dataset.to("cpu")):
        assert torch.equal(other[:]["next", "observation"], expected)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(_next_observations, (dataset,)), expected)


def _next_observations(dataset):
    return dataset[:]["next", "observation"].clone()


def test_chunks_have_the_stack_before_their_first_and_after_their_last_step():
    parts = episodes((6, 5), images=True)
    chunks = TransitionReplayBuffer(build(parts).chunked(3), frame_stack=3).dataset
    single = build(parts).stacked(3)[:]
    starts = chunks.starts(torch.arange(len(chunks)))
    assert torch.equal(chunks[:]["observation"], single["observation"][starts])
    assert torch.equal(chunks[:]["next", "observation"], single["next", "observation"][starts + 2])


@pytest.mark.parametrize("mode", ["uniform", "balanced"])
def test_a_union_buffer_samples_stacks(mode):
    parts = episodes(images=True)
    buffer = OfflineOnlineReplayBuffer(build(parts).stacked(3), online_capacity=8, mode=mode, batch_size=32)
    assert_equals_authors(buffer.sample(), parts)


def test_batches_of_several_seeds_are_stacked():
    dataset = build(episodes(images=True)).stacked(3)
    torch.manual_seed(0)
    drawn = dataset.draw(2, 16)
    assert drawn.shape == (2, 16)
    torch.manual_seed(0)
    rows = torch.randint(len(dataset), (2, 16))
    assert torch.equal(drawn["observation"], dataset[:]["observation"][rows])


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((4, 16, 16, 3), np.float32, "np.uint8"),
        ((4, 16, 16, 3), np.float64, "255 \\* x"),
        ((4, 3, 16, 16), np.uint8, r"\(4, 3, 16, 16\).*\(4, 16, 16, 3\)"),
        ((4, 3, 16, 16), np.float32, "must be uint8"),
    ],
)
def test_float_pictures_and_channels_before_pixels_are_refused_with_the_way_out(shape, dtype, said):
    pictures, ends = np.zeros(shape, dtype), np.array([0, 0, 0, 1])
    with pytest.raises(InputError, match=said):
        TransitionDataset.from_arrays(pictures, np.zeros((4, 2)), np.zeros(4), ends)
    batch = TransitionReplayBuffer(build(episodes()))[:4]
    batch["observation"] = batch["next", "observation"] = torch.from_numpy(pictures)
    with pytest.raises(InputError, match=said):
        OfflineOnlineReplayBuffer(batch, online_capacity=4)


def test_pictures_that_do_not_fit_into_memory_are_refused_with_their_size(monkeypatch, tmp_path):
    monkeypatch.setattr("deflow_torchrl.data.builder.free_memory", lambda: 100)
    with pytest.raises(InputError, match=r"15 pictures take 0.0 GB of memory, 0.0 GB are free; keep them in files"):
        build(episodes(images=True))
    build(episodes(images=True), tmp_path)
    build(episodes())


def test_several_observations_in_python_are_a_dictionary():
    rng = np.random.default_rng(0)
    front, joints = rng.integers(256, size=(6, 4, 4, 3), dtype=np.uint8), rng.normal(size=(6, 2))
    rest = (np.zeros((6, 1)), np.zeros(6), [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1])
    observations = {"joints": joints, "front": front}
    dataset = TransitionDataset.from_arrays(observations, *rest, frame_stack=2)
    row = dataset[:]
    np.testing.assert_array_equal(row["observation", "joints"], joints[[0, 1, 3, 4]].astype(np.float32))
    np.testing.assert_array_equal(row["observation", "front"][..., 3:], front[[0, 1, 3, 4]])
    np.testing.assert_array_equal(row["observation", "front"][..., :3], front[[0, 0, 3, 3]])
    np.testing.assert_array_equal(row["next", "observation", "front"][..., 3:], front[[1, 2, 4, 5]])
    for changes, said in (
        ({"joints": joints[:4]}, "differ in length"),
        ({"front": front.astype(np.float32)}, "must be uint8"),
        ({"joints": np.full((6, 2), np.nan)}, "observations 'joints' has a NaN"),
    ):
        with pytest.raises(InputError, match=said):
            TransitionDataset.from_arrays({**observations, **changes}, *rest)
    with pytest.raises(InputError, match="offline only"):
        OfflineOnlineReplayBuffer(dataset, online_capacity=4)


def test_a_bank_of_base_actions_reads_the_stacks_of_frames():
    """Base actions of one frame differ from those of its stack: the prior reads all three."""
    buffer = TransitionReplayBuffer(build(episodes()), batch_size=12, frame_stack=3)
    prior = FlowMatchingPolicy(make_velocity_network(6, 2, (16,)), 2, out_keys=("base_action",))
    bank = BaseActionBank(prior, buffer, num_actions=1)
    seen = []
    handle = prior.register_forward_pre_hook(lambda _, args: seen.append(args[0]["observation"]))
    bank.fill()
    handle.remove()
    frames = torch.cat(seen)
    assert torch.equal(frames[: len(buffer.dataset.observation)], buffer.dataset.observations(torch.arange(15)))
