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
from paceline.drafters.trained import TrainedDrafter, empty_guesses, empty_tree, rounded, unpacked
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout, Plane
from paceline.models.base import Model
from paceline.ops.attention import AttentionBatch, paged_attention
from paceline.ops.beams import beam_layout, extend_beams
from paceline.ops.chain_layout import chain_layout
from paceline.ops.draft import Draft
from paceline.ops.draft_states import InputWeights, draft_input, keep_states, last_states
from paceline.ops.join_drafts import Guesses
from paceline.ops.linear import linear, linear_add, norm, norm_gated, norm_linear
from paceline.ops.rope import rope_and_cache
from paceline.ops.weight import Weight

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
        make: Callable[..., Weight] = unpacked if training else rounded
        layer = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items()}
        self.config = config
        self.eps = config.layer.rms_norm_eps
        self.input_norm: Tensor = layer["input_layernorm.weight"]
        self.hidden_norm: Tensor = layer["hidden_norm.weight"]
        self.mlp_norm: Tensor = layer["post_attention_layernorm.weight"]
        self.norm: Tensor = layer["norm.weight"]
        self.feature_norms = _feature_norms(config, layer)
        self._fc = make(layer["fc.weight"], layer.get("fc.bias"))
        qkv = torch.cat([layer[f"self_attn.{part}_proj.weight"] for part in "qkv"])
        self._qkv = make(qkv)
        self._keys_values = make(qkv[config.layer.num_heads * config.layer.head_dim :])
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
        both = draft_input(tokens, states, self.input_weights(embedding))
        residual = both[:, states.shape[1] :] if self.config.norm_before_residual else states
        hidden, normed = linear_add(attend(linear(both, self._qkv)), self._output, residual, self.mlp_norm, self.eps)
        gated = norm_gated(hidden, self.mlp_norm, self.eps, self._gate_up, normed)
        hidden, _ = linear_add(gated, self._down, hidden, self.norm, self.eps)
        return norm(hidden, self.norm, self.eps) if self.config.norm_output else hidden

    def input_weights(self, embedding: Tensor) -> InputWeights:
        """What makes the normalised input [T, 2 * H] of rows from tokens, by embedding [V, H], and states."""
        return InputWeights(embedding, self.input_norm, self.hidden_norm, self.eps)

    def keys_values(self, both: Tensor) -> Tensor:
        """Keys and values alone, [T, 2 * kv_heads * dim], of inputs [T, 2 * H]."""
        return linear(both, self._keys_values)

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
    """Drafts a tree, a pass of the network for each depth.

    In the cache it keeps, for every token that the target has seen, the network's keys and values and the fused state
    that the row after needs. All follow from the tokens up to there, so a cached prefix has them for whoever shares it.
    """

    kind = "eagle3"
    lengths = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)  # of chains, in deterministic mode

    def __init__(self, config: ResolvedConfig, model: Model, checkpoint: DraftCheckpoint | None = None) -> None:
        super().__init__(config, model, checkpoint)
        self.network = Eagle3Network(self.draft_config, self.take_tensors())
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
        plane, weights = cache.plane("draft_states", 0), self.network.input_weights(self.embedding)
        states = self.network.fuse(features)
        both = keep_states(batch, plane, cache.page_size, tokens, states, draft, weights)
        self._write(batch, cache, self.network.keys_values(both), num_heads=0)

    def guess(self, batch: DraftBatch, depth: int, width: int, beams: int = 1) -> Guesses:
        """See TrainedDrafter. Several beams make a tree like EAGLE-2's (Li et al. 2024, arXiv 2406.16858)."""
        if beams > 1 and depth > 1:
            return self._guess_tree(batch, depth, width, beams)
        cache = batch.cache
        layout = chain_layout(batch.state, batch.slots, batch.page_table, depth, cache.page_size)
        tokens = layout.roots
        guesses = empty_guesses(batch, depth, width)
        for step in range(depth):
            rows = layout.batch(step, cache.page_size, hides_first=True)
            if step == 0:
                states = last_states(rows, cache.plane("draft_states", 0), cache.page_size)
            attend = functools.partial(self._attend, rows, cache)
            states = self.network.forward(tokens, self.embedding, states, attend)
            tokens = self.choose(batch, self.network.logits(states), layout.positions[step + 1], guesses, step)
        return guesses

    def _guess_tree(self, batch: DraftBatch, depth: int, width: int, num_beams: int) -> Guesses:
        """`guess` by passes over several rows a request, after the first pass."""
        cache, size = batch.cache, batch.cache.page_size
        layout = beam_layout(batch.state, batch.slots, batch.page_table, depth, num_beams, size)
        guesses = empty_tree(batch, depth, width)
        tokens, slots, after, beams = layout.roots, batch.slots, layout.first_positions[1], None
        for step in range(depth):
            rows = layout.batch(step, None if beams is None else beams.mask, size)
            if beams is None:
                states = last_states(rows, cache.plane("draft_states", 0), size)
            else:
                assert beams.states is not None, "they are those of the pass before"
                tokens, states, slots, after = beams.tokens, beams.states, layout.slots, layout.positions[step + 1]
            states = self.network.forward(tokens, self.embedding, states, functools.partial(self._attend, rows, cache))
            found, logprobs = self.candidates(batch, self.network.logits(states), slots, after)
            going_on = num_beams if step + 1 < depth else 0
            beams = extend_beams(guesses, step, found, logprobs, states, beams, going_on)
        return guesses

    def _write(self, batch: AttentionBatch, cache: KVCache, qkv: Tensor, num_heads: int) -> Tensor:
        """Writes keys and values to the cache; the `num_heads` queries before them."""
        keys, values = cache.plane("draft_keys", 0), cache.plane("draft_values", 0)
        norms = self.network.head_norms
        return rope_and_cache(qkv, self.rope, batch.positions, batch.locations, keys, values, num_heads, norms)

    def _attend(self, batch: AttentionBatch, cache: KVCache, qkv: Tensor) -> Tensor:
        query = self._write(batch, cache, qkv, self._num_heads)
        keys, values = cache.plane("draft_keys", 0), cache.plane("draft_values", 0)
        return paged_attention(query, keys, values, batch, cache.page_size, self._scale).flatten(1)
