"""Which kernel serves which matrix at how many tokens: measured on one H100 by `benchmarks/step.py --tune`.

Plain data. A row holds up to and including its number of tokens; beyond the last row cuBLAS serves. A shape without
rows of its own takes DEFAULT of its operation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """One token: each program multiplies `block_n` rows of the weight, `block_k` columns at a time.

    `ahead` column blocks are in flight in registers, the first ones before the previous kernel has ended.
    """

    block_n: int
    block_k: int
    warps: int
    ahead: int


@dataclass(frozen=True)
class Tiles:
    """Few tokens: a [block_n, block_t] tile of the output a program, K in `split` parts, `stages` blocks in flight.

    A norm is a launch of its own: inside the loop it was slower at every size but one.
    `ahead` bytes of each weight row are sent for (into L2) before the previous kernel has ended
    """

    block_n: int
    block_t: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    ahead: int = 256


@dataclass(frozen=True)
class Blas:
    """cuBLAS, with the work next to it in launches of its own."""


Choice = Rows | Tiles | Blas
Table = tuple[tuple[int, Choice], ...]

# The batch-invariant kernels: one tile whatever T is; K in parts that depend on the matrix alone.
DETERMINISTIC = Tiles(64, 64, 64, 4, 4)
DETERMINISTIC_PROGRAMS = 96  # K is split until there are this many programs at one tile of tokens

DEFAULT: dict[str, Table] = {
    "linear": ((1, Rows(4, 512, 4, 3)), (16, Tiles(64, 16, 128, 4, 4)), (64, Tiles(64, 64, 128, 4, 3))),
    "gated": ((1, Rows(4, 512, 4, 3)), (16, Tiles(128, 16, 128, 4, 4)), (64, Tiles(128, 64, 64, 4, 4))),
}

# (operation, N, K): rows. Qwen2.5 1.5B.
TABLE: dict[tuple[str, int, int], Table] = {}


def choose(operation: str, rows: int, columns: int, tokens: int) -> Choice:
    """The row that holds `tokens` for `operation` ("linear" or "gated") with a [rows, columns] weight."""
    table = TABLE.get((operation, rows, columns), DEFAULT[operation])
    return next((choice for limit, choice in table if tokens <= limit), Blas())
