"""Which kernel multiplies which matrix at how many tokens: measured on one H100, `python -m benchmarks.tools.step --tune`.

Plain data. A row is valid up to and including its number of tokens; above the last row cuBLAS is used. A shape without
rows of its own takes DEFAULT of its operation. The rows of 65 tokens are those of the fastest whole step (`--polish 65` of
the same command): a tile with less shared memory, slower alone, lets the next kernel start earlier.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """One token, or up to 4: each program multiplies `block_n` rows of the weight, `block_k` columns at a time.

    `ahead` column blocks are in flight in registers; the first are loaded before the previous kernel has ended.
    """

    block_n: int
    block_k: int
    warps: int
    ahead: int


@dataclass(frozen=True)
class Tiles:
    """Few tokens: a [block_n, block_t + tail] tile of the output a program, K in `split` parts, `stages` in flight.

    `tail` more tokens share the weight block: 64 draft tokens and their root are 65, and a second tile would read it again.
    A norm is a launch of its own: inside the loop it was slower at every size but one (`--tune`).
    `ahead` bytes of each weight row are prefetched into L2 before the previous kernel has ended.
    """

    block_n: int
    block_t: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    tail: int = 0
    ahead: int = 256


@dataclass(frozen=True)
class Blas:
    """cuBLAS, with the work next to it in launches of its own."""


Choice = Rows | Tiles | Blas
Table = tuple[tuple[int, Choice], ...]

# The batch-invariant kernels: one tile whatever T is; K in parts that depend on the matrix alone.
DETERMINISTIC = Tiles(64, 64, 64, 4, 4)
DETERMINISTIC_PROGRAMS = 96  # K is split until there are this many programs at one tile of tokens

# A step with the batch-invariant kernels takes, at 1, 65 and 257 tokens, 2.09, 2.52 and 4.84 ms against 1.35, 2.24 and 3.34
# (Qwen2.5 1.5B shapes, one H100, `python -m benchmarks.tools.step`).

_NARROW = 4096  # a weight of fewer rows needs its K split to fill the device
_WIDE = "wide"
DEFAULT: dict[str, Table] = {
    "linear": (
        (1, Rows(2, 512, 1, 3)),
        (16, Tiles(64, 16, 128, 4, 4, split=4)),
        (32, Tiles(64, 32, 128, 4, 4, split=4)),
        (64, Tiles(64, 64, 64, 4, 5, split=4)),
        (80, Tiles(64, 64, 64, 4, 5, split=4, tail=16)),
    ),
    _WIDE: (
        (1, Rows(2, 512, 4, 3)),
        (16, Tiles(64, 16, 128, 4, 4)),
        (32, Tiles(64, 32, 128, 4, 4)),
        (64, Tiles(128, 64, 64, 4, 4)),
    ),
    "gated": (
        (1, Rows(2, 512, 4, 3)),
        (16, Tiles(64, 16, 128, 4, 4)),
        (32, Tiles(64, 32, 128, 4, 4)),
        (64, Tiles(128, 64, 64, 4, 4)),
        (80, Tiles(128, 64, 64, 4, 4, tail=16)),
    ),
}

# Qwen2.5 1.5B, by (operation, rows, columns) of the weight, bf16. Comments: microseconds at the tokens in brackets (1 in the
# first rows) : those of cuBLAS with norm and gate in launches of their own. One H100, `python -m benchmarks.tools.step --tune`.
# The rows of 16 and 32 tokens are those of the fastest whole step on one H200 (`--polish 8`, `--polish 24`): 1.38 and 1.42 ms
# with a context of 2,000 tokens, against 1.45 and 1.57 with the tiles that are fastest alone on an H100. At 96 tokens no tile
# of `--polish 96` made the step faster than cuBLAS does (2.17 ms, the same H200).
TABLE: dict[tuple[str, int, int], Table] = {
    ("linear", 2048, 1536): (  # q, k and v
        (1, Rows(2, 512, 1, 3)),  # 3.2 : 7.5
        (16, Tiles(64, 16, 64, 4, 8, split=6)),
        (32, Tiles(64, 32, 128, 4, 5, split=4)),
        (64, Tiles(64, 64, 64, 4, 5, split=4)),
        (80, Tiles(64, 64, 64, 4, 5, split=4, tail=16)),  # 7.4 : 8.5 [65]
        (128, Blas()),
        (144, Tiles(64, 128, 64, 4, 5, split=4, tail=16)),  # 8.1 : 8.6 [129]
    ),
    ("linear", 1536, 1536): (  # attention's output
        (1, Rows(2, 512, 1, 3)),  # 3.0 : 5.3
        (16, Tiles(64, 16, 256, 8, 3, split=4, ahead=1024)),
        (32, Tiles(64, 32, 128, 4, 5, split=3, ahead=1024)),
        (64, Tiles(64, 64, 64, 4, 5, split=4)),  # 4.6 : 5.5 [64]
        (80, Tiles(64, 64, 64, 4, 5, split=4, tail=16)),  # 4.7 : 5.6 [65]
    ),
    ("gated", 17920, 1536): (
        (1, Rows(8, 512, 4, 2)),  # 18.9 : 25.0
        (16, Tiles(64, 16, 128, 4, 5)),
        (32, Tiles(64, 32, 128, 4, 3)),
        (64, Tiles(64, 64, 64, 4, 4, ahead=512)),
        (80, Tiles(64, 64, 64, 4, 4, tail=16, ahead=512)),  # 24.1 : 29.4 [65]
    ),
    ("linear", 1536, 8960): (  # down
        (1, Rows(2, 512, 2, 6)),  # 9.4 : 15.3
        (16, Tiles(64, 16, 128, 4, 5, split=10)),
        (32, Tiles(64, 32, 128, 4, 5, split=5)),
        (64, Tiles(64, 64, 64, 4, 5, split=5)),  # 13.6 : 15.4 [64]
        (80, Tiles(64, 64, 64, 4, 5, split=5, tail=16)),  # 13.8 : 15.9 [65]
        (128, Blas()),
        (144, Tiles(64, 128, 64, 4, 5, split=5, tail=16)),  # 16.1 : 16.8 [129]
    ),
    ("linear", 151936, 1536): (  # the head
        (1, Rows(16, 256, 8, 3)),  # 149 : 168
        (16, Tiles(128, 16, 64, 8, 6)),
        (32, Tiles(64, 32, 128, 4, 3)),
        (64, Tiles(128, 64, 64, 4, 4)),  # 180 : 184 [64]
        (80, Tiles(64, 64, 64, 4, 3, tail=16)),  # 174 : 185 [65]
    ),
}


# Weights in float8, which are a drafter's. The rows of 4 tokens were the fastest for a draft of 8 passes of 3 rows on one H200
# (`python -m benchmarks.tools.drafts`): a step of 23 drafted tokens took 1.93 to 1.95 ms, with tiles in their place up to
# 1.98. The others are by arithmetic: half the bytes of bf16, so blocks of twice the columns or programs of twice the rows keep
# as many bytes in flight (a lane's load is 16 bytes, 512 columns a warp). Above the last row the weight is decoded first,
# which takes as long as computing some 500 tokens.
FLOAT8: dict[str, Table] = {
    "linear": (
        (1, Rows(2, 1024, 2, 4)),
        (4, Rows(4, 512, 4, 3)),
        (16, Tiles(64, 16, 128, 4, 5, split=4)),
        (32, Tiles(64, 32, 128, 4, 5, split=4)),
        (64, Tiles(64, 64, 128, 4, 4, split=4)),
        (80, Tiles(64, 64, 128, 4, 4, split=4, tail=16)),
        (512, Tiles(64, 128, 64, 4, 4, split=2)),
    ),
    _WIDE: (
        (1, Rows(16, 512, 8, 3)),
        (4, Rows(8, 256, 4, 4)),
        (16, Tiles(64, 16, 128, 4, 5)),
        (32, Tiles(64, 32, 128, 4, 5)),
        (64, Tiles(64, 64, 128, 4, 4)),
        (512, Tiles(128, 128, 64, 8, 4)),
    ),
    "gated": (
        (1, Rows(4, 512, 4, 3)),
        (4, Rows(8, 512, 8, 2)),
        # not (64, 16), nor 128 columns and a tail: ptxas makes such a tile wait for each of its products
        (32, Tiles(64, 32, 128, 4, 5)),
        (64, Tiles(64, 64, 128, 4, 4)),
        (80, Tiles(64, 64, 64, 4, 4, tail=16)),
        (512, Tiles(128, 128, 64, 8, 4)),
    ),
}


def choose(operation: str, rows: int, columns: int, tokens: int, *, float8: bool = False) -> Choice:
    """The row that holds `tokens` for `operation` ("linear" or "gated") with a [rows, columns] weight, dense or in float8."""
    usual = _WIDE if operation == "linear" and rows >= _NARROW else operation
    table = FLOAT8[usual] if float8 else TABLE.get((operation, rows, columns), DEFAULT[usual])
    return next((choice for limit, choice in table if tokens <= limit), Blas())
