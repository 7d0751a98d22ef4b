"""What a drafter learns from, computed on the fly: the target's hidden states and its distributions over packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paceline.kv.cache import KVCache
from paceline.models.decoder import Decoder
from paceline.ops.attention import AttentionBatch, HostLengths
from paceline.ops.linear import norm_linear
from paceline.train.packing import PackedRows

_CHUNK = 1024  # rows of logits over the whole vocabulary that are alive at a time
_PAGE = 16


@dataclass(frozen=True)
class Captured:
    """A batch on the device; the names of PackedRows, and of the target:

    starts       [D + 1] int32, where each document starts in the flat order, and the end of the last
    longest      the longest document's tokens
    features     [B * S, F * H] hidden states, side by side as the drafter reads them
    logits       [N, draft vocabulary] at `places`, in the target's dtype
    normaliser   [N] float32, the log of the sum of exponentials over the whole vocabulary
    choice       [N] int64, the draft id of the target's first choice, -1 where it cannot be drafted
    continues    [N] bool, whether entry n - 1 is the place just before and the target's choice there is this place's token
    """

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    places: Tensor
    weights: Tensor
    follows: Tensor
    depths: Tensor
    tasks: Tensor
    starts: Tensor
    longest: int
    features: Tensor
    logits: Tensor
    normaliser: Tensor
    choice: Tensor
    continues: Tensor


class Capture:
    """Runs a target over packed rows with a scratch cache of its own. Nothing here waits for the device."""

    def __init__(self, model: Decoder, features: tuple[int, ...], draft_ids: Tensor) -> None:
        """`features` are layer counts as `Model.forward` takes them; `draft_ids` [Vd] int64 the tokens that can be drafted."""
        self.model = model
        self._features = features
        self._ids = draft_ids.to(model.device)
        self._draft_of = torch.full((model.config.vocab_size,), -1, dtype=torch.int64, device=model.device)
        self._draft_of[self._ids] = torch.arange(len(self._ids), device=model.device)
        self._cache: KVCache | None = None

    @torch.no_grad()  # not inference_mode: autograd must be able to keep what this returns
    def __call__(self, rows: PackedRows) -> Captured:
        model, count = self.model, self.model.config.num_layers
        names = ("tokens", "positions", "documents", "places", "weights", "follows", "depths", "tasks")
        on_device = {name: to_device(getattr(rows, name), model.device) for name in names}
        batch, num_pages = _prefill(rows, model.device)
        if self._cache is None or self._cache.num_pages < num_pages:
            self._cache = None  # frees the smaller one first
            self._cache = KVCache(model.layout(_PAGE), num_pages + num_pages // 4, 1, model.device)
        model.prepare(rows.tokens.shape[1])
        none = torch.empty(0, dtype=torch.int64, device=model.device)
        want = (*self._features, count)
        kept = model.forward(on_device["tokens"].flatten(), self._cache, batch, rows=none, want=want).features
        assert kept is not None
        width = model.config.hidden_size
        last = kept[:, -width:][on_device["places"]]
        logits, normaliser, choice = self._distributions(last)
        own = self._draft_of[on_device["tokens"].flatten()[on_device["places"]]]
        return Captured(
            **on_device,
            starts=batch.query_starts,
            longest=batch.max_query,
            features=kept[:, :-width],
            logits=logits,
            normaliser=normaliser,
            choice=choice,
            continues=on_device["follows"] & (own == choice.roll(1)),
        )

    def _distributions(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [N, H] before the final norm -> logits, normaliser and choice of Captured."""
        model = self.model
        parts = []
        for chunk in hidden.split(_CHUNK):
            logits = norm_linear(chunk.contiguous(), model.norm, model.config.rms_norm_eps, model.head)
            parts.append((logits[:, self._ids], logits.float().logsumexp(-1), self._draft_of[logits.argmax(-1)]))
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        return columns[0], columns[1], columns[2]


def to_device(array: Any, device: torch.device) -> Tensor:
    """A host array on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _prefill(rows: PackedRows, device: torch.device) -> tuple[AttentionBatch, int]:
    """The batch in which every document is a prompt in pages of its own, and the pages that it needs."""
    bounds = np.array(rows.bounds)
    lengths = np.diff(bounds)
    pages = -(-lengths // _PAGE)
    first = 1 + np.concatenate([[0], np.cumsum(pages)])  # page 0 is the cache's padding
    width = int(pages.max())
    table = np.minimum(first[:-1, None] + np.arange(width), first[1:, None] - 1).astype(np.int32)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    positions = rows.positions.reshape(-1)
    num_tokens = len(positions)
    batch = AttentionBatch(
        positions=to_device(positions, device),
        locations=to_device(first[owner] * _PAGE + positions, device),
        page_table=to_device(table, device),
        context_lens=torch.zeros(len(lengths), dtype=torch.int32, device=device),
        query_starts=to_device(bounds.astype(np.int32), device),
        branch_starts=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        max_query=int(lengths.max()),
        max_context=0,
        host=HostLengths(rows.bounds, [0] * len(lengths), [int(each) for each in first[:-1]]),
    )
    return batch, int(first[-1])
