# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Minari sets: find, download and open them; every error is one line."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deflow_torchrl.envs.factory import register_robotics
from deflow_torchrl.errors import InputError, MissingExtraError, nearest, one_line
from deflow_torchrl.paths import only_one_prepares

if TYPE_CHECKING:
    from minari import EpisodeData, MinariDataset

_CONNECT_TIMEOUT_S = 10.0
_WRAPPERS_FROM = ("gymnasium", "gymnasium_robotics", "minari", "deflow_torchrl")
_OTHER_WAYS = (
    "record your own (minari.DataCollector, or as examples/adroit_demonstrations.py does), or copy the set's folder into "
    "$MINARI_DATASETS_PATH from a machine that has it"
)


@functools.cache
def import_minari() -> ModuleType:
    """Import ``minari`` and register the environments of ``gymnasium_robotics`` where that is installed.

    Raises:
        MissingExtraError: if minari, or what it reads its files with, is not installed.
    """
    try:
        import h5py  # noqa: F401
        import minari
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "minari", "minari") from error
    register_robotics()
    return minari


def open_minari_dataset(dataset_id: str, *, download: bool = True) -> MinariDataset:
    """Open a Minari set, fetched from Minari's remote first where it is not in ``$MINARI_DATASETS_PATH``.

    Args:
        dataset_id: for example ``D4RL/door/human-v2``.

    Keyword Args:
        download: fetch a missing set. A remote that does not answer within ten seconds is an error.

    Raises:
        InputError: on a malformed or unknown id, no network, or a damaged or unsupported set.
        MissingExtraError: if the ``minari`` extra is not installed.
    """
    minari = import_minari()
    from minari.dataset.minari_storage import MinariStorage

    with quiet():
        folder = _folder(dataset_id, "D4RL/door/human-v2")
        marker = _incomplete(folder)
        if marker.exists() or not (folder / "data").exists():
            near = nearest(dataset_id, minari.list_local_datasets())
            hint = f"; the nearest here are {', '.join(near)}" if near else ""
            if marker.exists():
                hint += f"; a download of it was broken off (delete {marker} if the set is complete now)"
            if not download:
                raise InputError(f"no Minari set {dataset_id} on this machine{hint}")
            _download(minari, dataset_id, folder, f"{hint}; {_OTHER_WAYS}")
        with _readable(dataset_id):
            metadata = MinariStorage.read_raw_metadata(folder / "data")
            if not {"observation_space", "action_space"} <= set(metadata) and metadata.get("env_spec") is not None:
                # minari makes the environment of a set that lacks its spaces, to ask for them.
                check_spec(json.loads(metadata["env_spec"]), dataset_id, exact=True)
            return minari.load_dataset(dataset_id, download=False)


def check_new_id(dataset_id: str) -> None:
    """Check that a new set can be written under an id, before it is recorded.

    Raises:
        InputError: on a malformed id, or if the set exists already.
        MissingExtraError: if the ``minari`` extra is not installed.
    """
    import_minari()
    if _folder(dataset_id, "mine/door-v0").exists():
        raise InputError(f"there is a Minari set {dataset_id} already; choose another id or delete that set")


def _folder(dataset_id: str, example: str) -> Path:
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise InputError(f"{dataset_id!r} is no Minari id; they look like {example}") from error
    return get_dataset_path(dataset_id)


def check_spec(spec: Mapping[str, Any], dataset_id: str, *, exact: bool) -> None:
    """Refuse to call code that is named only by a data set.

    gymnasium imports and calls the entry point that a specification names, so a downloaded set could run any code. Only an
    entry point that an installed package registers under the same id is called. The set may name another module of that
    package, because other versions of the package may have the environment elsewhere.

    Args:
        spec: the specification in the set's metadata.
        dataset_id: the set's id.

    Keyword Args:
        exact: whether the named entry point must be the registered one itself, because minari calls it.

    Raises:
        InputError: if the set names another entry point.
    """
    import gymnasium

    def package(entry_point: Any) -> str:
        return re.split(r"[.:]", str(entry_point))[0]

    registered = getattr(gymnasium.registry.get(spec["id"]), "entry_point", None)
    named = [wrapper["entry_point"] for wrapper in spec.get("additional_wrappers") or ()]
    named = [entry_point for entry_point in named if package(entry_point) not in _WRAPPERS_FROM]
    elsewhere = exact or not isinstance(registered, str) or package(spec["entry_point"]) != package(registered)
    if spec["entry_point"] != registered and elsewhere:
        named.insert(0, spec["entry_point"])
    if named:
        raise InputError(
            f"Minari set {dataset_id} wants {named[0]} to be called for its environment {spec['id']}; that is not what the "
            "installed packages register, so it is not run"
        )


def _incomplete(folder: Path) -> Path:
    """Marker file beside a set's folder during a download; if one is left over, the download was killed."""
    return folder.with_name(f".{folder.name}.incomplete")


def _download(minari: ModuleType, dataset_id: str, folder: Path, hint: str) -> None:
    """Download a set completely or not at all, in one process at a time."""
    try:
        from minari.storage.remotes import get_cloud_storage

        get_cloud_storage()  # imports the remote's client
        _check_network()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one_prepares(folder.name, folder.parent):
            marker = _incomplete(folder)
            if marker.exists():
                shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                return  # another process was faster
            marker.touch()
            try:
                # minari prints to standard output, which is kept for results.
                with contextlib.redirect_stdout(sys.stderr):
                    minari.download_dataset(dataset_id)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                marker.unlink(missing_ok=True)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"no Minari set {dataset_id} on this machine, and downloading needs another package "
            f"({one_line(error)}){hint}"
        ) from error
    except Exception as error:
        raise InputError(f"Minari set {dataset_id} could not be downloaded ({one_line(error)}){hint}") from error


def _check_network() -> None:
    """Send one request to the remote's host, through the configured proxies: its client would wait minutes for an answer."""
    kind = os.environ.get("MINARI_REMOTE", "hf://").split("://")[0]
    address = {
        "hf": os.environ.get("HF_ENDPOINT") or "https://huggingface.co",
        "gcp": "https://storage.googleapis.com",
    }.get(kind)
    if address is None:
        return
    host = urllib.parse.urlsplit(address).netloc or address
    try:
        request = urllib.request.Request(address, method="HEAD")
        urllib.request.build_opener(_NoRedirects).open(request, timeout=_CONNECT_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:  # an answer, unless it is the proxy's own
        error.close()
        if error.code == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            raise ConnectionError(f"no connection to {host}: the proxy asks for a password") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            return  # the host answers; the client may have more certificates
        if isinstance(reason, TimeoutError):
            reason = f"no answer in {_CONNECT_TIMEOUT_S:g} seconds"
        raise ConnectionError(f"no connection to {host}: {getattr(reason, 'strerror', None) or reason}") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Do not follow: a redirection is an answer."""


@contextlib.contextmanager
def _readable(dataset_id: str) -> Iterator[None]:
    """Turn errors of h5py and pyarrow, which may be of any type, into one line."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"Minari set {dataset_id}: {one_line(error)}") from error
    except Exception as error:
        raise InputError(
            f"Minari set {dataset_id} cannot be read ({type(error).__name__}: {one_line(error)}); "
            "delete its folder in $MINARI_DATASETS_PATH and download or record it again"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of minari and gymnasium about other sets, versions and missing descriptions."""
    with warnings.catch_warnings():
        for module in ("minari", "gymnasium"):
            warnings.filterwarnings("ignore", module=rf"{module}\b")
        yield


def minari_episodes(dataset: MinariDataset) -> Iterator[EpisodeData]:
    """Read a set's episodes one by one, so that memory holds one at a time.

    Raises:
        InputError: on a damaged file.
    """
    with _readable(dataset.id):
        yield from dataset.iterate_episodes()
