"""Measure the behaviour that a rebuilding of the package must not change; recorded values are in ``tests/frozen``.

``python -m tests.support.frozen [updates] [single] [once] [commands]`` measures again and writes them. Record only where a
change of numbers is intended, and give the reason in the commit. The values now there are those of version 0.1.0.

How the values are derived:

* Networks have hidden layers (32, 32); there are O = 4 observations and A = 3 actions, 16 rows a batch. Each weight is drawn from
  a generator seeded by the CRC-32 of its name (``qvalue_network_params/module/mlp/0/weight``), each batch by its number, so that
  neither depends on the order in which networks are made.
* ``updates``: 20 updates in float64 with the kernels off. Random draws are given under their keys, or drawn from torch's global
  generator, where another order gives other numbers. Kept are every loss and metadata of every update, and of each parameter at
  the end its sum, its dot product with a fixed vector, its first and its last entry.
* ``single``: each of these updates on its own in float32 with the kernels, from the weights and the optimiser's state that the
  float64 trajectory has there. Kept are the losses and each parameter's dot product after the update.
* ``once``: losses of one batch with a mask, with priority weights and with other reductions; each term asked for by its own
  method; weights as a seed initialises them; actions of every policy.
* ``commands``: runs, a sweep's plan, a report and exported policies, made by the command line. Runs compute in float32, as their
  data are. Evaluations and wall times are left out: they depend on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tensordict import TensorDict

from deflow_torchrl.algorithms import Learner, ProblemSpec, get_algorithm
from deflow_torchrl.modules.kernels import use_kernels
from deflow_torchrl.trainers import UpdateStep

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "tests" / "frozen"
OBSERVATION_DIM, ACTION_DIM, BATCH, UPDATES = 4, 3, 16, 20

METHODS = {
    "deflow": {}, "fql": {"alpha": 10.0}, "ifql": {"num_samples": 4}, "iql": {"temperature": 2.0},
    "rebrac": {"actor_bc_coef": 0.3, "critic_bc_coef": 0.2}, "fbrac": {"alpha": 10.0}, "fawac": {"temperature": 1.0},
    "bc": {}, "flow_bc": {},
}  # fmt: skip
VARIANTS = {
    **{name: (name, settings) for name, settings in METHODS.items()},
    "deflow, min": ("deflow", {"q_aggregation": "min", "normalize_q_loss": False}),
    "deflow, sum": ("deflow", {"divergence_reduction": "sum", "min_alpha": 2.0, "max_alpha": 2.7, "flow_steps": 3}),
    "deflow, fixed": ("deflow", {"fixed_alpha": 3.0, "target_divergence": 0.5}),
    "deflow, fixed and squared": ("deflow", {"fixed_alpha": 3.0, "square_fixed_alpha": True, "gamma": 0.5, "tau": 0.1}),
    "fql, min": ("fql", {"alpha": 3.0, "q_aggregation": "min", "normalize_q_loss": True, "lr": 1e-3}),
    "fbrac, min": ("fbrac", {"alpha": 3.0, "q_aggregation": "min", "normalize_q_loss": True}),
    "fawac, clipped": ("fawac", {"temperature": 10.0, "max_weight": 1.5}),
    "iql, expectile": ("iql", {"temperature": 10.0, "expectile": 0.7}),
    "rebrac, every update": ("rebrac", {**METHODS["rebrac"], "period": 1, "policy_noise": 0.5, "noise_clip": 0.3}),
}  # fmt: skip
FROZEN = ("deflow, frozen", "deflow, frozen and given base actions")
TERMS = ("flow_loss", "actor_loss", "alpha_loss", "value_loss", "qvalue_loss")


# -- building ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def normal(name: str, *shape: int) -> torch.Tensor:
    """N(0, I) in float64, the same for the same name and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def parameters(loss: torch.nn.Module) -> dict[str, torch.Tensor]:
    """``X_params/PATH`` -> tensor, targets included."""
    found = sorted({key.split(".")[0] for key in loss.state_dict() if key.split(".")[0].endswith("_params")})
    return {
        "/".join([name, *([key] if isinstance(key, str) else key)]): tensor
        for name in found
        for key, tensor in getattr(loss, name).items(True, True)
    }


def build(method: str, settings: dict, *, seeded: bool = False) -> Learner:
    """A learner whose weights are a function of their names, or those that torch's seed 0 gives."""
    problem = ProblemSpec(
        observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM, hidden_dims=(32, 32), gamma=0.9, q_aggregation="mean",
        target_divergence=0.01, device=torch.device("cpu"),
    )  # fmt: skip
    algorithm = get_algorithm(method)
    torch.manual_seed(0)
    learner = algorithm.build(algorithm.config(**settings), problem)
    if not seeded:
        # Targets first: of a part without targets of its own they are the same tensors.
        for name, tensor in sorted(parameters(learner.loss).items(), key=lambda it: not it[0].startswith("target_")):
            _initialise(name, tensor.data)
    return learner


def _initialise(name: str, tensor: torch.Tensor) -> None:
    if name.rsplit("/", maxsplit=1)[-1] not in ("weight", "bias"):
        return
    values = normal(name, *tensor.shape)
    if name.endswith("bias"):
        values = 0.1 * values
    elif bool((tensor == 1).all()):  # a LayerNorm's
        values = 1 + 0.1 * values
    else:
        values = values / tensor.shape[-1] ** 0.5
    tensor.copy_(values)


def make_batch(number: int, dtype: torch.dtype, *, draws: bool, base_actions: bool = False) -> TensorDict:
    """Batch of this number; ``draws`` are the random numbers of the losses, under their keys."""

    def entry(name: str, dim: int) -> torch.Tensor:
        return normal(f"{name} {number}", BATCH, dim).to(dtype)

    terminated, truncated = entry("terminated", 1) > 1, entry("truncated", 1) > 1
    batch = TensorDict(
        observation=entry("observation", OBSERVATION_DIM),
        action=entry("action", ACTION_DIM).tanh(),
        next=TensorDict(
            observation=entry("next observation", OBSERVATION_DIM),
            action=entry("next action", ACTION_DIM).tanh(),
            reward=entry("reward", 1),
            terminated=terminated,
            truncated=truncated & ~terminated,
            done=terminated | truncated,
            batch_size=[BATCH],
        ),
        batch_size=[BATCH],
    )
    if draws:
        batch["noise"] = entry("noise", ACTION_DIM)
        batch["next", "noise"] = entry("next noise", ACTION_DIM)
        batch["flow_noise"] = entry("flow noise", ACTION_DIM)
        batch["flow_time"] = entry("flow time", 1).sigmoid()
    if base_actions:
        batch["base_action"] = entry("base action", ACTION_DIM).tanh()
        batch["next", "base_action"] = entry("next base action", ACTION_DIM).tanh()
    return batch


def fingerprint(loss: torch.nn.Module) -> dict[str, list[float]]:
    """Sum, dot product with a fixed vector, first and last entry of each parameter."""
    out = {}
    for name, tensor in {**parameters(loss), **_multiplier(loss)}.items():
        flat = tensor.detach().double().flatten()
        out[name] = [flat.sum().item(), (flat @ normal(f"dot {name}", len(flat))).item(), *flat[[0, -1]].tolist()]
    return out


def _multiplier(loss: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {"log_alpha": loss.log_alpha} if hasattr(loss, "log_alpha") else {}


def numbers(out: TensorDict) -> dict[str, float]:
    return {name: value.item() for name, value in sorted(out.items())}


# -- updates ----------------------------------------------------------------------------------------------------------


def train(case: str, *, draws: bool) -> Iterator[tuple[UpdateStep, TensorDict]]:
    """Before each update: the update in float64 and its batch; then, once more, the update after the last."""
    frozen = case in FROZEN
    method, settings = ("deflow", {}) if frozen else VARIANTS[case]
    with default_dtype(torch.float64), use_kernels(False):
        update = UpdateStep(build(method, settings))
    torch.manual_seed(1)
    for number in range(UPDATES):
        if frozen and number == UPDATES // 2:
            update.freeze_prior()
        batch = make_batch(number, torch.float64, draws=draws, base_actions=case == FROZEN[1])
        yield update, batch
    yield update, None


def measure_updates(case: str, *, draws: bool) -> dict:
    """Losses of 20 updates in float64 with the kernels off, and the weights at the end."""
    losses = []
    for update, batch in train(case, draws=draws):
        if batch is not None:
            with use_kernels(False):
                losses.append(numbers(update(batch)))
    return {"losses": losses, "weights": fingerprint(update.learner.loss)}


def measure_single_updates(method: str, *, kernels: bool = True) -> dict:
    """Losses and weights of 20 updates in float32, each from the weights that the float64 trajectory has there."""
    losses, weights = [], []
    for update, batch in train(method, draws=True):
        if batch is None:
            break
        with use_kernels(kernels):
            single = UpdateStep(build(*VARIANTS[method]))
            single.load_state_dict(update.state_dict())
            assert {tensor.dtype for tensor in parameters(single.learner.loss).values()} == {torch.float32}
            losses.append(numbers(single(batch.apply(lambda it: it.float() if it.is_floating_point() else it))))
        weights.append({name: values[1] for name, values in fingerprint(single.learner.loss).items()})
        with use_kernels(False):
            update(batch)
    return {"losses": losses, "weights": weights}


# -- one batch --------------------------------------------------------------------------------------------------------


def measure_once(method: str) -> dict:
    """Masks, priority weights, reductions, single terms, the seeded weights and the policies' actions, in float64."""
    with default_dtype(torch.float64), use_kernels(False):
        seeded = fingerprint(build(method, METHODS[method], seeded=True).loss)
        learner = build(method, METHODS[method])
        loss = learner.loss
        mask = normal("mask", BATCH, 1) > -0.5
        weight = normal("weight", BATCH, 1).exp()
        entries = {"plain": {}, "mask": {("collector", "mask"): mask}, "weights": {"priority_weight": weight}}
        entries["mask and weights"] = {**entries["mask"], **entries["weights"]}
        out: dict = {"seeded": seeded, "losses": {}, "terms": {}, "actions": {}}
        for reduction in ("mean", "sum", "none"):
            loss.reduction = reduction
            for name, extra in entries.items():
                batch = make_batch(0, torch.float64, draws=True).update(extra)
                values = {key: value.tolist() for key, value in sorted(loss(batch).detach().items())}
                if "td_error" in batch:
                    values["td_error"] = batch["td_error"].tolist()
                out["losses"][f"{reduction}, {name}"] = values
        loss.reduction = "mean"
        for term in TERMS:
            if hasattr(loss, term):
                torch.manual_seed(2)
                value, metadata = getattr(loss, term)(make_batch(1, torch.float64, draws=False))
                out["terms"][term] = {
                    "loss": value.item(),
                    **{key: it.tolist() for key, it in sorted(metadata.items())},
                }
        policies = {**learner.evaluated_policies, "online": learner.online_policy}
        for name, policy in policies.items():
            for draws in (True, False):
                torch.manual_seed(3)
                batch = make_batch(2, torch.float64, draws=False).select("observation")
                if draws:  # IFQL's evaluated policy takes a row for each of its four candidates
                    shape = (BATCH, 4, ACTION_DIM) if (method, name) == ("ifql", "ifql") else (BATCH, ACTION_DIM)
                    batch["noise"] = normal("noise to act", *shape)
                with torch.no_grad():
                    action = policy(batch)["action"]
                out["actions"][f"{name}, {'given' if draws else 'drawn'} noise"] = action[:4].tolist()
    return out


# -- the command line -------------------------------------------------------------------------------------------------

RUNS = {
    "frozen": ["algo.flow_steps=2", "offline_steps=6", "online_steps=20", "freeze_prior=true", "base_actions=2"],
    "balanced": ["algo=fql", "algo.alpha=10", "algo.flow_steps=2", "offline_steps=4", "online_steps=16", "mixing=balanced",
                 "utd=0.5", "seed=3"],
    "fifo": ["algo=rebrac", "algo.actor_bc_coef=0.3", "algo.critic_bc_coef=0.2", "offline_steps=3", "online_steps=16",
             "overwrite=fifo", "online_capacity=10", "warmup_steps=3"],
}  # fmt: skip


def measure_commands(folder: Path) -> dict:
    """Rows of three runs and of one killed and resumed, a sweep's plan, a report's tables, exported policies' actions."""
    from tests.support.pendulum import ENVIRONMENT, record_episodes

    options = record_episodes(folder / "pendulum.npz", episodes=4)
    common = [
        f"env={ENVIRONMENT}", "batch_size=8", "hidden_dims=[8,8]", "log_interval=1", "eval_interval=0", "eval_episodes=1",
        "eval_workers=1", "threads=1", "kernels=false", "save_interval=5", f"task=own:{folder / 'pendulum'}",
    ]  # fmt: skip
    killed = folder / "killed"
    _kill_at_first_checkpoint(
        [
            ["data", "import", f"{folder / 'pendulum.npz'}", "--out", f"{folder / 'pendulum'}", *options],
            ["train", *common, f"out={killed}", *RUNS["frozen"]],
        ],
        killed,
    )
    formats = ("pt2", "onnx")
    records = [f"{ROOT / 'benchmarks' / 'results' / name}" for name in ("lite", "offline_to_online")]
    outputs = _deflow(
        [
            ["resume", f"{killed}"],
            *(["train", *common, f"out={folder / name}", *settings] for name, settings in RUNS.items()),
            *(["export", f"{folder / 'frozen'}", "--out", f"{folder / f'policy.{it}'}"] for it in formats),
            ["report", *records, "--md", f"{folder / 'report.md'}"],
            [
                "sweep", "tasks=cube-single", "algos=deflow:fixed_alpha=3,bc", "seeds=0..2", "protocol=lite",
                "hidden_dims=[8]", "algo.lr=0.001", f"out={folder / 'sweep'}", "--dry-run", "--json",
            ],
        ]
    )  # fmt: skip
    return {
        "runs": {name: _rows(folder / name) for name in (*RUNS, "killed")},
        "plan": _plan(json.loads(outputs[-1].splitlines()[-1]), folder),
        "report": [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("|")],
        "actions": {name: _actions(folder / f"policy.{name}") for name in formats},
    }


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def _deflow(jobs: list[list[str]]) -> list[str]:
    """What each command line prints; one process for all."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.commands"], input=json.dumps(jobs), env=_environment(), cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _kill_at_first_checkpoint(jobs: list[list[str]], out: Path) -> None:
    """Run command lines in a process; kill it as soon as the run in ``out`` has a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.commands"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env=_environment(), cwd=ROOT, text=True,
    )  # fmt: skip
    process.stdin.write(json.dumps(jobs))
    process.stdin.close()
    while process.poll() is None and not any((out / "checkpoints").glob("[!.]*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _rows(run: Path) -> list[dict]:
    """Rows of metrics: of evaluations and wall times the names only."""
    return [
        {key: None if key.startswith(("time/", "eval/")) else value for key, value in json.loads(line).items()}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def _plan(estimate: dict, folder: Path) -> dict:
    kept = ("task", "algo", "seeds", "seeds_done", "steps", "stacked", "folder")
    cells = [{key: cell[key] for key in kept} for cell in estimate["cells"]]
    for cell in cells:
        cell["folder"] = str(Path(cell["folder"]).relative_to(folder))
    speeds = [{key: kind[key] for key in ("method", "observation_dim", "action_dim")} for kind in estimate["speeds"]]
    return {"cells": cells, "jobs": estimate["jobs"], "left_out": sorted(estimate["left_out"]), "speeds": speeds}


def _actions(file: Path) -> list:
    from deflow_torchrl.deploy import load_policy

    observation, noise = normal("exported", 8, 3).float().numpy(), normal("its noise", 8, 1).float().numpy()
    return load_policy(file, trusted=True)(observation, noise=noise).tolist()


# -- stored values ----------------------------------------------------------------------------------------------------


def case_name(case: str, draws: bool) -> str:
    return f"{case}; draws {'given' if draws else 'drawn'}"


UPDATE_CASES = [(case, draws) for case in VARIANTS for draws in (True, False)] + [(FROZEN[0], False), (FROZEN[1], True)]


def stored(name: str) -> dict:
    return json.loads((STORED / f"{name}.json").read_text())


def _write(name: str, values: dict, digits: int) -> None:
    def rounded(value):
        if isinstance(value, float):
            return float(f"{value:.{digits}g}")
        if isinstance(value, dict):
            return {key: rounded(it) for key, it in value.items()}
        return [rounded(it) for it in value] if isinstance(value, list) else value

    STORED.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in values.items())
    (STORED / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")


def record(what: list[str]) -> None:
    if "updates" in what:
        _write("updates", {case_name(*it): measure_updates(it[0], draws=it[1]) for it in UPDATE_CASES}, 15)
    if "single" in what:
        _write("single", {method: measure_single_updates(method) for method in METHODS}, 8)
    if "once" in what:
        _write("once", {method: measure_once(method) for method in METHODS}, 15)
    if "commands" in what:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            _write("commands", measure_commands(Path(folder)), 9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(sys.argv[1:] or ["updates", "single", "once", "commands"])
