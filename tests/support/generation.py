"""Data sets that OGBench's oracle generates, made small and in this process."""

import contextlib

import pytest

TASK = "cube-single-play-singletask-task2-v0"
DATASET = "cube-single-play-v0"


@contextlib.contextmanager
def generation_in_process():
    from deflow_torchrl.sources import generation

    def run(dataset, seed, jobs, parts, workers):
        for split, episode in jobs:
            generation._write_episode(dataset, seed, split, episode, parts)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_run_jobs", run)
        yield patch
