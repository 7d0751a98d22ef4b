"""Fast Apply over HTTP against the engine alone: the same requests, all at once.

    python -m benchmarks.over_http --requests 64

The engine runs first, in this process; then a server, in a process of its own, gets the requests in Morph's form as streams,
one connection each. Both have served as many other requests before and have none of these in their caches. `share` is the
server's output tokens a second divided by the engine's. The server's time starts with a request's bytes, so it includes
merging, tokenizing and checking. The client only stores bytes while the clock runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import time
import urllib.parse
from pathlib import Path
from typing import Any

import h11
import torch

from benchmarks.common import MODEL, argument_parser, finish, quantiles, serving
from benchmarks.data.files import load_edits
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.tasks.apply import Prepared, prepare
from paceline.tasks.snippet import snippet_of

TEXT = re.compile(rb'"content":"[^"]')

POLICY = "review-margin"  # the model writes every file; with the default policy, only a few


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--edits", type=Path, help="a file in the form of git_edits.jsonl.gz")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--url", help="use a running server")
    arguments = parser.parse_args()
    edits = load_edits(arguments.edits, limit=2 * arguments.requests)
    rounds = [edits[arguments.requests :], edits[: arguments.requests]]
    own = alone(arguments.model, rounds)
    print("engine", own, flush=True)
    with contextlib.nullcontext(arguments.url) if arguments.url else serving(arguments.model) as url:
        served = [asyncio.run(ask(url, each)) for each in rounds][-1]
    print("server", served)
    share = served["tokens_per_second"] / own["tokens_per_second"]
    finish(
        {"benchmark": "over_http", "model": arguments.model, "engine": own, "server": served, "share": round(share, 3)}
    )


def alone(model: str, rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The rate of the last round."""
    engine = Engine.load(model, EngineConfig())
    engine.warm_up(engine.config.max_batch)
    for edits in rounds:
        updates = [snippet_of(each["before"], each["after"], each["path"]) for each in edits]
        asked = zip(edits, updates, strict=True)
        ready = [prepare(engine, each["before"], update, each["subject"], policy=POLICY) for each, update in asked]
        requests = [each.request for each in ready if isinstance(each, Prepared)]
        began = time.perf_counter()
        done = [each.checked() for each in engine.generate(requests)]
        seconds = time.perf_counter() - began
    tokens = sum(each.usage.output_tokens for each in done)
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}


async def ask(url: str, edits: list[dict[str, Any]]) -> dict[str, Any]:
    bodies = [json.dumps(body(each)).encode() for each in edits]
    began = time.perf_counter()
    replies = await asyncio.gather(*(exchange(url, each) for each in bodies))
    seconds = time.perf_counter() - began
    events = [received(reply) for reply, _ in replies]
    tokens = sum(each["usage"]["completion_tokens"] for reply in events for each in reply if each.get("usage"))
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "first_text_seconds": quantiles([first - began for _, first in replies]),
    }


def body(edit: dict[str, Any]) -> dict[str, Any]:
    snippet = snippet_of(edit["before"], edit["after"], edit["path"])
    asked = f"<instruction>{edit['subject']}</instruction>\n<code>{edit['before']}</code>\n<update>{snippet}</update>"
    return {
        "model": "morph-v3-fast",
        "paceline": {"policy": POLICY},
        "messages": [{"role": "user", "content": asked}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def exchange(url: str, content: bytes) -> tuple[bytes, float]:
    """The reply's bytes, and the time at which its first text had arrived."""
    address = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address.netloc}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    reply, first = bytearray(), 0.0
    while part := await reader.read(1 << 20):
        reply += part
        if not first and TEXT.search(reply):
            first = time.perf_counter()
    writer.close()
    return bytes(reply), first


def received(reply: bytes) -> list[dict[str, Any]]:
    """The events of a reply, parsed by h11, which the server does not use."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
    client.receive_data(reply)
    head, text = client.next_event(), b""
    while isinstance(data := client.next_event(), h11.Data):
        text += data.data
    if not isinstance(head, h11.Response) or head.status_code != 200:
        raise SystemExit(f"the server answered {text.decode()}")
    return [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: {")]


if __name__ == "__main__":
    main()
