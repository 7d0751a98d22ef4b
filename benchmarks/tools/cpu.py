"""The operations of one decoder layer on a CPU: native kernels against torch's, beside the rates of plain reads and products.

    python -m benchmarks.tools.cpu --models smollm2-135m --rows 1,17,257

Each operation runs over one copy of its weight per layer, so that weights are read from memory as in decoding. The rows are the
queries of one request after --context tokens. Both implementations take turns; the minimum of --repeats counts. torch
multiplies bfloat16 packed for oneDNN if oneDNN has kernels for it, otherwise float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import argument_parser, finish, names, numbers
from paceline.ops import argmax, cpu, linear, native, rope
from paceline.ops.attention import AttentionBatch
from paceline.ops.native import attention as native_attention
from paceline.ops.native import linear as native_linear
from paceline.ops.weight import Dense, Packed, Weight, packs, prepare

PAGE = 16


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    ffn: int
    layers: int
    vocabulary: int


SHAPES = {
    "smollm2-135m": Shape(576, 9, 3, 64, 1536, 30, 49152),
    "qwen2.5-coder-1.5b": Shape(1536, 12, 2, 128, 8960, 28, 151936),
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", type=names, default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=numbers, default=[1, 8, 17, 65, 129, 257, 1024], help="numbers of rows")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = arguments.rows
    read = read_rate(arguments.repeats)
    work = work_rate(arguments.repeats)
    print(f"plain reads: {read:.1f} GB/s; float32 products: {work:.0f} GFLOP/s; native: {native.library() is not None}")
    results = []
    for name in arguments.models:
        shape = SHAPES[name]
        for result in [*products(shape, rows, arguments.repeats), *others(shape, rows, arguments)]:
            results.append({"model": name, **result})
            print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    rates = {"read_gb_per_s": round(read, 1), "float32_gflop_per_s": round(work)}
    finish({"benchmark": "cpu", "context": arguments.context, **rates, "operations": results})


def read_rate(repeats: int) -> float:
    """GB/s of a sum over 400 MB on all threads."""
    data = torch.ones(100_000_000, dtype=torch.int32)
    return data.nbytes / best([data.max], repeats) / 1e9


def work_rate(repeats: int) -> float:
    """GFLOP/s of torch's product of two square matrices of float32 on all threads."""
    square = torch.ones(1536, 1536)
    return float(2 * 1536**3 / best([partial(torch.mm, square, square)], repeats) / 1e9)


def products(shape: Shape, rows: list[int], repeats: int) -> list[dict[str, Any]]:
    """The four products of a layer and the head."""
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.dim
    attended = shape.heads * shape.dim
    found = []
    for name, (width, columns), copies in (
        ("qkv", (qkv, shape.hidden), shape.layers),
        ("output", (shape.hidden, attended), shape.layers),
        ("gate_up", (2 * shape.ffn, shape.hidden), shape.layers),
        ("down", (shape.hidden, shape.ffn), shape.layers),
        ("head", (shape.vocabulary, shape.hidden), 1),
    ):
        matrix = random(width, columns, scale=columns**-0.5)
        ours = [prepare(matrix, gated=name == "gate_up") for _ in range(copies)]
        torchs = [for_torch(matrix) for _ in range(copies)]
        norm = random(columns)
        for count in rows:
            x, residual = random(count, columns), random(count, width)
            wide = [each if packs() else each.float() for each in (x, norm, residual)]
            calls = ([call(name, native_linear, x, norm, residual, each) for each in ours],
                     [call(name, linear, *wide, each) for each in torchs])  # fmt: skip
            moved, work = 2 * width * columns, 2 * count * width * columns
            found.append(record(name, count, moved, work, best_of(calls, repeats)))
    return found


def call(name: str, module: Any, x: Tensor, norm: Tensor, residual: Tensor, weight: Weight) -> Callable[[], Tensor]:
    """The operation `name` of the module: the native kernel or torch's reference."""
    end = "_reference" if module is linear else ""
    if name in ("output", "down"):
        return partial(getattr(module, f"linear_add{end}"), x, weight, residual, norm, 1e-6)
    operation = "norm_gated" if name == "gate_up" else "norm_linear"
    return partial(getattr(module, f"{operation}{end}"), x, norm, 1e-6, weight)


def for_torch(matrix: Tensor) -> Weight:
    """The weight in the form used without native kernels."""
    if not packs():
        return Dense(matrix.float())
    width, columns = matrix.shape
    return Packed((width, columns), None, None, torch.ops.mkldnn._reorder_linear_weight(matrix, 16))


def others(shape: Shape, rows: list[int], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rotary embedding, attention, and the argmax over the vocabulary."""
    found = []
    for count in rows:
        length = arguments.context + count
        pages = -(-length // PAGE)
        place = torch.arange(arguments.context, length)
        batch = AttentionBatch(
            positions=place,
            locations=place,
            page_table=torch.arange(pages, dtype=torch.int32)[None],
            context_lens=torch.tensor([arguments.context], dtype=torch.int32),
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            branch_starts=torch.zeros(count, dtype=torch.int32),
            max_query=count,
            max_context=arguments.context,
        )
        keys, values = random(2, pages * PAGE, shape.kv_heads, shape.dim)
        qkv = random(count, (shape.heads + 2 * shape.kv_heads) * shape.dim)
        table, query = torch.randn(length, shape.dim), random(count, shape.heads, shape.dim)
        turn = [partial(each, qkv, table, place, place, keys, values, shape.heads)
                for each in (native_attention.rope_and_cache, rope.reference)]  # fmt: skip
        found.append(
            record("rope", count, 4 * qkv.numel(), 0, best_of(([turn[0]] * 20, [turn[1]] * 20), arguments.repeats))
        )
        attend = [[partial(each, query, keys, values, plan, PAGE, shape.dim**-0.5)] * 5
                  for each, plan in ((native_attention.paged_attention, batch),
                                     (cpu.paged_attention, AttentionBatch(**vars(batch))))]  # fmt: skip
        seen = count * arguments.context + count * (count + 1) // 2
        work, moved = 4 * seen * shape.heads * shape.dim, 4 * length * shape.kv_heads * shape.dim
        found.append(record("attention", count, moved, work, best_of((attend[0], attend[1]), arguments.repeats)))
        logits = random(count, shape.vocabulary)
        choose = [partial(each, logits) for each in (native_linear.argmax, argmax.reference)]
        found.append(record("argmax", count, logits.nbytes, 0, best_of((choose[:1], choose[1:]), arguments.repeats)))
    return found


def record(name: str, rows: int, moved: int, work: int, seconds: tuple[float, float]) -> dict[str, Any]:
    """Microseconds a call of both implementations; bytes and operations a second of the native one."""
    ours, torchs = seconds
    return {
        "operation": name,
        "rows": rows,
        "native_us": round(1e6 * ours, 1),
        "torch_us": round(1e6 * torchs, 1),
        "gb_per_s": round(moved / ours / 1e9, 1),
        "gflop_per_s": round(work / ours / 1e9, 1),
        "torch_over_native": round(torchs / ours, 2),
    }


def best_of(calls: tuple[list[Callable[[], Any]], list[Callable[[], Any]]], repeats: int) -> tuple[float, float]:
    """Seconds a call of two sets of calls, taken in turns."""
    turns = [(best(calls[0], 1), best(calls[1], 1)) for _ in range(repeats)]
    return min(first for first, _ in turns), min(second for _, second in turns)


def best(calls: list[Callable[[], Any]], repeats: int) -> float:
    """Seconds a call: the best of `repeats` rounds through all calls, after a first one that does not count."""
    calls[0]()
    rounds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for each in calls:
            each()
        rounds.append((time.perf_counter() - began) / len(calls))
    return min(rounds)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16()


if __name__ == "__main__":
    main()
