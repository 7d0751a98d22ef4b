"""Attention of unrolled training on CUDA: flash attention over the keys that all steps share, joined with each row's own.

The softmax goes over both. Flash attention gives the shared part's output and the logarithm of its sum, from which the
joint output follows. Its backward pass takes the joint output and the joint logarithm instead of its own: each share of the
softmax and the row's correction depend on these alone, so the gradients are those of the joint softmax.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paceline.models.config import ModelConfig
from paceline.ops.rope import rotate
from paceline.train.capture import Captured


class FlashUnrolledAttention:
    """Attention of the steps k = 0, 1, ... of an unrolled EAGLE-3, called once a step in that order (train/eagle3.py)."""

    def __init__(self, layer: ModelConfig, batch: Captured, table: Tensor) -> None:
        """table [positions, dim] are RoPE's cosines and sines."""
        self._layer, self._table = layer, table
        self._positions = batch.positions.flatten()
        self._documents = Documents(batch.starts, batch.longest, hides_first=True)
        num_first = len(batch.starts) - 1
        is_first = (self._positions == 0).int()
        self._others = is_first.argsort(stable=True)[: len(is_first) - num_first]  # rows but each document's first
        self._keys: list[Tensor] = []  # of step 0 those of `_others`; of each step since [T, kv_heads, dim]
        self._values: list[Tensor] = []

    def __call__(self, qkv: Tensor) -> Tensor:
        """qkv [T, (heads + 2 kv_heads) * dim] -> [T, heads * dim]."""
        layer, begins = self._layer, not self._keys
        num_kv, dim = layer.num_kv_heads, layer.head_dim
        turned, value = qkv.view(len(qkv), -1, dim).split([layer.num_heads + num_kv, num_kv], dim=1)
        cosines, sines = self._table[self._positions + len(self._keys)][:, None].chunk(2, dim=-1)
        query, key = rotate(turned, cosines, sines).split([layer.num_heads, num_kv], dim=1)
        self._keys.append(key.index_select(0, self._others) if begins else key.contiguous())
        self._values.append(value.index_select(0, self._others) if begins else value.contiguous())
        own = [
            torch.stack(each[1:], 1) if len(each) > 1 else each[0].new_empty(len(qkv), 0, num_kv, dim)
            for each in (self._keys, self._values)
        ]
        shared = (query.contiguous(), self._keys[0], self._values[0])
        out: Tensor = SharedAndOwn.apply(*shared, *own, self._documents)
        if begins:  # a document's first query sees its own key alone
            alone = value.repeat_interleave(layer.num_heads // num_kv, dim=1)
            out = torch.where((self._positions == 0)[:, None, None], alone, out)
        return out.flatten(1)


class Documents(NamedTuple):
    """The documents of T rows: where each starts, [D + 1] int32 with the end of the last, and the longest one's length.

    With `hides_first` the keys are those of all rows but each document's first, T - D in all.
    """

    starts: Tensor
    longest: int
    hides_first: bool = False

    def of_keys(self) -> tuple[Tensor, int]:
        """`starts` and `longest`, counted in keys."""
        if not self.hides_first:
            return self.starts, self.longest
        return self.starts - torch.arange(
            len(self.starts), dtype=torch.int32, device=self.starts.device
        ), self.longest - 1


class SharedAndOwn(torch.autograd.Function):
    """query [T, heads, dim], keys and values [T, kv_heads, dim], own ones [T, K, kv_heads, dim], and the documents.

    Query t sees the keys of its document up to t, and its own K keys. -> [T, heads, dim]; 0 for a query without any key.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
        documents: Documents,
    ) -> Tensor:
        shared, log_sum, state = flash_forward(query, keys, values, documents)
        scores = _scores(query, own_keys)
        log_sum = log_sum.T  # [T, heads]
        log_sum = log_sum.masked_fill(log_sum.isinf(), -math.inf)  # flash attention gives +inf where a query sees none
        joint = torch.logaddexp(log_sum, scores.logsumexp(-1))
        joint = joint.masked_fill(joint.isinf(), 0.0)  # any finite number makes all shares 0
        of_own = _weighted((scores - joint[..., None]).exp(), own_values)
        out = (shared * (log_sum - joint).exp()[..., None] + of_own).to(query.dtype)
        starts, *ctx.documents = documents
        ctx.save_for_backward(query, keys, values, own_keys, own_values, out, joint, starts, *state)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, keys, values, own_keys, own_values, out, joint, starts, *state = ctx.saved_tensors
        grad = grads[0].contiguous()
        documents = Documents(starts, *ctx.documents)
        of_query, of_keys, of_values = flash_backward(
            grad, (query, keys, values), out, joint.T.contiguous(), documents, state
        )
        count, heads, dim = query.shape
        kv_heads, scale = keys.shape[1], scale_of(query)
        shares = (_scores(query, own_keys) - joint[..., None]).exp()
        correction = (grad.float() * out.float()).sum(-1, keepdim=True)
        of_scores = shares * (_products(grad, own_values) - correction) * scale
        of_query = of_query + _weighted(of_scores, own_keys).to(query.dtype)
        group = heads // kv_heads
        of_scores = of_scores.view(count, kv_heads, group, shares.shape[-1])
        groups = query.view(count, kv_heads, group, dim).float()
        of_own_keys = torch.einsum("thgk,thgd->tkhd", of_scores, groups).to(query.dtype)
        upstream = grad.view(count, kv_heads, group, dim).float()
        of_own_values = torch.einsum("thgk,thgd->tkhd", shares.view(of_scores.shape), upstream).to(query.dtype)
        return of_query, of_keys, of_values, of_own_keys, of_own_values, None


def scale_of(query: Tensor) -> float:
    """What products of queries [..., dim] and keys are multiplied by."""
    return 1 / math.sqrt(query.shape[-1])


def flash_forward(
    query: Tensor, keys: Tensor, values: Tensor, documents: Documents
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Causal attention within documents: output [T, heads, dim], log of sums [heads, T], and what `flash_backward` needs.

    A document's last query sees all its keys, also where these are fewer than the queries.
    """
    starts, longest = documents[:2]
    key_starts, longest_keys = documents.of_keys()
    out, log_sum, random, unused, _ = torch.ops.aten._flash_attention_forward(
        query, keys, values, starts, key_starts, longest, longest_keys, 0.0, True, False, scale=scale_of(query)
    )
    return out, log_sum, (random, unused)


def flash_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    log_sum: Tensor,
    documents: Documents,
    state: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `inputs`, which are query, keys and values, given the joint output and log of sums."""
    if not len(inputs[1]):  # no document has a key, and the kernel refuses that
        return torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1]), torch.zeros_like(inputs[2])
    starts, longest = documents[:2]
    key_starts, longest_keys = documents.of_keys()
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad,
        *inputs,
        out,
        log_sum,
        starts,
        key_starts,
        longest,
        longest_keys,
        0.0,
        True,
        *state,
        scale=scale_of(inputs[0]),
    )
    return found


def _scores(query: Tensor, own_keys: Tensor) -> Tensor:
    return _products(query, own_keys) * scale_of(query)


def _products(query: Tensor, own: Tensor) -> Tensor:
    """[T, heads, dim] with [T, K, kv_heads, dim] -> [T, heads, K] float32."""
    count, heads, dim = query.shape
    groups = query.view(count, own.shape[2], -1, dim).float()
    return torch.einsum("thgd,tkhd->thgk", groups, own.float()).reshape(count, heads, own.shape[1])


def _weighted(shares: Tensor, own: Tensor) -> Tensor:
    """[T, heads, K] float32 with [T, K, kv_heads, dim] -> [T, heads, dim] float32."""
    count, heads, number = shares.shape
    groups = shares.view(count, own.shape[2], heads // own.shape[2], number)
    return torch.einsum("thgk,tkhd->thgd", groups, own.float()).reshape(count, heads, own.shape[3])
