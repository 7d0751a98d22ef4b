"""Chunked prefill beside running requests: the pauses of running streams, and short prompts' time to first token.

    python -m benchmarks.stalls --streams 16 --long 8 --short 40 --tokens 8000 --every 0.25

The streams run throughout. A long prompt arrives every `--every` seconds; the short ones are spread evenly over the same time.
Then the same requests are submitted at once, for the throughput. Every round has new prompts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from typing import Any

from benchmarks.common import MODEL, argument_parser, finish, percentiles
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.types import Request, Sampling


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--streams", type=int, default=16, help="requests that run throughout")
    parser.add_argument("--output", type=int, default=400, help="tokens that each of them writes")
    parser.add_argument("--long", type=int, default=8, help="long prompts")
    parser.add_argument("--tokens", type=int, default=8000, help="tokens of a long prompt")
    parser.add_argument("--short", type=int, default=40, help="short prompts, of 100 tokens")
    parser.add_argument("--every", type=float, default=0.25, help="seconds between two long prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-stall-ms", type=int, help="default: the engine's")
    arguments = parser.parse_args()

    settings = {} if arguments.max_stall_ms is None else {"max_stall_ms": arguments.max_stall_ms}
    most = (
        arguments.streams * (200 + arguments.output) + arguments.long * (arguments.tokens + 64) + arguments.short * 200
    )
    config = EngineConfig(
        max_context=max(arguments.tokens, arguments.output + 200) + 64,
        max_batch=32,
        cache_tokens=most + 16 * 300,
        drafter="none",
        prefix_cache=False,
        **settings,
    )
    engine = Engine.load(arguments.model, config)
    engine.warm_up(config.max_batch)
    draw = random.Random(0)
    for size in (arguments.tokens, 100):  # the engine measures the cost of such chunks
        engine.generate([_request(engine, draw, "", size, 2)])
    rows = [_round(engine, draw, arguments, span) for _ in range(arguments.rounds) for span in (arguments.every, 0.0)]
    spread, at_once = rows[::2], rows[1::2]
    result = {
        name: percentiles([each for row in spread for each in row[name]])
        for name in ("stream_pause_ms", "short_ttft_ms", "long_ttft_ms")
    }
    result["tokens_per_second"] = {
        "spread": round(statistics.median(row["rate"] for row in spread), 1),
        "at_once": round(statistics.median(row["rate"] for row in at_once), 1),
    }
    print(result)
    finish({"benchmark": "stalls", **vars(arguments), **result})


def _request(engine: Engine, draw: random.Random, name: str, num_prompt: int, num_output: int) -> Request:
    limit = min(engine.vocab_size, 50_000)
    prompt = [draw.randrange(limit) for _ in range(num_prompt)]
    return Request(prompt, Sampling(max_tokens=num_output, ignore_eos=True), id=name)


def _round(engine: Engine, draw: random.Random, arguments: argparse.Namespace, span: float) -> dict[str, Any]:
    streams = [_request(engine, draw, f"stream-{index}", 200, arguments.output) for index in range(arguments.streams)]
    arrivals = [
        (span * index, _request(engine, draw, f"long-{index}", arguments.tokens, 16)) for index in range(arguments.long)
    ]
    gap = span * arguments.long / max(arguments.short, 1)
    arrivals += [(gap * index, _request(engine, draw, f"short-{index}", 100, 8)) for index in range(arguments.short)]
    arrivals.sort(key=lambda each: each[0])
    seconds, firsts, pauses = served(engine, streams, arrivals)
    whole = sum(len(each.prompt) + each.sampling.max_tokens for each in [*streams, *(one for _, one in arrivals)])
    return {
        "stream_pause_ms": pauses["stream"],
        "short_ttft_ms": firsts["short"],
        "long_ttft_ms": firsts["long"],
        "rate": whole / seconds,
    }


def served(
    engine: Engine, streams: list[Request], arrivals: list[tuple[float, Request]]
) -> tuple[float, dict[str, list[float]], dict[str, list[float]]]:
    """Total seconds, and by kind of request the milliseconds to the first token and between two outputs.

    Arrivals begin once all streams run. A pause counts from the first arrival to the last long prompt's first token.
    """
    begun, latest = {}, {}
    firsts: dict[str, list[float]] = defaultdict(list)
    pauses: dict[str, list[float]] = defaultdict(list)
    for each in streams:
        begun[engine.submit(each)] = time.perf_counter()
    waiting = arrivals[:]
    began = start = time.perf_counter()
    num_long = sum(each.id.startswith("long") for _, each in arrivals)
    while engine.busy or waiting:
        if sum(name.startswith("stream") for name in latest) < len(streams):
            start = time.perf_counter()
        else:
            while waiting and time.perf_counter() - start >= waiting[0][0]:
                due, each = waiting.pop(0)
                engine.submit(each)
                begun[each.id] = start + due  # it may have arrived during a step
        for output in engine.step():
            if output.error is not None:
                raise output.error
            name, now = output.request_id, time.perf_counter()
            kind = name.partition("-")[0]
            if name not in latest:
                firsts[kind].append(1000 * (now - begun[name]))
            elif begun.keys() - {each.id for each in streams} and len(firsts["long"]) < num_long:
                pauses[kind].append(1000 * (now - latest[name]))
            latest[name] = now
    return time.perf_counter() - began, firsts, pauses


if __name__ == "__main__":
    main()
