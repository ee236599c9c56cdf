import copy
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.data import SamplerWithoutReplacement
from torchrl.envs.transforms import RewardScaling

from deflow_torchrl.data import TransitionBuilder, TransitionDataset, TransitionReplayBuffer
from deflow_torchrl.data import dataset as dataset_module
from deflow_torchrl.data.dataset import prepared
from deflow_torchrl.data.schema import ACTION_LIMIT
from deflow_torchrl.errors import InputError
from tests.support.episodes import LENGTHS, build, episodes


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_every_transition_is_put_together_from_the_episodes(images, mapped, tmp_path):
    parts = episodes(images=images)
    dataset = build(parts, tmp_path if mapped else None)
    td = dataset[:]
    assert len(dataset) == sum(LENGTHS)
    cast = (lambda x: x) if images else np.float32
    np.testing.assert_array_equal(td["observation"], cast(np.concatenate([s[:-1] for s, *_ in parts])))
    np.testing.assert_array_equal(td["next", "observation"], cast(np.concatenate([s[1:] for s, *_ in parts])))
    np.testing.assert_array_equal(td["action"], np.float32(np.concatenate([a for _, a, *_ in parts])))
    np.testing.assert_array_equal(td["next", "reward"][:, 0], np.float32(np.concatenate([r for *_, r, _ in parts])))
    assert td["observation"].dtype == (torch.uint8 if images else torch.float32)
    assert td["next", "reward"].dtype == torch.float32
    ends = [3, 4, 11]
    assert td["next", "done"].flatten().nonzero().flatten().tolist() == ends
    assert td["next", "terminated"].flatten().nonzero().flatten().tolist() == [4]
    assert td["next", "truncated"].flatten().nonzero().flatten().tolist() == [3, 11]


def test_observations_are_stored_once():
    dataset = build(episodes((1000,), images=True))
    assert dataset.observation.nbytes == 1001 * 9
    assert dataset.nbytes < 1001 * 9 + 1000 * (2 * 4 + 4 + 1) + 100


@pytest.mark.parametrize("stored", ["in memory", "mapped, positional reads", "mapped, no positional reads"])
@pytest.mark.parametrize(
    "index",
    [3, -1, slice(2, 9, 3), [0, 5, 11], range(3), torch.tensor([[0, 1], [11, -2]]), np.array([4, 4]),
     torch.arange(12) % 2 == 0, torch.zeros(12, dtype=torch.bool), (torch.tensor([1, 2]),)],
)  # fmt: skip
def test_any_index_gives_the_rows_of_the_whole(index, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "POSITIONAL_READS", stored.endswith(", positional reads"))
    dataset = build(episodes(), None if stored == "in memory" else tmp_path)
    whole = build(episodes())[:]
    key = index[0] if isinstance(index, tuple) else torch.tensor(index) if isinstance(index, range) else index
    torch.testing.assert_close(dataset[index].to_dict(), whole[key].to_dict())
    for outside in (99, -13, [0, 12]):
        with pytest.raises(IndexError):
            dataset[outside]


def test_a_buffer_samples_whole_transitions_with_any_sampler():
    dataset = build(episodes())
    rb = TransitionReplayBuffer(dataset, batch_size=12, sampler=SamplerWithoutReplacement())
    batch = rb.sample()
    assert sorted(batch["index"].tolist()) == list(range(12))
    assert torch.equal(batch["next", "observation"], dataset[:]["next", "observation"][batch["index"]])
    with pytest.raises(RuntimeError):
        rb.extend(dataset[:2])
    with pytest.raises(RuntimeError):
        rb.empty()


def test_what_is_done_to_a_sample_leaves_the_set_alone():
    dataset = build(episodes())
    before = dataset[:].clone()
    for index in (3, [3], slice(3, 5)):
        for value in dataset[index].values(include_nested=True, leaves_only=True):
            value.zero_()
    torch.testing.assert_close(dataset[:].to_dict(), before.to_dict())


@pytest.mark.parametrize("mapped", [False, True])
def test_transforms_and_prefetching_work_as_on_any_buffer(mapped, tmp_path):
    dataset = build(episodes(), tmp_path if mapped else None)
    rb = TransitionReplayBuffer(
        dataset, batch_size=5, prefetch=2, transform=RewardScaling(loc=0.0, scale=2.0, in_keys=[("next", "reward")])
    )
    for _ in range(10):
        batch = rb.sample()
        rows = dataset[batch["index"]]
        assert torch.equal(batch["next", "observation"], rows["next", "observation"])
        assert torch.equal(batch["next", "reward"], 2 * rows["next", "reward"])


def two_buffers(**kwargs):
    return [
        TransitionReplayBuffer(build(episodes(**kwargs)), batch_size=4, sampler=SamplerWithoutReplacement())
        for _ in range(2)
    ]


@pytest.mark.parametrize("kept", ["in a dictionary", "on disk"])
def test_a_restored_buffer_goes_on_where_it_was(kept, tmp_path):
    first, second = two_buffers()
    drawn = first.sample()["index"].tolist()
    if kept == "on disk":
        first.dumps(tmp_path / "buffer")
        second.loads(tmp_path / "buffer")
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 20_000, "no transitions"
    else:
        second.load_state_dict(first.state_dict())
    rest = [second.sample()["index"].tolist() for _ in range(2)]
    assert rest == [first.sample()["index"].tolist() for _ in range(2)]
    assert sorted([*drawn, *rest[0], *rest[1]]) == list(range(12)), "each transition once"


def test_a_state_of_another_set_is_refused(tmp_path):
    (first, _), (other, _) = two_buffers(), two_buffers(lengths=(4, 8))
    first.dumps(tmp_path / "buffer")
    with pytest.raises(InputError, match="12 transitions 3 episodes there, 12 transitions 2 episodes here"):
        other.loads(tmp_path / "buffer")
    with pytest.raises(InputError, match="another data set"):
        other.load_state_dict(first.state_dict())
    (tmp_path / "buffer" / "storage" / "transitions.json").unlink()
    with pytest.raises(InputError, match="holds no state of a data set"):
        first.loads(tmp_path / "buffer")


def test_a_storage_knows_its_transitions():
    storage = TransitionReplayBuffer(build(episodes()))._storage
    assert storage.contains(torch.tensor([0, 11, 12, -12, -13])).tolist() == [True, True, False, True, False]
    assert 5 in storage
    assert len(list(storage)) == 12


def draw(buffers, rows, results):
    for buffer in buffers:
        # Pickled here: a tensor in a queue is shared memory that ends with the process.
        results.put(pickle.dumps((buffer[rows].to_dict(), buffer.sample().batch_size)))


def test_buffers_travel_to_processes(tmp_path):
    dataset = build(episodes())
    mapped = TransitionDataset.load(dataset.save(tmp_path / "set"))
    buffers = [TransitionReplayBuffer(stored, batch_size=3) for stored in (dataset, mapped)]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=draw, args=(buffers, [1, 7], results))
    process.start()
    for _ in buffers:
        rows, size = pickle.loads(results.get(timeout=120))
        assert size == (3,)
        torch.testing.assert_close(rows, dataset[[1, 7]].to_dict())
    process.join()


def test_saved_sets_are_mapped_and_travel_by_name(tmp_path):
    dataset = build(episodes())
    dataset.about["provenance"] = "test"
    mapped = TransitionDataset.load(dataset.save(tmp_path / "set"))
    assert mapped.report == dataset.report
    assert mapped.about == {"provenance": "test"}
    torch.testing.assert_close(mapped[:].to_dict(), dataset[:].to_dict())
    content = pickle.dumps(mapped)
    assert len(content) < 1000
    torch.testing.assert_close(pickle.loads(content)[:].to_dict(), dataset[:].to_dict())
    torch.testing.assert_close(pickle.loads(pickle.dumps(dataset))[:].to_dict(), dataset[:].to_dict())
    with pytest.raises(InputError, match="in the way"):
        dataset.save(tmp_path / "set")


def test_a_folder_may_be_named_by_a_text(tmp_path):
    dataset = TransitionDataset.from_arrays(
        np.arange(4.0)[:, None], np.zeros((4, 1)), np.ones(4), [0, 0, 0, 1], folder=str(tmp_path)
    )
    assert dataset.folder == tmp_path
    assert torch.equal(TransitionDataset.load(tmp_path)[:]["observation"], dataset[:]["observation"])


def test_a_buffer_of_a_tensordict_is_refused_in_one_line():
    with pytest.raises(InputError, match="a TransitionDataset is needed, not a TensorDict; TorchRL's own") as error:
        TransitionReplayBuffer(build(episodes())[:], batch_size=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reward", "said"),
    [(torch.zeros(12).double(), "got float64"), (torch.full((12,), torch.nan), "got NaN or infinity")],
)
def test_other_rewards_are_finite_float32_numbers(reward, said):
    with pytest.raises(InputError, match=f"rewards must be float32 and finite, {said}"):
        build(episodes()).with_rewards(reward)


def test_a_set_built_in_files_can_be_pickled_copied_and_loaded(tmp_path):
    dataset = build(episodes(), tmp_path)
    expected = build(episodes())[:].to_dict()
    for other in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset), TransitionDataset.load(tmp_path)):
        torch.testing.assert_close(other[:].to_dict(), expected)


def test_a_set_in_a_folder_named_relatively_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    dataset = build(episodes(), Path("set"))
    content = pickle.dumps(dataset)
    monkeypatch.chdir("/")
    for other in (
        pickle.loads(content),
        copy.deepcopy(dataset),
        pickle.loads(pickle.dumps(dataset.chunked(2))).base,
    ):
        torch.testing.assert_close(other[:].to_dict(), build(episodes())[:].to_dict())


def test_a_builder_takes_tensors_and_lists_and_nan_behind_a_terminal_row():
    parts = episodes()
    parts[1][0][-1] = np.nan  # the second episode terminates
    expected = build(parts)
    assert expected.observation.isfinite().all()
    for cast in (torch.as_tensor, lambda value: value.tolist()):
        builder = TransitionBuilder(12, frames=15, observation_shape=(2,), action_dim=2, source="test")
        for part in parts:
            names = ("observations", "actions", "rewards", "terminated")
            builder.add_episode(**{name: cast(value) for name, value in zip(names, part, strict=True)})
        torch.testing.assert_close(builder.finish()[:].to_dict(), expected[:].to_dict())


def test_systems_without_posix_calls_keep_sets_in_files(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(dataset_module, "POSITIONAL_READS", False)
    monkeypatch.delattr("mmap.MADV_DONTNEED")
    dataset = build(episodes(), tmp_path)
    torch.testing.assert_close(dataset[[11, 0, 4]].to_dict(), build(episodes())[[11, 0, 4]].to_dict())
    dataset.release()


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no data set"):
        TransitionDataset.load(tmp_path)
    for name, content in (("reward.bin", b"x"), ("episode_starts.npy", b"x"), ("dataset.json", b"{}")):
        folder = build(episodes()).save(tmp_path / name)
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match="damaged") as error:
            TransitionDataset.load(folder)
        assert "\n" not in str(error.value)


def test_reading_a_mapped_set_does_not_bring_it_into_memory(tmp_path):
    rows, width = 200_000, 64
    builder = TransitionBuilder(
        rows, frames=rows + 1, observation_shape=(width,), action_dim=1, source="test", folder=tmp_path
    )
    builder.add_episode(
        observations=np.zeros((rows + 1, width), np.float32), actions=np.zeros((rows, 1)), rewards=np.zeros(rows),
        terminated=np.zeros(rows, bool),
    )  # fmt: skip
    dataset = builder.finish()
    dataset.release()

    def resident():
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    dataset[torch.randint(rows, (256,))]
    before = resident()
    for _ in range(20):
        dataset[torch.randint(rows, (256,))]
    assert dataset.nbytes > 5e7
    assert resident() - before < 2e6


def test_a_file_cut_short_while_it_is_read_is_one_line(tmp_path):
    dataset = build(episodes(), tmp_path)
    os.truncate(tmp_path / "observation.bin", 100)
    with pytest.raises(InputError, match=r"observation.bin was cut short; delete"):
        dataset[[0, 11]]


def test_a_prepared_set_is_made_once_and_again_for_another_source(tmp_path):
    made = []

    def make(folder):
        made.append(folder)
        return build(episodes(), folder)

    first = prepared(tmp_path / "set", {"file": 1}, make)
    second = prepared(tmp_path / "set", {"file": 1}, make)
    assert len(made) == 1
    torch.testing.assert_close(first[:].to_dict(), second[:].to_dict())
    prepared(tmp_path / "set", {"file": 2}, make)
    assert len(made) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "nothing half-written is left"

    def fail(folder):
        build(episodes(), folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        prepared(tmp_path / "other", {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(InputError, match="in the way"):
        prepared(tmp_path / "taken", {}, make)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match=r"cannot write .* MB in .*No space left"):
        build(episodes(), tmp_path)


def test_the_report_counts_what_was_found():
    parts = episodes()
    parts[0][1][0] = (1.0, -1.0)
    parts[2][0][1], parts[2][1][1] = parts[2][0][0], parts[2][1][0]
    report = build(parts).report
    assert (report.transitions, report.episodes, report.shortest_episode, report.longest_episode) == (12, 3, 1, 7)
    assert report.clipped_actions == 2
    assert report.duplicated_transitions == 1
    assert report.terminated == 1
    rewards = np.concatenate([r for *_, r, _ in parts]).astype(np.float32)
    assert (report.reward_min, report.reward_max) == (rewards.min(), rewards.max())


def test_actions_are_clipped_just_inside_their_bounds():
    parts = episodes()
    parts[0][1][0] = (1.0, -1.0)
    torch.testing.assert_close(build(parts)[0]["action"], torch.tensor([ACTION_LIMIT, -ACTION_LIMIT]))


def test_an_episode_whose_lengths_disagree_is_refused():
    observations, actions, rewards, terminated = episodes()[0]
    with pytest.raises(InputError, match="5 observations for 3 actions"):
        build([(observations, actions[1:], rewards, terminated)])
    builder = TransitionBuilder(4, frames=5, observation_shape=(2,), action_dim=2, source="test")
    with pytest.raises(InputError, match="expected 5, 4 and 4"):
        builder.finish()


def test_odd_indices_give_rows_or_an_index_error():
    dataset = build(episodes())
    whole = dataset[:]
    for index in (..., (slice(0, 12),), np.arange(12, dtype=np.uint8), np.arange(12, dtype=np.int16)):
        torch.testing.assert_close(dataset[index].to_dict(), whole.to_dict())
    assert len(dataset[[]]) == 0
    for index in (None, [0.5], "x", 12, -13, np.ones(5, bool)):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize("mapped", [False, True])
def test_states_are_the_observations_without_the_final_ones(mapped, tmp_path):
    dataset = build(episodes(), tmp_path if mapped else None)
    assert torch.equal(dataset.states(), dataset[:]["observation"])


def test_a_set_that_is_only_opened_needs_no_lock_and_stays_as_it_is(tmp_path):
    from deflow_torchrl.paths import only_one_prepares

    prepared(tmp_path / "set", {"file": 1}, lambda folder: build(episodes(), folder))
    before = (tmp_path / "set" / "reward.bin").read_bytes()
    with only_one_prepares("set", tmp_path):
        opened = prepared(tmp_path / "set", {"file": 1}, lambda folder: pytest.fail("made again"))
    opened.reward.add_(7)
    assert (tmp_path / "set" / "reward.bin").read_bytes() == before
