import json
import logging
import socket
import sys
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("minari", reason="needs the extra minari")
pytest.importorskip("gymnasium_robotics", reason="needs the extra minari")

import gymnasium
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Text

from deflow_torchrl.data import MinariExperienceReplay, load_minari_dataset
from deflow_torchrl.data.schema import ACTION_LIMIT
from deflow_torchrl.envs import make_minari_env
from deflow_torchrl.errors import InputError
from deflow_torchrl.sources.minari_sets import _check_network as check_network
from deflow_torchrl.sources.minari_sets import import_minari
from tests.support.minari_sets import data_folder, edit_metadata, record, write

STATE, ACTION = Box(-np.inf, np.inf, (3,)), Box(-1.0, 1.0, (2,))


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    import_minari()


def arrays(length=5, seed=0, end="truncated"):
    generator = np.random.default_rng(seed)
    flags = np.zeros((2, length), bool)
    if end is not None:
        flags[("terminated", "truncated").index(end), -1] = True
    return (
        generator.normal(size=(length + 1, 3)).astype(np.float32),
        generator.uniform(-1, 1, (length, 2)).astype(np.float32),
        generator.normal(size=length),
        *flags,
    )


def concatenated(dataset, flatten=np.asarray):
    """What minari itself says, episode by episode."""
    episodes = list(dataset.iterate_episodes())
    observations = [flatten(episode.observations) for episode in episodes]
    return {
        "observation": np.concatenate([each[:-1] for each in observations]),
        "next": np.concatenate([each[1:] for each in observations]),
        "action": np.concatenate([episode.actions for episode in episodes]),
        "reward": np.concatenate([episode.rewards for episode in episodes]),
        "terminated": np.concatenate([episode.terminations for episode in episodes]),
        "truncated": np.concatenate([episode.truncations for episode in episodes]),
    }


def assert_equal(buffer, expected, reward_shift=0.0):
    whole = buffer[:]
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        assert whole[key].dtype == torch.float32
        assert bool((whole[key] != 0).any()), f"{key} is all zeros"
    np.testing.assert_array_equal(whole["observation"], expected["observation"].astype(np.float32))
    np.testing.assert_array_equal(whole["next", "observation"], expected["next"].astype(np.float32))
    clipped = expected["action"].astype(np.float32).clip(-np.float32(ACTION_LIMIT), np.float32(ACTION_LIMIT))
    np.testing.assert_array_equal(whole["action"], clipped)
    reward = (expected["reward"] + reward_shift).astype(np.float32)
    np.testing.assert_array_equal(whole["next", "reward"].squeeze(-1), reward)
    np.testing.assert_array_equal(whole["next", "terminated"].squeeze(-1), expected["terminated"])
    np.testing.assert_array_equal(whole["next", "truncated"].squeeze(-1), expected["truncated"])
    np.testing.assert_array_equal(whole["next", "done"].squeeze(-1), expected["terminated"] | expected["truncated"])


def test_every_value_of_an_adroit_set_is_minaris():
    env = gymnasium.make("AdroitHandDoor-v1", max_episode_steps=15)
    dataset = record(env, "door/random-v0")
    buffer = MinariExperienceReplay("door/random-v0", batch_size=8, download=False)
    assert len(buffer) == 45
    assert_equal(buffer, concatenated(dataset))
    sample = buffer.sample()
    assert sample["observation"].shape == (8, 39)
    assert sample["next", "reward"].shape == (8, 1)


@pytest.mark.parametrize("mapped", [False, True])
def test_the_final_observation_is_the_last_next_observation(tmp_path, mapped):
    episodes = [arrays(4, 0), arrays(7, 1, "terminated")]
    write("mine/two-v0", STATE, ACTION, episodes)
    where = {"memmap_dir": tmp_path / "maps"} if mapped else {"device": "cpu"}
    whole = MinariExperienceReplay("mine/two-v0", download=False, **where)[:]
    for last, (observations, *_) in zip((3, 10), episodes, strict=True):
        np.testing.assert_array_equal(whole["next", "observation"][last], observations[-1])
    assert whole["next", "truncated"].flatten().nonzero().flatten().tolist() == [3]
    assert whole["next", "terminated"].flatten().nonzero().flatten().tolist() == [10]
    again = MinariExperienceReplay("mine/two-v0", download=False, **where)[:]
    assert (again == whole).all()


def test_a_mapped_set_is_made_again_when_the_set_or_an_option_changes(tmp_path):
    write("mine/one-v0", STATE, ACTION, [arrays()])
    raw = load_minari_dataset("mine/one-v0", memmap_dir=tmp_path, download=False)[:]["next", "reward"]
    shifted = load_minari_dataset("mine/one-v0", memmap_dir=tmp_path, reward_shift=-1, download=False)
    torch.testing.assert_close(shifted[:]["next", "reward"], raw - 1)


def test_an_end_without_a_flag_is_truncated():
    write("mine/open-v0", STATE, ACTION, [arrays(4, 0, None), arrays(4, 1, None)])
    whole = MinariExperienceReplay("mine/open-v0", download=False)[:]
    assert whole["next", "truncated"].flatten().nonzero().flatten().tolist() == [3, 7]
    assert not whole["next", "terminated"].any()


def test_terminated_episodes_of_a_real_environment():
    env = gymnasium.make("InvertedPendulum-v5", max_episode_steps=60)
    dataset = record(env, "pole/random-v0", 4, low=-3.0, high=3.0)
    buffer = MinariExperienceReplay("pole/random-v0", rescale_actions=True, download=False)
    expected = concatenated(dataset)
    assert expected["terminated"].sum() == 4
    np.testing.assert_array_equal(buffer[:]["next", "terminated"].squeeze(-1), expected["terminated"])
    np.testing.assert_allclose(buffer[:]["action"], expected["action"] / 3.0, rtol=1e-5, atol=1e-6)


def test_goal_observations_are_sorted_and_antmaze_is_d4rls():
    env = gymnasium.make("PointMaze_UMazeDense-v3", max_episode_steps=12)
    dataset = record(env, "maze/point-v0", 2)
    keys = ("achieved_goal", "desired_goal", "observation")
    buffer = MinariExperienceReplay("maze/point-v0", download=False)
    assert_equal(buffer, concatenated(dataset, lambda entries: np.concatenate([entries[key] for key in keys], -1)))
    chosen = MinariExperienceReplay("maze/point-v0", download=False, observation_keys=["observation", "desired_goal"])
    episode = next(iter(dataset.iterate_episodes())).observations
    expected = np.concatenate([episode["observation"][0], episode["desired_goal"][0]]).astype(np.float32)
    np.testing.assert_array_equal(chosen[:]["observation"][0], expected)


@pytest.mark.filterwarnings("ignore:.*AntMaze_UMaze-v4 is out of date:DeprecationWarning")
def test_d4rl_antmaze_is_29_wide_and_shifted_by_minus_one():
    env = gymnasium.make("AntMaze_UMaze-v4", max_episode_steps=6, continuing_task=False)
    dataset = record(env, "D4RL/antmaze/umaze-v1", 2)
    buffer = MinariExperienceReplay("D4RL/antmaze/umaze-v1", download=False)

    def d4rl(entries):
        return np.concatenate([entries["achieved_goal"], entries["observation"]], -1)

    assert buffer[:]["observation"].shape == (12, 29)
    assert_equal(buffer, concatenated(dataset, d4rl), reward_shift=-1.0)
    raw = MinariExperienceReplay("D4RL/antmaze/umaze-v1", download=False, reward_shift=0.0)
    assert (raw[:]["next", "reward"] == 0).all()


def test_goals_that_do_not_end_the_set_are_reported(caplog):
    observations = Dict(achieved_goal=Box(-9, 9, (2,)), desired_goal=Box(-9, 9, (2,)), observation=STATE)
    position, actions, _, *flags = arrays()
    entries = {"achieved_goal": position[:, :2], "desired_goal": position[:, :2], "observation": position}
    write("D4RL/antmaze/mine-v0", observations, ACTION, [(entries, actions, np.array([0.0, 1, 0, 1, 0]), *flags)])
    buffer = MinariExperienceReplay("D4RL/antmaze/mine-v0", download=False)
    assert buffer[:]["next", "reward"].flatten().tolist() == [-1, 0, -1, 0, -1]
    assert "2 steps at the goal are not terminated" in caplog.text
    assert "recorded without one" in caplog.text


def test_pendulum_is_refused_and_rescaled_on_demand():
    env = gymnasium.make("Pendulum-v1", max_episode_steps=10)
    dataset = record(env, "pendulum/random-v0", 2, low=-2.0, high=2.0)
    with pytest.raises(InputError, match=r"bounded by \[-2, 2\].*rescale_actions=True"):
        MinariExperienceReplay("pendulum/random-v0", download=False)
    buffer = MinariExperienceReplay("pendulum/random-v0", download=False, rescale_actions=True)
    expected = concatenated(dataset)
    expected["action"] = expected["action"] / 2.0
    assert_equal(buffer, expected)


def test_images_stay_bytes():
    space = Box(0, 255, (8, 8, 3), np.uint8)
    frames = np.random.default_rng(0).integers(256, size=(6, 8, 8, 3), dtype=np.uint8)
    dataset = write("mine/pictures-v0", space, ACTION, [(frames, *arrays()[1:])], jpeg_encoding=False)
    whole = MinariExperienceReplay("mine/pictures-v0", download=False)[:]
    assert whole["observation"].dtype == torch.uint8
    np.testing.assert_array_equal(whole["next", "observation"], next(iter(dataset.iterate_episodes())).observations[1:])


def test_nested_and_binary_entries_are_flattened_in_order():
    space = Dict(b=Dict(y=Box(-9, 9, (1,)), x=Box(-9, 9, (2, 2))), a=MultiBinary(2))
    entries = {
        "a": np.tile(np.array([0, 1], np.int8), (6, 1)),
        "b": {"x": np.arange(24.0, dtype=np.float32).reshape(6, 2, 2), "y": np.full((6, 1), -5, np.float32)},
    }
    write("mine/nested-v0", space, ACTION, [(entries, *arrays()[1:])])
    row = MinariExperienceReplay("mine/nested-v0", download=False)[:]["observation"][1]
    assert row.tolist() == [0, 1, 4, 5, 6, 7, -5]
    row = MinariExperienceReplay("mine/nested-v0", download=False, observation_keys=["b/y", "a"])[:]["observation"][1]
    assert row.tolist() == [-5, 0, 1]
    for keys, message in (
        (["b", "b/x"], "twice"),
        (["c"], "there are a, b"),
        (["a/z"], "no observation 'a/z'"),
        ([], "none at all"),
        ("a", "must be a list"),
    ):
        with pytest.raises(InputError, match=message):
            MinariExperienceReplay("mine/nested-v0", download=False, observation_keys=keys)


def test_sets_in_other_formats_are_read_as_well():
    pytest.importorskip("pyarrow", reason="minari reads arrow files with it")
    episodes = [arrays(5, 0), arrays(3, 1)]
    dataset = write("mine/arrow-v0", STATE, ACTION, episodes, data_format="arrow")
    assert_equal(MinariExperienceReplay("mine/arrow-v0", download=False), concatenated(dataset))


def with_value(column, value, dtype=None):
    parts = list(arrays())
    parts[column] = parts[column].astype(dtype or parts[column].dtype)
    parts[column][2] = value
    return [tuple(parts)]


@pytest.mark.parametrize(
    ("spaces", "episodes", "message"),
    [
        ((STATE, ACTION), with_value(0, np.nan), r"observations has a NaN or infinite value in row 2"),
        ((STATE, ACTION), with_value(1, np.inf), r"actions has a NaN or infinite value in row 2"),
        ((STATE, ACTION), with_value(2, np.nan), r"rewards has a NaN or infinite value in row 2"),
        ((STATE, ACTION), with_value(1, 1.5), r"1 of 5 actions leave \[-1, 1\].*first in row 2"),
        ((STATE, Discrete(3)), [(arrays()[0], np.array([0, 1, 2, 0, 1]), *arrays()[2:])], r"actions are Discrete\(3\)"),
        (
            (STATE, Box(-1, 1, (2,), np.int32)),
            [(arrays()[0], np.ones((5, 2), np.int32), *arrays()[2:])],
            "real numbers",
        ),
        ((STATE, Box(-np.inf, np.inf, (2,))), [arrays()], "without finite bounds"),
        ((Box(-1, 1, (4,)), ACTION), [arrays()], r"shape \(6, 3\), expected it to end in \(4,\)"),
        (
            (Dict(a=STATE, name=Text(5)), ACTION),
            [({"a": arrays()[0], "name": ["x"] * 6}, *arrays()[1:])],
            "entry 'name'",
        ),
        ((STATE, ACTION), [(arrays()[0][:-1], *arrays()[1:])], "5 observations for 5 actions"),
        ((STATE, ACTION), [], "holds no transition"),
    ],
)
def test_bad_sets_are_refused_in_one_line(spaces, episodes, message):
    write("mine/bad-v0", *spaces, episodes)
    with pytest.raises(InputError, match=message) as caught:
        MinariExperienceReplay("mine/bad-v0", download=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset_id", ["", "door", "a b-v0", "../x-v0", "hf://x/door-v0"])
def test_malformed_ids_are_refused(dataset_id):
    with pytest.raises(InputError, match="no Minari id"):
        MinariExperienceReplay(dataset_id)


def test_an_unknown_id_gets_the_nearest_local_ones():
    write("mine/one-v0", STATE, ACTION, [arrays()])
    with pytest.raises(
        InputError, match="no Minari set mine/onee-v0 on this machine; the nearest here are mine/one-v0"
    ):
        MinariExperienceReplay("mine/onee-v0", download=False)


def test_without_a_network_one_line_names_other_ways_within_seconds(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://no-such-host.invalid")
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"D4RL/door/human-v2.*examples/adroit_demonstrations\.py") as caught:
        MinariExperienceReplay("D4RL/door/human-v2")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("silent", ["host", "secure host", "proxy"])
def test_a_host_or_proxy_that_stays_silent_is_given_up(monkeypatch, silent):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "MINARI_REMOTE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("deflow_torchrl.sources.minari_sets._CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system accepts, nobody answers
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"{'http' if silent == 'host' else 'https'}://{address}")
        if silent == "proxy":
            monkeypatch.setenv("HF_ENDPOINT", "https://no-such-host.invalid")
            monkeypatch.setenv("https_proxy", f"http://{address}")
        begin = time.monotonic()
        with pytest.raises(InputError, match=r"no connection to .*: .*(no answer in 0\.5 seconds|timed out)") as caught:
            MinariExperienceReplay("D4RL/door/human-v2")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "answer", [b"200 OK", b"302 Found\r\nLocation: http://127.0.0.1:1/", b"404 Not Found", b"407 No"]
)
def test_any_answer_of_the_host_is_one(monkeypatch, answer):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def respond():
            connection = server.accept()[0]
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=respond)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConnectionError, match="password") if answer.startswith(b"407") else nullcontext():
            check_network()
        thread.join()


@pytest.fixture
def remote(monkeypatch):
    """Minari's remote with one set; what ``remote.during`` does happens when half of it is here."""
    from minari.storage import remotes

    class Remote:
        fetched = 0

        def during(self):
            pass

        def download_dataset(self, dataset_id):
            self.fetched += 1
            assert not data_folder(dataset_id).parent.exists(), "what is left of another download is removed"
            data_folder(dataset_id).mkdir(parents=True)
            self.during()
            data_folder(dataset_id).rmdir()
            data_folder(dataset_id).parent.rmdir()
            write(dataset_id, STATE, ACTION, [arrays()])

    remote = Remote()
    monkeypatch.setattr(remotes, "get_cloud_storage", lambda: None)
    monkeypatch.setattr("deflow_torchrl.sources.minari_sets._check_network", lambda: None)
    monkeypatch.setattr(import_minari(), "download_dataset", remote.download_dataset)
    return remote


def files():
    root = data_folder("D4RL").parents[1]
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_download_that_fails_leaves_nothing_and_the_next_one_succeeds(remote, error):
    def fail():
        raise error

    remote.during = fail
    with pytest.raises((InputError, KeyboardInterrupt)):
        MinariExperienceReplay("mine/far-v0")
    assert not data_folder("mine/far-v0").parent.exists()
    assert files() == []
    remote.during = lambda: None
    assert len(MinariExperienceReplay("mine/far-v0")) == 5
    assert len(MinariExperienceReplay("mine/far-v0")) == 5
    assert remote.fetched == 2
    assert not any("/." in name for name in files()), "neither marker nor lock is left"


def test_what_a_killed_download_left_is_fetched_again(remote):
    write("mine/far-v0", STATE, ACTION, [arrays()])
    marker = data_folder("mine/far-v0").parent.with_name(".far-v0.incomplete")
    marker.touch()
    with pytest.raises(InputError, match=r"broken off \(delete .*\.far-v0\.incomplete if the set is complete now"):
        MinariExperienceReplay("mine/far-v0", download=False)
    assert len(MinariExperienceReplay("mine/far-v0")) == 5
    assert remote.fetched == 1
    assert not marker.exists()


def test_one_process_downloads_a_set(remote):
    def another():
        with pytest.raises(InputError, match="another process is preparing far-v0"):
            MinariExperienceReplay("mine/far-v0")

    remote.during = another
    assert len(MinariExperienceReplay("mine/far-v0")) == 5


@pytest.mark.parametrize("damage", ["truncated file", "no metadata", "bad metadata", "missing episode", "no data file"])
def test_a_damaged_set_says_what_to_do(damage):
    write("mine/one-v0", STATE, ACTION, [arrays(5, 0), arrays(5, 1)])
    folder = data_folder("mine/one-v0")
    if damage == "truncated file":
        content = (folder / "main_data.hdf5").read_bytes()
        (folder / "main_data.hdf5").write_bytes(content[: len(content) // 2])
    elif damage == "no metadata":
        (folder / "metadata.json").unlink()
    elif damage == "bad metadata":
        (folder / "metadata.json").write_text("{")
    elif damage == "missing episode":
        edit_metadata("mine/one-v0", total_episodes=3)
    else:
        (folder / "main_data.hdf5").unlink()
    with pytest.raises(InputError, match=r"mine/one-v0 cannot be read.*delete its folder") as caught:
        MinariExperienceReplay("mine/one-v0", download=False)
    assert "\n" not in str(caught.value)


def test_data_of_another_environment_are_refused():
    record(gymnasium.make("AdroitHandDoor-v1", max_episode_steps=5), "door/random-v0", 2)
    other = gymnasium.make("AdroitHandHammer-v1").spec.to_json()
    edit_metadata("door/random-v0", env_spec=other)
    with pytest.raises(InputError, match=r"\[39\].*\[46\].*AdroitHandHammer-v1.*another environment"):
        MinariExperienceReplay("door/random-v0", download=False)


def test_a_set_cannot_have_code_run_for_its_environment(caplog):
    record(gymnasium.make("Pendulum-v1", max_episode_steps=5), "pendulum/random-v0", 1, low=-2, high=2)
    spec = (
        gymnasium.spec("Pendulum-v1")
        .to_json()
        .replace("gymnasium.envs.classic_control.pendulum:PendulumEnv", "os:system")
    )
    edit_metadata("pendulum/random-v0", env_spec=spec)
    assert len(MinariExperienceReplay("pendulum/random-v0", download=False, rescale_actions=True)) == 5
    assert "wants os:system to be called" in caplog.text
    with pytest.raises(InputError, match=r"cannot be made.*wants os:system to be called"):
        make_minari_env("pendulum/random-v0", download=False, rescale_actions=True)
    unknown = spec.replace("Pendulum-v1", "Nobody-v1")
    edit_metadata("pendulum/random-v0", env_spec=unknown, action_space=None)
    with pytest.raises(InputError, match="wants os:system to be called"):
        MinariExperienceReplay("pendulum/random-v0", download=False, rescale_actions=True)


@pytest.mark.parametrize("name", ["env_spec", "eval_env_spec"])
def test_an_older_place_in_the_same_package_is_never_called(name):
    environment = gymnasium.make("AdroitHandDoor-v1", max_episode_steps=5)
    old = json.loads(environment.spec.to_json())
    place = gymnasium.spec("AdroitHandDoor-v1").entry_point
    old = {"apply_api_compatibility": False, "autoreset": False} | old
    old["entry_point"] = "gymnasium_robotics.gone.door:DoorEnv"
    record(environment, "door/random-v0", 1)
    edit_metadata("door/random-v0", **{name: json.dumps(old)})
    assert len(MinariExperienceReplay("door/random-v0", download=False)) == 5
    env = make_minari_env("door/random-v0", download=False)
    assert env.spec.entry_point == place
    assert env.spec.max_episode_steps == 5


def test_an_environment_that_is_not_installed_leaves_the_data_usable(caplog):
    dataset = record(gymnasium.make("AdroitHandDoor-v1", max_episode_steps=5), "door/random-v0", 1)
    edit_metadata("door/random-v0", env_spec=dataset.env_spec.to_json().replace("AdroitHandDoor-v1", "Nobody-v1"))
    assert len(MinariExperienceReplay("door/random-v0", download=False)) == 5
    assert "Nobody-v1 is not registered" in caplog.text


@pytest.mark.parametrize("module", ["minari", "h5py"])
def test_a_missing_package_is_one_line_with_the_command_to_install_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    import_minari.cache_clear()
    try:
        with pytest.raises(ImportError) as caught:
            MinariExperienceReplay("D4RL/door/human-v2")
    finally:
        import_minari.cache_clear()
    assert str(caught.value) == f"{module} is not installed; install it with: pip install 'deflow-torchrl[minari]'"


@pytest.mark.parametrize("data_sign", [-1, 1])
def test_reward_conventions_are_compared_at_load(data_sign, caplog):
    from deflow_torchrl.envs import D4RLAdroitReward

    env = gymnasium.make("AdroitHandDoor-v1", max_episode_steps=25)
    recorded = D4RLAdroitReward(env) if data_sign == -1 else env
    dataset = record(recorded, "door/random-v0", 2)
    edit_metadata("door/random-v0", env_spec=env.spec.to_json())
    with caplog.at_level(logging.INFO):
        assert_equal(MinariExperienceReplay("door/random-v0", download=False), concatenated(dataset))
    assert ("D4RLAdroitReward corrects the environment" in caplog.text) == (data_sign == -1)
