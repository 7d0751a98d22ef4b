"""Values for tests of kernels, on the GPU or under Triton's interpreter, and how far results are from exact ones."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def error(result: Tensor, exact: Tensor) -> float:
    """Relative error in the 2-norm; infinite where the result is not finite."""
    result, exact = result.double(), exact.double()
    if not bool(result.isfinite().all()):
        return float("inf")
    return float((result - exact).norm() / exact.norm())
