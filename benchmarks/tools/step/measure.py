"""Times of the whole step by (requests, queries), of its operations, and of a prefill."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.tools.step.model import (
    DETERMINISTIC,
    DEVICE,
    DIM,
    EPS,
    FAST,
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    PAGE,
    SCALE,
    VOCAB,
    Layer,
    Model,
    fused_logits,
    fused_step,
    plain_logits,
    plain_step,
    random,
    uniform_batch,
)
from benchmarks.tools.step.timing import eager_time, graph_time
from paceline.ops.attention import AttentionBatch
from paceline.ops.triton import argmax, attention, linear, norm, rope

WORKLOADS = [(1, 1), (1, 17), (1, 65), (1, 129), (1, 257), (4, 65), (16, 17), (64, 1), (64, 9), (64, 17)]
DETAILED = [(1, 1), (1, 65), (1, 257), (64, 1), (64, 17)]  # workloads whose operations are timed one by one


def ops_of(model: Model, batch: AttentionBatch) -> dict[str, Callable[[], Any]]:
    """Each operation of a step, as a function that runs it once per layer."""
    count = batch.positions.shape[0]
    hidden, mixed, wide = random(count, HIDDEN), random(count, HEADS * DIM), random(count, FFN)
    qkv, query = random(count, (HEADS + 2 * KV_HEADS) * DIM), random(count, HEADS, DIM)
    logits = random(count, VOCAB)

    def each(call: Callable[[Layer], Any]) -> Callable[[], None]:
        def run() -> None:
            for layer in model.layers:
                call(layer)

        return run

    return {
        "qkv": each(lambda a: linear.norm_linear(hidden, a.norm_1, EPS, a.qkv)),
        "rope": each(
            lambda a: rope.rope_and_cache(
                qkv, model.table, batch.positions, batch.locations, a.keys, a.values, HEADS, None
            )
        ),
        "attention": each(lambda a: attention.paged_attention(query, a.keys, a.values, batch, PAGE, SCALE)),
        "o": each(lambda a: linear.linear_add(mixed, a.o, hidden, a.norm_2, EPS)),
        "gate_up": each(lambda a: linear.norm_gated(hidden, a.norm_2, EPS, a.gate_up)),
        "down": each(lambda a: linear.linear_add(wide, a.down, hidden, a.norm_1, EPS)),
        "head": each(lambda _: linear.norm_linear(hidden, model.norm, EPS, model.head)),
        "argmax": each(lambda _: argmax.argmax(logits)),
    }


def measure_steps(model: Model) -> list[dict[str, Any]]:
    rows = []
    print("\nrequests queries context      ms plain ms  det. ms   GB/s  error   µs an op")
    for requests, queries in WORKLOADS:
        context = 500 if requests == 64 else 2000
        batch = uniform_batch(requests, queries, context)
        tokens = torch.randint(0, VOCAB, (requests * queries,), device=DEVICE)
        fused = graph_time(functools.partial(fused_step, model, tokens, batch))
        plain = graph_time(functools.partial(plain_step, model, tokens, batch))
        fixed = graph_time(functools.partial(fused_step, model, tokens, batch, DETERMINISTIC), 3, 4)
        expected = plain_logits(model, tokens, batch).float()
        error = float((fused_logits(model, tokens, batch).float() - expected).norm() / expected.norm())
        row: dict[str, Any] = {
            "requests": requests, "queries": queries, "context": context, "ms": fused, "plain_ms": plain,
            "deterministic_ms": fixed,
            "weight_gb_s": model.weight_bytes() / fused / 1e6, "error": error,
        }  # fmt: skip
        if (requests, queries) in DETAILED:
            times = {name: graph_time(op) for name, op in ops_of(model, batch).items()}
            layers = len(model.layers)
            row["op_us"] = {name: 1000 * taken / layers for name, taken in times.items()}
        rows.append(row)
        ops = " ".join(f"{name} {value:.1f}" for name, value in row.get("op_us", {}).items())
        figures = f"{fused:7.3f} {plain:8.3f} {fixed:8.3f} {row['weight_gb_s']:6.0f}  {error:.4f}"
        print(f"{requests:8} {queries:7} {context:7} {figures}  {ops}", flush=True)
    return rows


def measure_prefill(model: Model, queries: int = 8192) -> dict[str, Any]:
    batch = uniform_batch(1, queries, 0)
    tokens = torch.randint(0, VOCAB, (queries,), device=DEVICE)

    row: dict[str, Any] = {"queries": queries}
    row["ms"] = eager_time(functools.partial(fused_step, model, tokens, batch, FAST, 1))
    parts = ops_of(model, batch)
    row["op_ms"] = {name: eager_time(op, 3) for name, op in parts.items() if name not in ("head", "argmax")}
    hidden = random(queries, HIDDEN)
    wide, narrow = random(queries, 2 * FFN), random(queries, FFN)
    row["op_ms"]["of gate_up: norm"] = eager_time(
        lambda: [norm.rms_norm(hidden, layer.norm_2, EPS) for layer in model.layers]
    )
    for name, number in (("whole", 1), ("in two parts", 2)):
        row["op_ms"][f"of gate_up: product, {name}"] = eager_time(
            lambda number=number: [F.linear(x, a.gate_up.matrix) for a in model.layers for x in hidden.chunk(number)]
        )
    row["op_ms"]["of gate_up: silu"] = eager_time(lambda: [norm.silu_multiply(wide, narrow) for _ in model.layers])
    later, query = uniform_batch(1, 2048, 6144), random(2048, HEADS, DIM)
    row["op_ms"]["attention, 2,048 after 6,144"] = eager_time(
        lambda: [attention.paged_attention(query, a.keys, a.values, later, PAGE, SCALE) for a in model.layers]
    )
    print(f"\nprefill of {queries}: {row['ms']:.2f} ms;", {k: v and round(v, 2) for k, v in row["op_ms"].items()})
    return row
