"""Exported policies where they act, with little else installed."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from deflow_torchrl.deploy import FORMAT, MANIFEST, load_policy
from deflow_torchrl.errors import InputError
from deflow_torchrl.export import export_policy
from tests.support.networks import ACTION_DIM, OBSERVATION_DIM, make_actor

FORMATS = ["onnx", "pt2"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with policy.onnx and policy.pt2 of one actor."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    actor = make_actor()
    for format in FORMATS:
        export_policy(
            actor,
            folder / f"policy.{format}",
            observation_dim=OBSERVATION_DIM,
            action_dim=ACTION_DIM,
            about={"step": 3},
        )
    return folder


@pytest.fixture(params=FORMATS)
def path(request, exported):
    return exported / f"policy.{request.param}"


def observations(*shape):
    return np.random.default_rng(0).standard_normal((*shape, OBSERVATION_DIM))


def without(*modules, code, arguments=()):
    """Run code in a process where these modules cannot be imported."""
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in modules)
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


ACT = """
from deflow_torchrl.deploy import load_policy
policy = load_policy(sys.argv[1], trusted=True, seed=0)
action = policy([0.5] * policy.observation_dim)
print(action.tolist())
"""


def test_an_onnx_policy_acts_without_torch(exported):
    path = exported / "policy.onnx"
    modules = ("torch", "torchrl", "tensordict", "onnx", "filelock", "tqdm", "typer", "rich", "yaml", "gymnasium")
    result = without(*modules, code=ACT, arguments=[path])
    assert result.returncode == 0, result.stderr
    expected = load_policy(path, trusted=True, seed=0)([0.5] * OBSERVATION_DIM)
    np.testing.assert_allclose(json.loads(result.stdout), expected, atol=1e-6)


def test_a_pt2_policy_acts_with_torch_alone(exported):
    path = exported / "policy.pt2"
    result = without("torchrl", "tensordict", "onnx", "onnxruntime", code=ACT, arguments=[path])
    assert result.returncode == 0, result.stderr
    expected = load_policy(path, trusted=True, seed=0)([0.5] * OBSERVATION_DIM)
    np.testing.assert_allclose(json.loads(result.stdout), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("format", "module", "said"), [("onnx", "onnxruntime", "deflow-torchrl[export]"), ("pt2", "torch", "needs torch")]
)
def test_a_missing_runtime_is_named(exported, format, module, said):
    result = without(module, code=ACT, arguments=[exported / f"policy.{format}"])
    last = result.stderr.splitlines()[-1]
    assert "InputError: " in last or "MissingExtraError: " in last
    assert said in last


def test_importing_it_imports_numpy_and_no_runtime():
    result = without(code="import deflow_torchrl.deploy\nprint({'torch', 'onnxruntime'} & set(sys.modules))")
    assert result.stdout == "set()\n", result.stderr


def test_one_observation_and_a_batch_of_any_kind_of_numbers(path):
    policy = load_policy(path, trusted=True)
    assert (policy.observation_dim, policy.action_dim) == (OBSERVATION_DIM, ACTION_DIM)
    rows, noise = observations(5), np.ones((5, ACTION_DIM))
    actions = policy(rows, noise=noise)
    assert actions.shape == (5, ACTION_DIM)
    assert actions.dtype == np.float32
    one = policy(rows[2], noise=noise[2])
    assert one.shape == (ACTION_DIM,)
    np.testing.assert_allclose(one, actions[2], atol=1e-6)
    np.testing.assert_array_equal(policy(rows.tolist(), noise=noise.tolist()), actions)
    np.testing.assert_array_equal(policy(rows[:, ::1].astype(np.float32, order="F"), noise=noise), actions)
    whole = np.arange(OBSERVATION_DIM)
    np.testing.assert_array_equal(policy(whole, noise=noise[0]), policy(whole.astype(float), noise=noise[0]))
    fixed = rows.astype(np.float32)
    fixed.flags.writeable = False
    np.testing.assert_array_equal(policy(fixed, noise=noise), actions)
    assert policy(rows[:0]).shape == (0, ACTION_DIM)
    for rows in (1, 2, 33):
        assert policy(observations(rows)).shape == (rows, ACTION_DIM)


def test_its_noise_is_standard_normal_and_its_seed_repeats_it(path):
    rows = observations(4)
    first, again, other = (load_policy(path, trusted=True, seed=seed) for seed in (1, 1, 2))
    actions = first(rows)
    np.testing.assert_array_equal(again(rows), actions)
    assert not np.array_equal(other(rows), actions)
    assert not np.array_equal(first(rows), actions), "fresh noise every time"
    noise = np.random.default_rng(1).standard_normal((4, ACTION_DIM), np.float32)
    np.testing.assert_array_equal(other(rows, noise=noise), actions)


def test_two_actions_do_not_share_memory(path):
    policy = load_policy(path, trusted=True)
    first = policy(observations(3))
    kept = first.copy()
    policy(observations(3))
    np.testing.assert_array_equal(first, kept)
    first += 1  # writable


@pytest.mark.parametrize(
    ("observation", "noise", "said"),
    [
        (np.zeros(OBSERVATION_DIM + 1), None, rf"observation must have shape \[{OBSERVATION_DIM}\] or \[B, {OBSERVATION_DIM}\]"),
        (np.zeros((2, 2, OBSERVATION_DIM)), None, r"got \[2, 2, "),
        (0.5, None, r"got \[\]"),
        (["a"] * OBSERVATION_DIM, None, "observation must be real numbers"),
        ([None] * OBSERVATION_DIM, None, "observation must be real numbers"),
        (np.zeros(OBSERVATION_DIM, complex), None, "complex128"),
        (np.full(OBSERVATION_DIM, np.nan), None, "observation holds NaN"),
        (np.full(OBSERVATION_DIM, 1e300), None, "observation holds NaN or infinite"),
        (np.full(OBSERVATION_DIM, 3e38), None, "too large"),
        (np.zeros(OBSERVATION_DIM), np.zeros(ACTION_DIM + 1), "noise must have shape"),
        (np.zeros(OBSERVATION_DIM), np.zeros((1, ACTION_DIM)), rf"noise has shape \[1, {ACTION_DIM}\]; .* \[{ACTION_DIM}\]"),
        (np.zeros((2, OBSERVATION_DIM)), np.zeros((3, ACTION_DIM)), "noise has shape"),
        (np.zeros(OBSERVATION_DIM), np.full(ACTION_DIM, np.inf), "noise holds NaN or infinite"),
    ],
)  # fmt: skip
def test_what_is_no_observation_is_refused_in_one_line(path, observation, noise, said):
    with pytest.raises(InputError, match=said) as caught:
        load_policy(path, trusted=True)(observation, noise=noise)
    assert "\n" not in str(caught.value)


def assert_refused(path, said):
    with pytest.raises(InputError, match=said) as caught:
        load_policy(path, trusted=True)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(path, share, tmp_path):
    content = path.read_bytes()
    short = tmp_path / path.name
    short.write_bytes(content[: int(share * len(content))])
    assert_refused(short, "is damaged")


def test_weights_that_were_changed_are_noticed(path, tmp_path):
    content = bytearray(path.read_bytes())
    # A bias of the first layer is zeros and stays so in an actor that never learned; weights are dense float32.
    middle = len(content) // 3
    content[middle : middle + 400] = bytes(400)
    changed = tmp_path / path.name
    changed.write_bytes(content)
    assert_refused(changed, "damaged")


def test_files_of_others_are_refused(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    assert_refused(tmp_path / "none.onnx", "cannot read .*No such file")
    assert_refused(tmp_path, "cannot read .*directory")
    text = tmp_path / "notes.onnx"
    text.write_text("nothing")
    assert_refused(text, "is damaged, or neither")
    archive = tmp_path / "archive.pt2"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    assert_refused(archive, f"it has no {MANIFEST}")
    foreign = tmp_path / "foreign.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), foreign)
    assert_refused(foreign, f"it has no {MANIFEST}")
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    assert_refused(_write(tmp_path / "foreign.onnx", model.SerializeToString()), f"it has no {MANIFEST}")
    for manifest, said in (("{", "is damaged"), ("[]", "is damaged"), ('{"format": 1}', "is damaged")):
        onnx.helper.set_model_props(model, {MANIFEST: manifest})
        assert_refused(_write(tmp_path / "odd.onnx", model.SerializeToString()), said)
    onnx.helper.set_model_props(model, {MANIFEST: json.dumps({"format": FORMAT + 1})})
    assert_refused(
        _write(tmp_path / "newer.onnx", model.SerializeToString()), f"format {FORMAT + 1}, .* reads {FORMAT}"
    )


def _write(path, content):
    path.write_bytes(content)
    return path


def test_threads_must_be_positive(path):
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        load_policy(path, trusted=True, threads=0)
    load_policy(path, trusted=True, threads=1)


def test_a_policy_without_noise_takes_none_and_need_not_have_bounds(tmp_path):
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 2)
    module = TensorDictModule(linear, in_keys=["observation"], out_keys=["action"])
    manifest = export_policy(module, tmp_path / "linear.pt2", observation_dim=3, action_dim=2)
    assert manifest["noise_law"] is None
    assert list(manifest["inputs"]) == ["observation"]
    policy = load_policy(tmp_path / "linear.pt2", trusted=True)
    assert policy.low is None
    rows = np.full((4, 3), 50.0, np.float32)
    np.testing.assert_allclose(policy(rows), linear(torch.from_numpy(rows)).detach(), rtol=1e-6)
    with pytest.raises(InputError, match="takes no noise"):
        policy(rows, noise=np.zeros((4, 2)))


def test_a_pt2_file_is_loaded_only_where_it_is_trusted(exported):
    with pytest.raises(InputError, match="trusted=True if you know who made it"):
        load_policy(exported / "policy.pt2")
    load_policy(exported / "policy.onnx")


def test_a_manifest_that_does_not_fit_its_graph_is_one_line(exported, tmp_path):
    source = zipfile.ZipFile(exported / "policy.pt2")
    name = next(name for name in source.namelist() if name.endswith(MANIFEST))
    manifest = json.loads(source.read(name))
    wider = {"shape": ["batch", 3], "dtype": "float32"}
    broken = (
        {"inputs": {}},
        {"probe": {}},
        {"inputs": {**manifest["inputs"], "observation": wider}},
        {"action_low": ["x"]},
    )
    for number, change in enumerate(broken):
        path = tmp_path / f"{number}.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            for entry in source.namelist():
                content = json.dumps({**manifest, **change}).encode() if entry == name else source.read(entry)
                archive.writestr(entry, content)
        with pytest.raises(InputError, match=str(path)):
            load_policy(path, trusted=True)
