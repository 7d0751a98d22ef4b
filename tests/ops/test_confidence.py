"""What a confidence head makes of guesses: the reference by hand, and the kernel against it."""

from __future__ import annotations

import os

import pytest
import torch

from paceline.ops import confidence as ops
from paceline.ops.confidence import ConfidenceHead
from paceline.ops.join_drafts import Guesses

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.mark.parametrize("rank", [0, 12])
@pytest.mark.parametrize(("requests", "depth", "count", "hidden"), [(1, 1, 1, 24), (3, 5, 2, 24), (2, 4, 3, 100)])
def test_the_others_share_what_the_head_leaves(requests: int, depth: int, count: int, hidden: int, rank: int) -> None:
    torch.manual_seed(count)
    tokens = torch.randint(50, (requests, depth, count)).to(DEVICE)
    own = torch.randn(requests, depth, count + 2).sort(dim=2, descending=True).values.log_softmax(2)[..., :count]
    own[-1, -1] = -torch.arange(count) * 30.0  # all but certain, which leaves nothing to divide
    guesses = Guesses(tokens, own.contiguous().to(DEVICE))
    roots, states = torch.randint(50, (requests,)).to(DEVICE), torch.randn(depth * requests, hidden).to(DEVICE)
    embedding = torch.randn(50, rank).to(DEVICE) if rank else None
    head = ConfidenceHead(torch.randn(1, hidden + rank).to(DEVICE), torch.randn(1).to(DEVICE), embedding)
    found = ops.reference(guesses, roots, states, head)
    for request in range(requests):
        before = [int(roots[request]), *tokens[request, :-1, 0].tolist()]
        for step in range(depth):
            inputs = states[step * requests + request]
            if embedding is not None:
                inputs = torch.cat([inputs, embedding[before[step]]])
            sure = torch.sigmoid(head.weight[0] @ inputs + head.bias[0])
            chances = guesses.logprobs[request, step].exp()
            others = (1 - sure) * chances[1:] / (1 - chances[0]).clamp(min=ops.LEAST_REST)
            torch.testing.assert_close(
                found[request, step].exp(), torch.cat([sure[None], others]), rtol=1e-4, atol=1e-6
            )
    if not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("the kernel needs a CUDA device, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from paceline.ops.triton import confidence as kernels

    before_call = guesses.logprobs.clone()
    torch.testing.assert_close(kernels.confidence(guesses, roots, states, head), found, rtol=1e-5, atol=1e-5)
    assert torch.equal(guesses.logprobs, before_call)
