"""Training of block drafters: DFlash (arXiv 2602.06036) with the heads and the loss of DSpark (arXiv 2607.05147)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, embedding
from torch.utils.checkpoint import checkpoint

from paceline.drafters.checkpoint import tensor_shapes
from paceline.drafters.config import DraftConfig
from paceline.drafters.dflash import DFlashNetwork
from paceline.errors import ConfigError
from paceline.models.config import ModelConfig
from paceline.models.rope import rope_table
from paceline.ops.dispatch import differentiable
from paceline.ops.linear import rms_norm
from paceline.ops.rope import rotate
from paceline.train.capture import Captured
from paceline.train.flash import Documents, SharedAndOwn
from paceline.train.look_back import look_back
from paceline.train.losses import Acceptance, RowResults, compare
from paceline.train.samples import Sample

_LOSS_ROWS = 2048  # rows whose distributions are alive at a time where they are computed in torch
_QUERIES = 512  # rows of blocks whose scores are alive at a time
_RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
_SHORT = 0.25  # share of batches whose blocks are shorter than the longest: the engine runs those for shorter drafts
_NUM_FEATURES = 5


@dataclass(frozen=True)
class BlockObjective:
    """What training minimises, over the L drafted positions j = 0, 1, ... with weights exp(-j / gamma) that sum to 1.

    gamma is `reach` * (L + 1): 4 at 7 positions and about 8 at 15, as DFlash's and DSpark's authors have it.

    kl * KL + (1 - kl) * TV + confidence * BCE: the cross entropy to the target's distribution over the draft vocabulary,
    1 - sum of min(p, q), and the binary cross entropy of the confidence head to sum of min(p, q). The share kl is
    cross_entropy + (1 - cross_entropy) * exp(-kl_decay * mean acceptance), from KL at first towards TV, which has next to no
    gradient where the distributions hardly overlap (LK losses, arXiv 2602.23881). An infinite kl_decay is DSpark's loss.
    `share` of the places where a draft may begin are drafted from at a time.
    """

    cross_entropy: float = 0.1
    kl_decay: float = 3.0
    confidence: float = 1.0
    reach: float = 0.5
    share: float = 0.5

    def __post_init__(self) -> None:
        """Raises ConfigError for values that nothing can be learnt with."""
        shares = 0 <= self.cross_entropy <= 1 and 0 < self.share <= 1
        if not shares or min(self.kl_decay, self.confidence) < 0 or self.reach <= 0:
            raise ConfigError(
                "a block's losses need shares from 0 to 1, a kl_decay and a confidence of 0 or more and a reach above 0"
            )

    def mixed(self, rows: RowResults, confidence: Tensor | None, weights: Tensor) -> Tensor:
        """The sum over drafted tokens [A, L], each by its weight; `confidence` [A, L] are the head's logits."""
        rate = (1 - rows.refused.detach()).clamp(0, 1)
        mean = (rate * weights).sum() / weights.sum().clamp(min=1e-9)
        kl = self.cross_entropy + (1 - self.cross_entropy) * torch.exp(-self.kl_decay * mean)
        losses = kl * rows.kl + (1 - kl) * rows.refused
        if confidence is not None:
            losses = losses + self.confidence * binary_cross_entropy_with_logits(confidence, rate, reduction="none")
        return (losses * weights).sum()

    def weights(self, count: int, device: torch.device) -> Tensor:
        """Weights [count] float32 of `count` positions."""
        powers = torch.exp(-torch.arange(count, device=device) / (self.reach * (count + 1)))
        return powers / powers.sum()


@dataclass(frozen=True)
class BlockShape:
    """What a block drafter's shapes have of their own; `num_kv_heads` None is `usual_kv_heads` of the target. A `markov_rank`
    of 0 is DFlash without what DSpark adds: no heads, and the anchor's row drafts nothing.
    """

    num_layers: int = 2
    num_drafted: int = 8
    markov_rank: int = 128
    num_kv_heads: int | None = None


def usual_kv_heads(target: ModelConfig) -> int:
    """The fewest heads of keys and values that are half as wide as a hidden state.

    All that a block's rows know of the context comes as values of attention. Targets have fewer heads: their rows carry a
    state of their own from below.
    """
    least, heads = max(target.num_kv_heads, target.hidden_size / (2 * target.head_dim)), target.num_heads
    return next((each for each in range(1, heads) if each >= least and heads % each == 0), heads)


def dflash_config(
    target: ModelConfig,
    digest: str,
    draft_vocab_size: int,
    intermediate_size: int | None,
    mask_token: int,
    shape: BlockShape,
) -> DraftConfig:
    """A drafter for a target: layers of its widths, over states after five layers from the second to the third last."""
    count, has_heads = target.num_layers, shape.markov_rank > 0
    layer = dataclasses.replace(
        target,
        family="qwen3",
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads or usual_kv_heads(target),
        intermediate_size=intermediate_size or target.intermediate_size,
        tie_embeddings=False,
        attention_bias=False,
        qk_norm=True,
        experts=None,
    )
    first, last = min(2, count), max(count - 2, min(2, count))
    features = {first + round((last - first) * each / (_NUM_FEATURES - 1)) for each in range(_NUM_FEATURES)}
    return DraftConfig(
        "dflash",
        layer,
        tuple(sorted(features)),
        target.hidden_size,
        draft_vocab_size,
        digest,
        block_size=shape.num_drafted + (not has_heads),
        mask_token=mask_token,
        sample_from_anchor=has_heads,
        markov_rank=shape.markov_rank,
        confidence_head=has_heads,
    )


def mask_token(table: Tensor, samples: Sequence[Sample]) -> int:
    """A token for the places to be drafted: of those that no sample holds, the first with the most usual embedding.

    table [V, H] are the embeddings. Those of tokens that never occurred in the target's training may be all but zero, and
    a row of zeros attends to nothing.
    """
    norms = table.float().norm(dim=-1)
    distance = (norms - norms.median()).abs().cpu()
    for sample in samples:
        distance[torch.from_numpy(sample.tokens.astype(np.int64))] = torch.inf
    return int(distance.argmin())


@dataclass(frozen=True)
class Blocks:
    """Drafts to train on: `num_rows` rows each, the anchor's first.

    entries  [A] int64: the drafted token 0 is supervised by entry n of the batch, token j by entry n + j
    anchors  [A] int64: the flat place of the anchor, `places[entries]`
    weights  [A] float32: 0 for padding
    """

    entries: Tensor
    anchors: Tensor
    weights: Tensor
    num_rows: int


class DFlashTrainee:
    """The network's part of a trainer: its first weights, and its loss over a captured batch.

    All of it is a function of the tensors it is given; `embedding` [V, H] and `head` [Vd, H] are the target's.
    """

    def __init__(
        self, config: DraftConfig, table: Tensor, head: Tensor, objective: BlockObjective | None = None
    ) -> None:
        self.config = config
        self.num_steps = config.num_drafted
        self.objective = objective or BlockObjective()
        self._skipped = config.block_size - config.num_drafted
        self._embedding, self._head = table, head
        self._rope = torch.empty(0)

    def initial(self, seed: int, captured: Callable[[], Captured] | None = None) -> dict[str, Tensor]:
        """Weights to begin with, float32 on the CPU: small random matrices, the mean of the states as `fc`, no Markov bias.

        Given texts to train on, half of the heads attend to the tokens just before them (train/look_back.py).
        """
        config, draw = self.config, torch.Generator().manual_seed(seed)
        width, count = config.layer.hidden_size, len(config.features)
        quiet = 1 / float(self._head.float().norm(dim=-1).mean())  # first logits of unit variance
        tensors = {}
        for name, shape in tensor_shapes(config)[0].items():
            if name.startswith("confidence_head") or "markov_w2" in name:
                tensors[name] = torch.zeros(shape)
            elif len(shape) == 1:
                tensors[name] = torch.full(shape, quiet if name == "norm.weight" else 1.0)
            else:
                scale = 0.5 if name.startswith("fc") or "o_proj" in name or "down_proj" in name else 1.0
                tensors[name] = torch.randn(shape, generator=draw) * (scale / math.sqrt(shape[1]))
        if config.target_hidden_size == width:
            tensors["fc.weight"] += torch.eye(width).repeat(1, count) / count
        if captured is not None:
            batch, unit, eps = captured(), torch.ones(width, device=self._embedding.device), config.layer.rms_norm_eps
            fused = batch.features[batch.places].float() @ tensors["fc.weight"].T.to(batch.features.device)
            embedded = embedding(batch.tokens.flatten()[batch.places], self._embedding).float()
            look_back(tensors, config, rms_norm(fused, unit, eps), rms_norm(embedded, unit, eps))
        return tensors

    def loss(self, tensors: Mapping[str, Tensor], batch: Captured, acceptance: Acceptance) -> Tensor:
        """The objective's mean over drafts, times the supervised rows; adds to `acceptance` what would be accepted.

        `tensors` are in the dtype to compute in. Gradients flow to those that require them.
        """
        dtype, objective = tensors["fc.weight"].dtype, self.objective
        blocks = self.choose(batch)
        with differentiable():
            network = DFlashNetwork(self.config, tensors, self._head.to(dtype), training=True)
            hidden = self.hidden(network, batch, blocks)
            entries, inside = drafted_entries(batch, blocks, hidden.shape[1])
            results, confidence = self._results(network, hidden, batch, blocks, entries)
        weights = objective.weights(self.num_steps, inside.device)[: inside.shape[1]]
        acceptance.add_drafts(results, inside, batch.continues[entries], batch.tasks[blocks.entries])
        num_drafts = blocks.weights.sum().clamp(min=1)
        return objective.mixed(results, confidence, inside * weights) * (batch.weights.sum() / num_drafts)

    def choose(self, batch: Captured) -> Blocks:
        """Random anchors, which are supervised as their next tokens are; the same ones and whole blocks in an evaluation."""
        count = len(batch.places)
        training = torch.is_grad_enabled()
        draw = None if training else torch.Generator().manual_seed(0)
        order, num_rows = torch.rand(count, generator=draw), self.config.block_size
        if training and torch.rand(()) < _SHORT and num_rows > 1 + self._skipped:
            num_rows = int(torch.randint(1 + self._skipped, num_rows, ()))
        if batch.places.device.type == "cuda":
            order = order.pin_memory().to(batch.places.device, non_blocking=True)
        possible = batch.follows & (batch.weights > 0)
        chosen = (order + possible).topk(math.ceil(count * self.objective.share)).indices
        return Blocks(chosen, batch.places[chosen], possible[chosen].float(), num_rows)

    def hidden(self, network: DFlashNetwork, batch: Captured, blocks: Blocks) -> Tensor:
        """The network's output [A, L, H] at the rows that draft, given the text before each anchor, as in an engine."""
        dtype, device = network.norm.dtype, batch.tokens.device
        steps = torch.arange(blocks.num_rows, device=device)
        tokens = torch.where(steps > 0, self.config.mask_token, batch.tokens.flatten()[blocks.anchors, None])
        attention = _BlockAttention(network, batch, blocks, self._table(batch.tokens.shape[1] + len(steps), device))
        embedded = embedding(tokens.flatten(), self._embedding).to(dtype)
        hidden = network.forward(embedded, attention)
        return hidden.view(*tokens.shape, -1)[:, self._skipped :]

    def logits(self, network: DFlashNetwork, batch: Captured, blocks: Blocks, hidden: Tensor) -> Tensor:
        """The draft's logits [A, L, Vd], each after the text's own token before it."""
        logits = network.logits(hidden.flatten(0, 1))
        if network.has_markov:
            logits = logits + network.markov(_tokens_before(batch, blocks, hidden.shape[1]))
        return logits.view(*hidden.shape[:2], -1)

    def _results(
        self, network: DFlashNetwork, hidden: Tensor, batch: Captured, blocks: Blocks, entries: Tensor
    ) -> tuple[RowResults, Tensor | None]:
        """The comparison of the drafts with the target's distributions, and the confidence head's logits; all [A, L]."""
        rows, flat, before = hidden.flatten(0, 1), entries.flatten(), _tokens_before(batch, blocks, hidden.shape[1])
        size = len(rows) if rows.device.type == "cuda" else _LOSS_ROWS  # kernels there keep nothing but the logits
        parts = []
        for first in range(0, len(rows), size):
            part = slice(first, first + size)
            inputs = (rows[part], before[part], flat[part], batch)
            parts.append(checkpoint(_compared, network, *inputs, **_RECOMPUTED))
        results = RowResults(*(torch.cat(column).view_as(entries) for column in zip(*parts, strict=True)))
        if not self.config.confidence_head:
            return results, None
        return results, network.confidence(rows, before).view_as(entries)

    def _table(self, length: int, device: torch.device) -> Tensor:
        if len(self._rope) < length:
            self._rope = rope_table(self.config.layer, length).to(device)
        return self._rope


def drafted_entries(batch: Captured, blocks: Blocks, length: int) -> tuple[Tensor, Tensor]:
    """The entries [A, L] of the batch that supervise the drafted tokens, and float32 [A, L], 0 where there are none."""
    entries = blocks.entries[:, None] + torch.arange(length, device=blocks.entries.device)
    known = entries < len(batch.places)
    entries = entries.clamp(max=len(batch.places) - 1)
    goes_on = (batch.follows[entries] & known).float()
    goes_on[:, 0] = blocks.weights
    return entries, goes_on.cumprod(1)


def _tokens_before(batch: Captured, blocks: Blocks, length: int) -> Tensor:
    """The text's token [A * L] before each drafted one."""
    places = blocks.anchors[:, None] + torch.arange(length, device=blocks.anchors.device)
    return batch.tokens.flatten()[places.flatten().clamp(max=batch.tokens.numel() - 1)]


def _compared(
    network: DFlashNetwork, hidden: Tensor, before: Tensor, entries: Tensor, batch: Captured
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with differentiable():  # again, since the backward pass may run this in a thread of its own
        logits = network.logits(hidden)
        if network.has_markov:
            logits = logits + network.markov(before)
        return tuple(compare(logits, batch.logits[entries], batch.normaliser[entries], batch.choice[entries]))  # type: ignore[return-value]


class _BlockAttention:
    """Attention of the blocks' rows over their context and over their block, a layer at a time."""

    def __init__(self, network: DFlashNetwork, batch: Captured, blocks: Blocks, table: Tensor) -> None:
        """table [positions, dim] are RoPE's cosines and sines."""
        self._network, self._batch, self._blocks, self._table = network, batch, blocks, table
        self._context = network.context(batch.features.to(network.norm.dtype))
        self._positions = batch.positions.flatten()
        steps = torch.arange(blocks.num_rows, device=table.device)
        self._own_positions = (self._positions[blocks.anchors, None] + steps).flatten()

    def __call__(self, index: int, qkv: Tensor) -> Tensor:
        """qkv [A * M, (heads + 2 kv_heads) * dim] -> [A * M, heads * dim]."""
        layer, blocks = self._network.config.layer, self._blocks
        num_kv, dim = layer.num_kv_heads, layer.head_dim
        query, *own = qkv.view(len(qkv), -1, dim).split([layer.num_heads, num_kv, num_kv], dim=1)
        keys, values = self._network.keys_values(index, self._context).view(-1, 2, num_kv, dim).unbind(1)
        norms = self._network.layers[index].head_norms
        if norms is not None:
            query, own[0], keys = (
                rms_norm(each, weight, norms[2])
                for each, weight in ((query, norms[0]), (own[0], norms[1]), (keys, norms[1]))
            )
        query, own[0] = self._turned(query, self._own_positions), self._turned(own[0], self._own_positions)
        keys = self._turned(keys, self._positions)
        shape = (len(blocks.anchors), blocks.num_rows)
        query, own_keys, own_values = (each.reshape(*shape, -1, dim) for each in (query, *own))
        flash = query.dtype != torch.float32 and query.device.type == "cuda"
        attend = flash_attend if flash else dense_attend
        return attend(query, keys, values, own_keys, own_values, self._batch, blocks).reshape(len(qkv), -1)

    def _turned(self, heads: Tensor, positions: Tensor) -> Tensor:
        cosines, sines = self._table[positions][:, None].chunk(2, dim=-1)
        return rotate(heads, cosines, sines)


def dense_attend(
    query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, batch: Captured, blocks: Blocks
) -> Tensor:
    """Every row of a block over the keys of its document before the anchor, and over those of all rows of its block.

    query [A, M, heads, dim]; keys and values [B * S, kv_heads, dim]; own ones [A, M, kv_heads, dim]. -> as query. One packed
    row at a time; waits for the device.
    """
    length = batch.tokens.shape[1]
    result = torch.zeros_like(query)
    for row in range(len(batch.tokens)):
        mine = (blocks.anchors // length == row).nonzero()[:, 0]
        for part in mine.split(max(1, _QUERIES // blocks.num_rows)):
            place = slice(row * length, (row + 1) * length)
            inputs = (query[part], keys[place], values[place], own_keys[part], own_values[part])
            anchors = blocks.anchors[part] - row * length
            documents = batch.documents[row]
            seen = (documents == documents[anchors, None]) & (
                torch.arange(length, device=keys.device) < anchors[:, None]
            )
            result = result.index_copy(0, part, checkpoint(_attend, *inputs, seen, **_RECOMPUTED))
    return result


def _attend(query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, seen: Tensor) -> Tensor:
    """One packed row's part of `dense_attend`: query [C, M, heads, dim], keys [S, kv_heads, dim], seen [C, S] bool."""
    count, num_rows, _, dim = query.shape
    grouped = query.view(count, num_rows, keys.shape[1], -1, dim) * (1 / math.sqrt(dim))
    scores = torch.einsum("cmhgd,shd->chgms", grouped, keys).float().masked_fill(~seen[:, None, None, None], -math.inf)
    own = torch.einsum("cmhgd,cnhd->chgmn", grouped, own_keys).float()
    shares = torch.cat([scores, own], dim=-1).softmax(-1).to(query.dtype)
    of_context, of_block = shares.split([len(keys), num_rows], dim=-1)
    result = torch.einsum("chgms,shd->cmhgd", of_context, values) + torch.einsum(
        "chgmn,cnhd->cmhgd", of_block, own_values
    )
    return result.reshape(query.shape)


def flash_attend(
    query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, batch: Captured, blocks: Blocks
) -> Tensor:
    """`dense_attend` by flash attention, of anchors that have a place before them in their document.

    The rows of a block are more heads of one query, at the place before the anchor: causal attention there sees the context.
    """
    count, num_rows, heads, dim = query.shape
    total, num_kv = keys.shape[:2]
    before = (blocks.anchors - 1) % total
    grouped = query.view(count, num_rows, num_kv, -1, dim).permute(0, 2, 3, 1, 4).reshape(count, -1, dim)
    spread = [
        each.new_zeros(total, *each.shape[1:]).index_copy(0, before, each) for each in (grouped, own_keys, own_values)
    ]
    shared = (spread[0], keys.contiguous(), values.contiguous())
    out: Tensor = SharedAndOwn.apply(*shared, *spread[1:], Documents(batch.starts, batch.longest))
    return (
        out[before].view(count, num_kv, -1, num_rows, dim).permute(0, 3, 1, 2, 4).reshape(count, num_rows, heads, dim)
    )
