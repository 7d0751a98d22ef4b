"""The kernel choices that `--tune` and `--polish` try, by matrix and number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from benchmarks.tools.step.model import DIM, FFN, HEADS, HIDDEN, KV_HEADS, VOCAB
from paceline.ops.triton.tuning import Blas, Choice, Rows, Tiles

MATRICES = {  # name: (operation, rows, columns)
    "qkv": ("linear", (HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
    "o": ("linear", HIDDEN, HEADS * DIM),
    "gate_up": ("gated", 2 * FFN, HIDDEN),
    "down": ("linear", HIDDEN, FFN),
    "head": ("linear", VOCAB, HIDDEN),
}
# tokens measured: the most tokens that the choice serves
BUCKETS = {
    1: 1,
    9: 16,
    17: 32,
    64: 64,
    65: 128,
    129: 192,
    257: 320,
    8192: 1 << 30,
}


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
    """Candidates for `polish`: a tile that is slower alone may be faster within the step, if the next kernel starts earlier."""
    if tokens <= 32:
        return _few_tokens(name, 16 if tokens <= 16 else 32)
    tail = {65: 16, 96: 32, 129: 16, 160: 32, 257: 16}.get(tokens, 0)
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


def _few_tokens(name: str, block_t: int) -> list[Choice]:
    """Candidates of steps with a short draft, which read the weights once and compute little: bytes in flight decide."""
    tiles = [(64, 64, 4, 6), (64, 64, 4, 8), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 4, 2)]
    tiles += [(64, 256, 4, 3), (64, 256, 8, 3), (128, 64, 4, 4), (128, 64, 4, 6), (128, 128, 4, 3), (128, 128, 8, 3)]
    splits = {"qkv": (2, 4, 6), "o": (3, 4, 6), "gate_up": (1, 2), "down": (5, 7, 10), "head": (1,)}[name]
    if name in ("gate_up", "head"):
        tiles += [(32, 128, 4, 5), (32, 256, 4, 4), (128, 64, 8, 6), (128, 128, 8, 4), (256, 64, 8, 4)]
    else:
        tiles = [(n, k, warps, stages) for n, k, warps, stages in tiles if n == 64]
    shapes = [(n, block_t, k, w, s, split, 0) for n, k, w, s in tiles for split in splits]
    return [Tiles(*shape, ahead=ahead) for shape in shapes for ahead in (256, 1024)]


def short(choice: Choice) -> str:
    return type(choice).__name__ + str(tuple(int(value) for value in asdict(choice).values())).replace(" ", "")
