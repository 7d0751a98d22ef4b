"""Claim: one decode step of a 1.5B model on one GPU, as a CUDA graph of fused kernels, against cuBLAS and torch ops.

    python benchmarks/step.py [--layers 28]      the step over (requests, queries), per-op times, an 8,192-token prefill
    python benchmarks/step.py --tune [FILE]      first times every candidate kernel a matrix and prints the best
    python benchmarks/step.py --polish 65        first tries candidates within the whole step of that many queries

Shapes of Qwen2.5-Coder-1.5B, random weights, bf16. Times are medians of graph replays; an op's own time is that of a
graph which runs it once per layer on that layer's weights and cache, so that L2 does not hide the reads. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paceline.ops.attention import AttentionBatch
from paceline.ops.linear import Weight
from paceline.ops.rope import rotate
from paceline.ops.triton import argmax, attention, linear, norm, rope, tuning
from paceline.ops.triton.linear import Product
from paceline.ops.triton.tuning import Blas, Choice, Rows, Tiles

DEVICE = "cuda"
HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB, PAGE, EPS = 1536, 12, 2, 128, 8960, 151_936, 16, 1e-6
SCALE = DIM**-0.5
WORKLOADS = [(1, 1), (1, 17), (1, 65), (1, 129), (1, 257), (4, 65), (16, 17), (64, 1), (64, 9), (64, 17)]
DETAILED = [(1, 1), (1, 65), (1, 257), (64, 1), (64, 17)]  # workloads whose ops are timed one by one


@dataclass
class Layer:
    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    norm_1: Tensor
    norm_2: Tensor
    keys: Tensor
    values: Tensor


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE).mul_(scale)


def matrix(rows: int, columns: int, *, bias: bool = False) -> Weight:
    return Weight(random(rows, columns, scale=columns**-0.5), random(rows) if bias else None, keep_plain=True)


class Model:
    def __init__(self, layers: int, slots: int) -> None:
        self.layers = [
            Layer(
                matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, bias=True),
                matrix(HIDDEN, HEADS * DIM),
                matrix(2 * FFN, HIDDEN),
                matrix(HIDDEN, FFN),
                random(HIDDEN),
                random(HIDDEN),
                random(slots, KV_HEADS, DIM),
                random(slots, KV_HEADS, DIM),
            )
            for _ in range(layers)
        ]
        self.norm = random(HIDDEN)
        self.head = matrix(VOCAB, HIDDEN)
        angles = torch.arange(16_384)[:, None] * 1e6 ** -(torch.arange(0, DIM, 2) / DIM)[None, :]
        self.table = torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(DEVICE)

    def weight_bytes(self) -> int:
        products = [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [self.head]
        return sum(w.matrix.numel() * w.matrix.element_size() for w in products)


def uniform_batch(requests: int, queries: int, context: int, spare_pages: int = 64) -> AttentionBatch:
    """`requests` alike, their pages shuffled; the table is wider than needed, as in an engine."""
    needed = -(-(context + queries) // PAGE)
    pages = torch.randperm(requests * needed).view(requests, needed)
    place = torch.arange(context, context + queries)
    slots = pages[:, place // PAGE] * PAGE + place % PAGE
    return AttentionBatch(
        positions=place.repeat(requests).to(DEVICE),
        slots=slots.flatten().to(DEVICE),
        page_table=F.pad(pages, (0, spare_pages)).int().to(DEVICE),
        context_lens=torch.full((requests,), context, dtype=torch.int32, device=DEVICE),
        query_starts=torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * queries,
        branch_starts=torch.zeros(requests * queries, dtype=torch.int32, device=DEVICE),
        max_query=queries,
        max_context=context,
    )


# ------------------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class Ops:
    norm_linear: Callable[..., Tensor] = linear.norm_linear
    linear_add: Callable[..., linear.Result] = linear.linear_add
    norm_gated: Callable[..., Tensor] = linear.norm_gated
    paged_attention: Callable[..., Tensor] = attention.paged_attention


FAST = Ops()
DETERMINISTIC = Ops(
    linear.norm_linear_deterministic,
    linear.linear_add_deterministic,
    linear.norm_gated_deterministic,
    attention.paged_attention_deterministic,
)


def fused_logits(model: Model, tokens: Tensor, batch: AttentionBatch, ops: Ops = FAST, last: int = 0) -> Tensor:
    """The step by the kernels; the logits of the `last` tokens, of all where that is 0."""
    hidden = F.embedding(tokens, model.head.matrix)
    normed = None
    norms = [layer.norm_1 for layer in model.layers[1:]] + [model.norm]
    for layer, next_norm in zip(model.layers, norms, strict=True):
        qkv = ops.norm_linear(hidden, layer.norm_1, EPS, layer.qkv, normed)
        query = rope.rope_and_cache(qkv, model.table, batch.positions, batch.slots, layer.keys, layer.values, HEADS)
        mixed = ops.paged_attention(query, layer.keys, layer.values, batch, PAGE, SCALE)
        hidden, normed = ops.linear_add(mixed.flatten(1), layer.o, hidden, layer.norm_2, EPS)
        gated = ops.norm_gated(hidden, layer.norm_2, EPS, layer.gate_up, normed)
        hidden, normed = ops.linear_add(gated, layer.down, hidden, next_norm, EPS)
    return ops.norm_linear(hidden[-last:], model.norm, EPS, model.head)


def fused_step(model: Model, tokens: Tensor, batch: AttentionBatch, ops: Ops = FAST, last: int = 0) -> Tensor:
    return argmax.argmax(fused_logits(model, tokens, batch, ops, last))


def plain_logits(model: Model, tokens: Tensor, batch: AttentionBatch) -> Tensor:
    """The same by cuBLAS and torch's own ops (equal requests only)."""
    hidden = F.embedding(tokens, model.head.matrix)
    requests, queries, length = batch.num_requests, batch.max_query, batch.max_context + batch.max_query
    place = torch.arange(length, device=DEVICE)
    index = batch.page_table[:, place // PAGE] * PAGE + place % PAGE
    mask = causal_lower_right(queries, length) if 1 < queries < length else None
    for layer in model.layers:
        qkv = F.linear(F.rms_norm(hidden, (HIDDEN,), layer.norm_1, EPS), layer.qkv.matrix, layer.qkv.bias)
        query, key, value = torch.split(qkv.view(-1, HEADS + 2 * KV_HEADS, DIM), [HEADS, KV_HEADS, KV_HEADS], dim=1)
        cosines, sines = model.table[batch.positions][:, None].chunk(2, dim=-1)
        layer.keys[batch.slots] = rotate(key, cosines, sines)
        layer.values[batch.slots] = value
        shaped = rotate(query, cosines, sines).view(requests, queries, HEADS, DIM).transpose(1, 2)
        keys, values = layer.keys[index].transpose(1, 2), layer.values[index].transpose(1, 2)
        causal = mask is None and queries > 1
        mixed = F.scaled_dot_product_attention(
            shaped, keys, values, attn_mask=mask, is_causal=causal, scale=SCALE, enable_gqa=True
        )
        hidden = hidden + F.linear(mixed.transpose(1, 2).reshape(-1, HEADS * DIM), layer.o.matrix)
        gate, up = F.linear(F.rms_norm(hidden, (HIDDEN,), layer.norm_2, EPS), layer.gate_up.matrix).chunk(2, dim=-1)
        hidden = hidden + F.linear(F.silu(gate) * up, layer.down.matrix)
    return F.linear(F.rms_norm(hidden, (HIDDEN,), model.norm, EPS), model.head.matrix)


def plain_step(model: Model, tokens: Tensor, batch: AttentionBatch) -> Tensor:
    return plain_logits(model, tokens, batch).argmax(dim=-1)


# --------------------------------------------------------------------------------------------------------- timing


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def graph_time(function: Callable[[], Any], rounds: int = 5, replays: int = 8) -> float:
    """Milliseconds a call inside a CUDA graph: the median over rounds of the mean over replays."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            held = function()
        finally:
            graph.capture_end()
        graph.replay()
        times = []
        for _ in range(rounds):
            start, end = event(), event()
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / replays)
    del held
    return float(statistics.median(times))


def eager_time(function: Callable[[], Any], rounds: int = 5) -> float:
    """Milliseconds a call, launched from the host."""
    times = []
    for _ in range(rounds + 1):
        start, end = event(), event()
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times[1:]))


def ops_of(model: Model, batch: AttentionBatch) -> dict[str, Callable[[], Any]]:
    """Each op of a step, as a function that runs it as many times as there are layers."""
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
            lambda a: rope.rope_and_cache(qkv, model.table, batch.positions, batch.slots, a.keys, a.values, HEADS, None)
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


# --------------------------------------------------------------------------------------------------------- tuning

MATRICES = {  # name: (operation, rows, columns)
    "qkv": ("linear", (HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
    "o": ("linear", HIDDEN, HEADS * DIM),
    "gate_up": ("gated", 2 * FFN, HIDDEN),
    "down": ("linear", HIDDEN, FFN),
    "head": ("linear", VOCAB, HIDDEN),
}
BUCKETS = {1: 1, 9: 16, 17: 32, 64: 64, 65: 128, 129: 192, 257: 320, 8192: 1 << 30}  # tokens measured: tokens served


def candidates(name: str, tokens: int) -> Iterator[Choice]:
    yield Blas()
    if tokens == 1:
        if name == "down":
            rows = [(2, 1024, 4, 4), (2, 1024, 4, 9), (2, 512, 2, 6), (2, 512, 1, 6), (1, 512, 1, 6), (2, 512, 2, 9)]
        else:
            rows = [(2, 512, 1, 3), (2, 512, 2, 3), (4, 512, 4, 3), (2, 512, 4, 3), (8, 512, 4, 2), (16, 256, 8, 3)]
        yield from (Rows(*shape) for shape in rows)
        return
    if tokens == 8192:
        if name == "gate_up":
            yield Tiles(256, 128, 64, 8, 3)
        return
    tail = 16 if tokens in (65, 129, 257) else 0  # a power of two and the root
    block_t = {9: 16, 17: 32, 64: 64, 65: 64, 129: 128, 257: 128}[tokens]
    splits = {"qkv": [1, 2, 4], "o": [2, 4], "gate_up": [1], "down": [5, 10], "head": [1]}[name]
    if name in ("gate_up", "head"):
        shapes = [(256, block_t, 64, 8, 4 if block_t <= 64 else 3), (128, block_t, 64, 4 if block_t <= 64 else 8, 4)]
        shapes += [(64, block_t, 128 if block_t <= 64 else 64, 4, 4), (256, 64, 64, 8, 4)]
    else:
        shapes = [(64, block_t, 128, 4, 4 if block_t <= 32 else 3), (64, block_t, 64, 4, 5), (64, 64, 64, 4, 5)]
    for block_n, block_t, block_k, warps, stages in dict.fromkeys(shapes):
        for split in splits:
            yield Tiles(block_n, block_t, block_k, warps, stages, split, tail)
            if tail:
                yield Tiles(block_n, 2 * block_t if tokens == 65 else block_t, block_k, warps, 3, split)


def products(model: Model, name: str, tokens: int) -> list[Product]:
    if name == "head":
        return [Product(random(tokens, HIDDEN), model.head, model.norm, EPS)]
    columns = MATRICES[name][2]
    x, residual = random(tokens, columns), random(tokens, HIDDEN)
    calls = []
    for layer in model.layers:
        weight = getattr(layer, name)
        if name in ("o", "down"):
            calls.append(Product(x, weight, eps=EPS, residual=residual, next_norm=layer.norm_2))
        else:
            calls.append(Product(x, weight, layer.norm_1, EPS, gate=name == "gate_up"))
    return calls


def variants() -> list[tuple[str, int, Choice]]:
    return [(name, tokens, choice) for name in MATRICES for tokens in BUCKETS for choice in candidates(name, tokens)]


TILES = [(16, 64, 4, 3), (16, 128, 4, 2), (32, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2)]
TILES += [(128, 64, 8, 3), (128, 128, 8, 2)]
ATTENTION = [(1, 1, 2000), (1, 17, 2000), (1, 65, 2000), (1, 257, 2000), (16, 17, 2000), (64, 9, 500)]


def attention_variants() -> list[tuple[tuple[int, int, int], tuple[int, int, int, int], int]]:
    found = []
    for workload in ATTENTION:
        rows = workload[1] * HEADS // KV_HEADS
        for tile in TILES:
            if tile[0] <= max(16, rows * 2 - 1) and tile[0] >= min(64, rows):
                found += [(workload, tile, programs) for programs in (132, 264)]
    return found


def within_step(name: str, tokens: int) -> list[Choice]:
    """Candidates for `polish`: a tile that is slower alone may be faster between others that it lets start early."""
    tail = 16 if tokens in (65, 129, 257) else 0
    block_t = 64 if tokens < 129 else 128
    if name == "head":
        shapes = [
            (n, block_t, 64, warps, stages, 1, tail) for n, warps in ((64, 4), (128, 4), (128, 8)) for stages in (3, 4)
        ]
    elif name == "gate_up":
        shapes = [(n, block_t, k, w, s, 1, tail) for n, k, w, s in (
            (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4),
            (128, 64, 4, 5), (128, 128, 8, 2), (128, 32, 4, 5), (256, 64, 8, 3))]  # fmt: skip
    else:
        splits = {"qkv": (1, 2, 3, 4), "o": (2, 3, 4, 6), "down": (4, 5, 7, 10)}[name]
        tiles = ((64, 64, 4, 3), (64, 64, 4, 5), (64, 128, 4, 3), (32, 64, 4, 5), (32, 128, 4, 3), (128, 64, 4, 4))
        shapes = [(n, block_t, k, w, s, split, tail) for n, k, w, s in tiles for split in splits]
    return [Tiles(*shape, ahead=ahead) for shape in shapes for ahead in (256, 512)]


def polish(model: Model, tokens: int, shares: int, context: int = 2000) -> dict[str, Any]:
    """Improves tuning.TABLE for steps of one request with `tokens` queries, a matrix at a time, by the whole step's time."""
    command = [sys.executable, __file__, "--polish", str(tokens), "--compile"]
    workers = [subprocess.Popen([*command, f"{index}/{shares}"]) for index in range(shares)]
    for worker in workers:
        worker.wait()
    ids = torch.randint(0, VOCAB, (tokens,), device=DEVICE)
    step = functools.partial(fused_step, model, ids, uniform_batch(1, tokens, context))
    best = graph_time(step)
    print(f"step of {tokens}: {best:.3f} ms before", flush=True)
    found: dict[str, Any] = {"before": best}
    for name in ("down", "gate_up", "o", "qkv", "head"):
        key = MATRICES[name]
        timed = []
        kept = tuning.TABLE[key]
        for choice in within_step(name, tokens):
            tuning.TABLE[key] = ((tokens, choice), *kept)  # the first row that holds `tokens` is taken
            try:
                timed.append((graph_time(step, 5, 8), choice))
            except Exception as failure:  # a candidate that does not fit the device is not a choice
                print(f"{name} {choice}: {type(failure).__name__} {str(failure)[:80]}", flush=True)
                torch.cuda.synchronize()
        timed.sort(key=lambda pair: pair[0])
        tuning.TABLE[key] = kept
        if timed and timed[0][0] < best:
            best = timed[0][0]
            before = tuple(row for row in kept if row[0] < tokens)
            tuning.TABLE[key] = (*before, (tokens, timed[0][1]), *kept[len(before) :])
        print(f"{name:8} {best:.3f}  ", "  ".join(f"{t:.3f} {short(choice)}" for t, choice in timed[:5]), flush=True)
        found[name] = [(round(t, 4), short(choice)) for t, choice in timed]
    return found


def compile_share(index: int, shares: int, tokens: int | None) -> None:
    """Compiles a share of the candidates into Triton's cache by running each once."""
    model = Model(1, 1 << 17)
    if tokens is not None:
        wanted = [(name, tokens, choice) for name in MATRICES for choice in within_step(name, tokens)]
    else:
        wanted = variants()
    for name, count, choice in wanted[index::shares]:
        try:
            linear.run(products(model, name, count)[0], choice)
        except Exception as failure:  # the timing run reports it again
            print(f"{name} {count} {choice}: {type(failure).__name__}", flush=True)
    for workload, tile, programs in [] if tokens is not None else attention_variants()[index::shares]:
        batch = uniform_batch(*workload)
        query = random(workload[0] * workload[1], HEADS, DIM)
        try:
            attention.attend(
                query, model.layers[0].keys, model.layers[0].values, batch, PAGE, SCALE, tile=tile, programs=programs
            )
        except Exception as failure:
            print(f"{workload} {tile}: {type(failure).__name__}", flush=True)
    torch.cuda.synchronize()


def tune(model: Model, shares: int) -> dict[str, Any]:
    """Times every candidate, puts the best into tuning.TABLE for the rest of this run, and returns all times."""
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--compile"]
    workers = [subprocess.Popen([*command, f"{index}/{shares}"]) for index in range(shares)]
    for worker in workers:
        worker.wait()
    print(f"compiled {len(variants())} in {time.perf_counter() - begin:.0f} s", flush=True)
    results: dict[str, Any] = {}
    best: dict[str, list[tuple[int, Choice]]] = {name: [] for name in MATRICES}
    for name in MATRICES:
        for tokens, limit in BUCKETS.items():
            timed = []
            calls = products(model, name, tokens)
            for choice in candidates(name, tokens):
                run = functools.partial(run_all, calls, choice)
                try:
                    timed.append((1000 * graph_time(run, 3, 4) / len(calls), choice))
                except Exception as failure:  # a candidate that does not fit the device is not a choice
                    print(f"{name} {tokens} {choice}: {type(failure).__name__} {str(failure)[:80]}", flush=True)
                    torch.cuda.synchronize()
            timed.sort(key=lambda pair: pair[0])
            best[name].append((limit, timed[0][1]))
            results[f"{name} {tokens}"] = [(round(t, 2), short(choice)) for t, choice in timed]
            blas = next(t for t, choice in timed if isinstance(choice, Blas))
            top = "  ".join(f"{t:.1f} {short(choice)}" for t, choice in timed[:3])
            print(f"{name:8} {tokens:4}  blas {blas:6.1f}  {top}", flush=True)
        operation, rows, columns = MATRICES[name]
        tuning.TABLE[operation, rows, columns] = tuple(best[name])
    for workload in ATTENTION:
        timed_tiles = []
        batch = uniform_batch(*workload)
        query = random(workload[0] * workload[1], HEADS, DIM)
        for _, tile, programs in (v for v in attention_variants() if v[0] == workload):
            try:
                taken = graph_time(functools.partial(attend_all, model, query, batch, tile, programs), 3, 4)
                timed_tiles.append((1000 * taken / len(model.layers), tile, programs))
            except Exception as failure:
                print(f"{workload} {tile}: {type(failure).__name__} {str(failure)[:80]}", flush=True)
        timed_tiles.sort()
        results[f"attention {workload}"] = [(round(t, 2), *tile, programs) for t, tile, programs in timed_tiles]
        print(f"attention {workload}  ", "  ".join(f"{t:.1f} {tile} {n}" for t, tile, n in timed_tiles[:4]), flush=True)
    print(f"tuned in {time.perf_counter() - begin:.0f} s")
    return results


def run_all(calls: list[Product], choice: Choice) -> None:
    for call in calls:
        linear.run(call, choice)


def attend_all(model: Model, query: Tensor, batch: AttentionBatch, tile: Any, programs: int) -> None:
    for layer in model.layers:
        attention.attend(query, layer.keys, layer.values, batch, PAGE, SCALE, tile=tile, programs=programs)


def short(choice: Choice) -> str:
    return type(choice).__name__ + str(tuple(int(value) for value in asdict(choice).values())).replace(" ", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tune", nargs="?", const="", metavar="FILE", help="time the candidates first")
    parser.add_argument("--polish", type=int, metavar="QUERIES", help="try candidates within the whole step")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.compile:
        index, shares = arguments.compile.split("/")
        return compile_share(int(index), int(shares), arguments.polish)
    versions = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }  # fmt: skip
    print(versions)
    model = Model(arguments.layers, 1 << 17)
    if arguments.tune is not None:
        times = tune(model, shares=14)
        if arguments.tune:
            Path(arguments.tune).write_text(json.dumps(times, indent=0))
    if arguments.polish is not None:
        polish(model, arguments.polish, shares=14)
    steps = measure_steps(model)
    prefill = measure_prefill(model)
    print(json.dumps({**versions, "layers": arguments.layers, "steps": steps, "prefill": prefill}))


if __name__ == "__main__":
    main()
