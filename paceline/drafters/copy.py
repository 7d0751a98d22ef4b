"""The copy drafter: continues a text that the output follows, from explicit sources or its own history (ops/copy_draft.py)."""

from __future__ import annotations

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch, Drafter
from paceline.models.base import Model
from paceline.ops.copy_draft import MAX_BRANCHES, CopyDraft, CopyState, copy_draft, copy_observe
from paceline.ops.draft import Draft
from paceline.ops.verify import Verified

_CERTAIN = 32  # tokens of agreement to assume of an output that begins with its best source: the chooser's top state


class CopyDrafter(Drafter):
    """Chains from where the output was last in its text, up to MAX_BRANCHES of them after a miss."""

    lengths = (0, 8, 16, 32, 64, 128, 256)
    uses_sources = True
    records_guesses = True

    def __init__(self, config: ResolvedConfig, model: Model) -> None:
        super().__init__(config, model)
        self.copy = CopyState.empty(config.max_batch + 1, model.device)
        # a branch's keys lie elsewhere in the cache than plain decoding puts them, so kernels sum them in another order
        self._max_branches = 1 if config.deterministic else MAX_BRANCHES

    def start(self, slot: int, num_source_tokens: int, is_new: bool) -> int:
        """A new output is expected to begin as its best source does; any other is searched for in the text."""
        follows = bool(num_source_tokens) and is_new
        streak = _CERTAIN if follows else 0
        for row, value in (
            (self.copy.pointer, 0 if follows else -1),
            (self.copy.anchor, 0 if num_source_tokens else -1),
            (self.copy.streak, streak),
        ):
            row[slot : slot + 1].fill_(value)  # `row[slot] = value` copies from the host and waits for the device
        return streak

    def propose(self, batch: DraftBatch) -> CopyDraft:
        return copy_draft(
            batch.state, self.copy, batch.slots, batch.query_starts, batch.num_queries, self._max_branches
        )

    def observe(self, batch: DraftBatch, draft: Draft, verified: Verified) -> None:
        assert isinstance(draft, CopyDraft)
        copy_observe(batch.state, self.copy, batch.slots, batch.query_starts, draft, verified)
