"""Copy and trained drafter together: one tree of both where that pays, copied chains alone where the output copies."""

from __future__ import annotations

from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch, Drafter
from paceline.drafters.chooser import NOT_GUESSED, Guessed
from paceline.drafters.copy import CopyDrafter
from paceline.drafters.trained import TrainedDrafter, load_trained
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout
from paceline.models.base import Model
from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import Draft
from paceline.ops.verify import Verified


class JointDrafter(Drafter):
    """Drafts of the copy drafter's lengths are copied alone; others are trees of both drafters' tokens."""

    uses_sources = True
    records_guesses = True

    def __init__(self, config: ResolvedConfig, model: Model) -> None:
        super().__init__(config, model)
        self.copy = CopyDrafter(config, model)
        self.trained: TrainedDrafter = load_trained(config, model)
        self.features = self.trained.features
        self.model_priors = self.trained.model_priors
        self.trees = self.trained.trees
        self.probes = self.trees is not None
        shapes = () if self.trees is None else self.trees.shapes
        self.lengths = tuple(sorted({*self.copy.lengths, *shapes}))
        self._copied = () if config.fixed_draft is not None else self.copy.lengths

    def guessed(self, length: int) -> Guessed:
        return NOT_GUESSED if self.trees is None or length in self._copied else self.trees.guessed(length)

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
        return copied if self.trees is None else self.trees.propose(batch, copied, self.copy.copy, self._copied)

    def observe(self, batch: DraftBatch, draft: Draft, verified: Verified) -> None:
        self.copy.observe(batch, draft, verified)
