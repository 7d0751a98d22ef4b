"""The comparison of a drafter's and its target's distributions (train/losses.py), forward and backward, a launch each.

In torch it takes about thirty passes over float32 tensors of [rows, draft vocabulary], and more time than the products.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


class Compare(torch.autograd.Function):
    """logits [N, Vd], target [N, Vd], normaliser [N], choice [N] -> kl, refused, cross_entropy and matches, [N] float32 each.

    They are those of `train.losses.compare`. Gradients flow to `logits`.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, normaliser: Tensor, choice: Tensor) -> Any:
        logits, target = logits.contiguous(), target.contiguous()
        rows, columns = logits.shape
        results = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
        saved = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
        block = min(_BLOCK, triton.next_power_of_2(columns))
        _forward[(rows,)](
            logits, target, normaliser, choice, results, saved, rows, COLUMNS=columns, BLOCK=block, num_warps=8
        )
        ctx.save_for_backward(logits, target, normaliser, choice, saved)
        outputs = results.unbind(0)  # before marking: what is marked must be an output itself
        ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        logits, target, normaliser, choice, saved = ctx.saved_tensors
        rows, columns = logits.shape
        zeros = torch.zeros(rows, dtype=torch.float32, device=logits.device)
        kl, refused, hard = (zeros if grad is None else grad.contiguous() for grad in grads[:3])
        out = torch.empty_like(logits)
        block = min(_BLOCK, triton.next_power_of_2(columns))
        _backward[(rows,)](
            logits, target, normaliser, choice, saved, kl, refused, hard, out, rows,
            COLUMNS=columns, BLOCK=block, num_warps=8,
        )  # fmt: skip
        return out, None, None, None


@triton.jit(do_not_specialize=["rows"])
def _forward(logits, target, normaliser, choice, results, saved, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_row, t_row = logits + row * COLUMNS, target + row * COLUMNS
    shift = tl.load(normaliser + row)
    wanted = tl.load(choice + row)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + lane
        x = tl.load(x_row + column, column < COLUMNS, other=-float("inf")).to(tl.float32)
        better = x > top
        bigger = tl.maximum(top, x)
        total = tl.where(bigger > -float("inf"), total * tl.exp(top - bigger) + tl.exp(x - bigger), 0.0)
        place = tl.where(better, column, place)
        top = bigger
    largest = tl.max(top, axis=0)
    sums = tl.sum(tl.where(top > -float("inf"), total * tl.exp(top - largest), 0.0), axis=0)
    lse = largest + tl.log(sums)
    first = tl.min(tl.where(top == largest, place, COLUMNS), axis=0)
    mass = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    overlap = tl.zeros([BLOCK], tl.float32)
    under = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + lane
        inside = column < COLUMNS
        log_q = tl.load(x_row + column, inside, other=0.0).to(tl.float32) - lse
        p = tl.where(inside, tl.exp(tl.load(t_row + column, inside, other=0.0).to(tl.float32) - shift), 0.0)
        q = tl.where(inside, tl.exp(log_q), 0.0)
        mass += p
        cross += p * log_q
        overlap += tl.minimum(p, q)
        under += tl.where(q < p, q, 0.0)
    mass_, cross_ = tl.maximum(tl.sum(mass, axis=0), 1e-9), tl.sum(cross, axis=0)
    possible = wanted >= 0
    of_choice = tl.load(x_row + tl.maximum(wanted, 0)).to(tl.float32) - lse
    tl.store(results + row, tl.where(possible, -cross_ / mass_, 0.0))
    tl.store(results + rows + row, 1.0 - tl.sum(overlap, axis=0))
    tl.store(results + 2 * rows + row, tl.where(possible, -of_choice, 0.0))
    tl.store(results + 3 * rows + row, (first == wanted).to(tl.float32))
    tl.store(saved + row, lse)
    tl.store(saved + rows + row, mass_)
    tl.store(saved + 2 * rows + row, tl.sum(under, axis=0))


@triton.jit(do_not_specialize=["rows"])
def _backward(
    logits, target, normaliser, choice, saved, kl, refused, hard, out, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x_row, t_row, out_row = logits + row * COLUMNS, target + row * COLUMNS, out + row * COLUMNS
    shift = tl.load(normaliser + row)
    wanted = tl.load(choice + row)
    lse = tl.load(saved + row)
    mass = tl.load(saved + rows + row)
    under = tl.load(saved + 2 * rows + row)
    of_kl = tl.where(wanted >= 0, tl.load(kl + row), 0.0)
    of_hard = tl.where(wanted >= 0, tl.load(hard + row), 0.0)
    of_refused = tl.load(refused + row)
    lane = tl.arange(0, BLOCK)
    for start in range(0, COLUMNS, BLOCK):
        column = start + lane
        inside = column < COLUMNS
        q = tl.exp(tl.load(x_row + column, inside, other=-float("inf")).to(tl.float32) - lse)
        p = tl.exp(tl.load(t_row + column, inside, other=-float("inf")).to(tl.float32) - shift)
        grad = of_kl * (q - p / mass) + of_hard * (q - tl.where(column == wanted, 1.0, 0.0))
        grad += of_refused * (q * under - tl.where(q < p, q, 0.0))
        tl.store(out_row + column, grad.to(out.dtype.element_ty), inside)
