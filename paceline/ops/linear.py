"""Matrix products of a decoder layer, fused with the small work next to them: five ops compute a dense layer.

Where an all-reduce has to come between a product and the residual, `linear_add` is done in its two parts, `linear` and
`add_norm`. Every op takes any form of weight (`ops.weight`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.ops.dispatch import implementation
from paceline.ops.weight import Float8, Packed, Quantised, Weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis, computed in float32 as transformers does. [..., H] -> [..., H]"""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of x [T, K] as an op: for blocks that need the normalised rows themselves."""
    return implementation("norm", x)(x, weight, eps)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [T, K] -> [T, N]: x @ weight.T + bias."""
    return implementation("linear", x)(x, weight)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    """linear(rms_norm(x)): x [T, K] -> [T, N]. `normed` is rms_norm(x) where the op before gave it."""
    return implementation("norm_linear", x)(x, norm, eps, weight, normed)


def linear_add(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """residual + linear(x): x [T, K], residual [T, N] -> [T, N]. `residual` may be overwritten and returned.

    `norm` and `eps` are those that the sum will be normalised by next: an implementation that has whole rows at hand
    returns the normalised sum as well, others None.
    """
    return implementation("linear_add", x)(x, weight, residual, norm, eps)


def add_norm(x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """residual + x, both [T, N]: what `linear_add` does after its product, with the same result and the same freedoms."""
    return implementation("add_norm", x)(x, residual, norm, eps)


def linear_gated(x: Tensor, weight: Weight) -> Tensor:
    """[gate | up] = linear(x), then silu(gate) * up: x [T, K] -> [T, N / 2]. `norm_gated` without the norm."""
    return implementation("linear_gated", x)(x, weight)


def norm_gated(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    """The first half of a gated MLP: [gate | up] = linear(rms_norm(x)), then silu(gate) * up. x [T, K] -> [T, N / 2].

    The rows of `weight` are gate's first, then up's. `normed` is rms_norm(x) where the op before gave it.
    """
    return implementation("norm_gated", x)(x, norm, eps, weight, normed)


def linear_reference(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Packed):
        assert weight.reordered is not None
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.reordered, weight.bias, "none", [], "")
        return result
    if isinstance(weight, Quantised | Float8):
        weight = weight.decoded(x.dtype)
    return F.linear(x, weight.matrix, weight.bias)


def norm_linear_reference(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    return linear(rms_norm(x, norm, eps) if normed is None else normed, weight)


def linear_add_reference(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, None]:
    return residual + linear(x, weight), None


def add_norm_reference(x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, None]:
    return residual + x, None


def linear_gated_reference(x: Tensor, weight: Weight) -> Tensor:
    gate, up = linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def norm_gated_reference(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    gate, up = norm_linear_reference(x, norm, eps, weight, normed).chunk(2, dim=-1)
    return F.silu(gate) * up


_ROWS = 32  # rows of every product where bits must not depend on how many there are


def linear_deterministic(x: Tensor, weight: Weight) -> Tensor:
    """`linear` in blocks of exactly _ROWS rows (padded with zeros), so that one row's bits are the same in any call."""
    count = len(x)
    if isinstance(weight, Quantised | Float8):
        weight = weight.decoded(x.dtype)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -count % _ROWS))
    return torch.cat([linear_reference(block, weight) for block in padded.split(_ROWS)])[:count]
