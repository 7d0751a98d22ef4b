"""Paged attention: every request's queries over its committed pages and over the step's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.ops.dispatch import implementation
from paceline.ops.draft import chains, unpacked


class KeyPlaces(NamedTuple):
    """Of all keys of a step's requests, each request's after another: cache locations [K] int64, where each request's begin
    [B + 1] int32, and the most keys of one.
    """

    locations: Tensor
    starts: Tensor
    most: int


@dataclass
class HostLengths:
    """query_starts and context_lens as lists; `runs[b]` is request b's first page where its pages lie in a row.

    `keys` is kept by the first layer that needs it for the others.
    """

    query_starts: list[int]
    context_lens: list[int]
    runs: list[int | None]
    keys: KeyPlaces | None = None


@dataclass
class AttentionBatch:
    """Positions, cache locations and masks of a step's T tokens. Request b of B owns `query_starts[b]:query_starts[b + 1]`.

    The cache region of one request in one step, in the order of its places (not of positions):

        | committed: context_lens[b] tokens | root | branch 0 ............ | branch 1 ..... |
                                              ^ query 0                      ^ its branch_start

    Query i sees all committed tokens, the root (query 0), and the queries j with branch_starts[i] <= j <= i.
    With branch_starts 0 that is plain causal attention, which is what prefill and a single draft use. With a `tree_mask`
    query i sees all committed tokens and the queries whose bits are set instead: any tree, or later queries too, as in a
    block that is drafted at once.

    A draft that is computed in several passes keeps those of earlier passes in place, `num_before` tokens of each request:

        | committed: context_lens[b] tokens | root | earlier passes | this pass |
                                              ^ own place 0           ^ query 0, own place num_before

    The tree mask is then over own places: query i sees all committed tokens and the own places whose bits are set.

    positions     [T] int64   RoPE position (context_lens[b] + depth; branches overlap in position, never in location)
    locations     [T] int64   page * page_size + offset, where the token's K and V go in the cache
    page_table    [B, P] int32  page of each page_size run of the request's tokens
    context_lens  [B] int32   committed tokens before this step
    query_starts  [B + 1] int32
    branch_starts [T] int32
    max_query, max_context     upper bounds known to the host (they size launches, not results)
    branching     False when every branch_start is 0 and there is no tree, so that a plain causal kernel may be used
    hides_first   whether the key at place 0 of a request is hidden from all queries but the one at place 0
    tree_mask     [T, W] int32, bit j % 32 of word j // 32 set where the query sees own place j of its request (query
                  j - num_before), itself among them; W holds num_before + max_query; bits past the last query mean nothing
    num_before    own tokens of earlier passes between the committed tokens and query 0; above 0 only with a tree_mask
    host          what the host knows of it (prefill), so that no kernel waits for the device
    plan          what an implementation computes once for all layers
    """

    positions: Tensor
    locations: Tensor
    page_table: Tensor
    context_lens: Tensor
    query_starts: Tensor
    branch_starts: Tensor
    max_query: int
    max_context: int
    branching: bool = False
    hides_first: bool = False
    tree_mask: Tensor | None = None
    num_before: int = 0
    host: HostLengths | None = None
    plan: Any = None

    def __post_init__(self) -> None:
        assert self.num_before == 0 or self.tree_mask is not None, "tokens of earlier passes need a tree_mask"

    @property
    def num_requests(self) -> int:
        return self.context_lens.shape[0]

    def visible(self, first: int, last: int) -> Tensor:
        """[Q, num_before + Q] bool for the queries `first:last` of one request: which own places each query sees."""
        if self.tree_mask is not None:
            return unpacked(self.tree_mask[first:last], self.num_before + last - first)
        return chains(self.branch_starts[first:last])

    def only(self, rows: Tensor) -> AttentionBatch:
        """Just the tokens `rows` [N], each alone after all that come before it. For batches without branches."""
        requests = torch.searchsorted(self.query_starts, rows.int(), right=True) - 1
        count = len(rows)
        return AttentionBatch(
            positions=self.positions[rows],
            locations=self.locations[rows],
            page_table=self.page_table[requests],
            context_lens=(self.context_lens[requests] + rows - self.query_starts[requests]).int(),
            query_starts=torch.arange(count + 1, dtype=torch.int32, device=rows.device),
            branch_starts=torch.zeros(count, dtype=torch.int32, device=rows.device),
            max_query=1,
            max_context=self.max_context + self.max_query - 1,
            hides_first=self.hides_first,
        )


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """query [T, heads, dim] -> [T, heads, dim]; caches [locations, kv_heads, dim] already hold the step's own tokens."""
    return implementation("paged_attention", query)(query, key_cache, value_cache, batch, page_size, scale)


def reference(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """The definition, and what runs where no kernel does: gather each request's pages, then one masked attention."""
    output = torch.empty_like(query)
    starts = batch.query_starts.tolist()
    contexts = batch.context_lens.tolist()
    key_pages = key_cache.view(-1, page_size, *key_cache.shape[1:])
    value_pages = value_cache.view(-1, page_size, *value_cache.shape[1:])
    for index, context in enumerate(contexts):
        first, last = starts[index], starts[index + 1]
        queries = last - first
        if queries == 0:
            continue
        before = context + batch.num_before
        length = before + queries
        pages = batch.page_table[index, : (length + page_size - 1) // page_size]
        keys = key_pages[pages].flatten(0, 1)[:length].transpose(0, 1)
        values = value_pages[pages].flatten(0, 1)[:length].transpose(0, 1)
        mask = None
        causal = queries > 1 and context == 0 and not batch.branching and not batch.hides_first
        if (queries > 1 or batch.num_before or batch.hides_first) and not causal:
            mask = torch.nn.functional.pad(batch.visible(first, last), (context, 0), value=True)
            if batch.hides_first:
                mask[int(before == 0) :, 0] = False  # a query at place 0 sees its own key
        result = F.scaled_dot_product_attention(
            query[first:last].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[1] != key_cache.shape[1],
        )
        output[first:last] = result[0].transpose(0, 1)
    return output


def reference_deterministic(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """`reference` a query at a time over just the keys it sees, in the order of their positions."""
    output = torch.empty_like(query)
    starts = batch.query_starts.tolist()
    for index, context in enumerate(batch.context_lens.tolist()):
        own = batch.visible(starts[index], starts[index + 1])
        for row in range(starts[index], starts[index + 1]):
            seen = own[row - starts[index]].nonzero()[:, 0]
            place = torch.cat([torch.arange(context, device=query.device), context + seen])
            if batch.hides_first and context + batch.num_before + row > starts[index]:
                place = place[place > 0]
            locations = batch.page_table[index][place // page_size].long() * page_size + place % page_size
            output[row] = F.scaled_dot_product_attention(
                query[row][None, :, None],
                key_cache[locations].transpose(0, 1)[None],
                value_cache[locations].transpose(0, 1)[None],
                scale=scale,
                enable_gqa=query.shape[1] != key_cache.shape[1],
            )[0, :, 0]
    return output
