# %% [markdown]
# # A tour: from data to a clip
#
# In three minutes on two cores you generate a data set, look at it, train DeFlow on it, read its
# curves, compare it with its own prior, and see both act.
#
# This file is a script (`python examples/tour.py`) and, cell by cell, a notebook in VS Code, Jupyter (with jupytext) and
# Spyder. `TOUR_QUICK=1` makes every part small: it runs in seconds and learns nothing. Pictures are written to the folder
# `tour`, or to the one that `TOUR_OUT` names.

# %%
import json
import os
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from deflow_torchrl import OGBenchExperienceReplay
from deflow_torchrl.errors import InputError
from deflow_torchrl.runs import compose_config, evaluate_run, render_run, train
from deflow_torchrl.sources.generation import generate_ogbench_dataset, generated_root

globals().pop("__file__", None)  # processes that are started below would run this script again
QUICK = bool(os.environ.get("TOUR_QUICK"))
OUT = Path(os.environ.get("TOUR_OUT", "tour"))
OUT.mkdir(parents=True, exist_ok=True)
TASK, DATASET = "pointmaze-medium-navigate-singletask-task5-v0", "pointmaze-medium-navigate-v0"

# %% [markdown]
# ## Data
#
# OGBench's generator walks a point through a maze to goals that it draws at random. Nobody solved our task on purpose:
# the policy has to stitch a way from parts of these walks. The set is made once and found again by later runs.

# %%
episodes = 2 if QUICK else 100
root = generated_root(DATASET, episodes=episodes, val_episodes=1, seed=0)
generate_ogbench_dataset(DATASET, root, episodes=episodes, val_episodes=1, seed=0)
data = OGBenchExperienceReplay(TASK, root=root, download=False)[:]  # a TensorDict in TorchRL's layout
reached = int(data["next", "terminated"].sum())
print(f"{len(data):,} transitions in {episodes} episodes; {reached} of them reach the task's goal")

# %% [markdown]
# Look at the data before you train on them: where they are, and how wide the actions of one place are spread. A policy
# can only be as good as what these actions add up to.

# %%
place, action = data["observation"].numpy(), data["action"].numpy()
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
left.plot(*place.T, ",", alpha=0.5)
left.set(title="places in the data", aspect="equal", xlabel="x", ylabel="y")
near = np.linalg.norm(place - place[len(place) // 2], axis=1) < 1
right.plot(*action[near].T, ".", alpha=0.3)
right.set(title="actions near one of them", aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
figure.savefig(OUT / "data.png", dpi=80, bbox_inches="tight")

# %% [markdown]
# At one place the data go several ways. A Gaussian would aim between them; a flow represents all of them, and is the
# prior of DeFlow.
#
# ## Train
#
# Three parts learn side by side: the **prior** imitates the data by flow matching, the **critics** learn what an action
# is worth, and the **refinement** shifts each sampled action towards higher value, its mean squared size per dimension
# being held at `target_divergence` (delta). The settings are those of `deflow train`; these are small ones, with a
# learning rate fast enough for minutes.

# %%
run = OUT / "run"
shutil.rmtree(run, ignore_errors=True)
sizes = [
    "offline_steps=20",
    "hidden_dims=[16]",
    "eval_episodes=1",
    "eval_max_steps=50",
    "eval_interval=10",
    "log_interval=5",
]
if not QUICK:
    sizes = ["offline_steps=6000", "hidden_dims=[128,128]", "eval_episodes=5", "eval_interval=2000", "log_interval=200"]
config = compose_config(
    [
        f"task={TASK}", f"out={run}", f"data_root={root}", "download=false", "chunk=5", "eval_workers=1",
        "algo.lr=1e-3", "algo.tau=0.02", "algo.gamma=0.99", "algo.target_divergence=0.01", *sizes,
    ]
)  # fmt: skip
record = train(config, command="python examples/tour.py")

# %% [markdown]
# ## Read the run
#
# The run folder holds everything: `report.html` to read, `record.json` to compute with, `metrics.jsonl` with a line for
# each step that was logged, checkpoints. First the curve of the evaluations with the losses below it.

# %%
shutil.copy(run / "learning_curve.png", OUT / "curve.png")
print(f"{run / 'report.html'} has these curves and every diagnostic with an explanation")

# %% [markdown]
# Two numbers tell whether the trust region works: the **divergence**, the mean squared shift, settles at delta, and
# **alpha**, the multiplier that holds it there, levels off.

# %%
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, name in zip(axes, ("divergence", "alpha"), strict=True):
    points = [(row["step"], row[f"train/{name}"]) for row in rows if f"train/{name}" in row]
    axis.plot(*zip(*points, strict=True))
    axis.set(title=name, xlabel="step", yscale="log")
axes[0].axhline(0.01, color="grey", linestyle="--")
figure.savefig(OUT / "trust-region.png", dpi=80, bbox_inches="tight")

# %% [markdown]
# ## Compare
#
# The prior alone imitates; DeFlow is the same prior with its refinement. Both meet the same starts and draw the same
# noise, so the difference is the refinement's.

# %%
found = evaluate_run(run, episodes=2 if QUICK else 20, show_progress=False)["evaluations"]
for name, outcome in found.items():
    print(f"{name}: success {outcome['success_rate']:.2f} over {outcome['episodes']} episodes")

# %% [markdown]
# ## See it
#
# The same comparison for the eyes: one start, prior and DeFlow side by side. (`deflow render` is the command.)

# %%
try:
    render_run(run, out=OUT / "clip.webp", episodes=1, size=192, force=True, show_progress=False)
except InputError as error:  # no renderer
    print(error)

# %% [markdown]
# From here: [your own data](data.md), [go on online](online.md), [the losses in your own code](losses.md), or [take the
# policy along](share.md).
