"""Attention of long steps (prefill) by torch's fused kernels, on keys and values that lie in a row."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.attention import AttentionBatch, HostLengths, KeyPlaces
from paceline.ops.triton import launch_options

_MOST_KEYS = (
    1 << 17
)  # of a step whose requests share a launch. Their keys are copied, a shared prefix once a request: bounds memory
_REST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# A layer of 8,192 tokens: cuDNN 0.42 ms, flash 0.79; of 2,048 after 6,144: cuDNN 0.70 (it takes the mask as a tensor),
# flash 0.50.
_FRESH = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_REST]
_CONTINUED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *_REST]


def prefill(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """Causal attention of a long step without branches, in 16 bits. The contract of `ops.attention.paged_attention`."""
    host = _host(batch)
    num_keys = sum(host.context_lens) + len(query)
    # flash attention takes no other sizes of a head
    if batch.num_requests > 1 and query.shape[2] % 8 == 0 and num_keys <= max(_MOST_KEYS, len(query)):
        return _together(query, key_cache, value_cache, batch, page_size, scale)
    out = torch.empty_like(query)
    for index, context in enumerate(host.context_lens):
        first, last = host.query_starts[index], host.query_starts[index + 1]
        queries = last - first
        if queries == 0:
            continue
        length = context + queries
        run = host.runs[index]
        if run is not None:
            locations = slice(run * page_size, run * page_size + length)
            keys, values = key_cache[locations], value_cache[locations]
        elif context == 0:
            keys, values = _gathered(key_cache, value_cache, batch.locations[first:last])
        else:
            pages = batch.page_table[index, : (length + page_size - 1) // page_size]
            keys = key_cache.view(-1, page_size, *key_cache.shape[1:])[pages].flatten(0, 1)[:length]
            values = value_cache.view(-1, page_size, *value_cache.shape[1:])[pages].flatten(0, 1)[:length]
        mask = causal_lower_right(queries, context + queries) if context else None
        with sdpa_kernel(_CONTINUED if context else _FRESH, set_priority=True):
            result = F.scaled_dot_product_attention(
                query[first:last].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key_cache.shape[1],
            )
        if batch.num_requests == 1:
            return result[0].transpose(0, 1).contiguous()
        out[first:last] = result[0].transpose(0, 1)
    return out


def _together(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """Several requests in one launch: one by one the host takes longer than the device.

    Alone, cuDNN would plan anew for every length that is new; and a prompt after a cached system prompt is short.
    """
    host = _host(batch)
    if host.keys is None:
        host.keys = _key_places(batch, host, page_size)
    locations, key_starts, most_keys = host.keys
    keys, values = _gathered(key_cache, value_cache, locations)
    result: Tensor = torch.ops.aten._flash_attention_forward(
        query.contiguous(), keys, values, batch.query_starts, key_starts, batch.max_query, most_keys, 0.0, True, False,
        scale=scale,
    )[0]  # fmt: skip
    return result


def _key_places(batch: AttentionBatch, host: HostLengths, page_size: int) -> KeyPlaces:
    """Of all keys that the step's requests see, their own included; the same in all layers."""
    if not any(host.context_lens):
        return KeyPlaces(batch.locations, batch.query_starts, batch.max_query)
    counts = zip(host.context_lens, itertools.pairwise(host.query_starts), strict=True)
    lengths = [context + last - first for context, (first, last) in counts]
    device = batch.page_table.device
    key_starts = torch.zeros_like(batch.query_starts)
    torch.cumsum(batch.context_lens + batch.query_starts.diff(), 0, dtype=torch.int32, out=key_starts[1:])
    total = sum(lengths)
    owner = torch.repeat_interleave(key_starts.diff(), output_size=total)
    place = torch.arange(total, dtype=torch.int32, device=device) - key_starts[owner]
    pages = batch.page_table[owner, (place // page_size).long()]
    return KeyPlaces((pages * page_size + place % page_size).long(), key_starts, max(lengths))


def _gathered(key_cache: Tensor, value_cache: Tensor, locations: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of `locations` [T], each [T, kv_heads, dim] and contiguous."""
    count, row = len(locations), key_cache[0].numel()
    keys, values = (cache.new_empty(count, *cache.shape[1:]) for cache in (key_cache, value_cache))
    block = triton.next_power_of_2(row)
    each = max(1, 4096 // block)
    _gather[(triton.cdiv(count, each), 2)](
        key_cache,
        value_cache,
        locations,
        keys,
        values,
        count,
        ROW=row,
        BLOCK=block,
        EACH=each,
        **launch_options(locations.device),
    )
    return keys, values


def _host(batch: AttentionBatch) -> HostLengths:
    """The batch's lengths on the host: as it brings them, else read from the device once a step."""
    if batch.host is None:
        batch.host = HostLengths(batch.query_starts.tolist(), batch.context_lens.tolist(), [None] * batch.num_requests)
    return batch.host


@triton.jit(do_not_specialize=["count"])
def _gather(
    key_cache, value_cache, locations, keys, values, count,
    ROW: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """EACH locations' keys, or values."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    place = (tl.program_id(0) * EACH + tl.arange(0, EACH))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (place < count) & (column < ROW)
    location = tl.load(locations + place, place < count, other=0)
    if tl.program_id(1) == 0:
        tl.store(keys + place * ROW + column, tl.load(key_cache + location * ROW + column, inside), inside)
    else:
        tl.store(values + place * ROW + column, tl.load(value_cache + location * ROW + column, inside), inside)
