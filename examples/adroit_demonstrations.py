"""Turn the 25 human demonstrations of the Adroit door task into a Minari set.

The file (door_human_raw.npz, made of hand_dapg's door-v0_demos.pickle) holds observations, actions, rewards and episode
lengths, and the simulator's state at each start. Observations and rewards are kept as recorded; actions are clipped to
[-1, 1], which is what the simulator executed. One thing was not recorded: the observation after each episode's last
action. It is the last recorded observation plus the change that the simulator makes with the last action when the episode
is replayed (a replay drifts, its single steps hardly do).

    python examples/adroit_demonstrations.py door_human_raw.npz door/human-v0
"""

import argparse
import sys
import warnings
import zipfile
from typing import Any

import numpy as np

from deflow_torchrl.data import MinariExperienceReplay
from deflow_torchrl.errors import InputError
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.sources.minari_sets import check_new_id, import_minari

FLAG = 38  # the observation's last entry: 1 where the door is open, else -1


def read(path: str) -> dict[str, np.ndarray]:
    """The file's arrays, no code of it run."""
    needed = ("observations", "actions", "rewards", "episode_lengths", "init_qpos", "init_qvel", "init_door_body_pos")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in needed if name not in archive.files]
            if missing:
                raise InputError(f"{path} has no array {', '.join(missing)}")
            return {name: archive[name] for name in needed}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {error}") from error


def last_change(env: Any, start: dict[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
    """What the last action changes in the observation when an episode is replayed."""
    env.reset(seed=0, options={"initial_state_dict": start})
    before = after = None
    for action in actions:
        before, after = after, env.step(action)[0]
    return after - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="door_human_raw.npz")
    parser.add_argument("dataset_id", nargs="?", default="door/human-v0", help="id of the new set (door/human-v0)")
    arguments = parser.parse_args()
    raw = read(arguments.file)
    minari = import_minari()
    check_new_id(arguments.dataset_id)
    import gymnasium
    from minari.data_collector.episode_buffer import EpisodeBuffer

    env = gymnasium.make("AdroitHandDoor-v1", max_episode_steps=1000, disable_env_checker=True)
    ends = np.cumsum(raw["episode_lengths"])
    episodes = []
    for number, end in enumerate(progress_bar(ends, desc="episodes", unit="episode")):
        rows = slice(end - raw["episode_lengths"][number], end)
        actions = np.clip(raw["actions"][rows], -1.0, 1.0)
        start = {name: raw[f"init_{name}"][number] for name in ("qpos", "qvel", "door_body_pos")}
        observations = raw["observations"][rows].astype(np.float64)
        final = observations[-1] + last_change(env, start, actions)
        final[FLAG] = 1.0 if final[28] > 1.0 else -1.0
        length = len(actions)
        episodes.append(
            EpisodeBuffer(
                id=number,
                observations=np.concatenate([observations, final[None]]),
                actions=actions,
                rewards=raw["rewards"][rows],
                terminations=np.zeros(length, dtype=bool),
                truncations=np.arange(length) == length - 1,
            )
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # minari asks for an e-mail address, a permanent link, ...
            minari.create_dataset_from_buffers(
                arguments.dataset_id,
                episodes,
                env=gymnasium.make("AdroitHandDoor-v1", disable_env_checker=True),
                algorithm_name="human demonstrations",
                description="hand_dapg's human demonstrations of opening a door; D4RL's reward",
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    buffer = MinariExperienceReplay(arguments.dataset_id, download=False)
    print(f"{arguments.dataset_id}: {len(episodes)} episodes, {len(buffer):,} transitions")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
