"""Copy and trained drafter together: one tree of both where that pays, copied chains alone where the output copies."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch, Drafter
from paceline.drafters.chooser import Guessed
from paceline.drafters.copy import CopyDrafter
from paceline.drafters.trained import TrainedDrafter, load_trained
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout
from paceline.models.base import Model
from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import Draft
from paceline.ops.join_drafts import MAX_NODES, Guesses, join_drafts
from paceline.ops.verify import Verified

# The chance that a candidate beside the chain is right where the chain is wrong, by candidates at each depth of a chain and
# by beams. From the acceptance lengths of `python -m benchmarks.speculate --drafter joint:... --draft 7`, 11, 15, 23 and 31
# with the 1.5B's EAGLE-3 drafter.
BESIDE_CHAIN = {1: 0.0, 2: 0.33, 3: 0.4, 4: 0.43}
BESIDE_BEAMS = {2: 0.25, 3: 0.36}


class Shape(NamedTuple):
    """What the trained drafter gives for a draft of some length: guesses `depth` deep, `width` candidates at each depth, of
    which it continues the best `beams`. One beam is a chain, whose other candidates end.

    Passes of several beams need (depth - 1) * beams places, which must not be more than the length.
    """

    depth: int
    width: int
    beams: int = 1


# Tokens beside the chain are cheap: a pass of the target takes an H200 1.38 ms with 8 rows and 1.42 ms with 24 (`python -m
# benchmarks.tools.step --polish 8`, `--polish 24`). `python -m benchmarks.tools.drafts` prints the steps of these lengths.
SHAPES = {
    2: Shape(2, 1),
    4: Shape(3, 2),
    7: Shape(5, 2),
    11: Shape(7, 2),
    15: Shape(8, 4, 2),
    23: Shape(8, 6, 3),
    31: Shape(10, 6, 3),
}
# of a drafter that gives chains alone
CHAINS = {**SHAPES, 15: Shape(8, 2), 23: Shape(10, 3), 31: Shape(10, 4)}


class JointDrafter(Drafter):
    """Drafts of the copy drafter's lengths are copied alone; others are trees of both drafters' tokens, as `shapes` says."""

    uses_sources = True
    records_guesses = True

    def __init__(self, config: ResolvedConfig, model: Model) -> None:
        super().__init__(config, model)
        self.copy = CopyDrafter(config, model)
        self.trained: TrainedDrafter = load_trained(config, model)
        self.features = self.trained.features
        self.model_priors = self.trained.model_priors
        most, every = self.trained.most_guesses, SHAPES if self.trained.branches else CHAINS
        if config.deterministic:
            # kernels sum keys in the order of their places, which only in a single chain is plain decoding's
            every = {}
        self.shapes = {length: shape._replace(depth=min(shape.depth, most)) for length, shape in every.items()}
        self.probes = bool(self.shapes)
        self.lengths = tuple(sorted({*self.copy.lengths, *self.shapes}))
        self._copied = () if config.fixed_draft is not None else self.copy.lengths

    def guessed(self, length: int) -> Guessed:
        depth, width, beams = self._shape(length)
        return Guessed(depth, BESIDE_CHAIN[width]) if beams == 1 else Guessed(depth, BESIDE_BEAMS[beams], True)

    def _shape(self, length: int) -> Shape:
        """That of `length`, or of the next smaller one where a draft is cut or its length fixed; no guesses where it copies."""
        if length in self._copied or length >= MAX_NODES:
            return Shape(0, 1)
        return next((self.shapes[each] for each in sorted(self.shapes, reverse=True) if each <= length), Shape(0, 1))

    def layout(self, page_size: int) -> CacheLayout:
        return self.trained.layout(page_size)

    def remember(
        self, tokens: Tensor, features: Tensor, draft: Draft | None, batch: AttentionBatch, cache: KVCache
    ) -> None:
        self.trained.remember(tokens, features, draft, batch, cache)

    def start(self, slot: int, num_source_tokens: int, is_new: bool) -> int:
        return self.copy.start(slot, num_source_tokens, is_new)

    def propose(self, batch: DraftBatch) -> Draft:
        copied = self.copy.propose(batch)
        lengths = [batch.max_query - 1] if batch.is_uniform else (batch.query_starts.diff() - 1).tolist()
        shapes = [self._shape(each) for each in lengths]
        most = Shape(*(max(column) for column in zip(*shapes, strict=True)))
        if most.depth == 0:
            return copied
        guesses = self.trained.guess(batch, *most)
        if not batch.is_uniform:
            places = [length // most.beams + 1 if most.beams > 1 else length for length in lengths]
            depths = [min(shape.depth, place) for shape, place in zip(shapes, places, strict=True)]
            guesses = self._limited(guesses, depths, shapes)
        return join_drafts(copied, self.copy.copy, batch.slots, guesses, batch.query_starts, batch.max_query)

    def observe(self, batch: DraftBatch, draft: Draft, verified: Verified) -> None:
        self.copy.observe(batch, draft, verified)

    def _limited(self, guesses: Guesses, depths: list[int], shapes: list[Shape]) -> Guesses:
        """The guesses that each request has places and a shape for; others have no probability."""
        logprobs = guesses.logprobs.clone()
        for request, (depth, shape) in enumerate(zip(depths, shapes, strict=True)):
            logprobs[request, depth:] = -torch.inf
            logprobs[request, :, shape.width :] = -torch.inf
        return replace(guesses, logprobs=logprobs)
