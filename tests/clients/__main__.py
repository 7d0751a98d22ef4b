"""Installs the real clients and drives each against a real server (scripts/test-clients).

    python -m tests.clients [--scratch FOLDER] [--record FOLDER] [NAME...]

Prints one line for each check, then `N passed, N failed`; the exit status is 1 if a check failed. NAMEs are agents (claude,
codex, opencode, mini, aider) or SDKs (python, node); all by default. `--record` writes the requests of each agent as fixtures
of tests/serve.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.clients.drives import DRIVES, ROOT, Drive, Failed, check_requests, claudes_context, place, session, written
from tests.clients.fixtures import write_fixture
from tests.clients.install import install

SDKS = ("python", "node")


class Tally:
    """Counts and prints checks as they are made."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def note(self, name: str, reason: str = "", seconds: float | None = None) -> None:
        self.failed += bool(reason)
        self.passed += not reason
        took = "" if seconds is None else f" ({seconds:.1f} s)"
        print(f"FAILED {name}{took}: {reason}" if reason else f"ok     {name}{took}", flush=True)

    def check(self, name: str, work: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            work()
        except Failed as error:
            self.note(name, str(error), time.monotonic() - began)
        else:
            self.note(name, "", time.monotonic() - began)


@contextmanager
def server(record: Path, *options: str) -> Iterator[str]:
    """The address of a server in its own process, which writes its requests to `record`."""
    command = [sys.executable, "-m", "tests.clients.scripted", str(record), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def heard(record: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


def drive_agent(name: str, drive: Drive, programs: Path, tally: Tally, fixtures: Path | None) -> None:
    for how, work, options in (("run", session, ()), ("connect --write", written, ("--key",))):
        with place(programs) as at:
            record = at.folder / "requests.jsonl"
            with server(record, *options) as url:
                tally.check(f"{name}: two tasks, by {how}", lambda work=work, url=url, at=at: work(drive, url, at))
            requests = heard(record)
            tally.check(f"{name}: its requests, by {how}", lambda requests=requests: check_requests(drive, requests))
            if fixtures is not None and work is session and drive.streamed == DRIVES[drive.client].streamed:
                write_fixture(fixtures / f"{drive.client}.json", drive.path, requests, at.folder)


def drive_context(programs: Path, tally: Tally) -> None:
    with place(programs) as at:
        record = at.folder / "requests.jsonl"
        with server(record) as url:
            tally.check("claude: /context", lambda: claudes_context(url, at))
        counts = [each["status"] for each in heard(record) if each["path"] == "/v1/messages/count_tokens"]
        tally.note("claude: count_tokens", "" if counts and set(counts) == {200} else f"statuses {counts}")


def drive_sdk(name: str, scratch: Path, tally: Tally) -> None:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "requests.jsonl"
        with server(record) as scripted, server(record, "--tiny") as tiny:
            here = Path(__file__).parent
            if name == "python":
                command = [str(scratch / "python/bin/python"), str(here / "python_sdks.py"), scripted, tiny]
            else:
                # node resolves imports relative to the script
                script = shutil.copy(here / "node_sdks.mjs", scratch / "node")
                command = ["node", str(script), scripted, tiny]
            environment = {
                name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "ANTHR"))
            }
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "failed "))]
    for line in lines:
        result, _, rest = line.partition(" ")
        check, _, reason = rest.partition(": ")
        tally.note(f"{name} SDKs: {check}", reason if result == "failed" else "")
    if done.returncode or not lines:
        tally.note(f"{name} SDKs", f"exit status {done.returncode}: {done.stderr[-1000:]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--scratch", type=Path, default=ROOT / ".clients")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    known = {drive.client for drive in DRIVES.values()} | set(SDKS)
    if unknown := set(options.names) - known:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    scratch = options.scratch.resolve()
    programs = install(scratch)
    wanted = set(options.names) or known
    tally = Tally()
    for name in SDKS:
        if name in wanted:
            drive_sdk(name, scratch, tally)
    for name, drive in DRIVES.items():
        if drive.client in wanted:
            drive_agent(name, drive, programs, tally, options.record)
    if "claude" in wanted:
        drive_context(programs, tally)
    print(f"{tally.passed} passed, {tally.failed} failed", flush=True)
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    main()
