"""Training of EAGLE-3 drafters by the unrolled network ("training-time test", Li et al. 2025, arXiv 2503.01840)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paceline.drafters.config import DraftConfig
from paceline.drafters.eagle3 import Eagle3Network
from paceline.errors import BadDrafter
from paceline.models.config import ModelConfig
from paceline.models.rope import rope_table
from paceline.ops.dispatch import differentiable
from paceline.ops.rope import rotate
from paceline.train.capture import Captured
from paceline.train.flash import FlashUnrolledAttention
from paceline.train.losses import Acceptance, Objective, RowResults, compare, mixed

_QUERIES = 512  # queries whose scores are alive at a time
_LOSS_ROWS = 2048  # rows whose distributions are alive at a time where they are computed in torch
_RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def eagle3_config(
    target: ModelConfig, digest: str, draft_vocab_size: int, intermediate_size: int | None
) -> DraftConfig:
    """A drafter for a target: one layer of its widths, over the states after its second, middle and fourth last layer."""
    count = target.num_layers
    layer = dataclasses.replace(
        target,
        family="llama",
        num_layers=1,
        intermediate_size=intermediate_size or target.intermediate_size,
        tie_embeddings=False,
        attention_bias=False,
        qk_norm=False,
        experts=None,
    )
    features = tuple(sorted({min(2, count), count // 2, max(0, count - 3)}))
    return DraftConfig("eagle3", layer, features, target.hidden_size, draft_vocab_size, digest)


class Eagle3Trainee:
    """The network's part of a trainer: its first weights, and its loss over a captured batch.

    All of it is a function of the tensors it is given; `embedding` [V, H] and `head` [Vd, H] are the target's.
    """

    def __init__(
        self, config: DraftConfig, embedding: Tensor, head: Tensor, num_steps: int, objective: Objective
    ) -> None:
        """Raises BadDrafter for a drafter that cannot be trained."""
        if config.layer.qk_norm:
            raise BadDrafter(
                "an EAGLE-3 drafter with norms of queries and keys can be used, but not trained or evaluated"
            )
        self.config = config
        self.num_steps = num_steps
        self.objective = objective
        self._embedding, self._head = embedding, head
        self._rope = torch.empty(0)

    def initial(self, seed: int, captured: Callable[[], Captured] | None = None) -> dict[str, Tensor]:
        """Weights to begin with, float32 on the CPU: small random matrices, the mean of the states as `fc`."""
        layer, width = self.config.layer, self.config.layer.hidden_size
        draw = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=draw) * (scale / math.sqrt(columns))

        heads, dim, inner = layer.num_heads, layer.head_dim, layer.intermediate_size
        count = len(self.config.features)
        fuse = matrix(width, count * self.config.target_hidden_size, 0.5)
        if self.config.target_hidden_size == width:
            fuse += torch.eye(width).repeat(1, count) / count
        # first logits of unit variance: with a norm of ones they are as large as the target's, and mostly wrong
        quiet = 1 / float(self._head.float().norm(dim=-1).mean())
        tensors = {"fc.weight": fuse, "norm.weight": torch.full((width,), quiet)}
        base = "layers.0."
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            tensors[f"{base}{name}.weight"] = torch.ones(width)
        for name, number in (("q", heads), ("k", layer.num_kv_heads), ("v", layer.num_kv_heads)):
            tensors[f"{base}self_attn.{name}_proj.weight"] = matrix(number * dim, 2 * width)
        tensors[f"{base}self_attn.o_proj.weight"] = matrix(width, heads * dim, 0.5)
        for name in ("gate", "up"):
            tensors[f"{base}mlp.{name}_proj.weight"] = matrix(inner, width)
        tensors[f"{base}mlp.down_proj.weight"] = matrix(width, inner, 0.5)
        return tensors

    def loss(self, tensors: Mapping[str, Tensor], batch: Captured, acceptance: Acceptance) -> Tensor:
        """The objective summed over supervised rows (not their mean); adds to `acceptance` what would be accepted.

        `tensors` are in the dtype to compute in. Gradients flow to those that require them.
        """
        dtype = tensors["fc.weight"].dtype
        head = self._head.to(dtype)
        with differentiable():
            network = Eagle3Network(self.config, tensors, head, training=True)
            total = torch.zeros((), device=batch.tokens.device)
            shares = self.objective.weights(self.num_steps)
            for k, states in enumerate(self.unrolled(network, batch)):
                inside = batch.weights * (batch.depths >= k)
                hidden = states.index_select(0, (batch.places - k).clamp(min=0))
                results = _results(network, hidden, batch)
                total = total + shares[k] * mixed(self.objective, results, inside)
                acceptance.add(k, results, inside, batch.continues, batch.tasks)
        return total

    def unrolled(self, network: Eagle3Network, batch: Captured) -> Iterator[Tensor]:
        """For k = 0, 1, ... the states [B * S, H] that the network gives for row r + k of a draft whose root is row r.

        Entry r is always that of root r. Row r + k reads token r + k (the text's own, not the draft), the state of row
        r + k - 1 (at k = 0 the target's), and the keys of rows up to r, which have the target's states, and of the draft's
        own rows; the key of a document's row 0 is hidden from all other rows. That is what an engine computes from a root
        on, for all roots at once. Entries whose row r + k lies in another document are meaningless.
        """
        dtype = network.input_norm.dtype
        length = batch.tokens.shape[1]
        fused = network.fuse(batch.features.to(dtype))
        before = fused.roll(1, 0)
        states = torch.where((batch.positions.flatten() > 0)[:, None], before, torch.zeros_like(before))
        embedding = self._embedding.to(dtype)
        flash = dtype != torch.float32 and batch.tokens.device.type == "cuda"
        kind = FlashUnrolledAttention if flash else _UnrolledAttention
        attention = kind(self.config.layer, batch, self._table(length + self.num_steps, batch))
        for k in range(self.num_steps):
            shifted = batch.tokens.roll(-k, 1).flatten()
            states = network.forward(shifted, embedding, states, attention)
            yield states

    def _table(self, length: int, batch: Captured) -> Tensor:
        if len(self._rope) < length:
            self._rope = rope_table(self.config.layer, length).to(batch.tokens.device)
        return self._rope


def _results(network: Eagle3Network, hidden: Tensor, batch: Captured) -> RowResults:
    """The comparison of each of the batch's N places with the draft's hidden states [N, H]."""
    if hidden.device.type == "cuda":  # its kernels keep nothing but the logits
        return compare(network.logits(hidden), batch.logits, batch.normaliser, batch.choice)
    parts = []
    for first in range(0, len(hidden), _LOSS_ROWS):
        rows = slice(first, first + _LOSS_ROWS)
        target = (batch.logits[rows], batch.normaliser[rows], batch.choice[rows])
        parts.append(checkpoint(_compared, network, hidden[rows], *target, **_RECOMPUTED))
    return RowResults(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _compared(
    network: Eagle3Network, hidden: Tensor, target: Tensor, normaliser: Tensor, choice: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with differentiable():  # again, since the backward pass may run this in a thread of its own
        return tuple(compare(network.logits(hidden), target, normaliser, choice))  # type: ignore[return-value]


class _UnrolledAttention:
    """Attention of the steps k = 0, 1, ..., called once a step in that order.

    Query r sees the keys of step 0 of its document from the second up to r, and its own keys of the steps since: entry r of
    each. A document's first query has no key of the former kind; in step 0 it sees its own.
    """

    def __init__(self, layer: ModelConfig, batch: Captured, table: Tensor) -> None:
        self._layer, self._documents, self._positions, self._table = layer, batch.documents, batch.positions, table
        self._keys: list[Tensor] = []  # of each step [B, kv_heads, S, dim]
        self._values: list[Tensor] = []

    def __call__(self, qkv: Tensor) -> Tensor:
        """qkv [B * S, (heads + 2 kv_heads) * dim] -> [B * S, heads * dim]."""
        layer, (count, length) = self._layer, self._documents.shape
        num_kv, dim = layer.num_kv_heads, layer.head_dim
        heads = qkv.view(len(qkv), -1, dim)
        turned, value = heads.split([layer.num_heads + num_kv, num_kv], dim=1)
        cosines, sines = self._table[self._positions.flatten() + len(self._keys)][:, None].chunk(2, dim=-1)
        turned = rotate(turned, cosines, sines).view(count, length, -1, dim).transpose(1, 2)
        query, key = turned.split([layer.num_heads, num_kv], dim=1)
        self._keys.append(key)
        self._values.append(value.view(count, length, num_kv, dim).transpose(1, 2))
        query = query.reshape(count, num_kv, -1, length, dim)
        own_keys, own_values = (
            torch.stack(each[1:], 3) if len(each) > 1 else None for each in (self._keys, self._values)
        )
        parts = []
        for first in range(0, length, _QUERIES):
            last = min(first + _QUERIES, length)
            queries = slice(first, last)
            own = [None if each is None else each[:, :, queries] for each in (own_keys, own_values)]
            visible = self._documents[:, queries, None] == self._documents[:, None, :last]
            ahead = self._place(0, last) - self._place(first, last)[:, None]
            alone = (ahead == 0) & (len(self._keys) == 1)
            visible = visible & (ahead <= 0) & (alone | (self._positions[:, None, :last] > 0))
            inputs = (query[:, :, :, queries], self._keys[0][:, :, :last], self._values[0][:, :, :last], *own)
            parts.append(checkpoint(_attend, *inputs, visible, **_RECOMPUTED))
        joined = torch.cat(parts, dim=3)  # [B, kv_heads, group, S, dim]
        return joined.permute(0, 3, 1, 2, 4).reshape(len(qkv), -1)

    def _place(self, first: int, last: int) -> Tensor:
        return torch.arange(first, last, device=self._documents.device)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor | None, own_values: Tensor | None, visible: Tensor
) -> Tensor:
    """query [B, kv, group, C, dim] over keys and values [B, kv, E, dim], as `visible` [B, C, E] says, and over those of
    its own row, [B, kv, C, k, dim], in one softmax. -> [B, kv, group, C, dim]
    """
    count, num_kv, group, rows, dim = query.shape
    end = keys.shape[2]
    scaled = query * (1 / math.sqrt(dim))
    scores = scaled.reshape(count, num_kv, group * rows, dim) @ keys.transpose(-1, -2)
    scores = scores.view(count, num_kv, group, rows, end).masked_fill(~visible[:, None, None], -math.inf)
    if own_keys is not None:
        own = torch.einsum("bhgcd,bhckd->bhgck", scaled, own_keys)
        scores = torch.cat([scores, own], dim=-1)
    shares = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    result = (shares[..., :end].reshape(count, num_kv, group * rows, end) @ values).view(query.shape)
    if own_values is not None:
        result = result + torch.einsum("bhgck,bhckd->bhgcd", shares[..., end:], own_values)
    return result
