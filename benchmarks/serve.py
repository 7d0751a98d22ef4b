"""What the server adds to the engine: milliseconds to the first text, and CPU time of many streams.

    python -m benchmarks.serve --requests 500 --seconds 10

The engine is no model but writes at a given rate (benchmarks/tools/served.py). The server runs in a process of its own, and the
client uses plain sockets. `ttft`: one request after another; the time from sending a request to its first text, less the
engine's time from submit to the first output of the same request. `streams`: 64 requests at once that together write 5,000
tokens a second; CPU seconds a second of the event loop's thread and of the whole process.
`python -m benchmarks.peers.serve` compares the server with vLLM's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import socket
import statistics
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import argument_parser, finish
from benchmarks.tools.served import Served, served

QUESTION = "def area(width, height):\n    return width * height  # of a rectangle, in square metres\n" * 12


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of the streams")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5000.0, help="tokens a second of all streams together")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the server too
    result: dict[str, Any] = {"benchmark": "serve"}
    with served("--engine", "paced", "--rate", str(arguments.rate / arguments.streams)) as server:
        for path in MARKS:
            result[f"ttft {path}"] = overhead(server, path, arguments.requests)
            result[f"streams {path}"] = asyncio.run(streaming(server, path, arguments))
    finish(result)


def body(path: str, max_tokens: int) -> bytes:
    content = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    encoded = json.dumps({**content, "max_tokens": max_tokens}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(encoded)}\r\n\r\n".encode() + encoded


MARKS = {"/v1/chat/completions": b'"content":"d', "/v1/messages": b'"text":"d'}  # the beginning of the engine's text
# the text of a delta, as a JSON string
DELTAS = {
    "/v1/chat/completions": re.compile(rb'"delta":\{"content":("(?:[^"\\]|\\.)*")'),
    "/v1/messages": re.compile(rb'"delta":\{"type":"text_delta","text":("(?:[^"\\]|\\.)*")'),
}
END = b"0\r\n\r\n"


def overhead(server: Served, path: str, count: int) -> dict[str, float]:
    """Milliseconds to the first text, less the engine's own."""
    address = urlsplit(server.url)
    seconds = []
    request, warm = body(path, 2), 20
    before = len(server.inside().firsts)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count + warm):
            began = time.perf_counter()
            connection.sendall(request)
            data = b""
            while MARKS[path] not in data:
                data += connection.recv(1 << 16)
            seconds.append(time.perf_counter() - began)
            while not data.endswith(END):
                data += connection.recv(1 << 16)
    firsts = server.inside().firsts[before:]
    over = sorted(1000 * (whole - own) for whole, own in zip(seconds[warm:], firsts[warm:], strict=True))
    figures = {"p50_ms": statistics.median(over), "p99_ms": over[int(len(over) * 0.99)], "max_ms": over[-1]}
    figures = {name: round(value, 3) for name, value in figures.items()}
    print(f"{path}: first text after the engine's, over {count} requests: {figures}", flush=True)
    return figures


async def streaming(server: Served, path: str, arguments: argparse.Namespace) -> dict[str, float]:
    """CPU time of the server while all streams run."""
    address = urlsplit(server.url)
    request = body(path, 100_000)
    received: list[bytearray] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        received.append(mine := bytearray())
        try:
            writer.write(request)
            while data := await reader.read(1 << 16):
                mine += data
        finally:
            writer.close()

    tasks = [asyncio.ensure_future(client()) for _ in range(arguments.streams)]
    await asyncio.sleep(2.0)
    first, began = await asyncio.to_thread(server.inside), time.perf_counter()
    sizes = [len(each) for each in received]
    await asyncio.sleep(arguments.seconds)
    last, wall = await asyncio.to_thread(server.inside), time.perf_counter() - began
    written = [bytes(each[size:]) for each, size in zip(received, sizes, strict=True)]
    texts = [json.loads(text) for each in written for text in DELTAS[path].findall(each)]
    num_tokens = sum(map(len, texts))  # each of the engine's tokens is one character
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    figures = {
        "tokens_a_second": round(num_tokens / wall, 1),
        "loop_cores": round((last.loop_seconds - first.loop_seconds) / wall, 3),
        "process_cores": round((last.process_seconds - first.process_seconds) / wall, 3),
    }
    print(f"{path}: {arguments.streams} streams: {figures}", flush=True)
    while (await asyncio.to_thread(server.inside)).open:
        await asyncio.sleep(0.1)
    return figures


if __name__ == "__main__":
    main()
