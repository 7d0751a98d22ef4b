"""The fused comparison of distributions against that of train/losses.py, with its gradients.

Runs on a GPU, or without one under Triton's interpreter when TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os

import pytest
import torch

from paceline.train.losses import compare_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 1000), (3, 5000)])
def test_results_and_gradients_are_the_references(rows: int, columns: int) -> None:
    from paceline.ops.triton.compare import Compare

    torch.manual_seed(columns)
    target = (torch.randn(rows, columns) * 3).to(DEVICE)
    normaliser = target.logsumexp(-1) + torch.rand(rows, device=DEVICE)  # some of the target's mass cannot be drafted
    choice = target.argmax(-1)
    choice[0] = -1
    weights = torch.rand(3, rows, device=DEVICE)
    found = []
    for function in (compare_reference, Compare.apply):
        torch.manual_seed(1)
        logits = (target * 0.7 + torch.randn(rows, columns, device=DEVICE)).requires_grad_()
        results = function(logits, target, normaliser, choice)
        sum((result * weight).sum() for result, weight in zip(results[:3], weights, strict=True)).backward()
        found.append((results, logits.grad))
    for mine, expected in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-6, rtol=1e-4)
