"""Which requests the next step serves, and with which pages: admit, prefill in chunks, decode, preempt."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from paceline.drafters.chooser import LENGTHS
from paceline.engine.cost import ChunkCost
from paceline.engine.sequence import Sequence
from paceline.errors import ContextExceeded
from paceline.kv.pages import PagePool
from paceline.kv.radix import RadixTree
from paceline.types import FinishReason

_OLDEST = 4  # the oldest prompt gets one fourth of a chunk: ageing, so that short prompts cannot starve it
_LOGITS_OF = (
    512  # tokens of a prompt a chunk, if the logits of all are wanted: 512 rows of Qwen's vocabulary take 311 MB
)


@dataclass(frozen=True)
class Chunk:
    """Tokens `start:end` of a sequence's prompt; `last` when the sequence can be sampled from after it."""

    sequence: Sequence
    start: int
    end: int
    last: bool


@dataclass(frozen=True)
class Prefill:
    chunks: list[Chunk]

    @property
    def sequences(self) -> list[Sequence]:
        return [chunk.sequence for chunk in self.chunks]

    @property
    def held(self) -> bool:
        """Whether the host must see this step's tokens before the next: a grammar's masks depend on them."""
        return any(chunk.last and chunk.sequence.follower is not None for chunk in self.chunks)


@dataclass(frozen=True)
class Decode:
    """`lengths[i]` tokens are drafted for `sequences[i]`."""

    sequences: list[Sequence]
    lengths: list[int]

    @property
    def held(self) -> bool:
        """As Prefill's."""
        return any(sequence.follower is not None for sequence in self.sequences)


class Scheduler:
    """Owns the pages. A sequence is waiting, prefilling or running; every change of that is made here.

    waiting -- admit: prefix matched and locked, pages for its tokens --> prefilling -- last chunk --> running
       ^------------------------- preempt: pages back, tokens kept -----------+-----------------------------+
    """

    def __init__(
        self,
        pool: PagePool,
        tree: RadixTree | None,
        page_size: int,
        max_batch: int,
        prefill_chunk: int,
        draft_lengths: Callable[[list[Sequence]], list[int]],
        chunk_cost: ChunkCost,
        max_stall: float = math.inf,
        uniform: bool = False,
    ) -> None:
        """`chunk_cost` and `max_stall` bound a chunk by the seconds that running sequences wait for it. With `uniform` all
        sequences of a decode step draft alike.
        """
        self.pool = pool
        self.tree = tree
        self.page_size = page_size
        self.prefill_chunk = prefill_chunk
        self.draft_lengths = draft_lengths
        self.chunk_cost = chunk_cost
        self.max_stall = max_stall
        self.uniform = uniform
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self._free_slots = list(range(max_batch - 1, -1, -1))
        self._prefilled_last = False

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises ContextExceeded where the whole cache could not hold it."""
        sampling = sequence.request.sampling
        needed = self._num_pages(sequence.prompt_length + sampling.max_tokens + 1)
        if needed > self.pool.num_pages - 1:
            raise ContextExceeded(
                f"{sequence.prompt_length} prompt and {sampling.max_tokens} output tokens need {needed} KV pages; "
                f"the cache has {self.pool.num_pages - 1} (raise cache_tokens or lower max_tokens)"
            )
        self.waiting.append(sequence)

    @property
    def page_counts(self) -> tuple[int, int, int]:
        """KV pages that requests hold, pages kept for later prefixes, and all."""
        total = self.pool.num_pages - 1
        cached = self.tree.num_evictable if self.tree is not None else 0
        return total - self.pool.num_free - cached, cached, total

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def schedule(self) -> Prefill | Decode | None:
        """The next step, its pages allocated. Prefill and decode take turns where both wait."""
        self._admit()
        if self.prefilling and not (self.running and self._prefilled_last):
            self._prefilled_last = True
            return self._prefill()
        self._prefilled_last = False
        return self._decode() if self.running else None

    def launched(self, work: Prefill | Decode) -> None:
        """Shares the prompts a launched step computes: later steps find them in the prefix cache."""
        if isinstance(work, Prefill):
            for chunk in work.chunks:
                if chunk.last:
                    self._share(chunk.sequence, chunk.end)

    def finish(self, sequence: Sequence) -> None:
        """Retires a sequence (its `finish` is set): whole computed pages go to the prefix cache, the rest are freed."""
        self._retire(sequence, self._num_computed(sequence))

    def cancel(self, sequence: Sequence) -> None:
        sequence.finish = FinishReason.CANCELLED
        self.finish(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Retires a sequence (its `finish` is set) whose last step has failed: what that computed is not shared."""
        self._retire(sequence, 0)

    def _retire(self, sequence: Sequence, computed: int) -> None:
        self._release(sequence, computed)
        for group in (self.prefilling, self.running, self.waiting):
            if sequence in group:
                group.remove(sequence)

    def _admit(self) -> None:
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            if not self._take_prompt_pages(sequence):
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self.prefilling.append(sequence)
            if not sequence.first_token:
                sequence.usage.queue_seconds = time.perf_counter() - sequence.started

    def _take_prompt_pages(self, sequence: Sequence) -> bool:
        """Locks the cached prefix and allocates the rest of the sequence's pages; False where they are not to be had."""
        pages: list[int] = []
        if self.tree is not None:
            # at least the last token is computed: its logits are wanted, or those of all tokens
            wants_all = sequence.request.sampling.prompt_logprobs is not None and not sequence.first_token
            found = sequence.array(0, 0 if wants_all else len(sequence.tokens) - 1)
            pages, node = self.tree.match(found, sequence.request.namespace)
            self.tree.lock(node)
            sequence.node = node
        wanted = self._num_pages(len(sequence.tokens) + 1) - len(pages)
        if not self._make_room(wanted):
            if sequence.node is not None and self.tree is not None:
                self.tree.unlock(sequence.node)
                sequence.node = None
            return False
        sequence.pages = pages + self.pool.allocate(wanted)
        sequence.num_shared = len(pages)
        sequence.computed = len(pages) * self.page_size
        if not sequence.first_token:
            sequence.usage.cached_tokens = sequence.computed
        return True

    def _prefill(self) -> Prefill:
        """A chunk of the waiting prompts, in the order in which they were admitted."""
        shares = self._shares()
        chunks = []
        for sequence in list(self.prefilling):
            if sequence not in shares:
                continue
            start = sequence.computed
            end = sequence.computed = start + shares[sequence]
            last = end == len(sequence.tokens)
            chunks.append(Chunk(sequence, start, end, last))
            if last:
                self.prefilling.remove(sequence)
                self.running.append(sequence)
                sequence.in_flight = 1
        return Prefill(chunks)

    def _shares(self) -> dict[Sequence, int]:
        """How many tokens of which prompts the next chunk has.

        A chunk is as long as `max_stall` allows where others wait for it. The oldest prompt has a share of
        it in any case; of the rest the shortest come first. So a short prompt does not wait for a long one, and a long
        one goes on however many short ones come.
        """
        budget = self.prefill_chunk
        if self.running or len(self.prefilling) > 1:
            context = max(each.computed for each in self.prefilling)
            budget = self.chunk_cost.affordable(budget, context, self.max_stall)
        shares: dict[Sequence, int] = {}
        if len(self.prefilling) > 1:
            budget -= self._give(shares, self.prefilling[0], -(-budget // _OLDEST))
        for sequence in sorted(self.prefilling, key=lambda each: len(each.tokens) - each.computed):
            if budget == 0:
                break
            budget -= self._give(shares, sequence, budget)
        return shares

    def _give(self, shares: dict[Sequence, int], sequence: Sequence, most: int) -> int:
        """Adds up to `most` tokens to a sequence's share; returns how many."""
        share = shares.get(sequence, 0)
        given = min(most, len(sequence.tokens) - sequence.computed - share)
        if sequence.request.sampling.prompt_logprobs is not None:
            given = min(given, _LOGITS_OF - share)
        if given:
            shares[sequence] = share + given
        return given

    def _decode(self) -> Decode | None:
        sequences = [each for each in self.running if each.failure is None]  # what failed ends when its step lands
        if not sequences:
            return None
        lengths = self.draft_lengths(sequences)
        if self.uniform:
            lengths = [self._affordable_draft(sequences, max(lengths))] * len(sequences)
        ready: list[Sequence] = []
        drafts: list[int] = []
        for sequence, length in zip(sequences, lengths, strict=True):
            if sequence.slot < 0:  # sent back for one before it
                continue
            if not self._grow(sequence, length):
                length = 0
                while not self._grow(sequence, 0) and self._preempt_newest(sequence, ready):
                    pass
                if not self._grow(sequence, 0):
                    continue  # alone, and what is in flight will say how much it really needs
            ready.append(sequence)
            drafts.append(length)
        for sequence, length in zip(ready, drafts, strict=True):
            sequence.in_flight += length + 1
            sequence.decided.append(sequence.acceptance.state)
        return Decode(ready, drafts) if ready else None

    def _affordable_draft(self, sequences: list[Sequence], wanted: int) -> int:
        """The longest draft up to `wanted` for which there are pages for all; 0 where there is none."""
        most = self.pool.num_free + (self.tree.num_evictable if self.tree is not None else 0)
        lengths = [wanted, *(each for each in reversed(LENGTHS) if 0 < each < wanted), 0]
        fits = (each for each in lengths if sum(self._lacking(one, each) for one in sequences) <= most)
        return next(fits, 0)

    def _lacking(self, sequence: Sequence, length: int) -> int:
        """The pages that it lacks for a step that drafts `length` tokens after all that may be in flight."""
        tokens = len(sequence.tokens) + sequence.in_flight + length + 1
        return max(0, self._num_pages(tokens) - len(sequence.pages))

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Pages for a step that drafts `length` tokens; False where they are not to be had."""
        needed = self._lacking(sequence, length)
        if not needed:
            return True
        if not self._make_room(needed):
            return False
        sequence.pages += self.pool.allocate(needed)
        return True

    def _make_room(self, count: int) -> bool:
        lacking = count - self.pool.num_free
        if lacking > 0 and self.tree is not None and lacking <= self.tree.num_evictable:
            self.tree.evict(lacking)
        return count <= self.pool.num_free

    def _preempt_newest(self, needing: Sequence, ready: list[Sequence]) -> bool:
        """Sends the newest sequence outside the step back to wait; False where there is none but the one in need."""
        others = [each for each in self.running + self.prefilling if each is not needing and each not in ready]
        if not others:
            return False
        victim = others[-1]
        self._release(victim, self._num_computed(victim))
        (self.prefilling if victim in self.prefilling else self.running).remove(victim)
        victim.epoch += 1
        victim.in_flight = victim.computed = 0
        victim.decided.clear()
        self.waiting.appendleft(victim)
        self.num_preempted += 1
        return True

    def _num_computed(self, sequence: Sequence) -> int:
        """Tokens whose keys and values are computed; the last one's are by the step after it."""
        return sequence.computed if sequence in self.prefilling else len(sequence.tokens) - 1

    def _release(self, sequence: Sequence, computed: int) -> None:
        """Takes back pages and slot; whole pages of the first `computed` tokens go to the prefix cache."""
        if sequence.pages:
            self._share(sequence, computed)
            self.pool.free(sequence.pages[sequence.num_shared :])
        if sequence.node is not None and self.tree is not None:
            self.tree.unlock(sequence.node)
        sequence.pages, sequence.num_shared, sequence.node = [], 0, None
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1

    def _share(self, sequence: Sequence, computed: int) -> None:
        """Hands the whole pages of the first `computed` tokens to the prefix cache; the sequence reads them from there."""
        count = computed // self.page_size
        if self.tree is None or count <= sequence.num_shared:
            return
        tokens = sequence.array(0, count * self.page_size)
        pages, node = self.tree.insert(tokens, sequence.pages[:count], sequence.num_shared, sequence.request.namespace)
        self.tree.lock(node)
        if sequence.node is not None:
            self.tree.unlock(sequence.node)
        sequence.pages[:count] = pages
        sequence.num_shared, sequence.node = count, node

    def _num_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
