import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.command_line import benchmark
from tests.support.rendering import missing_renderer
from tests.support.runs import drawn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch):
    pytest.importorskip("gymnasium", reason="the examples use gymnasium's pendulum")

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / name))["main"]()

    return call


def test_the_drop_in_script_is_short_and_runs_to_its_evaluation(run, capsys):
    assert len((EXAMPLES / "drop_in.py").read_text().splitlines()) < 100
    learned = run("drop_in.py", "--steps", "10", "--episodes", "2")
    out = capsys.readouterr().out
    assert f"DeFlow {learned:.0f}" in out
    assert out.count("loss_qvalue") == 5


def test_a_visual_policy_is_trained_on_pictures_drawn_on_the_spot(run, capsys):
    assert len((EXAMPLES / "pixels.py").read_text().splitlines()) < 120
    rate = run("pixels.py", "--steps", "3", "--episodes", "4")
    out = capsys.readouterr().out
    assert "MB of frames" in out
    assert f"deflow: reaches the point in {rate:.0%} of 20 episodes" in out


def test_torchrls_trainer_drives_the_loss(run):
    trainer = run("drop_in_trainer.py", "--frames", "300")
    assert trainer.collected_frames == 300
    loss = trainer.loss_module
    moved = [
        not bool((source == target).all())
        for source, target in zip(
            loss.qvalue_network_params.values(True, True),
            loss.target_qvalue_network_params.values(True, True),
            strict=True,
        )
    ]
    assert all(moved), "the optimiser and the target hook both ran"
    assert loss.log_alpha.item() != 1.0


TOUR_PAGE = EXAMPLES.parent / ".ci" / "tour_page.py"


@pytest.fixture
def tour(monkeypatch):
    """The tour's text; what the environment says of it is put back."""
    for extra, module in (("ogbench", "ogbench"), ("reports", "matplotlib"), ("docs", "mkdocs")):
        pytest.importorskip(module, reason=f"needs the extra {extra}")
    import matplotlib.pyplot as plt

    for name in ("TOUR_QUICK", "TOUR_OUT", "DEFLOW_HOME", "MPLBACKEND"):
        monkeypatch.setenv(name, "Agg")
    drawn(monkeypatch)
    yield (EXAMPLES / "tour.py").read_text()
    plt.close("all")


def drawn_by_the_tour():
    return ["clip.webp"] * (missing_renderer() is None) + ["curve.png", "data.png", "trust-region.png"]


def test_the_tour_goes_from_data_to_a_clip_as_a_page_of_the_site(tour, tmp_path, in_process, short_episodes):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    (tmp_path / "docs").mkdir()
    for linked in ["index.md", *re.findall(r"\]\((\w+\.md)\)", tour)]:
        (tmp_path / "docs" / linked).write_text("# A page\n")
    (tmp_path / "mkdocs.yml").write_text(
        f"site_name: site\nstrict: true\nhooks: [{TOUR_PAGE}]\nplugins: []\nmarkdown_extensions: [admonition]\n"
    )
    build(load_config(str(tmp_path / "mkdocs.yml")))
    folder = tmp_path / "site" / "tour"
    page = (folder / "index.html").read_text()
    assert "120 transitions in 2 episodes; " in page
    assert re.search(r"prior: success \d\.\d\d over 2 episodes\ndeflow: success", page)
    pictures = sorted(path.name for path in folder.iterdir() if path.suffix != ".html")
    assert pictures == drawn_by_the_tour()
    assert all(page.count(f'src="{name}"') == 1 for name in pictures)
    assert page.count('class="language-python"') == tour.count("# %%\n")
    assert page.count("learns nothing. Its numbers") == 1


@pytest.mark.slow
def test_the_whole_tour_learns_its_task(tour, tmp_path, monkeypatch):
    monkeypatch.delenv("TOUR_QUICK")
    monkeypatch.setenv("TOUR_OUT", str(tmp_path / "tour"))
    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path))
    page, pictures = runpy.run_path(str(TOUR_PAGE))["pages"](EXAMPLES / "tour.py", tmp_path / "tour")
    rates = {name: float(rate) for name, rate in re.findall(r"^(prior|deflow): success (\d\.\d\d)", page, re.M)}
    assert rates["deflow"] > rates["prior"]
    assert sorted(pictures) == drawn_by_the_tour()


def test_torchrls_offline_to_online_trainer_and_buffer_take_the_loss(run, capsys):
    assert len((EXAMPLES / "torchrl_trainer.py").read_text().splitlines()) < 125
    trainer = run("torchrl_trainer.py", "--episodes", "2", "--offline-steps", "2", "--frames", "200")
    out = capsys.readouterr().out
    assert "after 2 offline updates" in out
    assert "after 200 frames online" in out
    assert len(trainer.replay_buffer.online_buffer) == 200
    assert trainer.replay_buffer.offline_fraction == 0, "annealed to experience alone"
    assert trainer.loss_module.log_alpha.item() != 1.0


def test_the_page_of_examples_lists_every_one_with_its_command_and_time():
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    listed = re.findall(r"^\| `(?:python )?examples/([\w.]+).*` \| .{20,} \| .+ \|$", page, re.M)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())


def test_a_frozen_diffusion_policy_is_refined_without_being_called(run, capsys):
    assert len((EXAMPLES / "refine_a_frozen_policy.py").read_text().splitlines()) <= 100
    found = run("refine_a_frozen_policy.py", "--rounds", "1", "--cloning-steps", "5", "--steps", "5")
    assert found["calls"] == 0
    assert "5 updates" in (out := capsys.readouterr().out)
    assert f"refined {found['refined']:.0f}" in out
    assert found["refined"] != found["diffusion policy"]


def test_a_frozen_diffusion_policy_is_steered(run, capsys):
    assert len((EXAMPLES / "steer_a_frozen_policy.py").read_text().splitlines()) < 125
    found = run("steer_a_frozen_policy.py", "--rounds", "1", "--cloning-steps", "5", "--steps", "5")
    assert f"steered {found['steered']:.0f}" in capsys.readouterr().out
    assert found["steered"] != found["diffusion policy"]


@pytest.fixture
def unregistered():
    """Looks a registered method up, which is forgotten after the test."""
    from deflow_torchrl.algorithms.registry import ALGORITHMS, get_algorithm

    names = []
    yield lambda name: names.append(name) or get_algorithm(name)
    for name in names:
        ALGORITHMS.unregister(name)


def test_a_method_of_ones_own_is_trained_and_evaluated(run, unregistered, capsys):
    assert len((EXAMPLES / "extending_method.py").read_text().splitlines()) < 115
    learned = run("extending_method.py", "--steps", "5", "--episodes", "1")
    assert f"reward_bc: mean return {learned:.0f} after 5 steps" in capsys.readouterr().out
    assert -2000 < learned < 0, "five episodes of the pendulum"
    assert unregistered("reward_bc").config().temperature == 1.0


def test_a_critic_of_ones_own_sees_which_returns_are_noisy(run, unregistered, capsys):
    found = run("extending_critic.py", "--steps", "150")
    assert f"{found['calm']:.2f} apart in a calm state" in capsys.readouterr().out
    assert found["noisy"] > 2 * found["calm"] > 0
    assert unregistered("deflow_quantile").title == "DeFlow, quantile critic"


def test_a_source_of_ones_own_is_trained_on_and_named_in_the_record(run, tmp_path, capsys):
    from deflow_torchrl.errors import InputError
    from deflow_torchrl.sources import get_source

    record = run("extending_source.py", "--steps", "5", "--episodes", "2")
    assert "night-shift: 398 transitions" in capsys.readouterr().out
    assert record["config"]["task"] == "logbook:night-shift", "not where it lay"
    assert len(record["data"]["sha256"]) == 64
    with pytest.raises(InputError, match=r"has no .txt file"):
        get_source("logbook").load(str(tmp_path))


# minari's DataCollector removes its folder behind tempfile's back, which then says so.
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_a_minari_set_is_recorded_trained_on_and_evaluated(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("minari", reason="needs the extra minari")
    pytest.importorskip("jax", reason="minari's DataCollector needs jax (minari[create])")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert len((EXAMPLES / "minari_offline.py").read_text().splitlines()) < 100
    first = run("minari_offline.py", "--steps", "5", "--episodes", "1")
    out = capsys.readouterr().out
    assert out.count("loss_qvalue") == 5
    assert f"DeFlow {first:.0f}" in out
    assert (tmp_path / "pendulum" / "noisy-swing-up-v0").is_dir()
    assert run("minari_offline.py", "--steps", "5", "--episodes", "1") == first, (
        "found again, and the seed fixes the rest"
    )


def test_a_torchrl_collector_takes_the_policy_online(run, tmp_path, monkeypatch, capsys, in_process):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    from deflow_torchrl.data import OfflineOnlineReplayBuffer
    from deflow_torchrl.trainers import evaluation

    buffers = []
    real_env, real_extend = evaluation.make_gym_env, OfflineOnlineReplayBuffer.extend
    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path))
    monkeypatch.setattr(
        evaluation, "make_gym_env", lambda task, **options: real_env(task, max_episode_steps=20, **options)
    )

    def extend(self, transition):
        buffers.append(self)
        return real_extend(self, transition)

    monkeypatch.setattr(OfflineOnlineReplayBuffer, "extend", extend)
    assert len((EXAMPLES / "offline_to_online.py").read_text().splitlines()) < 100
    before, after = run("offline_to_online.py", "--episodes", "1", "--offline-steps", "4", "--online-steps", "6")
    assert 0 <= before <= 1
    assert f"{before:.2f}, {after:.2f} (4 offline and 6 online steps)" in capsys.readouterr().out
    assert len(buffers) == 6
    assert buffers[0].num_online == 6
    online = buffers[0][buffers[0].num_offline :]
    # The observation after a step is the one before the next.
    torch.testing.assert_close(online["next", "observation"][:-1], online["observation"][1:], rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_benchmark_prints_milliseconds_per_update(frozen, monkeypatch, capsys):
    import json

    sizes = "--obs-dim 4 --action-dim 2 --batch-size 8 --hidden-dims 8 --steps 2 --json"
    more = ["--frozen-prior"] if frozen else []
    code, out, err = benchmark(monkeypatch, capsys, "throughput", "update", *sizes.split(), *more)
    assert code == 0, err
    printed = json.loads(out.splitlines()[-1])
    assert printed["ms_per_update"] > 0
    assert {"full_ms_per_update", "speedup"} <= printed.keys() or not frozen


@pytest.fixture
def adroit(tmp_path, monkeypatch):
    """The folder with real Adroit files; Minari sets go to a folder of the test's own."""
    pytest.importorskip("minari", reason="needs the extra minari")
    pytest.importorskip("gymnasium_robotics", reason="needs the extra minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    folder = Path(os.environ.get("DEFLOW_TEST_DATA") or "nowhere") / "adroit"
    if not folder.is_dir():
        pytest.skip("DEFLOW_TEST_DATA names no folder with the Adroit demonstrations and experts")
    return folder


def test_the_human_demonstrations_become_a_minari_set(run, adroit, capsys, caplog):
    import numpy as np

    from deflow_torchrl.data import MinariExperienceReplay
    from deflow_torchrl.envs.adroit import ADROIT_TASKS, hand_to_object_sign
    from deflow_torchrl.sources.minari_sets import open_minari_dataset

    path = adroit / "door_human_raw.npz"
    run("adroit_demonstrations.py", str(path), "door/human-v0")
    assert capsys.readouterr().out == "door/human-v0: 25 episodes, 6,729 transitions\n"
    assert "D4RLAdroitReward corrects the environment" in caplog.text
    buffer = MinariExperienceReplay("door/human-v0", download=False)
    whole, episodes = buffer[:], list(open_minari_dataset("door/human-v0").iterate_episodes())
    with np.load(path, allow_pickle=False) as raw:
        np.testing.assert_array_equal(whole["observation"], raw["observations"])
        np.testing.assert_array_equal(whole["next", "reward"].squeeze(-1), raw["rewards"])
        np.testing.assert_allclose(whole["action"], raw["actions"].clip(-1, 1), atol=1.1e-5)
        np.testing.assert_array_equal(whole["next", "truncated"].squeeze(-1), raw["timeouts"])
    assert [len(episode) for episode in episodes] == [len(e.observations) - 1 for e in episodes]
    assert hand_to_object_sign(ADROIT_TASKS["door"], [(e.observations, e.rewards) for e in episodes]) == -1
    opened = sum(float(episode.observations[:, 28].max()) > 1.35 for episode in episodes)
    assert opened == 7, "low success is the data"
    # The one observation that was not recorded is close to the one before, and not a copy of it.
    ends = whole["next", "truncated"].squeeze(-1)
    change = (whole["next", "observation"] - whole["observation"])[ends].abs().amax(-1)
    assert change.min() > 0
    assert change.max() < 0.2


# Measured with these seeds: door 1.00 and 102.6, hammer 0.90 and 113.9. The hammer's expert fails now and then: other blocks
# of 20 seeds gave it 0.75 to 0.90, 200 episodes from seed 5000 on 0.92 and 115.8.
@pytest.mark.parametrize(("task", "low", "high"), [("door", 95, 105), ("hammer", 95, 120)])
def test_the_expert_policies_become_minari_sets(run, adroit, task, low, high):
    from deflow_torchrl.data import MinariExperienceReplay
    from deflow_torchrl.envs import normalized_score, reference_returns

    found = run("adroit_experts.py", str(adroit / f"dapg_expert_{task}.npz"), task, "--episodes", "20")
    assert found["success"] > 0.85
    assert low < found["score"] < high
    buffer = MinariExperienceReplay(f"{task}/expert-v0", download=False)
    assert len(buffer) == 20 * 200
    mean_return = buffer[:]["next", "reward"].sum().item() / 20
    references = reference_returns(f"{task}-expert-v1")
    assert normalized_score(mean_return, *references) == pytest.approx(found["score"], abs=0.01)


def test_a_set_that_could_not_be_written_is_refused_before_it_is_recorded(run, tmp_path, monkeypatch):
    from deflow_torchrl.errors import InputError

    pytest.importorskip("minari", reason="needs the extra minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "door" / "mine-v0").mkdir(parents=True)
    path = tmp_path / "policy.npz"
    names = ("w0", "b0", "w1", "b1", "w2", "b2", "in_shift", "in_scale", "out_shift", "out_scale", "log_std")
    import numpy as np

    np.savez(path, **dict.fromkeys(names, np.zeros((1, 39))))
    for dataset_id, message in (("no version", "is no Minari id"), ("door/mine-v0", "already")):
        with pytest.raises(InputError, match=message):
            run("adroit_experts.py", str(path), "door", dataset_id)


@pytest.mark.parametrize(("name", "task"), [("adroit_demonstrations.py", []), ("adroit_experts.py", ["door"])])
def test_the_adroit_scripts_refuse_other_files_in_one_line(run, name, task, tmp_path):
    from deflow_torchrl.errors import InputError

    pytest.importorskip("minari", reason="needs the extra minari")
    path = tmp_path / "other.npz"
    path.write_bytes(b"nothing")
    for file in (path, tmp_path / "none.npz"):
        with pytest.raises(InputError, match=file.name) as caught:
            run(name, str(file), *task)
        assert "\n" not in str(caught.value)


def test_an_exported_policy_acts_in_its_environment_without_torch(run, tmp_path, monkeypatch, capsys, in_process):
    pytest.importorskip("ogbench", reason="needs the extra ogbench")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    from deflow_torchrl.trainers import evaluation

    real_env = evaluation.make_gym_env
    monkeypatch.setattr(
        evaluation, "make_gym_env", lambda task, **options: real_env(task, max_episode_steps=20, **options)
    )
    monkeypatch.setenv("DEFLOW_HOME", str(tmp_path))
    script = EXAMPLES / "deploy_policy.py"
    assert len(script.read_text().splitlines()) < 100
    found = run("deploy_policy.py", "--steps", "4", "--episodes", "1")
    out = capsys.readouterr().out
    assert "deflow of pointmaze-medium-navigate-singletask-task1-v0, step 4: 2 -> 2" in out
    (file,) = tmp_path.glob("examples/*/deflow.onnx")
    code = "import runpy, sys\nfor name in ('torch', 'torchrl', 'tensordict'):\n    sys.modules[name] = None\n"
    code += f"sys.argv = ['deploy_policy.py', {str(file)!r}, '--episodes', '1']\n"
    code += f"print(runpy.run_path({str(script)!r})['main']()['success'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.splitlines()[-1]) == found["success"]
