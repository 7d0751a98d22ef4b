"""The forms of a weight matrix that the ops of `ops.linear` multiply by: dense, packed for a CPU kernel, as stored, or float8.

A gated weight (rows of gate, then as many of up) is packed differently and is for the gated ops alone. Every form has
`panels`, the packing of the native CPU kernels or None, so that these need one look at it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.ops import native
from paceline.ops.quantised import FORMATS, decode

# Rows of x that oneDNN lays the packed weight out for. Good from 1 to 1,024 rows: `python -m benchmarks.tools.cpu`, its torch
# columns, on two cores of an AMD EPYC with AVX512-BF16.
_PACK_ROWS = 16

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


class Dense:
    """A plain [rows, columns] matrix and an optional bias [rows], on any device."""

    panels: native.Panels | None = None

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        self.rows, self.columns = matrix.shape
        self.matrix = matrix
        self.bias = bias


class Packed:
    """A bfloat16 matrix in the order of a CPU kernel: `panels` for the native kernels, else `reordered` for oneDNN."""

    def __init__(
        self, shape: tuple[int, int], bias: Tensor | None, panels: native.Panels | None, reordered: Tensor | None
    ) -> None:
        self.rows, self.columns = shape
        self.bias = bias
        self.panels = panels
        self.reordered = reordered


class Quantised:
    """A matrix as its checkpoint stores it, decoded whenever it is used.

    kind    a key of FORMATS: blocks of values with their scales between them (formats with scales apart join here)
    data    [rows, bytes of a row] uint8
    scales  those of a format that keeps them apart from `data`, else None
    """

    panels: native.Panels | None = None

    def __init__(self, kind: str, data: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> None:
        form = FORMATS[kind]
        assert scales is None, f"{kind} keeps its scales between its values"
        self.rows, self.columns = data.shape[0], data.shape[1] // form.block_bytes * form.per_block
        self.kind = kind
        self.data = data
        self.scales = scales
        self.bias = bias

    def decoded(self, dtype: torch.dtype) -> Dense:
        """The dense weight of the same values, rounded to `dtype`."""
        return Dense(decode(self.data, self.kind).to(dtype), self.bias)


class Float8:
    """A matrix in E4M3 with a scale a row: matrix [rows, columns] float8_e4m3fn times scale [rows] float32.

    A gated weight's rows of gate and of up have scales of their own.
    """

    panels: native.Panels | None = None

    def __init__(self, matrix: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        assert matrix.dtype == FLOAT8 and scale.dtype == torch.float32
        self.rows, self.columns = matrix.shape
        self.matrix = matrix
        self.scale = scale
        self.bias = bias

    def decoded(self, dtype: torch.dtype) -> Dense:
        """The dense weight of the same values, rounded to `dtype`."""
        matrix = torch.empty_like(self.matrix, dtype=dtype)
        torch.mul(self.matrix.to(dtype), self.scale[:, None], out=matrix)  # E4M3 is exact in 16 bits
        return Dense(matrix, self.bias)


Weight = Dense | Packed | Quantised | Float8


class ExpertWeights:
    """One weight per expert, all of one shape: `weights[e]`.

    `matrix` is the [experts, rows, columns] tensor that all are views of where they are dense, for ops that multiply by all
    experts at once; else None.
    """

    def __init__(self, weights: Sequence[Weight], matrix: Tensor | None = None) -> None:
        self.weights = weights
        self.matrix = matrix


def prepare(matrix: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Dense | Packed:
    """The form that this device's kernels multiply by: packed for bfloat16 on CPU, where a packing exists, else dense.

    An unpacked bfloat16 product on CPU packs the weight again in every call: 2 to 8 times slower at few rows.
    """
    if matrix.device.type != "cpu" or matrix.dtype != torch.bfloat16:
        return Dense(matrix, bias)
    rows, columns = matrix.shape
    panels = native.pack(matrix, bias, gated)
    if panels is not None:
        return Packed((rows, columns), bias, panels, None)
    if packs():
        reordered = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), _PACK_ROWS)
        return Packed((rows, columns), bias, None, reordered)
    return Dense(matrix, bias)


def prepare_experts(matrix: Tensor, *, gated: bool = False) -> ExpertWeights:
    """`prepare` for each expert of [experts, rows, columns]."""
    weights = [prepare(each, gated=gated) for each in matrix]
    return ExpertWeights(weights, matrix if isinstance(weights[0], Dense) else None)


def row_scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """matrix [N, K] as contiguous values [N, K] float8_e4m3fn and their scales [N] float32: a row's largest becomes E4M3's.

    Rounding the product to bfloat16 and coming here again gives the same values: bfloat16 has five bits more.
    """
    largest = torch.linalg.vector_norm(matrix, torch.inf, dim=1, dtype=torch.float32)
    scale = (largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (matrix / scale[:, None]).to(FLOAT8).contiguous(), scale


def takes_float8(matrix: Tensor) -> bool:
    """Whether this device's kernels multiply a Float8 of `matrix` by activations of its dtype without decoding it."""
    if matrix.device.type != "cuda" or matrix.dtype.itemsize > 2:
        return False
    return torch.cuda.get_device_capability(matrix.device) >= (8, 9)


def packs() -> bool:
    """Whether oneDNN packs bfloat16 weights here; it refuses on processors that it has no bfloat16 kernels for."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
