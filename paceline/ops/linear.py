"""Matrix products of a decoder layer, with the small work next to them fused in: five ops carry a layer.

Weights are `Weight`: the matrix as the device wants it. On CPU in bf16 it is packed once, for the native kernels where
they serve, else for oneDNN (an unpacked bf16 product re-packs the weight on every call, 2 to 8 times slower at few rows);
elsewhere it is the plain tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.ops import native
from paceline.ops.dispatch import implementation

_PACK_ROWS = 16  # the row count oneDNN lays the packed weight out for; measured good from 1 to 1,024 rows


class Weight:
    """A [rows, columns] matrix (and bias) ready for `linear`. `plain` is None when only a packed form is kept.

    A `gated` weight, rows of gate then rows of up, is for `norm_gated` only.
    """

    def __init__(
        self, matrix: Tensor, bias: Tensor | None = None, *, gated: bool = False, keep_plain: bool = False
    ) -> None:
        self.rows, self.columns = matrix.shape
        self.bias = bias
        self.packed: Tensor | None = None
        self.plain: Tensor | None = matrix
        self.native = native.pack(matrix, bias, gated)
        if self.native is None and matrix.device.type == "cpu" and matrix.dtype == torch.bfloat16 and packs():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), _PACK_ROWS)
        if (self.native is not None or self.packed is not None) and not keep_plain:
            self.plain = None

    @property
    def matrix(self) -> Tensor:
        """The plain matrix, for the kernels and devices that use it."""
        assert self.plain is not None
        return self.plain


def packs() -> bool:
    """Whether oneDNN packs bfloat16 weights here; it refuses on processors that it has no bfloat16 kernels for."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis, computed in float32 as transformers does. [..., H] -> [..., H]"""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [T, K] -> [T, N]: x @ weight.T + bias."""
    return implementation("linear", x)(x, weight)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    """linear(rms_norm(x)): x [T, K] -> [T, N]. `normed` is rms_norm(x) where the op before gave it."""
    return implementation("norm_linear", x)(x, norm, eps, weight, normed)


def linear_add(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """residual + linear(x): x [T, K], residual [T, N] -> [T, N]. `residual` may be overwritten and returned.

    `norm` and `eps` are what the sum will be normalised by next: an implementation that has whole rows at hand gives that
    as well, others None.
    """
    return implementation("linear_add", x)(x, weight, residual, norm, eps)


def norm_gated(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    """The first half of a gated MLP: [gate | up] = linear(rms_norm(x)), then silu(gate) * up. x [T, K] -> [T, N / 2].

    The rows of `weight` are gate's first, then up's. `normed` is rms_norm(x) where the op before gave it.
    """
    return implementation("norm_gated", x)(x, norm, eps, weight, normed)


def linear_reference(x: Tensor, weight: Weight) -> Tensor:
    if weight.packed is not None:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.packed, weight.bias, "none", [], "")
        return result
    return F.linear(x, weight.matrix, weight.bias)


def norm_linear_reference(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    return linear(rms_norm(x, norm, eps) if normed is None else normed, weight)


def linear_add_reference(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, None]:
    return residual + linear(x, weight), None


def norm_gated_reference(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    gate, up = norm_linear_reference(x, norm, eps, weight, normed).chunk(2, dim=-1)
    return F.silu(gate) * up


_ROWS = 32  # rows of every product where bits must not depend on how many there are


def linear_deterministic(x: Tensor, weight: Weight) -> Tensor:
    """`linear` in blocks of exactly _ROWS rows (padded with zeros), so that one row's bits are the same in any call."""
    count = len(x)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -count % _ROWS))
    return torch.cat([linear_reference(block, weight) for block in padded.split(_ROWS)])[:count]
