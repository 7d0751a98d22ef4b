"""The likeliest tokens of a drafter's logits: the implementations against a sort."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paceline.ops import candidates as ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


def implementations() -> list[Callable[[Tensor, int], tuple[Tensor, Tensor]]]:
    found = [ops.on_cpu]
    if torch.cuda.is_available() or INTERPRETED:
        from paceline.ops.triton import candidates as kernels

        found.append(kernels.candidates)
    return found


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 1000), (2, 1024), (5, 5000)])
def test_the_likeliest_tokens_come_first(rows: int, columns: int, count: int) -> None:
    torch.manual_seed(columns)
    logits = torch.randn(rows, columns).mul(4).to(DEVICE)
    logits[-1] = logits[-1].round()  # many equals
    tokens, logprobs = ops.reference(logits, count)
    every = logits.log_softmax(-1)
    for row in range(rows):
        order = sorted(range(columns), key=lambda token: (-float(logits[row, token]), token))
        assert tokens[row].tolist() == order[:count]
    torch.testing.assert_close(logprobs, every.gather(1, tokens))
    for implementation in implementations():
        unchanged = logits.clone()
        mine, values = implementation(logits, count)
        assert torch.equal(mine, tokens) and torch.equal(logits, unchanged)
        torch.testing.assert_close(values, logprobs, atol=1e-5, rtol=1e-5)
