# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""``deflow``: the command line. Torch is imported inside the verbs, so that ``--help`` answers at once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from deflow_torchrl import __version__
from deflow_torchrl.algorithms.registry import ALGORITHMS
from deflow_torchrl.errors import (
    CheckpointNotWritten,
    CollectorError,
    EnvironmentFaultError,
    ExportParityError,
    InputError,
    MissingExtraError,
    NonFiniteLossError,
    RestoreError,
    RunInterrupted,
)

try:
    import typer
except ModuleNotFoundError as missing:
    print(f"deflow: {MissingExtraError(missing.name or 'typer', 'cli')}", file=sys.stderr)
    raise SystemExit(2) from missing

if TYPE_CHECKING:
    from types import FrameType

    from deflow_torchrl.data import TransitionDataset

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="deflow",
    help="DeFlow: offline reinforcement learning with a flow prior, a trust-region refinement and a twin critic.",
    epilog="Start with `deflow demo --quick`. Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data = typer.Typer(
    name="data", help="Make, fetch, import and describe data sets.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data)
_ALLOW_JUMPS = Annotated[
    bool, typer.Option("--allow-jumps", help="The state may jump inside an episode (teleporters, wrapped angles).")
]
_POLICY = "%s: the method's name, as fql, or of deflow also prior, its flow alone. [default: %s]"
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _methods() -> str:
    """Every method and the settings it has."""
    settings = {name: [it.name for it in fields(method.config)] for name, method in ALGORITHMS.items()}
    described = [f"{name} ({', '.join(it for it in own if it != 'name')})" for name, own in settings.items()]
    return f"Methods, algo=NAME (settings, algo.SETTING=): {', '.join(described)}."


def _verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors a user can cause into one line and the exit code that goes with them."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except InputError as error:
            _fail(error, EXIT_BAD_INPUT)
        except (
            NonFiniteLossError, CheckpointNotWritten, EnvironmentFaultError, CollectorError, RestoreError, ExportParityError,
        ) as error:  # fmt: skip
            _fail(error, EXIT_FAILED)
        except RunInterrupted as error:
            _fail(error, EXIT_INTERRUPTED)
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is kept; the same command goes on or starts again", EXIT_INTERRUPTED)

    return run


@app.command()
@_verb
def demo(
    seed: Annotated[int, typer.Option(help="Seed of networks, batches and noise.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every phase on less data, under three minutes, no success target.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/demo-seedN]")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print nothing but the JSON object.")] = False,
) -> None:
    """Generate cube-single data, train DeFlow on it, compare it with its prior and write a report.

    About a quarter of an hour on two CPU cores. The data is generated once, into $DEFLOW_HOME (default
    ~/.cache/deflow_torchrl), and found there by later runs. The last line of output is one JSON object.
    """
    from deflow_torchrl.demo import FULL, QUICK, describe, run_demo

    result = run_demo(QUICK if quick else FULL, seed=seed, command=_command(), out=out)
    if not json_:
        print(describe(result))
    print(json.dumps(result))


@app.command(epilog=_methods())
@_verb
def train(
    settings: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, as in Hydra.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="paper|released",
            help="Where paper and authors' code disagree: what is printed, or what the code does. [default: docs/tasks.md]",
        ),
    ] = None,
    json_: _JSON = False,
) -> None:
    """Train a method on a data set, then online: deflow train task=NAME [online_steps=N] [KEY=VALUE...]

    NAME: an OGBench single-task name; one of the paper's D4RL names (door-human-v1); minari:ID, any Minari set; file:FOLDER, a
    set made by deflow data import. env=GYMNASIUM_ID says where own data is evaluated; env=none does without for a Minari set.

    seeds=[0,1,2] trains a run for each of these seeds, all at once in this process and offline, into OUT/seed0, OUT/seed1...;
    deflow resume OUT goes on with all of them, deflow eval OUT/seed0 evaluates one.

    What is not given is the task's (deflow tasks lists the paper's): offline_steps, eval_interval, eval_episodes, hidden_dims,
    and of the method what the paper chooses for each task. preset=paper or preset=released, as --preset, decides where the
    paper and its authors' code disagree; settings that are given are as given (docs/tasks.md).

    Settings: task, env, algo (deflow), preset, seed or seeds, offline_steps, batch_size, hidden_dims=[256,256], log_interval,
    eval_interval, eval_episodes, save_interval, data_root, download, storage (device, memmap), out, device, compile, kernels,
    threads, eval_workers, logger (none, wandb, tensorboard, mlflow).

    Online, after the offline steps: online_steps (environment steps), utd (gradient steps for each), warmup_steps,
    freeze_prior (with base_actions of each state in a bank), mixing (uniform, balanced, annealed) with offline_fraction and
    anneal_steps, online_capacity, overwrite (online, fifo), collector_workers with steps_per_collection, max_fault_share.

    Settings of the method, as algo.lr: the last paragraph lists each method's. Defaults are the paper's; gamma, q_aggregation,
    target_divergence and what Table 6 has for other methods are the task's.

    Example: deflow train task=cube-single-play-singletask-task2-v0 seed=1 offline_steps=200000 online_steps=50000 out=runs/cube
    """
    from deflow_torchrl.config import compose_config, default_out

    settings = settings or []
    if preset is not None:
        if any(setting.startswith("preset=") for setting in settings):
            raise InputError("give --preset or preset=, not both")
        settings = [*settings, f"preset={preset}"]
    config = compose_config(settings)
    if config.seeds is not None:
        from deflow_torchrl.group import train_group

        _print_group(train_group(config, command=_command()), json_)
        return
    from deflow_torchrl.experiment import train as run_training

    config = replace(config, out=config.out or str(default_out(config)))
    _print_record(run_training(config, command=_command()), str(config.out), json_)


@app.command()
@_verb
def resume(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings to change, as in Hydra.")
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Go on although settings differ.")] = False,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Go on from this kept checkpoint; later ones are removed. [default: the last]"),
    ] = None,
    json_: _JSON = False,
) -> None:
    """Go on with an interrupted run from its last checkpoint; on a CPU the result is that of a run never interrupted.

    Settings, given here or edited in RUN/config.yaml, are compared with those the checkpoint was trained with. Where any that
    can change a result differs (more steps too), the command lists them and stops; --force goes on with the new ones and
    writes them to RUN/config.yaml. Another task or method is another run. Versions of torch and the simulators count as
    settings; out, data_root, download, eval_workers, logger and save_interval may change freely.

    Example: deflow resume runs/cube online_steps=200000 --force
    """
    from deflow_torchrl.experiment import resume as resume_training
    from deflow_torchrl.group import is_group, resume_group

    if is_group(run):
        summary = resume_group(run, command=_command(), overrides=settings or [], force=force, step=step)
        _print_group(summary, json_)
        return
    record = resume_training(run, command=_command(), overrides=settings or [], force=force, step=step)
    _print_record(record, str(run), json_)


@app.command("eval")
@_verb
def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    *,
    paired: Annotated[
        bool, typer.Option("--paired", help="Compare two runs of one task episode by episode: B - A with an interval.")
    ] = False,
    episodes: Annotated[int | None, typer.Option(min=1, help="Episodes of each policy. [default: the run's]")] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=_POLICY % ("This policy alone", "all; with --paired the method's own")),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that step environments; they change no number. [default: the run's]"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31, help="Seed of starts and noise. [default: that of training's evaluations]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device of the policies. [default: the run's]")] = None,
    json_: _JSON = False,
) -> None:
    """Evaluate the policies of a run's last checkpoint on common starts; the same run gives the same numbers twice.

    Several runs are evaluated one after the other. With --paired two runs of one task meet the same starts and the same noise,
    and the difference B - A is reported with its 95% interval (bootstrap over the episodes); where the task is judged by
    success also how often both, only one or neither succeeded, with the exact p-value of that.

    Example: deflow eval runs/offline runs/online --paired --episodes 200
    """
    if paired and len(runs) != 2:
        raise InputError(f"--paired compares two runs, {len(runs)} given: deflow eval RUN_A RUN_B --paired")
    from deflow_torchrl.experiment import evaluate_run
    from deflow_torchrl.reports.records import summarize
    from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED

    seed = DEFAULT_EVALUATION_SEED if seed is None else seed
    options: dict[str, Any] = {
        "episodes": episodes, "policy": policy, "workers": workers, "seed": seed, "device": device,
    }  # fmt: skip
    if paired:
        from deflow_torchrl.comparison import compare_runs

        compared = compare_runs(*runs, **options)
        _print_comparison(compared)
        if json_:
            print(json.dumps(compared))
        return
    results = []
    for run in runs:
        result = evaluate_run(run, **options)
        if len(runs) > 1:
            print(f"{run}, step {result['step']}:")
        _print_evaluations(result["evaluations"], result["metric"])
        results.append({"run": str(run), **summarize(result), **result})
    if len(runs) > 1:
        print("each run by itself; for the difference of two with its interval add --paired")
    if json_:
        print(json.dumps(results[0] if len(runs) == 1 else {"runs": results}))


@app.command()
@_verb
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    *,
    format: Annotated[
        str | None, typer.Option(metavar="onnx|pt2", help="Format of the file. [default: what FILE ends in; onnx]")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The file. [default: RUN/POLICY.FORMAT]")] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help=_POLICY % ("Which policy", "the method's own"))
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json_: _JSON = False,
) -> None:
    """Write a policy of a run's last checkpoint as one self-contained file that runs without torchrl (docs/deploy.md).

    The file maps observation [B, O] and, unless the method acts without, noise [B, A] to action [B, A], for any B. onnx needs
    onnxruntime where it runs, pt2 needs torch. Its actions are held against the policy's before it gets its name: 1e-5 apart at
    most, else exit code 1. A policy that chooses among candidates by its critics (ifql) cannot be exported.

    Example: deflow export runs/cube --format onnx --out cube.onnx
    """
    from deflow_torchrl.experiment import ACTING
    from deflow_torchrl.export import export_run

    result = export_run(run, format=format, out=out, policy=policy or ACTING, force=force)
    parity = result["parity"]["max_abs_difference"]
    print(
        f"{result['file']}: {result['policy']} at step {result['step']}; its actions are within {parity:.1g} of the run's"
    )
    code = (
        f"from deflow_torchrl.deploy import load_policy; policy = load_policy({result['file']!r}); policy(observation)"
    )
    print(f"run it with: {code}")
    if json_:
        print(json.dumps(result))


@app.command()
@_verb
def landscape(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of a method with critics.")],
    second: Annotated[
        Path | None, typer.Argument(metavar="RUN2", help="Run of the same task whose samples are shown too.")
    ] = None,
    *,
    state: Annotated[int, typer.Option("--state", metavar="INDEX", help="Which transition of the training data.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=".png or .svg, overwritten. [default: RUN/landscape-stateINDEX.png]"),
    ] = None,
    dims: Annotated[
        str | None, typer.Option(metavar="I,J", help="Two action dimensions, the others at the base samples' mean.")
    ] = None,
    principal: Annotated[
        bool, typer.Option("--principal", help="The base samples' two leading principal directions; the default.")
    ] = False,
    samples: Annotated[int, typer.Option(min=2, max=4096, help="Actions of each policy.")] = 256,
    neighbours: Annotated[
        int, typer.Option(min=2, max=4096, help="Nearest states of the data whose actions are shown.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the noise.")] = 0,
    json_: _JSON = False,
) -> None:
    """Draw Q over a slice of actions at one state of the data, with where the data's and the policies' actions lie in it.

    As Figure 2 of the paper: base samples, arrows to the refined ones, and with RUN2 a second method's. What the picture
    suggests is printed in numbers (docs/landscape.md): mean Q by RUN's critics; root-mean-square distance per dimension to the
    5 nearest of the data's actions, and the share of actions further away than 95% of those are from each other; the effective
    number of modes.

    Example: deflow landscape runs/cube-deflow runs/cube-fql --state 1000 --out landscape.svg
    """
    from deflow_torchrl.landscape import draw_landscape

    if dims is not None and principal:
        raise InputError("give --dims or --principal, not both")
    if dims is not None and not re.fullmatch(r"\d+,\d+", dims):
        raise InputError(f"--dims {dims}: write two action dimensions, for example 0,1")
    first, _, other = (dims or "").partition(",")
    result = draw_landscape(
        run,
        second,
        state=state,
        out=out,
        dims=None if dims is None else (int(first), int(other)),
        samples=samples,
        neighbours=neighbours,
        seed=seed,
    )
    _print_landscape(result)
    if json_:
        print(json.dumps(result))


@app.command()
@_verb
def sweep(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="The sweep's settings, then those of its runs.")
    ] = None,
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the jobs and what they would cost, by steps/s measured here.")
    ] = False,
    json_: _JSON = False,
) -> None:
    """Train every task with every method and seed: deflow sweep tasks=A,B algos=deflow,fql seeds=0..7 out=DIR [KEY=VALUE...]

    tasks: names, families (deflow tasks lists them), all (the paper's 73 offline tasks) or o2o (its 15 offline to online).
    algos: methods; deflow:fixed_alpha=0.3 is one with settings of its own. seeds: 0..7 or 0,1,2.

    A run's folder is OUT/TASK/ALGO/seedN. What is finished there is never run again, what was interrupted goes on from its
    checkpoints: after Ctrl-C, a kill or a lost machine the same command goes on. A job that failed is tried once more
    (retries=1); the others go on, and at the end the exit code is 1.

    engine: local (this machine; jobs=N at once, one a core by default) or ray (ray_address=HOST:PORT, auto or ray://HOST:PORT;
    num_cpus=1 and num_gpus= of a job; OUT in a folder that all nodes share). stacked=auto|true|false: whether the seeds of a
    task and method train together in one process; auto does so on a GPU and on Ray. protocol=paper|lite sets steps, networks
    and seeds. All other settings are those of deflow train.

    Example: deflow sweep tasks=cube-single,puzzle-3x3 algos=deflow,fql seeds=0..2 protocol=lite out=runs/lite --dry-run
    """
    from deflow_torchrl.sweep import parse_sweep

    plan = parse_sweep(settings or [], command=_command())
    if dry_run:
        from deflow_torchrl.sweep.costs import describe_costs, estimate_costs

        estimate = estimate_costs(plan)
        print(describe_costs(estimate))
        if json_:
            print(json.dumps(estimate))
        return
    from deflow_torchrl.sweep import run_sweep

    summary = run_sweep(plan)
    print(
        f"{summary['out']}: {summary['done']} of {len(summary['jobs'])} jobs are done, {summary['ran']} of them by this command"
    )
    for name in summary["failed"]:
        job = summary["jobs"][name]
        print(
            f"failed: {name} after {job['attempts']} attempts: {job['message']}"
            + (f" ({job['log']})" if job["log"] else "")
        )
    if json_:
        print(json.dumps(summary))
    if summary["failed"]:
        raise SystemExit(EXIT_FAILED)


@app.command()
@_verb
def tasks(
    family: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A family or several: cube, cube-single, antmaze, d4rl... [default: all]"),
    ] = None,
    setting: Annotated[
        str | None, typer.Option(metavar="offline|offline_to_online", help="One setting. [default: both]")
    ] = None,
    json_: _JSON = False,
) -> None:
    """List the paper's tasks, 73 offline and 15 offline to online, with the protocol and the values of each (docs/tasks.md).

    All numbers are the paper's, not results of this package. deflow train takes its defaults from them. With --json the last
    line has every field, of methods that this package does not train too.

    Example: deflow tasks --family cube
    """
    from deflow_torchrl.tasks.listing import list_tasks
    from deflow_torchrl.tasks.paper import SETTINGS, paper_tasks

    found = {name: paper_tasks(name, family) for name in ([setting] if setting is not None else SETTINGS)}
    print("\n\n".join(list_tasks(name, listed) for name, listed in found.items()))
    if json_:
        print(json.dumps({name: [task.as_dict() for task in listed] for name, listed in found.items()}))


@app.command()
@_verb
def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR...", help="Run folders, or folders of them; with --check and --write Markdown files."
        ),
    ] = None,
    *,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page.")] = None,
    md: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")] = None,
    label: Annotated[str | None, typer.Option(metavar="TEXT", help="The first note of page and tables.")] = None,
    last: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Average each run's last evaluations [default: of offline runs on OGBench as long as the paper's its three, of "
            "others 1].",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the marked numbers of Markdown files with their records.")
    ] = False,
    write: Annotated[bool, typer.Option("--write", help="Put what the records say into the marked places.")] = False,
    json_: _JSON = False,
) -> None:
    """Tables of finished runs in the paper's layout, with errors and intervals, beside the paper's own numbers.

    Every record.json below the folders is read; runs alike but for the seed make a cell. Without --html and --md the tables are
    printed. Where the data are not the published ones the report says so.

    --check recomputes the numbers that stand between markers (docs/reports.md) in the given files, or in README.md and
    benchmarks/results/**/*.md of this folder, prints one line for each that differs and then exits with 1; --write corrects them.

    Example: deflow report runs/lite --html report.html --md report.md --label "regenerated data, lite protocol"
    """
    if check or write:
        if html or md or label or last is not None:
            raise InputError(
                "--check and --write take Markdown files; --html, --md, --label and --last are for a report"
            )
        _check_reports(paths or [], write=write, as_json=json_)
        return
    if not paths:
        raise InputError("name a folder of finished runs: deflow report runs/NAME --html report.html")
    from deflow_torchrl.reports import page

    summary = page.summarize_runs(paths, label=label, last=last)
    title = f"Results: {', '.join(path.name or str(path.absolute().name) for path in paths)}"
    if html:
        page.write_summary_page(summary, html, title=title)
    if md:
        page.write_summary_markdown(summary, md, title=title)
    if html or md:
        print(f"{len(summary.runs)} runs: {', '.join(str(path) for path in (html, md) if path)}")
    else:
        print("\n".join(page.summary_markdown(summary, title=title)))
    if json_:
        print(json.dumps(page.summary_json(summary)))


@data.command("download")
@_verb
def download_data(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Data set or task, with or without -v0: cube-single-play, antmaze-large-navigate-singletask.",
        ),
    ],
    *,
    mirror: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Folder asked after OGBench's host; repeat for more, in order. [default: those in $DEFLOW_MIRRORS]",
        ),
    ] = None,
    from_file: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Install this file instead; repeat for the second."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder. [default: $DEFLOW_HOME/data]")] = None,
    json_: _JSON = False,
) -> None:
    """Download a published OGBench data set, or install files of it that you have.

    NAME.npz and NAME-val.npz come from OGBench's host or, where that fails, from the mirrors in their order. After a broken
    connection, Ctrl-C or a kill the same command goes on where it ended. The first complete download of a file enters its
    SHA-256 in SHA256.json beside it; later ones must have the same. $DEFLOW_MIRRORS is a list with spaces or commas.

    With --from-file, files called NAME.npz and NAME-val.npz are known by their names; one file of another name is the
    training file, two are the training and the validation file, in this order. Other data is never overwritten.

    Example: deflow data download cube-single-play --mirror https://example.org/ogbench
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
    go_on = shlex.join(["deflow", "train", f"task={task}", *([] if out is None else [f"data_root={root}"])])
    missing = [path for split in ("train", "val") if not (path := dataset_path(dataset, root, split)).is_file()]
    if missing:
        print(f"{files[0]} is ready; {missing[0].name} is still missing: deflow train needs both, then: {go_on}")
    else:
        print(f"{' and '.join(map(str, files))} {'is' if len(files) == 1 else 'are'} ready; go on with: {go_on}")
    if json_:
        result = {
            "dataset": dataset, "files": [str(path) for path in files], "missing": [str(path) for path in missing],
            "train": go_on, "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        print(json.dumps(result))


@data.command("generate")
@_verb
def generate_data(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Data set, with or without -v0, for example cube-double-play.")
    ],
    *,
    episodes: Annotated[int, typer.Option(help="Training episodes.")] = 100,
    val_episodes: Annotated[
        int | None, typer.Option(help="Validation episodes. [default: a tenth of the training episodes]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes. [default: all cores]")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder. [default: a folder of its own in $DEFLOW_HOME/generated]")
    ] = None,
    json_: _JSON = False,
) -> None:
    """Generate an OGBench data set in the simulator, by OGBench's own protocol.

    Sets: cube-{single,double,triple}, scene and puzzle-{3x3,4x4}, each -play and -noisy; pointmaze-{medium,large}, each
    -navigate and -stitch.

    An episode has 1000 transitions (stitch 200) and takes a core about 4 seconds (cube), 5 (scene, puzzle), 0.4 (navigate)
    or 0.1 (stitch): the default of 100 episodes is 4 to 5 minutes on two cores for cube, scene and puzzle. The published
    sets have 1000 episodes (cube-triple 3000, stitch 5000) and a tenth of that for validation.

    The same name, episodes and seed give the same files whatever the number of workers, and a shorter set is the beginning
    of a longer one. After Ctrl-C or a kill the same command goes on. Data that lies in the folder already is never
    overwritten by other data.
    """
    from deflow_torchrl.progress import progress_bar
    from deflow_torchrl.sources.generation import generate_ogbench_dataset, generated_dataset_name, generated_root

    began = time.perf_counter()
    dataset = generated_dataset_name(name)
    val_episodes = max(1, episodes // 10) if val_episodes is None else val_episodes
    root = out or generated_root(dataset, episodes=episodes, val_episodes=val_episodes, seed=seed)
    train_file = generate_ogbench_dataset(
        dataset,
        root,
        episodes=episodes,
        val_episodes=val_episodes,
        seed=seed,
        workers=workers,
        progress=lambda finished, total: progress_bar(finished, total=total, desc="generate", unit="episode"),
    )
    val_file, about = train_file.with_name(f"{dataset}-val.npz"), train_file.with_suffix(".json")
    task = f"{dataset.removesuffix('-v0')}-singletask-v0"
    go_on = shlex.join(["deflow", "train", f"task={task}", f"data_root={_hydra_value(str(train_file.parent))}"])
    print(f"{train_file} and {val_file} are ready; go on with: {go_on}")
    if json_:
        result = {
            "dataset": dataset, "files": [str(train_file), str(val_file)], "about": str(about),
            "transitions": json.loads(about.read_text(encoding="utf-8"))["transitions"], "train": go_on,
            "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        print(json.dumps(result))


def _hydra_value(value: str) -> str:
    """A string as Hydra's grammar reads it: quoted where a character means something there."""
    if re.fullmatch(r"[\w./:-]+", value, re.ASCII):
        return value
    # Backslashes count only before a quote (the closing one too) and before an interpolation, of which there is none here.
    escaped = re.sub(r"(\\*)('|\$(?=\{)|\Z)", lambda it: it[1] * 2 + ("\\" + it[2] if it[2] else ""), value)
    return f"'{escaped}'"


@data.command("import")
@_verb
def import_data(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="npz, HDF5, CSV or Parquet, all of one layout.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    column: Annotated[
        list[str] | None, typer.Option("--column", metavar="FIELD=NAME", help="A field's name in the files; repeat it.")
    ] = None,
    ends: Annotated[
        str, typer.Option(help="How ends of episodes are known: flags, file, discontinuity, ROWS, column:NAME.")
    ] = "flags",
    never_terminates: Annotated[
        bool, typer.Option("--never-terminates", help="The task has no terminal states.")
    ] = False,
    final_observation_rows: Annotated[
        bool,
        typer.Option("--final-observation-rows", help="An episode's last row holds its final observation, no action."),
    ] = False,
    both: Annotated[
        str, typer.Option(help="What a row flagged terminal and timeout is: terminal, timeout.")
    ] = "refuse",
    action_bounds: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="The actions' bounds, mapped to [-1, 1].")
    ] = None,
    allow_jumps: Annotated[
        bool, typer.Option("--allow-jumps", help="The state may jump inside an episode (teleporters).")
    ] = False,
    json_: _JSON = False,
) -> None:
    """Turn your own files into a checked data set that trains: deflow train task=file:OUT [env=GYMNASIUM_ID]

    Fields: observations, actions, rewards, terminals (1 where the task ended), and, where you have them, timeouts (1 on the
    last row of an episode that was cut), next_observations. Fields under their usual names (obs, action, terminated,
    truncated...) need no --column. In HDF5 a name is a path; in CSV and Parquet a vector is a pattern or a list of columns.

    Without next_observations the next row is the successor, and the last row of a cut episode is left out. Ends of episodes
    are never guessed: --ends says how they are known. What was found is written as card.json and card.md in OUT.

    Example: deflow data import run*.csv --out data/arm --column observations='q_*' --column actions=u_0,u_1 --ends file
    --never-terminates --action-bounds -2 2
    """
    from deflow_torchrl.data.dataset import make_folder
    from deflow_torchrl.sources.card import data_card, write_card
    from deflow_torchrl.sources.files import import_files

    out = out.expanduser()
    columns = {}
    for item in column or []:
        field, equals, name = item.partition("=")
        if not equals or not name:
            raise InputError(f"--column {item}: write FIELD=NAME, for example observations=obs")
        columns[field] = name
    made = [parent for parent in out.parents if not parent.exists()]
    card: dict[str, Any] = {}

    def build(folder: Path) -> TransitionDataset:
        return import_files(
            files,
            columns=columns,
            ends=ends,
            never_terminates=never_terminates,
            final_observation_rows=final_observation_rows,
            both=both,
            action_bounds=action_bounds,
            allow_jumps=allow_jumps,
            folder=folder,
        )

    def describe(dataset: TransitionDataset, folder: Path) -> None:
        card.update(data_card(dataset, name=out.name))
        write_card(card, folder)

    try:
        dataset = make_folder(out, build, describe=describe)
    except BaseException:
        for parent in made:  # the deepest first; one that somebody else has filled stays
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    go_on = shlex.join(["deflow", "train", f"task={_hydra_value(f'file:{out}')}"])
    taken = ", ".join(f"{field}={name}" for field, name in dataset.about["columns"].items())
    print(f"{out}: {card['transitions']} transitions, {card['episodes']} episodes; see {out / 'card.md'}")
    print(f"columns: {taken}")
    print(f"go on with: {go_on}")
    if json_:
        print(json.dumps({"out": str(out), "card": card, "train": go_on}))


@data.command("describe")
@_verb
def describe_data(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A task, an imported folder, or a data file.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the card. [default: an imported folder itself, else $DEFLOW_HOME/cards]"),
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of NAME.npz. [default: $DEFLOW_HOME/data]")] = None,
    download: Annotated[bool, typer.Option(help="Fetch a missing data set from its source's host.")] = True,
    allow_jumps: _ALLOW_JUMPS = False,
    json_: _JSON = False,
) -> None:
    """Check a data set and print its card: source, episodes, rewards and their meaning, actions, duplicates, provenance.

    NAME is whatever deflow train takes as task= (cube-single-play-singletask-task2-v0, door-human-v1, minari:ID, file:FOLDER);
    FILE is an .npz in OGBench's layout or another file with the usual names of columns. The card is written as JSON and
    Markdown.
    """
    from deflow_torchrl.paths import cache_home
    from deflow_torchrl.sources.card import card_markdown, data_card, write_card
    from deflow_torchrl.tasks.data import load_any

    dataset, task = load_any(name, root=data_root, download=download, allow_jumps=allow_jumps)
    meaning = None if task is None else task.reward_meaning
    card = data_card(dataset, name=name, reward_meaning=meaning)
    print(card_markdown(card))
    folder = out or dataset.folder or cache_home() / "cards" / re.sub(r"[^\w.-]+", "-", name).strip("-")
    try:
        write_card(card, folder)
        print(f"written to {folder / 'card.json'} and {folder / 'card.md'}")
    except InputError as error:
        if out is not None:
            raise
        print(f"not written: {error}")
    if json_:
        print(json.dumps(card))


@app.command()
@_verb
def iav(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A task, an imported folder, or a data file.")],
    *,
    k: Annotated[int, typer.Option("--k", help="Neighbours of a state.")] = 5,
    queries: Annotated[int, typer.Option(help="States to average over.")] = 20_000,
    include_self: Annotated[
        bool, typer.Option("--include-self", help="Count a state among its own k neighbours.")
    ] = False,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide observations by their standard deviation.")
    ] = False,
    domain: Annotated[
        str | None, typer.Option(help="Rule for a file: manipulation, navigation or d4rl. [default: the task's; all]")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of NAME.npz. [default: $DEFLOW_HOME/data]")] = None,
    download: Annotated[bool, typer.Option(help="Fetch a missing data set from its source's host.")] = True,
    allow_jumps: _ALLOW_JUMPS = False,
    seed: Annotated[int, typer.Option(help="Seed of the states and of the interval.")] = 0,
    json_: _JSON = False,
) -> None:
    """Measure a data set's intrinsic action variance and suggest target_divergence (delta) by the paper's rule.

    The variance of the actions of each state's k nearest neighbours, per action dimension, averaged over states. Under
    half a minute for 100,000 transitions on two CPU cores.

    Example: deflow iav cube-single-play-singletask-task2-v0
    """
    from deflow_torchrl.data.action_variance import (
        intrinsic_action_variance,
        paper_values,
        suggest_target_divergence,
    )
    from deflow_torchrl.progress import progress_bar
    from deflow_torchrl.tasks.data import load_any

    if domain is not None:
        suggest_target_divergence(0.0, domain=domain)  # an unknown domain is refused before the work
    dataset, task = load_any(name, root=data_root, download=download, allow_jumps=allow_jumps, images=False)
    domain = task.domain if task is not None and domain is None else domain
    paper = paper_values()
    domains = list(paper["rule"]) if domain is None else [domain]
    if dataset.observation.ndim != 2:
        raise InputError(
            f"{name} has images for observations; distances between pictures say little about their states"
        )
    states, actions = dataset.states(), dataset.action
    variance = intrinsic_action_variance(
        states, actions, k=k, queries=queries, include_self=include_self,
        normalize=normalize, seed=seed,
        progress=lambda blocks, total: progress_bar(blocks, total=total, desc="neighbours", unit="block"),
    )  # fmt: skip
    suggested = {domain: suggest_target_divergence(variance, domain=domain) for domain in domains}

    widths = f"{states.shape[1]} observations, {actions.shape[1]} actions"
    print(f"{name}: {variance.transitions} transitions, {widths}")
    print(
        f"variance of the actions of the {k} nearest neighbours (the state itself {'counted' if include_self else 'left out'}, "
        f"observations {'divided by their standard deviation' if normalize else 'as they are'}, divisor k - 1), "
        f"averaged over {variance.queries} states:"
    )
    for dimension, value in enumerate(variance.per_dimension.tolist()):
        print(f"  action {dimension}: {value:.3g}")
    low, high = variance.interval
    print(f"  mean: {variance.mean:.3g} (95% bootstrap interval over states: {low:.3g} to {high:.3g})")
    print("target_divergence by the paper's rule, a rough start; deflow train takes it as algo.target_divergence=:")
    for domain, value in suggested.items():
        rule = paper["rule"][domain]
        how = "whatever the variance" if "constant" in rule else f"{rule['times_variance']} x the mean"
        print(f"  {domain}: {value:.2g} ({how})")
    print("copied from the paper, not measured here:")
    print("  action variance: " + ", ".join(f"{data} {value}" for data, value in paper["action_variance"].items()))
    for value, families in _families_by_value(paper["target_divergence"]).items():
        print(f"  target_divergence {value} (Table 6): {', '.join(families)}")
    if task is not None:
        print(
            f"deflow train uses target_divergence {task.target_divergence} for this task, "
            f"{'the paper' if task.in_paper else 'this package'}'s choice"
        )
    if json_:
        summary = {
            field: value for field, value in vars(variance).items() if field != "per_dimension"
        } | {
            "name": name,
            "per_dimension": variance.per_dimension.tolist(),
            "suggested_target_divergence": suggested,
            "task_target_divergence": None if task is None else task.target_divergence,
            "paper": paper,
        }  # fmt: skip
        print(json.dumps(summary))


def _check_reports(files: list[Path], *, write: bool, as_json: bool) -> None:
    from deflow_torchrl.reports.check import check_file, default_files, write_file

    outcomes = [check_file(path) for path in files or default_files(Path())]
    differences = [difference for outcome in outcomes for difference in outcome.differences]
    for outcome in outcomes:
        if write and outcome.differences:
            write_file(outcome)
        if not (outcome.blocks or outcome.values or outcome.differences):
            print(f"{outcome.file}: no marker, nothing was checked")
    left = (
        [difference for path in outcomes for difference in check_file(path.file).differences] if write else differences
    )
    for difference in left:
        print(difference)
    blocks, values = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("blocks", "values"))
    verb = "were corrected" if write else "differ"
    print(f"{blocks} blocks and {values} values in {len(outcomes)} files checked; {len(differences)} lines {verb}")
    if as_json:
        print(
            json.dumps(
                {"files": len(outcomes), "blocks": blocks, "values": values, "differences": list(map(str, left))}
            )
        )
    if left:
        raise SystemExit(EXIT_FAILED)


def _families_by_value(divergences: dict[str, float]) -> dict[float, list[str]]:
    families: dict[float, list[str]] = {}
    for family, value in divergences.items():
        families.setdefault(value, []).append(family)
    return families


def _print_record(record: dict[str, Any], out: str, as_json: bool) -> None:
    from deflow_torchrl.reports.records import summarize

    _print_evaluations(record["evaluations"], record["metric"])
    print(f"Report: {Path(out) / 'report.html'}")
    if as_json:
        result = {"out": out, **summarize(record), "transitions": record["data"]["transitions"], "time": record["time"]}
        print(json.dumps(result))


def _print_group(summary: dict[str, Any], as_json: bool) -> None:
    digits = ".2f" if summary["metric"] == "success" else ".1f"
    for seed, own in summary["seeds"].items():
        finals = own.get(summary["metric"], {}).items()
        print(f"seed {seed}: " + (", ".join(f"{name} {value:{digits}}" for name, value in finals) or "not evaluated"))
    for name, mean in summary["mean"].items():
        std = summary["std"][name]
        spread = "" if std is None else f", standard deviation over seeds {std:{digits}}"
        print(f"{name}: {summary['metric']} {mean:{digits}}{spread}")
    print(f"Reports: {Path(summary['out']) / 'seed*' / 'report.html'}")
    if as_json:
        print(json.dumps(summary))


def _print_evaluations(evaluations: dict[str, Any], metric: str) -> None:
    if not evaluations:
        print("not evaluated: there is no environment (env=)")
    for name, outcome in evaluations.items():
        parts = [] if metric == "return" else [f"success {outcome['success_rate']:.2f}"]
        parts += [f"normalised score {outcome['mean_score']:.1f}"] if "mean_score" in outcome else []
        parts += [f"return {outcome['mean_return']:.1f}"] if metric == "return" else []
        print(f"{name}: {', '.join(parts)} over {outcome['episodes']} episodes")


def _print_landscape(result: dict[str, Any]) -> None:
    print(f"{result['task']}, state {result['state']} of the data; {result['method']} at step {result['step']}")
    width = max(len(group["label"]) for group in result["samples"].values())
    print(f"{'':{width}}  number   mean Q  distance to data (max)  outside  effective modes")
    for group in result["samples"].values():
        far = group["distance_to_data"]
        print(
            f"{group['label']:{width}}  {group['number']:6}  {group['mean_q']:7.4g}  {far['mean']:16.3f} ({far['max']:.2f})"
            f"  {group['outside_data']:7.0%}  {group['effective_modes']:15.1f}"
        )
    if result["refinement_rms"] is not None:
        print(f"the refinement shifts an action dimension by {result['refinement_rms']:.3f} (root mean square)")
    print(f"{result['file']}")


def _print_comparison(compared: dict[str, Any]) -> None:
    for label, run in compared["runs"].items():
        print(f"{label}: {run['run']}, step {run['step']}")
        _print_evaluations({run["policy"]: run["outcome"]}, compared["metric"])
    name = {"success": "success", "score": "normalised score", "return": "return"}[compared["metric"]]
    digits = ".3f" if compared["metric"] == "success" else ".1f"
    mean, low, high = (format(compared["difference"][key], f"+{digits}") for key in ("mean", "low", "high"))
    print(
        f"B - A: {name} {mean}, 95% interval {low} to {high} "
        f"(paired bootstrap over {compared['difference']['pairs']} episodes, seed {compared['seed']})"
    )
    if "counts" in compared:
        counts = compared["counts"]
        print(
            f"both succeed {counts['both']}, only A {counts['only_a']}, only B {counts['only_b']}, neither {counts['neither']}; "
            f"exact two-sided p-value of only A against only B: {compared['p_value']:.3g}"
        )


def _command() -> str:
    return shlex.join(["deflow", *sys.argv[1:]])


def _fail(message: object, code: int) -> NoReturn:
    print(f"deflow: {message}", file=sys.stderr)
    raise SystemExit(code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if arguments is not None:
        sys.argv = ["deflow", *arguments]
    # OpenMP threads spin while they wait for each other. Beside any other busy process that made an update three to nine
    # times slower on two cores, while spinning briefly costs little on an idle machine. Read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from deflow_torchrl.processes import keep_freed_memory

    keep_freed_memory()
    # A polite kill saves like Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.filterwarnings("ignore", category=FutureWarning, module="(torch|tensordict|torchrl)")
    app(prog_name="deflow")


if __name__ == "__main__":
    main()
