"""The kernels of `ops.draft_states`, a launch each."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import Draft
from paceline.ops.triton import launch_options
from paceline.ops.triton.norm import normalise


def last_states(batch: AttentionBatch, plane: Tensor, page_size: int) -> Tensor:
    """The kernel of `ops.draft_states.last_states`."""
    hidden = plane.shape[1]
    out = plane.new_empty(batch.num_requests, hidden)
    _last_states[(batch.num_requests,)](
        plane, batch.page_table, batch.context_lens, out, batch.page_table.stride(0),
        PAGE=page_size, HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=4, **launch_options(plane.device),
    )  # fmt: skip
    return out


def keep_states(batch: AttentionBatch, plane: Tensor, page_size: int, states: Tensor, draft: Draft | None) -> Tensor:
    """The kernel of `ops.draft_states.keep_states`."""
    rows, hidden = states.shape
    states = states.contiguous()
    before = torch.empty_like(states)
    tree = None if draft is None else draft.branch_starts if draft.parents is None else draft.parents
    _keep_states[(batch.num_requests, batch.max_query)](
        plane, batch.page_table, batch.context_lens, batch.query_starts, batch.locations, states, tree, before,
        rows, batch.page_table.stride(0), TREE=tree is not None, CHAINS=draft is not None and draft.parents is None,
        PAGE=page_size, HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=4, **launch_options(plane.device),
    )  # fmt: skip
    return before


def draft_input(
    tokens: Tensor, embedding: Tensor, states: Tensor, token_norm: Tensor, state_norm: Tensor, eps: float
) -> Tensor:
    """The kernel of `ops.draft_states.draft_input`."""
    rows, hidden = states.shape
    out = states.new_empty(rows, 2 * hidden)
    _draft_input[(rows, 2)](
        tokens, embedding, states.contiguous(), token_norm, state_norm, out, eps,
        HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=4, **launch_options(states.device),
    )  # fmt: skip
    return out


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


@triton.jit(do_not_specialize=["rows"])
def _keep_states(
    plane, page_table, context_lens, query_starts, locations, states, tree, before, rows, width,
    TREE: tl.constexpr, CHAINS: tl.constexpr, PAGE: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query of one request. No program reads a location that another writes: those are of the step's own tokens."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    request = tl.program_id(0).to(tl.int64)
    first = tl.load(query_starts + request)
    last = tl.load(query_starts + request + 1)
    row = (first + tl.program_id(1)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    if row < last:
        if row == first:
            value = _committed(plane, page_table, context_lens, request, width, column, PAGE, HIDDEN)
        else:
            source = row - 1
            if TREE:
                node = tl.load(tree + row)  # a branch's first query, or the parent, within the request
                source = tl.where(node == row - first, first, row - 1).to(tl.int64) if CHAINS else first + node
            value = tl.load(states + source * HIDDEN + column, inside, other=0.0)
        tl.store(before + row * HIDDEN + column, value, inside)
        location = tl.load(locations + row)
        tl.store(plane + location * HIDDEN + column, tl.load(states + row * HIDDEN + column, inside), inside)
    elif (request == tl.num_programs(0) - 1) & (row < rows):
        tl.store(before + row * HIDDEN + column, tl.zeros([BLOCK], before.dtype.element_ty), inside)


@triton.jit
def _draft_input(
    tokens, embedding, states, token_norm, state_norm, out, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row's token (program 0 of the second axis) or state."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    of_token = tl.program_id(1) == 0
    if of_token:  # noqa: SIM108 - Triton chooses no pointer by a value
        factors = tl.load(token_norm + column, inside, other=0.0)
    else:
        factors = tl.load(state_norm + column, inside, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    if of_token:
        value = tl.load(embedding + tl.load(tokens + row) * HIDDEN + column, inside, other=0.0)
    else:
        value = tl.load(states + row * HIDDEN + column, inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / HIDDEN + eps)
    place = out + row * 2 * HIDDEN + tl.program_id(1) * HIDDEN + column
    tl.store(place, normalise(wide, scale, factors).to(out.dtype.element_ty), inside)
