"""What the server costs, and how it does beside vLLM's.

    python benchmarks/serve.py --requests 500 --seconds 10
    python benchmarks/serve.py --parts peers --model smollm2-135m --clients 1,2,4,8,16

overhead  The engine is no model but writes at a given rate (served.py), the server runs in a process of its own, and the
          client speaks plain sockets. `ttft`: one request after another; from sending it to the first text, less the
          engine's time from submit to first output of the same request. `streams`: 64 requests at once that together
          write 5,000 tokens a second, each token an event of its own where the loop keeps up; CPU seconds of the event
          loop's thread and of the whole process a second.
peers     The same weights, bf16 or where a server's name says so float32, prompts (beginnings of code files, none twice),
          output lengths (no end of text) and greedy choice for every server, through one client that streams
          /v1/completions: N clients, each asking again when it is answered. The servers take turns, round by round; those
          whose turn it is not are stopped (SIGSTOP). Tokens a second are counted from the usage the server reports. --with
          guidellm runs that load generator, too.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import httpx
import servers
import venvs
from common import finish, load_edits
from served import Served, served

QUESTION = "def area(width, height):\n    return width * height  # of a rectangle, in square metres\n" * 12


PARTS = ("overhead", "peers")


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the servers end with it
    result: dict[str, Any] = {"benchmark": "serve"}
    if "overhead" in arguments.parts:
        with served("--engine", "paced", "--rate", str(arguments.rate / arguments.streams)) as server:
            for path in ("/v1/chat/completions", "/v1/messages"):
                result[f"ttft {path}"] = overhead(server, path, arguments.requests)
                result[f"streams {path}"] = asyncio.run(streaming(server, path, arguments))
    if "peers" in arguments.parts:
        result |= beside_peers(arguments)
    finish(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["overhead"], help=", ".join(PARTS))
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5000.0, help="tokens a second, all streams together")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peers", default="paceline,vllm", help=", ".join(servers.KINDS))
    parser.add_argument("--clients", default="1,2,4,8,16")
    parser.add_argument("--each", type=int, default=4, help="requests a client and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=2000, help="characters of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--edits", type=Path, help="JSON lines with before and after, gzipped or plain")
    parser.add_argument("--with", dest="generators", choices=["guidellm"], action="append", default=[])
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- the server alone


def body(path: str, max_tokens: int) -> bytes:
    content = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    encoded = json.dumps({**content, "max_tokens": max_tokens}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(encoded)}\r\n\r\n".encode() + encoded


MARKS = {"/v1/chat/completions": b'"content":"d', "/v1/messages": b'"text":"d'}  # the engine's text begins so
# a delta's text, as JSON writes it
DELTAS = {
    "/v1/chat/completions": re.compile(rb'"delta":\{"content":("(?:[^"\\]|\\.)*")'),
    "/v1/messages": re.compile(rb'"delta":\{"type":"text_delta","text":("(?:[^"\\]|\\.)*")'),
}
END = b"0\r\n\r\n"


def overhead(server: Served, path: str, count: int) -> dict[str, float]:
    """Milliseconds to the first text, less the engine's."""
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
    """CPU of the server while all streams run, over the time between two looks inside."""
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
    num_tokens = sum(map(len, texts))  # the engine's tokens are a character each
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


# ------------------------------------------------------------------------------------------------------ beside peers


@dataclass
class Answered:
    """One request as its client saw it: seconds to the first text and to the end, and the tokens the server counted."""

    first: float
    whole: float
    prompt_tokens: int
    tokens: int


def beside_peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every server at every number of clients, in turns; medians over the rounds, and Paceline over the best other."""
    kinds = arguments.peers.split(",")
    points = [int(each) for each in arguments.clients.split(",")]
    files = sorted({edit["before"][: arguments.prompt] for edit in load_edits(arguments.edits, longest=1 << 20)})
    texts = iter(f"# {number}\n{files[number % len(files)]}" for number in range(1 << 30))
    rows: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        group = [stack.enter_context(servers.running(kind, arguments.model, arguments.threads, 4096)) for kind in kinds]
        ask_all(group, [next(texts)] * 4, 2, arguments.tokens)  # warms up, each alike
        for clients in points:
            rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
            for turn in range(arguments.rounds):
                prompts = [next(texts) for _ in range(clients * arguments.each)]
                order = group if turn % 2 == 0 else group[::-1]
                for kind, figures in ask_all(order, prompts, clients, arguments.tokens).items():
                    rounds[kind].append(figures)
            for kind, all_figures in rounds.items():
                medians = {name: statistics.median(each[name] for each in all_figures) for name in all_figures[0]}
                rows.append(
                    {"server": kind, "clients": clients} | {key: round(value, 4) for key, value in medians.items()}
                )
                print(rows[-1], flush=True)
        for clients in points if arguments.generators else ():
            prompts = [next(texts) for _ in range(clients * arguments.each)]
            outside += [guidellm(server, clients, prompts, arguments) for server in group]
    return {"model": arguments.model, "rows": rows, "ratios": ratios(rows), "guidellm": outside}


def ask_all(group: list[servers.Running], prompts: list[str], clients: int, tokens: int) -> dict[str, dict[str, float]]:
    """The same prompts for every server in turn, which alone runs meanwhile."""
    results = {}
    for server in group:
        server.resume()
        began = time.perf_counter()
        answers = asyncio.run(crowd(server, prompts, clients, tokens))
        wall = time.perf_counter() - began
        server.pause()
        firsts = sorted(each.first for each in answers)
        results[server.kind] = {
            "tokens_a_second": sum(each.tokens for each in answers) / wall,
            "ttft_p50": statistics.median(firsts),
            "ttft_p99": firsts[min(len(firsts) - 1, int(len(firsts) * 0.99))],
            "prompt_tokens": statistics.median(each.prompt_tokens for each in answers),
        }
        wrong = [each.tokens for each in answers if each.tokens != tokens]
        if wrong:
            sys.exit(f"{server.kind} wrote {wrong[0]} tokens instead of {tokens}")
    return results


async def crowd(server: servers.Running, prompts: list[str], clients: int, tokens: int) -> list[Answered]:
    left = list(prompts)
    answers: list[Answered] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:

        async def one() -> None:
            while left:
                answers.append(await ask(client, server.model, left.pop(0), tokens))

        await asyncio.gather(*(one() for _ in range(clients)))
    return answers


async def ask(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> Answered:
    content = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    content |= {"stream": True, "stream_options": {"include_usage": True}}
    first, usage = 0.0, {}
    began = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=content) as reply:
        if reply.status_code != 200:
            sys.exit(f"{reply.status_code}: {(await reply.aread())[:500]!r}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if not first and chunk["choices"] and chunk["choices"][0]["text"]:
                first = time.perf_counter() - began
            usage = chunk.get("usage") or usage
    return Answered(first, time.perf_counter() - began, usage["prompt_tokens"], usage["completion_tokens"])


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By number of clients: Paceline's best over the others' best; above 1 is faster, of both figures."""
    found = {}
    for clients in sorted({row["clients"] for row in rows}):
        here = [row for row in rows if row["clients"] == clients]
        ours = [row for row in here if row["server"].startswith("paceline")]
        others = [row for row in here if row not in ours]
        if ours and others:
            throughput = max(row["tokens_a_second"] for row in ours) / max(row["tokens_a_second"] for row in others)
            first = min(row["ttft_p50"] for row in others) / min(row["ttft_p50"] for row in ours)
            found[str(clients)] = {"throughput": round(throughput, 3), "ttft": round(first, 3)}
    return found


def guidellm(
    server: servers.Running, clients: int, prompts: list[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The same point by guidellm. It reads the prompts, for to make them up it takes a core for the first half minute."""
    python = venvs.ensure_venv("guidellm")
    server.resume()
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"prompt": prompt, "output_tokens_count": arguments.tokens} for prompt in prompts]
        Path(f"{folder}/prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        tokenizer = servers.with_tokenizer(servers.pull(arguments.model))
        command = [str(python.with_name("guidellm")), "run", "--disable-console"]
        command += ["--data", f"kind=json_file,path={folder}/prompts.jsonl"]
        command += ["--backend", f"kind=openai_http,target={server.url},model={server.model}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
        command += ["--profile", f"kind=concurrent,streams={clients}"]
        command += ["--constraint", f"kind=max_requests,count={clients * arguments.each}"]
        command += ["--output", f"kind=json,path={folder}/report.json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reports = list(Path(folder).glob("*.json"))
        if done.returncode or not reports:
            sys.exit(f"guidellm failed: {(done.stderr or done.stdout)[-2000:]}")
        metrics = json.loads(reports[0].read_text())["benchmarks"][0]["metrics"]
    server.pause()
    row = {
        "server": server.kind,
        "clients": clients,
        "tokens_a_second": metrics["output_tokens_per_second"]["successful"]["mean"],
        "ttft_p50_ms": metrics["time_to_first_token_ms"]["successful"]["median"],
    }
    print(f"guidellm: {row}", flush=True)
    return row


if __name__ == "__main__":
    main()
