"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840): one layer over the target's hidden states, run once per drafted token."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch
from paceline.drafters.checkpoint import DraftCheckpoint
from paceline.drafters.config import DraftConfig
from paceline.drafters.trained import TrainedDrafter, unpacked
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout, Plane
from paceline.models.base import Model
from paceline.ops.attention import AttentionBatch, paged_attention
from paceline.ops.chain_layout import chain_layout
from paceline.ops.draft import Draft
from paceline.ops.draft_states import draft_input, keep_states, last_states
from paceline.ops.join_drafts import Guesses
from paceline.ops.linear import linear, linear_add, norm, norm_gated, norm_linear
from paceline.ops.rope import rope_and_cache
from paceline.ops.weight import Weight, prepare

Attend = Callable[[Tensor], Tensor]


class Eagle3Network:
    """The network, for the engine and the trainer alike.

    A row j of its sequence stands for token j. Its input is the embedding of token j and the state of token j - 1: the
    fused hidden states of the target, or, within a draft, the network's own output of the row before. Its output leads to
    the draft of token j + 1. (EAGLE's papers count rows by the token of the state; the network is the same.)
    Row 0 has no state: it reads zeros, and its key is hidden from all other rows. So these attend to what they attend to in
    vLLM and SGLang, whose first row has the state of token 0 and token 1.
    Keys and values of a row that has a state of the target depend on that row alone, so they are computed with the
    target's and live in its pages.
    """

    def __init__(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], head: Tensor | None = None, training: bool = False
    ) -> None:
        """`tensors` as in drafters/checkpoint.py. `head` [draft vocabulary, H] serves where they have no lm_head.weight.

        While training, weights stay views of `tensors`, through which gradients flow; else they are packed for the device.
        """
        make: Callable[..., Weight] = unpacked if training else prepare
        layer = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items()}
        self.config = config
        self.eps = config.layer.rms_norm_eps
        self.input_norm: Tensor = layer["input_layernorm.weight"]
        self.hidden_norm: Tensor = layer["hidden_norm.weight"]
        self.mlp_norm: Tensor = layer["post_attention_layernorm.weight"]
        self.norm: Tensor = layer["norm.weight"]
        self.feature_norms = _feature_norms(config, layer)
        self._fc = make(layer["fc.weight"], layer.get("fc.bias"))
        parts = [layer[f"self_attn.{part}_proj.weight"] for part in "qkv"]
        self._qkv = make(torch.cat(parts))
        self.head_norms: tuple[Tensor, Tensor, float] | None = None
        if config.layer.qk_norm:
            self.head_norms = (layer["self_attn.q_norm.weight"], layer["self_attn.k_norm.weight"], self.eps)
        self._output = make(layer["self_attn.o_proj.weight"])
        self._gate_up = make(torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]), gated=True)
        self._down = make(layer["mlp.down_proj.weight"])
        matrix = layer.get("lm_head.weight", head)
        assert matrix is not None, "a drafter without a head needs the target's"
        self._head = make(matrix)

    def fuse(self, features: Tensor) -> Tensor:
        """features [T, F * target H], side by side in the order of `config.features` -> states [T, H]."""
        if self.feature_norms:
            count = len(self.feature_norms)
            parts = [norm(x, w, self.eps) for x, w in zip(features.chunk(count, -1), self.feature_norms, strict=True)]
            features = torch.cat(parts, dim=-1)
        return linear(features, self._fc)

    def forward(self, tokens: Tensor, embedding: Tensor, states: Tensor, attend: Attend) -> Tensor:
        """The state [T, H] that each row gives to the row after it.

        tokens [T] index embedding [V, H]; states [T, H] are those of the tokens before and may be overwritten. `attend` maps
        qkv [T, ...] to [T, heads * dim]; normalising heads by `head_norms` is its part.
        """
        both = self.inputs(tokens, embedding, states)
        residual = both[:, states.shape[1] :] if self.config.norm_before_residual else states
        hidden, normed = linear_add(attend(self.qkv(both)), self._output, residual, self.mlp_norm, self.eps)
        gated = norm_gated(hidden, self.mlp_norm, self.eps, self._gate_up, normed)
        hidden, _ = linear_add(gated, self._down, hidden, self.norm, self.eps)
        return norm(hidden, self.norm, self.eps) if self.config.norm_output else hidden

    def inputs(self, tokens: Tensor, embedding: Tensor, states: Tensor) -> Tensor:
        """The normalised input [T, 2 * H] of rows as `forward` takes them."""
        return draft_input(tokens, embedding, states, self.input_norm, self.hidden_norm, self.eps)

    def qkv(self, both: Tensor) -> Tensor:
        """Queries, keys and values, [T, (heads + 2 * kv_heads) * dim], of inputs [T, 2 * H]."""
        return linear(both, self._qkv)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, H], as `forward` gives it -> [T, draft vocabulary]."""
        if self.config.norm_output:
            return linear(hidden, self._head)
        return norm_linear(hidden, self.norm, self.eps, self._head)


def _feature_norms(config: DraftConfig, layer: Mapping[str, Tensor]) -> list[Tensor]:
    if config.norm_before_fc:
        return [layer["input_norm.weight"]]
    if config.fc_norm:
        return [layer[f"fc_norm.{index}.weight"] for index in range(len(config.features))]
    return []


class Eagle3Drafter(TrainedDrafter):
    """Drafts a chain, a pass of the network for each token.

    In the cache it keeps, for every token that the target has seen, the network's keys and values and the fused state
    that the row after needs. All follow from the tokens up to there, so a cached prefix has them for whoever shares it.
    """

    kind = "eagle3"
    lengths = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)

    def __init__(self, config: ResolvedConfig, model: Model, checkpoint: DraftCheckpoint | None = None) -> None:
        super().__init__(config, model, checkpoint)
        self.network = Eagle3Network(self.draft_config, self.take_tensors(), self.head)
        layer = self.draft_config.layer
        self._num_heads = layer.num_heads
        self._scale = 1.0 / math.sqrt(layer.head_dim)
        self._dtype = model.dtype

    def layout(self, page_size: int) -> CacheLayout:
        layer = self.draft_config.layer
        heads = (layer.num_kv_heads, layer.head_dim)
        return CacheLayout(
            page_size,
            (
                Plane("draft_keys", 1, heads, self._dtype),
                Plane("draft_values", 1, heads, self._dtype),
                Plane("draft_states", 1, (layer.hidden_size,), self._dtype),
            ),
        )

    def remember(
        self, tokens: Tensor, features: Tensor, draft: Draft | None, batch: AttentionBatch, cache: KVCache
    ) -> None:
        plane = cache.plane("draft_states", 0)
        before = keep_states(batch, plane, cache.page_size, self.network.fuse(features), draft)
        self._write(batch, cache, self.network.qkv(self.network.inputs(tokens, self.embedding, before)))

    def guess(self, batch: DraftBatch, depth: int, width: int) -> Guesses:
        cache = batch.cache
        layout = chain_layout(batch.state, batch.slots, batch.page_table, depth, cache.page_size)
        tokens = layout.roots
        found: list[tuple[Tensor, Tensor]] = []
        for step in range(depth):
            rows = layout.batch(step, cache.page_size, hides_first=True)
            if step == 0:
                states = last_states(rows, cache.plane("draft_states", 0), cache.page_size)
            attend = functools.partial(self._attend, rows, cache)
            states = self.network.forward(tokens, self.embedding, states, attend)
            found.append(self.choose(batch, self.network.logits(states), layout.positions[step + 1], width))
            tokens = found[-1][0][:, 0].contiguous()
        return Guesses(*(torch.stack(column, dim=1) for column in zip(*found, strict=True)))

    def _write(self, batch: AttentionBatch, cache: KVCache, qkv: Tensor) -> Tensor:
        """Writes keys and values to the cache; the queries."""
        keys, values = cache.plane("draft_keys", 0), cache.plane("draft_values", 0)
        norms = self.network.head_norms
        return rope_and_cache(qkv, self.rope, batch.positions, batch.locations, keys, values, self._num_heads, norms)

    def _attend(self, batch: AttentionBatch, cache: KVCache, qkv: Tensor) -> Tensor:
        query = self._write(batch, cache, qkv)
        keys, values = cache.plane("draft_keys", 0), cache.plane("draft_values", 0)
        return paged_attention(query, keys, values, batch, cache.page_size, self._scale).flatten(1)
