"""Recorded conversations of an agent, replayed against a server: prefix cache hits and the time to first token.

    python -m benchmarks.replay --conversations 32 --option=--cache-tokens=1000000

Every turn's prompt is the recorded one. Its output is the model's own, as long as the recorded one, so the next prompt shares
at most the previous prompt with the cache. `hit_rate` is cached tokens over prompt tokens, from the server's usage. The
conversations run side by side; a turn starts when the one before has ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import MODEL, argument_parser, finish, quantiles, serving
from benchmarks.data.files import data_path, read_records

BUCKETS = (256, 1024, 4096, 16384, 1 << 30)  # new tokens of a turn


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--traces", type=Path, help="JSON lines with messages each")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--context", type=int, default=32768, help="turns with longer prompts are left out")
    parser.add_argument("--turns", type=int, default=1000, help="most turns of one conversation")
    parser.add_argument("--url", help="use a running server")
    parser.add_argument("--option", action="append", default=[], help="an option for `paceline serve`")
    arguments = parser.parse_args()
    records = read_records(arguments.traces or data_path("traces/mini_swe_agent_gemini3.jsonl.gz"))
    conversations = [each["messages"] for each in records[: arguments.conversations]]
    if arguments.url:
        turns, seconds = asyncio.run(play(arguments.url, arguments.model, conversations, arguments))
    else:
        with serving(arguments.model, *arguments.option) as url:
            turns, seconds = asyncio.run(play(url, arguments.model, conversations, arguments))
    finish({"benchmark": "replay", "model": arguments.model, **summary(turns, seconds)})


async def play(
    url: str, model: str, conversations: list[list[dict[str, Any]]], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], float]:
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=httpx.Limits(max_connections=None)) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        began = time.perf_counter()
        played = await asyncio.gather(*(converse(client, name, each, arguments) for each in conversations))
        return [turn for turns in played for turn in turns], time.perf_counter() - began


async def converse(
    client: httpx.AsyncClient, name: str, messages: list[dict[str, Any]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or len(turns) == arguments.turns:
            continue
        length = (await count(client, message["content"])) or 1
        body = {
            "model": name,
            "messages": messages[:index],
            "max_tokens": length,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        turn = await ask(client, body)
        if turn is None or turn["prompt_tokens"] + length > arguments.context:
            break
        turns.append(turn)
    return turns


async def count(client: httpx.AsyncClient, text: str) -> int:
    return int((await client.post("/tokenize", json={"prompt": text})).json()["count"])


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any] | None:
    """One turn's usage and times; None if it is longer than the server's context."""
    began, first, usage = time.perf_counter(), 0.0, {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code == 400:
            return None
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - began
    return {
        "first": first or time.perf_counter() - began,
        "whole": time.perf_counter() - began,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "output_tokens": usage["completion_tokens"],
    }


def summary(turns: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    prompt, cached = (sum(turn[key] for turn in turns) for key in ("prompt_tokens", "cached_tokens"))
    table = []
    low = 0
    for high in BUCKETS:
        part = [turn for turn in turns if low <= turn["prompt_tokens"] - turn["cached_tokens"] < high]
        if part:
            ordered = sorted(1000 * turn["first"] for turn in part)
            row = {"turns": len(part), **{k: round(v, 1) for k, v in quantiles(ordered).items()}}
            table.append({"new_tokens": f"{low} to {high - 1}", **row, "p90": round(ordered[int(len(part) * 0.9)], 1)})
            print("time to first token, ms:", table[-1])
        low = high
    ordered = sorted(1000 * turn["first"] for turn in turns)
    return {
        "turns": len(turns),
        "prompt_tokens": prompt,
        "hit_rate": round(cached / prompt, 4),
        "output_tokens": sum(turn["output_tokens"] for turn in turns),
        "seconds": round(seconds, 1),
        "first_token_ms": {
            f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1) for p in (50, 90, 99)
        },
        "by_new_tokens": table,
    }


if __name__ == "__main__":
    main()
