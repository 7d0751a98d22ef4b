"""The products of a layer, and the greedy choice, by the native kernels. A row's bits depend on nothing but the row."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops import argmax as choice
from paceline.ops import linear as reference
from paceline.ops.native import Panels, library
from paceline.ops.weight import Weight


def linear(x: Tensor, weight: Weight) -> Tensor:
    panels = weight.panels
    if panels is None:
        return reference.linear_reference(x, weight)
    return _product(x, panels)


def linear_deterministic(x: Tensor, weight: Weight) -> Tensor:
    panels = weight.panels
    if panels is None:
        return reference.linear_deterministic(x, weight)
    return _product(x, panels)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    panels = weight.panels
    if panels is None:
        return reference.norm_linear_reference(x, norm, eps, weight, normed)
    return _product(x, panels, norm=norm, eps=eps)


def linear_add(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, None]:
    panels = weight.panels
    if panels is None:
        return reference.linear_add_reference(x, weight, residual, norm, eps)
    return _product(x, panels, residual=residual.contiguous()), None


def norm_gated(x: Tensor, norm: Tensor, eps: float, weight: Weight, normed: Tensor | None = None) -> Tensor:
    panels = weight.panels
    if panels is None or not panels.gated:
        return reference.norm_gated_reference(x, norm, eps, weight, normed)
    return _product(x, panels, norm=norm, eps=eps)


def linear_gated(x: Tensor, weight: Weight) -> Tensor:
    panels = weight.panels
    if panels is None or not panels.gated:
        return reference.linear_gated_reference(x, weight)
    return _product(x, panels)


def _product(
    x: Tensor, weight: Panels, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None
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
