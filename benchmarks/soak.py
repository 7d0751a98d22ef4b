"""Many connections, half of whose clients go at random: what does the server still hold afterwards?

    python benchmarks/soak.py --connections 200 --seconds 300

A tiny random model in the real server, in a process of its own. Every connection asks again and again, by chat or
messages, streamed or not. Half of the requests are given up: with the body half sent, before the first byte, or in the
middle of the answer. After a first spell and again at the end the server is left alone and looked into (served.py): open
requests, the engine's sequences and pages not free or cached must be none; tasks, threads and file descriptors no more
than after the first spell. Exit status 1 where something is left, or a reply was none that may come. The last line is JSON.
"""

from __future__ import annotations

import argparse
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

from common import finish
from served import Inside, Served, served

Counts = collections.Counter[str]
WORDS = [f"line {number}: return width * height\n" for number in range(60)]
FIRST_SPELL = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with served("--engine", "tiny") as server:
        before = spell(server, arguments.connections, FIRST_SPELL, arguments.seed)[1]
        counts, after = spell(server, arguments.connections, arguments.seconds, arguments.seed + 1)
        alive = server.process.poll() is None
    print(f"requests: {dict(counts)}\nafter the first spell: {told(before)}\nat the end:            {told(after)}")
    left = leaks(before, after)
    wrong = {
        name: count
        for name, count in counts.items()
        if name.startswith("reply ") and name[6:] not in ("200", "429", "529")
    }
    result: dict[str, Any] = {"benchmark": "soak", "connections": arguments.connections, "seconds": arguments.seconds}
    finish(
        result | {"requests": dict(counts), "left": left, "wrong": wrong, "before": told(before), "after": told(after)}
    )
    if left or wrong or not alive:
        sys.exit(1)


def told(inside: Inside) -> dict[str, Any]:
    return {name: value for name, value in asdict(inside).items() if name != "firsts"}


def leaks(before: Inside, after: Inside) -> dict[str, int]:
    """What is held and should not be, by name."""
    left = {"requests": after.open, "sequences": after.sequences}
    left["pages"] = after.pages - after.free_pages - after.cached_pages
    for name in ("tasks", "threads", "files"):
        left[name] = max(0, getattr(after, name) - getattr(before, name))
    return {name: count for name, count in left.items() if count}


def spell(server: Served, connections: int, seconds: float, seed: int) -> tuple[Counts, Inside]:
    """The load, then the server as it is once left alone."""
    counts: Counts = collections.Counter()
    asyncio.run(load(server.url, connections, time.monotonic() + seconds, seed, counts))
    end = time.monotonic() + 30
    inside = server.inside()
    while time.monotonic() < end and (inside.open or inside.sequences or inside.tasks > 6):
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
    """One connection with one request, given up in one of three ways or read to its end."""
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
    """The status of a reply, read to its end; 'cut' where that does not come."""
    data = await reader.read()
    status, head, body = data[9:12].decode(), *data.partition(b"\r\n\r\n")[::2]
    whole = body.endswith(b"0\r\n\r\n") if b"chunked" in head else body.endswith(b"}")
    return status if whole else f"cut {status}"


if __name__ == "__main__":
    main()
