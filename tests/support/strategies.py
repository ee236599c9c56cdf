"""hypothesis strategies: arrays, files and settings, good ones and spoiled ones."""

import numpy as np
import torch
from hypothesis import strategies as st

from tests.support import layouts

DTYPES = (
    "float16",
    "float32",
    "float64",
    ">f4",
    ">f8",
    "int8",
    "int64",
    "uint8",
    "bool",
    "complex64",
    "U3",
    "O",
    "M8[s]",
)
NUMBERS = (0.0, 1.0, -1.0, 0.5, 2.0, 1e-30, 1e10, 1e38, -1e300, float("nan"), float("inf"), float("-inf"))
OPTIONS = {
    "episode_ends": (
        None,
        "discontinuity",
        "often",
        2,
        3,
        0,
        -1,
        True,
        [1, 1, 2],
        np.repeat([1, 2], 6),
        torch.arange(12) // 4,
    ),
    "both": ("refuse", "terminal", "timeout", "neither"),
    "final_observation_rows": (False, True),
    "allow_jumps": (False, True, 1.5),
}


def _sound(length, width, seed):
    """Arrays of two episodes; the first terminates."""
    rng = np.random.default_rng(seed)
    states = np.cumsum(rng.normal(size=(length + 1, width)) * 0.1, axis=0)
    ends = np.zeros(length)
    ends[[length // 2 - 1, length - 1] if length > 1 else slice(None)] = 1
    first = np.arange(length) < length // 2
    following = states[1:].copy()
    return {
        "observations": states[:-1], "actions": rng.uniform(-1, 1, (length, 2)), "rewards": rng.normal(size=length),
        "terminals": ends * first, "timeouts": ends * ~first, "next_observations": following,
    }  # fmt: skip


@st.composite
def given_arrays(draw):
    """Arrays and options of ``TransitionDataset.from_arrays``, of which up to three are spoiled."""
    given = _sound(draw(st.sampled_from([12, 12, 12, 1, 2, 0])), draw(st.integers(1, 3)), draw(st.integers(0, 3)))
    if draw(st.booleans()):
        del given["next_observations"]
    for name in draw(st.lists(st.sampled_from(sorted(given)), max_size=3, unique=True)):
        given[name] = draw(spoiled(given[name]))
    options = {
        name: draw(st.sampled_from(OPTIONS[name]))
        for name in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=2))
    }
    return {**given, **options}


@st.composite
def spoiled(draw, array):
    """The array with a value, its type, its shape or its kind changed."""
    kind = draw(st.sampled_from(["value", "type", "shape", "order", "kind", "missing"]))
    if kind == "value":
        array = np.array(array, float)
        if array.size:
            array.reshape(-1)[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(NUMBERS))
        return array
    if kind == "type":
        with np.errstate(invalid="ignore"):
            return array.astype(draw(st.sampled_from(DTYPES)))
    if kind == "shape":
        shapes = [lambda a: a[:-1], lambda a: a[None], lambda a: a[..., None], lambda a: a.reshape(-1), lambda a: a[:0]]
        return draw(st.sampled_from(shapes))(array)
    if kind == "order":
        orders = [np.asfortranarray, lambda a: a[::-1].copy()[::-1], lambda a: np.repeat(a, 2, axis=0)[::2]]
        return draw(st.sampled_from(orders))(array)
    if kind == "kind":
        kinds = [
            torch.as_tensor, lambda a: torch.as_tensor(a).bfloat16(), lambda a: a.tolist(), lambda a: list(torch.as_tensor(a)),
            lambda a: torch.as_tensor(a).to_sparse() if a.size else a, np.ma.masked_array, str, lambda a: {"array": a},
        ]  # fmt: skip
        return draw(st.sampled_from(kinds))(array)
    return None


def _flat(path, given):
    """The arrays in a file of the format that the path's ending names."""
    if path.suffix == ".npz":
        np.savez(path, **given)
    elif path.suffix == ".hdf5":
        import h5py

        with h5py.File(path, "w") as file:
            for name, value in given.items():
                file[name] = value
    else:
        import pyarrow as pa
        from pyarrow import csv, parquet

        table = {}
        for name, value in given.items():
            flat = value.reshape(len(value), -1)
            table |= {name: value} if value.ndim == 1 else {f"{name}_{i}": flat[:, i] for i in range(flat.shape[1])}
        write = csv.write_csv if path.suffix == ".csv" else parquet.write_table
        write(pa.table(table), path)
    return path


WRITERS = {
    "npz": lambda folder, given: _flat(folder / "x.npz", given),
    "hdf5": lambda folder, given: _flat(folder / "x.hdf5", given),
    "csv": lambda folder, given: _flat(folder / "x.csv", given),
    "parquet": lambda folder, given: _flat(folder / "x.parquet", given),
    "robomimic": lambda folder, given: layouts.robomimic(folder / "x.hdf5", given),
    "lerobot": lambda folder, given: layouts.lerobot(folder / "set", given),
    "lerobot 2": lambda folder, given: layouts.lerobot(folder / "set", given, version="v2.1", lists="plain"),
    "d3rlpy": lambda folder, given: layouts.d3rlpy(folder / "x.h5", given),
    "d3rlpy 1": lambda folder, given: layouts.d3rlpy_1(folder / "x.h5", given),
    "d4rl": lambda folder, given: layouts.d4rl(folder / "x.hdf5", given),
}
IMPORTS = {
    "ends": (None, "flags", "file", "discontinuity", "3", "6", "0", "column:episode", "column:rewards", "perhaps"),
    "never_terminates": (False, True),
    "final_observation_rows": (False, True),
    "both": ("refuse", "terminal"),
    "action_bounds": (None, (-1, 1), (-2, 2), (1, -1), (0, float("inf"))),
    "split": (None, "train", "nothing"),
    "observation_keys": ((), ("state",), ("stat",), ("observation.state",)),
    "reward": (None, "success-at-end", "zero", "one"),
    "padded": (False, True),
    "columns": (None, {"rewards": "rewards"}, {"rewards": "actions"}, {"mask": "timeouts"}, {"x": "y"}),
}


@st.composite
def given_file(draw):
    """(layout, arrays, options of ``import_files``, damage to a file's bytes or a value)."""
    given = _sound(12, draw(st.integers(1, 3)), draw(st.integers(0, 3)))
    for name in draw(st.lists(st.sampled_from(sorted(given)), max_size=2, unique=True)):
        given[name].reshape(-1)[draw(st.integers(0, 11))] = draw(st.sampled_from(NUMBERS))
    names = draw(st.lists(st.sampled_from(sorted(IMPORTS)), max_size=2, unique=True))
    options = {name: draw(st.sampled_from(IMPORTS[name])) for name in names}
    damage = draw(st.one_of(st.none(), st.none(), st.tuples(st.sampled_from(["cut", "flip"]), st.floats(0, 1))))
    return draw(st.sampled_from(sorted(WRITERS))), given, options, damage


def write_file(folder, layout, given, damage):
    """Write what :func:`given_file` draws; the path to import, or ``None`` where the writer cannot write it."""
    try:
        with np.errstate(all="ignore"):
            path = WRITERS[layout](folder, given)
    except (ValueError, IndexError, StopIteration):
        return None
    if damage is not None:
        file = next(path.rglob("*.parquet")) if path.is_dir() else path
        content = bytearray(file.read_bytes())
        place = int(damage[1] * (len(content) - 1))
        if damage[0] == "cut":
            del content[place:]
        else:
            content[place] ^= 255
        file.write_bytes(content)
    return path


VALUES = [
    "0",
    "1",
    "-1",
    "3",
    "0.5",
    "nan",
    "inf",
    "1e-3",
    "x",
    "true",
    "false",
    "null",
    "[]",
    "[8]",
    "[8,8]",
    "[0]",
    "''",
    "a=b",
    "{a:1}",
]


def overrides(names):
    """Up to three ``key=value``, most of them wrong."""
    one = st.builds(lambda name, value: f"{name}={value}", st.sampled_from(sorted(names)), st.sampled_from(VALUES))
    return st.lists(one, min_size=1, max_size=3)


ENVIRONMENT = {
    "space_dtype": (np.float32, np.float64, np.uint8, np.int64),
    "space_shape": ((3,), (3,), (2,), (1, 3), ()),
    "low": (-1.0, -2.0, 0.0, -np.inf),
    "action_dtype": (np.float32, np.float32, np.float64, np.int64),
    "action_shape": ((2,), (2,), (1,), (2, 1)),
    "action_high": (1.0, 2.0, np.inf),
    "observation": (
        lambda: np.zeros(3), lambda: np.zeros(3, np.int64), lambda: np.zeros(3, np.uint8), lambda: np.zeros(4),
        lambda: [0.0, 0.0, 0.0], lambda: np.full(3, np.nan), lambda: np.full(3, 1e300), lambda: np.array(["a"] * 3),
        lambda: {"state": np.zeros(3)}, lambda: None, lambda: 1 / 0,
    ),
    "reward": (0.5, 1, np.float64(1), np.array([1.0]), np.zeros(2), True, None, "1", np.nan, 1j),
    "terminated": (False, np.False_, 0, np.array([False]), 2, None),
    "info": ({}, {"success": 0}, {"success": np.array([True])}, {"success": np.nan}, {"success": "yes"}, None),
}  # fmt: skip


@st.composite
def given_environment(draw):
    """What a toy environment declares and returns; up to three things are odd."""
    sound = {name: values[0] for name, values in ENVIRONMENT.items()}
    odd = draw(st.lists(st.sampled_from(sorted(ENVIRONMENT)), max_size=3, unique=True))
    return {**sound, **{name: draw(st.sampled_from(ENVIRONMENT[name])) for name in odd}}
