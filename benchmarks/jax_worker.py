"""The authors' JAX agents, for against_jax.py and throughput.py, which start it under the Python that has jax, flax and optax.

    jax_worker.py time PATH ...      milliseconds of one of the N updates, or of one action, for every line N on stdin
    jax_worker.py losses PATH ...    losses, gradients and draws of one update, as an npz on stdout
    jax_worker.py train PATH ...     updates and actions as asked for on stdin

PATH is a checkout of the authors' repository. Weights travel in the layout and order of torch's parameters.
"""

import argparse
import importlib
import io
import json
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
AGENTS = {
    "deflow": ("agents.deflow", "DeFlowAgent"),
    "deflow_floq": ("agents.deflowvf", "DeFlowVFAgent"),
    "fql": ("agents.fql", "FQLAgent"),
}


class Worker:
    """An agent of the checkout, made with the settings that were given."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        sys.path.insert(0, arguments.path)
        name, agent = AGENTS[arguments.agent]
        try:
            import jax

            module = importlib.import_module(name)
        except ImportError as error:
            sys.exit(f"{sys.executable} cannot run {arguments.path}: {error}; give one that can with --jax-python")
        self.jax, self.arguments = jax, arguments
        if arguments.full_precision:
            jax.config.update("jax_default_matmul_precision", "highest")
        settings = {
            name: tuple(it) if isinstance(it, list) else it for name, it in json.loads(arguments.settings).items()
        }
        self.config = module.get_config().to_dict() | {"encoder": None} | settings
        self.make = getattr(module, agent).create
        self.rng = np.random.default_rng(arguments.seed)

    def create(self, batch: Arrays) -> Any:
        return self.make(self.arguments.seed, batch["observations"], batch["actions"], dict(self.config))

    def about(self) -> dict[str, str]:
        names = [
            name
            for name in ("jax", "jaxlib", "flax", "optax", "distrax")
            if metadata.packages_distributions().get(name)
        ]
        return {name: metadata.version(name) for name in names} | {"device": str(self.jax.devices()[0])}

    def random_batch(self) -> Arrays:
        arguments, rng, rows = self.arguments, self.rng, self.arguments.batch_size

        def observations() -> np.ndarray:
            if arguments.image_shape:
                return rng.integers(256, size=(rows, *arguments.image_shape), dtype=np.uint8)
            return rng.normal(size=(rows, arguments.obs_dim)).astype("float32")

        return {
            "observations": observations(),
            "next_observations": observations(),
            "actions": rng.uniform(-1, 1, size=(rows, arguments.action_dim)).astype("float32"),
            "rewards": rng.normal(size=rows).astype("float32"),
            "masks": (rng.random(rows) < 0.9).astype("float32"),
        }

    def wait_for(self, agent: Any, info: Any) -> None:
        self.jax.block_until_ready((agent.network.params, info))

    def leaves(self, tree: Any) -> list[str]:
        """Names of an MLP's leaves in the order of torch's parameters: weight, bias and, of critics, scale and shift."""

        def place(name: str) -> tuple[int, bool, bool]:
            *_, layer, kind = ["_0", *name.split("/")]
            norm, _, number = layer.rpartition("_")
            return int(number), norm.endswith("LayerNorm"), kind == "bias"

        paths = self.jax.tree_util.tree_leaves_with_path(tree)
        return sorted(("/".join(entry.key for entry in path) for path, _ in paths), key=place)

    def as_torch(self, tree: Any) -> list[np.ndarray]:
        """The leaves of an MLP as torch has them."""
        values = {
            "/".join(entry.key for entry in path): leaf for path, leaf in self.jax.tree_util.tree_leaves_with_path(tree)
        }
        return [turned(name, np.asarray(values[name])) for name in self.leaves(tree)]

    def from_torch(self, tree: Any, values: list[np.ndarray]) -> Any:
        """``tree`` with these weights in the places of its own."""
        names = self.leaves(tree)
        given = {name: turned(name, value) for name, value in zip(names, values, strict=True)}

        def replace(path: Any, leaf: Any) -> Any:
            value = given["/".join(entry.key for entry in path)]
            if value.shape != leaf.shape:
                raise SystemExit(f"weights of {path} have shape {value.shape}, the authors' {leaf.shape}")
            return self.jax.numpy.asarray(value)

        return self.jax.tree_util.tree_map_with_path(replace, tree)


def turned(name: str, value: np.ndarray) -> np.ndarray:
    return value.swapaxes(-1, -2) if name.endswith("kernel") else value


def clock(worker: Worker) -> None:
    """For every line N that is read, the milliseconds of one of N updates in a row, or with ``--latency`` of an action (N is 1).

    The device is synchronised at both ends of a row alone, and one update before it is not timed.
    """
    batch = worker.random_batch()
    agent, key = worker.create(batch), worker.jax.random.PRNGKey(worker.arguments.seed)
    print(json.dumps(worker.about()), flush=True)
    for line in sys.stdin:
        batches = [worker.random_batch() for _ in range(int(line))]
        if len(batches) > 1:
            worker.wait_for(*agent.update(worker.random_batch()))
        began = time.perf_counter()
        if worker.arguments.latency:
            key, now = worker.jax.random.split(key)
            np.asarray(agent.sample_actions(batches[0]["observations"], seed=now))
        else:
            for batch in batches:
                agent, info = agent.update(batch)
            worker.wait_for(agent, info)
        print((time.perf_counter() - began) * 1e3 / len(batches), flush=True)


def losses(worker: Worker) -> None:
    """Everything of one update, with the draws that the agent's keys give."""
    jax, arguments = worker.jax, worker.arguments
    batch = worker.random_batch()
    agent = worker.create(batch)
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
    shape = batch["actions"].shape
    draws = {
        "noise": jax.random.normal(noise_key, shape),
        "next_noise": jax.random.normal(next_key, shape),
        "flow_noise": jax.random.normal(flow_key, shape),
        "flow_time": jax.random.uniform(time_key, (shape[0], 1)),
    }
    arrays = {f"draw/{name}": value for name, value in draws.items()} | {f"batch/{k}": v for k, v in batch.items()}
    arrays |= {f"info/{name}": value for name, value in info.items()}
    for kind, trees in (("params", agent.network.params), ("gradients", gradients)):
        for module, tree in trees.items():
            for number, value in enumerate(worker.as_torch(tree)):
                arrays[f"{kind}/{module.removeprefix('modules_')}/{number}"] = value
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(value) for name, value in arrays.items()})
    sys.stdout.buffer.write(stream.getvalue())


def train(worker: Worker) -> None:
    """Train on the arrays of a file, from the weights in it.

    ``update N`` does N updates on batches drawn from the data and answers their seconds and the last one's losses; ``act N``
    reads N observations, float32, and answers N actions.
    """
    jax, arguments = worker.jax, worker.arguments
    with np.load(arguments.arrays, allow_pickle=False) as found:
        data = {name.removeprefix("data/"): found[name] for name in found if name.startswith("data/")}
        start: dict[str, list[np.ndarray]] = {}
        for name in found:
            kind, module, *_ = name.split("/")
            if kind == "start":
                start.setdefault(module, []).append(found[name])
    agent = worker.create({name: values[:1] for name, values in data.items()})
    params = dict(agent.network.params)
    for module, values in start.items():
        params[f"modules_{module}"] = worker.from_torch(params[f"modules_{module}"], values)
    agent = agent.replace(network=agent.network.replace(params=params, opt_state=agent.network.tx.init(params)))
    key = jax.random.PRNGKey(arguments.seed + 1)
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    stdout.write(json.dumps(worker.about()).encode() + b"\n")
    stdout.flush()
    for line in stdin:
        verb, number = line.split()
        if verb == b"update":
            began = time.perf_counter()
            for _ in range(int(number)):
                rows = worker.rng.integers(len(data["rewards"]), size=arguments.batch_size)
                agent, info = agent.update({name: values[rows] for name, values in data.items()})
            worker.wait_for(agent, info)
            seconds = time.perf_counter() - began
            answer = json.dumps({"seconds": seconds, "info": {name: float(value) for name, value in info.items()}})
            stdout.write(answer.encode() + b"\n")
        else:
            width = data["observations"].shape[-1]
            read = stdin.read(4 * int(number) * width)
            key, now = jax.random.split(key)
            observations = np.frombuffer(read, "float32").reshape(-1, width)
            stdout.write(np.asarray(agent.sample_actions(observations, seed=now), "float32").tobytes())
        stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["time", "losses", "train"])
    parser.add_argument("path", help="the authors' checkout")
    parser.add_argument("--agent", choices=list(AGENTS), required=True)
    parser.add_argument("--settings", default="{}", help="of the agent, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--obs-dim", type=int, help="of random batches")
    parser.add_argument("--action-dim", type=int, help="of random batches")
    parser.add_argument("--image-shape", type=int, nargs=3, help="observations are random pictures of this shape")
    parser.add_argument("--latency", action="store_true", help="time the jitted policy instead")
    parser.add_argument("--updates", type=int, default=0, help="losses: updates before")
    parser.add_argument("--full-precision", action="store_true", help="of products, also on a GPU")
    parser.add_argument("--arrays", help="train: npz of data and first weights")
    arguments = parser.parse_args()
    worker = Worker(arguments)
    {"time": clock, "losses": losses, "train": train}[arguments.verb](worker)


if __name__ == "__main__":
    main()
