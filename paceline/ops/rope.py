"""Rotary position embedding of a step's queries and keys, and the write of keys and values into the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation
from paceline.ops.linear import rms_norm


def rope_and_cache(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    locations: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_heads: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Splits qkv, normalises heads where `norms` (query weight, key weight, eps) is given, rotates, writes K and V.

    qkv [T, (heads + 2 * kv_heads) * dim]; table [max positions, dim] float32, cosines then sines of half the
    dimensions each; caches [locations, kv_heads, dim] (written at `locations`). Returns the queries, [T, heads, dim].
    Halves are rotated as in Llama's reference: dimension i pairs with i + dim / 2.
    """
    return implementation("rope_and_cache", qkv)(
        qkv, table, positions, locations, key_cache, value_cache, num_heads, norms
    )


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [T, heads, dim] rotated by cosines and sines [T, 1, dim / 2], in float32, back in x's dtype."""
    wide = x.float()
    both = torch.cat([cosines, cosines], dim=-1)
    signed = torch.cat([-sines, sines], dim=-1)
    return torch.addcmul(wide * both, wide.roll(x.shape[-1] // 2, -1), signed).to(x.dtype)


def reference(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    locations: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_heads: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    num_kv_heads, dim = key_cache.shape[1:]
    heads = qkv.view(qkv.shape[0], -1, dim)
    turned, value = heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        query, key = turned.split([num_heads, num_kv_heads], dim=1)
        turned = torch.cat([rms_norm(query, norms[0], norms[2]), rms_norm(key, norms[1], norms[2])], dim=1)
    cosines, sines = table[positions][:, None, :].chunk(2, dim=-1)
    query, key = rotate(turned, cosines, sines).split([num_heads, num_kv_heads], dim=1)
    key_cache.index_copy_(0, locations, key)
    value_cache.index_copy_(0, locations, value)
    return query.contiguous()
