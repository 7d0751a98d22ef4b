"""Sessions of the real agents against a server: two user turns that edit a file, started as a user would start them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.clients.scripted import CONTEXT, KEY

ROOT = Path(__file__).parent.parent.parent
BEFORE = 'def greet():\n    return "hello"\n'
SECONDS = 180
_FOREIGN = ("ANTHROPIC_", "CLAUDE", "OPENAI_", "CODEX_", "OPENCODE_", "AIDER_", "MSWEA_", "MORPH_", "PACELINE_", "XDG_")
_QUIET = {  # no calls to the internet, which would only time out without one
    "AIDER_ANALYTICS": "false",
    "AIDER_CHECK_UPDATE": "false",
    "AIDER_GITIGNORE": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENCODE_DISABLE_AUTOUPDATE": "true",
    "OPENCODE_DISABLE_MODELS_FETCH": "true",
}
_AIDER = ("--yes-always", "--no-pretty", "--no-fancy-input", "--no-auto-commits", "greet.py")


class Failed(Exception):
    """A failed check, with what was observed."""


@dataclass(frozen=True)
class Drive:
    """How an agent is given tasks: `first` and `next` make its arguments. Without `next` the session has one task.

    If `typed` is true, the tasks are typed on standard input instead, one on each line.
    """

    client: str
    path: str
    first: Callable[[str], list[str]]
    next: Callable[[str], list[str]] | None = None
    typed: bool = False
    streamed: bool = True
    least_requests: int = 3


DRIVES = {
    "claude": Drive(
        "claude",
        "/v1/messages",
        lambda task: ["-p", task, "--permission-mode", "acceptEdits"],
        lambda task: ["-c", "-p", task, "--permission-mode", "acceptEdits"],
    ),
    "codex": Drive(
        "codex",
        "/v1/responses",
        lambda task: ["exec", "--sandbox", "danger-full-access", task],
        lambda task: ["exec", "--sandbox", "danger-full-access", "resume", "--last", task],
    ),
    "opencode": Drive(
        "opencode", "/v1/chat/completions", lambda task: ["run", task], lambda task: ["run", "--continue", task]
    ),
    "mini": Drive(
        "mini",
        "/v1/chat/completions",
        lambda task: ["-y", "--exit-immediately", "-t", task],
        streamed=False,
    ),
    "aider": Drive("aider", "/v1/chat/completions", lambda _: list(_AIDER), typed=True, least_requests=2),
    "aider whole": Drive(
        "aider",
        "/v1/chat/completions",
        lambda _: ["--no-stream", *_AIDER],
        typed=True,
        streamed=False,
        least_requests=2,
    ),
}


@dataclass(frozen=True)
class Place:
    """A temporary folder with a home and a project for one session. `programs` is the folder of the installed clients."""

    folder: Path
    programs: Path

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        home = self.folder / "home"
        own = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "CACHE", "DATA", "STATE")}
        path = f"{self.programs}{os.pathsep}{kept['PATH']}"
        names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org"}
        names |= {name.replace("AUTHOR", "COMMITTER"): value for name, value in names.items()}
        return {
            **kept,
            **_QUIET,
            **own,
            **names,
            "HOME": str(home),
            "PWD": str(self.project),
            "PATH": path,
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *command: str, typed: str = "") -> str:
        """The command's standard output. Raises Failed for an exit status other than 0, and for a timeout."""
        try:
            done = subprocess.run(
                command,
                cwd=self.project,
                env=self.environment,
                input=typed,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"it did not end within {SECONDS} s; it printed {error.stdout!r}") from error
        if done.returncode:
            raise Failed(f"exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        return done.stdout

    def paceline(self, *arguments: str, typed: str = "") -> str:
        return self.run(sys.executable, "-m", "paceline", *arguments, typed=typed)


@contextmanager
def place(programs: Path) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="paceline-clients-") as folder:
        made = Place(Path(folder).resolve(), programs)
        (made.folder / "home").mkdir()
        made.project.mkdir()
        (made.project / "greet.py").write_text(BEFORE)
        made.run("git", "init", "--quiet")
        made.run("git", "add", ".")
        made.run("git", "commit", "--quiet", "--message", "Start")
        yield made


def session(drive: Drive, url: str, at: Place) -> None:
    """Runs the whole session through `paceline run`, which writes no settings file. Raises Failed."""

    def start(arguments: list[str], typed: str = "") -> str:
        return at.paceline("run", drive.client, "--url", url, "--", *arguments, typed=typed)

    _converse(drive, start, at)


def written(drive: Drive, url: str, at: Place) -> None:
    """Runs the session on a server with a key, with the settings that `paceline connect --write` wrote. Raises Failed."""
    said = at.paceline("connect", drive.client, "--url", url, "--api-key", KEY, "--write")
    if "wrote " not in said:
        raise Failed(f"connect wrote nothing: {said}")
    exported = [line.removeprefix("export ") for line in said.splitlines() if line.startswith("export ")]

    def start(arguments: list[str], typed: str = "") -> str:
        return at.run("env", *exported, drive.client, *arguments, typed=typed)

    _converse(drive, start, at)


def claudes_context(url: str, at: Place) -> None:
    """Checks Claude Code's /context, which counts tokens in many requests at once and prints its window. Raises Failed."""
    said = at.paceline("run", "claude", "--url", url, "--", "-p", "/context")
    if f"{CONTEXT // 1000}k" not in said:
        raise Failed(f"no word of the window of {CONTEXT}: {said[:500]}")


def _converse(drive: Drive, start: Callable[..., str], at: Place) -> None:
    file = at.project / "greet.py"
    words = ["hello", "goodbye", "farewell"]
    tasks = [f"EDIT {file}: replace {old} by {new}" for old, new in itertools.pairwise(words)]
    if drive.typed:
        start(drive.first(""), "\n".join(tasks) + "\n")
        _same(file, "farewell")
        return
    start(drive.first(tasks[0]))
    _same(file, "goodbye")
    if drive.next is not None:
        start(drive.next(tasks[1]))
        _same(file, "farewell")


def _same(file: Path, word: str) -> None:
    text = file.read_text()
    if text != BEFORE.replace("hello", word):
        raise Failed(f"the file holds {text!r}")


def check_requests(drive: Drive, requests: list[dict[str, Any]]) -> None:
    """Checks that all requests succeeded, on the drive's endpoint and streamed as the drive says. Raises Failed."""
    bad = [each for each in requests if each["status"] >= 400]
    if bad:
        raise Failed(f"{len(bad)} requests were refused; the first: {json.dumps(bad[0])[:1000]}")
    turns = [each["body"] for each in requests if each["path"] == drive.path]
    if len(turns) < drive.least_requests:
        raise Failed(f"only {len(turns)} requests to {drive.path}")
    if any(bool(each.get("stream")) != drive.streamed for each in turns):
        raise Failed(f"stream is not {drive.streamed} in every request")
