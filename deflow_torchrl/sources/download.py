# Copyright (c) 2026 The deflow_torchrl authors. MIT licence: see LICENSE.
"""Published OGBench data sets: downloaded from the official host or a mirror, or installed from the user's own files.

A download is written to ``NAME.npz.part``. After a broken connection, Ctrl-C or a kill, the next attempt continues it.
``NAME.npz.part.json`` names the URL, the length and the version that the part belongs to, so that parts of two mirrors or of
two versions of a file are never joined. A complete file is compared with its SHA-256 in the manifest ``SHA256.json``. A file
that the manifest does not know is read through (zip structure and CRC of every member) and entered there. Then it is renamed.
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
_PROGRESS_BYTES = 1 << 20  # after which the attempts are counted anew
_CHUNK_BYTES = 1 << 16
_READ_BYTES = 1 << 20
_MEMBERS = ("observations.npy", "actions.npy", "terminals.npy")


class _MirrorFailed(Exception):
    """A mirror cannot give the file; the message is the reason."""


class _Unusable(_MirrorFailed):
    """A complete file has another digest, is damaged, or is no data set."""


class _BrokenOff(Exception):
    """A transfer ended early; the same mirror may continue it."""


def download_ogbench_dataset(
    dataset: str,
    root: str | os.PathLike[str],
    *,
    mirrors: Sequence[str] | None = None,
    splits: Sequence[str] = SPLITS,
    show_progress: bool = True,
) -> list[Path]:
    """Fetch the files of a data set that are missing in ``root``, from OGBench's host or, where it fails, from mirrors.

    Files in the folder are not changed; those in the manifest are compared with it.

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
        if path.name in _manifest(root) and manifest_entry(path) is None:
            raise InputError(
                f"{path} is not the file that was downloaded: its digest differs from the one in {MANIFEST}; delete the "
                "file to download it again, or its entry there to keep it"
            )
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

    The part that arrived before a failure stays in ``path`` + ``.part`` for the next call, unless it is proved corrupt.

    Args:
        urls: where to ask, in this order; the URL of an unfinished part comes first.
        path: the file to write, in a folder that exists. Its manifest entry is written in the same folder.

    Keyword Args:
        expected_sha256: digest of the content. Defaults to the manifest's where it has the file.
        otherwise: what to do instead, for the end of the error line.
        show_progress: show a progress bar on standard error.

    Raises:
        InputError: where every URL fails, each with its reason; on a full or read-only disk.
        MissingExtraError: if ``requests`` is not installed.
    """
    try:
        import requests
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "requests", "ogbench") from error
    part = _Part(path)
    expected = expected_sha256 or _manifest(path.parent).get(path.name, {}).get("sha256")
    note = part.note()
    if note is not None and note["total"] == part.size():
        # Killed between the last byte and the new name: no network is needed.
        with suppress(_Unusable):
            part.accept(_digest_of_npz(part.path, expected, show_progress), note["url"])
            return
        part.discard()
    failures = []
    with requests.Session() as session:
        # The part's own URL first: any other would start anew and throw away what arrived.
        for url in sorted(urls, key=lambda url: part.note(url) is None):
            try:
                digest = _fetch_from(session, url, part, expected, show_progress)
            except _MirrorFailed as failure:
                failures.append(f"{urlsplit(url).netloc}: {failure}")
            else:
                part.accept(digest, url)
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
    with only_one_prepares(dataset, make_writable_folder(root)):
        entries, digests = _manifest(root), {}
        for path, source in ((dataset_path(dataset, root, split), source) for split, source in sources.items()):
            try:
                digests[path] = _digest_of_npz(source, entries.get(path.name, {}).get("sha256"), show_progress)
            except _Unusable as failure:
                raise InputError(f"{source} is not installed: {failure}") from failure
            if path.is_file() and _sha256(path) != digests[path]:
                raise InputError(f"{path} is in the way: it differs from {source}; choose another folder or delete it")
        if len(set(digests.values())) < len(digests):
            raise InputError(f"{' and '.join(map(str, sources.values()))} are the same file; give each split its own")
        for (path, digest), source in zip(digests.items(), sources.values(), strict=True):
            part = _Part(path)
            part.discard()
            if not path.is_file():
                _copy(source, part, digest)
    return list(digests)


def manifest_entry(path: str | os.PathLike[str], *, sha256: str | None = None) -> dict[str, Any] | None:
    """Look a file up in the manifest of its folder.

    Args:
        path: a data file.

    Keyword Args:
        sha256: the file's digest where the caller has it; computed otherwise.

    Returns:
        ``sha256``, ``bytes``, ``url`` and ``downloaded`` (UTC), or ``None`` for a file that is missing, unknown or changed
        since its download.

    Raises:
        InputError: if the manifest is damaged.
    """
    path = Path(path)
    entry = _manifest(path.parent).get(path.name)
    if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
        return None
    return entry if (sha256 or _sha256(path)) == entry["sha256"] else None


def missing_file(path: Path, dataset: str) -> str:
    """The error line about a data file that is not there, with the ways to get it."""
    return (
        f"no data file {path}; fetch it with `deflow data download {dataset}`, name its folder with data_root=, "
        f"{_other_ways(dataset)}"
    )


def _other_ways(dataset: str) -> str:
    generate = f"make it with `deflow data generate {dataset}`, or " if dataset in GENERATED_DATASETS else ""
    return f"{generate}install a copy with `deflow data download {dataset} --from-file FILE`"


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


def _refuse_generated(dataset: str, root: Path) -> None:
    """Published files beside a generated set's description would pass for generated ones."""
    description = root / f"{dataset}.json"
    if description.is_file():
        raise InputError(
            f"{description} says that {dataset} was generated in this folder; choose another folder for the published set"
        )


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries.values():
            if [type(entry[name]) for name in ("sha256", "bytes", "url", "downloaded")] != [str, int, str, str]:
                raise ValueError("an entry has other fields")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged; delete it: the next complete download writes a new one") from error
    return entries


class _Part:
    """The unfinished file beside ``target``, and the note about the file it is the beginning of.

    The note holds ``url``, ``total`` (bytes of the whole file, or ``None``), ``etag`` and ``last_modified`` (the server's names
    for this version of the file, or ``None``).
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def note(self, url: str | None = None) -> dict[str, Any] | None:
        """The note, or ``None`` where there is none; with ``url``, only if there is something from there to continue."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            usable = note.keys() == {"url", "total", "etag", "last_modified"}
        except (OSError, ValueError, AttributeError):
            return None
        return note if usable and (url is None or (note["url"] == url and self.size() > 0)) else None

    def begin(self, note: dict[str, Any]) -> None:
        """Start anew with the file that ``note`` describes."""
        with _writing(self.path):
            self.path.write_bytes(b"")  # first: the note must not describe bytes of another file
            write_text(self._note, json.dumps(note, indent=2) + "\n")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def accept(self, digest: str, url: str) -> None:
        """Enter the complete, checked part in the manifest and give it its name."""
        manifest = self.target.with_name(MANIFEST)
        # The entry first: a file of this name then always has a digest that later downloads are compared with.
        with _writing(self.target), hold_lock(manifest.with_name(f".{MANIFEST}.lock")):
            entries = _manifest(self.target.parent)
            if entries.get(self.target.name, {}).get("sha256") != digest:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                entry = {"sha256": digest, "bytes": self.size(), "url": url, "downloaded": now}
                write_text(manifest, json.dumps({**entries, self.target.name: entry}, indent=2, sort_keys=True) + "\n")
            self.become()

    def become(self) -> None:
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())  # a power cut must not leave the name without the bytes
        os.replace(self.path, self.target)
        self._note.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line; the bytes that were written stay."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # requests' errors are OSErrors too
            raise
        raise InputError(
            f"cannot write {path} ({error.strerror or error}); what arrived is kept: the same command goes on from there"
        ) from error


def _fetch_from(session: requests.Session, url: str, part: _Part, expected: str | None, show_progress: bool) -> str:
    """Complete the part from one mirror and check it; returns its digest."""
    resumed = part.note(url) is not None
    best, failures = part.size() if resumed else 0, 0
    while True:
        try:
            _request(session, url, part, show_progress)
            return _digest_of_npz(part.path, expected, show_progress)
        except _BrokenOff as end:
            if part.size() >= best + _PROGRESS_BYTES:
                best, failures = part.size(), 0
            failures += 1
            if failures >= ATTEMPTS:
                raise _MirrorFailed(f"{end}, {failures} times") from end
            time.sleep(BACKOFF_S * 2 ** (failures - 1))
        except _Unusable:
            part.discard()
            if not resumed:
                raise
            # The older bytes may be to blame (a power cut, a careless server): once more from the start.
            resumed, best, failures = False, 0, 0


def _request(session: requests.Session, url: str, part: _Part, show_progress: bool) -> None:
    """Request the rest of the file once and append it as it arrives."""
    note, size = part.note(url), part.size()
    if note is not None and note["total"] == size:
        return
    headers = {"Accept-Encoding": "identity"}  # lengths and ranges are those of the file
    if note is not None:
        headers["Range"] = f"bytes={size}-"
        weak = note["etag"] is None or note["etag"].startswith("W/")  # does not promise equal bytes
        if validator := note["last_modified"] if weak else note["etag"]:
            headers["If-Range"] = validator
    with (
        _transfer_errors(),
        session.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as response,
    ):
        total = _begin(response, url, part, note)
        with (
            _writing(part.path),
            part.path.open("ab", buffering=0) as file,  # after a kill the file holds all that arrived
            byte_bar(part.target.name, total, initial=part.size(), show=show_progress) as bar,
        ):
            if total != part.size():
                for chunk in response.iter_content(_CHUNK_BYTES):
                    _write_all(file, chunk)
                    bar.update(len(chunk))
            bar.leave = total in (None, part.size())
    if total is not None and part.size() < total:
        raise _BrokenOff(f"ended after {part.size()} of {total} bytes")


def _write_all(file: FileIO, chunk: bytes) -> None:
    """Write a chunk to an unbuffered file, which may take less than it is given."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]


def _begin(response: requests.Response, url: str, part: _Part, note: dict[str, Any] | None) -> int | None:
    """Check a response's head and prepare the part for its body; returns the length of the whole file if it is known."""
    status, headers, size = response.status_code, response.headers, part.size()
    if note is not None and status in (206, 416):
        content_range = headers.get("Content-Range", "")
        total = _number(r"bytes (?:\d+-\d+|\*)/(\d+)", content_range)
        if status == 416 and total == size:
            return total  # complete, from a server that had named no length; the content is checked next
        if status == 206 and _number(r"bytes (\d+)-", content_range) == size and _same_version(note, headers, total):
            return note["total"] if total is None else total
        part.discard()
        raise _BrokenOff("the file there has changed")
    if status != 200:
        raise _MirrorFailed(f"HTTP {status} {response.reason}".rstrip())
    if headers.get("Content-Encoding", "identity") != "identity":
        raise _MirrorFailed(f"sends the file in the encoding {headers['Content-Encoding']}")
    total = _number(r"(\d+)", headers.get("Content-Length", ""))
    _check_space(part.target, (total or 0) - size)  # the old part makes room
    validators = {"etag": headers.get("ETag"), "last_modified": headers.get("Last-Modified")}
    part.begin({"url": url, "total": total, **validators})
    return total


def _number(pattern: str, text: str) -> int | None:
    match = re.match(pattern, text)
    return int(match[1]) if match else None


def _same_version(note: dict[str, Any], headers: Any, total: int | None) -> bool:
    """Whether a response is about the file that the part is the beginning of; some servers ignore ``If-Range``."""
    pairs = [(note["etag"], headers.get("ETag")), (note["last_modified"], headers.get("Last-Modified"))]
    known = [before == now for before, now in pairs if before is not None and now is not None]
    if note["total"] is not None and total is not None:
        return all(known) and note["total"] == total
    return bool(known) and all(known)  # without lengths, only the server's word counts


def _check_space(path: Path, lacking: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if lacking > free:
        raise InputError(
            f"the disk of {path.parent} has {free / 1e6:.1f} MB free, {path.name} needs {lacking / 1e6:.1f} MB; make room "
            "or choose another folder (DEFLOW_HOME, data_root=, --out)"
        )


@contextmanager
def _transfer_errors() -> Iterator[None]:
    """Tell a mirror that is out of reach from a transfer that ended early."""
    import requests
    from urllib3.exceptions import ProtocolError, ReadTimeoutError, SSLError

    try:
        yield
    except requests.RequestException as error:
        cause = error.args[0] if error.args else None
        if isinstance(error, requests.ConnectTimeout):
            raise _MirrorFailed(f"no connection within {CONNECT_TIMEOUT_S:g} s") from error
        if isinstance(error, requests.ReadTimeout) or isinstance(cause, ReadTimeoutError):
            raise _BrokenOff(f"sent nothing for {READ_TIMEOUT_S:g} s") from error
        # The connection broke. Any other reason (refused, no such host, certificate) will not pass in seconds.
        failure = _BrokenOff if isinstance(cause, ProtocolError | SSLError) else _MirrorFailed
        raise failure(_innermost_reason(error)) from error


def _innermost_reason(error: BaseException) -> str:
    """The system's own message, without those of the libraries around it."""
    inner: BaseException | None = error
    while inner is not None:
        error = inner
        candidates = (getattr(error, "reason", None), *error.args, error.__cause__, error.__context__)
        inner = next((candidate for candidate in candidates if isinstance(candidate, BaseException)), None)
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _digest_of_npz(path: Path, expected: str | None, show_progress: bool) -> str:
    """SHA-256 of a data file. Where no digest is expected, the archive is read through to its last byte.

    Raises:
        _Unusable: if the digest is not the expected one or the archive is damaged.
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
            if absent := [name for name in _MEMBERS if name not in archive.namelist()]:
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
        if path.name not in names and re.fullmatch(r"[a-z0-9-]+-v\d+(-val)?\.npz", path.name):
            raise InputError(f"{path} has the name of another data set than {dataset}; rename it if it is this one")
    free = iter(split for name, split in names.items() if name not in [path.name for path in files])
    chosen = {names.get(path.name) or next(free, None): path for path in files}
    if not files or None in chosen or len(chosen) < len(files):
        raise InputError(f"give {' and '.join(names)}, each once; got {', '.join(map(str, files)) or 'no file'}")
    return {split: chosen[split] for split in SPLITS if split in chosen}


def _copy(source: Path, part: _Part, digest: str) -> None:
    """Copy ``source`` over the part, check the copy and give it its name; a failure leaves nothing."""
    path = part.target
    try:
        _check_space(path, source.stat().st_size)
        shutil.copyfile(source, part.path)
        if _sha256(part.path) != digest:
            raise InputError(
                f"{path} is not installed: the copy differs from {source}, which may be changing; try again"
            )
        part.become()
    except OSError as error:
        raise InputError(f"cannot copy {source} to {path} ({error.strerror or error}); it is not installed") from error
    finally:
        part.discard()
