# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Verbs about data sets and tasks: ``data download | generate | import | describe``, ``iav``, ``tasks``."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from deflow_torchrl.cli.shared import JSON, app, verb
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.overrides import override_value

data = typer.Typer(
    name="data", help="Make, fetch, import and describe data sets.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data)
DATA_NAME = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A task, an imported folder, or a data file.")]
DATA_ROOT = Annotated[Path | None, typer.Option(help="Folder of NAME.npz. [default: $DEFLOW_HOME/data]")]
DOWNLOAD = Annotated[bool, typer.Option(help="Fetch a missing data set from its source's host.")]
ALLOW_JUMPS = Annotated[
    bool, typer.Option("--allow-jumps", help="The state may jump inside an episode (teleporters, wrapped angles).")
]


@verb(data, "download")
def download_data(
    name: str,
    *,
    mirror: list[str] | None = None,
    from_file: list[Path] | None = None,
    out: Path | None = None,
    json_: JSON = False,
) -> dict[str, Any]:
    """Download a published OGBench data set, or install files of it that you have.

    NAME.npz and NAME-val.npz come from OGBench's host or, where that fails, from the mirrors in their order. After a broken
    connection, Ctrl-C or a kill the same command goes on where it ended. The first complete download of a file enters its
    SHA-256 in SHA256.json beside it; later ones must have the same. $DEFLOW_MIRRORS is a list with spaces or commas.

    With --from-file, files called NAME.npz and NAME-val.npz are known by their names; one file of another name is the
    training file, two are the training and the validation file, in this order. Other data is never overwritten.

    Example: deflow data download cube-single-play --mirror https://example.org/ogbench

    Args:
        name NAME: Data set or task, with or without -v0: cube-single-play, antmaze-large-navigate-singletask.
        mirror URL: Folder asked after OGBench's host; repeat for more, in order. [default: those in $DEFLOW_MIRRORS]
        from_file FILE: Install this file instead; repeat for the second.
        out: Folder. [default: $DEFLOW_HOME/data]
    """
    from deflow_torchrl.paths import data_root, dataset_path
    from deflow_torchrl.sources.download import download_ogbench_dataset, install_files
    from deflow_torchrl.tasks import ogbench_dataset_name

    began = time.perf_counter()
    dataset = ogbench_dataset_name(name)
    root = data_root(out)
    if from_file and mirror:
        raise InputError("give --mirror or --from-file, not both: a file that is there needs no mirror")
    if from_file:
        files = install_files(dataset, from_file, root)
    else:
        files = download_ogbench_dataset(dataset, root, mirrors=mirror)
    task = f"{name.removesuffix('-v0') if 'singletask' in name else dataset.removesuffix('-v0') + '-singletask'}-v0"
    go_on = _train_command(task, *([] if out is None else [f"data_root={override_value(str(root))}"]))
    missing = [path for split in ("train", "val") if not (path := dataset_path(dataset, root, split)).is_file()]
    if missing:
        print(f"{files[0]} is ready; {missing[0].name} is still missing: deflow train needs both, then: {go_on}")
    else:
        print(f"{' and '.join(map(str, files))} {'is' if len(files) == 1 else 'are'} ready; go on with: {go_on}")
    return {
        "dataset": dataset, "files": [str(path) for path in files], "missing": [str(path) for path in missing],
        "train": go_on, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


@verb(data, "generate")
def generate_data(
    name: str,
    *,
    episodes: int = 100,
    val_episodes: int | None = None,
    seed: int = 0,
    max_steps: int | None = None,
    workers: int | None = None,
    out: Path | None = None,
    json_: JSON = False,
) -> dict[str, Any]:
    """Generate an OGBench data set in the simulator, by OGBench's own protocol.

    Sets: cube-{single,double,triple}, scene and puzzle-{3x3,4x4}, each -play and -noisy; pointmaze-{medium,large}, each
    -navigate and -stitch; visual-{cube-single,cube-double,scene,puzzle-3x3,puzzle-4x4}-play, pictures of the same episodes.

    An episode has 1000 transitions (stitch 200) and takes a core about 4 seconds (cube), 5 (scene, puzzle), 0.4 (navigate)
    or 0.1 (stitch): the default of 100 episodes is 4 to 5 minutes on two cores for cube, scene and puzzle. The published
    sets have 1000 episodes (cube-triple 3000, stitch 5000) and a tenth of that for validation.

    The same name, episodes and seed give the same files with any number of workers, and a shorter set is the beginning of a
    longer one. After Ctrl-C or a kill the same command goes on. Other data in the folder is never overwritten.

    Pictures need a GL driver (MUJOCO_GL, egl where there is no display). Without a GPU a core draws 1 to 3 of an episode's 1001
    frames a second; the command says how long it will take. For a first look: --episodes 1 --max-steps 50.

    Args:
        name NAME: Data set, with or without -v0, for example cube-double-play.
        episodes: Training episodes.
        val_episodes: Validation episodes. [default: a tenth of the training episodes]
        seed: Seed of the data.
        max_steps: Steps of an episode at most. [default: the published set's, 1001 or 201]
        workers: Processes. [default: all cores]
        out: Folder. [default: a folder of its own in $DEFLOW_HOME/generated]
    """
    from deflow_torchrl.progress import progress_bar
    from deflow_torchrl.sources.generation import generate_ogbench_dataset, generated_dataset_name, generated_root
    from deflow_torchrl.sources.oracles import VISUAL_DATASETS

    began = time.perf_counter()
    dataset = generated_dataset_name(name)
    val_episodes = max(1, episodes // 10) if val_episodes is None else val_episodes
    root = out or generated_root(dataset, episodes=episodes, val_episodes=val_episodes, seed=seed, max_steps=max_steps)
    unit = "frame" if dataset in VISUAL_DATASETS else "episode"
    train_file = generate_ogbench_dataset(
        dataset,
        root,
        episodes=episodes,
        val_episodes=val_episodes,
        seed=seed,
        workers=workers,
        max_steps=max_steps,
        progress=lambda finished, total: progress_bar(finished, total=total, desc="generate", unit=unit),
        announce=lambda text: print(text, flush=True),
    )
    val_file, about = train_file.with_name(f"{dataset}-val.npz"), train_file.with_suffix(".json")
    task = f"{dataset.removesuffix('-v0')}-singletask{'-task1' * (dataset in VISUAL_DATASETS)}-v0"
    go_on = _train_command(task, f"data_root={override_value(str(train_file.parent))}")
    print(f"{train_file} and {val_file} are ready; go on with: {go_on}")
    return {
        "dataset": dataset, "files": [str(train_file), str(val_file)], "about": str(about),
        "transitions": json.loads(about.read_text(encoding="utf-8"))["transitions"], "train": go_on,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


@verb(data, "import")
def import_data(
    files: list[str],
    *,
    out: Path,
    column: list[str] | None = None,
    ends: str | None = None,
    never_terminates: bool = False,
    final_observation_rows: bool = False,
    both: str = "refuse",
    action_bounds: tuple[float, float] | None = None,
    action_bounds_of: str | None = None,
    split: str | None = None,
    obs_keys: str | None = None,
    reward: str | None = None,
    padded: bool = False,
    allow_jumps: ALLOW_JUMPS = False,
    json_: JSON = False,
) -> dict[str, Any]:
    """Turn your own files into a checked data set that trains: deflow train task=file:OUT [env=GYMNASIUM_ID]

    Files of robomimic, LeRobot (folders too), d3rlpy and D4RL are recognised by their content. Of others:

    Fields: observations, actions, rewards, terminals (1 where the task ended), and, where you have them, timeouts (1 on the
    last row of an episode that was cut), next_observations. Fields under their usual names (obs, action, terminated,
    truncated...) need no --column. In HDF5 a name is a path; in CSV and Parquet a vector is a pattern or a list of columns.
    Pictures are uint8 [N, H, W, C]; several cameras and vectors are a list: --column observations=front,wrist,joints.

    Without next_observations the next row is the successor, and the last row of a cut episode is left out. Ends of episodes
    are never guessed: --ends says how they are known. What was found is written as card.json and card.md in OUT.

    Example: deflow data import run*.csv --out data/arm --column observations='q_*' --column actions=u_0,u_1 --ends file
    --never-terminates --action-bounds -2 2

    Args:
        files FILE|FOLDER...: npz, HDF5, CSV, Parquet, or LeRobot folders, all of one layout.
        out: Folder to write.
        column FIELD=NAME: A field's name in the files; repeat it.
        ends: How ends of episodes are known: flags, file, discontinuity, ROWS, column:NAME. [default: the layout's; flags]
        never_terminates: The task has no terminal states.
        final_observation_rows: An episode's last row holds its final observation, no action.
        both: What a row flagged terminal and timeout is: terminal, timeout.
        action_bounds LOW HIGH: The actions' bounds, mapped to [-1, 1].
        action_bounds_of ENV: Take the actions' bounds from this environment.
        split NAME: Episodes that the files list under this name. [default: all]
        obs_keys KEY,KEY...: Observations to put side by side. [default: all vectors, by name]
        reward success-at-end|zero: Rewards of files without: 1 at each episode's end, or none (cloning methods).
        padded: Arrays are [episodes, steps, ...]; rows after an episode's end are padding.
    """
    from deflow_torchrl.sources.importing import import_folder

    out = out.expanduser()
    bounds: tuple[Any, Any] | None = action_bounds
    if action_bounds_of is not None:
        from deflow_torchrl.envs.factory import environment_action_bounds
        from deflow_torchrl.tasks import get_task

        if action_bounds is not None:
            raise InputError("--action-bounds and --action-bounds-of name the same bounds; give one of the two")
        bounds = environment_action_bounds(get_task(f"file:{out}", environment=action_bounds_of).environment or "none")
    columns = {}
    for item in column or []:
        field, _, column_name = item.partition("=")
        if not column_name:
            raise InputError(f"--column {item}: write FIELD=NAME, for example observations=obs")
        columns[field] = column_name
    dataset, card = import_folder(
        files,
        out,
        columns=columns,
        ends=ends,
        never_terminates=never_terminates,
        final_observation_rows=final_observation_rows,
        both=both,
        action_bounds=bounds,
        split=split,
        observation_keys=[] if obs_keys is None else obs_keys.split(","),
        reward=reward,
        padded=padded,
        allow_jumps=allow_jumps,
    )
    go_on = _train_command(override_value(f"file:{out}"))
    taken = ", ".join(f"{field}={name}" for field, name in dataset.about["columns"].items())
    print(f"{out}: {card['transitions']} transitions, {card['episodes']} episodes; see {out / 'card.md'}")
    print(f"columns: {taken}" + (f" ({dataset.about['layout']}'s layout)" if "layout" in dataset.about else ""))
    for note in [
        *dataset.about.get("notes", []),
        *(dataset.about[key] for key in ("reward", "rewards") if key in dataset.about),
    ]:
        print(f"note: {note}")
    print(f"go on with: {go_on}")
    return {"out": str(out), "card": card, "train": go_on}


@verb(data, "describe")
def describe_data(
    name: DATA_NAME,
    *,
    out: Path | None = None,
    data_root: DATA_ROOT = None,
    download: DOWNLOAD = True,
    allow_jumps: ALLOW_JUMPS = False,
    json_: JSON = False,
) -> dict[str, Any]:
    """Check a data set and print its card: source, episodes, rewards and their meaning, actions, duplicates, provenance.

    NAME is any task= of deflow train (cube-single-play-singletask-task2-v0, door-human-v1, minari:ID, file:FOLDER);
    FILE is an .npz in OGBench's layout or another file with the usual names of columns. The card is written as JSON and
    Markdown.

    Args:
        out: Folder of the card. [default: an imported folder itself, else $DEFLOW_HOME/cards]
    """
    from deflow_torchrl.paths import cache_home, file_name
    from deflow_torchrl.sources.card import card_markdown, data_card, write_card
    from deflow_torchrl.tasks.data import load_any

    dataset, task = load_any(name, root=data_root, download=download, allow_jumps=allow_jumps)
    meaning = None if task is None else task.reward_meaning
    card = data_card(dataset, name=name, reward_meaning=meaning)
    print(card_markdown(card))
    folder = out or dataset.folder or cache_home() / "cards" / file_name(name)
    try:
        write_card(card, folder)
        print(f"written to {folder / 'card.json'} and {folder / 'card.md'}")
    except InputError as error:
        if out is not None:
            raise
        print(f"not written: {error}")
    return card


@verb(app)
def iav(
    name: DATA_NAME,
    *,
    k: int = 5,
    queries: int = 20_000,
    include_self: bool = False,
    normalize: bool = False,
    domain: str | None = None,
    data_root: DATA_ROOT = None,
    download: DOWNLOAD = True,
    allow_jumps: ALLOW_JUMPS = False,
    seed: int = 0,
    json_: JSON = False,
) -> dict[str, Any]:
    """Measure a data set's intrinsic action variance and suggest target_divergence (delta) by the paper's rule.

    The variance of the actions of each state's k nearest neighbours, per action dimension, averaged over states. Under
    half a minute for 100,000 transitions on two CPU cores.

    Example: deflow iav cube-single-play-singletask-task2-v0

    Args:
        k: Neighbours of a state.
        queries: States to average over.
        include_self: Count a state among its own k neighbours.
        normalize: Divide observations by their standard deviation.
        domain: Rule for a file: manipulation, navigation or d4rl. [default: the task's; all]
        seed: Seed of the states and of the interval.
    """
    from deflow_torchrl.tasks.variance import measure_action_variance

    found = measure_action_variance(
        name,
        k=k,
        queries=queries,
        include_self=include_self,
        normalize=normalize,
        domain=domain,
        root=data_root,
        download=download,
        allow_jumps=allow_jumps,
        seed=seed,
    )
    per_dimension, paper = found["per_dimension"], found["paper"]
    widths = f"{found['observation_dim']} observations, {len(per_dimension)} actions"
    print(f"{name}: {found['transitions']} transitions, {widths}")
    print(
        f"variance of the actions of the {k} nearest neighbours (the state itself {'counted' if include_self else 'left out'}, "
        f"observations {'divided by their standard deviation' if normalize else 'as they are'}, divisor k - 1), "
        f"averaged over {found['queries']} states:"
    )
    for dimension, value in enumerate(per_dimension):
        print(f"  action {dimension}: {value:.3g}")
    low, high = found["interval"]
    print(f"  mean: {found['mean']:.3g} (95% bootstrap interval over states: {low:.3g} to {high:.3g})")
    print("target_divergence by the paper's rule, a rough start; deflow train takes it as algo.target_divergence=:")
    for rule_name, value in found["suggested_target_divergence"].items():
        rule = paper["rule"][rule_name]
        how = "whatever the variance" if "constant" in rule else f"{rule['times_variance']} x the mean"
        print(f"  {rule_name}: {value:.2g} ({how})")
    print("copied from the paper, not measured here:")
    print("  action variance: " + ", ".join(f"{data} {value}" for data, value in paper["action_variance"].items()))
    divergences = paper["target_divergence"]
    for value in dict.fromkeys(divergences.values()):
        families = ", ".join(family for family, own in divergences.items() if own == value)
        print(f"  target_divergence {value} (Table 6): {families}")
    if found["task_in_paper"] is not None:
        whose = "the paper" if found["task_in_paper"] else "this package"
        print(f"deflow train uses target_divergence {found['task_target_divergence']} for this task, {whose}'s choice")
    return found


@verb(app)
def tasks(
    *,
    family: str | None = None,
    setting: str | None = None,
    json_: JSON = False,
) -> dict[str, Any]:
    """List the paper's tasks, 73 offline and 15 offline to online, with the protocol and the values of each (docs/tasks.md).

    All numbers are the paper's, not results of this package. deflow train takes its defaults from them. With --json the last
    line has every field, of methods that this package does not train too.

    Example: deflow tasks --family cube

    Args:
        family NAME: A family or several: cube, cube-single, antmaze, d4rl... [default: all]
        setting offline|offline_to_online: One setting. [default: both]
    """
    from deflow_torchrl.tasks.listing import list_tasks
    from deflow_torchrl.tasks.paper import SETTINGS, paper_tasks

    found = {name: paper_tasks(name, family) for name in ([setting] if setting is not None else SETTINGS)}
    print("\n\n".join(list_tasks(name, listed) for name, listed in found.items()))
    return {name: [task.as_dict() for task in listed] for name, listed in found.items()}


def _train_command(task: str, *settings: str) -> str:
    return shlex.join(["deflow", "train", f"task={task}", *settings])
