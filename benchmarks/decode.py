"""Decode rates of chat requests, with and without drafting, at several batch sizes.

    python -m benchmarks.decode --batches 64,1
    python -m benchmarks.decode --batches 64 --temperature 0.7

Prompts are MBPP's questions as chat messages. For each batch size the same requests run without and with drafting, in turns;
medians over the turns are compared. Chat output repeats little of its prompt, so this shows that drafting costs nothing there.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

from benchmarks.common import MODEL, argument_parser, finish, numbers
from benchmarks.data.files import data_path, read_records
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.types import Request, Sampling, Usage


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--prompts", type=Path, help="JSON lines with a text each")
    parser.add_argument("--batches", type=numbers, default=[1], help="batch sizes, in this order")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=8, help="requests at batch 1; larger batches run one batch")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()

    drafted = Engine.load(arguments.model, EngineConfig(max_context=4096, prefix_cache=False))
    plain = drafted.sibling(dataclasses.replace(drafted.config, drafter="none"))
    questions = [record["text"] for record in read_records(arguments.prompts or data_path("prompts/mbpp.jsonl.gz"))]
    sampling = Sampling(arguments.temperature, max_tokens=arguments.tokens, ignore_eos=True, seed=0)
    rows = []
    for batch in arguments.batches:
        count = max(batch, arguments.requests if batch == 1 else batch)
        requests = [
            Request(drafted.tokenizer.encode_chat([{"role": "user", "content": question}]), sampling)
            for question in questions[:count]
        ]
        drafted.warm_up(batch)
        plain.warm_up(batch)
        rates: dict[str, list[float]] = {"plain": [], "drafted": []}
        for _ in range(arguments.turns):
            for name, engine in (("plain", plain), ("drafted", drafted)):
                rates[name].append(rate(engine, requests, batch))
        row = {
            "batch": batch,
            "plain": round(statistics.median(rates["plain"]), 1),
            "drafted": round(statistics.median(rates["drafted"]), 1),
            "plain_overall": round(overall(plain, requests, batch), 1),
        }
        row["drafted_over_plain"] = round(row["drafted"] / row["plain"], 3)
        usages = [usage for start in range(0, count, batch) for usage in run(drafted, requests[start : start + batch])]
        for name in ("output_tokens", "drafted_tokens", "accepted_tokens", "steps"):
            row[name] = sum(getattr(usage, name) for usage in usages)
        print(row, rates)
        rows.append(row)
    finish(
        {
            "benchmark": "decode",
            "model": arguments.model,
            "tokens": arguments.tokens,
            "temperature": arguments.temperature,
            "rows": rows,
        }
    )


def rate(engine: Engine, requests: list[Request], batch: int) -> float:
    """Decode tokens a second: the median over requests at batch 1, the sum over all requests above."""
    if batch == 1:
        usages = [run(engine, [request])[0] for request in requests]
        return statistics.median((each.output_tokens - 1) / each.decode_seconds for each in usages)
    usages = run(engine, requests)
    return sum(each.output_tokens - 1 for each in usages) / max(each.decode_seconds for each in usages)


def run(engine: Engine, requests: list[Request]) -> list[Usage]:
    return [each.checked().usage for each in engine.generate(requests)]


def overall(engine: Engine, requests: list[Request], batch: int) -> float:
    """Tokens a second from submission to the last token, prefill included."""
    began = time.perf_counter()
    tokens = sum(
        usage.output_tokens
        for start in range(0, len(requests), batch)
        for usage in run(engine, requests[start : start + batch])
    )
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
