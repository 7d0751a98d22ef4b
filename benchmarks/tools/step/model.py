"""A decoder of random weights with the shapes of Qwen2.5-Coder-1.5B, and its decode step by Paceline's kernels and by torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from paceline.ops.attention import AttentionBatch
from paceline.ops.rope import rotate
from paceline.ops.triton import argmax, attention, linear, rope
from paceline.ops.weight import Dense

DEVICE = "cuda"
HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB, PAGE, EPS = 1536, 12, 2, 128, 8960, 151_936, 16, 1e-6
SCALE = DIM**-0.5
CACHE_ROWS = 1 << 17  # tokens of the KV cache


@dataclass
class Layer:
    qkv: Dense
    o: Dense
    gate_up: Dense
    down: Dense
    norm_1: Tensor
    norm_2: Tensor
    keys: Tensor
    values: Tensor


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE).mul_(scale)


def matrix(rows: int, columns: int, *, bias: bool = False) -> Dense:
    return Dense(random(rows, columns, scale=columns**-0.5), random(rows) if bias else None)


class Model:
    def __init__(self, layers: int, locations: int) -> None:
        self.layers = [
            Layer(
                matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, bias=True),
                matrix(HIDDEN, HEADS * DIM),
                matrix(2 * FFN, HIDDEN),
                matrix(HIDDEN, FFN),
                random(HIDDEN),
                random(HIDDEN),
                random(locations, KV_HEADS, DIM),
                random(locations, KV_HEADS, DIM),
            )
            for _ in range(layers)
        ]
        self.norm = random(HIDDEN)
        self.head = matrix(VOCAB, HIDDEN)
        angles = torch.arange(16_384)[:, None] * 1e6 ** -(torch.arange(0, DIM, 2) / DIM)[None, :]
        self.table = torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(DEVICE)

    def weight_bytes(self) -> int:
        products = [w for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)] + [self.head]
        return sum(w.matrix.numel() * w.matrix.element_size() for w in products)


def uniform_batch(requests: int, queries: int, context: int, spare_pages: int = 64) -> AttentionBatch:
    """`requests` of the same lengths, their pages shuffled; the page table is wider than needed, as in an engine."""
    needed = -(-(context + queries) // PAGE)
    pages = torch.randperm(requests * needed).view(requests, needed)
    place = torch.arange(context, context + queries)
    locations = pages[:, place // PAGE] * PAGE + place % PAGE
    return AttentionBatch(
        positions=place.repeat(requests).to(DEVICE),
        locations=locations.flatten().to(DEVICE),
        page_table=F.pad(pages, (0, spare_pages)).int().to(DEVICE),
        context_lens=torch.full((requests,), context, dtype=torch.int32, device=DEVICE),
        query_starts=torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * queries,
        branch_starts=torch.zeros(requests * queries, dtype=torch.int32, device=DEVICE),
        max_query=queries,
        max_context=context,
    )


@dataclass(frozen=True)
class Ops:
    norm_linear: Callable[..., Tensor] = linear.norm_linear
    linear_add: Callable[..., linear.Result] = linear.linear_add
    norm_gated: Callable[..., Tensor] = linear.norm_gated
    paged_attention: Callable[..., Tensor] = attention.paged_attention


FAST = Ops()
DETERMINISTIC = Ops(
    linear.norm_linear_deterministic,
    linear.linear_add_deterministic,
    linear.norm_gated_deterministic,
    attention.paged_attention_deterministic,
)


def fused_logits(model: Model, tokens: Tensor, batch: AttentionBatch, ops: Ops = FAST, last: int = 0) -> Tensor:
    """The step by Paceline's kernels: the logits of the `last` tokens, of all if that is 0."""
    hidden = F.embedding(tokens, model.head.matrix)
    normed = None
    norms = [layer.norm_1 for layer in model.layers[1:]] + [model.norm]
    for layer, next_norm in zip(model.layers, norms, strict=True):
        qkv = ops.norm_linear(hidden, layer.norm_1, EPS, layer.qkv, normed)
        query = rope.rope_and_cache(qkv, model.table, batch.positions, batch.locations, layer.keys, layer.values, HEADS)
        mixed = ops.paged_attention(query, layer.keys, layer.values, batch, PAGE, SCALE)
        hidden, normed = ops.linear_add(mixed.flatten(1), layer.o, hidden, layer.norm_2, EPS)
        gated = ops.norm_gated(hidden, layer.norm_2, EPS, layer.gate_up, normed)
        hidden, normed = ops.linear_add(gated, layer.down, hidden, next_norm, EPS)
    return ops.norm_linear(hidden[-last:], model.norm, EPS, model.head)


def fused_step(model: Model, tokens: Tensor, batch: AttentionBatch, ops: Ops = FAST, last: int = 0) -> Tensor:
    return argmax.argmax(fused_logits(model, tokens, batch, ops, last))


def plain_logits(model: Model, tokens: Tensor, batch: AttentionBatch) -> Tensor:
    """The same by cuBLAS and torch's own operations, for requests of the same lengths."""
    hidden = F.embedding(tokens, model.head.matrix)
    requests, queries, length = batch.num_requests, batch.max_query, batch.max_context + batch.max_query
    place = torch.arange(length, device=DEVICE)
    index = batch.page_table[:, place // PAGE] * PAGE + place % PAGE
    mask = causal_lower_right(queries, length) if 1 < queries < length else None
    for layer in model.layers:
        qkv = F.linear(F.rms_norm(hidden, (HIDDEN,), layer.norm_1, EPS), layer.qkv.matrix, layer.qkv.bias)
        query, key, value = torch.split(qkv.view(-1, HEADS + 2 * KV_HEADS, DIM), [HEADS, KV_HEADS, KV_HEADS], dim=1)
        cosines, sines = model.table[batch.positions][:, None].chunk(2, dim=-1)
        layer.keys[batch.locations] = rotate(key, cosines, sines)
        layer.values[batch.locations] = value
        shaped = rotate(query, cosines, sines).view(requests, queries, HEADS, DIM).transpose(1, 2)
        keys, values = layer.keys[index].transpose(1, 2), layer.values[index].transpose(1, 2)
        causal = mask is None and queries > 1
        mixed = F.scaled_dot_product_attention(
            shaped, keys, values, attn_mask=mask, is_causal=causal, scale=SCALE, enable_gqa=True
        )
        hidden = hidden + F.linear(mixed.transpose(1, 2).reshape(-1, HEADS * DIM), layer.o.matrix)
        gate, up = F.linear(F.rms_norm(hidden, (HIDDEN,), layer.norm_2, EPS), layer.gate_up.matrix).chunk(2, dim=-1)
        hidden = hidden + F.linear(F.silu(gate) * up, layer.down.matrix)
    return F.linear(F.rms_norm(hidden, (HIDDEN,), model.norm, EPS), model.head.matrix)


def plain_step(model: Model, tokens: Tensor, batch: AttentionBatch) -> Tensor:
    return plain_logits(model, tokens, batch).argmax(dim=-1)
