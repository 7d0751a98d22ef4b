"""Moves accepted tokens' cached rows, one program a request and layer."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _move_kernel(
    data_ptr, table_ptr, contexts_ptr, counts_ptr, path_ptr, layer_size, table_width, count_stride, path_width, page_size,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    accepted = tl.load(counts_ptr + request * count_stride) - 1
    path = path_ptr + request * path_width
    # a path that ends at query `accepted` is 1, 2, 3 ...: all its rows are in their places
    if (accepted > 0) & (tl.load(path + tl.maximum(accepted - 1, 0)) > accepted):
        layer = data_ptr + tl.program_id(1).to(tl.int64) * layer_size
        context = tl.load(contexts_ptr + request)
        table = table_ptr + request * table_width
        column = tl.arange(0, PADDED)
        for offset in range(0, accepted, ROWS):
            row = offset + tl.arange(0, ROWS)
            inside = row < accepted
            source = context + tl.load(path + row, mask=inside, other=0)
            target = context + 1 + row
            source_page = tl.load(table + source // page_size, mask=inside, other=0)
            target_page = tl.load(table + target // page_size, mask=inside, other=0)
            source_row = (source_page * page_size + source % page_size).to(tl.int64)
            target_row = (target_page * page_size + target % page_size).to(tl.int64)
            mask = inside[:, None] & (column < SIZE)[None, :]
            values = tl.load(layer + source_row[:, None] * SIZE + column[None, :], mask=mask)
            # a later row's source may be an earlier row's target: all are read before any is written
            tl.debug_barrier()
            tl.store(layer + target_row[:, None] * SIZE + column[None, :], values, mask=mask)
            tl.debug_barrier()


def move_rows(
    data: Tensor, page_table: Tensor, context_lens: Tensor, counts: Tensor, path: Tensor, page_size: int
) -> None:
    """See paceline.ops.move."""
    layers, locations, size = data.shape
    _move_kernel[(len(counts), layers)](
        data, page_table, context_lens, counts, path, locations * size, page_table.stride(0), counts.stride(0),
        path.shape[1], page_size, SIZE=size, PADDED=triton.next_power_of_2(size), ROWS=16, num_warps=4,
    )  # fmt: skip
