"""The kernel of `ops.confidence`, one program a guess."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.confidence import LEAST_REST, ConfidenceHead
from paceline.ops.join_drafts import Guesses
from paceline.ops.triton import launch_options


def confidence(guesses: Guesses, roots: Tensor, states: Tensor, head: ConfidenceHead) -> Tensor:
    """See paceline.ops.confidence."""
    requests, depth, count = guesses.tokens.shape
    tokens, own = guesses.tokens.contiguous(), guesses.logprobs.contiguous()
    logprobs = torch.empty_like(own)
    hidden, rank = states.shape[1], 0 if head.embedding is None else head.embedding.shape[1]
    _confidence[(requests, depth)](
        tokens, own, logprobs, roots, states.contiguous(), head.weight, head.bias, head.embedding,
        COUNT=count, LANES=triton.next_power_of_2(count), HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden),
        RANK=rank, RANKS=triton.next_power_of_2(max(1, rank)), MOST=1 - LEAST_REST, num_warps=4,
        **launch_options(states.device),
    )  # fmt: skip
    return logprobs


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _confidence(
    tokens, own, logprobs, roots, states, weight, bias, embedding,
    COUNT: tl.constexpr, LANES: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, MOST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    request, step = tl.program_id(0), tl.program_id(1)
    column, rank, lane = tl.arange(0, BLOCK), tl.arange(0, RANKS), tl.arange(0, LANES)
    factors = tl.load(weight + column, column < HIDDEN, other=0.0).to(tl.float32)
    of_token = tl.load(weight + HIDDEN + rank, rank < RANK, other=0.0).to(tl.float32)
    logit = tl.load(bias).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = (step * tl.num_programs(0) + request).to(tl.int64)
    state = tl.load(states + row * HIDDEN + column, column < HIDDEN, other=0.0)
    logit += tl.sum(state.to(tl.float32) * factors, axis=0)
    place = (request * tl.num_programs(1) + step) * COUNT
    if RANK > 0:
        before = tl.load(roots + request) if step == 0 else tl.load(tokens + place - COUNT)
        embedded = tl.load(embedding + before * RANK + rank, rank < RANK, other=0.0)
        logit += tl.sum(embedded.to(tl.float32) * of_token, axis=0)
    rest = 1.0 - tl.minimum(tl.exp(tl.load(own + place)), MOST)
    others = tl.load(own + place + lane, lane < COUNT, other=0.0) - tl.log(rest) + _log_sigmoid(-logit)
    tl.store(logprobs + place + lane, tl.where(lane == 0, _log_sigmoid(logit), others), lane < COUNT)
