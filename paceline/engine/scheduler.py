"""Continuous batching: which requests the next step serves and with which pages. Admits, prefills in chunks, preempts."""

from __future__ import annotations

import functools
import operator
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from paceline.config import ResolvedConfig
from paceline.engine.client import EngineStats
from paceline.engine.cost import ChunkCost
from paceline.engine.sequence import HAS_GRAMMAR, Sequence, Status
from paceline.errors import ContextExceeded
from paceline.kv.pages import PagePool
from paceline.kv.radix import RadixTree
from paceline.types import FinishReason

_OLDEST = 4  # the oldest prompt gets one fourth of a chunk, so that short prompts cannot starve it
_MAX_LOGIT_ROWS = (
    512  # tokens of a prompt in a chunk that needs the logits of all: of Qwen's vocabulary they take 311 MB
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
    def synchronous(self) -> bool:
        """Whether the host must read this step before it launches the next: a grammar's masks depend on its tokens."""
        return any(chunk.last and chunk.sequence.matcher is not None for chunk in self.chunks)


@dataclass(frozen=True)
class Decode:
    """`lengths[i]` tokens are drafted for `sequences[i]`."""

    sequences: list[Sequence]
    lengths: list[int]

    @functools.cached_property
    def traits(self) -> int:
        """The traits that any of the sequences has."""
        return functools.reduce(operator.or_, {sequence.traits for sequence in self.sequences})

    @property
    def synchronous(self) -> bool:
        """As Prefill's."""
        return bool(self.traits & HAS_GRAMMAR)


@dataclass(frozen=True)
class _Blocked:
    """A sequence at the head of the queue that lacked pages.

    It needs `num_pages` available pages, its cached prefix included as far as no other request locks that. It needs fewer
    only after an insertion into the prefix cache, which may lengthen its prefix or let another request lock it.
    """

    sequence: Sequence
    num_pages: int
    num_inserts: int


class Scheduler:
    """Owns the pages, and changes the status of every sequence.

    WAITING -- admit: prefix matched and locked, pages for its tokens --> PREFILLING -- last chunk --> RUNNING --> FINISHED
       ^------------------------- preempt: pages back, tokens kept -----------+---------------------------+

    Two rules hold because all steps run in launch order on one stream of one device:
    - Pages enter the prefix cache when the step that computes them is launched, not when it ends: a later step that reads
      them runs after it.
    - Pages are freed and handed out again without waiting for in-flight steps that still use them: a step that overwrites
      them runs after those.
    A tier that copies pages on another stream must wait for the steps launched before.
    """

    def __init__(
        self,
        pool: PagePool,
        tree: RadixTree | None,
        config: ResolvedConfig,
        draft_lengths: Callable[[list[Sequence]], list[int]],
        lengths: tuple[int, ...],
        chunk_cost: ChunkCost,
        uniform: bool = False,
    ) -> None:
        """`draft_lengths` chooses the lengths of a decode step's drafts, of `lengths`.

        `chunk_cost` bounds a chunk to the configured stall. With `uniform` all sequences of a step draft the same length.
        """
        self.pool = pool
        self.tree = tree
        self.page_size = config.page_size
        self.prefill_chunk = config.prefill_chunk
        self.draft_lengths = draft_lengths
        self.lengths = lengths
        self.chunk_cost = chunk_cost
        self.max_stall = config.max_stall_ms / 1000
        self.uniform = uniform
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self._free_slots = list(range(config.max_batch - 1, -1, -1))
        self._blocked: _Blocked | None = None
        self._prefilled_last = False

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises ContextExceeded where the whole cache cannot hold it."""
        sampling = sequence.request.sampling
        needed = self._num_pages(sequence.prompt_length + sampling.max_tokens + 1)
        if needed > self.pool.num_pages - 1:
            raise ContextExceeded(
                f"{sequence.prompt_length} prompt and {sampling.max_tokens} output tokens need {needed} KV pages; "
                f"the cache has {self.pool.num_pages - 1} (raise cache_tokens or lower max_tokens)"
            )
        self.waiting.append(sequence)

    def stats(self) -> EngineStats:
        """Requests by status, and the KV pages that they and the prefix cache have."""
        total = self.pool.num_pages - 1
        cached = self.tree.num_evictable if self.tree is not None else 0
        return EngineStats(
            num_waiting=len(self.waiting),
            num_prefilling=len(self.prefilling),
            num_running=len(self.running),
            num_preempted=self.num_preempted,
            pages_held=total - self.pool.num_free - cached,
            pages_cached=cached,
            pages_total=total,
        )

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
        """Enters the prompts that a launched step completes into the prefix cache: later steps may read them."""
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
        """Retires a sequence (its `finish` is set) whose last step has failed: nothing it computed enters the cache."""
        self._retire(sequence, 0)

    def _retire(self, sequence: Sequence, computed: int) -> None:
        self._release(sequence, computed)
        sequence.status = Status.FINISHED
        for group in (self.prefilling, self.running, self.waiting):
            if sequence in group:
                group.remove(sequence)

    def _admit(self) -> None:
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            if self._is_blocked(sequence) or not self._allocate_prompt(sequence):
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            sequence.status = Status.PREFILLING
            self.prefilling.append(sequence)
            if not sequence.first_token:
                sequence.usage.queue_seconds = time.perf_counter() - sequence.started

    def _is_blocked(self, sequence: Sequence) -> bool:
        """Whether a blocked sequence certainly still lacks pages. Does not match its prompt again."""
        blocked = self._blocked
        if blocked is None or blocked.sequence is not sequence:
            return False
        num_inserts = self.tree.num_inserts if self.tree is not None else 0
        return self._num_available < blocked.num_pages and num_inserts == blocked.num_inserts

    def _allocate_prompt(self, sequence: Sequence) -> bool:
        """Locks the cached prefix and allocates the rest of the sequence's pages; False where there are not enough."""
        pages: list[int] = []
        available = self._num_available
        if self.tree is not None:
            # at least the last token is computed, for its logits; all are where the logits of all are needed
            needs_all = sequence.request.sampling.prompt_logprobs is not None and not sequence.first_token
            prefix = sequence.array(0, 0 if needs_all else len(sequence.tokens) - 1)
            pages, place = self.tree.match(prefix, sequence.request.namespace)
            sequence.node = self.tree.lock(place)
        needed = self._num_pages(len(sequence.tokens) + 1) - len(pages)
        locked = available - self._num_available
        if not self._make_room(needed):
            if sequence.node is not None and self.tree is not None:
                self.tree.unlock(sequence.node)
                sequence.node = None
            num_inserts = self.tree.num_inserts if self.tree is not None else 0
            self._blocked = _Blocked(sequence, locked + needed, num_inserts)
            return False
        self._blocked = None
        sequence.pages = pages + self.pool.allocate(needed)
        sequence.reserved = len(sequence.pages) * self.page_size
        sequence.num_shared = len(pages)
        sequence.computed = len(pages) * self.page_size
        if not sequence.first_token:
            sequence.usage.cached_tokens = sequence.computed
        return True

    def _prefill(self) -> Prefill:
        """The next chunk of the admitted prompts, in the order of admission."""
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
                sequence.status = Status.RUNNING
                sequence.end = end + 1
        return Prefill(chunks)

    def _shares(self) -> dict[Sequence, int]:
        """How many tokens of which prompts the next chunk has.

        Where other requests wait for the chunk, `max_stall` bounds it. The oldest prompt always has a share; the rest goes
        to the prompts with the fewest tokens left. A short prompt does not wait for a long one, and a long one proceeds
        however many short ones arrive.
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
            given = min(given, _MAX_LOGIT_ROWS - share)
        if given:
            shares[sequence] = share + given
        return given

    def _decode(self) -> Decode | None:
        sequences = [each for each in self.running if each.failure is None]  # others end when their step is read
        if not sequences:
            return None
        lengths = self.draft_lengths(sequences)
        if self.uniform:
            lengths = [self._affordable_draft(sequences, max(lengths))] * len(sequences)
        ready: list[Sequence] = []
        drafts: list[int] = []
        for sequence, length in zip(sequences, lengths, strict=True):
            if sequence.slot < 0:  # preempted for one before it
                continue
            if sequence.end + length >= sequence.reserved and not self._grow(sequence, length):
                length = 0
                while not self._grow(sequence, 0) and self._preempt_newest(sequence, ready):
                    pass
                if not self._grow(sequence, 0):
                    continue  # no other holds pages: reading the in-flight step shows how many it needs
            ready.append(sequence)
            drafts.append(length)
            sequence.end += length + 1
        return Decode(ready, drafts) if ready else None

    def _affordable_draft(self, sequences: list[Sequence], chosen: int) -> int:
        """The longest draft up to `chosen` for which there are pages for all; 0 where there is none."""
        if len(sequences) * self._num_pages(chosen + 1) <= self._num_available:
            return chosen  # a sequence has pages for all that is in flight, so it lacks at most those of the new tokens
        lengths = [chosen, *(each for each in reversed(self.lengths) if 0 < each < chosen), 0]
        fits = (each for each in lengths if sum(self._lacking(one, each) for one in sequences) <= self._num_available)
        return next(fits, 0)

    def _lacking(self, sequence: Sequence, length: int) -> int:
        """The pages that it lacks for a step that drafts `length` tokens after all that in-flight steps may add."""
        return max(0, self._num_pages(sequence.end + length + 1) - len(sequence.pages))

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Allocates pages for a step that drafts `length` tokens; False where there are not enough."""
        needed = self._lacking(sequence, length)
        if not self._make_room(needed):
            return False
        sequence.pages += self.pool.allocate(needed)
        sequence.reserved = len(sequence.pages) * self.page_size
        return True

    @property
    def _num_available(self) -> int:
        """Pages that are free, or would be by eviction."""
        return self.pool.num_free + (self.tree.num_evictable if self.tree is not None else 0)

    def _make_room(self, count: int) -> bool:
        """Evicts cached prefixes until `count` pages are free; False where there are not so many."""
        lacking = count - self.pool.num_free
        if lacking > 0 and self.tree is not None and lacking <= self.tree.num_evictable:
            self.tree.evict(lacking)
        return count <= self.pool.num_free

    def _preempt_newest(self, needing: Sequence, ready: list[Sequence]) -> bool:
        """Preempts the newest sequence outside the step; False where there is none but the one in need."""
        others = [each for each in self.running + self.prefilling if each is not needing and each not in ready]
        if not others:
            return False
        victim = others[-1]
        self._release(victim, self._num_computed(victim))
        (self.prefilling if victim.status is Status.PREFILLING else self.running).remove(victim)
        victim.status = Status.WAITING
        victim.computed = 0
        self.waiting.appendleft(victim)
        self.num_preempted += 1
        return True

    def _num_computed(self, sequence: Sequence) -> int:
        """Tokens whose keys and values are computed; the last token's are computed by the step after it."""
        return sequence.computed if sequence.status is Status.PREFILLING else len(sequence.tokens) - 1

    def _release(self, sequence: Sequence, computed: int) -> None:
        """Frees pages and slot; whole pages of the first `computed` tokens go to the prefix cache."""
        sequence.epoch += 1
        if sequence.pages:
            self._share(sequence, computed)
            self.pool.free(sequence.pages[sequence.num_shared :])
        if sequence.node is not None and self.tree is not None:
            self.tree.unlock(sequence.node)
        sequence.pages, sequence.num_shared, sequence.num_written, sequence.node = [], 0, 0, None
        sequence.reserved = 0
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1

    def _share(self, sequence: Sequence, computed: int) -> None:
        """Enters the whole pages of the first `computed` tokens into the prefix cache, and locks them there."""
        count = computed // self.page_size
        if self.tree is None or count <= sequence.num_shared:
            return
        tokens = sequence.array(0, count * self.page_size)
        pages, place = self.tree.insert(tokens, sequence.pages[:count], sequence.num_shared, sequence.request.namespace)
        node = self.tree.lock(place)
        if sequence.node is not None:
            self.tree.unlock(sequence.node)
        if (
            pages != sequence.pages[:count]
        ):  # another sequence's pages hold a part of the run: its row must be rewritten
            sequence.pages[:count] = pages
            sequence.num_written = 0
        sequence.num_shared, sequence.node = count, node

    def _num_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
