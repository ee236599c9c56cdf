# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Minari sets on this machine: found, downloaded and opened, with errors in one line."""

from __future__ import annotations

import contextlib
import difflib
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
from deflow_torchrl.errors import InputError, MissingExtraError
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
        download: fetch a set that is not here. A remote that cannot be reached is given up after ten seconds.

    Raises:
        InputError: on a malformed or unknown id, no network, or a damaged or unsupported set.
        MissingExtraError: if the ``minari`` extra is not installed.
    """
    minari = import_minari()
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise InputError(f"{dataset_id!r} is no Minari id; they look like D4RL/door/human-v2") from error
    with quiet():
        folder = get_dataset_path(dataset_id)
        if _broken_off(folder).exists() or not (folder / "data").exists():
            if not download:
                raise InputError(
                    f"no Minari set {dataset_id} on this machine{_near(minari, dataset_id)}{_kept(folder)}"
                )
            _download(minari, dataset_id, folder)
        try:
            metadata = MinariStorage.read_raw_metadata(get_dataset_path(dataset_id) / "data")
            lacking = "observation_space" not in metadata or "action_space" not in metadata
            if lacking and metadata.get("env_spec") is not None:
                # minari makes the environment of a set that lacks its spaces, to ask for them.
                check_spec(json.loads(metadata["env_spec"]), dataset_id, made_as_it_says=True)
            return minari.load_dataset(dataset_id, download=False)
        except InputError:
            raise
        except Exception as error:
            raise _unreadable(dataset_id, error) from error


def check_new_id(dataset_id: str) -> None:
    """Check that a set could be written under an id, before the work of recording it is done.

    Raises:
        InputError: on a malformed id, or where there is such a set already.
        MissingExtraError: if the ``minari`` extra is not installed.
    """
    import_minari()
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        raise InputError(f"{dataset_id!r} is no Minari id; they look like mine/door-v0") from error
    if get_dataset_path(dataset_id).exists():
        raise InputError(f"there is a Minari set {dataset_id} already; choose another id or delete that set")


def check_spec(spec: Mapping[str, Any], dataset_id: str, *, made_as_it_says: bool) -> None:
    """Check that the environment a set names is code of this machine's choice.

    gymnasium imports and calls whatever a specification names, so that somebody's set could run anything. Only what an
    installed package registered under the same id is called; the set may name another place in that package, where the
    environment was in another version of it.

    Args:
        spec: what the set says.
        dataset_id: the set's id.

    Keyword Args:
        made_as_it_says: whether the very place the set names is called (by minari), so that it must be the registered one.

    Raises:
        InputError: where the set names something else.
    """
    import gymnasium

    registered = gymnasium.registry.get(spec["id"])
    entry_point = None if registered is None else registered.entry_point
    same = spec["entry_point"] == entry_point
    if not same and not made_as_it_says and isinstance(entry_point, str):
        same = _package(str(spec["entry_point"])) == _package(entry_point)
    named = [] if same else [spec["entry_point"]]
    wrappers = (str(wrapper["entry_point"]) for wrapper in spec.get("additional_wrappers") or ())
    named += [wrapper for wrapper in wrappers if _package(wrapper) not in _WRAPPERS_FROM]
    if named:
        raise InputError(
            f"Minari set {dataset_id} wants {named[0]} to be called for its environment {spec['id']}; that is not what the "
            "installed packages register, so it is not run"
        )


def _package(entry_point: str) -> str:
    return re.split(r"[.:]", entry_point)[0]


def _broken_off(folder: Path) -> Path:
    """A file beside a set's folder while it is downloaded; one that is left tells that the download was killed."""
    return folder.with_name(f".{folder.name}.incomplete")


def _kept(folder: Path) -> str:
    marker = _broken_off(folder)
    return f"; a download of it was broken off (delete {marker} if the set is complete now)" if marker.exists() else ""


def _download(minari: ModuleType, dataset_id: str, folder: Path) -> None:
    """Download a set, all of it or nothing, in one process at a time."""
    hint = f"{_near(minari, dataset_id)}{_kept(folder)}; {_OTHER_WAYS}"
    try:
        from minari.storage.remotes import get_cloud_storage

        get_cloud_storage()  # imports the remote's client
        _check_network()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with only_one_prepares(folder.name, folder.parent):
            marker = _broken_off(folder)
            if marker.exists():
                shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                return  # another process was faster
            marker.touch()
            try:
                # The set's files come with progress bars on standard error and lines on standard output, to be kept clean.
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
    """Ask the remote's host for an answer once, through the proxies that are set: its client waits for minutes without one."""
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
    except urllib.error.HTTPError as error:  # an answer all the same, unless the proxy's own
        error.close()
        if error.code == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            raise ConnectionError(f"no connection to {host}: the proxy asks for a password") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            return  # it answers; the client may know more certificates
        if isinstance(reason, TimeoutError):
            reason = f"no answer in {_CONNECT_TIMEOUT_S:g} seconds"
        raise ConnectionError(f"no connection to {host}: {getattr(reason, 'strerror', None) or reason}") from error


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirection is an answer."""


def _near(minari: ModuleType, dataset_id: str) -> str:
    near = difflib.get_close_matches(dataset_id, list(minari.list_local_datasets()), n=3)
    return f"; the nearest here are {', '.join(near)}" if near else ""


def _unreadable(dataset_id: str, error: Exception) -> InputError:
    if isinstance(error, ImportError):
        return InputError(f"Minari set {dataset_id}: {one_line(error)}")
    return InputError(
        f"Minari set {dataset_id} cannot be read ({type(error).__name__}: {one_line(error)}); "
        "delete its folder in $MINARI_DATASETS_PATH and download or record it again"
    )


def one_line(error: BaseException) -> str:
    """Say in one line what an error says."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of minari and gymnasium about other sets, versions and missing descriptions."""
    with warnings.catch_warnings():
        for module in ("minari", "gymnasium"):
            warnings.filterwarnings("ignore", module=rf"{module}\b")
        yield


def minari_episodes(dataset: MinariDataset) -> Iterator[EpisodeData]:
    """Read a set's episodes one by one, so that memory holds one at a time.

    Raises:
        InputError: on a damaged file.
    """
    try:
        yield from dataset.iterate_episodes()
    except InputError:
        raise
    except Exception as error:  # h5py and pyarrow raise whatever the damage leads to
        raise _unreadable(dataset.id, error) from error
