"""Time to first token of a long prompt, cold and as a conversation's second turn with the first turn cached.

    python benchmarks/prefill.py --model qwen2.5-coder-1.5b --tokens 8192 --turn 256 [--profile]

--profile, on CUDA: where a cold prompt's time goes, by kernel (shares of the whole, as trace.py has them), and how long its
graph alone takes when it is replayed eight times without a rest, which the card's power decides.
"""

from __future__ import annotations

import argparse
import random
import sys
from trace import busy
from typing import Any

import torch
from common import finish, quantiles
from torch.profiler import ProfilerActivity, profile

from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.engine.graphs import GraphRunner
from paceline.types import Request, Sampling


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the first turn's prompt")
    parser.add_argument("--turn", type=int, default=256, help="tokens that the second turn adds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()

    engine = Engine.load(arguments.model, EngineConfig(max_context=arguments.tokens + arguments.turn + 64))
    engine.warm_up(1)
    draw = random.Random(0)
    limit = min(engine.model.config.vocab_size, 50_000)
    cold, warm = [], []
    for _ in range(arguments.repeats + 1):
        prompt = [draw.randrange(limit) for _ in range(arguments.tokens)]
        first = engine.generate([Request(prompt, Sampling(max_tokens=2, ignore_eos=True))])[0].checked()
        turn = [*prompt, *first.tokens, *(draw.randrange(limit) for _ in range(arguments.turn))]
        second = engine.generate([Request(turn, Sampling(max_tokens=2, ignore_eos=True))])[0].checked()
        cold.append(1000 * first.usage.prefill_seconds)
        warm.append(1000 * second.usage.prefill_seconds)
    result = {
        "tokens": arguments.tokens,
        "turn": arguments.turn,
        "cold_ms": quantiles(cold[1:]),
        "second_turn_ms": quantiles(warm[1:]),
        "cached_tokens": second.usage.cached_tokens,
        "tokens_per_second": round(1000 * arguments.tokens / quantiles(cold[1:])["median"], 1),
    }
    if arguments.profile:
        result |= profiled(engine, [draw.randrange(limit) for _ in range(arguments.tokens)])
    print(result)
    finish({"benchmark": "prefill", "model": arguments.model, **result})


def profiled(engine: Engine, prompt: list[int]) -> dict[str, Any]:
    runner = engine.runner
    if not isinstance(runner, GraphRunner):
        sys.exit("--profile needs CUDA with graphs")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.generate([Request(prompt, Sampling(max_tokens=1, ignore_eos=True))])
        torch.cuda.synchronize()
    graph = runner._prompts[min(size for size in runner._prompts if size >= len(prompt))].graph
    times = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(round(begin.elapsed_time(end), 2))
    return {"profile": busy(profiler), "replays_ms": times}


if __name__ == "__main__":
    main()
