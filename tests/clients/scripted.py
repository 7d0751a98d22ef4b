"""A server with a scripted model: it edits the file that the task names, by the tools that the client defines.

    python -m tests.clients.scripted RECORD [--tiny] [--key]

Prints its address and writes each request to the file RECORD, as one line of JSON. With --tiny it serves a tiny random model
instead; with --key clients must send KEY.

The answer depends only on the prompt, as clients send other requests (titles, summaries) between a session's turns.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.serve.app import hash_key
from paceline.serve.run import Server
from paceline.types import Request
from tests.serve.service import ScriptedEngine, scripted, tiny, tiny_service

CONTEXT = 200_000
KEY = "secret-of-the-tests"
TASK = re.compile(r"EDIT (\S+): replace (\w+) by (\w+)")
Step = tuple[str, dict[str, Any]]  # a tool's name and its arguments


def _claude(path: str, old: str, new: str) -> list[Step]:
    edit = {"file_path": path, "old_string": old, "new_string": new}
    return [("Read", {"file_path": path}), ("Edit", edit)]


def _opencode(path: str, old: str, new: str) -> list[Step]:
    return [("read", {"filePath": path}), ("edit", {"filePath": path, "oldString": old, "newString": new})]


def _codex(path: str, old: str, new: str) -> list[Step]:
    return [("exec_command", {"cmd": f"cat {path}"}), ("exec_command", {"cmd": f"sed -i s/{old}/{new}/ {path}"})]


def _mini(path: str, old: str, new: str) -> list[Step]:
    commands = (f"cat {path}", f"sed -i s/{old}/{new}/ {path}", "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    return [("bash", {"command": command}) for command in commands]


PLANS: tuple[tuple[set[str], Callable[[str, str, str], list[Step]]], ...] = (
    ({"Read", "Edit"}, _claude),
    ({"read", "edit"}, _opencode),
    ({"exec_command"}, _codex),
    ({"bash"}, _mini),
)


def answer(prompt: str) -> str:
    """The model's answer to a prompt: the next step of the plan for the latest task, after the last one a final text."""
    segments = [each.partition("\n") for each in prompt.split("<|im_start|>")[1:]]
    tools = _tools(segments[0][2])
    latest, task = -1, None
    for index, (role, _, content) in enumerate(segments):
        found = TASK.search(content) if role == "user" and not content.startswith("<tool_response>") else None
        latest, task = (index, found) if found else (latest, task)
    if task is None:
        return "Hello! I have no task."
    if not tools:
        return _whole_file(prompt, task)
    steps = next((plan(*task.groups()) for names, plan in PLANS if names <= tools), [])
    done = sum(content.startswith("<tool_response>") for _, _, content in segments[latest:])
    if done >= len(steps):
        return f"Done: {task[2]} is now {task[3]}."
    name, arguments = steps[done]
    call = json.dumps({"name": name, "arguments": arguments})
    return f"Step {done + 1}.\n<tool_call>\n{call}\n</tool_call>"


def _tools(system: str) -> set[str]:
    names = set()
    for line in system.splitlines():
        if line.startswith('{"type": "function"'):
            names.add(json.loads(line.removesuffix("<|im_end|>"))["function"]["name"])
    return names


def _whole_file(prompt: str, task: re.Match[str]) -> str:
    """The edited file in a fenced block under its name, as aider expects it, made from its last version in the prompt.

    A short title if the prompt has no file.
    """
    name = Path(task[1]).name
    shown = re.findall(rf"^{re.escape(name)}\n```\n(.*?)^```", prompt, re.MULTILINE | re.DOTALL)
    if not shown:
        return "Replacing a word"
    return f"Replaced.\n\n{name}\n```\n{shown[-1].replace(task[2], task[3])}```\n"


class ScriptedAgent(ScriptedEngine):
    """A scripted engine whose text is `answer` of the prompt; a request with sources is answered by its first source."""

    def submit(self, request: Request) -> str:
        if request.sources:
            self.texts = [self.tokenizer.decode(request.sources[0])]
        else:
            self.texts = [answer(self.tokenizer.decode(request.prompt, skip_special=False))]
        return super().submit(request)


class Recorder:
    """Writes each request's method, path, body and reply status to a file."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        self._app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()

        async def hear() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def say(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._write(scope, bytes(body), message["status"])
            await send(message)

        await self._app(scope, hear, say)

    def _write(self, scope: Scope, body: bytes, status: int) -> None:
        try:
            value = json.loads(body) if body else None
        except ValueError:
            value = body.decode("utf-8", "replace")
        record = {"method": scope["method"], "path": scope["path"], "status": status, "body": value}
        with self._path.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    service = (
        tiny_service(tiny(fixed_draft=16))
        if "--tiny" in sys.argv
        else scripted(ScriptedAgent("", size=16), capacity=CONTEXT)
    )
    if "--key" in sys.argv:
        service = replace(service, keys=(hash_key(KEY),))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(service, "127.0.0.1", port)
    server.config.app = Recorder(server.config.app, Path(sys.argv[1]))  # type: ignore[arg-type]
    print(f"http://127.0.0.1:{port}", flush=True)
    server.run()


if __name__ == "__main__":
    main()
