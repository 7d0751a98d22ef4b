"""The kernels of `ops.beams`, one program a request."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.beams import BeamLayout, Beams, mask_bits
from paceline.ops.join_drafts import Guesses
from paceline.ops.state import SlotState
from paceline.ops.triton import launch_options
from paceline.ops.triton.chain_layout import COLUMNS, copy_pages, location

_HIDDEN = 2048  # values of each state that are copied at a time


def beam_layout(
    state: SlotState, slots: Tensor, page_table: Tensor, depth: int, width: int, page_size: int
) -> BeamLayout:
    """See paceline.ops.beams."""
    device, requests, columns = slots.device, len(slots), page_table.shape[1]

    def int64(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    layout = BeamLayout(
        roots=int64(requests),
        page_table=torch.empty(requests, columns, dtype=torch.int32, device=device),
        context_lens=torch.empty(requests, dtype=torch.int32, device=device),
        first_positions=int64(2, requests),
        positions=int64(depth + 1, requests * width),
        first_locations=int64(requests),
        locations=int64(depth, requests * width),
        slots=int64(requests * width),
        query_starts=torch.empty(2, requests + 1, dtype=torch.int32, device=device),
    )
    _beam_layout[(requests,)](
        state.text, state.history_start, state.end, slots, page_table,
        layout.roots, layout.page_table, layout.context_lens, layout.first_positions, layout.positions,
        layout.first_locations, layout.locations, layout.slots, layout.query_starts,
        state.text.shape[1], columns, depth, WIDTH=width, BEAMS=triton.next_power_of_2(width),
        STEPS=triton.next_power_of_2(depth + 1), PAGE=page_size, COLUMNS=COLUMNS, num_warps=4, **launch_options(device),
    )  # fmt: skip
    return layout


def extend_beams(
    guesses: Guesses,
    depth: int,
    found: Tensor,
    logprobs: Tensor,
    states: Tensor | None,
    beams: Beams | None,
    width: int,
) -> Beams | None:
    """See paceline.ops.beams."""
    assert guesses.parents is not None and guesses.chain is not None, "the guesses are a tree"
    assert guesses.tokens.is_contiguous() and guesses.logprobs.is_contiguous()
    assert guesses.parents.is_contiguous() and guesses.chain.is_contiguous()
    device, (requests, deepest, kept) = found.device, guesses.tokens.shape
    rows, ranks = len(found) // requests, found.shape[1]
    words, hidden = triton.cdiv(mask_bits(guesses, width), 32), 1 if states is None else states.shape[1]
    result = None
    if width > 0:
        result = Beams(
            tokens=torch.empty(requests * width, dtype=torch.int64, device=device),
            scores=torch.empty(requests, width, dtype=torch.float32, device=device),
            chain=torch.empty(requests, dtype=torch.int32, device=device),
            states=None if states is None else states.new_empty(requests * width, hidden),
            mask=None if states is None else torch.empty(requests * width, words, dtype=torch.int32, device=device),
        )
    before = (None, None, None) if beams is None else (beams.scores, beams.mask, beams.chain)
    after: tuple[Tensor | None, ...] = (None,) * 5
    if result is not None:
        after = (result.tokens, result.states, result.scores, result.mask, result.chain)
    _extend_beams[(requests,)](
        found.contiguous(), logprobs.contiguous(), None if states is None else states.contiguous(), *before,
        guesses.tokens, guesses.logprobs, guesses.parents, guesses.chain, *after, depth, deepest,
        FIRST=beams is None, ROWS=rows, RANKS=ranks, KEPT=kept, LANES=triton.next_power_of_2(max(rows * ranks, kept)),
        WIDTH=width, BEAMS=triton.next_power_of_2(max(width, 1)), WORDS=words, WORD_LANES=triton.next_power_of_2(words),
        HIDDEN=hidden, BLOCK=min(_HIDDEN, triton.next_power_of_2(hidden)), num_warps=4, **launch_options(device),
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["depth"])
def _beam_layout(
    text, history_start, end_ptr, slots, page_table,
    roots, table_rows, contexts, first_positions, positions, first_locations, locations, beam_slots, starts,
    text_width, columns, depth, WIDTH: tl.constexpr, BEAMS: tl.constexpr, STEPS: tl.constexpr, PAGE: tl.constexpr,
    COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    request, requests = tl.program_id(0), tl.num_programs(0)
    slot = tl.load(slots + request)
    end = tl.load(end_ptr + slot)
    context = end - tl.load(history_start + slot) - 1
    tl.store(roots + request, tl.load(text + slot * text_width + end - 1).to(tl.int64))
    tl.store(contexts + request, context)
    tl.store(first_positions + request, context.to(tl.int64))
    tl.store(first_positions + requests + request, (context + 1).to(tl.int64))
    count = request + tl.arange(0, 2)  # the request's first rows, and the end of the last request's
    ours = (count == request) | (count == requests)
    tl.store(starts + count, count, ours)
    tl.store(starts + requests + 1 + count, count * WIDTH, ours)

    table = page_table + slot * columns
    tl.store(first_locations + request, location(table, context, context >= 0, PAGE))
    step, beam = tl.arange(0, STEPS)[:, None], tl.arange(0, BEAMS)[None, :]
    to = (step * requests + request) * WIDTH + beam
    position = tl.zeros([STEPS, BEAMS], tl.int64) + context + step
    tl.store(positions + to, position, (step <= depth) & (beam < WIDTH))
    place = context + 1 + (step - 1) * WIDTH + beam
    inside = (step > 0) & (step < depth) & (beam < WIDTH)
    tl.store(locations + to, location(table, place, inside, PAGE), inside)
    row = tl.arange(0, BEAMS)
    tl.store(beam_slots + request * WIDTH + row, tl.zeros([BEAMS], tl.int64) + slot, row < WIDTH)
    copy_pages(table, table_rows, columns, (context + (depth - 1) * WIDTH) // PAGE + 1, COLUMNS)


@triton.jit(do_not_specialize=["depth", "deepest"])
def _extend_beams(
    found, logprobs, states, scores, masks, chains,
    guess_tokens, guess_logprobs, guess_parents, guess_chains, to_tokens, to_states, to_scores, to_masks, to_chains,
    depth, deepest, FIRST: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, KEPT: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, BEAMS: tl.constexpr, WORDS: tl.constexpr, WORD_LANES: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Candidates are lanes, by row and rank. A lane's place is the number of lanes before it in the order of scores."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    request = tl.program_id(0)
    lane = tl.arange(0, LANES)
    inside = lane < ROWS * RANKS
    token = tl.load(found + request * ROWS * RANKS + lane, inside, other=0)
    logprob = tl.load(logprobs + request * ROWS * RANKS + lane, inside, other=-float("inf"))
    score = tl.minimum(logprob, 0.0)
    on_chain = 0
    if not FIRST:
        score += tl.load(scores + request * ROWS + lane // RANKS, inside, other=0.0)
        on_chain = tl.load(chains + request)
    exists = (logprob > -float("inf")) & (score > -float("inf"))  # not where it is NaN
    score = tl.where(exists, score, -float("inf"))
    before = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & (lane[None, :] < lane[:, None]))
    place = tl.sum(before.to(tl.int32), axis=1)  # each once; lanes without a candidate come last
    parent = tl.where(exists, lane // RANKS, 0)
    token = tl.where(exists, token, 0)
    to = (request * deepest + depth) * KEPT + place
    tl.store(guess_tokens + to, token, place < KEPT)
    tl.store(guess_logprobs + to, tl.where(exists, logprob, -float("inf")), place < KEPT)
    tl.store(guess_parents + to, parent, place < KEPT)
    # an ended chain has no lane: it would be negative
    chain = tl.max(tl.where((lane == on_chain * RANKS) & exists & (place < KEPT), place, -1), axis=0)
    tl.store(guess_chains + request * deepest + depth, chain)

    if WIDTH > 0:
        tl.store(to_tokens + request * WIDTH + place, token, place < WIDTH)
        tl.store(to_scores + request * WIDTH + place, score, place < WIDTH)
        tl.store(to_chains + request, tl.where(chain < WIDTH, chain, -1))
    if WIDTH > 0 and to_states is not None:
        beam, word = tl.arange(0, BEAMS)[:, None], tl.arange(0, WORD_LANES)[None, :]
        source = tl.sum(tl.where(place[None, :] == beam, parent[None, :], 0), axis=1)[:, None] + request * ROWS
        target = request * WIDTH + beam
        kept = beam < WIDTH
        if FIRST:
            mask = tl.zeros([BEAMS, WORD_LANES], tl.int32) + tl.where(word == 0, 1, 0)
        else:
            mask = tl.load(masks + source * WORDS + word, kept & (word < WORDS), other=0)
        own = 1 + depth * WIDTH + beam
        mask |= tl.where(word == own // 32, 1 << (own % 32), 0)
        tl.store(to_masks + target * WORDS + word, mask, kept & (word < WORDS))
        for offset in range(0, HIDDEN, BLOCK):
            column = offset + tl.arange(0, BLOCK)[None, :]
            both = kept & (column < HIDDEN)
            tl.store(to_states + target * HIDDEN + column, tl.load(states + source * HIDDEN + column, both), both)
