"""Hold FQLLoss against the authors' agent: same parameters, same batch, same noise; prints the largest differences.

    python benchmarks/fql_against_jax.py --against-jax PATH --jax-python PYTHON

PATH is a checkout of the authors' repository (https://github.com/seohongpark/fql), PYTHON an interpreter that has jax, flax,
optax, distrax and ml_collections. That interpreter runs this file too (`--worker`): it makes the agent and a batch, draws the
noise that the agent's keys give, and writes parameters, losses and gradients, which are then computed here.
"""

import argparse
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ALPHA, GAMMA = 300.0, 0.99
TERMS = {
    "loss_flow": "actor/bc_flow_loss",
    "distillation": "actor/distill_loss",
    "q": "actor/q",
    "loss_qvalue": "critic/critic_loss",
}


def work(arguments: argparse.Namespace) -> None:
    """In the other interpreter: everything of one update of the agent, as an npz on stdout."""
    sys.path.insert(0, str(arguments.against_jax))
    try:
        import jax
        from agents.fql import FQLAgent, get_config
    except ImportError as error:
        sys.exit(f"{sys.executable} cannot run {arguments.against_jax}: {error}; give one that can with --jax-python")
    jax.config.update("jax_default_matmul_precision", "highest")
    rng = np.random.default_rng(arguments.seed)
    rows, obs_dim, action_dim = arguments.batch_size, arguments.obs_dim, arguments.action_dim
    batch = {
        "observations": rng.normal(size=(rows, obs_dim)).astype("float32"),
        "next_observations": rng.normal(size=(rows, obs_dim)).astype("float32"),
        "actions": rng.uniform(-1, 1, size=(rows, action_dim)).astype("float32"),
        "rewards": rng.normal(size=rows).astype("float32"),
        "masks": (rng.random(rows) < 0.9).astype("float32"),
    }
    config = get_config().to_dict() | {
        "alpha": ALPHA, "discount": GAMMA, "q_agg": arguments.q_aggregation, "encoder": None,
        "normalize_q_loss": arguments.normalize,
        "actor_hidden_dims": tuple(arguments.hidden_dims), "value_hidden_dims": tuple(arguments.hidden_dims),
    }  # fmt: skip
    agent = FQLAgent.create(arguments.seed, batch["observations"], batch["actions"], config)
    # Of a new agent the targets are the critics: a few updates tell them apart.
    for _ in range(arguments.updates):
        agent, _ = agent.update(batch)
    key = jax.random.PRNGKey(arguments.seed + 1)
    gradients, info = jax.grad(lambda params: agent.total_loss(batch, params, rng=key), has_aux=True)(
        agent.network.params
    )
    # The keys as total_loss, critic_loss, sample_actions and actor_loss split them.
    _, actor_key, critic_key = jax.random.split(key, 3)
    next_key = jax.random.split(jax.random.split(critic_key)[1])[0]
    rest, flow_key, time_key = jax.random.split(actor_key, 3)
    noise_key = jax.random.split(rest)[1]
    shape = (rows, action_dim)
    draws = {
        "noise": jax.random.normal(noise_key, shape),
        "next_noise": jax.random.normal(next_key, shape),
        "flow_noise": jax.random.normal(flow_key, shape),
        "flow_time": jax.random.uniform(time_key, (rows, 1)),
    }
    arrays = {f"draw/{name}": value for name, value in draws.items()} | {f"batch/{k}": v for k, v in batch.items()}
    arrays |= {f"info/{name}": value for name, value in info.items()}
    for kind, tree in (("params", agent.network.params), ("gradients", gradients)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays["/".join([kind, *(entry.key for entry in path)])] = leaf
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(value) for name, value in arrays.items()})
    sys.stdout.buffer.write(stream.getvalue())


def layers(arrays: dict[str, np.ndarray], kind: str, module: str, depth: int) -> Iterator[np.ndarray]:
    """Weights and biases of an MLP there, in the order of the parameters here: weight, bias and, of critics, scale and shift."""
    (prefix,) = {name.rsplit("/", 2)[0] for name in arrays if name.startswith(f"{kind}/modules_{module}/")}
    for layer in range(depth + 1):
        yield arrays[f"{prefix}/Dense_{layer}/kernel"].swapaxes(-1, -2)
        yield arrays[f"{prefix}/Dense_{layer}/bias"]
        if layer < depth and f"{prefix}/LayerNorm_{layer}/scale" in arrays:
            yield arrays[f"{prefix}/LayerNorm_{layer}/scale"]
            yield arrays[f"{prefix}/LayerNorm_{layer}/bias"]


def compare(arguments: argparse.Namespace, arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest difference of each term and, relative to its largest entry, of each part's gradient."""
    import torch
    from tensordict import TensorDict
    from torchrl.objectives import SoftUpdate, ValueEstimators

    from deflow_torchrl.modules import (
        FlowMatchingPolicy,
        OneStepPolicy,
        make_one_step_network,
        make_qvalue_networks,
        make_velocity_network,
    )
    from deflow_torchrl.objectives import FQLLoss

    sizes = (arguments.obs_dim, arguments.action_dim, arguments.hidden_dims)
    flow = FlowMatchingPolicy(make_velocity_network(*sizes), arguments.action_dim)
    actor = OneStepPolicy(make_one_step_network(*sizes), arguments.action_dim)
    loss = FQLLoss(
        flow, actor, make_qvalue_networks(*sizes), alpha=ALPHA, q_aggregation=arguments.q_aggregation,
        normalize_q_loss=arguments.normalize,
    )  # fmt: skip
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    SoftUpdate(loss, tau=0.005)
    depth = len(arguments.hidden_dims)
    parts = {
        "actor_bc_flow": loss.flow_policy_params, "actor_onestep_flow": loss.actor_network_params,
        "critic": loss.qvalue_network_params, "target_critic": loss.target_qvalue_network_params,
    }  # fmt: skip
    tensors = {}
    for module, params in parts.items():
        found = [value for key, value in params.items(True, True) if key[-1] in ("weight", "bias")]
        given = [torch.from_numpy(value.copy()) for value in layers(arrays, "params", module, depth)]
        tensors[module] = found
        with torch.no_grad():
            for tensor, value in zip(found, given, strict=True):
                tensor.copy_(value)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        names = [name for name in arrays if name.startswith(f"{prefix}/")]
        return {name.removeprefix(f"{prefix}/"): torch.from_numpy(arrays[name].copy()) for name in names}

    batch, draws, rows = part("batch"), part("draw"), arguments.batch_size
    terminated = (batch["masks"] == 0).unsqueeze(-1)
    out = loss(
        TensorDict(
            observation=batch["observations"], action=batch["actions"], noise=draws["noise"],
            flow_noise=draws["flow_noise"], flow_time=draws["flow_time"],
            next=TensorDict(
                observation=batch["next_observations"], reward=batch["rewards"].unsqueeze(-1), terminated=terminated,
                done=terminated, noise=draws["next_noise"], batch_size=[rows],
            ),
            batch_size=[rows],
        )
    )  # fmt: skip
    sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    theirs = {name: float(arrays[f"info/{key}"]) for name, key in TERMS.items()}
    theirs["loss_actor"] = float(arrays["info/actor/actor_loss"] - arrays["info/actor/bc_flow_loss"])
    differences = {}
    for name, value in theirs.items():
        differences[name] = abs(out[name].item() - value)
        print(f"{name:24s} ours {out[name].item(): .8f}  theirs {value: .8f}  difference {differences[name]:.1e}")
    for module in list(parts)[:3]:
        wanted = [torch.from_numpy(value.copy()) for value in layers(arrays, "gradients", module, depth)]
        scale = max(gradient.abs().max().item() for gradient in wanted)
        worst = max((t.grad - g).abs().max().item() for t, g in zip(tensors[module], wanted, strict=True))
        differences[f"gradient of {module}"] = worst / scale
        print(f"gradient of {module:24s} largest entry {scale:.2e}  largest difference {worst / scale:.1e} of it")
    return differences


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against-jax", type=Path, required=True, metavar="PATH", help="the authors' checkout")
    parser.add_argument(
        "--jax-python", default=sys.executable, metavar="PYTHON", help="interpreter that has jax (this)"
    )
    for name, value in (("obs-dim", 28), ("action-dim", 5), ("batch-size", 256), ("seed", 0), ("updates", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[512] * 4)
    parser.add_argument("--q-aggregation", choices=["mean", "min"], default="mean")
    parser.add_argument("--normalize", action="store_true", help="normalise the Q term")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.against_jax / "agents/fql.py").is_file():
        parser.error(
            f"--against-jax {arguments.against_jax} is no checkout of the authors' repository: no agents/fql.py"
        )
    if arguments.worker:
        work(arguments)
        return {}
    command = [arguments.jax_python, __file__, "--worker", *sys.argv[1:]]
    try:
        worker = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    except OSError as error:
        parser.error(f"cannot run --jax-python {arguments.jax_python}: {error.strerror}")
    if worker.returncode:
        sys.exit(2)
    with np.load(io.BytesIO(worker.stdout), allow_pickle=False) as found:
        return compare(arguments, dict(found))


if __name__ == "__main__":
    main()
