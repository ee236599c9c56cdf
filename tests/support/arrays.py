"""Arrays of transitions, and files of them."""

import numpy as np


def walk(length=12, seed=0):
    """A random walk: positions that move slowly, so that a jump shows."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(length, 3)) * 0.1, axis=0)


def arrays(length=12, ends=(5, 11), terminal=(5,), **changes):
    rng = np.random.default_rng(1)
    terminals, timeouts = np.zeros(length), np.zeros(length)
    terminals[list(terminal)] = 1
    timeouts[[end for end in ends if end not in terminal]] = 1
    base = {
        "observations": walk(length),
        "actions": rng.uniform(-0.9, 0.9, (length, 2)),
        "rewards": rng.normal(size=length),
        "terminals": terminals,
        "timeouts": timeouts,
    }
    return {**base, **changes}


def with_successors(**changes):
    given = arrays(**changes)
    following = np.roll(given["observations"], -1, axis=0)
    following[[5, 11]] = [[7.0, 8, 9], [1, 2, 3]]
    return {**given, "next_observations": following}


def write(path, given):
    """The arrays in any of the formats; CSV and Parquet have a column a number."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **given)
    elif path.suffix == ".hdf5":
        import h5py

        with h5py.File(path, "w") as file:
            for name, value in given.items():
                file[f"data/{name}"] = value
    else:
        import pyarrow as pa
        from pyarrow import csv, parquet

        flat = {}
        for name, value in given.items():
            columns = value.reshape(len(value), -1).T
            flat |= {name: value} if value.ndim == 1 else {f"{name}_{i}": column for i, column in enumerate(columns)}
        table = pa.table(flat)
        csv.write_csv(table, path) if path.suffix == ".csv" else parquet.write_table(table, path)
    return path
