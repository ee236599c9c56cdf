# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Verbs that show finished runs: ``report``, ``landscape``, ``render``, ``export``, ``play``."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from deflow_torchrl.cli.shared import EXIT_FAILED, JSON, app, verb
from deflow_torchrl.cli.train import POLICY_HELP, print_evaluations
from deflow_torchrl.errors import InputError


@verb(app)
def report(
    paths: list[Path] | None = None,
    *,
    html: Path | None = None,
    md: Path | None = None,
    label: str | None = None,
    last: Annotated[int | None, typer.Option(min=1)] = None,
    refresh: Annotated[float | None, typer.Option(min=1)] = None,
    check: bool = False,
    write: bool = False,
    json_: JSON = False,
) -> dict[str, Any] | None:
    """Tables of finished runs in the paper's layout, with errors and intervals, beside the paper's own numbers.

    Every record.json below the folders is read; runs alike but for the seed make a cell. Without --html and --md the tables are
    printed. Where the data are not the published ones the report says so.

    --refresh writes the page of runs that still train every so many seconds until they end: how far each is, its curves so far,
    and the tables of the finished ones. The page loads itself anew; docs/reports.md shows how to see it from another machine.

    --check recomputes the numbers that stand between markers (docs/reports.md) in the given files, or in README.md, marked pages
    of docs/ and benchmarks/results/**/*.md of this folder, prints one line for each that differs and then exits with 1; --write
    corrects them.

    Example: deflow report runs/small --html report.html --md report.md --label "regenerated data, small protocol"

    Args:
        paths DIR...: Run folders, or folders of them; with --check and --write Markdown files.
        html FILE: Write one self-contained page.
        md FILE: Write the tables as Markdown.
        label TEXT: The first note of page and tables.
        last: Average each run's last evaluations [default: of offline runs on OGBench as long as the paper's its three, of
            others 1].
        refresh SECONDS: Write the page again and again until the runs end. [default of --html: DIR/live.html]
        check: Compare the marked numbers of Markdown files with their records.
        write: Write the records' numbers into the marked places.
    """
    if check or write:
        if html or md or label or last is not None or refresh is not None:
            raise InputError(
                "--check and --write take Markdown files; --html, --md, --label, --last and --refresh are for a report"
            )
        return _check_reports(paths or [], write=write, as_json=json_)
    if not paths:
        raise InputError("name a folder of finished runs: deflow report runs/NAME --html report.html")
    from deflow_torchrl.reports import page

    title = f"Results: {', '.join(path.name or str(path.absolute().name) for path in paths)}"
    if refresh is not None:
        if md:
            raise InputError("--refresh writes a page that changes; --md is for finished runs")
        return _watch(paths, html=html, title=title, label=label, last=last, seconds=refresh)
    summary = page.summarize_runs(paths, label=label, last=last)
    if html:
        page.write_summary_page(summary, html, title=title)
    if md:
        page.write_summary_markdown(summary, md, title=title)
    if html or md:
        print(f"{len(summary.runs)} runs: {', '.join(str(path) for path in (html, md) if path)}")
    else:
        print("\n".join(page.summary_markdown(summary, title=title)))
    return page.summary_json(summary) if json_ else None


@verb(app)
def landscape(
    run: Path,
    second: Path | None = None,
    *,
    state: int,
    out: Path | None = None,
    dims: str | None = None,
    principal: bool = False,
    samples: Annotated[int, typer.Option(min=2, max=4096)] = 256,
    neighbours: Annotated[int, typer.Option(min=2, max=4096)] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**31)] = 0,
    json_: JSON = False,
) -> dict[str, Any]:
    """Draw Q over a slice of actions at one state of the data, with where the data's and the policies' actions lie in it.

    As Figure 2 of the paper: base samples, arrows to the refined ones, and with RUN2 a second method's. What the picture
    suggests is printed in numbers (docs/landscape.md): mean Q by RUN's critics; root-mean-square distance per dimension to the
    5 nearest of the data's actions, and the share of actions further away than 95% of those are from each other; the effective
    number of modes.

    Example: deflow landscape runs/cube-deflow runs/cube-fql --state 1000 --out landscape.svg

    Args:
        run RUN: Run folder of a method with critics.
        second RUN2: Run of the same task whose samples are shown too.
        state INDEX: Which transition of the training data.
        out FILE: .png or .svg, overwritten. [default: RUN/landscape-stateINDEX.png]
        dims I,J: Two action dimensions, the others at the base samples' mean.
        principal: The base samples' two leading principal directions; the default.
        samples: Actions of each policy.
        neighbours: Nearest states of the data whose actions are shown.
        seed: Seed of the noise.
    """
    from deflow_torchrl.runs import draw_landscape

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
    return result


@verb(app)
def export(
    run: Path,
    *,
    format: str | None = None,
    out: Path | None = None,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME", help=POLICY_HELP % ("Which policy", "the method's own"))
    ] = None,
    card: bool = False,
    force: bool = False,
    json_: JSON = False,
) -> dict[str, Any]:
    """Write a policy of a run's last checkpoint as one self-contained file that runs without torchrl (docs/deploy.md).

    The file maps observation [B, O] and, unless the method acts without, noise [B, A] to action [B, A], for any B. onnx needs
    onnxruntime where it runs, pt2 needs torch. Its actions are held against the policy's before it gets its name: 1e-5 apart at
    most, else exit code 1. A policy that chooses among candidates by its critics (ifql) cannot be exported.

    --card writes a model card beside the file, as model hubs show it (README.md: inputs and outputs, data, evaluation, settings,
    versions, checksum), and prints the command that uploads both.

    Example: deflow export runs/cube --format onnx --out cube.onnx

    Args:
        run: Run folder.
        format onnx|pt2: Format of the file. [default: the ending of FILE; onnx]
        out FILE: The file. [default: RUN/POLICY.FORMAT; with --card RUN/export/POLICY.FORMAT]
        card: Write a model card beside it.
        force: Overwrite the file, and a model card.
    """
    from deflow_torchrl.export import export_run

    result = export_run(run, format=format, out=out, policy=policy, card=card, force=force)
    parity = result["parity"]["max_abs_difference"]
    print(
        f"{result['file']}: {result['policy']} at step {result['step']}; its actions are within {parity:.1g} of the run's"
    )
    code = (
        f"from deflow_torchrl.deploy import load_policy; policy = load_policy({result['file']!r}); policy(observation)"
    )
    print(f"run it with: {code}")
    if card:
        print(f"{result['card']}: the model card")
        print(f"upload it with (OWNER/NAME is yours): {result['upload']}")
    return result


@verb(app)
def render(
    run: Path,
    *,
    out: Path,
    policy: str | None = None,
    episodes: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31)] = None,
    every: Annotated[int | None, typer.Option(min=1)] = None,
    size: Annotated[int, typer.Option(min=64, max=1024)] = 256,
    shadows: Annotated[bool | None, typer.Option("--shadows/--no-shadows")] = None,
    device: str | None = None,
    force: bool = False,
    json_: JSON = False,
) -> dict[str, Any]:
    """Write a clip of a run's policies side by side on the same starts, success marked: the episodes that deflow eval counts.

    The policies act as in deflow eval; then a process with a renderer repeats their actions and draws. Every environment with
    gymnasium's render mode rgb_array can be drawn: OGBench's, gymnasium's and those of Minari sets. Where there is no display
    and MUJOCO_GL is not set, egl draws.

    Example: deflow render runs/cube --policy prior,deflow --episodes 3 --out cube.webp

    Args:
        run: Run folder.
        out FILE: The clip: .webp, .gif, or .mp4 (extra video).
        policy NAME,NAME: Policies from left to right. [default: all that the run evaluates, as prior,deflow]
        episodes: Starts, one after the other.
        seed: Seed of the first start. [default: that of training's evaluations]
        every N: Draw every N-th step. [default: so that an episode has 150 pictures at most]
        size PIXELS: Height of a picture.
        shadows: Draw shadows, reflections and smoothed edges. [default: on a GPU only]
        device: Device of the policies. [default: the run's]
        force: Overwrite the file.
    """
    from deflow_torchrl.runs import render_run
    from deflow_torchrl.trainers.evaluation import DEFAULT_EVALUATION_SEED

    result = render_run(
        run,
        out=out,
        policies=None if policy is None else [name.strip() for name in policy.split(",")],
        episodes=episodes,
        seed=DEFAULT_EVALUATION_SEED if seed is None else seed,
        every=every,
        size=size,
        shadows=shadows,
        device=device,
        force=force,
    )
    print_evaluations(result["evaluations"], result["metric"])
    _print_clip(result, f"step {result['step']}, every {result['every']} steps, ")
    return result


@verb(app)
def play(
    file: Path,
    *,
    env: str | None = None,
    episodes: Annotated[int, typer.Option(min=1)] = 3,
    seed: Annotated[int, typer.Option(min=0, max=2**31)] = 0,
    out: Path | None = None,
    force: bool = False,
    json_: JSON = False,
) -> dict[str, Any]:
    """Run an exported policy in a window, or write a clip of it; numpy and onnxruntime compute its actions, without torch.

    FILE is what deflow export wrote as ONNX. Actions in other units than [-1, 1] are mapped to the environment's bounds as in
    training. A window needs a display; --out works without one.

    Example: deflow play cube.onnx --episodes 1 --out cube.webp

    Args:
        file FILE: The policy.
        env ID: An OGBench single-task name, a gymnasium id or minari:ID. [default: that of the run's evaluations]
        episodes: Episodes, one after the other.
        seed: Seed of the first start, from which the others count up, and of the policy's noise.
        out CLIP: Write a clip instead: .webp, .gif, or .mp4 (extra video).
        force: Overwrite the clip.
    """
    from deflow_torchrl.play import play_policy

    result = play_policy(file, environment=env, episodes=episodes, seed=seed, out=out, force=force)
    for number, length in enumerate(result["length"]):
        outcome = f"return {result['episode_return'][number]:.4g}"
        if result["success"] is not None:
            outcome = "success" if result["success"][number] else "no success"
        print(f"start {number + 1} of {episodes}: {outcome} after {length} steps")
    if out is not None:
        _print_clip(result)
    return result


def _print_clip(result: dict[str, Any], about: str = "") -> None:
    if result["not_repeated"]:
        seeds = ", ".join(map(str, result["not_repeated"]))
        print(
            f"the episodes of seeds {seeds} are not the evaluated ones: the environment depends on more than its seed"
        )
    print(f"{result['file']}: {about}{result['bytes'] / 1e6:.2f} MB")


def _watch(paths: list[Path], **options: Any) -> dict[str, Any]:
    from deflow_torchrl.runs import watch_runs

    html, progress = watch_runs(paths, announce=lambda text: print(text, flush=True), **options)
    counts = Counter(run.state for run in progress.runs)
    print(f"{html}: {', '.join(f'{number} {state}' for state, number in counts.items())}")
    return {"file": str(html), "updated": progress.updated, "runs": dict(counts)}


def _check_reports(files: list[Path], *, write: bool, as_json: bool) -> dict[str, Any]:
    from deflow_torchrl.reports.check import check_file, default_files, write_file

    outcomes = [check_file(path) for path in files or default_files(Path())]
    differences = [difference for outcome in outcomes for difference in outcome.differences]
    for outcome in outcomes:
        if write and outcome.differences:
            write_file(outcome)
        if not (outcome.blocks or outcome.values or outcome.differences):
            print(f"{outcome.file}: no marker, nothing was checked")
    left = [it for path in outcomes for it in check_file(path.file).differences] if write else differences
    for difference in left:
        print(difference)
    blocks, values = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("blocks", "values"))
    outcome_of_lines = "were corrected" if write else "differ"
    print(
        f"{blocks} blocks and {values} values in {len(outcomes)} files checked; {len(differences)} lines {outcome_of_lines}"
    )
    result = {"files": len(outcomes), "blocks": blocks, "values": values, "differences": list(map(str, left))}
    if not left:
        return result
    if as_json:
        print(json.dumps(result))
    raise SystemExit(EXIT_FAILED)
