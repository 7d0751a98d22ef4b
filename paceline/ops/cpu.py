"""Paged attention on CPU in bfloat16: blocks of queries against all keys they may see, by batched matrix products.

torch's fused attention widens grouped keys to every head and, at one query or with a mask, runs far below the products
(2 cores, 12 heads over 2 key heads of 128: 18 ms fused and 2.9 ms here for 65 queries over 2,048 keys).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops import attention
from paceline.ops.attention import AttentionBatch

_BLOCK = 128  # queries scored at once: their scores stay in the cache, and causal blocks skip keys ahead of them


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """See paceline.ops.attention. Scores and weights are rounded to bfloat16 as transformers' eager attention does."""
    if query.dtype != torch.bfloat16 or batch.hides_first:
        return attention.reference(query, key_cache, value_cache, batch, page_size, scale)
    if batch.plan is None:
        batch.plan = _plan(batch, page_size)
    output = torch.empty_like(query)
    for first, last, rows, hidden in batch.plan:
        keys = key_cache[rows].transpose(0, 1).contiguous().transpose(1, 2)
        values = value_cache[rows].transpose(0, 1).contiguous()
        _attend(query[first:last], keys, values, hidden, scale, output[first:last])
    return output


def _plan(batch: AttentionBatch, page_size: int) -> list[tuple[int, int, slice | Tensor, Tensor | None]]:
    """What all layers of a step share, per request: its tokens, its locations, and the own tokens that a query must not see.

    The last is None where those are just the tokens after the query.
    """
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
    plan = []
    for index, context in enumerate(contexts):
        first, last = starts[index], starts[index + 1]
        if first == last:
            continue
        length = context + last - first
        hidden = None
        if batch.branching and last - first > 1:
            hidden = ~batch.visible(first, last)
        plan.append((first, last, _rows(batch.page_table[index], length, page_size), hidden))
    return plan


def _rows(pages: Tensor, length: int, page_size: int) -> slice | Tensor:
    """The locations of the first `length` tokens; a slice where the pages lie in a row."""
    used = pages[: -(-length // page_size)]
    begin = int(used[0])
    if bool((used == torch.arange(begin, begin + len(used), dtype=used.dtype)).all()):
        return slice(begin * page_size, begin * page_size + length)
    offsets = torch.arange(page_size)
    return (used.long()[:, None] * page_size + offsets).flatten()[:length]


def _attend(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, scale: float, output: Tensor) -> None:
    """query and output [Q, heads, dim]; keys [kv_heads, dim, S], values [kv_heads, S, dim], the last Q of S the queries'."""
    count, heads, dim = query.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    context = keys.shape[2] - count
    ahead = torch.ones(min(count, _BLOCK), min(count, _BLOCK), dtype=torch.bool).triu(1)
    for begin in range(0, count, _BLOCK):
        end = min(begin + _BLOCK, count)
        rows = end - begin
        reach = context + (end if hidden is None else count)
        block = (
            query[begin:end].view(rows, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * rows, dim)
        )
        scores = query.new_empty(kv_heads, group * rows, reach)
        torch.baddbmm(scores, block, keys[:, :, :reach], beta=0, alpha=scale, out=scores)
        if count > 1:
            own = scores.view(kv_heads, group, rows, reach)[..., context if hidden is not None else context + begin :]
            own.masked_fill_(ahead[:rows, :rows] if hidden is None else hidden[begin:end], float("-inf"))
        result = torch.bmm(scores.softmax(-1), values[:, :reach])
        output[begin:end] = result.view(kv_heads, group, rows, dim).permute(2, 0, 1, 3).reshape(rows, heads, dim)
