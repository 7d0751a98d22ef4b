"""Fast Apply over HTTP against the engine alone: the same requests, all at once, by both.

    python benchmarks/over_http.py --model qwen2.5-coder-1.5b --requests 64

First the engine in this process, then a server process of its own, asked in Morph's form by streams over one connection
each; caches are cold for both. `share` is the server's output tokens a second over the engine's: the server's time holds
everything from the request's bytes on, merging, tokenizing and checking included.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from common import finish, load_edits, quantiles, serving

from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.tasks.apply import prepare
from paceline.tasks.snippet import snippet_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--edits", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--url", help="a server that runs already")
    arguments = parser.parse_args()
    edits = load_edits(arguments.edits, limit=arguments.requests)
    own = alone(arguments.model, edits)
    print("engine", own, flush=True)
    if arguments.url:
        served = asyncio.run(ask(arguments.url, edits))
    else:
        with serving(arguments.model) as url:
            served = asyncio.run(ask(url, edits))
    print("server", served)
    share = served["tokens_per_second"] / own["tokens_per_second"]
    finish(
        {"benchmark": "over_http", "model": arguments.model, "engine": own, "server": served, "share": round(share, 3)}
    )


def alone(model: str, edits: list[dict[str, Any]]) -> dict[str, Any]:
    engine = Engine.load(model, EngineConfig())
    engine.warm_up(engine.config.max_batch)
    requests = [
        prepare(
            engine, each["before"], snippet_of(each["before"], each["after"], each["path"]), each["subject"]
        ).request
        for each in edits
    ]
    engine.generate(requests[:1])
    if engine.tree is not None:
        engine.tree.evict(engine.tree.num_pages)
    began = time.perf_counter()
    done = engine.generate(requests)
    seconds = time.perf_counter() - began
    tokens = sum(each.usage.output_tokens for each in done)
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}


async def ask(url: str, edits: list[dict[str, Any]]) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=len(edits))
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        hello = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        (await client.post("/v1/chat/completions", json=hello)).raise_for_status()
        began = time.perf_counter()
        replies = await asyncio.gather(*(one(client, each) for each in edits))
        seconds = time.perf_counter() - began
    tokens = sum(usage["completion_tokens"] for usage, _ in replies)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "first_text_seconds": quantiles([first for _, first in replies]),
    }


async def one(client: httpx.AsyncClient, edit: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """One merge; its usage, and seconds to the first text."""
    snippet = snippet_of(edit["before"], edit["after"], edit["path"])
    asked = f"<instruction>{edit['subject']}</instruction>\n<code>{edit['before']}</code>\n<update>{snippet}</update>"
    body = {
        "model": "morph-v3-fast",
        "messages": [{"role": "user", "content": asked}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, usage = time.perf_counter(), 0.0, {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"the server answered {reply.status_code}: {(await reply.aread()).decode()}")
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                told = chunk["choices"] and chunk["choices"][0]["delta"].get("content")
                first = first or (time.perf_counter() - began if told else 0.0)
                usage = chunk.get("usage") or usage
    return usage, first


if __name__ == "__main__":
    main()
