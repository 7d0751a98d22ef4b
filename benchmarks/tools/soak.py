"""Soak test: many connections, half of whose clients leave at random. Afterwards the server must hold nothing of theirs.

    python -m benchmarks.tools.soak --connections 200 --seconds 300

The server runs in a process of its own with a tiny random model (benchmarks/tools/served.py). Every connection sends requests
one after another, to chat or messages, streamed or not. Half of the requests are abandoned: with the body half sent, before
the first byte, or in the middle of the answer. After a first period of 10 seconds and again at the end the load stops. Then
there must be no open request, no request in the engine and no KV page that belongs to one, and no more tasks, threads and file
descriptors than after the first period. Exits with status 1 if something is left or a reply has an unexpected status.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import sys
import time
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import argument_parser, finish
from benchmarks.tools.served import Inside, Served, served

Counts = collections.Counter[str]
WORDS = [f"line {number}: return width * height\n" for number in range(60)]
FIRST_PERIOD = 10.0


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with served("--engine", "tiny") as server:
        before = period(server, arguments.connections, FIRST_PERIOD, arguments.seed)[1]
        counts, after = period(server, arguments.connections, arguments.seconds, arguments.seed + 1)
        alive = server.process.poll() is None
    print(
        f"requests: {dict(counts)}\nafter the first period: {fields(before)}\nat the end:             {fields(after)}"
    )
    left = leaks(before, after)
    wrong = {
        name: count
        for name, count in counts.items()
        if name.startswith("reply ") and name[6:] not in ("200", "429", "529")
    }
    result: dict[str, Any] = {"benchmark": "soak", "connections": arguments.connections, "seconds": arguments.seconds}
    finish(
        result
        | {"requests": dict(counts), "left": left, "wrong": wrong, "before": fields(before), "after": fields(after)}
    )
    if left or wrong or not alive:
        sys.exit(1)


def fields(inside: Inside) -> dict[str, Any]:
    return {name: value for name, value in asdict(inside).items() if name != "firsts"}


def leaks(before: Inside, after: Inside) -> dict[str, int]:
    """What is held and should not be, by name."""
    left = {"open": after.open, "requests": after.requests, "pages_held": after.pages_held}
    for name in ("tasks", "threads", "files"):
        left[name] = max(0, getattr(after, name) - getattr(before, name))
    return {name: count for name, count in left.items() if count}


def period(server: Served, connections: int, seconds: float, seed: int) -> tuple[Counts, Inside]:
    """Runs the load, waits until the server is idle, and looks inside."""
    counts: Counts = collections.Counter()
    asyncio.run(load(server.url, connections, time.monotonic() + seconds, seed, counts))
    end = time.monotonic() + 30
    inside = server.inside()
    while time.monotonic() < end and (inside.open or inside.requests or inside.tasks > 6):
        time.sleep(0.5)
        inside = server.inside()
    time.sleep(1.0)
    return counts, server.inside()


async def load(url: str, connections: int, end: float, seed: int, counts: Counts) -> None:
    address = urlsplit(url)
    assert address.hostname is not None and address.port is not None

    async def client(number: int) -> None:
        choose = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await ask(address.hostname or "", address.port or 0, choose, counts)

    await asyncio.gather(*(client(number) for number in range(connections)))


async def ask(host: str, port: int, choose: random.Random, counts: Counts) -> None:
    """One connection with one request, abandoned in one of three ways or read to its end."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        data = request(choose)
        way = choose.choice(("whole", "whole", "whole", "half a body", "before a byte", "in the middle"))
        counts[way] += 1
        writer.write(data[: len(data) // 2] if way == "half a body" else data)
        await writer.drain()
        if way in ("half a body", "before a byte"):
            await asyncio.sleep(choose.random() * 0.2)
            return
        if way == "in the middle":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.readexactly(choose.randrange(1, 3000)), choose.random() * 3)
            return
        counts[f"reply {await read(reader)}"] += 1
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(choose: random.Random) -> bytes:
    path = choose.choice(("/v1/chat/completions", "/v1/messages"))
    text = "".join(choose.choices(WORDS[: choose.choice((3, 60))], k=choose.randrange(1, 20)))
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": choose.random() < 0.6}
    encoded = json.dumps({**body, "max_tokens": choose.choice((1, 5, 50, 400))}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(encoded)}\r\n\r\n".encode() + encoded


async def read(reader: asyncio.StreamReader) -> str:
    """The status of a reply, read to its end; 'cut' and the status if the end is missing."""
    data = await reader.read()
    status, head, body = data[9:12].decode(), *data.partition(b"\r\n\r\n")[::2]
    whole = body.endswith(b"0\r\n\r\n") if b"chunked" in head else body.endswith(b"}")
    return status if whole else f"cut {status}"


if __name__ == "__main__":
    main()
