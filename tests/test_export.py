"""Export of real runs, trained for a few steps, and of policies of other kinds."""

import collections
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

pytest.importorskip("gymnasium", reason="needs gymnasium's pendulum")
pytest.importorskip("onnxruntime", reason="needs the extra export")
pytest.importorskip("onnxscript", reason="needs the extra export")

from deflow_torchrl import export
from deflow_torchrl.deploy import load_policy
from deflow_torchrl.errors import ExportParityError, InputError
from deflow_torchrl.export import export_policy
from deflow_torchrl.modules import (
    DeFlowActor,
    FlowMatchingPolicy,
    RefinementPolicy,
    kernels,
    make_refinement_network,
    make_velocity_network,
)
from deflow_torchrl.paths import file_sha256
from deflow_torchrl.reports.model_card import write_model_card
from deflow_torchrl.runs.evaluate import load_run
from tests.support.command_line import assert_one_line, deflow
from tests.support.networks import ACTION_DIM, OBSERVATION_DIM, make_actor
from tests.support.pendulum import ENVIRONMENT, record_pendulum

SIZES = {"observation_dim": OBSERVATION_DIM, "action_dim": ACTION_DIM}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a pendulum."""
    folder = tmp_path_factory.mktemp("runs")
    done = deflow(
        "train", f"task={record_pendulum(folder, episodes=2)}", f"env={ENVIRONMENT}", f"out={folder / 'run'}",
        "hidden_dims=[16,24]", "batch_size=8", "offline_steps=3", "eval_interval=0", "eval_episodes=1", "eval_workers=1",
        "threads=1", "algo.flow_steps=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def assert_same_actions(path, policy, observation_dim, action_dim, *, action="action"):
    """The file's actions are the policy's for several batches, far observations included; its manifest is returned."""
    loaded = load_policy(path, trusted=True)
    generator = np.random.default_rng(0)
    for rows in (1, 3, 50):
        observation = 3 * generator.standard_normal((rows, observation_dim), np.float32)
        noise = generator.standard_normal((rows, action_dim), np.float32)
        with torch.no_grad():
            td = TensorDict(observation=torch.from_numpy(observation), noise=torch.from_numpy(noise), batch_size=[rows])
            expected = policy(td)[action]
        np.testing.assert_allclose(loaded(observation, noise=noise), expected, atol=1e-5)
    return loaded.manifest


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_the_exported_actions_are_the_runs_and_the_file_says_what_it_is(run, format, tmp_path):
    out = tmp_path / "new" / f"policy.{format}"
    result = deflow("export", str(run), "--format", format, "--out", str(out), "--json")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    loaded = load_run(run)
    manifest = assert_same_actions(out, loaded.learner.policy, 3, 1)
    said, how, last = result.stdout.splitlines()
    assert json.loads(last) == {**manifest, "file": str(out)}
    assert said.startswith(f"{out}: deflow at step 3; ")
    assert f"load_policy('{out}')" in how
    assert manifest["task"] == "file:pendulum", "of own data the name, not the place"
    assert manifest["environment"] == f"gym:{ENVIRONMENT}"
    assert (manifest["method"], manifest["policy"], manifest["step"]) == ("deflow", "deflow", 3)
    assert manifest["checkpoint_sha256"] == file_sha256(loaded.checkpoint)
    assert manifest["inputs"] == {
        "observation": {"shape": ["batch", 3], "dtype": "float32"},
        "noise": {"shape": ["batch", 1], "dtype": "float32"},
    }
    assert manifest["outputs"] == {"action": {"shape": ["batch", 1], "dtype": "float32"}}
    assert (manifest["action_low"], manifest["action_high"]) == ([-1.0], [1.0])
    assert manifest["noise_law"] == "independent N(0, 1) in every entry"
    assert 0 <= manifest["parity"]["max_abs_difference"] <= 1e-5
    assert torch.__version__.startswith(manifest["versions"]["torch"])
    assert ("onnxruntime" in manifest["versions"]) == (format == "onnx")
    content = out.read_bytes()
    for place in (str(run.parent), sys.prefix, export.__file__.removesuffix("/export.py")):
        assert place.encode() not in content, "nothing of this machine"


def test_a_model_card_says_what_a_hub_and_its_reader_need(run, tmp_path):
    """Inputs, outputs, data, evaluation with interval, limits, versions and digests; nothing of this machine."""
    pytest.importorskip("jinja2", reason="needs the extra reports")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    result = deflow("export", str(copy), "--card", "--json")
    assert result.returncode == 0, result.stderr
    file, card = copy / "export" / "deflow.onnx", copy / "export" / "README.md"
    assert result.stdout.splitlines()[-2].endswith(f"hf upload OWNER/NAME {file.parent}")
    text, record = card.read_text(), json.loads((copy / "record.json").read_text())
    mean = record["evaluations"]["deflow"]["mean_return"]
    for part in (
        "| observation | `batch, 3` | float32 |", "| noise | `batch, 1` |", "| action | `batch, 1` | float32 | -1.0 to 1.0,",
        file_sha256(file), file_sha256(load_run(run).checkpoint), record["data"]["sha256"], f"| deflow | {mean:.4g} |",
        "| algo.flow_steps | 4 |", f"| torch | {record['versions']['torch']} |", "## Known limits", "target_divergence.",
        "task=file:pendulum", "| onnxruntime | - |",
    ):  # fmt: skip
        assert part in text, part
    assert str(run.parent) not in text
    assert "None" not in text
    hub = pytest.importorskip("huggingface_hub", reason="needs the hub's client")
    data = hub.ModelCard.load(card).data
    assert (data.library_name, data.pipeline_tag) == ("deflow_torchrl", "reinforcement-learning")
    (found,) = data.eval_results
    assert (found.metric_value, found.dataset_name) == (pytest.approx(mean, abs=1e-4), "file:pendulum")
    for part in (
        "deflow-torchrl[cli,export,reports,",
        "evaluated in simulation on the one task above",
        "over 1 episode.",
    ):
        assert part in text, part
    apart = tmp_path / "apart" / file.name
    apart.parent.mkdir()
    shutil.copy(file, apart)
    write_model_card(apart, load_policy(file).manifest | {"environment": None}, record | {"evaluations": {}})
    unseen = (apart.parent / "README.md").read_text()
    assert "The policy was not evaluated." in unseen
    assert "acted in no environment" in unseen
    assert "observation columns of the data" in unseen
    assert "simulation" not in unseen.split("## Known limits")[1].splitlines()[2]
    # A second export needs --force, which never overwrites a text that is no card.
    assert_one_line(deflow("export", str(copy), "--card"), "--force")
    other = deflow("export", str(copy), "--card", "--policy", "prior", "--format", "pt2", "--force")
    assert other.stdout.rstrip().endswith(". --include prior.pt2 --include README.md")
    assert "trusted=True" in card.read_text()
    card.write_text("# A project\n")
    assert_one_line(deflow("export", str(copy), "--card", "--force"), "README.md exists already")
    record["history"][-1]["step"] = 2
    (copy / "record.json").write_text(json.dumps(record))
    assert_one_line(deflow("export", str(copy), "--card", "--out", str(tmp_path / "x.onnx")), "deflow resume")


def test_the_prior_is_exported_by_name_and_a_file_is_not_overwritten_unasked(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    arguments = ("export", str(copy), "--policy", "prior", "--format", "pt2")
    assert deflow(*arguments).returncode == 0
    out = copy / "prior.pt2"
    assert_same_actions(out, load_run(run).learner.evaluated_policies["prior"], 3, 1)
    assert load_policy(out, trusted=True).manifest["policy"] == "prior"
    out.write_text("mine")
    assert_one_line(deflow(*arguments), f"{out} exists already", "--force")
    assert out.read_text() == "mine"
    assert deflow(*arguments, "--force").returncode == 0
    assert load_policy(out, trusted=True).manifest["policy"] == "prior"


def test_the_format_is_what_the_file_ends_in(run, tmp_path):
    assert deflow("export", str(run), "--out", str(tmp_path / "a.pt2")).returncode == 0
    assert (tmp_path / "a.pt2").read_bytes().startswith(b"PK")


def test_what_cannot_be_exported_is_one_line(run, tmp_path):
    run = str(run)
    (tmp_path / "file").write_text("")
    for arguments, parts in (
        ((run, "--format", "tflite"), ["unknown format 'tflite'; there are onnx, pt2"]),
        ((run, "--format", "onnx", "--out", str(tmp_path / "a.pt2")), ["ends in .pt2", "onnx"]),
        ((str(tmp_path),), ["is not a run folder"]),
        ((run, "--policy", "teacher", "--out", str(tmp_path / "a.pt2")), ["no policy 'teacher'; there are prior, deflow"]),
        ((run, "--out", str(tmp_path)), ["is a folder"]),
        ((run, "--out", str(tmp_path / "file" / "a.pt2")), ["cannot write in"]),
    ):  # fmt: skip
        assert_one_line(deflow("export", *arguments), *parts)
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints"))
    assert_one_line(deflow("export", str(bare)), "has no checkpoint yet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "file"]


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_without_its_extra_says_which_one(run, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    result = deflow("export", str(run), "--format", "onnx", "--out", str(tmp_path / "a.onnx"))
    assert_one_line(result, f"{module} is not installed", "deflow-torchrl[export]")
    assert deflow("export", str(run), "--format", "pt2", "--out", str(tmp_path / "a.pt2")).returncode == 0


def test_an_export_that_is_not_close_enough_fails_and_leaves_no_file(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)  # not even equal numbers are this close
    result = deflow("export", str(run), "--format", "pt2", "--out", str(tmp_path / "a.pt2"))
    assert result.returncode == 1
    assert result.stderr.startswith("deflow: the exported actions differ from the policy's by ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_computes_otherwise_when_it_is_traced_is_found_out(tmp_path):
    class Deceiver(torch.nn.Module):
        def forward(self, observation):
            traced = torch.compiler.is_compiling() or type(observation) is not torch.Tensor
            return observation[..., :ACTION_DIM] + (2e-5 if traced else 0.0)

    policy = TensorDictModule(Deceiver(), in_keys=["observation"], out_keys=["action"])
    with pytest.raises(ExportParityError, match="differ from the policy's by 2e-05 at batch size 1"):
        export_policy(policy, tmp_path / "a.pt2", **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_draws_its_own_noise_is_refused(tmp_path):
    policy = FlowMatchingPolicy(
        make_velocity_network(OBSERVATION_DIM, ACTION_DIM, (8,)), ACTION_DIM, in_keys=["observation"]
    )
    with pytest.raises(InputError, match="draws random numbers itself"):
        export_policy(policy, tmp_path / "a.pt2", **SIZES)
    policy = TensorDictModule(torch.nn.Identity(), in_keys=["pixels"], out_keys=["action"])
    with pytest.raises(InputError, match=r"reads \['pixels'\]"):
        export_policy(policy, tmp_path / "a.pt2", **SIZES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_other_networks_are_traced_as_they_are(tmp_path, format):
    torch.manual_seed(0)
    width = OBSERVATION_DIM + ACTION_DIM
    velocity = torch.nn.Sequential(torch.nn.Linear(width + 1, 8), torch.nn.Tanh(), torch.nn.Linear(8, ACTION_DIM))
    hooked = make_refinement_network(OBSERVATION_DIM, ACTION_DIM, (8,))
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    actor = DeFlowActor(
        FlowMatchingPolicy(velocity, ACTION_DIM, 3, low=-2.0, high=0.5, out_keys=["base_action"]),
        RefinementPolicy(hooked, ACTION_DIM, low=torch.tensor([-1.0, -2.0, -3.0]), high=0.75),
    )
    weights = {name: value.clone() for name, value in actor.state_dict().items()}
    out = tmp_path / f"other.{format}"
    manifest = export_policy(actor, out, **SIZES)
    assert manifest["action_low"] == [-1.0, -2.0, -3.0]
    assert manifest["action_high"] == [0.75] * 3
    assert_same_actions(out, actor, **SIZES)
    assert all(bool((value == weights[name]).all()) for name, value in actor.state_dict().items())
    hooked_velocity = make_actor()
    hooked_velocity.flow_policy.module.velocity_network.register_forward_hook(lambda module, inputs, output: -output)
    export_policy(hooked_velocity, out, force=True, **SIZES)
    assert_same_actions(out, hooked_velocity, **SIZES)


def test_the_kernels_switch_changes_nothing_in_the_file(tmp_path):
    torch.manual_seed(0)
    actor = make_actor()
    with kernels.use_kernels(False):
        export_policy(actor, tmp_path / "off.onnx", **SIZES)
    export_policy(actor, tmp_path / "on.onnx", **SIZES)
    assert operations(tmp_path / "off.onnx") == operations(tmp_path / "on.onnx")


def operations(path):
    import onnx

    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def test_the_graph_computes_the_observations_share_once_and_gelu_in_one_operation(tmp_path):
    steps, hidden = 10, 2
    export_policy(make_actor(), tmp_path / "a.onnx", **SIZES)
    counted = operations(tmp_path / "a.onnx")
    assert counted["Gemm"] == 1 + steps * (hidden + 1) + (hidden + 1)
    assert counted["Gelu"] == steps * hidden + hidden
    assert counted["Concat"] == 1, "the refinement's input alone"
    assert not {"Tanh", "Erf", "Pow", "Sigmoid"} & set(counted)


def test_nested_keys_and_double_precision(tmp_path):
    torch.manual_seed(0)
    flow = FlowMatchingPolicy(
        make_velocity_network(OBSERVATION_DIM, ACTION_DIM, (8,)), ACTION_DIM, 2,
        in_keys=[("agent", "state"), ("agent", "z")], out_keys=[("agent", "act")],
    ).double()  # fmt: skip
    keys = {"observation_key": ("agent", "state"), "noise_key": ("agent", "z"), "action_key": ("agent", "act")}
    export_policy(flow, tmp_path / "a.pt2", **SIZES, **keys)
    observation, noise = np.ones((2, OBSERVATION_DIM)), np.ones((2, ACTION_DIM))
    with torch.no_grad():
        expected = flow.module(torch.from_numpy(observation), torch.from_numpy(noise))
    np.testing.assert_allclose(
        load_policy(tmp_path / "a.pt2", trusted=True)(observation, noise=noise), expected, atol=1e-6
    )
    assert flow.module.low.dtype == torch.float64, "the policy itself is left as it was"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"about": {"chunk": 2}}, "action_dim=3 is no whole number of actions of a chunk of 2"),
        (
            {"action_bounds": ([0.0, 0.0], [1.0, 1.0])},
            "action_bounds are of 2 and 2 numbers, the policy's actions of 3",
        ),
        (
            {"observation_dim": OBSERVATION_DIM + 1},
            r"the policy cannot be called with observation \[5\], noise \[3\]: ",
        ),
        ({"action_key": "act"}, r"the policy writes .*'action'.*, not 'act'"),
    ],
)
def test_arguments_that_do_not_fit_the_policy_are_one_line(options, said, tmp_path):
    with pytest.raises(InputError, match=said) as refused:
        export_policy(make_actor(), tmp_path / "policy.pt2", **{**SIZES, **options})
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
