"""Paceline's server beside vLLM's, on the same weights and the same machine.

    python -m benchmarks.peers.serve --model smollm2-135m --clients 1,2,4,8,16
    python -m benchmarks.peers.serve --peers paceline,vllm-float32 --each 2
    python -m benchmarks.peers.serve --rounds 1 --with guidellm

All servers get the same prompts (beginnings of code files, none twice), output lengths (end tokens are ignored) and greedy
sampling, from one client that streams /v1/completions: N clients, each of which sends its next request when the last one is
answered. Weights are bf16, or float32 if a server's name says so. The servers take turns, round by round, while the others are
stopped (SIGSTOP). Tokens a second come from the usage that the server reports. --with guidellm also runs that load generator.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import argument_parser, finish, names, numbers
from benchmarks.data.files import load_edits
from benchmarks.peers import servers, venvs
from paceline.models.pull import pull


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the servers too
    finish({"benchmark": "peers.serve", **beside_peers(arguments)})


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "smollm2-135m")
    parser.add_argument("--peers", type=names, default=["paceline", "vllm"], help=", ".join(servers.KINDS))
    parser.add_argument("--clients", type=numbers, default=[1, 2, 4, 8, 16], help="numbers of clients")
    parser.add_argument("--each", type=int, default=4, help="requests a client and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=2000, help="characters of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--edits", type=Path, help="JSON lines with before and after, gzipped or plain")
    parser.add_argument("--with", dest="generators", choices=["guidellm"], action="append", default=[])
    return parser.parse_args()


@dataclass
class Answered:
    """One request at its client: seconds to the first text and to the end, and the server's token counts."""

    first: float
    whole: float
    prompt_tokens: int
    tokens: int


def beside_peers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs every server at every number of clients, in turns; medians over the rounds, and ratios."""
    kinds, points = arguments.peers, arguments.clients
    files = sorted({edit["before"][: arguments.prompt] for edit in load_edits(arguments.edits, longest=1 << 20)})
    texts = iter(f"# {number}\n{files[number % len(files)]}" for number in range(1 << 30))
    rows: list[dict[str, Any]] = []
    outside: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        group = [stack.enter_context(servers.running(kind, arguments.model, arguments.threads, 4096)) for kind in kinds]
        ask_all(group, [next(texts)] * 4, 2, arguments.tokens)  # warm-up
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
    """Sends the same prompts to every server in turn; the others are paused."""
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
    """By number of clients: Paceline's best over the others' best, above 1 where Paceline is faster."""
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
    """Measures one number of clients by guidellm, with prompts from a file: generating them takes it half a minute."""
    python = venvs.ensure_venv("guidellm")
    server.resume()
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"prompt": prompt, "output_tokens_count": arguments.tokens} for prompt in prompts]
        Path(f"{folder}/prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        tokenizer = servers.with_tokenizer(pull(arguments.model))
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
