"""Time of a full DeFlow update: sampled batch in, all four losses, backward, one optimiser step, target update.

    python benchmarks/throughput.py update --obs-dim 37 --action-dim 5 --batch-size 256 --steps 40 --json
    python benchmarks/throughput.py update --frozen-prior
    python benchmarks/throughput.py update --pixels
    python benchmarks/throughput.py update --critic floq --steps 5
    python benchmarks/throughput.py update --against-jax PATH --jax-python PYTHON
    python benchmarks/throughput.py seeds --seeds 8 --steps 10
    python benchmarks/throughput.py cost --steps 12
    python benchmarks/throughput.py roofline
    python benchmarks/throughput.py precision
    make bench

With a frozen prior there are three losses, and the base actions come from a bank, whose lookup is part of the time. The full
update is then timed too, the two in turns. `--critic floq` times
DeFlow with flow critics. `--plain` adds the update without this package's CPU kernels, `--against-jax` the
authors' agent at the same sizes: PATH is a checkout of their repository, PYTHON an interpreter that has jax, flax and optax.
`--pixels` updates on pictures of the paper's sizes, with an encoder for each part, and prints how far the encodings are from
their convolutions at the rate of a matrix product; an update of 256 pictures takes seconds on a core.
`seeds` times one update of S stacked seeds against S separate updates one after another, and against one; on a GPU all three as
`deflow train` runs them there, drawing included, in CUDA graphs, as milliseconds of one update (`separate` is S times `one`).
`cost` times updates in which one size at a time differs, stacked seeds among them, against one of the sizes given.
`roofline` counts an update's products, times them alone, and says how far each part is from that; `bench` compares these and
other ratios with stored ones, for changes to the code. Machines are noisy: compare
figures of interleaved runs as ratios, never single numbers across machines.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_args

import torch
from against_jax import JaxAgent, add_jax, check_jax
from roofline import clock, measure, measure_encodings, ratio, table, update_products
from tensordict import TensorDict
from torchrl.data import Composite, LazyTensorStorage, TensorDictReplayBuffer, Unbounded

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.algorithms.settings import UPDATE_PRECISIONS
from deflow_torchrl.data import BaseActionBank
from deflow_torchrl.modules import kernels, make_encoder
from deflow_torchrl.modules.encoders import ENCODERS
from deflow_torchrl.modules.flow import Precision
from deflow_torchrl.processes import keep_freed_memory
from deflow_torchrl.trainers import StackedUpdate, UpdateStep
from deflow_torchrl.trainers.graphed import GraphedUpdate

Update = Callable[[TensorDict], object]
Timed = TypeVar("Timed")


def make_update(arguments: argparse.Namespace) -> UpdateStep:
    pictures = Unbounded(arguments.image_shape, dtype=torch.uint8) if arguments.pixels else None
    problem = ProblemSpec(
        observation_dim=arguments.obs_dim,
        observation_spec=None if pictures is None else Composite(observation=pictures),
        encoder=arguments.encoder,
        action_dim=arguments.action_dim,
        hidden_dims=arguments.hidden_dims,
        gamma=0.99,
        q_aggregation="mean",
        target_divergence=1e-3,
        device=torch.device(arguments.device),
        reward_range=(-1.0, 0.0),
    )
    chosen = {name: vars(arguments)[name] for name in ("critic", "flow_steps") if name in vars(arguments)}
    config = DeFlowConfig(**chosen)
    learner = get_algorithm(config.name).build(config, problem)
    precision = getattr(arguments, "precision", "highest")
    return UpdateStep(learner, compile_loss=arguments.compile, precision=precision)


def make_frozen_update(arguments: argparse.Namespace, buffer: TensorDictReplayBuffer) -> Update:
    update = make_update(arguments)
    update.freeze_prior()
    bank = BaseActionBank(update.learner.prior, buffer)
    bank.fill()
    return lambda batch: update(bank(batch))


def make_transitions(arguments: argparse.Namespace, rows: int) -> TensorDict:
    device = torch.device(arguments.device)
    flags = {name: torch.rand(rows, 1, device=device) < 0.01 for name in ("terminated", "truncated")}

    def observations() -> torch.Tensor:
        if arguments.pixels:
            return torch.randint(256, (rows, *arguments.image_shape), dtype=torch.uint8, device=device)
        return torch.randn(rows, arguments.obs_dim, device=device)

    return TensorDict(
        {
            "observation": observations(),
            "action": torch.rand(rows, arguments.action_dim, device=device) * 2 - 1,
            "next": {
                "observation": observations(),
                "reward": -torch.ones(rows, 1, device=device),
                "done": flags["terminated"] | flags["truncated"],
                **flags,
            },
        },
        batch_size=[rows],
        device=device,
    )


def time_updates(timed: dict[str, Callable[[], Timed]], *, steps: int, warmup: int) -> dict[str, list[Timed]]:
    """Milliseconds of each update of each kind, in turns."""
    milliseconds: dict[str, list[Timed]] = {name: [] for name in timed}
    for step in range(warmup + steps):
        for name, once in timed.items():
            elapsed = once()
            if step >= warmup:
                milliseconds[name].append(elapsed)
    return milliseconds


def stopwatch(
    update: Update, buffer: TensorDictReplayBuffer, device: torch.device, *, in_a_row: int = 1
) -> Callable[[], float]:
    """A call that makes so many updates and returns the milliseconds of one, the device synchronised at both ends.

    Of several in a row the first, which finds others' data in the caches, is made but not timed.
    """

    def once() -> float:
        batches = [buffer.sample() for _ in range(in_a_row)]
        if in_a_row > 1:
            update(buffer.sample())

        def row() -> None:
            for batch in batches:
                update(batch)

        return clock(row, device) / in_a_row

    return once


def graphed(
    update: StackedUpdate | UpdateStep, transitions: TensorDict, arguments: argparse.Namespace, *shape: int
) -> Callable[[], float]:
    """The same of updates that draw batches ``[*shape, B]`` themselves, several a replay, as `deflow train` does on a GPU.

    The call raises RuntimeError where a GPU made no graph of them.
    """
    size, device = (*shape, arguments.batch_size), torch.device(arguments.device)

    def draw() -> TensorDict:
        return transitions[torch.randint(len(transitions), size, device=device)]

    per_replay = getattr(arguments, "updates_per_replay", None) or 10
    replayed = GraphedUpdate(update, draw, updates_per_replay=per_replay)
    row = getattr(arguments, "in_a_row", 10) * per_replay

    def once() -> float:
        replayed(per_replay)
        if replayed.fell_back is not None:
            raise RuntimeError(f"no graph: {replayed.fell_back}")
        return clock(lambda: replayed(row), device) / row

    return once


def make_plain_update(arguments: argparse.Namespace) -> Update:
    update = make_update(arguments)

    def plain(batch: TensorDict) -> None:
        with kernels.use_kernels(False):
            update(batch)

    return plain


def add_sizes(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--obs-dim", type=int, default=37)
    verb.add_argument("--action-dim", type=int, default=5)
    verb.add_argument("--batch-size", type=int, default=256)
    verb.add_argument("--hidden-dims", type=int, nargs="+", default=[512] * 4)
    verb.add_argument("--critic", choices=("mse", "floq"), default="mse", help="plain critics, or flow critics too")
    verb.add_argument("--steps", type=int, default=40, help="how many are timed")
    verb.add_argument("--warmup", type=int, default=5)
    verb.add_argument("--device", default="cpu")
    verb.add_argument("--compile", action="store_true", help="torch.compile the losses (a minute or more at the start)")
    verb.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    verb.set_defaults(pixels=False, encoder="impala_small", image_shape=[64, 64, 9])


def make_buffer(arguments: argparse.Namespace) -> TensorDictReplayBuffer:
    transitions = make_transitions(arguments, 4 * arguments.batch_size)
    storage = LazyTensorStorage(len(transitions), device=arguments.device)
    buffer = TensorDictReplayBuffer(storage=storage, batch_size=arguments.batch_size)
    buffer.extend(transitions)
    return buffer


def run_update(arguments: argparse.Namespace) -> dict[str, object]:
    buffer = make_buffer(arguments)
    device = torch.device(arguments.device)
    updates: dict[str, Update] = {"full": make_update(arguments)}
    if arguments.frozen_prior:
        updates["frozen"] = make_frozen_update(arguments, buffer)
    if arguments.plain:
        updates["plain"] = make_plain_update(arguments)
    row = arguments.in_a_row
    timed = {name: stopwatch(update, buffer, device, in_a_row=row) for name, update in updates.items()}
    if arguments.updates_per_replay:
        timed["replayed"] = graphed(make_update(arguments), buffer[:], arguments)
    jax = None
    if arguments.against_jax:
        jax = JaxAgent(arguments)
        timed["jax"] = functools.partial(jax, row)
    try:
        times = time_updates(timed, steps=arguments.steps, warmup=arguments.warmup)
    finally:
        if jax is not None:
            jax.close()
    kind = "frozen" if arguments.frozen_prior else "full"
    medians = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
    result: dict[str, object] = {
        "ms_per_update": medians[kind],
        "ms_min": min(times[kind]),
        "ms_max": max(times[kind]),
        "steps": arguments.steps,
        "in_a_row": row,
        "compile": arguments.compile,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    about = f"(median of {arguments.steps} turns of {row} in a row), {result['threads']} threads"
    print(f"{medians[kind]:.1f} ms per update {about}")

    if arguments.frozen_prior:
        result |= {"full_ms_per_update": medians["full"], "speedup": ratio(times["full"], times["frozen"])}
        print(
            f"{medians['full']:.1f} ms with a prior that learns: the frozen one is {result['speedup']:.2f} times faster"
        )
    if arguments.updates_per_replay:
        per_replay, to_single = arguments.updates_per_replay, ratio(times["replayed"], times["full"])
        result |= {"replayed_ms_per_update": medians["replayed"], "replayed_to_single": to_single}
        print(f"{medians['replayed']:.2f} ms with {per_replay} updates a replay: {to_single:.2f} of single calls")
    if arguments.plain:
        result |= {"plain_ms_per_update": medians["plain"], "to_plain": ratio(times["full"], times["plain"])}
        print(f"{medians['plain']:.1f} ms without the CPU kernels: with them {result['to_plain']:.2f} of it")
    if jax is not None:
        result |= {"jax_ms_per_update": medians["jax"], "to_jax": ratio(times[kind], times["jax"]), **jax.about}
        print(f"{medians['jax']:.1f} ms the authors' JAX agent: ours takes {result['to_jax']:.2f} of it")
    if arguments.pixels:
        encoder = make_encoder(arguments.encoder, Unbounded(arguments.image_shape)).to(device)
        # Prior, refinement and critic at s with gradient; prior, refinement and target critic at s' without.
        row = measure_encodings(
            encoder,
            buffer.sample()["observation"],
            with_gradient=3,
            without=3,
            rounds=arguments.steps,
            warmup=arguments.warmup,
        )
        result["encodings"] = row
        print("the six encodings of an update; floor: their convolutions at the rate of a matrix product")
        print(table({"encodings": row}))
    return result


def run_seeds(arguments: argparse.Namespace) -> dict[str, object]:
    """One update of S stacked seeds against S separate ones one after another, and against one."""
    device, count = torch.device(arguments.device), arguments.seeds
    separate = [make_update(arguments) for _ in range(count)]
    stacked = StackedUpdate([make_update(arguments) for _ in range(count)])
    buffer = make_buffer(arguments)
    batches = make_buffer(argparse.Namespace(**{**vars(arguments), "batch_size": count * arguments.batch_size}))

    def all_separately() -> None:
        for update in separate:
            update(buffer.sample())

    kinds: dict[str, Callable[[], object]] = {
        "stacked": lambda: stacked(batches.sample().reshape(count, -1)),
        "separate": all_separately,
        "one": lambda: separate[0](buffer.sample()),
    }
    timed = {name: functools.partial(clock, kind, device) for name, kind in kinds.items()}
    if device.type == "cuda":
        transitions = buffer[:]
        single = graphed(separate[0], transitions, arguments)
        several = graphed(stacked, transitions, arguments, count)
        timed = {"stacked": several, "separate": lambda: count * single(), "one": single}
    times = time_updates(timed, steps=arguments.steps, warmup=arguments.warmup)
    result: dict[str, object] = {f"{name}_ms": statistics.median(each) for name, each in times.items()}
    result |= {
        "seeds": count,
        "to_separate": ratio(times["stacked"], times["separate"]),
        "to_one": ratio(times["stacked"], times["one"]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else arguments.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(
        f"{result['stacked_ms']:.1f} ms for {count} stacked seeds (median of {arguments.steps}, in turns): "
        f"{result['to_separate']:.2f} of the separate updates' {result['separate_ms']:.1f} ms, {result['to_one']:.2f} times "
        f"one's {result['one_ms']:.1f} ms"
    )
    return result


COSTS: dict[str, tuple[int, ...]] = {
    "flow_steps": (1, 2, 5, 20),
    "batch_size": (64, 1024),
    "width": (128, 256, 1024),
    "action_dim": (2, 21, 64),
    "seeds": (2, 4, 8),
}


def run_cost(arguments: argparse.Namespace) -> dict[str, object]:
    """What an update costs in which one size differs from those given, as a share of one in which none does."""
    device = torch.device(arguments.device)

    def timed(**changes: object) -> Callable[[], float]:
        sizes = argparse.Namespace(**{**vars(arguments), **changes})
        seeds = getattr(sizes, "seeds", 1)
        if seeds == 1:
            return stopwatch(make_update(sizes), make_buffer(sizes), device)
        stacked = StackedUpdate([make_update(sizes) for _ in range(seeds)])
        batches = make_buffer(argparse.Namespace(**{**vars(sizes), "batch_size": seeds * sizes.batch_size}))
        return stopwatch(lambda batch: stacked(batch.reshape(seeds, -1)), batches, device)

    kinds = {"as given": timed()}
    for size, values in COSTS.items():
        for value in values:
            changes = {"hidden_dims": [value] * len(arguments.hidden_dims)} if size == "width" else {size: value}
            kinds[f"{size} {value}"] = timed(**changes)
    times = time_updates(kinds, steps=arguments.steps, warmup=arguments.warmup)
    result = {
        name: {"ms": statistics.median(each), "ratio": ratio(each, times["as given"])} for name, each in times.items()
    }
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {arguments.steps} turns")
    print("| one size differs | ms | of the update as given |\n|---|---|---|")
    for name, row in result.items():
        print(f"| {name} | {row['ms']:.1f} | {row['ratio']:.2f} |")
    return {"device": arguments.device, "torch": torch.__version__, "cost": result}


def measure_parts(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    update = make_update(arguments)
    products = update_products(
        batch_size=arguments.batch_size,
        observation_dim=arguments.obs_dim,
        action_dim=arguments.action_dim,
        hidden_dims=arguments.hidden_dims,
        flow_steps=DeFlowConfig().flow_steps,
    )
    return measure(update, make_buffer(arguments).sample(), products, rounds=arguments.steps, warmup=arguments.warmup)


def run_roofline(arguments: argparse.Namespace) -> dict[str, object]:
    parts = measure_parts(arguments)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {arguments.steps} rounds")
    print(table(parts))
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "parts": parts}


REFERENCE = Path(__file__).with_name("results") / "reference_ratios.json"


def run_bench(arguments: argparse.Namespace) -> dict[str, object]:
    """Ratios of now, those that were stored, and how far apart they are: what a change to the code has cost or gained."""
    buffer, device = make_buffer(arguments), torch.device(arguments.device)
    parts = measure_parts(arguments)
    updates = {"full": make_update(arguments), "plain": make_plain_update(arguments)}
    updates["frozen"] = make_frozen_update(arguments, buffer)
    timed = {name: stopwatch(update, buffer, device) for name, update in updates.items()}
    times = time_updates(timed, steps=arguments.steps, warmup=arguments.warmup)
    now = {f"{name} / floor": part["ratio"] for name, part in parts.items()}
    for of, to in (("full", "plain"), ("frozen", "full")):
        now[f"{of} / {to}"] = ratio(times[of], times[to])
    sizes = {name: vars(arguments)[name] for name in ("obs_dim", "action_dim", "batch_size", "hidden_dims", "device")}
    if arguments.store:
        about = {"sizes": sizes, "threads": torch.get_num_threads(), "torch": torch.__version__, "ratios": now}
        REFERENCE.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    stored = json.loads(REFERENCE.read_text(encoding="utf-8"))
    if stored["sizes"] != sizes:
        print(f"the stored ratios are of other sizes ({stored['sizes']}): not comparable")
    print("| ratio | now | stored | now / stored |\n|---|---|---|---|")
    for name, value in now.items():
        before = stored["ratios"][name]
        print(f"| {name} | {value:.2f} | {before:.2f} | {value / before:.2f} |")
    return {"now": now, "stored": stored["ratios"]}


def run_precision(arguments: argparse.Namespace) -> dict[str, object]:
    """What fewer digits in the sampler's products save, and what they do to its actions and to the losses."""
    buffer, device = make_buffer(arguments), torch.device(arguments.device)
    update = make_update(arguments)
    loss = update.learner.loss
    for _ in range(arguments.warmup):
        update(buffer.sample())
    batch = buffer.sample()
    for key in ("noise", "flow_noise", ("next", "noise")):
        batch.set(key, torch.randn_like(batch["action"]))
    batch["flow_time"] = torch.rand_like(batch["next", "reward"])

    def seen(name: str) -> dict[str, torch.Tensor]:
        loss.sampler_precision = name
        with torch.no_grad(), loss._functional_policies():
            return {**loss(batch).to_dict(), "actions": torch.cat(loss._base_actions(batch, loss._next(batch)))}

    def once(name: str) -> float:
        loss.sampler_precision = name
        return clock(lambda: update(buffer.sample()), device)

    full = seen("highest")
    rows = {}
    for name in get_args(Precision):
        now = seen(name)
        rows[name] = {
            key: float((now[key] - full[key]).norm() / full[key].norm().clamp_min(1e-12))
            for key in ("actions", *update.learner.loss_names)
        }
    times = time_updates(
        {name: functools.partial(once, name) for name in rows}, steps=arguments.steps, warmup=arguments.warmup
    )
    print("relative change of the sampler's actions and of each loss, same draws; time of an update, in turns")
    print(f"| precision | {' | '.join(rows['highest'])} | time |\n|{'---|' * (len(rows['highest']) + 2)}")
    for name, row in rows.items():
        row["time"] = ratio(times[name], times["highest"])
        changes = " | ".join(f"{value:.1e}" for key, value in row.items() if key != "time")
        print(f"| {name} | {changes} | {row['time']:.2f} |")
    return {"precisions": rows, "device": arguments.device, "torch": torch.__version__}


def run_gelu(arguments: argparse.Namespace) -> dict[str, object]:
    rows, width = 2 * arguments.batch_size, arguments.hidden_dims[0]
    device = torch.device(arguments.device)
    x, scratch, out = (torch.randn(rows, width, device=device) for _ in range(3))
    slope, cubic = torch.tensor(2 * math.sqrt(2 / math.pi), device=device), 2 * math.sqrt(2 / math.pi) * 0.044715

    def tanh_form() -> None:
        torch.addcmul(slope / 2, x, x, value=cubic / 2, out=scratch)
        torch.addcmul(x, x, scratch.mul_(x).tanh_(), out=out)

    def sigmoid_form() -> None:
        torch.mul(x, kernels._gate(x, out=scratch), out=out)

    forms: dict[str, Callable[[], object]] = {
        "torch's gelu(approximate='tanh')": lambda: torch.nn.functional.gelu(x, approximate="tanh"),
        "x (1 + tanh u), in place": tanh_form,
        "x sigmoid(2u), in place (the kernels')": sigmoid_form,
    }
    if arguments.compile:
        fused = torch.compile(lambda value: value * torch.sigmoid(slope * value + cubic * value**3))
        began = time.perf_counter()
        fused(x)
        print(f"compiled in {time.perf_counter() - began:.0f} s")
        forms["x sigmoid(2u), compiled"] = lambda: fused(x)

    with torch.no_grad():
        timed = {name: functools.partial(clock, form, device) for name, form in forms.items()}
        times = time_updates(timed, steps=arguments.steps, warmup=arguments.warmup)
    result: dict[str, object] = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
    print(f"[{rows}, {width}], {torch.get_num_threads()} threads, medians of {arguments.steps}, in turns")
    for name, milliseconds in result.items():
        print(f"{milliseconds:.3f} ms  {name}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("update", help="a full update at the given sizes (default: the paper's)")
    add_sizes(verb)
    verb.add_argument("--frozen-prior", action="store_true", help="a frozen prior and a bank of its base actions")
    verb.add_argument(
        "--precision",
        default="highest",
        choices=UPDATE_PRECISIONS,
        help="of every matrix product [default: %(default)s]",
    )
    verb.add_argument("--plain", action="store_true", help="the update without the CPU kernels too, in turns")
    verb.add_argument(
        "--in-a-row", type=int, help="updates of each kind in a turn, after one that is not timed (5; of pictures 1)"
    )
    verb.add_argument(
        "--pixels", action="store_true", help="observations are pictures (3 steps unless --steps is given)"
    )
    verb.add_argument("--image-shape", type=int, nargs=3, metavar=("H", "W", "C"), help="of pictures (64 64 9)")
    verb.add_argument("--encoder", choices=list(ENCODERS), help="of pictures (impala_small)")
    verb.set_defaults(steps=None, warmup=None)
    verb.add_argument(
        "--updates-per-replay",
        type=int,
        help="so many updates as one CUDA graph too, in turns (on a CPU without a graph); 10 on a GPU",
    )
    add_jax(verb)
    verb = verbs.add_parser("seeds", help="stacked seeds against separate updates one after another, and against one")
    add_sizes(verb)
    verb.add_argument("--seeds", type=int, default=8, help="how many are stacked")
    verb = verbs.add_parser("cost", help="an update of other flow steps, batches, widths, action dimensions and seeds")
    add_sizes(verb)
    verb = verbs.add_parser("roofline", help="floor and time of each part of an update")
    add_sizes(verb)
    verb = verbs.add_parser(
        "gelu", help="the activation in several forms, at the shape of a flow sample's hidden layer"
    )
    add_sizes(verb)
    verb = verbs.add_parser(
        "precision", help="fewer digits in the sampler: time, and what becomes of actions and losses"
    )
    add_sizes(verb)
    verb = verbs.add_parser("bench", help="ratios of this code to those stored in results/reference_ratios.json")
    add_sizes(verb)
    verb.add_argument("--store", action="store_true", help="make the ratios of this run the stored ones")
    arguments = parser.parse_args()
    if arguments.verb == "update":
        few = arguments.pixels
        for name, value in (("steps", 3 if few else 40), ("warmup", 1 if few else 5), ("in_a_row", 1 if few else 5)):
            if getattr(arguments, name) is None:
                setattr(arguments, name, value)
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.verb == "update":
        check_jax(parser, arguments)
        if arguments.updates_per_replay is None and torch.device(arguments.device).type == "cuda":
            arguments.updates_per_replay = 10
        if arguments.in_a_row < 1 or (arguments.updates_per_replay or 1) < 1:
            parser.error("--in-a-row and --updates-per-replay must be at least 1")
    if arguments.verb == "seeds":
        if arguments.seeds < 1:
            parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
        if arguments.compile:
            parser.error("--compile: stacked losses cannot be compiled")
    keep_freed_memory()  # as `deflow train` does
    torch.manual_seed(0)
    runs = {
        "update": run_update,
        "seeds": run_seeds,
        "cost": run_cost,
        "roofline": run_roofline,
        "precision": run_precision,
        "gelu": run_gelu,
        "bench": run_bench,
    }
    result = runs[arguments.verb](arguments)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
