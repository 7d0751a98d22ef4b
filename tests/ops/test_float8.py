"""The Triton kernels with float8 weights against the same products of the weights' values.

On a GPU as they run; without one under Triton's interpreter when TRITON_INTERPRET=1 is set; else skipped.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.values import DEVICE, INTERPRETED, error, random

if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from paceline.ops import linear
from paceline.ops.triton import linear as kernel
from paceline.ops.triton import norm as norm_kernel
from paceline.ops.triton.linear import Product
from paceline.ops.triton.tuning import FLOAT8, Blas, Choice, Rows, Tiles, choose
from paceline.ops.weight import Float8, row_scaled

if not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("float8 needs a newer GPU", allow_module_level=True)

DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16]
ROWS, COLUMNS = (200, 160) if INTERPRETED else (1536, 3072)
TOKENS = [1, 3, 4, 16, 33, 65, 257]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CHOICES: list[Choice | None] = [
    None,
    Blas(),
    Rows(4, 512, 4, 2),
    Rows(2, 64 if INTERPRETED else 1024, 2, 3),
    Tiles(64, 16, 64, 4, 3),
    Tiles(64, 64, 64, 4, 3, split=3),
    Tiles(64, 32, 128, 4, 3, tail=16),
    Tiles(128, 32, 64, 8, 3, split=2, tail=16),
]


def float8(rows: int, columns: int, bias: Tensor | None = None) -> Float8:
    """A weight whose rows have scales of very different sizes."""
    matrix = torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[torch.randperm(rows), None] / columns**0.5
    values, scale = row_scaled(matrix)
    return Float8(values.to(DEVICE), scale.to(DEVICE), bias)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_products(dtype: torch.dtype, tokens: int, choice: Choice | None) -> None:
    if isinstance(choice, Rows) and tokens > 4:
        pytest.skip("few tokens only")
    x, norm = random(tokens, COLUMNS, dtype=dtype, scale=3.0), random(COLUMNS, dtype=dtype)
    residual = random(tokens, ROWS, dtype=dtype)
    for bias in (None, random(ROWS, dtype=dtype)) if choice is None else (random(ROWS, dtype=dtype),):
        weight = float8(ROWS, COLUMNS, bias)
        matrix = weight.decoded(torch.float32).matrix
        wide = None if bias is None else bias.float()
        plain = F.linear(x.float(), matrix, wide)
        gate, up = F.linear(linear.rms_norm(x, norm, 1e-6).float(), matrix, wide).chunk(2, dim=-1)
        cases = {
            "plain": (Product(x, weight), plain),
            "add": (Product(x, weight, residual=residual.clone()), residual.float() + plain),
            "gated": (Product(x, weight, norm, 1e-6, gate=True), F.silu(gate) * up),
        }
        for name, (call, exact) in cases.items():
            assert error(kernel.run(call, choice)[0], exact) < LIMIT[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS - 8, COLUMNS - 3])
def test_columns_of_no_whole_block(dtype: torch.dtype, columns: int) -> None:
    weight = float8(ROWS - 2, columns)
    for tokens, choice in ((1, Rows(4, 64, 4, 2)), (5, Tiles(64, 16, 64, 4, 3, split=2)), (5, Tiles(64, 16, 64, 4, 3))):
        x = random(tokens, columns, dtype=dtype)
        exact = x.float() @ weight.decoded(torch.float32).matrix.T
        assert error(kernel.run(Product(x, weight), choice)[0], exact) < LIMIT[dtype]
        gate, up = exact.chunk(2, dim=1)
        assert error(kernel.run(Product(x, weight, gate=True), choice)[0], F.silu(gate) * up) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_split_product_gives_the_norm_of_its_sum(dtype: torch.dtype) -> None:
    x, residual, norm = random(5, COLUMNS, dtype=dtype), random(5, ROWS, dtype=dtype), random(ROWS, dtype=dtype)
    product = Product(x, float8(ROWS, COLUMNS), eps=1e-6, residual=residual, next_norm=norm)
    total, normed = kernel.run(product, Tiles(64, 16, 64, 4, 3, split=2))
    assert normed is not None
    assert error(normed, norm_kernel.rms_norm(total, norm, 1e-6)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_products(dtype: torch.dtype) -> None:
    weight, norm = float8(ROWS, COLUMNS, random(ROWS, dtype=dtype)), random(COLUMNS, dtype=dtype)
    x, residual = random(70, COLUMNS, dtype=dtype), random(70, ROWS, dtype=dtype)
    assert weight.bias is not None
    exact = F.linear(x.float(), weight.decoded(torch.float32).matrix, weight.bias.float())
    gate, up = exact.chunk(2, dim=1)
    whole, gated = kernel.linear_deterministic(x, weight), kernel.linear_gated_deterministic(x, weight)
    added, _ = kernel.linear_add_deterministic(x, weight, residual, norm[:1].expand(ROWS).contiguous(), 1e-6)
    assert error(whole, exact) < LIMIT[dtype]
    assert error(gated, F.silu(gate) * up) < LIMIT[dtype]
    assert error(added, residual.float() + exact) < LIMIT[dtype]
    for first, last in () if INTERPRETED else ((0, 1), (17, 24), (3, 68)):  # numpy's products depend on their shape
        assert torch.equal(kernel.linear_deterministic(x[first:last], weight), whole[first:last])
        assert torch.equal(kernel.linear_gated_deterministic(x[first:last], weight), gated[first:last])


def test_choices_for_float8() -> None:
    for operation, rows in (("linear", 1536), ("linear", 16384), ("gated", 8192)):
        assert isinstance(choose(operation, rows, 1536, 4, float8=True), Rows)
        assert isinstance(choose(operation, rows, 1536, 5, float8=True), Tiles)
        assert isinstance(choose(operation, rows, 1536, 8192, float8=True), Blas)
    for table in FLOAT8.values():
        limits = [limit for limit, _ in table]
        assert limits == sorted(limits)
        assert all(isinstance(choice, Rows) == (limit <= 4) for limit, choice in table)
