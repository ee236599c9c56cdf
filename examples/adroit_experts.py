"""Record the expert policies behind D4RL's door-expert and hammer-expert as Minari sets, in D4RL's reward.

A policy file (dapg_expert_door.npz, dapg_expert_hammer.npz) holds the weights of a small network as plain arrays. It acts
in gymnasium-robotics' AdroitHandDoor-v1 or AdroitHandHammer-v1. Success is printed by any and by the last step of an
episode; the score is D4RL's.

    python examples/adroit_experts.py dapg_expert_door.npz door --episodes 20
"""

import argparse
import sys
import warnings
import zipfile

import numpy as np

from deflow_torchrl.envs import D4RLAdroitReward, normalized_score, reference_returns
from deflow_torchrl.envs.adroit import ADROIT_TASKS, environment_sign
from deflow_torchrl.errors import InputError
from deflow_torchrl.progress import progress_bar
from deflow_torchrl.sources.minari_sets import check_new_id, import_minari


class Expert:
    """A Gaussian policy: two tanh layers for the mean, one deviation per action; inputs and outputs shifted and scaled."""

    def __init__(self, path: str, seed: int) -> None:
        names = ("w0", "b0", "w1", "b1", "w2", "b2", "in_shift", "in_scale", "out_shift", "out_scale", "log_std")
        try:
            with np.load(path, allow_pickle=False) as archive:
                self.weights = {name: archive[name] for name in names}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} holds no expert policy: {error}") from error
        self.generator = np.random.default_rng(seed)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        w = self.weights
        hidden = np.tanh(w["w0"] @ ((observation - w["in_shift"]) / (w["in_scale"] + 1e-8)) + w["b0"])
        hidden = np.tanh(w["w1"] @ hidden + w["b1"])
        mean = (w["w2"] @ hidden + w["b2"]) * w["out_scale"] + w["out_shift"]
        action = mean + np.exp(w["log_std"]) * self.generator.standard_normal(len(mean))
        return np.clip(action, -1.0, 1.0).astype(np.float32)


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="dapg_expert_door.npz or dapg_expert_hammer.npz")
    parser.add_argument("task", choices=["door", "hammer"])
    parser.add_argument("dataset_id", nargs="?", help="id of the new set (TASK/expert-v0)")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1000, help="episode e starts from seed + e")
    arguments = parser.parse_args()
    dataset_id = arguments.dataset_id or f"{arguments.task}/expert-v0"
    if arguments.episodes < 1:
        raise InputError("--episodes must be at least 1")
    minari = import_minari()
    check_new_id(dataset_id)
    import gymnasium
    from minari.data_collector.episode_buffer import EpisodeBuffer

    task = ADROIT_TASKS[arguments.task]
    expert = Expert(arguments.file, arguments.seed)
    if expert.weights["w0"].shape[-1] != task.observation_dim:
        raise InputError(f"{arguments.file} is no policy of {task.name}: it takes other observations")
    env = gymnasium.make(f"{task.environment}-v1", disable_env_checker=True)
    env = D4RLAdroitReward(env) if environment_sign(env) == 1 else env
    episodes, returns, successes = [], [], []
    for number in progress_bar(range(arguments.episodes), desc="episodes", unit="episode"):
        observation, _ = env.reset(seed=arguments.seed + number)
        observations, steps, success = [observation], [], []
        while not steps or not (steps[-1][2] or steps[-1][3]):
            action = expert(observation)
            observation, reward, terminated, truncated, info = env.step(action)
            observations.append(observation)
            steps.append((action, float(reward), terminated, truncated))
            success.append(bool(info["success"]))
        actions, rewards, terminations, truncations = (np.array(column) for column in zip(*steps, strict=True))
        # What minari.DataCollector fills step by step; that one needs jax (minari[create]).
        episodes.append(
            EpisodeBuffer(
                id=number,
                seed=arguments.seed + number,
                observations=np.stack(observations),
                actions=actions,
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
            )
        )
        returns.append(rewards.sum())
        successes.append((any(success), success[-1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # minari asks for an e-mail address, a permanent link, ...
            minari.create_dataset_from_buffers(
                dataset_id,
                episodes,
                env=gymnasium.make(f"{task.environment}-v1", disable_env_checker=True),
                algorithm_name="DAPG expert",
                description=f"hand_dapg's expert in {task.environment}-v1; D4RL's reward",
            )
    except ValueError as error:
        raise InputError(str(error)) from error
    references = reference_returns(f"{task.environment}-v1")
    assert references is not None
    success_any, success_last = np.mean(successes, axis=0)
    score = float(normalized_score(np.mean(returns), *references))
    print(
        f"{dataset_id}: {arguments.episodes} episodes, success {success_any:.2f} (last step {success_last:.2f}), "
        f"return {np.mean(returns):.1f}, normalised {score:.1f}"
    )
    return {"success": float(success_any), "success_last_step": float(success_last), "score": score}


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
