"""Bad input, a row each: one line on standard error that says what, where and what to do; exit code 2; nothing is left behind."""

import re
from dataclasses import dataclass, field

import numpy as np
import pytest

from deflow_torchrl.data import TransitionDataset
from tests.support.arrays import arrays, walk, with_successors
from tests.support.command_line import assert_one_line, deflow

EYE = np.eye(12)
JOINED = {
    "observations": np.concatenate([walk(400), walk(400, seed=7) + 5]), "actions": np.zeros((800, 1)),
    "rewards": np.zeros(800), "terminals": np.zeros(800), "timeouts": np.eye(800)[799],
}  # fmt: skip


def changed(name, row, value, given=None):
    given = given or arrays()
    given[name][row] = value
    return given


def without(name):
    return {key: value for key, value in arrays().items() if key != name}


@dataclass
class Bad:
    """Arrays of ``set.npz`` and options of its import, or a whole command; and the line (a pattern)."""

    line: str
    given: dict = field(default_factory=arrays)
    options: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def arrays_with(line, *options, **changes):
    return Bad(line, {**arrays(), **changes}, options)


def padded_with(line, *options, **changes):
    return arrays_with(line, *options, **{k: v.reshape(2, 6, *v.shape[1:]) for k, v in arrays().items()} | changes)


def command(line, *arguments):
    return Bad(line, command=arguments)


def train(line, *settings):
    return Bad(line, command=("train", *settings))


TABLE = {
    # arrays in a file
    "empty": Bad("holds no transition", {key: value[:0] for key, value in arrays().items()}),
    "one transition": Bad("holds 1 transition", {k: v[:2] for k, v in arrays(timeouts=EYE[1]).items()}),
    "single rows": arrays_with(
        "each of its 12 episodes has a single row.*give next_obs", terminals=np.zeros(12), timeouts=np.ones(12)
    ),
    "NaN reward": Bad("rewards has a NaN or infinite value in row 3", changed("rewards", 3, np.nan)),
    "infinite reward": Bad("rewards has a NaN or infinite value in row 3", changed("rewards", 3, np.inf)),
    "huge reward": Bad(r"rewards has a number beyond 1e\+15 in row 3", changed("rewards", 3, 1e38)),
    "NaN observation": Bad("observations has a NaN or infinite value in row 5", changed("observations", 5, np.nan)),
    "huge observation": Bad(r"observations has a number beyond 1e\+15 in row 5", changed("observations", 5, 1e30)),
    "float64 beyond float32": Bad("observations has a NaN or infinite", changed("observations", 5, 1e300)),
    "NaN action": Bad("actions has a NaN or infinite value in row 0", changed("actions", 0, np.nan)),
    "NaN successor": Bad(
        "next_observations has a NaN or infinite value in row 11, which is not terminal",
        changed("next_observations", 11, np.nan, with_successors()),
    ),
    "infinite successor": Bad(
        "has a NaN or infinite value in row 5", changed("next_observations", 5, np.inf, with_successors())
    ),
    "integer actions": arrays_with("actions has type int64", actions=np.ones((12, 2), np.int64)),
    "actions in [-2, 2]": arrays_with(r"leave \[-1, 1\].*rescale the actions", actions=arrays()["actions"] * 2),
    "actions of no width": arrays_with("actions has shape", actions=np.zeros((12, 0))),
    "actions as a number": arrays_with("actions is a single value", actions=np.array(0.5)),
    "observations of three dimensions": arrays_with("observations has shape", observations=np.zeros((12, 3, 2))),
    "text": arrays_with("expected real numbers", observations=np.array([["a"] * 3] * 12)),
    "complex": arrays_with("expected real numbers", observations=np.zeros((12, 3), complex)),
    "pickled objects": arrays_with("never loaded", actions=np.full((12, 2), None)),
    "short rewards": arrays_with("rewards has 5 rows, actions 12", rewards=np.zeros(5)),
    "wide rewards": arrays_with("one number for each of 12 rows", rewards=np.zeros((12, 2))),
    "short timeouts": arrays_with("timeouts has 7 rows", timeouts=np.zeros(7)),
    "flags of two": arrays_with("terminals is 2 in row 0, expected 0 or 1", terminals=np.full(12, 2)),
    "both flags": arrays_with("row 5 is flagged both as terminal and as timeout.*--both", timeouts=EYE[5] + EYE[11]),
    "unmarked end": arrays_with("the last row ends no episode", timeouts=np.zeros(12)),
    "successors of another width": arrays_with("differ in shape", next_observations=np.zeros((12, 4))),
    "no terminals": Bad("has no terminals.*--never-terminates", without("terminals")),
    "no rewards": Bad("has no rewards.*--reward success-at-end, --reward zero", without("rewards")),
    "no actions": Bad("has no actions; name the column with --column", without("actions")),
    "no observations": Bad("has no observations; name the column with --column", without("observations")),
    "jump": Bad("jumps inside episode 0.*--allow-jumps", JOINED),
    "jump against successors": Bad(
        "next_observations of row 2 is not", changed("next_observations", 2, 9, with_successors())
    ),
    "padded without a word": Bad(
        "keep the valid rows.*--padded", {k: v.reshape(2, 6, *v.shape[1:]) for k, v in arrays().items()}
    ),
    "bounds that are no numbers": arrays_with(
        "action_low and action_high are no numbers.*--action-bounds", action_low=np.array("x"), action_high=np.array("y")
    ),
    "bounds of two dimensions": arrays_with(
        r"action bounds of shape \(1, 2\) and \(1, 2\).*give a number", action_low=-np.ones((1, 2)), action_high=np.ones((1, 2))
    ),
    "a mask of one value": padded_with(r"mask has shape \(\), actions \(2, 6, 2\)", mask=np.array(1.0)),
    "a mask of two numbers a step": padded_with(
        r"mask has shape \(2, 6, 2\), expected one number a step", mask=np.ones((2, 6, 2))
    ),
    "NaN in a mask": padded_with("mask has values that are no numbers", mask=np.full((2, 6), np.nan)),
    "terminals of two numbers a step": padded_with(
        r"terminals has shape \(2, 6, 2\), expected one number a step", "--padded", terminals=np.ones((2, 6, 2))
    ),
    # options of an import
    "mapping to a missing field": Bad("has no rewards; name the column", without("rewards"), ("--ends", "file")),
    "column without a name": Bad("write FIELD=NAME", options=("--column", "observations")),
    "unknown field": Bad("unknown field 'reward'", options=("--column", "reward=r")),
    "unknown column": Bad("has no column 'r' for rewards; there are observations", options=("--column", "rewards=r")),
    "unknown ends": Bad("ends='perhaps' is unknown", options=("--ends", "perhaps")),
    "ends of another length": Bad("12 rows are not whole episodes of 5 rows", options=("--ends", "5")),
    "ends by a missing column": Bad("no column 'episode'", options=("--ends", "column:episode")),
    "ends by discontinuity": Bad("only where next_observations", options=("--ends", "discontinuity")),
    "unknown both": Bad("both='neither' is unknown", options=("--both", "neither")),
    "bounds upside down": Bad("the first must be the smaller", options=("--action-bounds", "2", "-2")),
    "infinite bounds": Bad("both must be finite", options=("--action-bounds", "-1", "inf")),
    "ends that are none": Bad(
        "makes each episode's last row terminal",
        without("rewards"),
        ("--reward", "success-at-end", "--never-terminates"),
    ),
    "unknown reward": Bad("there are success-at-end and zero", without("rewards"), ("--reward", "one")),
    "reward beside rewards": Bad("has rewards.*for files without", options=("--reward", "zero")),
    "no padding": Bad(r"padded arrays are \[episodes, steps, A\]", options=("--padded",)),
    "no splits": Bad("has no splits", options=("--split", "train")),
    "no observation keys": Bad("has no keys of observations", options=("--obs-keys", "x")),
    # files and folders
    "missing file": command("no data file nowhere.npz", "data", "import", "nowhere.npz", "--out", "out"),
    "unknown ending": command("files end in .npz", "data", "import", "set.pkl", "--out", "out"),
    "a folder of nothing": command("without meta/info.json", "data", "import", "good", "--out", "out"),
    "twice the same": command("is given twice", "data", "import", "set.npz", "set.npz", "--out", "out"),
    "a folder in the way": command("good is in the way", "data", "import", "set.npz", "--out", "good"),
    "describe a missing file": command("no data file x.npz", "data", "describe", "x.npz"),
    "describe nothing": command("unknown task 'nothing'", "data", "describe", "nothing"),
    "iav of one neighbour": command("k must be at least 2", "iav", "file:good", "--k", "0"),
    "generate an unknown set": command("did you mean cube-single-play-v0", "data", "generate", "cube-sngle-play"),
    "download an unknown set": command("unknown data set 'nothing'", "data", "download", "nothing"),
    "unknown family": command("unknown family 'x'", "tasks", "--family", "x"),
    "evaluate no run": command("is not a run folder", "eval", "nowhere"),
    "resume no run": command("is not a run folder", "resume", "nowhere"),
    "export no run": command("is not a run folder", "export", "nowhere"),
    "report of nothing": command("nowhere is missing", "report", "nowhere"),
    # settings
    "no task": Bad("no task given; name one", command=("train",)),
    "a missing set": train("nowhere holds no data set", "task=file:nowhere"),
    "an unknown task": train("unknown task 'cube-singl'", "task=cube-singl"),
    "an unknown method": train("did you mean deflow", "algo=deflo"),
    "an unknown setting": train("unknown setting 'frobnicate'", "frobnicate=1"),
    "an unknown setting of the method": train("did you mean algo.gamma", "algo.gama=0.9"),
    "no equals sign": train("is not a setting; write key=value", "batch_size"),
    "an unknown environment": train("env=Pendulum-v9 cannot be made", "env=Pendulum-v9"),
    "an unknown device": train("device=gpu cannot be used here", "device=gpu"),
    "online without an environment": train("needs an environment; name one with env=", "online_steps=5"),
    "a long chunk": train("longer than every trajectory", "chunk=99"),
    **{
        f"train {setting}": train(f"{re.escape(setting.partition('=')[0])}=.* is out of range; expected {expected}", setting)
        for setting, expected in {
            "batch_size=0": "at least 1", "offline_steps=-1": "at least 0", "hidden_dims=[]": "positive widths",
            "hidden_dims=[0]": "positive widths", "seed=-1": "at least 0", "algo.lr=0": "a positive number",
            "algo.lr=nan": "a finite number", "algo.tau=2": "a number in", "algo.gamma=1.5": "a number in",
            "algo.target_divergence=-1": "a positive number", "algo.flow_steps=0": "at least 1",
            "algo.q_aggregation=median": "mean", "storage=disk": "one of device, memmap", "eval_episodes=0": "at least 1",
            "chunk=0": "at least 1", "normalize=minmax": "one of none", "logger=wndb": "one of none", "threads=0": "at least 1",
            "save_interval=-1": "at least 0", "log_interval=0": "at least 1", "out=": "a folder",
        }.items()
    },
    **{
        f"train {setting}": train("cannot read .*; write key=value as in Hydra", setting)
        for setting in ("batch_size=x", "seed=x", "hidden_dims=8", "kernels=maybe")
    },
}  # fmt: skip


def test_the_table_is_long():
    assert len(TABLE) >= 50


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.pkl").touch()
    return tmp_path


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_one_line_and_nothing_is_left(name, home):
    bad = TABLE[name]
    np.savez(home / "set.npz", **bad.given)
    if any("good" in part for part in bad.command) or bad.command[:1] == ("train",):
        TransitionDataset.from_arrays(**arrays()).save(home / "good")
    before = sorted(path.name for path in home.iterdir())
    arguments = bad.command or ("data", "import", "set.npz", "--out", "out", *bad.options)
    if bad.command[:1] == ("train",) and len(bad.command) > 1:
        small = {"task": "file:good", "hidden_dims": "[8]", "offline_steps": "1", "batch_size": "4", "out": "run"}
        own = bad.command[1].partition("=")[0]
        arguments = (*bad.command, *(f"{key}={value}" for key, value in small.items() if key != own))
    result = deflow(*arguments)
    assert_one_line(result)
    assert re.search(bad.line, result.stderr), result.stderr
    if not bad.command and not bad.options:
        assert "set.npz" in result.stderr
        described = deflow("data", "describe", "set.npz")
        assert_one_line(described, "set.npz")
        assert re.search(bad.line, described.stderr), described.stderr
    assert [name for name in sorted(path.name for path in home.iterdir()) if name != "home"] == before
