"""Arrays written as other packages write them, after their documentation."""

import json

import numpy as np


def episodes_of(given):
    """The arrays of each episode."""
    ends = np.flatnonzero(given["terminals"] + given["timeouts"]) + 1
    return [
        {name: value[begin:end] for name, value in given.items()}
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def robomimic(path, given, *, more=None, masks=None):
    """robomimic's HDF5: ``data/demo_N/{obs,next_obs}/KEY``, actions, rewards, dones, and lists of demos in ``mask``."""
    import h5py

    observations = {"state": given["observations"], **(more or {})}
    following = {key: np.concatenate([value[1:], value[-1:]]) for key, value in observations.items()}
    if "next_observations" in given:
        following["state"] = given["next_observations"]
    flat = {f"obs/{key}": value for key, value in observations.items()}
    flat |= {f"next_obs/{key}": value for key, value in following.items()}
    flat |= {"actions": given["actions"], "rewards": given["rewards"]}
    flat |= {"dones": (given["terminals"] + given["timeouts"]).astype(np.int64)}
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        for number, part in enumerate(episodes_of({**given, **flat})):
            for name in flat:
                file[f"data/demo_{number}/{name}"] = part[name]
            file[f"data/demo_{number}"].attrs["num_samples"] = len(part["actions"])
        for name, demos in (masks or {}).items():
            file[f"mask/{name}"] = np.array(demos, "S8")
    return path


def lerobot(folder, given, *, version="v3.0", lists="fixed", rewards=True):
    """A LeRobot folder: a file an episode (v2) or several episodes a file (v3), with pictures that are left out."""
    import pyarrow as pa
    from pyarrow import parquet

    parts = episodes_of(given)
    meta = folder / "meta"
    meta.mkdir(parents=True)
    one = version.startswith("v2")
    where = "data/chunk-{:03d}/" + ("episode_{:06d}.parquet" if one else "file-{:03d}.parquet")
    info = {
        "codebase_version": version, "robot_type": "so100", "total_episodes": len(parts), "total_frames": len(given["actions"]),
        "fps": 30, "splits": {"train": f"0:{len(parts)}", "first": "0:3"}, "data_path": where,
    }  # fmt: skip
    (meta / "info.json").write_text(json.dumps(info))
    (meta / "tasks.jsonl").write_text("{}\n")

    def vectors(values):
        size = values.shape[1] if lists == "fixed" else -1
        return pa.array(values.astype(np.float32).tolist(), pa.list_(pa.float32(), size))

    def table(numbered):
        columns = {"observation.state": [], "action": [], "next.reward": [], "next.done": [], "episode_index": []}
        for number, part in numbered:
            columns["observation.state"].append(part["observations"])
            columns["action"].append(part["actions"])
            columns["next.reward"].append(part["rewards"])
            columns["next.done"].append(np.arange(1, len(part["rewards"]) + 1) == len(part["rewards"]))
            columns["episode_index"].append(np.full(len(part["rewards"]), number))
        joined = {name: np.concatenate(values) for name, values in columns.items()}
        frames = {name: vectors(value) if value.ndim > 1 else value for name, value in joined.items()}
        picture = {"bytes": b"\x89PNG", "path": None}
        frames["observation.images.top"] = pa.array([picture] * len(joined["action"]))
        frames["timestamp"] = np.arange(len(joined["action"]), dtype=np.float32) / 30
        if not rewards:
            del frames["next.reward"], frames["next.done"]
        return pa.table(frames)

    numbered = list(enumerate(parts))
    for number, group in enumerate([[item] for item in numbered] if one else [numbered[:1], numbered[1:]]):
        path = folder / where.format(0, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table(group), path)
    return folder


def d3rlpy(path, given, *, second=None):
    """d3rlpy's file of version 2: arrays of every episode under a number; observations may be a tuple."""
    import h5py

    with h5py.File(path, "w") as file:
        parts = episodes_of(given if second is None else {**given, "second": second})
        file["columns"] = ["observations", "actions", "rewards", "terminated"]
        file["num_episodes"] = len(parts)
        file["version"] = "2.1"
        for number, part in enumerate(parts):
            if second is None:
                file[f"observations_{number}"] = part["observations"]
            else:
                file[f"observations_{number}_0"], file[f"observations_{number}_1"] = (
                    part["observations"],
                    part["second"],
                )
            file[f"actions_{number}"] = part["actions"]
            file[f"rewards_{number}"] = part["rewards"][:, None]
            file[f"terminated_{number}"] = bool(part["terminals"][-1])
    return path


def d3rlpy_1(path, given):
    """d3rlpy's file of version 1: flat arrays, where episode_terminals marks every end."""
    import h5py

    with h5py.File(path, "w") as file:
        for name in ("observations", "actions", "rewards", "terminals"):
            file[name] = given[name]
        file["episode_terminals"] = np.float32(given["terminals"] + given["timeouts"])
        file["discrete_action"], file["version"] = False, "1.0"
    return path


def d4rl(path, given):
    """D4RL's file: flat arrays, big-endian here, beside groups of other things."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, value in given.items():
            file[name] = value.astype(bool) if name in ("terminals", "timeouts") else value.astype(">f4")
        file["infos/qpos"] = given["observations"]
        file.create_dataset("metadata/algorithm", data="SAC", dtype=h5py.string_dtype())
    return path
