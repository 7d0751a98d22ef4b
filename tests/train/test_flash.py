"""The joint softmax over shared and own keys, against one softmax in torch: outputs and gradients.

Without a GPU flash attention is replaced by its definition, which leaves the joining to be tested.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from paceline.drafters.eagle3 import Eagle3Network
from paceline.ops.dispatch import differentiable
from paceline.train import eagle3, flash
from tests.train.test_eagle3 import captured, packed, target, trainee_of

HEADS, KV_HEADS, DIM = 6, 2, 16
CUDA = torch.cuda.is_available()


def scores_of(query: Tensor, keys: Tensor, documents: flash.Documents) -> Tensor:
    """[heads, T, E]; in each document queries and keys are aligned at the last, as flash attention aligns them."""
    visible = torch.zeros(len(query), len(keys), dtype=torch.bool, device=query.device)
    bounds = [itertools.pairwise(each.tolist()) for each in (documents.starts, documents.of_keys()[0])]
    for (first, last), (first_key, last_key) in zip(*bounds, strict=True):
        shape = (last - first, last_key - first_key)
        visible[first:last, first_key:last_key] = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
    scores = torch.einsum("thd,shd->hts", query, spread(keys, query)) * flash.scale_of(query)
    return scores.masked_fill(~visible, -torch.inf)


def spread(keys: Tensor, query: Tensor) -> Tensor:
    """A key head for every query's head."""
    return keys.repeat_interleave(query.shape[-2] // keys.shape[-2], -2)


def definition(
    query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, documents: flash.Documents
) -> Tensor:
    own = torch.einsum("thd,tkhd->htk", query, spread(own_keys, query)) * flash.scale_of(query)
    nothing = own.new_full((*own.shape[:2], 1), -1e9)  # all that a query without keys sees
    shares = torch.cat([scores_of(query, keys, documents), own, nothing], -1).softmax(-1)
    shared, of_own, _ = shares.split([len(keys), own.shape[-1], 1], dim=-1)
    out = torch.einsum("hts,shd->thd", shared, spread(values, query))
    return out + torch.einsum("htk,tkhd->thd", of_own, spread(own_values, query))


def forward(query: Tensor, keys: Tensor, values: Tensor, documents: flash.Documents) -> object:
    scores = scores_of(query, keys, documents)
    nothing = (scores == -torch.inf).all(-1)
    shares = scores.softmax(-1).masked_fill(nothing[..., None], 0)
    out = torch.einsum("hts,shd->thd", shares, spread(values, query))
    return out, scores.logsumexp(-1).masked_fill(nothing, torch.inf), ()


def backward(
    grad: Tensor, inputs: tuple[Tensor, ...], out: Tensor, log_sum: Tensor, documents: flash.Documents, state: object
) -> object:
    query, keys, values = inputs
    shares = (scores_of(query, keys, documents) - log_sum[..., None]).exp()
    upstream = torch.einsum("thd,shd->hts", grad, spread(values, query))
    of_scores = shares * (upstream - (grad * out).sum(-1).T[..., None]) * flash.scale_of(query)
    of_query = torch.einsum("hts,shd->thd", of_scores, spread(keys, query))
    groups = (keys.shape[1], query.shape[1] // keys.shape[1])
    of_keys = torch.einsum("hts,thd->shd", of_scores, query).unflatten(1, groups).sum(2)
    of_values = torch.einsum("hts,thd->shd", shares, grad).unflatten(1, groups).sum(2)
    return of_query, of_keys, of_values


@pytest.mark.parametrize("num_own", [0, 1, 3])
@pytest.mark.parametrize("hides_first", [False, True])
@pytest.mark.parametrize("starts", [[0, 5, 6, 17], [0, 1, 2], [0, 200, 201, 330]], ids=("short", "single", "long"))
def test_outputs_and_gradients_are_those_of_one_softmax(
    num_own: int, hides_first: bool, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    device, dtype = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16 if CUDA else torch.float32
    if not CUDA:
        monkeypatch.setattr(flash, "flash_forward", forward)
        monkeypatch.setattr(flash, "flash_backward", backward)
    longest = max(last - first for first, last in itertools.pairwise(starts))
    documents = flash.Documents(torch.tensor(starts, dtype=torch.int32, device=device), longest, hides_first)
    count = starts[-1]
    num_keys = int(documents.of_keys()[0][-1])
    assert num_keys == count - hides_first * (len(starts) - 1)
    shapes = [(count, HEADS, DIM), *[(num_keys, KV_HEADS, DIM)] * 2, *[(count, num_own, KV_HEADS, DIM)] * 2]
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    exact = [each.detach().float().requires_grad_() for each in inputs]
    upstream = torch.randn(count, HEADS, DIM, device=device)
    expected = definition(*exact, documents)
    (expected * upstream).sum().backward()
    found = flash.SharedAndOwn.apply(*inputs, documents)
    (found.float() * upstream).sum().backward()
    bound = 2e-2 if CUDA else 1e-5
    torch.testing.assert_close(found.float(), expected, atol=bound, rtol=bound)
    for mine, theirs in zip(inputs, exact, strict=True):
        if mine.numel() == 0:
            continue
        assert mine.grad is not None and theirs.grad is not None
        error = (mine.grad.float() - theirs.grad).norm()
        assert error < bound * theirs.grad.norm().clamp(min=1), tuple(mine.shape)


def test_unrolled_states_are_those_of_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over packed rows with several documents, with the gradients of all weights."""
    model = target()
    ids = torch.arange(0, 258, 2)
    trainee = trainee_of(model, ids)
    batch = captured(model, trainee, ids, packed())
    monkeypatch.setattr(flash, "flash_forward", forward)
    monkeypatch.setattr(flash, "flash_backward", backward)
    found = []
    for kind in (eagle3._UnrolledAttention, flash.FlashUnrolledAttention):
        monkeypatch.setattr(eagle3, "_UnrolledAttention", kind)
        tensors = {name: each.clone().requires_grad_() for name, each in trainee.initial(1).items()}
        with differentiable():
            network = Eagle3Network(trainee.config, tensors, model.head_rows(ids), training=True)
            states = torch.stack(list(trainee.unrolled(network, batch)))
            (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
        found.append((states, {name: each.grad for name, each in tensors.items() if each.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert len(found[0][1]) > 8
    for name, expected in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], expected, atol=1e-3, rtol=1e-4)
