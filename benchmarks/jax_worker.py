"""One update of the authors' JAX agent for every line on stdin; `throughput.py update --against-jax PATH` starts it.

PATH is a checkout of the authors' repository (https://github.com/muzhancun/DeFlow). This file runs under the Python that has
jax, flax and optax, prints a line of JSON about itself, then for each line read the milliseconds of one update.
"""

import argparse
import json
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    for name in ("obs-dim", "action-dim", "batch-size", "flow-steps", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--hidden-dims", type=int, nargs="+", required=True)
    parser.add_argument("--encoder", help="of pictures")
    parser.add_argument("--image-shape", type=int, nargs=3, help="observations are pictures of this shape")
    parser.add_argument("--critic", choices=("mse", "floq"), default="mse")
    parser.add_argument("--latency", action="store_true", help="time the jitted policy on one observation instead")
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.path)

    try:
        import jax
        import numpy as np

        if arguments.critic == "floq":
            from agents.deflowvf import DeFlowVFAgent as DeFlowAgent
            from agents.deflowvf import get_config
        else:
            from agents.deflow import DeFlowAgent, get_config
    except ImportError as error:
        sys.exit(f"{sys.executable} cannot run {arguments.path}: {error}; give one that can with --jax-python")

    config = get_config().to_dict()
    config |= {"actor_hidden_dims": tuple(arguments.hidden_dims), "value_hidden_dims": tuple(arguments.hidden_dims)}
    config |= {"flow_steps": arguments.flow_steps, "normalize_q_loss": True, "encoder": arguments.encoder}
    rows, rng = arguments.batch_size, np.random.default_rng(arguments.seed)

    def observations() -> np.ndarray:
        if arguments.image_shape:
            return rng.integers(256, size=(rows, *arguments.image_shape), dtype=np.uint8)
        return rng.normal(size=(rows, arguments.obs_dim)).astype("float32")

    def make_batch() -> dict[str, np.ndarray]:
        return {
            "observations": observations(),
            "next_observations": observations(),
            "actions": rng.uniform(-1, 1, size=(rows, arguments.action_dim)).astype("float32"),
            "rewards": -np.ones(rows, "float32"),
            "masks": np.ones(rows, "float32"),
        }

    if arguments.critic == "floq":
        config |= {"block_width": arguments.hidden_dims[0], "block_depth": len(arguments.hidden_dims)}
        config |= {"r_min": -1.0, "r_max": 0.0}
    batch = make_batch()
    agent = DeFlowAgent.create(arguments.seed, batch["observations"], batch["actions"], config)
    print(json.dumps({"jax": jax.__version__, "device": str(jax.devices()[0])}), flush=True)
    key = jax.random.PRNGKey(arguments.seed)
    for _ in sys.stdin:
        batch = make_batch()
        began = time.perf_counter()
        if arguments.latency:
            key, now = jax.random.split(key)
            np.asarray(agent.sample_actions(batch["observations"], seed=now))
        else:
            agent, info = agent.update(batch)
            jax.block_until_ready((agent.network.params, info))
        print((time.perf_counter() - began) * 1e3, flush=True)


if __name__ == "__main__":
    main()
