"""The joint softmax over shared and own keys, against one softmax in torch: outputs and gradients.

Without a GPU flash attention is replaced by its definition, which leaves the joining to be tested.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from paceline.drafters.eagle3 import Eagle3Network
from paceline.ops.dispatch import differentiable
from paceline.train import eagle3, flash
from tests.train.test_eagle3 import captured, packed, target, trainee_of

STARTS = [0, 5, 6, 17]
HEADS, KV_HEADS, DIM = 6, 2, 16
SCALE = DIM**-0.5
CUDA = torch.cuda.is_available()


def visible(count: int, device: torch.device) -> Tensor:
    mask = torch.zeros(count, count, dtype=torch.bool, device=device)
    for first, last in itertools.pairwise(STARTS):
        mask[first:last, first:last] = torch.ones(last - first, last - first, dtype=torch.bool, device=device).tril()
    return mask


def scores_of(query: Tensor, keys: Tensor) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("thd,shd->hts", query, keys.repeat_interleave(group, 1)) * SCALE
    return scores.masked_fill(~visible(len(query), query.device), -torch.inf)


def definition(query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor) -> Tensor:
    group = HEADS // KV_HEADS
    own = torch.einsum("thd,tkhd->htk", query, own_keys.repeat_interleave(group, 2)) * SCALE
    shares = torch.cat([scores_of(query, keys), own], -1).softmax(-1)
    out = torch.einsum("hts,shd->thd", shares[..., : len(query)], values.repeat_interleave(group, 1))
    return out + torch.einsum("htk,tkhd->thd", shares[..., len(query) :], own_values.repeat_interleave(group, 2))


def forward(query: Tensor, keys: Tensor, values: Tensor, documents: flash.Documents) -> object:
    scores = scores_of(query, keys)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), values.repeat_interleave(HEADS // KV_HEADS, 1))
    return out, scores.logsumexp(-1), ()


def backward(
    grad: Tensor, inputs: tuple[Tensor, ...], out: Tensor, log_sum: Tensor, documents: flash.Documents, state: object
) -> object:
    query, keys, values = inputs
    group = HEADS // KV_HEADS
    shares = (scores_of(query, keys) - log_sum[..., None]).exp()
    upstream = torch.einsum("thd,shd->hts", grad, values.repeat_interleave(group, 1))
    of_scores = shares * (upstream - (grad * out).sum(-1).T[..., None]) * SCALE
    of_query = torch.einsum("hts,shd->thd", of_scores, keys.repeat_interleave(group, 1))
    of_keys = torch.einsum("hts,thd->shd", of_scores, query).view(len(keys), KV_HEADS, group, DIM).sum(2)
    of_values = torch.einsum("hts,thd->shd", shares, grad).view(len(keys), KV_HEADS, group, DIM).sum(2)
    return of_query, of_keys, of_values


@pytest.mark.parametrize("num_own", [0, 1, 3])
def test_outputs_and_gradients_are_those_of_one_softmax(num_own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    device, dtype = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16 if CUDA else torch.float32
    if not CUDA:
        monkeypatch.setattr(flash, "flash_forward", forward)
        monkeypatch.setattr(flash, "flash_backward", backward)
    count = STARTS[-1]
    shapes = [(count, HEADS, DIM), *[(count, KV_HEADS, DIM)] * 2, *[(count, num_own, KV_HEADS, DIM)] * 2]
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    exact = [each.detach().float().requires_grad_() for each in inputs]
    upstream = torch.randn(count, HEADS, DIM, device=device)
    expected = definition(*exact)
    (expected * upstream).sum().backward()
    starts = torch.tensor(STARTS, dtype=torch.int32, device=device)
    found = flash.SharedAndOwn.apply(*inputs, flash.Documents(starts, 11))
    (found.float() * upstream).sum().backward()
    bound = 2e-2 if CUDA else 1e-5
    torch.testing.assert_close(found.float(), expected, atol=bound, rtol=bound)
    for mine, theirs in zip(inputs, exact, strict=True):
        if mine.numel() == 0:
            continue
        assert mine.grad is not None and theirs.grad is not None
        error = (mine.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert error < bound, tuple(mine.shape)


def test_unrolled_states_are_those_of_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over packed rows with several documents, with the gradients of all weights."""
    model = target()
    ids = torch.arange(0, 258, 2)
    trainee = trainee_of(model, ids)
    batch = captured(model, trainee, ids, packed())
    monkeypatch.setattr(sys.modules[__name__], "STARTS", batch.starts.tolist())
    monkeypatch.setattr(sys.modules[__name__], "KV_HEADS", trainee.config.layer.num_kv_heads)
    monkeypatch.setattr(sys.modules[__name__], "HEADS", trainee.config.layer.num_heads)
    monkeypatch.setattr(sys.modules[__name__], "DIM", trainee.config.layer.head_dim)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", trainee.config.layer.head_dim**-0.5)
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
