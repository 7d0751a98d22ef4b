"""Row-wise work next to the matrix products where it is not fused into them: RMS norm, residual, silu(gate) * up."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.triton import launch_options

# Rows from which a program takes four: one H100, `python -m benchmarks.tools.step`, its 8,192-token prefill
_MANY = 1024


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The kernel of `ops.linear.norm`."""
    return rms_norm(x.contiguous(), weight, eps)


def norm_deterministic(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm`, each row's bits independent of the number of rows."""
    return rms_norm(x.contiguous(), weight, eps, alone=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, alone: bool = False) -> Tensor:
    """`ops.linear.rms_norm` for x [T, K], contiguous: float32 inside, rounded to x's dtype before the weight.

    `alone` gives every row a program of its own, whose bits do not depend on how many there are.
    """
    rows, columns = x.shape
    each = 4 if rows >= _MANY and not alone else 1
    out = torch.empty_like(x)
    block = triton.next_power_of_2(columns)
    warps = 4 if block <= 2048 else 8
    options = launch_options(x.device)
    _rms_norm[(triton.cdiv(rows, each),)](
        x, weight, out, eps, rows, ROWS=each, COLUMNS=columns, BLOCK=block, num_warps=warps, **options
    )
    return out


def add_norm(x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel of `ops.linear.add_norm`: the sum (in place of `residual` where that is contiguous) and its RMS norm."""
    rows, columns = x.shape
    residual = residual.contiguous()
    normed = torch.empty_like(residual)
    block = triton.next_power_of_2(columns)
    _add_norm[(rows,)](
        x.contiguous(), residual, norm, normed, eps, COLUMNS=columns, BLOCK=block, num_warps=4 if block <= 2048 else 8,
        **launch_options(x.device),
    )  # fmt: skip
    return residual, normed


def silu_multiply(gate_up: Tensor, out: Tensor) -> None:
    """out [T, N] = silu(first half) * second half of [T, 2 * N], both contiguous; rounded as the torch reference rounds."""
    rows, columns = out.shape
    block = 1024
    grid = (triton.cdiv(columns, block) * rows,)
    _silu_multiply[grid](gate_up, out, columns, rows, BLOCK=block, num_warps=4, **launch_options(gate_up.device))


@triton.jit
def normalise(wide, scale, weight):
    """x * rstd, rounded to the weight's dtype, times the weight, rounded again; float32 in and out."""
    rounded = (wide * scale).to(weight.dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(weight.dtype).to(tl.float32)


@triton.jit
def gated(gate, up, DTYPE: tl.constexpr):
    """silu(gate) * up for float32 values that hold DTYPE-rounded products."""
    gate = gate.to(DTYPE).to(tl.float32)
    up = up.to(DTYPE).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    return activated * up


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x, weight, out, eps, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    column = tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    factors = tl.load(weight + column, column < COLUMNS, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    place = row.to(tl.int64) * COLUMNS + column
    inside = (column < COLUMNS) & (row < rows)
    wide = tl.load(x + place, inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / COLUMNS + eps)[:, None]
    tl.store(out + place, normalise(wide, scale, factors).to(out.dtype.element_ty), inside)


@triton.jit
def _add_norm(x, residual, norm, normed, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row: residual += x, normed = rms_norm(residual)."""
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    factors = tl.load(norm + column, inside, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    place = tl.program_id(0).to(tl.int64) * COLUMNS + column
    total = tl.load(x + place, inside, other=0.0).to(tl.float32)
    total = (total + tl.load(residual + place, inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / COLUMNS + eps)
    tl.store(residual + place, total, inside)
    tl.store(normed + place, normalise(wide, scale, factors).to(normed.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def _silu_multiply(gate_up, out, columns, rows, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    # last row first: the product's last rows are still in the L2 cache, and the next product begins with the first ones
    blocks = tl.cdiv(columns, BLOCK)
    row = (rows - 1 - tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_up + row * 2 * columns + column, inside, other=0.0)
    up = tl.load(gate_up + row * 2 * columns + columns + column, inside, other=0.0)
    DTYPE: tl.constexpr = out.dtype.element_ty
    product = gated(gate.to(tl.float32), up.to(tl.float32), DTYPE)
    tl.store(out + row * columns + column, product.to(DTYPE), inside)
