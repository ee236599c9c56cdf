# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Write a policy as one self-contained file, ONNX or ``torch.export``'s pt2, that :mod:`deflow_torchrl.deploy` runs.

The graph maps ``observation [B, O]``, or pictures ``[B, H, W, C]`` of uint8, and, where the policy draws noise, ``noise [B, A]``
to ``action [B, A]``, for any B. In it

* a flow prior computes the observation's and the time's share of the first layer once, since they are the same in all steps for
  every action;
* no module of TorchRL or TensorDict is left, and plain layers stand for the kernels of this package.

The file gets its name only after its actions were compared with the policy's own.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from deflow_torchrl.deploy import FORMAT, MANIFEST, Graph, load_policy, open_graph
from deflow_torchrl.errors import ExportParityError, InputError, MissingExtraError, one_line
from deflow_torchrl.modules.flow import FlowMatchingModel
from deflow_torchrl.modules.networks import MLP, is_wrapped
from deflow_torchrl.modules.policies import BoundedModel
from deflow_torchrl.paths import atomic_write, file_sha256, make_writable_folder
from deflow_torchrl.reports import model_card
from deflow_torchrl.runs.evaluate import ACTING, load_run
from deflow_torchrl.sources.base import public_name
from deflow_torchrl.versions import package_versions

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-5
_BATCH_SIZES = (1, 2, 7, 64)
_OPSET = 20  # the first with GELU's tanh form as one operation
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
Units: TypeAlias = tuple[Tensor, Tensor]
"""Low end and half width of each dimension of an action, ``[A]``."""


def export_run(
    run: Path,
    *,
    format: str | None = None,
    out: Path | None = None,
    policy: str | None = None,
    card: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Export a policy of a run's last checkpoint.

    Args:
        run: run folder.

    Keyword Args:
        format: ``onnx`` or ``pt2``; by default the ending of ``out``, else ``onnx``.
        out: the file; ``RUN/NAME.FORMAT`` by default, with a card ``RUN/export/NAME.FORMAT``, NAME being the policy's.
        policy: name of the policy; the run's acting policy by default.
        card: write a model card beside it, see :mod:`deflow_torchrl.reports.model_card`.
        force: overwrite ``out`` and a card.

    Returns:
        The manifest, and as ``file`` the path; with ``card`` also its path and the ``upload`` command.

    Raises:
        InputError: if ``run`` is no run folder, has no checkpoint or no such policy, or as :func:`export_policy`; for a card
            also if the run is not finished or another README.md is in its place.
        ExportParityError: as :func:`export_policy`.
    """
    format = _format(format, out)
    loaded = load_run(run, policy=policy or ACTING, device="cpu")
    ((name, chosen),) = loaded.learner.evaluated_policies.items()
    out = out or (run / "export" if card else run) / f"{name}.{format}"
    record = model_card.card_record(run, out.parent, step=loaded.state["step"], force=force) if card else None
    task = loaded.task
    about = {
        "task": public_name(task.name),
        "environment": task.environment,
        "method": loaded.config.algo.name,
        "policy": name,
        "step": loaded.state["step"],
        "chunk": loaded.config.chunk,
        "frame_stack": loaded.config.frame_stack or 1,
        "checkpoint_sha256": file_sha256(loaded.checkpoint),
    }
    sizes = {key: loaded.state[key] for key in ("observation_dim", "action_dim")}
    if isinstance(sizes["observation_dim"], Mapping):
        names = ", ".join(sizes["observation_dim"])
        raise InputError(f"{run}: what is exported reads one observation, and this policy reads several ({names})")
    bounds = loaded.state.get("action_bounds")
    result = export_policy(chosen, out, format=format, about=about, force=force, action_bounds=bounds, **sizes)
    return result if record is None else {**result, **model_card.write_model_card(out, result, record)}


def export_policy(
    policy: TensorDictModuleBase,
    out: Path,
    *,
    observation_dim: int | Sequence[int],
    action_dim: int,
    format: str | None = None,
    about: Mapping[str, Any] | None = None,
    force: bool = False,
    action_bounds: Sequence[Any] | None = None,
    observation_key: NestedKey = "observation",
    noise_key: NestedKey = "noise",
    action_key: NestedKey = "action",
) -> dict[str, Any]:
    """Export any policy that reads an observation and, if it is stochastic, noise.

    Args:
        policy: the policy, for example a :class:`~deflow_torchrl.modules.DeFlowActor`; it is not changed.
        out: the file.

    Keyword Args:
        observation_dim: O; of pictures their shape ``[H, W, C]``.
        action_dim: A.
        format: ``onnx`` or ``pt2``; by default the ending of ``out``, else ``onnx``.
        about: plain values for the manifest.
        force: overwrite ``out``.
        action_bounds: (low, high), numbers or one for each dimension of an action: the exported actions are mapped to them from
            [-1, 1]. The policy's own units by default.
        observation_key: where the policy reads its observation.
        noise_key: where it reads its noise, if it does.
        action_key: where it writes its action.

    Returns:
        The manifest, and as ``file`` the path.

    Raises:
        InputError: on a format, file or policy that cannot be used, for example one that draws random numbers itself.
        MissingExtraError: if a package that ONNX needs is not installed.
        ExportParityError: if the exported actions differ from the policy's by more than 1e-5; no file is left.
    """
    out, format = Path(out), _format(format, Path(out))
    if out.is_dir():
        raise InputError(f"{out} is a folder; --out takes the file to write")
    if out.exists() and not force:
        raise InputError(f"{out} exists already; --force overwrites it, --out names another file")
    if format == "onnx":
        for module in _ONNX_PACKAGES:
            if importlib.util.find_spec(module) is None:
                raise MissingExtraError(module, "export")
    noise_shape = getattr(policy, "noise_shape", (action_dim,))
    if len(noise_shape) > 1:
        raise InputError(
            f"a {type(policy).__name__} cannot be exported: it chooses among several actions by its critics, and what is "
            "exported maps one noise to one action"
        )
    keys = {"observation": observation_key, "noise": noise_key}
    unknown = [key for key in policy.in_keys if key not in keys.values()]
    if unknown:
        raise InputError(f"the policy reads {unknown}; what is exported reads an observation and noise only")
    shapes = {"observation": (observation_dim,) if isinstance(observation_dim, int) else tuple(observation_dim)}
    if noise_key in policy.in_keys:
        shapes["noise"] = noise_shape
    chunk = (about or {}).get("chunk", 1)
    if chunk < 1 or action_dim % chunk:
        raise InputError(f"action_dim={action_dim} is no whole number of actions of a chunk of {chunk}")
    if action_key not in policy.out_keys:
        raise InputError(f"the policy writes {policy.out_keys}, not {action_key!r}; name its action with action_key")
    units = _units(action_bounds, action_dim)
    eager = _Actor(copy.deepcopy(policy).to("cpu", torch.float32), keys, action_key, units).eval().requires_grad_(False)
    _try(eager, _random_inputs(shapes, rows=2), action_dim)
    program = _trace(eager, _random_inputs(shapes, rows=2))
    write = {"onnx": _onnx_writer, "pt2": _pt2_writer}[format](program, list(shapes))
    parity = _parity(eager, open_graph(write("{}"), str(out)), shapes)
    low, high = _bounds(policy, action_dim, units)
    example = _random_inputs(shapes, rows=1)
    manifest = {
        "format": FORMAT,
        **(about or {}),
        "inputs": {
            name: {"shape": ["batch", *shape], "dtype": str(example[name].dtype).removeprefix("torch.")}
            for name, shape in shapes.items()
        },
        "outputs": {"action": {"shape": ["batch", action_dim], "dtype": "float32"}},
        "action_low": low,
        "action_high": high,
        "noise_law": "independent N(0, 1) in every entry" if "noise" in shapes else None,
        "parity": {"max_abs_difference": parity, "tolerance": TOLERANCE, "batch_sizes": list(_BATCH_SIZES)},
        "versions": package_versions(*(_ONNX_PACKAGES if format == "onnx" else ())),
        "probe": {name: value[0].tolist() for name, value in [*example.items(), ("action", eager(*example.values()))]},
    }
    make_writable_folder(out.parent)
    try:
        with atomic_write(out) as temporary:
            temporary.write_bytes(write(json.dumps(manifest)))
            load_policy(temporary, trusted=True)
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror or error}); choose another file with --out") from error
    return {**manifest, "file": str(out)}


def _format(format: str | None, out: Path | None) -> str:
    suffix = "" if out is None else out.suffix.removeprefix(".")
    if format is None:
        format = suffix if suffix in FORMATS else FORMATS[0]
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    if suffix in FORMATS and suffix != format:
        raise InputError(f"{out} ends in .{suffix}, and the format is {format}; give one of the two")
    return format


class _Actor(nn.Module):
    """A TensorDict policy as a function of tensors; its actions are mapped to ``units``."""

    def __init__(
        self, policy: TensorDictModuleBase, keys: Mapping[str, NestedKey], action_key: NestedKey, units: Units | None
    ) -> None:
        super().__init__()
        self.policy, self.keys, self.action_key, self.units = policy, keys, action_key, units

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        entries = TensorDict({})
        entries[self.keys["observation"]] = observation
        if noise is not None:
            entries[self.keys["noise"]] = noise
        action = self.policy(entries)[self.action_key]
        return action if self.units is None else _mapped(action, self.units)


class _UnrolledFlow(BoundedModel):
    """:class:`FlowMatchingModel` with the shares of the first layer that are the same for all actions computed once."""

    bias: Tensor
    of_observation: Tensor
    of_action: Tensor
    of_times: Tensor

    def __init__(self, model: FlowMatchingModel, network: MLP) -> None:
        super().__init__(model.low, model.high)
        self.num_steps, self.draw_noise = model.num_steps, model.draw_noise
        self.others = nn.Sequential(*network[1:].children())
        first = cast("nn.Linear", network[0])
        weight, bias = first.weight.detach(), first.bias.detach()
        shares = [weight.shape[1] - model.action_dim - 1, model.action_dim, 1]
        of_observation, of_action, of_time = weight.split(shares, dim=1)
        times = torch.arange(model.num_steps).unsqueeze(-1) / model.num_steps
        self.register_buffer("bias", bias)
        self.register_buffer("of_observation", of_observation.T.contiguous())
        self.register_buffer("of_action", of_action.T.contiguous())
        self.register_buffer("of_times", times * of_time.T)

    def forward(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        x = self.draw_noise(observation) if noise is None else noise
        share = torch.addmm(self.bias, observation, self.of_observation)
        for step in range(self.num_steps):
            x = x + self.others(torch.addmm(share + self.of_times[step], x, self.of_action)) / self.num_steps
        return self.clip(x)


def _unroll(policy: nn.Module) -> None:
    """Replace the flow samplers whose network is the paper's MLP as it was built; others are traced as they are."""
    for parent in list(policy.modules()):
        for name, child in parent.named_children():
            if type(child) is not FlowMatchingModel or is_wrapped(child) or "velocity" in vars(child):
                continue
            network = child.velocity_network
            if (
                isinstance(network, MLP)
                and not network.layer_norm
                and network.is_as_built()
                and not is_wrapped(network)
            ):
                setattr(parent, name, _UnrolledFlow(child, network))


def _try(eager: _Actor, inputs: Mapping[str, Tensor], action_dim: int) -> None:
    """Act once before tracing, whose messages are long."""
    try:
        with torch.no_grad():
            shape = list(eager(*inputs.values()).shape)
    except Exception as error:
        given = ", ".join(f"{name} {list(value.shape[1:])}" for name, value in inputs.items())
        raise InputError(f"the policy cannot be called with {given}: {one_line(error)}") from error
    if shape[1:] != [action_dim]:
        raise InputError(f"the policy's actions are {shape[1:]}, not [{action_dim}] as action_dim says")


def _trace(eager: _Actor, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    actor = copy.deepcopy(eager)
    _unroll(actor)
    batch = Dim("batch", min=1)
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            actor, tuple(inputs.values()), dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise InputError(
                f"the policy draws random numbers itself ({node.target}); build it so that it reads its noise from its input"
            )
    return program


def _pt2_writer(program: ExportedProgram, names: Sequence[str]) -> Callable[[str], bytes]:
    def write(manifest: str) -> bytes:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={MANIFEST: manifest})
        return file.getvalue()

    return write


def _onnx_writer(program: ExportedProgram, names: Sequence[str]) -> Callable[[str], bytes]:
    import onnx

    with _quiet():
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=_OPSET, input_names=list(names), output_names=["action"], verbose=False
        )
    assert exported is not None
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where in whose Python it comes from
    del model.graph.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = "batch"  # there is no other that varies

    def write(manifest: str) -> bytes:
        onnx.helper.set_model_props(model, {MANIFEST: manifest})
        return model.SerializeToString()

    return write


def _units(bounds: Sequence[Any] | None, action_dim: int) -> Units | None:
    """Low end and half width ``[A]`` of bounds; those of a single action are repeated for each of a chunk."""
    if bounds is None:
        return None
    low, high = (torch.as_tensor(bound, dtype=torch.float64).reshape(-1) for bound in bounds)
    if len(low) != len(high) or not len(low) or action_dim % len(low):
        raise InputError(
            f"action_bounds are of {len(low)} and {len(high)} numbers, the policy's actions of {action_dim}"
        )
    repeats = action_dim // len(low)
    return low.repeat(repeats).float(), ((high - low) / 2).repeat(repeats).float()


def _mapped(action: Tensor, units: Units) -> Tensor:
    """Map an action ``[..., A]`` from [-1, 1]."""
    low, half = units
    return low + (action + 1) * half


def _parity(eager: _Actor, graph: Graph, shapes: Mapping[str, Sequence[int]]) -> float:
    """Largest difference of the graph's actions from the policy's, in the policy's units."""
    largest, half = 0.0, torch.ones(1) if eager.units is None else eager.units[1]
    for rows in _BATCH_SIZES:
        inputs = _random_inputs(shapes, rows=rows).values()
        with torch.no_grad():
            difference = eager(*inputs) - torch.from_numpy(graph(*(value.numpy() for value in inputs)))
        size = float((difference.abs() / half).max())
        largest = max(largest, size)
        if not size <= TOLERANCE:
            raise ExportParityError(
                f"the exported actions differ from the policy's by {size:.2g} at batch size {rows} "
                f"({TOLERANCE:g} is allowed); no file was written"
            )
    return largest


def _random_inputs(shapes: Mapping[str, Sequence[int]], *, rows: int) -> dict[str, Tensor]:
    """Random numbers ``[rows, n]`` and pictures ``[rows, H, W, C]``."""
    generator = torch.Generator().manual_seed(rows)
    return {
        name: torch.randn(rows, *shape, generator=generator)
        if len(shape) == 1
        else torch.randint(256, (rows, *shape), generator=generator, dtype=torch.uint8)
        for name, shape in shapes.items()
    }


def _bounds(policy: nn.Module, action_dim: int, units: Units | None) -> tuple[list[float] | None, list[float] | None]:
    """Bounds of the last part that clips, in the exported units; none where nothing does."""
    clipping = [
        module for module in policy.modules() if {"low", "high"} <= dict(module.named_buffers(recurse=False)).keys()
    ]
    if not clipping:
        return None, None
    ends = (clipping[-1].get_buffer(name).cpu().float().expand(action_dim) for name in ("low", "high"))
    low, high = ((end if units is None else _mapped(end, units)).tolist() for end in ends)
    return low, high


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and log messages of torch's exporters, which are for their developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
