# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Verbs that train runs and evaluate them: ``demo``, ``train``, ``resume``, ``eval``."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from deflow_torchrl.algorithms.registry import ALGORITHMS
from deflow_torchrl.cli.shared import JSON, app, command_line, verb
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs.overrides import override_value
from deflow_torchrl.runs.settings import TrainConfig, setting_names

POLICY_HELP = "%s: the method's name, as fql, or of deflow also prior, its flow alone. [default: %s]"


def _settings_help() -> str:
    """Every setting with its default and description, and the names of every method's own settings."""
    documented = dict(re.findall(r"^ {8}(\w+): (.*?)(?=\n {8}\w|\Z)", TrainConfig.__doc__ or "", re.M | re.S))
    defaults = {item.name: item.default for item in fields(TrainConfig)}
    settings = [
        f"{name}={'deflow' if name == 'algo' else override_value(defaults[name])}: "
        + " ".join(documented.get(name, "").replace("``", "").split())
        for name in setting_names(TrainConfig)
        if name != "task"
    ]
    methods = [f"{name} ({', '.join(setting_names(method.config))})" for name, method in ALGORITHMS.items()]
    listed = [
        "Settings and their defaults:",
        *settings,
        f"Methods, algo=NAME (settings, algo.SETTING=): {', '.join(methods)}.",
    ]
    return "\n\n".join(listed)


@verb(app)
def demo(
    *,
    seed: int = 0,
    quick: bool = False,
    out: Path | None = None,
    json_: Annotated[bool, typer.Option("--json", help="Print nothing but the JSON object.")] = False,
) -> None:
    """Generate cube-single data, train DeFlow on it, compare it with its prior and write a report.

    About ten minutes on two CPU cores. The data is generated once, into $DEFLOW_HOME (default
    ~/.cache/deflow_torchrl), and found there by later runs. The last line of output is one JSON object.

    Args:
        seed: Seed of networks, batches and noise.
        quick: Every phase on less data, in one to two minutes, without a success target.
        out: Run folder. [default: runs/demo-seedN]
    """
    from deflow_torchrl.runs.demo import FULL, QUICK, describe, run_demo

    result = run_demo(QUICK if quick else FULL, seed=seed, command=command_line(), out=out)
    if not json_:
        print(describe(result))
    print(json.dumps(result))


@verb(app, epilog=_settings_help())
def train(
    settings: list[str] | None = None,
    *,
    preset: str | None = None,
    json_: JSON = False,
) -> dict[str, Any]:
    """Train a method on a data set, then online: deflow train task=NAME [online_steps=N] [KEY=VALUE...]

    NAME: an OGBench single-task name; one of the paper's D4RL names (door-human-v1); minari:ID, any Minari set; file:FOLDER, a
    set made by deflow data import. env=GYMNASIUM_ID says where own data is evaluated; env=none does without for a Minari set.

    seeds=[0,1,2] trains a run for each of these seeds, all at once in this process and offline, into OUT/seed0, OUT/seed1...;
    deflow resume OUT goes on with all of them, deflow eval OUT/seed0 evaluates one.

    Settings are given as in Hydra (hidden_dims=[256,256]) and listed below; a default of null is the task's (deflow tasks lists
    the paper's) or none. Of the method, algo.lr and so on, the defaults are the paper's; gamma, q_aggregation, target_divergence
    and what Table 6 has for other methods are the task's. preset=paper or preset=released, as --preset, decides where the paper
    and its authors' code disagree; settings that are given are as given (docs/tasks.md).

    Example: deflow train task=cube-single-play-singletask-task2-v0 seed=1 offline_steps=200000 online_steps=50000 out=runs/cube

    Args:
        settings KEY=VALUE...: Settings, as in Hydra.
        preset paper|released: Whose values to take where the paper and its authors' code disagree. [default: docs/tasks.md]
    """
    from deflow_torchrl.runs import compose_config, default_out
    from deflow_torchrl.runs import train as train_run

    settings = settings or []
    if preset is not None:
        if any(setting.startswith("preset=") for setting in settings):
            raise InputError("give --preset or preset=, not both")
        settings = [*settings, f"preset={preset}"]
    config = compose_config(settings)
    return _print_trained(train_run(config, command=command_line()), Path(config.out or default_out(config)))


@verb(app)
def resume(
    run: Path,
    settings: list[str] | None = None,
    *,
    force: bool = False,
    step: Annotated[int | None, typer.Option(min=0)] = None,
    json_: JSON = False,
) -> dict[str, Any]:
    """Go on with an interrupted run from its last checkpoint; on a CPU the result is that of a run never interrupted.

    Settings, given here or edited in RUN/config.yaml, are compared with those the checkpoint was trained with. Where any that
    can change a result differs (more steps too), the command lists them and stops; --force goes on with the new ones and
    writes them to RUN/config.yaml. Another task or method is another run. Versions of torch and the simulators count as
    settings; out, data_root, download, eval_workers, logger, save_interval and video may change freely.

    Example: deflow resume runs/cube online_steps=200000 --force

    Args:
        run: Run folder.
        settings KEY=VALUE...: Settings to change, as in Hydra.
        force: Go on although settings differ.
        step: Go on from this kept checkpoint; later ones are removed. [default: the last]
    """
    from deflow_torchrl.runs import resume as resume_run

    result = resume_run(run, command=command_line(), overrides=settings or [], force=force, step=step)
    return _print_trained(result, run)


@verb(app, "eval")
def evaluate(
    runs: list[Path],
    *,
    paired: bool = False,
    episodes: Annotated[int | None, typer.Option(min=1)] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=POLICY_HELP % ("This policy alone", "all; with --paired the method's own")),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31)] = None,
    device: str | None = None,
    candidates: Annotated[int | None, typer.Option(min=1)] = None,
    selection: Annotated[str, typer.Option(metavar="final|base")] = "final",
    iterations: Annotated[int | None, typer.Option(min=1)] = None,
    offline: bool = False,
    held_out: str | None = None,
    fit_updates: Annotated[int | None, typer.Option(min=2)] = None,
    json_: JSON = False,
) -> dict[str, Any]:
    """Evaluate the policies of a run's last checkpoint on common starts; the same run gives the same numbers twice.

    Several runs are evaluated one after the other. With --paired two runs of one task meet the same starts and the same noise,
    and the difference B - A is reported with its 95% interval (bootstrap over the episodes); where the task is judged by
    success also how often both, only one or neither succeeded, with the exact p-value of that.

    --candidates and --iterations spend more on every action of the run's acting policy, or of --policy; nothing is trained, and
    the outcome's name says what was done.

    --offline judges the acting policy by held-out episodes and steps no simulator: how well its flow predicts their actions, how
    far it shifts them, its critics against the observed returns, and fitted Q evaluation. None of these is a success rate,
    and over eleven runs of one task none of them ranked the runs by success (docs/train.md).

    Example: deflow eval runs/offline runs/online --paired --episodes 200

    Args:
        runs RUN...: Run folders.
        paired: Compare two runs of one task episode by episode: B - A with an interval.
        episodes: Episodes of each policy. [default: the run's]
        workers: Processes that step environments; they change no number. [default: the run's]
        seed: Seed of starts and noise. [default: that of training's evaluations]
        device: Device of the policies. [default: the run's]
        candidates: Draw so many actions and execute the best by the mean of the critics.
        selection: With --candidates: the best by the Q of the action, or of its base.
        iterations: Of DeFlow: apply the refinement so often (1 is the policy as trained).
        offline: Judge by held-out data, without a simulator.
        held_out: With --offline: data the run was not trained on, a task's name, minari:ID or file:FOLDER. [default: the data's
          validation split]
        fit_updates: With --offline: updates of the fitted Q evaluation. [default: 50 / (1 - gamma)]
    """
    if offline:
        others = (episodes, policy, workers, candidates, iterations)
        if paired or any(option is not None for option in others):
            raise InputError("--offline goes with --held-out, --fit-updates, --seed and --device alone")
        return _evaluate_offline(runs, held_out, fit_updates, seed, device)
    if held_out is not None or fit_updates is not None:
        raise InputError("--held-out and --fit-updates are for --offline")
    if paired and len(runs) != 2:
        raise InputError(f"--paired compares two runs, {len(runs)} given: deflow eval RUN_A RUN_B --paired")
    from deflow_torchrl.reports.records import summarize
    from deflow_torchrl.runs import compare_runs, evaluate_run
    from deflow_torchrl.runs.evaluate import ACTING, TestTime

    options: dict[str, Any] = {"episodes": episodes, "policy": policy, "workers": workers, "device": device}
    if candidates is not None or iterations is not None:
        if paired:
            raise InputError(
                "--candidates and --iterations are not for --paired: benchmarks/test_time.py compares them in pairs"
            )
        options |= {"policy": policy or ACTING, "test_time": TestTime(candidates, selection, iterations)}
    elif selection != "final":
        raise InputError(f"--selection {selection} says how --candidates N are chosen among; give N")
    if seed is not None:
        options["seed"] = seed
    if paired:
        compared = compare_runs(*runs, **options)
        _print_comparison(compared)
        return compared
    results = []
    for run in runs:
        result = evaluate_run(run, **options)
        if len(runs) > 1:
            print(f"{run}, step {result['step']}:")
        print_evaluations(result["evaluations"], result["metric"])
        results.append({"run": str(run), **summarize(result), **result})
    if len(runs) == 1:
        return results[0]
    print("each run by itself; for the difference of two with its interval add --paired")
    return {"runs": results}


def _evaluate_offline(
    runs: list[Path], data: str | None, updates: int | None, seed: int | None, device: str | None
) -> dict[str, Any]:
    from deflow_torchrl.runs.offline import describe, evaluate_offline

    options: dict[str, Any] = {"data": data, "device": device}
    options |= {} if updates is None else {"updates": updates}
    options |= {} if seed is None else {"seed": seed}
    results = []
    for run in runs:
        result = evaluate_offline(run, **options)
        print(f"{run}, step {result['step']}: " + "\n  ".join(describe(result)))
        results.append({"run": str(run), **result})
    return results[0] if len(runs) == 1 else {"runs": results}


def _print_trained(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """Print a run's record or the summary of several seeds; returns the object for ``--json``."""
    from deflow_torchrl.reports.records import summarize

    if "std" in result:
        _print_group(result)
        return result
    print_evaluations(result["evaluations"], result["metric"])
    print(f"Report: {out / 'report.html'}")
    about = {"transitions": result["data"]["transitions"], "time": result["time"]}
    return {"out": str(out), **summarize(result), **about}


def _print_group(summary: dict[str, Any]) -> None:
    digits = ".2f" if summary["metric"] == "success" else ".1f"
    for seed, own in summary["seeds"].items():
        finals = own.get(summary["metric"], {}).items()
        print(f"seed {seed}: " + (", ".join(f"{name} {value:{digits}}" for name, value in finals) or "not evaluated"))
    for name, mean in summary["mean"].items():
        std = summary["std"][name]
        spread = "" if std is None else f", standard deviation over seeds {std:{digits}}"
        print(f"{name}: {summary['metric']} {mean:{digits}}{spread}")
    print(f"Reports: {Path(summary['out']) / 'seed*' / 'report.html'}")


def print_evaluations(evaluations: dict[str, Any], metric: str) -> None:
    """Print a line about each policy."""
    if not evaluations:
        print("not evaluated: there is no environment (env=)")
    for name, outcome in evaluations.items():
        parts = [] if metric == "return" else [f"success {outcome['success_rate']:.2f}"]
        parts += [f"normalised score {outcome['mean_score']:.1f}"] if "mean_score" in outcome else []
        parts += [f"return {outcome['mean_return']:.1f}"] if metric == "return" else []
        print(f"{name}: {', '.join(parts)} over {outcome['episodes']} episodes")


def _print_comparison(compared: dict[str, Any]) -> None:
    for label, run in compared["runs"].items():
        print(f"{label}: {run['run']}, step {run['step']}")
        print_evaluations({run["policy"]: run["outcome"]}, compared["metric"])
    name = {"success": "success", "score": "normalised score", "return": "return"}[compared["metric"]]
    digits = ".3f" if compared["metric"] == "success" else ".1f"
    difference = compared["difference"]
    mean, low, high = (format(difference[key], f"+{digits}") for key in ("mean", "low", "high"))
    print(
        f"B - A: {name} {mean}, 95% interval {low} to {high} "
        f"(paired bootstrap over {difference['pairs']} episodes, seed {compared['seed']})"
    )
    if "counts" in compared:
        counts = compared["counts"]
        print(
            f"both succeed {counts['both']}, only A {counts['only_a']}, only B {counts['only_b']}, neither {counts['neither']}; "
            f"exact two-sided p-value of only A against only B: {compared['p_value']:.3g}"
        )
