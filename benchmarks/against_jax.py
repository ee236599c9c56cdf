"""This package beside the authors' JAX code: one update to the last digits, learning curves of the same runs, time.

    python benchmarks/against_jax.py losses deflow --against-jax PATH --jax-python PYTHON
    python benchmarks/against_jax.py train RUN [RUN ...] --against-jax PATH --jax-python PYTHON [--data-root DIR]
    python benchmarks/throughput.py update --against-jax PATH --jax-python PYTHON

PATH is a checkout of the authors' repository (https://github.com/muzhancun/DeFlow; FQL: https://github.com/seohongpark/fql), of
which only `agents/` and `utils/` are imported; PYTHON is an interpreter that has jax, flax, optax, distrax and ml_collections.

`losses` computes one update on both sides with the same parameters, batch and noise, and prints the largest differences.

`train` takes finished runs of ours (run folders, or kept records with `--data-root`), trains the authors' agent of each with
the same data, settings, number of updates and first weights, and evaluates it at the same steps on the same starts. It
prints both curves and keeps the authors' record beside ours, in `..,code=authors/`, where `deflow report` shows it as a variant.
JAX computes in its own precision, on a CPU in full float32, also where our run did not (`precision=`): times say which.
A record that is there already is not made again; a run that was ended in between begins anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.objectives import LossModule

from deflow_torchrl.algorithms import DeFlowConfig, get_algorithm
from deflow_torchrl.algorithms.base import ProblemSpec
from deflow_torchrl.data.transitions import Transitions
from deflow_torchrl.envs.factory import success_timing
from deflow_torchrl.errors import InputError
from deflow_torchrl.generators import seed_generators
from deflow_torchrl.paths import make_writable_folder, write_text
from deflow_torchrl.processes import interruptible
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.reports.records import METRICS, RECORD_FILE, build_record, load_record
from deflow_torchrl.runs import build, config_from_dict, folder
from deflow_torchrl.runs.evaluate import metrics_row, open_evaluator, outcomes
from deflow_torchrl.runs.settings import SettledConfig, with_task_defaults
from deflow_torchrl.tasks.data import reference_returns
from deflow_torchrl.trainers import EvaluationResult, MetricsLog


@dataclasses.dataclass(frozen=True)
class Counterpart:
    """A method here and in the authors' code.

    Attributes:
        parts: name of a network there -> beginning of its parameters' names in the loss here.
        terms: term or metadata here -> its name in the authors' info.
        others: what their actor loss adds to `loss_actor`.
        settings: setting here -> the authors' name; those that are not named must have their defaults.
    """

    parts: Mapping[str, str]
    terms: Mapping[str, str]
    others: Sequence[str]
    settings: Mapping[str, str]


_COMMON = {
    "lr": "lr",
    "tau": "tau",
    "q_aggregation": "q_agg",
    "flow_steps": "flow_steps",
    "normalize_q_loss": "normalize_q_loss",
}
_CRITICS = {"critic": "qvalue_network_params.", "target_critic": "target_qvalue_network_params."}
COUNTERPARTS = {
    "deflow": Counterpart(
        parts={
            "actor_bc_flow": "actor_network_params.module.0.",
            "refine_onestep_flow": "actor_network_params.module.1.",
            "log_alpha": "log_alpha",
            **_CRITICS,
        },
        terms={
            "loss_flow": "actor/bc_flow_loss",
            "loss_alpha": "actor/alpha_loss",
            "loss_qvalue": "critic/critic_loss",
            "divergence": "actor/distill_loss",
            "alpha": "actor/alpha_value",
        },
        others=("actor/bc_flow_loss", "actor/alpha_loss"),
        settings={**_COMMON, "target_divergence": "target_divergence"},
    ),
    "fql": Counterpart(
        parts={
            "actor_bc_flow": "flow_policy_params.",
            "actor_onestep_flow": "actor_network_params.",
            **_CRITICS,
        },
        terms={
            "loss_flow": "actor/bc_flow_loss",
            "loss_qvalue": "critic/critic_loss",
            "distillation": "actor/distill_loss",
            "q": "actor/q",
        },
        others=("actor/bc_flow_loss",),
        settings={**_COMMON, "alpha": "alpha"},
    ),
}


def add_jax(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--against-jax",
        type=Path,
        metavar="PATH",
        required=required,
        help="the authors' agent too; PATH: their checkout",
    )
    parser.add_argument(
        "--jax-python", default=sys.executable, metavar="PYTHON", help="interpreter that has jax (this one)"
    )


def check_jax(parser: argparse.ArgumentParser, arguments: argparse.Namespace, agent: str = "deflow") -> None:
    checkout = arguments.against_jax
    if checkout and not (checkout / f"agents/{agent}.py").is_file():
        parser.error(f"--against-jax {checkout} is no checkout of the authors' repository: no agents/{agent}.py")


def start_worker(
    arguments: argparse.Namespace, verb: str, agent: str, settings: Mapping[str, Any], **options: Any
) -> subprocess.Popen[bytes]:
    """Start jax_worker.py under the interpreter that was given."""
    command = [arguments.jax_python, str(Path(__file__).with_name("jax_worker.py")), verb, str(arguments.against_jax)]
    command += ["--agent", agent, "--settings", json.dumps(settings)]
    for name, value in options.items():
        if value is True:
            command.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            command += [
                f"--{name.replace('_', '-')}",
                *map(str, value if isinstance(value, (list, tuple)) else [value]),
            ]
    environment = dict(os.environ)
    if torch.get_num_threads() == 1:
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    except OSError as error:
        said = f"cannot run --jax-python {arguments.jax_python}: {error.strerror}"
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr)
        raise SystemExit(2) from None


class Worker:
    """An agent of the authors in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._in, self._out = process, process.stdin, process.stdout
        self.about = json.loads(self._line())

    def _line(self) -> bytes:
        line = self._out.readline()
        if not line:
            raise SystemExit(2)  # the agent has said why
        return line

    def close(self) -> None:
        """End it: at once where it is at work."""
        self._in.close()
        self._out.close()
        self._process.terminate()
        self._process.wait()


class JaxAgent(Worker):
    """Makes one update a call, or what a flag of jax_worker.py says, on random batches."""

    def __init__(self, arguments: argparse.Namespace, *, latency: bool = False) -> None:
        flow_critics = getattr(arguments, "critic", "mse") == "floq"
        widths = list(arguments.hidden_dims)
        settings = {
            "actor_hidden_dims": widths,
            "value_hidden_dims": widths,
            "flow_steps": getattr(arguments, "flow_steps", None) or DeFlowConfig().flow_steps,
            "normalize_q_loss": True,
        }
        if flow_critics:
            settings |= {"block_width": widths[0], "block_depth": len(widths), "r_min": -1.0, "r_max": 0.0}
        pictures = None
        if getattr(arguments, "pixels", False):
            settings["encoder"], pictures = arguments.encoder, arguments.image_shape
        super().__init__(
            start_worker(
                arguments, "time", "deflow_floq" if flow_critics else "deflow", settings, latency=latency,
                batch_size=arguments.batch_size, obs_dim=arguments.obs_dim, action_dim=arguments.action_dim,
                image_shape=pictures,
            )
        )  # fmt: skip

    def __call__(self, in_a_row: int = 1) -> float:
        """Milliseconds of one of so many in a row; of several, one more before them is not timed."""
        self._in.write(b"%d\n" % in_a_row)
        self._in.flush()
        return float(self._line())


class Trained(Worker):
    """An agent that trains, and acts where it is asked to."""

    def update(self, number: int) -> dict[str, Any]:
        """Do so many updates: their ``seconds`` and the ``info`` of the last."""
        self._in.write(b"update %d\n" % number)
        self._in.flush()
        return json.loads(self._line())

    def act(self, observations: np.ndarray, action_dim: int) -> np.ndarray:
        """Actions ``[B, A]`` for observations ``[B, O]``, float32."""
        self._in.write(b"act %d\n" % len(observations) + observations.tobytes())
        self._in.flush()
        read = self._out.read(4 * len(observations) * action_dim)
        return np.frombuffer(read, np.float32).reshape(-1, action_dim).copy()


class AuthorsPolicy(TensorDictModuleBase):
    """The worker's agent as a policy."""

    in_keys = ["observation"]
    out_keys = ["action"]

    def __init__(self, worker: Trained, action_dim: int) -> None:
        super().__init__()
        self._worker, self._action_dim = worker, action_dim

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = self._worker.act(tensordict["observation"].numpy(), self._action_dim)
        return tensordict.set("action", torch.from_numpy(action))


def part_of(loss: LossModule, prefix: str) -> list[torch.Tensor]:
    """Tensors of a network in a loss, layer by layer."""
    named = itertools.chain(loss.named_parameters(), loss.named_buffers())
    wanted = ("weight", "bias", "log_alpha")
    return [tensor for name, tensor in named if name.startswith(prefix) and name.rsplit(".", 1)[-1] in wanted]


# One update -----------------------------------------------------------------------------------------------------------


def compare_losses(arguments: argparse.Namespace) -> dict[str, float]:
    """Largest difference of each term and, relative to its largest entry, of each network's gradient."""
    counterpart, algorithm = COUNTERPARTS[arguments.method], get_algorithm(arguments.method)
    own: dict[str, Any] = {"alpha": 300.0} if "alpha" in counterpart.settings else {}  # it has no default
    own |= {"q_aggregation": arguments.q_aggregation}
    if arguments.normalize is not None:
        own["normalize_q_loss"] = arguments.normalize
    config = algorithm.config(**own)
    problem = ProblemSpec(
        observation_dim=arguments.obs_dim, action_dim=arguments.action_dim, hidden_dims=arguments.hidden_dims, gamma=0.99,
        q_aggregation=arguments.q_aggregation, target_divergence=1e-3, device=torch.device("cpu"),
    )  # fmt: skip
    loss = algorithm.build(config, problem).loss
    settings = authors_settings(
        counterpart, vars(config) | {"target_divergence": 1e-3}, arguments.hidden_dims, gamma=0.99
    )
    worker = start_worker(
        arguments, "losses", arguments.method, settings, batch_size=arguments.batch_size, obs_dim=arguments.obs_dim,
        action_dim=arguments.action_dim, seed=arguments.seed, updates=arguments.updates, full_precision=True,
    )  # fmt: skip
    written, _ = worker.communicate()
    if worker.returncode:
        raise SystemExit(2)  # it has said why
    with np.load(io.BytesIO(written), allow_pickle=False) as found:
        arrays = {name: torch.from_numpy(np.array(found[name])) for name in found}

    def weights(kind: str, network: str, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [arrays[f"{kind}/{network}/{number}"].reshape(it.shape) for number, it in enumerate(tensors)]

    networks = {name: part_of(loss, prefix) for name, prefix in counterpart.parts.items()}
    with torch.no_grad():
        for name, tensors in networks.items():
            for tensor, value in zip(tensors, weights("params", name, tensors), strict=True):
                tensor.copy_(value)
    out = loss(batch_of(arrays))
    sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    theirs = {name: float(arrays[f"info/{key}"]) for name, key in counterpart.terms.items()}
    theirs["loss_actor"] = float(arrays["info/actor/actor_loss"]) - sum(
        float(arrays[f"info/{it}"]) for it in counterpart.others
    )
    differences = {}
    for name, value in theirs.items():
        differences[name] = abs(out[name].item() - value)
        print(f"{name:24s} ours {out[name].item(): .8f}  theirs {value: .8f}  difference {differences[name]:.1e}")
    for name, tensors in networks.items():
        if name.startswith("target_"):
            continue
        wanted = weights("gradients", name, tensors)
        scale = max(gradient.abs().max().item() for gradient in wanted)
        worst = max((t.grad - g).abs().max().item() for t, g in zip(tensors, wanted, strict=True))
        differences[f"gradient of {name}"] = worst / scale
        print(f"gradient of {name:24s} largest entry {scale:.2e}  largest difference {worst / scale:.1e} of it")
    return differences


def batch_of(arrays: Mapping[str, torch.Tensor]) -> TensorDict:
    """The worker's batch and draws in TED."""
    terminated = (arrays["batch/masks"] == 0).unsqueeze(-1)
    rows = len(terminated)
    following = TensorDict(
        observation=arrays["batch/next_observations"], reward=arrays["batch/rewards"].unsqueeze(-1),
        terminated=terminated, done=terminated, noise=arrays["draw/next_noise"], batch_size=[rows],
    )  # fmt: skip
    return TensorDict(
        observation=arrays["batch/observations"], action=arrays["batch/actions"], noise=arrays["draw/noise"],
        flow_noise=arrays["draw/flow_noise"], flow_time=arrays["draw/flow_time"], next=following, batch_size=[rows],
    )  # fmt: skip


def authors_settings(
    counterpart: Counterpart, own: Mapping[str, Any], hidden_dims: Sequence[int], *, gamma: float
) -> dict[str, Any]:
    """The authors' names for the settings of a method here."""
    named = {theirs: own[name] for name, theirs in counterpart.settings.items()}
    return named | {"discount": gamma, "actor_hidden_dims": list(hidden_dims), "value_hidden_dims": list(hidden_dims)}


# Whole runs -----------------------------------------------------------------------------------------------------------


def settings_of(run: Path, record: Mapping[str, Any], data_root: Path | None) -> SettledConfig:
    """Settings of a finished run of ours, all of which the authors' code has.

    Raises:
        InputError: where it lacks one.
    """
    config = with_task_defaults(config_from_dict(dict(record["config"])))
    root = data_root
    if root is None and (run / folder.CONFIG_FILE).is_file():
        root = folder.read_run_settings(run)["config"].get("data_root")
    config = dataclasses.replace(config, data_root=None if root is None else str(root), download=False)
    counterpart = COUNTERPARTS.get(record["algo"])
    if counterpart is None or "code" in record["variant"]:
        raise InputError(f"{run} is no run of ours by {' or '.join(COUNTERPARTS)}")
    usual = {
        "online_steps": 0,
        "chunk_ends": "whole",
        "normalize": "none",
        "p_aug": 0.0,
        "frame_stack": 1,
        "compile": False,
    }
    wrong = [name for name, value in usual.items() if getattr(config, name) not in (value, None)]
    for item in dataclasses.fields(config.algo):
        value, choice = getattr(config.algo, item.name), config.algo.choices.get(item.name, {})
        alike = (item.default, choice.get(None, item.default))
        if item.name not in (*counterpart.settings, "gamma", "name") and value not in alike:
            wrong.append(f"algo.{item.name}")
    if wrong:
        raise InputError(f"{run}: the authors' code has no counterpart of {', '.join(wrong)} as this run has them")
    if build.find_task(config).images:
        raise InputError(f"{run}: pictures are not compared")
    return config


def arrays_of(transitions: Transitions, loss: LossModule, counterpart: Counterpart) -> dict[str, np.ndarray]:
    """Data and first weights for the worker."""
    rows = transitions[:]
    arrays = {
        "data/observations": rows["observation"],
        "data/next_observations": rows["next", "observation"],
        "data/actions": rows["action"],
        "data/rewards": rows["next", "reward"].squeeze(-1),
        "data/masks": 1.0 - rows["next", "terminated"].squeeze(-1).float(),
    }
    for name, prefix in counterpart.parts.items():
        for number, tensor in enumerate(part_of(loss, prefix)):
            arrays[f"start/{name}/{number}"] = tensor.detach().reshape(-1) if name == "log_alpha" else tensor.detach()
    return {name: value.numpy() for name, value in arrays.items()}


def authors_record(run: Path, arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Record of a run of ours and of the authors' code in its place, made if it is not there."""
    ours = load_record(run)
    config = settings_of(run, ours, arguments.data_root)
    out = run.parent.with_name(f"{run.parent.name},code=authors") / run.name
    if (out / RECORD_FILE).is_file():
        return ours, load_record(out)
    check_jax(arguments.parser, arguments, ours["algo"])
    task, counterpart, name = build.find_task(config), COUNTERPARTS[ours["algo"]], ours["algo"]
    device = build.use_device(config, "cpu")
    data = build.load_data(config, task, device)
    if data.about["sha256"] != ours["data"]["sha256"]:
        raise InputError(f"{run} was trained on other data than {config.data_root or 'the default folder'} has")
    references = reference_returns(task)
    size = build.observation_size(data.train)
    assert isinstance(size, int)
    action_dim = config.chunk * data.train.action.shape[-1]
    seed_generators(config.seed)  # as a run does, so that the first weights are its own
    learner = build.build_learner(config, size, action_dim, device)
    gamma = build.step_gamma(config, task)
    transitions = build.training_set(data.train, config, learner, gamma)
    own = vars(config.algo) | {"q_aggregation": config.algo.q_aggregation or task.q_aggregation}
    notes, history = [note for note in ours["history"] if ours["acting"] in note["policies"]], []
    with ExitStack() as stack:
        make_writable_folder(out)
        stack.enter_context(folder.hold_folders([out]))
        evaluator = stack.enter_context(open_evaluator(task, config, device))
        arrays = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "arrays.npz"
        np.savez(arrays, **arrays_of(transitions, learner.loss, counterpart))
        started = start_worker(
            arguments, "train", name, authors_settings(counterpart, own, config.hidden_dims, gamma=gamma**config.chunk),
            batch_size=config.batch_size, seed=config.seed, arrays=arrays,
        )  # fmt: skip
        worker = stack.enter_context(closing(Trained(started)))
        policy, metrics = AuthorsPolicy(worker, action_dim), MetricsLog(out, resume_step=0)
        began, trained, step = time.perf_counter(), 0.0, 0
        bar = progress_bar(total=config.offline_steps, desc=f"the authors' {name}, seed {config.seed}", unit="update")
        row: dict[str, Any] = {}
        result: EvaluationResult | None = None
        for stop in sorted({note["step"] for note in notes} | {config.offline_steps}):
            while step < stop:
                count = min(arguments.at_once, stop - step)
                answer = worker.update(count)
                step, trained = step + count, trained + answer["seconds"]
                bar.update(count)
                if not all(map(math.isfinite, answer["info"].values())):
                    raise InputError(f"a loss of the authors' agent is not finite at step {step}: {answer['info']}")
                row = {f"train/{term}": answer["info"][key] for term, key in counterpart.terms.items()}
            episodes = next((it["policies"][ours["acting"]]["episodes"] for it in notes if it["step"] == stop), None)
            line = {"step": step, "phase": "offline", **row}
            if evaluator is not None and episodes is not None:
                result = evaluator.run(policy, episodes=episodes, seed=ours["seeds"]["evaluation"])
                history.append({"step": step, "phase": "offline", "policies": outcomes({name: result}, references)})
                line |= metrics_row("eval", result, task, references)
            metrics.write({**line, "time/updates": trained})
        bar.close()
        metrics.close()
        record = build_record(
            commands=[shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])],
            config=ours["config"],
            untuned=ours.get("untuned", ()),
            data=ours["data"],
            metric=ours["metric"],
            acting=name,
            variant={**ours["variant"], "code": "authors"},
            success_timing=None if task.environment is None else success_timing(task.environment),
            evaluation_seed=ours["seeds"]["evaluation"],
            evaluations={} if result is None else outcomes({name: result}, references),
            history=history,
            seconds={"train_and_evaluate": time.perf_counter() - began, "updates": trained},
        )
        record["versions"] |= {key: value for key, value in worker.about.items() if key != "device"}
        record["versions"]["authors' code"] = commit_of(arguments.against_jax)
        record["versions"]["authors' precision"] = "JAX's default, whatever config says"
        write_text(out / RECORD_FILE, json.dumps(record, indent=2) + "\n")
    return ours, load_record(out)


def commit_of(checkout: Path) -> str:
    """Commit of a checkout; its folder's name where it is none."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    inside = (checkout / ".git").exists()
    found = subprocess.run(command, capture_output=True, text=True, check=False) if inside else None
    return found.stdout.strip() if found and found.returncode == 0 else checkout.resolve().name


def curve(record: Mapping[str, Any]) -> dict[int, float]:
    metric, acting = METRICS[record["metric"]], record["acting"]
    notes = {note["step"]: note["policies"] for note in record["history"] if acting in note["policies"]}
    return {step: metric.scale * policies[acting][metric.key] for step, policies in notes.items()}


def compare_runs(arguments: argparse.Namespace) -> None:
    """Make what is missing, and print both curves of each task and method."""
    groups: dict[tuple[str, str], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for run in arguments.runs:
        pair = authors_record(run, arguments)
        groups.setdefault((pair[0]["task"], pair[0]["algo"]), []).append(pair)
    for (task, method), pairs in groups.items():
        seeds = ", ".join(str(ours["seeds"]["training"]) for ours, _ in pairs)
        unit = METRICS[pairs[0][0]["metric"]].unit
        print(f"\n{method} on {task}, {unit}; ours / the authors', seed {seeds}\n")
        print("| updates | ours, mean | authors, mean | each seed |\n|---|---|---|---|")
        both = [(curve(ours), curve(theirs)) for ours, theirs in pairs]
        for step in sorted(set.intersection(*(set(it) for pair in both for it in pair))):
            own, other = (statistics.mean(pair[side][step] for pair in both) for side in (0, 1))
            each = ", ".join(f"{ours[step]:.0f} / {theirs[step]:.0f}" for ours, theirs in both)
            print(f"| {step:,} | {own:.0f} | {other:.0f} | {each} |")
        for ours, theirs in pairs:
            taken = [1e3 * it["time"]["updates"] / it["config"]["offline_steps"] for it in (ours, theirs)]
            machines = [it["hardware"]["accelerator"] or it["hardware"]["cpu"] for it in (ours, theirs)]
            precision = ours["config"].get("precision", "highest")
            print(
                f"\nseed {ours['seeds']['training']}: {taken[0]:.1f} ms an update with precision={precision} on {machines[0]}, "
                f"the authors' {taken[1]:.1f} ms on {machines[1]}"
            )


def main() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("losses", help="one update on both sides, with the same parameters, batch and noise")
    verb.add_argument("method", choices=list(COUNTERPARTS))
    for name, value in (("obs-dim", 28), ("action-dim", 5), ("batch-size", 256), ("seed", 0), ("updates", 3)):
        verb.add_argument(f"--{name}", type=int, default=value)
    verb.add_argument("--hidden-dims", type=int, nargs="+", default=[512] * 4)
    verb.add_argument("--q-aggregation", choices=["mean", "min"], default="mean")
    verb.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="the Q term; the method's default")
    add_jax(verb, required=True)
    verb = verbs.add_parser("train", help="the authors' agent with the settings of finished runs of ours; both curves")
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, or folder of a kept record")
    verb.add_argument("--data-root", type=Path, metavar="DIR", help="of the data [default: where the run had them]")
    verb.add_argument("--at-once", type=int, default=500, help="updates between signs of life [default: %(default)s]")
    add_jax(verb, required=True)
    arguments = parser.parse_args()
    arguments.parser = parser
    try:
        if arguments.verb == "losses":
            check_jax(parser, arguments, arguments.method)
            return compare_losses(arguments)
        with interruptible():
            return compare_runs(arguments)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; finished records stay", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
