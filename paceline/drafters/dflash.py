"""DFlash (arXiv 2602.06036): a block of tokens in one pass; with DSpark's Markov and confidence heads (arXiv 2607.05147)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch
from paceline.drafters.checkpoint import DraftCheckpoint
from paceline.drafters.config import DraftConfig
from paceline.drafters.trained import TrainedDrafter, chain, roots_of, unpacked
from paceline.errors import BadDrafter
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout, Plane
from paceline.models.base import Model
from paceline.ops.attention import AttentionBatch, paged_attention
from paceline.ops.draft import Draft
from paceline.ops.join_drafts import Guesses
from paceline.ops.layout import decode_layout, owners
from paceline.ops.linear import linear, linear_add, norm, norm_gated, norm_linear
from paceline.ops.rope import rope_and_cache
from paceline.ops.weight import Weight, prepare

Attend = Callable[[int, Tensor], Tensor]
_LEAST_REST = 1e-6  # probability that a first candidate leaves to the others


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
        make: Callable[..., Weight] = unpacked if training else prepare
        self.config = config
        self.eps = config.layer.rms_norm_eps
        self.layers = [_Layer(config, tensors, index, make) for index in range(config.layer.num_layers)]
        self.hidden_norm: Tensor = tensors["hidden_norm.weight"]
        self.norm: Tensor = tensors["norm.weight"]
        self._fc = make(tensors["fc.weight"])
        matrix = tensors.get("lm_head.weight", head)
        assert matrix is not None, "a drafter without a head needs the target's"
        self._head = make(matrix)
        self.has_markov = config.markov_rank > 0
        if self.has_markov:
            self._markov_embedding = tensors["markov_head.markov_w1.weight"]
            self._markov_output = make(tensors["markov_head.markov_w2.weight"])
        if config.confidence_head:
            self._confidence = (tensors["confidence_head.proj.weight"], tensors["confidence_head.proj.bias"])

    def context(self, features: Tensor) -> Tensor:
        """features [T, F * target H], side by side in the order of `config.features` -> [T, H], what all layers read."""
        return norm(linear(features, self._fc), self.hidden_norm, self.eps)

    def keys_values(self, layer: int, context: Tensor) -> Tensor:
        """context [T, H] -> one layer's keys, neither normalised nor rotated, and values, [T, 2 * kv_heads * dim]."""
        return linear(context, self.layers[layer].keys_values)

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
        return linear(self._markov_embedding[tokens], self._markov_output)

    def confidence(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logit [T] float32 of each row's draft being accepted; tokens [T] are the target's before the drafted ones."""
        inputs = [hidden, self._markov_embedding[tokens]] if self.has_markov else [hidden]
        weight, bias = self._confidence
        return torch.nn.functional.linear(torch.cat(inputs, dim=-1).float(), weight.float(), bias.float())[:, 0]


class _Layer:
    """A layer's weights: those of the target's families, with norms of the heads where `config.layer.qk_norm` says so."""

    def __init__(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], index: int, make: Callable[..., Weight]
    ) -> None:
        prefix, width = f"layers.{index}.", config.layer.num_heads * config.layer.head_dim
        layer = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        qkv = torch.cat([layer[f"self_attn.{part}_proj.weight"] for part in "qkv"])
        self.input_norm: Tensor = layer["input_layernorm.weight"]
        self.mlp_norm: Tensor = layer["post_attention_layernorm.weight"]
        self.qkv = make(qkv)
        self.keys_values = make(qkv[width:])
        self.output = make(layer["self_attn.o_proj.weight"])
        self.gate_up = make(torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]), gated=True)
        self.down = make(layer["mlp.down_proj.weight"])
        self.head_norms: tuple[Tensor, Tensor, float] | None = None
        if config.layer.qk_norm:
            norms = layer["self_attn.q_norm.weight"], layer["self_attn.k_norm.weight"]
            self.head_norms = (*norms, config.layer.rms_norm_eps)


class _Block(NamedTuple):
    """What one pass gives for L tokens of B requests and C candidates for each.

    tokens [L, B, C] of the target and their log-probabilities; hidden [L * B, H] that they follow from; before [L * B] the
    token before each, which is the first candidate for it.
    """

    tokens: Tensor
    logprobs: Tensor
    hidden: Tensor
    before: Tensor


class DFlashDrafter(TrainedDrafter):
    """Drafts a chain in one pass of the network, then chooses its tokens left to right by logits and Markov bias.

    In the cache it keeps the keys and values of the context. Those of a block's own rows lie at the places of the tokens
    that are drafted; the pass of the target that follows overwrites them. So a draft of fewer tokens has a shorter block,
    which the trainer prepares the network for.
    """

    kind = "dflash"

    def __init__(self, config: ResolvedConfig, model: Model, checkpoint: DraftCheckpoint | None = None) -> None:
        super().__init__(config, model, checkpoint)
        self.network = DFlashNetwork(self.draft_config, self.take_tensors(), self.head)
        layer = self.draft_config.layer
        self._num_heads = layer.num_heads
        self._scale = 1.0 / math.sqrt(layer.head_dim)
        self._dtype = model.dtype
        self._skipped = (
            self.draft_config.block_size - self.draft_config.num_drafted
        )  # 1 where the anchor's row drafts nothing
        longest = self.draft_config.num_drafted
        self.most_guesses = min(self.most_guesses, longest)
        self.lengths = (*range(min(longest, 8)), *range(8, longest, 2), longest)

    def layout(self, page_size: int) -> CacheLayout:
        layer = self.draft_config.layer
        heads = (layer.num_kv_heads, layer.head_dim)
        names = ("draft_keys", "draft_values")
        return CacheLayout(page_size, tuple(Plane(name, layer.num_layers, heads, self._dtype) for name in names))

    def remember(
        self, tokens: Tensor, features: Tensor, draft: Draft | None, batch: AttentionBatch, cache: KVCache
    ) -> None:
        context = self.network.context(features)
        for index in range(len(self.network.layers)):
            self._write(index, self.network.keys_values(index, context), batch, cache, num_heads=0)

    def propose(self, batch: DraftBatch) -> Draft:
        roots, depth, most = roots_of(batch), batch.max_query - 1, self.draft_config.num_drafted
        drafted = roots.new_empty(len(roots), 0)
        if depth:
            drafted = self._block(batch, min(depth, most), 1).tokens[:, :, 0].T
        if depth <= most:
            return chain(roots, drafted, batch.query_starts, batch.num_queries)
        padded = torch.nn.functional.pad(drafted, (0, depth - most))
        draft = chain(roots, padded, batch.query_starts, batch.num_queries)
        return dataclasses.replace(draft, marks=torch.where(draft.depths > most, 0, draft.marks))

    def guess(self, batch: DraftBatch, depth: int, width: int) -> Guesses:
        """See TrainedDrafter; at most `num_drafted` tokens deep. Where there is a confidence head, the first candidate's
        probability is its, and the others share the rest as the logits say.
        """
        block = self._block(batch, min(depth, self.draft_config.num_drafted), width)
        logprobs = block.logprobs
        if self.draft_config.confidence_head:
            logit = self.network.confidence(block.hidden, block.before).view(logprobs.shape[:2])[:, :, None]
            first, others = logprobs.split([1, width - 1], dim=2)
            rest = torch.log1p(-first.exp().clamp(max=1 - _LEAST_REST))
            logprobs = torch.cat([logsigmoid(logit), others - rest + logsigmoid(-logit)], dim=2)
        return Guesses(block.tokens.transpose(0, 1).contiguous(), logprobs.transpose(0, 1).contiguous())

    def _block(self, batch: DraftBatch, length: int, width: int) -> _Block:
        """Drafts `length` tokens after each request's root. Rows of requests with fewer queries count as far as these go."""
        cache, roots = batch.cache, roots_of(batch)
        tokens, attention = self._rows(batch, roots, length)
        embedded = torch.nn.functional.embedding(tokens, self.embedding)
        hidden = self.network.forward(embedded, functools.partial(self._attend, attention, cache))
        steps = torch.arange(length, device=roots.device)[:, None] + self._skipped
        drafting = (attention.query_starts[:-1] + steps).clamp(max=len(hidden) - 1)
        hidden = hidden[drafting.flatten()]
        every = self.network.logits(hidden).view(length, len(roots), -1)
        before, found = [roots], []
        positions = attention.context_lens.long() + 1
        for step, logits in enumerate(every):
            if self.network.has_markov:
                logits = logits + self.network.markov(before[-1])
            found.append(self.choose(batch, logits, positions + step, width))
            before.append(found[-1][0][:, 0].contiguous())
        likeliest, logprobs = (torch.stack(each) for each in zip(*found, strict=True))
        return _Block(likeliest, logprobs, hidden, torch.cat(before[:-1]))

    def _rows(self, batch: DraftBatch, roots: Tensor, length: int) -> tuple[Tensor, AttentionBatch]:
        """Tokens [T] and layout of the blocks that draft up to `length` tokens for each request.

        A block ends within the places of its request's queries: those after them belong to no page of the request's.
        """
        device, count = roots.device, len(roots)
        most = length + self._skipped
        if batch.num_queries == count * batch.max_query:  # known without a look at the device
            num_rows = count * most
            starts = torch.arange(0, num_rows + 1, most, dtype=torch.int32, device=device)
        else:
            counts = (batch.query_starts.diff() + self._skipped - 1).clamp(max=most)
            starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            num_rows = int(starts[-1])
        owner = owners(starts, num_rows)
        depths = torch.arange(num_rows, dtype=torch.int32, device=device) - starts[owner]
        tokens = torch.where(depths == 0, roots[owner], self.draft_config.mask_token)
        zeros = torch.zeros_like(depths)
        rows = Draft(tokens, depths, zeros, branch_starts=zeros)
        size = batch.cache.page_size
        attention = decode_layout(batch.state, batch.slots, starts, rows, batch.page_table, size, most)
        if most > 1:
            attention.branching = True
            attention.tree_mask = torch.full((num_rows, -(-most // 32)), -1, dtype=torch.int32, device=device)
        return tokens, attention

    def _attend(self, batch: AttentionBatch, cache: KVCache, index: int, qkv: Tensor) -> Tensor:
        query = self._write(index, qkv, batch, cache, self._num_heads)
        keys, values = cache.plane("draft_keys", index), cache.plane("draft_values", index)
        return paged_attention(query, keys, values, batch, cache.page_size, self._scale).flatten(1)

    def _write(self, index: int, qkv: Tensor, batch: AttentionBatch, cache: KVCache, num_heads: int) -> Tensor:
        """Writes a layer's keys and values to the cache; the `num_heads` queries before them."""
        keys, values = cache.plane("draft_keys", index), cache.plane("draft_values", index)
        norms = self.network.layers[index].head_norms
        return rope_and_cache(qkv, self.rope, batch.positions, batch.locations, keys, values, num_heads, norms)
