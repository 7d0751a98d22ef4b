"""The kernels of `ops.draft_states`, a launch each."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import Draft
from paceline.ops.draft_states import InputWeights
from paceline.ops.triton import launch_options
from paceline.ops.triton.norm import normalise

_MANY = 256  # tokens from which `keep_layers` gives a program up to 16 heads, as ops/triton/rope.py does


def last_states(batch: AttentionBatch, plane: Tensor, page_size: int) -> Tensor:
    """The kernel of `ops.draft_states.last_states`."""
    hidden = plane.shape[1]
    out = plane.new_empty(batch.num_requests, hidden)
    _last_states[(batch.num_requests,)](
        plane, batch.page_table, batch.context_lens, out, batch.page_table.stride(0),
        PAGE=page_size, HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=4, **launch_options(plane.device),
    )  # fmt: skip
    return out


def draft_input(tokens: Tensor, states: Tensor, weights: InputWeights) -> Tensor:
    """The kernel of `ops.draft_states.draft_input`."""
    rows, hidden = states.shape
    out = states.new_empty(rows, 2 * hidden)
    _draft_input[(rows, 2)](
        tokens, states.contiguous(), weights.embedding, weights.token_norm, weights.state_norm, out, weights.eps,
        HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=4, **launch_options(states.device),
    )  # fmt: skip
    return out


def keep_states(
    batch: AttentionBatch,
    plane: Tensor,
    page_size: int,
    tokens: Tensor,
    states: Tensor,
    draft: Draft | None,
    weights: InputWeights,
) -> Tensor:
    """The kernel of `ops.draft_states.keep_states`."""
    rows, hidden = states.shape
    out = states.new_empty(rows, 2 * hidden)
    tree = None if draft is None else draft.branch_starts if draft.parents is None else draft.parents
    _keep_states[(batch.num_requests, batch.max_query, 2)](
        plane, batch.page_table, batch.context_lens, batch.query_starts, batch.locations, tokens, states.contiguous(), tree,
        weights.embedding, weights.token_norm, weights.state_norm, out, weights.eps, rows, batch.page_table.stride(0),
        TREE=tree is not None, CHAINS=draft is not None and draft.parents is None,
        PAGE=page_size, HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=4, **launch_options(plane.device),
    )  # fmt: skip
    return out


def keep_layers(
    states: Tensor,
    table: Tensor,
    positions: Tensor,
    locations: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norms: tuple[Tensor, float] | None = None,
) -> None:
    """The kernel of `ops.draft_states.keep_layers`."""
    tokens, (_, kv_heads, dim) = len(states), keys[0].shape
    weights, eps = norms if norms is not None else (states, 0.0)
    heads = min(16 if tokens >= _MANY else 4, triton.next_power_of_2(2 * kv_heads))
    _keep_layers[(tokens, triton.cdiv(2 * kv_heads, heads), len(keys))](
        states.contiguous(), table, positions, locations, keys[0], values[0], weights, eps, _distance(keys), _distance(values),
        KV_HEADS=kv_heads, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2), HEAD_BLOCK=heads, NORM=norms is not None,
        num_warps=4 if heads > 4 else 2, **launch_options(states.device),
    )  # fmt: skip


def _distance(planes: Sequence[Tensor]) -> int:
    """From one layer's plane to the next one's, in values."""
    places = [int(plane.storage_offset()) for plane in planes]
    distance = places[1] - places[0] if len(places) > 1 else 0
    assert all(place == places[0] + distance * index for index, place in enumerate(places))
    return distance


@triton.jit
def _committed(plane, page_table, context_lens, request, width, column, PAGE: tl.constexpr, HIDDEN: tl.constexpr):
    """The state of a request's last committed token, zeros where it has none."""
    context = tl.load(context_lens + request)
    place = tl.maximum(context - 1, 0)
    page = tl.load(page_table + request * width + place // PAGE).to(tl.int64)
    location = page * PAGE + place % PAGE
    return tl.load(plane + location * HIDDEN + column, (column < HIDDEN) & (context > 0), other=0.0)


@triton.jit
def _last_states(
    plane, page_table, context_lens, out, width,
    PAGE: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    request = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    state = _committed(plane, page_table, context_lens, request, width, column, PAGE, HIDDEN)
    tl.store(out + request * HIDDEN + column, state, column < HIDDEN)


@triton.jit
def _begin_half(half, token_norm, state_norm, column, HIDDEN: tl.constexpr, OVERLAP: tl.constexpr):
    """The norm of one half of the input, the token's (0) or the state's."""
    if half == 0:
        factors = tl.load(token_norm + column, column < HIDDEN, other=0.0)
    else:
        factors = tl.load(state_norm + column, column < HIDDEN, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    return factors


@triton.jit
def _write_half(half, value, factors, out, row, column, eps, HIDDEN: tl.constexpr):
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / HIDDEN + eps)
    place = out + (row * 2 + half) * HIDDEN + column
    tl.store(place, normalise(wide, scale, factors).to(out.dtype.element_ty), column < HIDDEN)


@triton.jit
def _draft_input(
    tokens, states, embedding, token_norm, state_norm, out, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One half of one row's input."""
    half, column = tl.program_id(1), tl.arange(0, BLOCK)
    factors = _begin_half(half, token_norm, state_norm, column, HIDDEN, OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    if half == 0:
        value = tl.load(embedding + tl.load(tokens + row) * HIDDEN + column, column < HIDDEN, other=0.0)
    else:
        value = tl.load(states + row * HIDDEN + column, column < HIDDEN, other=0.0)
    _write_half(half, value, factors, out, row, column, eps, HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def _keep_states(
    plane, page_table, context_lens, query_starts, locations, tokens, states, tree,
    embedding, token_norm, state_norm, out, eps, rows, width,
    TREE: tl.constexpr, CHAINS: tl.constexpr, PAGE: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One half of the input of one query of one request; the token's half keeps its state.

    No program reads a location that another writes: those are of the step's own tokens.
    """
    half, column = tl.program_id(2), tl.arange(0, BLOCK)
    inside = column < HIDDEN
    factors = _begin_half(half, token_norm, state_norm, column, HIDDEN, OVERLAP)
    request = tl.program_id(0).to(tl.int64)
    first = tl.load(query_starts + request)
    last = tl.load(query_starts + request + 1)
    row = (first + tl.program_id(1)).to(tl.int64)
    if (row < last) | ((request == tl.num_programs(0) - 1) & (row < rows)):
        if half == 0:
            value = tl.load(embedding + tl.load(tokens + row) * HIDDEN + column, inside, other=0.0)
            if row < last:
                location = tl.load(locations + row)
                tl.store(plane + location * HIDDEN + column, tl.load(states + row * HIDDEN + column, inside), inside)
        elif (row == first) & (row < last):
            value = _committed(plane, page_table, context_lens, request, width, column, PAGE, HIDDEN)
        else:
            source = row - 1
            if TREE:
                node = tl.load(tree + row, row < last, other=0)  # the branch's first query, or the parent
                source = tl.where(node == row - first, first, row - 1).to(tl.int64) if CHAINS else first + node
            value = tl.load(states + source * HIDDEN + column, inside & (row < last), other=0.0)
        _write_half(half, value, factors, out, row, column, eps, HIDDEN)


@triton.jit
def _keep_layers(
    states, table, positions, locations, keys, values, norms, eps, key_distance, value_distance,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """HEAD_BLOCK heads of one layer of one token: keys first, then values."""
    token, layer = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = (tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (column < HALF) & (head < 2 * KV_HEADS)
    is_key = inside & (head < KV_HEADS)
    is_value = inside & (head >= KV_HEADS)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    source = states + ((token * tl.num_programs(2) + layer) * 2 * KV_HEADS + head) * 2 * HALF + column
    first = tl.load(source, inside, other=0.0)
    second = tl.load(source + HALF, inside, other=0.0)
    angles = table + tl.load(positions + token) * 2 * HALF + column
    cosines = tl.load(angles, column < HALF, other=0.0)
    sines = tl.load(angles + HALF, column < HALF, other=0.0)
    location = tl.load(locations + token)

    x = first.to(tl.float32)
    y = second.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x + y * y, axis=1)[:, None] / (2 * HALF) + eps)
        factors = norms + layer * 2 * HALF + column
        x = normalise(x, scale, tl.load(factors, column < HALF, other=0.0))
        y = normalise(y, scale, tl.load(factors + HALF, column < HALF, other=0.0))
    to_key = keys + layer * key_distance + (location * KV_HEADS + head) * 2 * HALF + column
    tl.store(to_key, (x * cosines - y * sines).to(first.dtype), is_key)
    tl.store(to_key + HALF, (y * cosines + x * sines).to(first.dtype), is_key)
    to_value = values + layer * value_distance + (location * KV_HEADS + head - KV_HEADS) * 2 * HALF + column
    tl.store(to_value, first, is_value)
    tl.store(to_value + HALF, second, is_value)
