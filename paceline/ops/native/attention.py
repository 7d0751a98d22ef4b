"""Rotary embedding and paged attention by the native kernels, for bfloat16; other inputs go to torch's."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import torch
from torch import Tensor

from paceline.ops import attention, cpu, rope
from paceline.ops.attention import AttentionBatch
from paceline.ops.native import library


def rope_and_cache(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    locations: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_heads: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """See paceline.ops.rope; `qkv` may be overwritten."""
    kernels = library() if qkv.dtype == torch.bfloat16 and qkv.is_contiguous() else None
    if kernels is None:
        return rope.reference(qkv, table, positions, locations, key_cache, value_cache, num_heads, norms)
    _, num_kv_heads, dim = key_cache.shape
    query_norm, key_norm, eps = (None, None, 0.0) if norms is None else norms
    tokens = qkv.shape[0]
    queries = qkv.new_empty(tokens, num_heads, dim)
    kernels.rope_and_cache(
        qkv.data_ptr(),
        table.data_ptr(),
        positions.data_ptr(),
        locations.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        None if query_norm is None else query_norm.data_ptr(),
        None if key_norm is None else key_norm.data_ptr(),
        eps,
        queries.data_ptr(),
        tokens,
        num_heads,
        num_kv_heads,
        dim,
        torch.get_num_threads(),
    )
    return queries


class _BatchRecord(ctypes.Structure):
    """batch_t of attention.c."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("page_table", "context_lens", "query_starts", "branch_starts", "tree_mask")
        ),
        *(
            (name, ctypes.c_long)
            for name in ("num_requests", "table_width", "page_size", "tree_words", "hides_first", "num_before")
        ),
    )


class _Plan:
    """A batch as the kernel reads it, made once for all layers of a step."""

    def __init__(self, batch: AttentionBatch, page_size: int) -> None:
        tensors = [batch.page_table, batch.context_lens, batch.query_starts, batch.branch_starts]
        if batch.tree_mask is not None:
            tensors.append(batch.tree_mask)
        self._kept = [tensor.int().contiguous() for tensor in tensors]
        pointers = [each.data_ptr() for each in self._kept] + [None] * (5 - len(tensors))
        num_words = 0 if batch.tree_mask is None else batch.tree_mask.shape[1]
        sizes = (*batch.page_table.shape, page_size, num_words, batch.hides_first, batch.num_before)
        self._record = _BatchRecord(*pointers, *sizes)
        self.address = ctypes.addressof(self._record)


def _apart(batch: AttentionBatch, page_size: int) -> AttentionBatch:
    """Every branch as a request of its own, whose locations are those it sees, in the order of their positions.

    A branch's bits are then those of plain decoding, whatever lies beside it in the cache. Of a tree every query is a
    request of its own. The page table is one of pages of one token.
    """
    rows, contexts, starts = [], [], [0]
    bounds = batch.query_starts.tolist()
    for index, context in enumerate(batch.context_lens.tolist()):
        first, last = bounds[index : index + 2]
        place = torch.arange(context + batch.num_before + last - first)
        own = batch.page_table[index][place // page_size] * page_size + place % page_size
        visible = batch.visible(first, last)
        for begin, end in _groups(batch, first, last):
            seen = visible[end - 1].nonzero()[:, 0]
            rows.append(torch.cat([own[:context], own[context + seen]]))
            contexts.append(len(rows[-1]) - (end - begin))
            starts.append(starts[-1] + end - begin)
    return replace(
        batch,
        page_table=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        context_lens=torch.tensor(contexts),
        query_starts=torch.tensor(starts),
        branch_starts=torch.zeros(starts[-1]),
        tree_mask=None,
        num_before=0,
    )


def _groups(batch: AttentionBatch, first: int, last: int) -> list[tuple[int, int]]:
    """The queries of one request, counted from its root, in runs of which each query sees all before it in the run."""
    if batch.tree_mask is not None:
        return [(query, query + 1) for query in range(last - first)]
    branches = batch.branch_starts[first:last].clamp(min=1).tolist()  # the root joins the first
    runs, begin = [], 0
    for _, queries in itertools.groupby(branches):
        end = begin + len(list(queries))
        runs.append((begin, end))
        begin = end
    return runs


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """See paceline.ops.attention. Weights are rounded to bfloat16, scores are not."""
    kernels = _kernels_for(query, key_cache)
    if kernels is None:
        serve = attention.reference if batch.num_before else cpu.paged_attention
        return serve(query, key_cache, value_cache, batch, page_size, scale)
    if batch.plan is None:
        batch.plan = _Plan(batch, page_size)
    return _attend(kernels, query, key_cache, value_cache, batch.plan, scale)


def paged_attention_deterministic(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """The same, and the same bits for a query whichever other queries and branches are there."""
    kernels = _kernels_for(query, key_cache)
    if kernels is None:
        return attention.reference_deterministic(query, key_cache, value_cache, batch, page_size, scale)
    if batch.plan is None:
        batch.plan = _Plan(_apart(batch, page_size), 1) if batch.branching else _Plan(batch, page_size)
    return _attend(kernels, query, key_cache, value_cache, batch.plan, scale)


def _kernels_for(query: Tensor, key_cache: Tensor) -> ctypes.CDLL | None:
    _, num_kv_heads, dim = key_cache.shape
    fits = query.dtype == torch.bfloat16 and dim % 32 == 0 and dim <= 256 and query.shape[1] <= 96 * num_kv_heads
    return library() if fits else None


def _attend(
    kernels: ctypes.CDLL, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: _Plan, scale: float
) -> Tensor:
    query = query.contiguous()
    output = torch.empty_like(query)
    kernels.paged_attention(
        plan.address,
        query.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        scale,
        query.shape[1],
        *key_cache.shape[1:],
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output
