# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Run an exported policy where it acts: with numpy and onnxruntime alone, or with numpy and torch for a ``.pt2`` file.

    from deflow_torchrl.deploy import load_policy

    policy = load_policy("deflow.onnx", seed=0)
    action = policy(observation)  # [O] -> [A], or [B, O] -> [B, A]

Neither torchrl nor tensordict is imported. The file is what :mod:`deflow_torchrl.export` writes; it holds its own manifest.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.open_loop import OpenLoop
from deflow_torchrl.processes import available_cores

FORMAT = 1
MANIFEST = "deflow_policy.json"  # its name among a pt2 archive's extra files and an ONNX model's properties
_ZIP = b"PK"  # how a pt2 file begins
PROBE_TOLERANCE = 1e-4  # of half an action's range; processors round differently, and damage moves an action by more

Array = NDArray[np.float32]


class Graph(Protocol):
    """An exported function: float32 arrays ``[B, ...]`` in the manifest's order to the action ``[B, A]``."""

    manifest: str | None

    def __call__(self, *inputs: Array) -> Array:
        """Compute."""


def load_policy(
    path: str | PathLike[str], *, seed: int | None = None, threads: int | None = None, trusted: bool = False
) -> Policy:
    """Load a policy that ``deflow export`` wrote, and check that it computes the same actions on this machine.

    Args:
        path: the file; its content says which format it has.

    Keyword Args:
        seed: of the policy's own noise; fresh from the system by default.
        threads: of onnxruntime, by default one for every core this process may use. A pt2 file uses torch's.
        trusted: allow a pt2 file. Torch's reader can run code that is hidden in such a file; an ONNX file is data and needs no
            trust.

    Raises:
        InputError: if the file cannot be read, is damaged, is no exported policy of this version, or is a pt2 file and not
            ``trusted``.
        MissingExtraError: if onnxruntime is not installed; for a pt2 file, InputError if torch is not.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror or error}); give a file that deflow export wrote"
        ) from error
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    if content.startswith(_ZIP) and not trusted:
        raise InputError(
            f"{path} is a pt2 file, and loading one can run code that is hidden in it; pass trusted=True if you know who made "
            "it, or export with --format onnx"
        )
    graph = open_graph(content, str(path), threads=threads)
    manifest = _read_manifest(graph.manifest, str(path))
    try:
        policy = Policy(graph, manifest, seed=seed)
        policy.check_probe(str(path))
    except InputError as error:
        if str(path) in str(error):
            raise
        raise _damaged(str(path)) from error
    except Exception as error:  # of any kind, where a manifest does not fit its graph
        raise _damaged(str(path)) from error
    return policy


class Policy:
    """An exported policy, as :func:`load_policy` returns it.

    Attributes:
        manifest: the file's description of itself; docs/deploy.md explains the entries.
        observation_dim: O, the last of ``observation_shape``.
        observation_shape: of an observation: ``(O,)``, or ``(H, W, C)`` of pictures.
        action_dim: A.
        low: lower bounds of the actions ``[A]``, None where the policy has none.
        high: upper bounds ``[A]`` or None.
        chunk: h, steps of a chunk: the policy chooses h actions at once, and the h calls that follow give one after another;
            :meth:`reset` begins an episode.
    """

    def __init__(self, graph: Graph, manifest: Mapping[str, Any], *, seed: int | None = None) -> None:
        self.manifest = manifest
        _, *shape = manifest["inputs"]["observation"]["shape"]
        self.observation_shape: tuple[int, ...] = tuple(shape)
        self.observation_dim = self.observation_shape[-1]
        self.chunk: int = manifest.get("chunk", 1)
        self._width: int = manifest["outputs"]["action"]["shape"][-1]
        self.action_dim = self._width // self.chunk
        bounds = (manifest["action_low"], manifest["action_high"])
        self._bounds: Any = [None if bound is None else np.asarray(bound, np.float32) for bound in bounds]
        self.low, self.high = (None if bound is None else bound[: self.action_dim] for bound in self._bounds)
        self._noise_width: int | None = manifest["inputs"].get("noise", {"shape": [None]})["shape"][-1]
        self._graph = graph
        self._random = np.random.default_rng(seed)
        self._loop = OpenLoop(self.chunk)
        self._rows: tuple[int, ...] = ()

    def reset(self) -> None:
        """Begin an episode: the rest of the chunk that is being executed is forgotten."""
        self._loop.reset()

    def __call__(self, observation: ArrayLike, *, noise: ArrayLike | None = None) -> Array:
        """Choose actions.

        Args:
            observation: ``[O]`` or ``[B, O]``, finite numbers of any type; pictures ``[H, W, C]`` or ``[B, H, W, C]`` of uint8.

        Keyword Args:
            noise: ``[A]`` or ``[B, A]`` (of chunks ``[h * A]``; the manifest has its width), used instead of a draw from
                N(0, I); the same noise and observation give the same action.

        Returns:
            Actions ``[A]`` or ``[B, A]``, float32, inside the bounds.

        Raises:
            InputError: on another width, another kind of values, NaN or infinities, noise for a policy that takes none, or
                another number of rows in the middle of a chunk.
        """
        rows = _numbers(observation, "observation", self.observation_shape)
        lead = rows.shape[: -len(self.observation_shape)]
        if not self._loop.rest:
            self._rows = lead
            return self._loop(self._choose(rows, noise))
        if lead != self._rows:
            raise InputError(
                "the number of observations changed in the middle of a chunk; call reset() between episodes"
            )
        return self._loop()

    def _choose(self, rows: Array, noise: ArrayLike | None) -> Array:
        lead = rows.shape[: -len(self.observation_shape)]
        inputs = [rows if lead else rows[None]]
        if self._noise_width is not None:
            shape = (*lead, self._noise_width)
            drawn = self._random.standard_normal(shape, np.float32) if noise is None else None
            given = _numbers(noise, "noise", (self._noise_width,)) if drawn is None else drawn
            if given.shape != shape:
                raise InputError(f"noise has shape {list(given.shape)}; beside this observation it is {list(shape)}")
            inputs.append(np.atleast_2d(given))
        elif noise is not None:
            raise InputError("this policy takes no noise: its action depends on the observation alone")
        action = self._graph(*inputs)
        if not np.isfinite(action).all():
            raise InputError(f"the action is not finite: observations up to {np.abs(rows).max():.3g} are too large")
        if self.low is not None:
            action = np.clip(action, *self._bounds)
        return action if lead else action[0]

    def check_probe(self, where: str) -> None:
        """Compute the manifest's example and compare the action with the stored one.

        Raises:
            InputError: if they differ.
        """
        probe = self.manifest["probe"]
        expected = np.asarray(probe["action"], np.float32)
        pictures = len(self.observation_shape) == 3
        observation = np.asarray(probe["observation"], np.uint8 if pictures else None)
        rows = _numbers(observation, "observation", self.observation_shape)
        low, high = (1.0, 1.0) if self.low is None else self._bounds
        half = np.maximum(1.0, np.subtract(high, low) / 2)
        difference = (np.abs(self._choose(rows, probe.get("noise")) - expected) / half).max()
        if not difference <= PROBE_TOLERANCE:
            raise InputError(
                f"{where} computes another action here than where it was made (they differ by {difference:.2g}): the file is "
                "damaged, or its runtime here is of a version that does not run it; copy or export it again"
            )


def open_graph(content: bytes, where: str, *, threads: int | None = None) -> Graph:
    """Read the exported function from a file's content.

    Raises:
        InputError: if the content is damaged or not an exported policy; see :func:`load_policy`.
    """
    if content.startswith(_ZIP):
        return _Pt2Graph(content, where)
    return _OnnxGraph(content, where, threads=threads)


class _OnnxGraph:
    def __init__(self, content: bytes, where: str, *, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "export") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # fatal errors only: the exception says the rest
        options.intra_op_num_threads = threads or available_cores()
        # Threads that wait spin, which saves a third of the time at batch 1, but by default for so long that a busy machine
        # takes several times longer.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of a dozen kinds without a common base
            raise _damaged(where) from error
        self.manifest = self._session.get_modelmeta().custom_metadata_map.get(MANIFEST)
        self._names = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, *inputs: Array) -> Array:
        return self._session.run(None, dict(zip(self._names, inputs, strict=True)))[0]


class _Pt2Graph:
    def __init__(self, content: bytes, where: str) -> None:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                names = [name for name in archive.namelist() if name.endswith(f"extra/{MANIFEST}")]
                self.manifest = archive.read(names[0]).decode() if names else None
                damaged = archive.testzip() is not None
        except Exception as error:  # of a dozen kinds, by the place of the damage
            raise _damaged(where) from error
        if damaged:
            raise _damaged(where)
        if self.manifest is None:
            raise _foreign(where)
        try:
            import torch
        except ImportError as error:
            raise InputError(
                f"{where} is a pt2 file, which needs torch (pip install torch); deflow export --format onnx makes one that "
                "needs onnxruntime only"
            ) from error
        try:
            self._module = torch.export.load(io.BytesIO(content)).module()
        except Exception as error:  # of any kind, by the place of the damage
            raise _damaged(where) from error
        self._torch = torch

    def __call__(self, *inputs: Array) -> Array:
        with self._torch.inference_mode():
            return self._module(*map(self._torch.tensor, inputs)).numpy()


def _read_manifest(text: str | None, where: str) -> dict[str, Any]:
    if text is None:
        raise _foreign(where)
    try:
        manifest = json.loads(text)
        found = manifest["format"]
        whole = {"inputs", "outputs", "action_low", "action_high", "probe"} <= set(manifest)
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(where) from error
    if found != FORMAT:
        raise InputError(f"{where} has format {found}, this version of deflow-torchrl reads {FORMAT}; export it again")
    if not whole:
        raise _damaged(where)
    return manifest


def _numbers(value: ArrayLike | None, name: str, shape: tuple[int, ...]) -> Any:
    """Float32 of numbers; pictures, which have three dimensions, as they are."""
    array = np.asarray(value)
    pictures = len(shape) == 3
    if array.dtype != np.uint8 if pictures else array.dtype.kind not in "fiu":
        kind = "pictures of uint8" if pictures else "real numbers"
        raise InputError(f"{name} must be {kind}, got values of type {array.dtype}")
    if array.ndim - len(shape) not in (0, 1) or array.shape[-len(shape) :] != shape:
        sizes = ", ".join(map(str, shape))
        raise InputError(f"{name} must have shape [{sizes}] or [B, {sizes}], got {list(array.shape)}")
    if pictures:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):  # values beyond float32 become infinite
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinite values")
    return array


def _foreign(where: str) -> InputError:
    return InputError(f"{where} is damaged, or no policy that deflow export wrote: it has no {MANIFEST}")


def _damaged(where: str) -> InputError:
    return InputError(f"{where} is damaged, or neither an ONNX nor a pt2 file; give one that deflow export wrote")
