"""Moves cached state of accepted tokens within the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation


def move_rows(
    data: Tensor, page_table: Tensor, context_lens: Tensor, counts: Tensor, path: Tensor, page_size: int
) -> None:
    """Copies the cached rows of each request's accepted draft tokens to the places right after its root.

    A step writes query i of a request at place context_lens + i. Plain decoding would have written its accepted tokens at
    context_lens + 1 and on. data [layers, locations, row], contiguous; page_table [B, P] int32; context_lens [B] int32
    before the step; counts [B] int32 tokens written by the step (accepted drafts and one more); path [B, width] int32: the
    query index of each accepted token, ascending. No row moves to the right, so reading in order before writing is safe.
    """
    implementation("move_rows", data)(data, page_table, context_lens, counts, path, page_size)


def reference(
    data: Tensor, page_table: Tensor, context_lens: Tensor, counts: Tensor, path: Tensor, page_size: int
) -> None:
    for index, count in enumerate((counts - 1).tolist()):
        queries = path[index, :count].long()
        places = torch.arange(1, count + 1, device=data.device)
        if bool((queries == places).all()):
            continue
        base = int(context_lens[index])
        source = _locations(page_table[index], base + queries, page_size)
        target = _locations(page_table[index], base + places, page_size)
        data[:, target] = data[:, source]


def _locations(page_row: Tensor, places: Tensor, page_size: int) -> Tensor:
    return page_row[places // page_size].long() * page_size + places % page_size
