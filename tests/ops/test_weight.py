"""Every form of weight is the same matrix to every op."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from paceline.ops import linear
from paceline.ops.dispatch import deterministic
from paceline.ops.quantised import FORMATS, decode
from paceline.ops.weight import FLOAT8, Dense, Float8, Quantised, Weight, prepare, row_scaled

ROWS, COLUMNS = 66, 512


def blocks(kind: str, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Random rows of a format, with scales that give numbers of a sane size."""
    form, draw = FORMATS[kind], numpy.random.default_rng(3)
    if form.per_block == 1:
        values = (draw.standard_normal((rows, columns)) / 20).astype(numpy.float32)
        return torch.from_numpy(gguf.quantize(values, Kind[kind]).view(numpy.uint8).reshape(rows, -1))
    data = draw.integers(0, 256, (rows, columns // form.per_block, form.block_bytes), dtype=numpy.uint8)
    scales = draw.uniform(-0.01, 0.01, (rows, columns // form.per_block, 2)).astype(numpy.float16).view(numpy.uint8)
    if kind == "Q6_K":
        data[..., -2:] = scales[..., :2]
    else:
        count = 4 if kind in ("Q4_K", "Q4_1") else 2
        data[..., :count] = scales[..., :count]
    return torch.from_numpy(data.reshape(rows, -1))


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_those_of_the_library(kind: str) -> None:
    assert gguf.GGML_QUANT_SIZES[Kind[kind]] == (FORMATS[kind].per_block, FORMATS[kind].block_bytes)
    data = blocks(kind)
    expected = torch.from_numpy(gguf.dequantize(data.numpy(), Kind[kind]).astype(numpy.float32)).view(ROWS, COLUMNS)
    assert torch.equal(decode(data, kind).float().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_weight_multiplies_as_the_dense_one_of_its_values(
    kind: str, dtype: torch.dtype, invariant: bool
) -> None:
    torch.manual_seed(0)
    bias = torch.randn(ROWS).to(dtype)
    quantised = Quantised(kind, blocks(kind), bias=bias)
    assert (quantised.rows, quantised.columns, quantised.scales) == (ROWS, COLUMNS, None)
    dense = Dense(decode(quantised.data, kind).to(dtype), bias)
    with deterministic(invariant):
        for op in products(dtype):
            assert torch.equal(op(quantised), op(dense))


def products(dtype: torch.dtype) -> list[Callable[[Weight], Tensor]]:
    """Every op of five random rows with a [ROWS, COLUMNS] weight."""
    x, norm = torch.randn(5, COLUMNS).to(dtype), torch.randn(COLUMNS).to(dtype)
    residual = torch.randn(5, ROWS).to(dtype)
    return [
        lambda weight: linear.linear(x, weight),
        lambda weight: linear.norm_linear(x, norm, 1e-6, weight),
        lambda weight: linear.norm_gated(x, norm, 1e-6, weight),
        lambda weight: linear.linear_gated(x, weight),
        lambda weight: linear.linear_add(x, weight, residual.clone(), norm, 1e-6)[0],
    ]


def matrix_of_many_sizes() -> Tensor:
    """[ROWS, COLUMNS] with rows of very different sizes, one of them of zeros."""
    torch.manual_seed(4)
    matrix = torch.randn(ROWS, COLUMNS) * torch.logspace(-6, 3, ROWS)[:, None]
    matrix[3] = 0
    return matrix


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float8_weight_multiplies_as_the_dense_one_of_its_values(dtype: torch.dtype, invariant: bool) -> None:
    matrix = matrix_of_many_sizes() / 100
    weight = Float8(*row_scaled(matrix), torch.randn(ROWS).to(dtype))
    assert (weight.rows, weight.columns, weight.matrix.dtype) == (ROWS, COLUMNS, FLOAT8)
    dense = Dense((weight.matrix.float() * weight.scale[:, None]).to(dtype), weight.bias)
    assert torch.equal(weight.decoded(dtype).matrix, dense.matrix)
    with deterministic(invariant):
        for op in products(dtype):
            assert torch.equal(op(weight), op(dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_float8_are_near_and_rounding_again_changes_nothing(dtype: torch.dtype) -> None:
    matrix = matrix_of_many_sizes().to(dtype)
    values, scale = row_scaled(matrix)
    weight = Float8(values, scale)
    assert values.float().abs().amax(1).tolist() == [0 if row == 3 else 448 for row in range(ROWS)]
    error = (weight.decoded(torch.float32).matrix - matrix.float()).abs()
    # half of the last of E4M3's four bits; of the smallest numbers half of their step
    assert bool((error <= matrix.float().abs() / 16 + scale[:, None] / 1000).all())
    for wide in (torch.float32, torch.bfloat16):
        again, _ = row_scaled(weight.decoded(wide).matrix)
        assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_product_with_its_residual_is_its_two_parts(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(1)
    weight = prepare(torch.randn(ROWS, 64).to(dtype))
    x, residual, norm = torch.randn(tokens, 64).to(dtype), torch.randn(tokens, ROWS).to(dtype), torch.ones(ROWS)
    whole, _ = linear.linear_add(x, weight, residual.clone(), norm.to(dtype), 1e-6)
    parts, _ = linear.add_norm(linear.linear(x, weight), residual.clone(), norm.to(dtype), 1e-6)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_product_without_a_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    matrix, x = torch.randn(ROWS, 64).to(dtype) / 8, torch.randn(7, 64).to(dtype)
    gate, up = (x.float() @ matrix.float().T).chunk(2, dim=1)
    found = linear.linear_gated(x, prepare(matrix, gated=True)).float()
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, rtol=2e-2, atol=2e-2)
