import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ogbench", reason="needs the extra ogbench")
pytest.importorskip("requests", reason="needs the extra ogbench")

from deflow_torchrl.errors import InputError, MissingExtraError
from deflow_torchrl.sources import download
from deflow_torchrl.sources.download import (
    download_ogbench_dataset,
    fetch_file,
    install_files,
    manifest_entry,
)
from tests.support.command_line import assert_one_line, deflow, heed_ctrl_c
from tests.support.generation import DATASET, TASK

TRAIN, VAL = f"{DATASET}.npz", f"{DATASET}-val.npz"
REFUSED = "http://127.0.0.1:9"  # the discard port: nobody listens


def npz(seed=0, rows=4000) -> bytes:
    """A data file in OGBench's layout, 24 bytes a row."""
    stream, file = np.random.default_rng(seed), io.BytesIO()
    np.savez(
        file,
        observations=stream.normal(size=(rows, 4)).astype(np.float32),
        actions=np.zeros((rows, 1), np.float32),
        terminals=np.ones(rows, np.float32),
    )
    return file.getvalue()


def damaged(content: bytes) -> bytes:
    """Of the right length, with one bit of the observations changed."""
    at = content.index(b"observations.npy") + 1000
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


class Host(ThreadingHTTPServer):
    """A web server with range support and an ETag; the first requests meet the faults of ``faults``, in their order.

    Faults: a status (404, 500); ``truncate``, ``stall`` (half of the body, then the end or nothing); ``short`` (half of the
    body announced as if it were the whole); ``piece`` (less than the range asked for); ``drop`` (no answer); ``hold`` (a
    body that comes slowly).
    """

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.faults = []
        self.requests = []
        self.ranges, self.tags, self.lengths, self.heed_if_range = True, True, True, True
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/sets"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""

    def stop(self):
        self.released.set()
        self.shutdown()
        self.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        host = self.server
        self.close_connection = True
        name = self.path.removeprefix("/sets/")
        host.requests.append(SimpleNamespace(name=name, headers=dict(self.headers)))
        fault = host.faults.pop(0) if host.faults else None
        if fault == "drop":
            return
        if isinstance(fault, int) or name not in host.files:
            self.send_error(fault or 404)
            return
        content = host.files[name]
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        wanted = self.headers.get("Range") if host.ranges else None
        if host.heed_if_range and self.headers.get("If-Range") not in (None, tag):
            wanted = None
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if wanted and start >= len(content):
            self.answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": 0})
            return
        body = content[start:]
        headers = {"ETag": tag} if host.tags else {}
        if fault == "piece":
            body = body[: len(body) // 2]
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if host.lengths:
            headers["Content-Length"] = len(body) // 2 if fault == "short" else len(body)
        self.answer(206 if wanted else 200, headers)
        self.send_body(body, fault)

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_body(self, body, fault):
        if fault in ("truncate", "stall", "short"):
            self.wfile.write(body[: len(body) // 2])
            if fault == "stall":
                self.server.released.wait(10)
        elif fault == "hold":
            for at in range(0, len(body), 2000):
                self.wfile.write(body[at : at + 2000])
                if self.server.released.wait(0.02):
                    return
        else:
            self.wfile.write(body)


@pytest.fixture
def make_host():
    with contextlib.ExitStack() as stack:

        def make(files=None):
            host = Host({TRAIN: npz(0), VAL: npz(1, rows=400)} if files is None else files)
            stack.callback(host.stop)
            return host

        yield make


@pytest.fixture
def host(make_host):
    return make_host()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(download, "CONNECT_TIMEOUT_S", 10.0)
    monkeypatch.setattr(download, "READ_TIMEOUT_S", 10.0)  # tests of a stall shorten it
    monkeypatch.setattr(download, "BACKOFF_S", 0.01)
    monkeypatch.setattr(download, "_CHUNK_BYTES", 4096)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("DEFLOW_MIRRORS", raising=False)


@pytest.fixture
def official(monkeypatch):
    return lambda url: monkeypatch.setattr("ogbench.utils.DATASET_URL", url)


def fetch(tmp_path, *hosts, **options):
    urls = [f"{host if isinstance(host, str) else host.url}/{TRAIN}" for host in hosts]
    fetch_file(urls, tmp_path / TRAIN, **{"show_progress": False, **options})
    return (tmp_path / TRAIN).read_bytes()


def names(folder):
    return {path.name for path in folder.iterdir()}


def leave_part(host, folder):
    """Let a download of the training file break off in its middle; returns what arrived."""
    host.faults = ["truncate", *[500] * 10]
    with pytest.raises(InputError, match=r"HTTP 500 Internal Server Error.*are kept"):
        fetch(folder, host)
    host.faults, host.requests = [], []
    return (folder / f"{TRAIN}.part").read_bytes()


def entry(folder, name=TRAIN):
    return json.loads((folder / "SHA256.json").read_text())[name]


# Transfers that go wrong.


def test_a_truncated_body_is_continued_by_a_range_request(host, tmp_path):
    host.faults = ["truncate"]
    assert fetch(tmp_path, host) == host.files[TRAIN]
    first, second = host.requests
    assert "Range" not in first.headers
    assert first.headers["Accept-Encoding"] == "identity", "lengths and ranges are those of the file"
    start = int(second.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= len(host.files[TRAIN]) // 2
    assert second.headers["If-Range"].startswith('"')
    assert names(tmp_path) == {TRAIN, "SHA256.json"}


def test_what_a_failed_call_fetched_is_continued_by_the_next(host, tmp_path):
    part = leave_part(host, tmp_path)
    assert host.files[TRAIN].startswith(part)
    assert len(part) > 10_000
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert [request.headers["Range"] for request in host.requests] == [f"bytes={len(part)}-"]


def test_a_stalled_transfer_is_given_up_and_continued(host, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "READ_TIMEOUT_S", 0.3)
    host.faults = ["stall"]
    began = time.monotonic()
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert time.monotonic() - began < 3
    assert "Range" in host.requests[1].headers


def test_a_mirror_that_makes_no_progress_is_left_for_the_next(make_host, tmp_path):
    stuck, good = make_host(), make_host()
    stuck.faults = ["drop"] * 10
    assert fetch(tmp_path, stuck, good) == good.files[TRAIN]
    assert len(stuck.requests) == download.ATTEMPTS
    assert entry(tmp_path)["url"] == f"{good.url}/{TRAIN}"


@pytest.mark.parametrize("status", [404, 500])
def test_an_error_status_leads_to_the_next_mirror_at_once(status, make_host, tmp_path):
    bad, good = make_host(), make_host()
    bad.faults = [status] * 10
    assert fetch(tmp_path, bad, good) == good.files[TRAIN]
    assert len(bad.requests) == 1


def test_a_server_that_ignores_ranges_makes_it_start_anew(host, tmp_path):
    leave_part(host, tmp_path)
    host.ranges = False
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert len(host.requests) == 1


@pytest.mark.parametrize("heed_if_range", [True, False])
def test_a_file_that_changed_between_two_attempts_is_fetched_anew(heed_if_range, host, tmp_path, monkeypatch):
    leave_part(host, tmp_path)
    host.files[TRAIN], host.heed_if_range = npz(7), heed_if_range
    checked, check = [], download._digest_of_npz
    monkeypatch.setattr(download, "_digest_of_npz", lambda *args: checked.append(args) or check(*args))
    assert fetch(tmp_path, host) == npz(7)
    assert len(checked) == 1, "two versions were glued together, and only the content gave it away"


def test_without_validators_a_part_is_continued_only_at_the_same_length(host, tmp_path):
    host.tags = False
    part = leave_part(host, tmp_path)
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert host.requests[0].headers["Range"] == f"bytes={len(part)}-"
    assert "If-Range" not in host.requests[0].headers

    (tmp_path / "second").mkdir()
    leave_part(host, tmp_path / "second")
    host.files[TRAIN] = npz(8, rows=5000)
    assert fetch(tmp_path / "second", host) == host.files[TRAIN]


def test_same_length_without_validators_is_mended_by_the_check_of_the_content(host, tmp_path):
    host.tags = False
    leave_part(host, tmp_path)
    host.files[TRAIN] = npz(9)
    assert fetch(tmp_path, host) == npz(9)
    assert len(host.requests) == 2
    assert "Range" not in host.requests[1].headers


def test_a_part_of_another_mirror_is_not_continued(make_host, tmp_path):
    first, second = make_host(), make_host({TRAIN: npz(3)})
    leave_part(first, tmp_path)
    assert fetch(tmp_path, second) == npz(3)
    assert "Range" not in second.requests[0].headers


def test_a_part_of_a_later_mirror_is_continued_there_before_the_first_host_is_asked(make_host, tmp_path):
    first, second, third = make_host(), make_host(), make_host()
    part = leave_part(second, tmp_path)
    assert fetch(tmp_path, first, second, third) == second.files[TRAIN]
    assert [request.headers["Range"] for request in second.requests] == [f"bytes={len(part)}-"]
    assert first.requests == third.requests == []


def test_where_a_parts_own_mirror_fails_the_others_are_asked_in_their_order(make_host, tmp_path):
    first, second, third = make_host(), make_host(), make_host()
    leave_part(third, tmp_path)
    third.faults, first.faults = [500], [404]
    assert fetch(tmp_path, first, second, third) == second.files[TRAIN]
    assert [len(host.requests) for host in (third, first, second)] == [1, 1, 1]


def test_a_part_longer_than_the_file_is_dropped(host, tmp_path):
    leave_part(host, tmp_path)
    with (tmp_path / f"{TRAIN}.part").open("ab") as file:
        file.write(bytes(len(host.files[TRAIN])))
    assert fetch(tmp_path, host) == host.files[TRAIN]


def test_a_part_without_its_note_is_not_trusted(host, tmp_path):
    (tmp_path / f"{TRAIN}.part").write_bytes(b"who knows")
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert "Range" not in host.requests[0].headers


def test_a_server_that_names_no_length_is_read_to_its_end(host, tmp_path):
    host.lengths = False
    assert fetch(tmp_path, host) == host.files[TRAIN]


def test_a_range_beyond_the_end_of_a_complete_part_is_no_error(host, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "READ_TIMEOUT_S", 0.3)
    host.lengths = False
    host.faults = ["stall", *[500] * 10]
    with pytest.raises(InputError):
        fetch(tmp_path, host)
    (tmp_path / f"{TRAIN}.part").write_bytes(host.files[TRAIN])
    host.faults, host.requests = [], []
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert [request.headers["Range"] for request in host.requests] == [f"bytes={len(host.files[TRAIN])}-"]


def test_a_server_that_answers_with_less_than_the_range_is_asked_again(host, tmp_path):
    leave_part(host, tmp_path)
    host.faults = ["piece", "piece"]
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert len(host.requests) == 3


def test_a_complete_part_needs_no_network(host, tmp_path):
    """A kill between the last byte and the new name."""
    leave_part(host, tmp_path)
    (tmp_path / f"{TRAIN}.part").write_bytes(host.files[TRAIN])
    assert fetch(tmp_path, REFUSED) == host.files[TRAIN]
    assert host.requests == []
    assert entry(tmp_path)["url"] == f"{host.url}/{TRAIN}"


def test_a_kill_between_entry_and_new_name_is_finished_by_the_next_call(host, tmp_path, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download._Part, "become", die)
        with pytest.raises(KeyboardInterrupt):
            fetch(tmp_path, host)
    assert entry(tmp_path)["sha256"] == hashlib.sha256(host.files[TRAIN]).hexdigest()
    assert not (tmp_path / TRAIN).exists()
    assert fetch(tmp_path, REFUSED) == host.files[TRAIN]


# Content that is wrong.


def test_a_damaged_first_download_never_becomes_the_manifests_truth(make_host, tmp_path):
    bad = make_host({TRAIN: damaged(npz())})
    with pytest.raises(InputError, match=r"the file is damaged \(Bad CRC-32"):
        fetch(tmp_path, bad)
    assert names(tmp_path) == set()
    good = make_host()
    assert fetch(tmp_path, bad, good) == good.files[TRAIN]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Please log in to the network</html>", "the file is damaged"),
        (npz()[:-500], "the file is damaged"),
        (b"", "the file is damaged"),
    ],
)
def test_what_is_no_archive_is_refused(content, message, make_host, tmp_path):
    with pytest.raises(InputError, match=message):
        fetch(tmp_path, make_host({TRAIN: content}))
    assert names(tmp_path) == set()


def test_an_archive_of_something_else_is_refused(make_host, tmp_path):
    file = io.BytesIO()
    np.savez(file, weights=np.zeros(3))
    with pytest.raises(InputError, match=r"has no observations.npy.*not an OGBench data set"):
        fetch(tmp_path, make_host({TRAIN: file.getvalue()}))


def test_the_first_download_writes_the_manifest_and_later_ones_are_held_to_it(make_host, host, tmp_path):
    fetch(tmp_path, host)
    first = entry(tmp_path)
    assert first["sha256"] == hashlib.sha256(host.files[TRAIN]).hexdigest()
    assert first["bytes"] == len(host.files[TRAIN])
    assert first["url"] == f"{host.url}/{TRAIN}"
    assert first["downloaded"].startswith("20")
    (tmp_path / TRAIN).unlink()

    other = make_host({TRAIN: npz(5)})
    digest = hashlib.sha256(npz(5)).hexdigest()
    with pytest.raises(InputError, match=f"{digest}.*{first['sha256']}.*delete that entry, else report"):
        fetch(tmp_path, other)
    assert names(tmp_path) == {"SHA256.json"}
    assert fetch(tmp_path, other, host) == host.files[TRAIN]
    assert entry(tmp_path) == first


def test_a_server_that_announces_half_the_file_gives_a_damaged_file(host, tmp_path):
    host.faults = ["short"]
    with pytest.raises(InputError, match="the file is damaged"):
        fetch(tmp_path, host)


def test_an_expected_digest_is_required(host, tmp_path):
    with pytest.raises(InputError, match="its SHA-256 is"):
        fetch(tmp_path, host, expected_sha256="0" * 64)
    fetch(tmp_path, host, expected_sha256=hashlib.sha256(host.files[TRAIN]).hexdigest())


def test_a_damaged_manifest_is_one_line(host, tmp_path):
    for text in ("{", "[]", '{"a": 1}', '{"a": {"sha256": 1}}'):
        (tmp_path / "SHA256.json").write_text(text)
        with pytest.raises(InputError, match=r"SHA256.json is damaged; delete it"):
            fetch(tmp_path, host)


def test_manifest_entry_answers_for_the_downloaded_file_only(host, tmp_path):
    fetch(tmp_path, host)
    path = tmp_path / TRAIN
    assert manifest_entry(path) == entry(tmp_path)
    assert manifest_entry(path, sha256=entry(tmp_path)["sha256"]) == entry(tmp_path)
    assert manifest_entry(tmp_path / VAL) is None
    path.write_bytes(damaged(path.read_bytes()))
    assert manifest_entry(path) is None
    path.unlink()
    assert manifest_entry(path) is None


# A whole set.


def test_the_official_host_is_asked_first_then_the_mirrors_of_the_setting(make_host, official, tmp_path, monkeypatch):
    hosts = [make_host({}), make_host({VAL: npz(1)}), make_host()]
    official(hosts[0].url)
    monkeypatch.setenv("DEFLOW_MIRRORS", f" {hosts[1].url}/, {hosts[2].url}")
    paths = download_ogbench_dataset(DATASET, tmp_path, show_progress=False)
    assert [path.name for path in paths] == [TRAIN, VAL]
    assert [[request.name for request in host.requests] for host in hosts] == [[TRAIN, VAL], [TRAIN, VAL], [TRAIN]]
    assert entry(tmp_path, TRAIN)["url"].startswith(hosts[2].url)
    assert entry(tmp_path, VAL)["url"].startswith(hosts[1].url)
    assert names(tmp_path) == {TRAIN, VAL, "SHA256.json"}


def test_given_mirrors_replace_those_of_the_setting_and_complete_files_are_not_asked_for(
    host, official, tmp_path, monkeypatch
):
    official(REFUSED)
    monkeypatch.setenv("DEFLOW_MIRRORS", "nonsense")
    download_ogbench_dataset(DATASET, tmp_path, mirrors=[host.url], splits=["val"], show_progress=False)
    download_ogbench_dataset(DATASET, tmp_path, mirrors=[host.url], show_progress=False)
    download_ogbench_dataset(DATASET, tmp_path, mirrors=[], show_progress=False)
    assert [request.name for request in host.requests] == [VAL, TRAIN]
    with pytest.raises(InputError, match="'nonsense' is no mirror \\(DEFLOW_MIRRORS\\)"):
        download_ogbench_dataset(DATASET, tmp_path)


def test_without_network_one_line_lists_the_hosts_and_the_two_other_ways(official, tmp_path):
    official(REFUSED)
    with pytest.raises(InputError) as caught:
        download_ogbench_dataset(DATASET, tmp_path, mirrors=["http://nowhere.invalid"])
    line = str(caught.value)
    assert "127.0.0.1:9: Connection refused; nowhere.invalid: " in line
    assert f"make it with `deflow data generate {DATASET}`" in line
    assert f"`deflow data download {DATASET} --from-file FILE`" in line
    assert "\n" not in line
    assert names(tmp_path) == set()
    with pytest.raises(InputError) as caught:
        download_ogbench_dataset("antmaze-large-navigate-v0", tmp_path, mirrors=[])
    assert "generate" not in str(caught.value), "there is no generator for it"


def test_a_file_that_is_not_the_downloaded_one_is_pointed_out(host, official, tmp_path):
    official(host.url)
    download_ogbench_dataset(DATASET, tmp_path, show_progress=False)
    (tmp_path / VAL).write_bytes(npz(6))
    with pytest.raises(InputError, match=f"{VAL} is not the file that was downloaded"):
        download_ogbench_dataset(DATASET, tmp_path)


def test_published_files_are_not_put_beside_a_generated_set(official, tmp_path):
    (tmp_path / f"{DATASET}.json").write_text("{}")
    with pytest.raises(InputError, match="generated in this folder"):
        download_ogbench_dataset(DATASET, tmp_path)


def test_a_progress_bar_in_bytes_begins_where_the_part_ends(host, tmp_path, capsys):
    part = leave_part(host, tmp_path)
    fetch(tmp_path, host, show_progress=True)
    errors = capsys.readouterr().err
    first = next(line for line in errors.split("\r") if line.startswith(TRAIN))
    assert f"{len(part) / 1024:.1f}k/{len(host.files[TRAIN]) / 1024:.1f}k" in first
    assert "B/s" in errors
    assert f"{TRAIN}: 100%" in errors


# The disk, other processes.


def test_a_disk_without_room_is_refused_before_the_transfer(host, official, tmp_path, monkeypatch):
    official(host.url)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"0.0 MB free.*needs 0.1 MB"):
        download_ogbench_dataset(DATASET, tmp_path, show_progress=False)
    assert names(tmp_path) == set()


def test_a_disk_that_fills_keeps_what_arrived(host, tmp_path, monkeypatch):
    written, write_all = [], download._write_all

    def fill(file, chunk):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(chunk)
        write_all(file, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(download, "_write_all", fill)
        with pytest.raises(InputError, match=r"No space left on device.*what arrived is kept"):
            fetch(tmp_path, host)
    assert (tmp_path / f"{TRAIN}.part").read_bytes() == b"".join(written)
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert "Range" in host.requests[1].headers


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_real_full_device_is_one_line(host, tmp_path):
    (tmp_path / f"{TRAIN}.part").symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left on device"):
        fetch(tmp_path, host)


def test_a_second_process_is_refused_in_one_line(official, tmp_path):
    official(REFUSED)
    with (tmp_path / f".{DATASET}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for prepare in (
            lambda: download_ogbench_dataset(DATASET, tmp_path),
            lambda: install_files(DATASET, [__file__], tmp_path),
        ):
            with pytest.raises(InputError, match=f"another process is preparing {DATASET} in {tmp_path}; wait for it"):
                prepare()


CHILD = """
import sys
from pathlib import Path
from deflow_torchrl.sources import download
download._CHUNK_BYTES = 4096
try:
    download.fetch_file([sys.argv[1]], Path(sys.argv[2]))
except KeyboardInterrupt:
    raise SystemExit(130)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_download_killed_in_its_middle_goes_on(number, code, host, tmp_path):
    host.faults = ["hold"]
    path, part = tmp_path / TRAIN, tmp_path / f"{TRAIN}.part"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, f"{host.url}/{TRAIN}", str(path)],
        stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not part.exists() or part.stat().st_size < 8000:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(number)
    child.communicate(timeout=20)
    assert child.returncode == code
    assert names(tmp_path) == {part.name, f"{part.name}.json"}
    kept = part.read_bytes()
    assert len(kept) < len(host.files[TRAIN])
    assert fetch(tmp_path, host) == host.files[TRAIN]
    assert host.requests[1].headers["Range"] == f"bytes={len(kept)}-"


# The user's own files.


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for name, seed in ((TRAIN, 0), (VAL, 1), ("a.npz", 0), ("b.npz", 1)):
        (folder / name).write_bytes(npz(seed))
    (folder / "bad.npz").write_bytes(damaged(npz()))
    (folder / "scene-play-v0.npz").write_bytes(npz(2))
    return folder


@pytest.mark.parametrize(
    ("files", "installed"),
    [
        ([TRAIN, VAL], {TRAIN: 0, VAL: 1}),
        ([VAL, TRAIN], {TRAIN: 0, VAL: 1}),
        (["a.npz", "b.npz"], {TRAIN: 0, VAL: 1}),
        (["b.npz", TRAIN], {TRAIN: 0, VAL: 1}),
        (["a.npz"], {TRAIN: 0}),
        ([VAL], {VAL: 1}),
    ],
)
def test_own_files_are_known_by_name_then_by_order(files, installed, own, tmp_path):
    root = tmp_path / "root"
    for _ in range(2):  # the same content again is fine
        paths = install_files(DATASET, [own / name for name in files], root, show_progress=False)
        assert [path.name for path in paths] == list(installed)
        assert {path.name: path.read_bytes() for path in root.iterdir()} == {n: npz(s) for n, s in installed.items()}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["bad.npz"], "bad.npz is not installed: the file is damaged"),
        (["a.npz", "bad.npz"], "bad.npz is not installed"),
        (["nothing.npz"], "no file"),
        (["scene-play-v0.npz"], "name of another data set"),
        (["a.npz", "b.npz", TRAIN], "each once"),
        ([TRAIN, TRAIN], "each once"),
        (["a.npz", TRAIN], "are the same file"),
        ([], "got no file"),
    ],
)
def test_own_files_that_are_refused_leave_nothing(files, message, own, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(InputError, match=message):
        install_files(DATASET, [own / name for name in files], root, show_progress=False)
    assert names(root) == set()


def test_own_files_never_replace_other_data_and_are_held_to_the_manifest(host, own, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    leave_part(host, root)
    fetch(root, host)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    with pytest.raises(InputError, match="its SHA-256 is"):
        install_files(DATASET, [own / "b.npz"], root, show_progress=False)
    (root / VAL).write_bytes(npz(4))
    with pytest.raises(InputError, match=f"{VAL} is in the way"):
        install_files(DATASET, [own / VAL], root, show_progress=False)
    (root / VAL).unlink()
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    (root / TRAIN).unlink()
    leave_part(host, root)
    install_files(DATASET, [own / "a.npz"], root, show_progress=False)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before, "the unfinished download is gone"


def test_a_copy_onto_a_full_disk_leaves_nothing(own, tmp_path, monkeypatch):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    root = tmp_path / "root"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(InputError, match=r"No space left on device.*not installed"):
            install_files(DATASET, [own / "a.npz"], root, show_progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="MB free"):
        install_files(DATASET, [own / "a.npz"], root, show_progress=False)
    assert names(root) == set()


# The command.


def test_the_command_downloads_and_says_how_to_go_on(host, official, tmp_path):
    official(REFUSED)
    home = {"DEFLOW_HOME": str(tmp_path), "DEFLOW_MIRRORS": host.url}
    result = deflow("data", "download", TASK, "--json", env=home)
    assert result.returncode == 0, result.stderr
    line, summary = result.stdout.splitlines()
    summary = json.loads(summary)
    assert summary["files"] == [str(tmp_path / "data" / name) for name in (TRAIN, VAL)]
    assert summary["train"] == f"deflow train task={TASK}"
    assert summary["missing"] == []
    assert line.endswith(summary["train"])
    assert all(file in line for file in summary["files"])
    out = tmp_path / "out"
    result = deflow("data", "download", "cube-single-play", "--mirror", host.url, "--out", str(out))
    assert result.stdout.endswith(f"deflow train task=cube-single-play-singletask-v0 data_root={out}\n")


def test_the_command_installs_own_files_and_names_what_is_missing(own, tmp_path):
    arguments = ("data", "download", DATASET, "--out", str(tmp_path / "out"), "--from-file", str(own / "a.npz"))
    result = deflow(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert f"{VAL} is still missing" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["missing"] == [str(tmp_path / "out" / VAL)]
    result = deflow(*arguments, "--from-file", str(own / "b.npz"))
    assert "are ready; go on with" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([DATASET], ["Connection refused", f"deflow data generate {DATASET}", "--from-file FILE"]),
        (["cube-sinle-play"], ["did you mean cube-single-play-v0"]),
        (["cube-single-play-singletask-task9-v0"], ["did you mean cube-single-play-singletask"]),
        ([DATASET, "--mirror", "ftp://example.org"], ["'ftp://example.org' is no mirror"]),
        ([DATASET, "--mirror", "http://example.org", "--from-file", "x"], ["not both"]),
        ([DATASET, "--from-file", "x"], ["no file x"]),
        ([DATASET, "--out", "FILE/data"], ["cannot write in"]),
    ],
)
def test_the_command_refuses_in_one_line_with_code_2_and_leaves_nothing(arguments, messages, official, tmp_path):
    official(REFUSED)
    (tmp_path / "FILE").touch()
    result = deflow("data", "download", *arguments, cwd=tmp_path, env={"DEFLOW_HOME": str(tmp_path / "home")})
    assert_one_line(result, *messages)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"FILE"}


def test_without_requests_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(MissingExtraError, match=r"requests is not installed.*deflow-torchrl\[ogbench\]"):
        fetch_file([f"{REFUSED}/{TRAIN}"], tmp_path / TRAIN)
