"""Every command of README.md and of the site's pages is run here in small, or says why not.

* A page's commands are run in order, in a folder of the page's own that has ``runs/cube`` and ``runs/other``, runs of two
  updates, and the files that the page speaks of. What ``IN_SMALL`` holds is put behind a command: training is of two updates, a
  sweep is planned only (``--dry-run``).
* ``<!-- slow: REASON -->`` right above a block: only the test marked ``slow`` runs it. ``<!-- not run: REASON -->``: none does.
* A command in a sentence or a table is one that is run, or the beginning of one; else its page says why it is not:
  ``<!-- in sentences, not run: REASON -->``.
* Every command, also one that is not run or that stands in a sentence, names verbs, options, settings, scripts, extras and make's
  targets that exist. Where it is complete, its settings are accepted: the task is known, the values are in range.
"""

import re
import runpy
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from tests.support.command_line import deflow
from tests.support.generation import DATASET
from tests.support.pages import PAGES, ROOT, blocks, commands_run, inline_commands, why_not_run
from tests.support.runs import undrawn

pytest.importorskip("hydra", reason="needs the extra cli")

LANGUAGES = {"bash", "python", "text", "json", "toml"}
TRAINING = (
    "offline_steps=2", "hidden_dims=[8]", "batch_size=8", "eval_interval=0", "eval_episodes=1", "eval_max_steps=4",
    "eval_workers=1", "log_interval=1", "save_interval=0", "threads=1",
)  # fmt: skip
IN_SMALL = {
    "train": TRAINING,
    "eval": ("--episodes", "1"),
    "sweep": ("--dry-run",),
    "data generate": ("--episodes", "2", "--workers", "1"),
    "play": ("--episodes", "1"),
    "render": ("--episodes", "1", "--every", "100"),
    "landscape": ("--samples", "8"),
}
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}


def verb(words):
    """The click command, its name and the words behind it."""
    from typer.main import get_command

    from deflow_torchrl.cli import app

    command, name, rest = get_command(app), [], list(words)
    while hasattr(command, "commands") and rest and rest[0][0] not in "-$":
        assert rest[0] in command.commands, f"no verb {' '.join([*name, rest[0]])!r}"
        command = command.commands[rest[0]]
        name.append(rest.pop(0))
    return command, " ".join(name), rest


def is_complete(words):
    """Whether a command can be typed as it stands: nothing in it is for the reader to fill in."""
    return not any(re.search(r"(?<![\w])[A-Z]+\d?(?![\w])|\.\.\.|[|\[](?!\d)|=$", word) for word in words)


def check_deflow(words, *, sentence):
    from typer._click.exceptions import UsageError

    from deflow_torchrl.algorithms import get_algorithm
    from deflow_torchrl.runs.overrides import compose_config
    from deflow_torchrl.runs.settings import TrainConfig, setting_names
    from deflow_torchrl.sweep import parse_sweep
    from deflow_torchrl.sweep.plan import OPTIONS

    command, name, rest = verb(words)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--"):
            assert word.partition("=")[0] in {*options, "--help"}, f"deflow {name} has no option {word}"
    if name in ("train", "resume", "sweep"):
        methods = [word.partition("=")[2] for word in rest if word.startswith("algo=")]
        method = methods[0] if methods and methods[0].islower() else "deflow"
        known = {*setting_names(TrainConfig), *(f"algo.{it}" for it in setting_names(get_algorithm(method).config))}
        known |= {*OPTIONS, "protocol"} if name == "sweep" else set()
        for word in rest:
            if re.match(r"[\w.]+=", word):
                assert word.partition("=")[0] in known, f"deflow {name} has no setting {word}"
    if not is_complete(rest) or not rest or "--help" in rest:
        return
    try:
        given = command.make_context(name or "deflow", list(rest)).params
    except UsageError:
        if sentence:  # which names an option without its value, say
            return
        raise
    # Sets that a reader makes first are not here.
    if name == "train" and any(re.match("task=(?!minari:|file:)", word) for word in rest):
        compose_config([*given["settings"], *([f"preset={given['preset']}"] if given["preset"] else [])])
    if name == "sweep":
        parse_sweep(given["settings"])


def check_script(words):
    script = ROOT / words[0]
    assert script.is_file(), f"no script {words[0]}"
    texts = "".join(path.read_text(encoding="utf-8") for path in script.parent.glob("*.py"))
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in texts, f"{words[0]} has no option {word}"


def check_named(words, *, sentence=False):
    """Fail where a command, alone or in a sentence, names something that does not exist."""
    program, *rest = words
    if program == "deflow":
        check_deflow(rest, sentence=sentence)
    elif program == "python" and rest[0].endswith(".py"):
        check_script(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert rest[0] in targets, f"make has no target {rest[0]}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        for named in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(named.split(",")) <= extras.keys(), f"no extra {named}"


@pytest.mark.parametrize("page", NAMES)
def test_commands_name_what_exists_and_their_settings_are_accepted(page):
    for block in blocks(NAMES[page]):
        assert block.language in LANGUAGES, f"{block} says no language that is known here: {block.language!r}"
        assert block.marker in ("", "not run", "slow"), f"{block} is marked {block.marker!r}"
        assert not block.marker or len(block.reason.split()) > 2, f"{block} has no reason"
        if block.language == "text":
            assert not re.search(r"^(deflow|python|make|pip) ", block.text, re.M), f"{block} has commands: bash"
        for words in block.commands() if block.language == "bash" else []:
            assert block.marker == "not run" or (words[0] in ("deflow", "python") and is_complete(words)), (
                f"{block} can not be run as it stands, and is not marked: {' '.join(words)}"
            )
            check_named(words)
    run, reason = commands_run(), why_not_run(NAMES[page])
    for words in inline_commands(NAMES[page]):
        check_named(words, sentence=True)
        if len(words) > 2 and is_complete(words[1:]) and not any(it[: len(words)] == tuple(words) for it in run):
            assert len(reason.split()) > 2, f"{page}: `{' '.join(words)}` is not run, and the page does not say why"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, generated):
    """A folder with what pages begin with."""
    folder = tmp_path_factory.mktemp("reader")
    data = folder / "home" / "data"
    data.mkdir(parents=True)
    for suffix in ("", "-val"):
        shutil.copy(generated / f"{DATASET}{suffix}.npz", data)
    rng = np.random.default_rng(0)
    rows = {"observations": rng.normal(size=(60, 3)).cumsum(0), "rewards": rng.normal(size=60)}
    rows |= {"torque": rng.uniform(-2, 2, size=(60, 1)), "timeouts": np.arange(60) % 30 == 29}
    rows |= {"terminals": np.zeros(60)}
    np.savez(folder / "pendulum.npz", **{name: np.asarray(value, np.float32) for name, value in rows.items()})
    (folder / "logs").mkdir()
    for number in range(2):
        table = np.c_[rng.normal(size=(20, 3)).cumsum(0), rng.uniform(-1, 1, size=(20, 2))]
        names = "q_0,dq_0,r,u_0,u_1"
        np.savetxt(folder / "logs" / f"{number}.csv", table, "%.6f", delimiter=",", header=names, comments="")
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch)
        for seed, name in enumerate(("cube", "other")):
            task = f"task={DATASET.removesuffix('-v0')}-singletask-task2-v0"
            run(folder, ["train", task, f"seed={seed}", f"out=runs/{name}"])
            shutil.copytree(folder / "runs" / name, folder / "runs" / "small" / name)
    return folder


def run(folder, words):
    """Run a command of ``deflow`` in small."""
    from deflow_torchrl.algorithms import get_algorithm

    _, name, rest = verb(words)
    small = [*IN_SMALL.get(name, ())]
    if name == "train":
        given = dict(word.split("=", 1) for word in rest if "=" in word)
        small += ["online_steps=2"] if "online_steps" in given else []
        small += ["algo.cloning_steps=1"] if "algo.cloning_steps" in given else []
        if not get_algorithm(given.get("algo", "deflow")).trains_offline:
            small.remove("offline_steps=2")
        # Commands of a page are often alternatives, which have one folder where none is given.
        small += [] if "out" in given else [f"out=runs/{len(list(folder.glob('runs/*')))}"]
        shutil.rmtree(folder / given.get("out", "nowhere"), ignore_errors=True)
    words = [*name.split(), *(file for word in rest for file in expanded(folder, word)), *small]
    done = deflow(*words, cwd=folder, env={"DEFLOW_HOME": str(folder / "home")})
    assert done.returncode == 0, f"deflow {' '.join(words)}\n{done.stdout}{done.stderr}"


def expanded(folder, word):
    """The files of a pattern, as a shell gives them."""
    found = (
        sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word and "=" not in word else []
    )
    return found or [word]


def names_of(page):
    """What a page's Python snippets take as given."""
    rng = np.random.default_rng(0)
    end = np.arange(30) % 15 == 14
    return {
        "observations": rng.normal(size=(30, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (30, 2)).astype(np.float32),
        "rewards": rng.normal(size=30).astype(np.float32),
        "terminals": np.zeros(30, np.float32),
        "timeouts": end.astype(np.float32),
        "observation": np.zeros(28, np.float32),  # of the exported cube
        "noise": np.zeros(5, np.float32),
    }


def run_page(page, folder, patch, markers):
    """Run the blocks of a page that have one of these markers; return how many."""
    undrawn(patch)
    patch.chdir(folder)
    patch.setenv("DEFLOW_HOME", str(folder / "home"))
    (folder / "examples").symlink_to(ROOT / "examples")
    names, number = names_of(page), 0
    for block in blocks(NAMES[page]):
        if block.marker not in markers or block.language not in ("bash", "python"):
            continue
        number += 1
        if block.language == "python":
            exec(compile(block.text, f"{block}", "exec"), names)
            continue
        for program, *words in block.commands():
            if program == "deflow":
                run(folder, words)
            else:
                patch.setattr(sys, "argv", words)
                runpy.run_path(words[0], run_name="__main__")
    return number


def with_marker(marker):
    """Pages with a block that has this marker and can be run."""
    return [
        name
        for name, page in NAMES.items()
        if any(block.marker == marker and block.language in ("bash", "python") for block in blocks(page))
    ]


@pytest.fixture
def reader(prepared, tmp_path):
    return Path(shutil.copytree(prepared, tmp_path / "reader"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("page", with_marker(""))
def test_a_pages_commands_run_in_their_order(page, reader, monkeypatch, in_process):
    assert run_page(page, reader, monkeypatch, {""})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("page", with_marker("slow"))
def test_a_pages_slow_commands_run_too(page, reader, monkeypatch, in_process):
    monkeypatch.chdir(reader)
    text = NAMES[page].read_text(encoding="utf-8")
    for name in sorted({*re.findall(r"task=((?:cube-double|scene|puzzle-3x3)-play)", text)}):
        run(reader, ["data", "generate", name, "--out", "home/data"])
    assert run_page(page, reader, monkeypatch, {"", "slow"})
