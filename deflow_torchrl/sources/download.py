# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Published OGBench data sets: downloaded from the official host or mirrors, or installed from the user's own files.

A download goes into ``NAME.npz.part``, which the next attempt continues wherever the one before it ended, be it by a
broken connection, Ctrl-C or a kill. ``NAME.npz.part.json`` notes what the bytes are the beginning of, so that two mirrors
or two versions of a file are never glued together. The first complete file of a name is read through (zip structure, CRC
of every member) and entered in the manifest ``SHA256.json``, later ones must have the digest there; only then is it renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from deflow_torchrl.envs.factory import import_ogbench
from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.paths import dataset_path, hold_lock, make_writable_folder, only_one_prepares, write_text
from deflow_torchrl.progress import byte_bar
from deflow_torchrl.sources.oracles import GENERATED_DATASETS

if TYPE_CHECKING:
    import requests

MANIFEST = "SHA256.json"
SPLITS = ("train", "val")

CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 30.0  # without a single byte
ATTEMPTS = 4  # at one mirror without progress
BACKOFF_S = 1.0  # doubled after each attempt
_PROGRESS_BYTES = 1 << 20  # what counts as progress
_CHUNK_BYTES = 1 << 16
_READ_BYTES = 1 << 20
_MEMBERS = ("observations.npy", "actions.npy", "terminals.npy")


class _MirrorFailed(Exception):
    """A mirror does not give the file: the reason, for the line about all mirrors."""


class _Unusable(_MirrorFailed):
    """What a mirror gave is complete and not the file."""


class _BrokenOff(Exception):
    """A transfer ended early; the same mirror may go on with it."""


def download_ogbench_dataset(
    dataset: str,
    root: str | os.PathLike[str],
    *,
    mirrors: Sequence[str] | None = None,
    splits: Sequence[str] = SPLITS,
    show_progress: bool = True,
) -> list[Path]:
    """Fetch the files of a data set that are missing in ``root``, from OGBench's host or, where it fails, from mirrors.

    Files that are there are left as they are, after a comparison with the manifest if it has them.

    Args:
        dataset: name of the data files, for example ``cube-single-play-v0``.
        root: folder of NAME.npz and NAME-val.npz.

    Keyword Args:
        mirrors: base URLs asked after the official host, in order. Defaults to those in ``$DEFLOW_MIRRORS``, separated by
            white space or commas.
        splits: which of ``"train"`` and ``"val"``.
        show_progress: show a progress bar on standard error.

    Returns:
        Paths of the splits' files.

    Raises:
        InputError: where no mirror gives a file (no network, errors, damaged content), a file differs from the manifest's,
            the folder is read-only, full, or holds a generated set of the name, or another process is writing the set
            there.
        MissingExtraError: if the ``ogbench`` extra is not installed.
    """
    root = Path(root).expanduser()
    paths = [dataset_path(dataset, root, split) for split in splits]
    bases = _mirrors(mirrors)
    _refuse_generated(dataset, root)
    if not all(path.is_file() for path in paths):
        import_ogbench()
        from ogbench import utils

        bases.insert(0, utils.DATASET_URL)
        with only_one_prepares(dataset, make_writable_folder(root)):
            for path in paths:
                if path.is_file():
                    _Part(path).discard()  # a kill just after the renaming leaves a note
                else:
                    fetch_file(
                        [f"{base.rstrip('/')}/{path.name}" for base in bases],
                        path,
                        otherwise=_other_ways(dataset),
                        show_progress=show_progress,
                    )
    for path in paths:
        _check_present(path)
    return paths


def fetch_file(
    urls: Sequence[str],
    path: Path,
    *,
    expected_sha256: str | None = None,
    otherwise: str = "",
    show_progress: bool = True,
) -> None:
    """Fetch one .npz file from the first of ``urls`` that gives it whole; ``path`` appears complete or not at all.

    What arrived before a failure stays in ``path`` + ``.part`` for the next call, unless it is proved corrupt.

    Args:
        urls: where to ask, in this order; one that an unfinished file is from comes first.
        path: the file to write, in a folder that exists. Its manifest entry is written in the same folder.

    Keyword Args:
        expected_sha256: digest of the content. Defaults to the manifest's where it has the file.
        otherwise: what to do instead, for the end of the error line.
        show_progress: show a progress bar on standard error.

    Raises:
        InputError: where every URL fails, each with its reason; on a full or read-only disk.
        MissingExtraError: if ``requests`` is not installed.
    """
    session = _session()
    part = _Part(path)
    expected = expected_sha256 or _manifest(path.parent).get(path.name, {}).get("sha256")
    known = part.known()
    if known is not None and known.total == part.size():
        # Killed between the last byte and the new name: no network needed any more.
        with suppress(_Unusable):
            _accept(part, path, _digest_of_npz(part.path, expected, show_progress), known.url)
            return
        part.discard()
    # The part's own URL first: another one that answers would start the file anew and throw away what arrived.
    begun = part.known()
    urls = sorted(urls, key=lambda url: begun is None or begun.url != url or part.size() == 0)
    failures = []
    with session:
        for url in urls:
            try:
                digest = _fetch_from(session, url, part, expected, show_progress)
            except _MirrorFailed as failure:
                failures.append(f"{urlsplit(url).netloc}: {failure}")
            else:
                _accept(part, path, digest, url)
                return
    kept = f"; {part.size() / 1e6:.1f} MB are kept: the same command goes on from there" if part.size() else ""
    raise InputError(
        f"no data file {path}: its download failed ({'; '.join(failures)}){kept}{'; ' if otherwise else ''}{otherwise}"
    )


def install_files(
    dataset: str, files: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str], *, show_progress: bool = True
) -> list[Path]:
    """Copy a data set's files, fetched in another way, into ``root`` under the names the package reads.

    Files called NAME.npz and NAME-val.npz are known by their names; one file of another name is the training file, two
    are the training and the validation file, in this order.

    Args:
        dataset: name of the data files, for example ``cube-single-play-v0``.
        files: one or two files.
        root: folder to copy into.

    Keyword Args:
        show_progress: show a progress bar on standard error.

    Returns:
        Paths of the copies, training file first.

    Raises:
        InputError: on a missing, damaged or wrongly named file, one that differs from the manifest's, another file of the
            name in the folder, a read-only or full disk, or where another process is writing the set there.
    """
    root = Path(root).expanduser()
    sources = _assign_splits(dataset, [Path(file).expanduser() for file in files])
    _refuse_generated(dataset, root)
    make_writable_folder(root)
    with only_one_prepares(dataset, root):
        entries, digests = _manifest(root), {}
        for split, source in sources.items():
            path = dataset_path(dataset, root, split)
            try:
                digests[split] = _digest_of_npz(source, entries.get(path.name, {}).get("sha256"), show_progress)
            except _Unusable as failure:
                raise InputError(f"{source} is not installed: {failure}") from failure
            if path.is_file() and _sha256(path) != digests[split]:
                raise InputError(f"{path} is in the way: it differs from {source}; choose another folder or delete it")
        if len(set(digests.values())) < len(digests):
            raise InputError(f"{' and '.join(map(str, sources.values()))} are the same file; give each split its own")
        for split, source in sources.items():
            path = dataset_path(dataset, root, split)
            if not path.is_file():
                _copy(source, path, digests[split])
            _Part(path).discard()
    return [dataset_path(dataset, root, split) for split in sources]


def manifest_entry(path: str | os.PathLike[str], *, sha256: str | None = None) -> dict[str, Any] | None:
    """What the manifest says about a file, provided that the file still is the one that was downloaded.

    Args:
        path: a data file.

    Keyword Args:
        sha256: the file's digest where the caller has it; computed otherwise.

    Returns:
        ``sha256``, ``bytes``, ``url`` and ``downloaded`` (UTC), or ``None`` for a file that is missing, unknown or changed.

    Raises:
        InputError: if the manifest is damaged.
    """
    path = Path(path)
    entry = _manifest(path.parent).get(path.name)
    if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
        return None
    return entry if (sha256 or _sha256(path)) == entry["sha256"] else None


def missing_file(path: Path, dataset: str) -> str:
    """The line about a data file that is not there and was not to be downloaded."""
    return (
        f"no data file {path}; fetch it with `deflow data download {dataset}`, name its folder with data_root=, "
        f"{_other_ways(dataset)}"
    )


# What lies on the disk: the part and what is known of it, the manifest.


@dataclass(frozen=True)
class _Known:
    """What a part is the beginning of.

    Attributes:
        url: where the bytes came from.
        total: bytes of the whole file, if the server said so.
        etag, last_modified: the server's words for this version of the file.
    """

    url: str
    total: int | None
    etag: str | None
    last_modified: str | None

    @property
    def validator(self) -> str | None:
        """What ``If-Range`` may carry: a weak ETag promises no equal bytes."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


class _Part:
    """The unfinished file beside ``path`` and the note about it."""

    def __init__(self, path: Path) -> None:
        self.target = path
        self.path = path.with_name(f"{path.name}.part")
        self.note = path.with_name(f"{path.name}.part.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def known(self) -> _Known | None:
        """The note, or ``None`` where there is none or it is not one of ours."""
        try:
            return _Known(**json.loads(self.note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, known: _Known) -> None:
        """Start anew with a file that ``known`` describes."""
        self.path.write_bytes(b"")  # before the note, which would else describe bytes of another file
        write_text(self.note, json.dumps(asdict(known), indent=2) + "\n")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def become(self, path: Path) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave the name without the bytes
        os.replace(self.path, path)
        self.note.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line; what was written stays."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}); what arrived is kept: the same command goes on from there"
        ) from error


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        entries = None
    fields = {"sha256": str, "bytes": int, "url": str, "downloaded": str}
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())
        for entry in entries.values()
    ):
        raise InputError(f"{path} is damaged; delete it: the next complete download writes a new one")
    return entries


def _accept(part: _Part, path: Path, digest: str, url: str) -> None:
    """Enter a complete, checked part in the manifest and give it its name."""
    with _writing(path):
        # The entry first: a file of this name then always has what later downloads are compared with.
        _enter(path, digest, part.size(), url)
        part.become(path)


def _enter(path: Path, digest: str, size: int, url: str) -> None:
    manifest = path.with_name(MANIFEST)
    with hold_lock(path.with_name(f".{MANIFEST}.lock")):  # other data sets are downloaded into the same folder
        entries = _manifest(path.parent)
        if entries.get(path.name, {}).get("sha256") != digest:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            entries[path.name] = {"sha256": digest, "bytes": size, "url": url, "downloaded": now}
            write_text(manifest, json.dumps(entries, indent=2, sort_keys=True) + "\n")


def _check_present(path: Path) -> None:
    """Compare a file with the manifest, if that has it."""
    if path.name in _manifest(path.parent) and manifest_entry(path) is None:
        raise InputError(
            f"{path} is not the file that was downloaded: its digest differs from the one in {MANIFEST}; delete the file "
            "to download it again, or its entry there to keep it"
        )


def _refuse_generated(dataset: str, root: Path) -> None:
    """Published files beside a generated set's description would pass for generated ones."""
    description = root / f"{dataset}.json"
    if description.is_file():
        raise InputError(
            f"{description} says that {dataset} was generated in this folder; choose another folder for the published set"
        )


# The transfer.


def _session() -> requests.Session:
    try:
        import requests
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "requests", "ogbench") from error
    return requests.Session()


def _mirrors(mirrors: Sequence[str] | None) -> list[str]:
    given = re.split(r"[\s,]+", os.environ.get("DEFLOW_MIRRORS", "")) if mirrors is None else mirrors
    bases = [base for base in given if base]
    for base in bases:
        if not re.match(r"https?://[^/]", base):
            raise InputError(
                f"{base!r} is no mirror ({'DEFLOW_MIRRORS' if mirrors is None else '--mirror'}); it is the URL of the "
                "folder that holds NAME.npz, https://..."
            )
    return bases


def _other_ways(dataset: str) -> str:
    generate = f"make it with `deflow data generate {dataset}`, or " if dataset in GENERATED_DATASETS else ""
    return f"{generate}install a copy with `deflow data download {dataset} --from-file FILE`"


def _fetch_from(session: requests.Session, url: str, part: _Part, expected: str | None, show_progress: bool) -> str:
    """Complete the part from one mirror and check it; returns its digest."""
    while True:
        resumed = _resumable(part, url) is not None
        _transfer(session, url, part, show_progress)
        try:
            return _digest_of_npz(part.path, expected, show_progress)
        except _Unusable:
            part.discard()
            if not resumed:
                raise  # else the older bytes may be to blame (a power cut, a careless server): once more from the start


def _transfer(session: requests.Session, url: str, part: _Part, show_progress: bool) -> None:
    """Go on with one mirror until the part is complete or it makes no more progress."""
    best, failures = part.size() if _resumable(part, url) else 0, 0
    while True:
        try:
            _request(session, url, part, show_progress)
            return
        except _BrokenOff as end:
            if part.size() >= best + _PROGRESS_BYTES:
                best, failures = part.size(), 0
            failures += 1
            if failures >= ATTEMPTS:
                raise _MirrorFailed(f"{end}, {failures} times") from end
            time.sleep(BACKOFF_S * 2 ** (failures - 1))


def _resumable(part: _Part, url: str) -> _Known | None:
    """What the part is the beginning of, if ``url`` may go on with it."""
    known = part.known()
    return known if known is not None and known.url == url and part.size() > 0 else None


def _request(session: requests.Session, url: str, part: _Part, show_progress: bool) -> None:
    """One request for what the part lacks, written as it arrives."""
    known = _resumable(part, url)
    if known is not None and known.total == part.size():
        return
    headers = {"Accept-Encoding": "identity"}  # the bytes of the file, whose length and ranges mean something
    if known is not None:
        headers["Range"] = f"bytes={part.size()}-"
        if known.validator is not None:
            headers["If-Range"] = known.validator
    with (
        _transfer_errors(),
        session.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as response,
    ):
        total = _begin(response, url, part, known)
        with (
            _writing(part.path),
            part.path.open("ab", buffering=0) as file,  # after a kill the file holds all that arrived
            byte_bar(part.target.name, total, initial=part.size(), show=show_progress) as bar,
        ):
            if total is None or part.size() < total:
                for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
                    _write_all(file, chunk)
                    bar.update(len(chunk))
            bar.leave = total is None or part.size() == total
    if total is not None and part.size() < total:
        raise _BrokenOff(f"ended after {part.size()} of {total} bytes")


def _begin(response: requests.Response, url: str, part: _Part, known: _Known | None) -> int | None:
    """Judge the head of an answer and leave in the part what its body continues; returns the whole file's bytes."""
    if response.status_code == 416 and known is not None:
        total = _number(r"bytes \*/(\d+)", response.headers.get("Content-Range", ""))
        if total == part.size():
            return total  # complete, of a server that had named no length; the check of the content follows
        part.discard()
        raise _BrokenOff("the file there has changed")
    if response.status_code == 206 and known is not None:
        content_range = response.headers.get("Content-Range", "")
        total = _number(r"bytes \d+-\d+/(\d+)", content_range)
        if _number(r"bytes (\d+)-", content_range) != part.size() or not _same_version(known, response, total):
            part.discard()
            raise _BrokenOff("the file there has changed")
        total = known.total if total is None else total
        _check_space(part.target, None if total is None else total - part.size())
        return total
    if response.status_code != 200:
        raise _MirrorFailed(f"HTTP {response.status_code} {response.reason}".rstrip())
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _MirrorFailed(f"sends the file in the encoding {response.headers['Content-Encoding']}")
    total = _number(r"(\d+)", response.headers.get("Content-Length", ""))
    _check_space(part.target, None if total is None else total - part.size())  # what is there makes room
    with _writing(part.path):
        part.begin(_Known(url, total, response.headers.get("ETag"), response.headers.get("Last-Modified")))
    return total


def _same_version(known: _Known, response: requests.Response, total: int | None) -> bool:
    """Whether an answer is about the file the part is the beginning of; servers exist that ignore ``If-Range``."""
    pairs = [(known.etag, response.headers.get("ETag")), (known.last_modified, response.headers.get("Last-Modified"))]
    pairs = [(before, now) for before, now in pairs if before is not None and now is not None]
    if any(before != now for before, now in pairs):
        return False
    if known.total is not None and total is not None:
        return known.total == total
    return bool(pairs)  # lengths cannot be compared: only the server's word counts


def _number(pattern: str, text: str) -> int | None:
    match = re.match(pattern, text)
    return int(match.group(1)) if match else None


def _check_space(path: Path, lacking: int | None) -> None:
    """Refuse what cannot fit before it is begun; ``lacking`` is ``None`` where nobody knows."""
    free = shutil.disk_usage(path.parent).free
    if lacking is not None and lacking > free:
        raise InputError(
            f"the disk of {path.parent} has {free / 1e6:.1f} MB free, {path.name} needs {lacking / 1e6:.1f} MB; make room "
            "or choose another folder (DEFLOW_HOME, data_root=, --out)"
        )


def _write_all(file: FileIO, chunk: bytes) -> None:
    """Write a chunk to an unbuffered file, which may take less than it is given."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def _transfer_errors() -> Iterator[None]:
    """Sort what the network does wrong: a mirror that is out of reach, or a transfer that ended early."""
    import requests
    import urllib3

    try:
        yield
    except (requests.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError) as error:
        raise _MirrorFailed(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
    except (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError) as error:
        raise _BrokenOff(f"sent nothing for {READ_TIMEOUT_S:g} s") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        inner = _innermost(error)
        reason = getattr(inner, "strerror", None) or " ".join(str(inner).split()) or type(inner).__name__
        # A broken connection had been one; anything else (refused, no such host, certificate) will not mend in seconds.
        broken = isinstance(error, urllib3.exceptions.HTTPError) or (
            error.args and isinstance(error.args[0], urllib3.exceptions.ProtocolError)
        )
        raise (_BrokenOff if broken else _MirrorFailed)(reason) from error


def _innermost(error: BaseException) -> BaseException:
    """The system's own error under the layers that libraries have put around it."""
    for _ in range(10):
        inner = (getattr(error, "reason", None), *error.args, error.__cause__, error.__context__)
        deeper = next((candidate for candidate in inner if isinstance(candidate, BaseException)), None)
        if deeper is None:
            break
        error = deeper
    return error


# The content.


def _digest_of_npz(path: Path, expected: str | None, show_progress: bool) -> str:
    """SHA-256 of a data file, which must be the expected one or, where none is, that of an archive sound in every byte.

    Raises:
        _Unusable: if it is not.
    """
    try:
        digest = _sha256(path, show_progress)
        if expected is None:
            _check_archive(path, show_progress)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error})") from error
    if expected is not None and digest != expected:
        raise _Unusable(
            f"its SHA-256 is {digest}, {MANIFEST} says {expected}; if the published file was replaced, delete that entry, "
            "else report it to this host"
        )
    return digest


def _sha256(path: Path, show_progress: bool = False) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, byte_bar(f"SHA-256 {path.name}", size, show=show_progress, delay=1.0) as bar:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _check_archive(path: Path, show_progress: bool) -> None:
    """Read an archive to its end, which compares every member with its CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            absent = [name for name in _MEMBERS if name not in archive.namelist()]
            if absent:
                raise _Unusable(f"has no {', '.join(absent)}: it is not an OGBench data set")
            total = sum(member.file_size for member in archive.infolist())
            with byte_bar(f"check {path.name}", total, show=show_progress, delay=1.0) as bar:
                for member in archive.infolist():
                    with archive.open(member) as file:
                        while block := file.read(_READ_BYTES):
                            bar.update(len(block))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: an offset that cannot be
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _Unusable(f"the file is damaged ({reason})") from error


def _assign_splits(dataset: str, files: Sequence[Path]) -> dict[str, Path]:
    names = {dataset_path(dataset, Path(), split).name: split for split in SPLITS}
    for path in files:
        if not path.is_file():
            raise InputError(f"no file {path}")
        if path.name not in names and re.fullmatch(r"[a-z0-9-]+-v\d+\.npz|[a-z0-9-]+-v\d+-val\.npz", path.name):
            raise InputError(f"{path} has the name of another data set than {dataset}; rename it if it is this one")
    named = [names.get(path.name) for path in files]
    free = iter(split for split in SPLITS if split not in named)
    chosen = [split or next(free, None) for split in named]
    if not files or None in chosen or len(set(chosen)) < len(files):
        raise InputError(f"give {' and '.join(names)}, each once; got {', '.join(map(str, files)) or 'no file'}")
    return {split: path for split in SPLITS for path, own in zip(files, chosen, strict=True) if own == split}


def _copy(source: Path, path: Path, digest: str) -> None:
    temporary = path.with_name(f".{path.name}.copy")  # one name, so that the next try replaces what a kill has left
    try:
        _check_space(path, source.stat().st_size)
        shutil.copyfile(source, temporary)
        if _sha256(temporary) != digest:
            raise InputError(
                f"{path} is not installed: the copy differs from {source}, which may be changing; try again"
            )
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot copy {source} to {path} ({error.strerror or error}); it is not installed") from error
    finally:
        temporary.unlink(missing_ok=True)
