"""The products of a layer, and the greedy choice, by the native kernels. A row's bits depend on nothing but the row."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops import argmax as choice
from paceline.ops import linear as reference
from paceline.ops.linear import Weight
from paceline.ops.native import Packed, library


def linear(x: Tensor, weight: Weight) -> Tensor:
    if weight.native is None:
        return reference.linear_reference(x, weight)
    return _product(x, weight.native)


def linear_deterministic(x: Tensor, weight: Weight) -> Tensor:
    if weight.native is None:
        return reference.linear_deterministic(x, weight)
    return _product(x, weight.native)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    if weight.native is None:
        return reference.norm_linear_reference(x, norm, eps, weight, normed)
    return _product(x, weight.native, norm=norm, eps=eps)


def linear_add(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, None]:
    if weight.native is None:
        return reference.linear_add_reference(x, weight, residual, norm, eps)
    return _product(x, weight.native, residual=residual.contiguous()), None


def norm_gated(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    if weight.native is None or not weight.native.gated:
        return reference.norm_gated_reference(x, norm, eps, weight, normed)
    return _product(x, weight.native, norm=norm, eps=eps)


def _product(
    x: Tensor, weight: Packed, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    kernels = library()
    assert kernels is not None and x.shape[1] == weight.columns and x.dtype == torch.bfloat16
    if not x.is_contiguous():
        x = x.contiguous()
    rows = x.shape[0]
    out = x.new_empty(rows, weight.width) if residual is None else residual
    kernels.product(
        weight.address,
        x.data_ptr(),
        None if norm is None else norm.data_ptr(),
        eps,
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        rows,
        torch.get_num_threads(),
    )
    return out


def argmax(logits: Tensor) -> Tensor:
    kernels = library() if logits.dtype == torch.bfloat16 and logits.is_contiguous() else None
    if kernels is None or logits.dim() != 2:
        return choice.reference(logits)
    rows, columns = logits.shape
    choices = torch.empty(rows, dtype=torch.int64)
    kernels.argmax(logits.data_ptr(), rows, columns, choices.data_ptr(), torch.get_num_threads())
    return choices
