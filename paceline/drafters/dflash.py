"""DFlash (arXiv 2602.06036): a block of tokens in one pass; with DSpark's Markov and confidence heads (arXiv 2607.05147)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch
from paceline.drafters.checkpoint import DraftCheckpoint
from paceline.drafters.config import DraftConfig
from paceline.drafters.trained import TrainedDrafter, chain, empty_guesses, empty_tree, roots_of, rounded, unpacked
from paceline.errors import BadDrafter
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout, Plane
from paceline.models.base import Model
from paceline.ops.attention import AttentionBatch, paged_attention
from paceline.ops.beams import extend_beams
from paceline.ops.chain_layout import BlockLayout, block_layout
from paceline.ops.choose import MAX_CANDIDATES, TokenBias
from paceline.ops.confidence import ConfidenceHead, confidence
from paceline.ops.draft import Draft
from paceline.ops.draft_states import keep_layers
from paceline.ops.join_drafts import Guesses
from paceline.ops.linear import linear, linear_add, norm, norm_gated, norm_linear
from paceline.ops.rope import rope_and_cache
from paceline.ops.weight import Dense, Weight, prepare

Attend = Callable[[int, Tensor], Tensor]


class DFlashNetwork:
    """The network, for the engine and the trainer alike.

    The rows of a block are the anchor, the last known token, and mask tokens at the positions after it. In every layer a row
    sees the context, which is all tokens before the anchor, and all rows of its block, later ones too. A context token's key
    and value are projections of the target's hidden states at that token; the layers do not change them. So they are
    computed with the target's own, and live in its pages.
    """

    def __init__(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], head: Tensor | None = None, training: bool = False
    ) -> None:
        """`tensors` as in drafters/checkpoint.py. `head` [draft vocabulary, H] serves where they have no lm_head.weight.

        While training, weights stay views of `tensors`, through which gradients flow; else they are packed for the device.
        """
        if config.norm_before_fc or config.fc_norm:
            raise BadDrafter("a block drafter has no norms before fc, and this one's config asks for them")
        make: Callable[..., Weight] = unpacked if training else rounded
        self.config = config
        self.eps = config.layer.rms_norm_eps
        count = config.layer.num_layers
        self.layers = [_Layer(config, tensors, index, make) for index in range(count)]
        self.hidden_norm: Tensor = tensors["hidden_norm.weight"]
        self.norm: Tensor = tensors["norm.weight"]
        self._fc = make(tensors["fc.weight"])
        pairs = [[tensors[f"layers.{index}.self_attn.{part}_proj.weight"] for part in "kv"] for index in range(count)]
        self._keys_values = make(torch.cat([each for pair in pairs for each in pair]))
        matrix = tensors.get("lm_head.weight", head)
        assert matrix is not None, "a drafter without a head needs the target's"
        self._head = make(matrix)
        self.has_markov = config.markov_rank > 0
        markov: Tensor | None = None
        if self.has_markov:
            markov = self._markov_embedding = tensors["markov_head.markov_w1.weight"]
            output = tensors["markov_head.markov_w2.weight"]
            self._markov_output = unpacked(output) if training else prepare(output)  # ops.choose reads it as it is
        self.confidence_head: ConfidenceHead | None = None
        if config.confidence_head:
            weight, bias = (tensors[f"confidence_head.proj.{name}"] for name in ("weight", "bias"))
            self.confidence_head = ConfidenceHead(weight, bias, markov)

    def context(self, features: Tensor) -> Tensor:
        """features [T, F * target H], side by side in the order of `config.features` -> [T, H], what all layers read."""
        return norm(linear(features, self._fc), self.hidden_norm, self.eps)

    def keys_values(self, layer: int, context: Tensor) -> Tensor:
        """One layer's part of `every_keys_values`, [T, 2 * kv_heads * dim], of context [T, H]; while training."""
        assert isinstance(self._keys_values, Dense)
        return linear(context, Dense(self._keys_values.matrix.chunk(len(self.layers))[layer]))

    def every_keys_values(self, features: Tensor) -> Tensor:
        """features as in `context` -> each layer's keys, neither normalised nor rotated, and values.

        [T, layers * 2 * kv_heads * dim].
        """
        return norm_linear(linear(features, self._fc), self.hidden_norm, self.eps, self._keys_values)

    def key_norms(self) -> tuple[Tensor, float] | None:
        """The norms of all layers' keys, as `ops.draft_states.keep_layers` takes them."""
        norms = [each.head_norms[1] for each in self.layers if each.head_norms is not None]
        return (torch.stack(norms), self.eps) if norms else None

    def forward(self, embedded: Tensor, attend: Attend) -> Tensor:
        """embedded [T, H] rows of blocks -> [T, H], normalised. `attend` maps (layer, qkv [T, ...]) to [T, heads * dim].

        `embedded` may be overwritten.
        """
        hidden, normed = embedded, None
        norms = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        for index, (layer, next_norm) in enumerate(zip(self.layers, norms, strict=True)):
            qkv = norm_linear(hidden, layer.input_norm, self.eps, layer.qkv, normed)
            hidden, normed = linear_add(attend(index, qkv), layer.output, hidden, layer.mlp_norm, self.eps)
            gated = norm_gated(hidden, layer.mlp_norm, self.eps, layer.gate_up, normed)
            hidden, normed = linear_add(gated, layer.down, hidden, next_norm, self.eps)
        return norm(hidden, self.norm, self.eps) if normed is None else normed

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, H], as `forward` gives it -> [T, draft vocabulary], without the bias of the token before."""
        return linear(hidden, self._head)

    def markov(self, tokens: Tensor) -> Tensor:
        """What the target's tokens [T] add to the logits of the tokens after them, [T, draft vocabulary]."""
        return self.markov_bias(tokens).product()

    def markov_bias(self, tokens: Tensor) -> TokenBias:
        """The same, not yet multiplied."""
        return TokenBias(tokens, self._markov_embedding, self._markov_output)

    def confidence(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logit [T] float32 of each row's draft being accepted; tokens [T] are the target's before the drafted ones."""
        assert self.confidence_head is not None
        return self.confidence_head.logits(hidden, tokens)


class _Layer:
    """A layer's weights: those of the target's families, with norms of the heads where `config.layer.qk_norm` says so."""

    def __init__(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], index: int, make: Callable[..., Weight]
    ) -> None:
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        qkv = torch.cat([layer[f"self_attn.{part}_proj.weight"] for part in "qkv"])
        self.input_norm: Tensor = layer["input_layernorm.weight"]
        self.mlp_norm: Tensor = layer["post_attention_layernorm.weight"]
        self.qkv = make(qkv)
        self.output = make(layer["self_attn.o_proj.weight"])
        self.gate_up = make(torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]), gated=True)
        self.down = make(layer["mlp.down_proj.weight"])
        self.head_norms: tuple[Tensor, Tensor, float] | None = None
        if config.layer.qk_norm:
            norms = layer["self_attn.q_norm.weight"], layer["self_attn.k_norm.weight"]
            self.head_norms = (*norms, config.layer.rms_norm_eps)


class _Block(NamedTuple):
    """What one pass gives for L tokens after the roots [B]: guesses [B, L, C], and hidden [L * B, H] that they follow from."""

    roots: Tensor
    guesses: Guesses
    hidden: Tensor


class DFlashDrafter(TrainedDrafter):
    """Drafts a block in one pass of the network, then chooses its tokens left to right by logits and Markov bias.

    In the cache it keeps the keys and values of the context. Those of a block's own rows lie at the places of the tokens
    that are drafted; the pass of the target that follows overwrites them. So a draft of fewer tokens has a shorter block,
    which the trainer prepares the network for.
    """

    kind = "dflash"
    one_pass = True
    candidates_each = MAX_CANDIDATES

    def __init__(self, config: ResolvedConfig, model: Model, checkpoint: DraftCheckpoint | None = None) -> None:
        super().__init__(config, model, checkpoint)
        self.network = DFlashNetwork(self.draft_config, self.take_tensors())
        self._key_norms = self.network.key_norms()
        layer = self.draft_config.layer
        self._num_heads = layer.num_heads
        self._scale = 1.0 / math.sqrt(layer.head_dim)
        self._dtype = model.dtype
        longest = self.draft_config.num_drafted
        self._skipped = self.draft_config.block_size - longest  # 1 where the anchor's row drafts nothing
        if self.trees is None:
            self.lengths = (*range(min(longest, 8)), *range(8, longest, 2), longest)

    def layout(self, page_size: int) -> CacheLayout:
        layer = self.draft_config.layer
        heads = (layer.num_kv_heads, layer.head_dim)
        names = ("draft_keys", "draft_values")
        return CacheLayout(page_size, tuple(Plane(name, layer.num_layers, heads, self._dtype) for name in names))

    def remember(
        self, tokens: Tensor, features: Tensor, draft: Draft | None, batch: AttentionBatch, cache: KVCache
    ) -> None:
        layers = range(len(self.network.layers))
        keys, values = ([cache.plane(name, index) for index in layers] for name in ("draft_keys", "draft_values"))
        states = self.network.every_keys_values(features)
        keep_layers(states, self.rope, batch.positions, batch.locations, keys, values, self._key_norms)

    def propose_chain(self, batch: DraftBatch) -> Draft:
        depth, most = batch.max_query - 1, self.draft_config.num_drafted
        if depth == 0:
            roots = roots_of(batch)
            return chain(roots, roots.new_empty(len(roots), 0), batch.query_starts, batch.num_queries)
        roots, guesses, _ = self._block(batch, min(depth, most), 1)
        drafted = guesses.tokens[:, :, 0]
        if depth <= most:
            return chain(roots, drafted, batch.query_starts, batch.num_queries)
        padded = torch.nn.functional.pad(drafted, (0, depth - most))
        draft = chain(roots, padded, batch.query_starts, batch.num_queries)
        return dataclasses.replace(draft, marks=torch.where(draft.depths > most, 0, draft.marks))

    def guess(self, batch: DraftBatch, depth: int, width: int, beams: int = 1) -> Guesses:
        """See TrainedDrafter; at most `num_drafted` tokens deep.

        Where there is a confidence head, the first candidate's probability in a chain is its, and the others share the rest as
        the logits say. In a tree all probabilities are the logits': the head would need the hidden states of each depth once
        more for every beam.
        """
        block = self._block(batch, min(depth, self.draft_config.num_drafted), width, beams)
        head = self.network.confidence_head
        if head is None or beams > 1:
            return block.guesses
        return dataclasses.replace(block.guesses, logprobs=confidence(block.guesses, block.roots, block.hidden, head))

    def _block(self, batch: DraftBatch, length: int, width: int, beams: int = 1) -> _Block:
        """Drafts `length` tokens after each request's root. Rows of requests with fewer queries count as far as these go."""
        count, num_rows, mask = len(batch.slots), length + self._skipped, self.draft_config.mask_token
        starts = None if batch.is_uniform else self._starts(batch, num_rows)
        size = batch.cache.page_size
        layout = block_layout(batch.state, batch.slots, batch.page_table, num_rows, mask, size, starts)
        embedded = torch.nn.functional.embedding(layout.tokens, self.embedding)
        hidden = self.network.forward(embedded, functools.partial(self._attend, layout.batch, batch.cache))
        if starts is None:
            blocks = hidden.view(count, num_rows, -1)
            hidden = blocks[:, self._skipped :].transpose(0, 1).flatten(0, 1)
        else:
            steps = torch.arange(length, device=hidden.device)[:, None] + self._skipped
            drafting = (starts[:-1] + steps).clamp(max=len(hidden) - 1)
            hidden = hidden[drafting.flatten()]
        every = self.network.logits(hidden).view(length, count, -1)
        if beams > 1:
            return _Block(layout.roots, self._tree(batch, layout, every, width, beams), hidden)
        return _Block(layout.roots, self._chain(batch, layout, every, width), hidden)

    def _chain(self, batch: DraftBatch, layout: BlockLayout, every: Tensor, width: int) -> Guesses:
        """The guesses [B, L, width] along the path of first choices, by logits `every` [L, B, draft vocabulary] and bias."""
        guesses, before = empty_guesses(batch, len(every), width), layout.roots
        for step, logits in enumerate(every):
            before = self.choose(batch, logits, layout.positions[step], guesses, step, self._bias(before))
        return guesses

    def _tree(self, batch: DraftBatch, layout: BlockLayout, every: Tensor, width: int, num_beams: int) -> Guesses:
        """The guesses of a beam search by the same. Beams at the same depth differ by their token's bias and their score."""
        guesses, before, beams = empty_tree(batch, len(every), width), layout.roots, None
        for step, logits in enumerate(every):
            rows = 1 if beams is None else num_beams
            places = batch.slots, layout.positions[step]
            found, logprobs = self.candidates(batch, logits, *places, rows, self._bias(before))
            going_on = num_beams if step + 1 < len(every) else 0
            beams = extend_beams(guesses, step, found, logprobs, None, beams, going_on)
            if beams is not None:
                before = beams.tokens
        return guesses

    def _bias(self, before: Tensor) -> TokenBias | None:
        return self.network.markov_bias(before) if self.network.has_markov else None

    def _starts(self, batch: DraftBatch, most: int) -> Tensor:
        """Where blocks of at most `most` rows begin, [B + 1] int32.

        A block ends within the places of its request's queries: those after them belong to no page of the request's.
        """
        counts = (batch.query_starts.diff() + self._skipped - 1).clamp(max=most)
        return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))

    def _attend(self, batch: AttentionBatch, cache: KVCache, index: int, qkv: Tensor) -> Tensor:
        keys, values = cache.plane("draft_keys", index), cache.plane("draft_values", index)
        places, norms = (batch.positions, batch.locations), self.network.layers[index].head_norms
        query = rope_and_cache(qkv, self.rope, *places, keys, values, self._num_heads, norms)
        return paged_attention(query, keys, values, batch, cache.page_size, self._scale).flatten(1)
