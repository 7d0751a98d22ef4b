"""The matrix products of a decoder layer for CUDA, with norm, bias, residual and gate fused where that is faster.

Three ways, chosen by `tuning.choose`: `Rows` (one token, a dot product a row, bound by memory), `Tiles` (few tokens,
tensor cores, the weight as the streamed operand) and cuBLAS, which needs a float8 weight decoded, in every call anew. The
`*_deterministic` functions use one tile for every number of tokens, so that a token's result does not depend on what else is
in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from paceline.ops.triton import launch_options
from paceline.ops.triton.norm import rms_norm, silu_multiply
from paceline.ops.triton.products import join_kernel, rows_kernel, tiles_kernel
from paceline.ops.triton.tuning import DETERMINISTIC, DETERMINISTIC_PROGRAMS, Blas, Choice, Rows, Tiles, choose
from paceline.ops.weight import Dense, Float8, Quantised, Weight

# Tokens of a gated product at a time: faster in cuBLAS, and silu finds its input in the L2 cache. Measured on one H100 by
# `python -m benchmarks.tools.step`, its 8,192-token prefill.
_PART = 4096


@dataclass(frozen=True)
class Product:
    """One call: [residual +] x @ weight.T [+ bias], of rms_norm(x) where `norm` is given, gated where `gate` is set.

    `normed` is rms_norm(x) where it is at hand; `next_norm` asks for the rms_norm of the result where that needs no launch.
    """

    x: Tensor
    weight: Weight
    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    gate: bool = False
    normed: Tensor | None = None
    next_norm: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight's matrix [N, K]. `run` and `run_deterministic` make a weight that is stored otherwise dense first."""
        assert isinstance(self.weight, Dense | Float8)
        return self.weight.matrix

    @property
    def scale(self) -> Tensor | None:
        """The scale [N] of each row of a float8 matrix; None for others."""
        return self.weight.scale if isinstance(self.weight, Float8) else None

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.weight.rows // 2 if self.gate else self.weight.rows


Result = tuple[Tensor, Tensor | None]


def linear(x: Tensor, weight: Weight) -> Tensor:
    """The kernel of `ops.linear.linear`."""
    return run(Product(x, weight))[0]


def linear_gated(x: Tensor, weight: Weight) -> Tensor:
    """The kernel of `ops.linear.linear_gated`."""
    return run(Product(x, weight, gate=True))[0]


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    """The kernel of `ops.linear.norm_linear`."""
    return run(Product(x, weight, norm, eps, normed=normed))[0]


def linear_add(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> Result:
    """The kernel of `ops.linear.linear_add`."""
    return run(Product(x, weight, eps=eps, residual=residual, next_norm=norm))


def norm_gated(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    """The kernel of `ops.linear.norm_gated`."""
    return run(Product(x, weight, norm, eps, gate=True, normed=normed))[0]


def linear_deterministic(x: Tensor, weight: Weight) -> Tensor:
    """`linear`, each row's bits independent of the other rows and of their number."""
    return run_deterministic(Product(x, weight))[0]


def linear_gated_deterministic(x: Tensor, weight: Weight) -> Tensor:
    """`linear_gated`, each row's bits independent of the other rows and of their number."""
    return run_deterministic(Product(x, weight, gate=True))[0]


def norm_linear_deterministic(
    x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None
) -> Tensor:
    """`norm_linear`, each row's bits independent of the other rows and of their number."""
    return run_deterministic(Product(x, weight, norm, eps, normed=normed))[0]


def linear_add_deterministic(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> Result:
    """`linear_add`, each row's bits independent of the other rows and of their number."""
    return run_deterministic(Product(x, weight, eps=eps, residual=residual, next_norm=norm))


def norm_gated_deterministic(
    x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None
) -> Tensor:
    """`norm_gated`, each row's bits independent of the other rows and of their number."""
    return run_deterministic(Product(x, weight, norm, eps, gate=True, normed=normed))[0]


def run(product: Product, choice: Choice | None = None) -> Result:
    """Computes the product by `choice`, by default the measured one for its shape; and the `next_norm` where that is free."""
    product = _ready(product)
    if choice is None:
        choice = _chosen(product)
    match choice:
        case Rows():
            return _run_rows(product, choice), None
        case Tiles():
            return _run_tiles(product, choice)
        case Blas():
            return _run_blas(product), None


def _ready(product: Product) -> Product:
    """The product with x and residual contiguous and the weight dense or float8."""
    x, weight = product.x.contiguous(), product.weight
    residual = None if product.residual is None else product.residual.contiguous()
    if isinstance(weight, Quantised):
        weight = weight.decoded(x.dtype)
    return replace(product, x=x, weight=weight, residual=residual)


def _chosen(product: Product) -> Choice:
    """The table's choice. It was measured in 16 bits; tiles of 32 may not fit the device, so float32 takes cuBLAS."""
    tokens = product.x.shape[0]
    if product.x.element_size() > 2 and tokens > 1:
        return Blas()
    operation, weight = "gated" if product.gate else "linear", product.weight
    return choose(operation, weight.rows, weight.columns, tokens, float8=isinstance(weight, Float8))


def run_deterministic(product: Product) -> Result:
    """Computes the product by the one tile of tuning.DETERMINISTIC, K split by the matrix's shape alone."""
    tiles = triton.cdiv(product.weight.rows, DETERMINISTIC.block_n)
    blocks = triton.cdiv(product.weight.columns, DETERMINISTIC.block_k)
    split = min(blocks, max(1, DETERMINISTIC_PROGRAMS // tiles))
    product = _ready(product)
    if product.norm is not None and product.normed is None:
        product = replace(product, normed=rms_norm(product.x, product.norm, product.eps, alone=True))
    return _run_tiles(product, replace(DETERMINISTIC, split=split))


def _input(product: Product) -> Tensor:
    """The left operand: x, or its norm."""
    if product.normed is not None:
        return product.normed
    return product.x if product.norm is None else rms_norm(product.x, product.norm, product.eps)


def _run_blas(product: Product) -> Tensor:
    if isinstance(product.weight, Float8):
        product = replace(product, weight=product.weight.decoded(product.x.dtype))
    x, weight, residual = _input(product), product.weight, product.residual
    if residual is not None:
        if weight.bias is not None:
            residual = residual + weight.bias
        return residual.addmm_(x, product.matrix.t())
    if not product.gate:
        return F.linear(x, product.matrix, weight.bias)
    out = x.new_empty(len(x), product.columns)
    parts = max(1, len(x) // _PART)
    for part, into in zip(x.chunk(parts), out.chunk(parts), strict=True):
        silu_multiply(F.linear(part, product.matrix, weight.bias), into)
    return out


def _run_rows(product: Product, choice: Rows) -> Tensor:
    x, weight = product.x, product.weight
    out = x.new_empty(len(x), product.columns)
    rows_kernel[(triton.cdiv(product.columns, choice.block_n),)](
        x, product.norm, product.matrix, product.scale, weight.bias, product.residual, out, product.eps, product.columns,
        K=weight.columns, NORM=product.norm is not None, GATED=product.gate, SCALED=product.scale is not None,
        BIAS=weight.bias is not None, RESIDUAL=product.residual is not None, TOKENS=len(x), BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k, STEPS=triton.cdiv(weight.columns, choice.block_k), AHEAD=choice.ahead,
        num_warps=choice.warps, **launch_options(x.device),
    )  # fmt: skip
    return out


def _run_tiles(product: Product, choice: Tiles) -> Result:
    x, weight = _input(product), product.weight
    tokens, split = x.shape[0], choice.split
    out = x.new_empty(tokens, product.columns)
    partial = torch.empty(split, tokens, weight.rows, dtype=torch.float32, device=x.device) if split > 1 else None
    options = launch_options(x.device)
    tiles_n = triton.cdiv(weight.rows, choice.block_n)
    tiles_t = triton.cdiv(tokens, choice.block_t + choice.tail)
    tiles_kernel[(tiles_n * tiles_t, split)](
        x, product.matrix, product.scale, weight.bias, product.residual, out, partial, tokens,
        N=weight.rows, K=weight.columns, GATED=product.gate, SCALED=product.scale is not None,
        BIAS=weight.bias is not None, RESIDUAL=product.residual is not None, SPLIT=split, BLOCK_N=choice.block_n,
        BLOCK_T=choice.block_t, BLOCK_K=choice.block_k, TAIL=choice.tail,
        PART=triton.cdiv(triton.cdiv(weight.columns, choice.block_k), split) * choice.block_k,
        AHEAD=choice.ahead // product.matrix.element_size(), PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=choice.warps, num_stages=choice.stages, **options,
    )  # fmt: skip
    if split == 1:
        return out, None
    normed = None if product.next_norm is None else torch.empty_like(out)
    block = triton.next_power_of_2(product.columns)
    if normed is None:
        block = min(512, block)
    join_kernel[(tokens, triton.cdiv(product.columns, block))](
        partial, weight.bias, product.residual, out, product.next_norm, normed, product.eps, tokens,
        N=weight.rows, GATED=product.gate, BIAS=weight.bias is not None, RESIDUAL=product.residual is not None,
        NORM=normed is not None, SPLIT=split, BLOCK=block, num_warps=4 if normed is None else 16, **options,
    )  # fmt: skip
    return out, normed
