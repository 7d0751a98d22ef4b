"""The blocks that a decoder layer consists of. Each normalises its input, computes, and adds the result to the residual.

A block takes `hidden` [T, H], the residual stream, and `normed`, its RMS norm by this block's weight where the op before gave
that, else None. It returns both for the block after it, whose norm weight is `next_norm`. `hidden` may be overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.kv.cache import KVCache
from paceline.kv.layout import Plane
from paceline.models.config import ModelConfig
from paceline.models.loader import Form, Part, Split
from paceline.ops.attention import AttentionBatch, paged_attention
from paceline.ops.experts import experts, route
from paceline.ops.linear import add_norm, linear, linear_add, norm, norm_gated, norm_linear
from paceline.ops.rope import rope_and_cache
from paceline.ops.weight import Weight

AllReduce = Callable[[Tensor], Tensor]
Stream = tuple[Tensor, Tensor | None]


@dataclass(slots=True)
class ForwardContext:
    """What all blocks of one forward pass share."""

    cache: KVCache
    batch: AttentionBatch
    rope: Tensor


class Attention:
    """Grouped-query attention with rotary positions, with or without biases and norms of the heads.

    `index` is the layer's number among those with this block; `config` is that of the shard.
    """

    def __init__(self, config: ModelConfig, loaded: dict[str, Any], index: int, all_reduce: AllReduce | None) -> None:
        self.norm: Tensor = loaded["norm"]
        self.next_norm: Tensor = self.norm  # until the model has linked its blocks
        self._eps = config.rms_norm_eps
        self._qkv: Weight = loaded["qkv"]
        self._output: Weight = loaded["output"]
        self._head_norms: tuple[Tensor, Tensor, float] | None = None
        if config.qk_norm:
            self._head_norms = (loaded["query_norm"], loaded["key_norm"], config.rms_norm_eps)
        self._num_heads = config.num_heads
        self._scale = 1.0 / math.sqrt(config.head_dim)
        self._index = index
        self._all_reduce = all_reduce

    @staticmethod
    def parts(config: ModelConfig) -> dict[str, Part]:
        """What `loaded` must hold."""
        bias = config.attention_bias
        parts = {
            "norm": Part(("attention_norm",)),
            "qkv": Part(("query", "key", "value"), Form.WEIGHT, Split.ROWS, bias),
            "output": Part(("output",), Form.WEIGHT, Split.COLUMNS),
        }
        if config.qk_norm:
            parts |= {"query_norm": Part(("query_norm",)), "key_norm": Part(("key_norm",))}
        return parts

    @staticmethod
    def planes(config: ModelConfig, num_layers: int, dtype: torch.dtype) -> tuple[Plane, ...]:
        """What `num_layers` of these blocks keep per token."""
        shape = (config.num_kv_heads, config.head_dim)
        return tuple(Plane(name, num_layers, shape, dtype) for name in ("keys", "values"))

    def forward(
        self, hidden: Tensor, normed: Tensor | None, context: ForwardContext, rows: Tensor | None = None
    ) -> Stream:
        """Caches keys and values of all tokens; the result is of all, or of the token rows `rows` alone."""
        cache, batch = context.cache, context.batch
        keys, values = cache.plane("keys", self._index), cache.plane("values", self._index)
        qkv = norm_linear(hidden, self.norm, self._eps, self._qkv, normed)
        query = rope_and_cache(
            qkv, context.rope, batch.positions, batch.locations, keys, values, self._num_heads, self._head_norms
        )
        if rows is not None:
            if len(rows) == 0:
                return hidden[rows], None
            query, hidden, batch = query[rows], hidden[rows], batch.only(rows)
        attended = paged_attention(query, keys, values, batch, cache.page_size, self._scale).flatten(1)
        if self._all_reduce is None:
            return linear_add(attended, self._output, hidden, self.next_norm, self._eps)
        return add_norm(self._all_reduce(linear(attended, self._output)), hidden, self.next_norm, self._eps)


class DenseMLP:
    """A gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, loaded: dict[str, Any], all_reduce: AllReduce | None) -> None:
        self.norm: Tensor = loaded["norm"]
        self.next_norm: Tensor = self.norm  # until the model has linked its blocks
        self._eps = config.rms_norm_eps
        self._gate_up: Weight = loaded["gate_up"]
        self._down: Weight = loaded["down"]
        self._all_reduce = all_reduce

    @staticmethod
    def parts(config: ModelConfig) -> dict[str, Part]:
        """What `loaded` must hold."""
        return {
            "norm": Part(("mlp_norm",)),
            "gate_up": Part(("gate", "up"), Form.GATED, Split.ROWS),
            "down": Part(("down",), Form.WEIGHT, Split.COLUMNS),
        }

    def forward(self, hidden: Tensor, normed: Tensor | None) -> Stream:
        gated = norm_gated(hidden, self.norm, self._eps, self._gate_up, normed)
        if self._all_reduce is None:
            return linear_add(gated, self._down, hidden, self.next_norm, self._eps)
        return add_norm(self._all_reduce(linear(gated, self._down)), hidden, self.next_norm, self._eps)


class MixtureOfExperts:
    """Several gated MLPs, of which each token takes the few that a router gives the largest shares."""

    def __init__(self, config: ModelConfig, loaded: dict[str, Any], all_reduce: AllReduce | None) -> None:
        assert config.experts is not None
        self.norm: Tensor = loaded["norm"]
        self.next_norm: Tensor = self.norm  # until the model has linked its blocks
        self._eps = config.rms_norm_eps
        self._router: Weight = loaded["router"]
        self._gate_up = loaded["gate_up"]
        self._down = loaded["down"]
        self._num_active, self._renormalise = config.experts.num_active, config.experts.renormalise
        self._all_reduce = all_reduce

    @staticmethod
    def parts(config: ModelConfig) -> dict[str, Part]:
        """What `loaded` must hold. A shard has its part of every expert's rows, and all of the router."""
        return {
            "norm": Part(("mlp_norm",)),
            "router": Part(("router",), Form.WEIGHT),
            "gate_up": Part(("expert_gate", "expert_up"), Form.GATED_EXPERTS, Split.ROWS),
            "down": Part(("expert_down",), Form.EXPERTS, Split.COLUMNS),
        }

    def forward(self, hidden: Tensor, normed: Tensor | None) -> Stream:
        x = norm(hidden, self.norm, self._eps) if normed is None else normed
        chosen, shares = route(linear(x, self._router), self._num_active, self._renormalise)
        result = experts(x, chosen, shares, self._gate_up, self._down)
        if self._all_reduce is not None:
            result = self._all_reduce(result)
        return add_norm(result, hidden, self.next_norm, self._eps)


MLPBlock = DenseMLP | MixtureOfExperts
ATTENTION: dict[str, type[Attention]] = {"grouped_query": Attention}
MLP: dict[str, type[DenseMLP] | type[MixtureOfExperts]] = {"dense": DenseMLP, "experts": MixtureOfExperts}
