"""A decoder made of a family's blocks: the embedding, layers of attention and MLP, the final norm and the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout
from paceline.models.base import Model, Output
from paceline.models.config import ModelConfig, Shard
from paceline.models.families import family_by
from paceline.models.layers import ATTENTION, MLP, AllReduce, Attention, ForwardContext, MLPBlock
from paceline.models.loader import Form, Loader, Part, Wanted, of_layer, of_model
from paceline.models.rope import rope_table
from paceline.models.stored import StoredTensor
from paceline.ops.attention import AttentionBatch
from paceline.ops.linear import linear, norm_linear
from paceline.ops.weight import Dense, Weight, prepare


class Layer(NamedTuple):
    attention: Attention
    mlp: MLPBlock


class Decoder(Model):
    """A model whose config's family names its blocks.

    With `shard` it is one tensor-parallel part, and `all_reduce` sums a tensor over all parts, and may do so in place: after
    each attention and each MLP, before the residual is added. Embedding and head are whole in every part.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Iterable[tuple[str, StoredTensor | Tensor]],
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        shard: Shard | None = None,
        all_reduce: AllReduce | None = None,
    ) -> None:
        """`dtype` None keeps that of the tensors. Raises BadWeights for missing or unexpected tensors, ConfigError for a
        shard that the model cannot be split into.
        """
        self.config = config
        self.device = device
        self._shard_config = config.shard(shard.size if shard else 1)
        self._attention = ATTENTION[family_by("name", config.family).attention]
        mlps = _mlps(config)
        plan = [(self._attention.parts(config), mlp.parts(config)) for mlp in mlps]
        loaded = Loader(tensors, device, dtype, shard).load(list(_wanted(config, plan)))
        self.layers: list[Layer] = []
        for index, (mlp, (attention_parts, mlp_parts)) in enumerate(zip(mlps, plan, strict=True)):
            attention = self._attention(self._shard_config, _named(attention_parts, loaded), index, all_reduce)
            self.layers.append(Layer(attention, mlp(self._shard_config, _named(mlp_parts, loaded), all_reduce)))
        self.embedding: Tensor = next(loaded)
        self.norm: Tensor = next(loaded)
        self.head: Weight = prepare(self.embedding) if config.tie_embeddings else next(loaded)
        assert next(loaded, None) is None
        self.dtype = self.embedding.dtype
        for layer, after in zip(self.layers, [*self.layers[1:], None], strict=True):
            layer.attention.next_norm = layer.mlp.norm
            layer.mlp.next_norm = self.norm if after is None else after.attention.norm
        self._tables: list[Tensor] = []
        self.rope = torch.empty(0)

    def head_rows(self, tokens: Tensor | None) -> Tensor:
        matrix = self.embedding
        if not self.config.tie_embeddings:
            # a packed head is unpacked by multiplying it by the identity
            width = self.config.hidden_size
            unit = torch.eye(width, dtype=self.dtype, device=self.device)
            matrix = self.head.matrix if isinstance(self.head, Dense) else linear(unit, self.head).T
        return matrix if tokens is None else matrix[tokens]

    def layout(self, page_size: int) -> CacheLayout:
        return CacheLayout(page_size, self._attention.planes(self._shard_config, self.config.num_layers, self.dtype))

    def prepare(self, num_positions: int) -> None:
        if num_positions > len(self.rope):
            self._tables.append(rope_table(self.config, num_positions).to(self.device))
            self.rope = self._tables[-1]

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        rows: Tensor | None = None,
        want: tuple[int, ...] = (),
    ) -> Output:
        config = self.config
        hidden = torch.nn.functional.embedding(tokens, self.embedding)
        normed: Tensor | None = None
        features = hidden.new_empty(len(tokens), len(want) * config.hidden_size) if want else None
        if features is not None:
            _keep(features, want, 0, hidden)
        # the last layer computes just the rows, unless its result is wanted of all tokens
        narrow = self.layers[-1] if rows is not None and config.num_layers not in want else None
        context = ForwardContext(cache, batch, self.rope)
        for index, layer in enumerate(self.layers, 1):
            hidden, normed = layer.attention.forward(hidden, normed, context, rows if layer is narrow else None)
            if layer is narrow and len(hidden) == 0:
                return Output(hidden.new_empty(0, config.vocab_size), features)
            hidden, normed = layer.mlp.forward(hidden, normed)
            if features is not None and layer is not narrow:
                _keep(features, want, index, hidden)
        if rows is not None and narrow is None:
            hidden, normed = hidden[rows], None if normed is None else normed[rows]
            if len(hidden) == 0:
                return Output(hidden.new_empty(0, config.vocab_size), features)
        return Output(norm_linear(hidden, self.norm, config.rms_norm_eps, self.head, normed), features)


def _mlps(config: ModelConfig) -> list[type[MLPBlock]]:
    """The kind of MLP of each layer."""
    with_experts = config.experts.layers if config.experts else frozenset()
    usual = MLP[family_by("name", config.family).mlp]
    return [usual if index in with_experts else MLP["dense"] for index in range(config.num_layers)]


def _wanted(config: ModelConfig, plan: list[tuple[dict[str, Part], dict[str, Part]]]) -> Iterator[Wanted]:
    """Everything the model loads, in the order in which it is taken."""
    family = family_by("name", config.family)
    for index, parts in enumerate(plan):
        for part in (*parts[0].values(), *parts[1].values()):
            yield of_layer(part, index, family, config)
    yield of_model("embedding")
    yield of_model("final_norm")
    if not config.tie_embeddings:
        yield of_model("head", Form.WEIGHT)


def _named(parts: dict[str, Part], loaded: Iterator[Any]) -> dict[str, Any]:
    return {name: next(loaded) for name in parts}


def _keep(features: Tensor, want: tuple[int, ...], layer: int, hidden: Tensor) -> None:
    """Copies the hidden states after `layer` layers to the places that `want` gives them; `hidden` may be overwritten next."""
    width = hidden.shape[1]
    for place, wanted in enumerate(want):
        if wanted == layer:
            features[:, place * width : (place + 1) * width] = hidden
