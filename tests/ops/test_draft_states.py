"""What trained drafters keep: the references by hand, and the kernels against them.

The kernels run on a GPU, or without one under Triton's interpreter when TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.ops import draft_states
from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import Draft
from paceline.ops.draft_states import InputWeights
from paceline.ops.linear import rms_norm
from paceline.ops.rope import rope_and_cache

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
PAGE, HIDDEN = 4, 24


def kernels() -> Any:
    if not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from paceline.ops.triton import draft_states as found

    return found


def step(contexts: list[int], counts: list[int], padding: int = 0) -> AttentionBatch:
    """Requests with their committed tokens and queries, each on pages of its own in reverse order."""
    torch.manual_seed(0)
    width = max(-(-(context + count) // PAGE) for context, count in zip(contexts, counts, strict=True))
    table = 1 + torch.arange(len(contexts) * width).flip(0).view(len(contexts), width)
    starts = torch.tensor([0, *counts]).cumsum(0)
    places = torch.cat([context + torch.arange(n) for context, n in zip(contexts, counts, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(contexts)), torch.tensor(counts))
    locations = table[owner, places // PAGE] * PAGE + places % PAGE
    total = len(places) + padding
    zeros = torch.zeros(total, dtype=torch.int64)
    return AttentionBatch(
        positions=zeros.to(DEVICE),
        locations=torch.nn.functional.pad(locations, (0, padding)).to(DEVICE),
        page_table=table.int().to(DEVICE),
        context_lens=torch.tensor(contexts, dtype=torch.int32).to(DEVICE),
        query_starts=starts.int().to(DEVICE),
        branch_starts=zeros.int().to(DEVICE),
        max_query=max(*counts, 1) + padding,
        max_context=width * PAGE,
    )


def plane_for(batch: AttentionBatch) -> Tensor:
    return torch.randn((int(batch.page_table.max()) + 1) * PAGE, HIDDEN).to(DEVICE)


def input_weights() -> InputWeights:
    embedding, norms = torch.randn(30, HIDDEN).to(DEVICE), torch.rand(2, HIDDEN).to(DEVICE)
    return InputWeights(embedding, norms[0], norms[1], 1e-5)


STEPS = [([0], [1], 0), ([5, 0, 12], [3, 1, 2], 0), ([0, 7], [6, 6], 0), ([9], [5], 3), ([3, 3, 3, 3], [1, 1, 1, 1], 0)]


@pytest.mark.parametrize(("contexts", "counts", "padding"), STEPS)
def test_the_state_before_each_token(contexts: list[int], counts: list[int], padding: int) -> None:
    batch = step(contexts, counts, padding)
    plane, states = plane_for(batch), torch.randn(sum(counts) + padding, HIDDEN).to(DEVICE)
    before, kept = plane.clone(), plane.clone()
    tokens, weights = torch.randint(30, (len(states),)).to(DEVICE), input_weights()
    result = draft_states.states_before(batch, kept, PAGE, states, None)
    assert torch.equal(kept, before)
    both = draft_states.keep_reference(batch, kept, PAGE, tokens, states, None, weights)
    assert torch.equal(both, draft_states.input_reference(tokens, result, weights))
    row = 0
    for request, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        for query in range(count):
            expected = states[row - 1]
            if query == 0:
                page = batch.page_table[request, (context - 1) // PAGE] if context else 0
                expected = before[page * PAGE + (context - 1) % PAGE] if context else torch.zeros_like(expected)
            assert torch.equal(result[row], expected)
            assert torch.equal(kept[batch.locations[row]], states[row])
            row += 1
    assert not result[row:].any()
    changed = (kept != before).any(1).nonzero()[:, 0].tolist()
    assert set(changed) <= set(batch.locations.tolist())


@pytest.mark.parametrize(("contexts", "counts", "padding"), STEPS)
@pytest.mark.parametrize("form", ["prompt", "chains", "tree"])
def test_kernels_equal_the_references(contexts: list[int], counts: list[int], padding: int, form: str) -> None:
    found = kernels()
    if padding and form != "prompt":
        pytest.skip("drafts have no rows after the last request's")
    batch = step(contexts, counts, padding)
    rows = sum(counts) + padding
    plane, states = plane_for(batch), torch.randn(rows, HIDDEN).to(DEVICE)
    draft = None if form == "prompt" else draft_of(batch, rows, form)
    mine, theirs = plane.clone(), plane.clone()
    tokens, weights = torch.randint(30, (rows,)).to(DEVICE), input_weights()
    before = draft_states.states_before(batch, plane, PAGE, states, draft)
    draft_states.keep_reference(batch, theirs, PAGE, tokens, states, draft, weights)
    both = found.keep_states(batch, mine, PAGE, tokens, states, draft, weights)
    assert torch.equal(both, found.draft_input(tokens, before, weights))
    real = batch.locations[: sum(counts)]
    assert torch.equal(mine[real], theirs[real])
    assert torch.equal(found.last_states(batch, mine, PAGE), draft_states.last_reference(batch, mine, PAGE))


def draft_of(batch: AttentionBatch, rows: int, form: str) -> Draft:
    """A draft of chains of two tokens, or of a binary tree; only its shape counts."""
    starts = batch.query_starts[:-1].repeat_interleave(batch.query_starts.diff())
    query = torch.arange(rows, device=DEVICE)
    query[: len(starts)] -= starts
    zeros = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    if form == "chains":
        return Draft(zeros.long(), zeros, zeros, branch_starts=(query - (query + 1) % 2).clamp(min=0).int())
    return Draft(zeros.long(), zeros, zeros, parents=((query - 1).clamp(min=0) // 2).int())


@pytest.mark.parametrize("rows", [1, 5])
def test_the_drafters_input(rows: int) -> None:
    states, weights = torch.randn(rows, HIDDEN).to(DEVICE), input_weights()
    tokens = torch.randint(30, (rows,)).to(DEVICE)
    expected = draft_states.input_reference(tokens, states, weights)
    assert torch.equal(expected[:, :HIDDEN], rms_norm(weights.embedding[tokens], weights.token_norm, 1e-5))
    assert torch.equal(expected[:, HIDDEN:], rms_norm(states, weights.state_norm, 1e-5))
    torch.testing.assert_close(kernels().draft_input(tokens, states, weights), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("tokens", "layers", "heads", "dim"), [(1, 1, 2, 8), (5, 3, 3, 16), (300, 2, 5, 8)])
def test_all_layers_are_kept_as_one_by_one(tokens: int, layers: int, heads: int, dim: int, normed: bool) -> None:
    """The planes lie in one tensor among others, as in a cache."""
    states = torch.randn(tokens, layers * 2 * heads * dim).to(DEVICE)
    table = torch.randn(700, dim).to(DEVICE)
    positions = torch.randint(700, (tokens,)).to(DEVICE)
    locations = torch.randperm(320)[:tokens].to(DEVICE)
    norms = ((1 + torch.randn(layers, dim)).to(DEVICE), 1e-5) if normed else None
    caches = torch.zeros(3, 2 * layers + 1, 320, heads, dim).to(DEVICE)
    planes = [(list(each[1 : 1 + layers]), list(each[1 + layers :])) for each in caches]
    draft_states.layers_reference(states, table, positions, locations, *planes[0], norms)
    for index, part in enumerate(states.chunk(layers, dim=1)):
        of_keys = None if norms is None else (norms[0][index], norms[0][index], norms[1])
        keys, values = planes[1][0][index], planes[1][1][index]
        rope_and_cache(part.contiguous(), table, positions, locations, keys, values, 0, of_keys)
    assert torch.equal(caches[0], caches[1])
    assert not caches[0][:, locations[:1]].eq(0).all()
    kernels().keep_layers(states, table, positions, locations, *planes[2], norms)
    torch.testing.assert_close(caches[2], caches[0], atol=2e-5, rtol=2e-5)
    untouched = torch.ones(320, dtype=torch.bool, device=DEVICE).index_fill(0, locations, False)
    assert not caches[2][0].any() and not caches[2][:, untouched].any()
