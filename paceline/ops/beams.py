"""The passes of a drafter that drafts a tree: at each depth the candidates with the best scores are expanded by one more pass.

The tree is EAGLE-2's (Li et al. 2024, arXiv 2406.16858). The candidates that are expanded are the beams, W of each request.
Own places of a request, after its `context` committed tokens; those of pass k are candidates of depth k:

    | committed | root | pass 1: W rows | pass 2: W rows | ....
                ^ context                ^ context + 1 + W
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.ops.attention import AttentionBatch
from paceline.ops.dispatch import implementation
from paceline.ops.draft import packed
from paceline.ops.join_drafts import Guesses
from paceline.ops.state import SlotState


@dataclass(frozen=True)
class BeamLayout:
    """K passes over B requests: one row of each in pass 0, the root; W rows of each in every other pass.

    roots [B] int64, the last known tokens; page_table [B, P] int32, of which columns past the last pass may be undefined;
    context_lens [B] int32; first_positions [2, B] int64 of pass 0 and of the token after it; positions [K + 1, B * W] int64 of
    the passes and of the token after them; first_locations [B] int64; locations [K, B * W] int64, of which row 0 is not used;
    slots [B * W] int64, each W times; query_starts [2, B + 1] int32 of pass 0 and of the others.
    """

    roots: Tensor
    page_table: Tensor
    context_lens: Tensor
    first_positions: Tensor
    positions: Tensor
    first_locations: Tensor
    locations: Tensor
    slots: Tensor
    query_starts: Tensor

    def batch(self, step: int, mask: Tensor | None, page_size: int) -> AttentionBatch:
        """The AttentionBatch of one pass. mask is that of its Beams; pass 0 has none."""
        max_context = self.page_table.shape[1] * page_size
        if step == 0:
            return AttentionBatch(
                positions=self.first_positions[0],
                locations=self.first_locations,
                page_table=self.page_table,
                context_lens=self.context_lens,
                query_starts=self.query_starts[0],
                branch_starts=self.query_starts[0],  # not read: a single query has no branch
                max_query=1,
                max_context=max_context,
                hides_first=True,
            )
        assert mask is not None, "rows of a tree need a mask"
        width = len(self.slots) // len(self.roots)
        return AttentionBatch(
            positions=self.positions[step],
            locations=self.locations[step],
            page_table=self.page_table,
            context_lens=self.context_lens,
            query_starts=self.query_starts[1],
            branch_starts=self.query_starts[1],  # not read: there is a tree
            max_query=width,
            max_context=max_context,
            branching=True,
            hides_first=True,
            tree_mask=mask,
            num_before=1 + (step - 1) * width,
        )


@dataclass(frozen=True)
class Beams:
    """The W rows of each of B requests in the next pass.

    tokens [B * W] int64; scores [B, W] float32, the sum of the log-probabilities on the path, -inf for a row that stands for
    no candidate; chain [B] int32, the row on the path of first choices, -1 for none; states [B * W, H], the outputs of their
    parents' rows; mask [B * W, words] int32, bit p % 32 of word p // 32 set where the row sees the request's own place p: the
    root, its ancestors and itself. States and mask are None where no pass of a network follows.
    """

    tokens: Tensor
    scores: Tensor
    chain: Tensor
    states: Tensor | None = None
    mask: Tensor | None = None


def beam_layout(
    state: SlotState, slots: Tensor, page_table: Tensor, depth: int, width: int, page_size: int
) -> BeamLayout:
    """The layout of `depth` passes of `width` rows. slots [B] int64; page_table [S, P] int32 by slot.

    The pages of a request hold 1 + (depth - 1) * width tokens after its committed ones.
    """
    return implementation("beam_layout", state.end)(state, slots, page_table, depth, width, page_size)


def extend_beams(
    guesses: Guesses,
    depth: int,
    found: Tensor,
    logprobs: Tensor,
    states: Tensor | None,
    beams: Beams | None,
    width: int,
) -> Beams | None:
    """Writes the best candidates of pass `depth` to `guesses`; the next pass's rows, the first `width` of them.

    found [B * V, R] int64 and logprobs [B * V, R] float32 are the candidates of the pass's V rows of each request, the first
    choice first, and states [B * V, H] the rows' outputs, or None at every depth. beams are these rows; at depth 0 None, and
    V is 1.
    guesses [B, K, C] gets at `depth` the candidates of a request with the best scores, of equals those of the lower row, then
    of the lower rank. Where there are fewer than C, the others have token 0 and the log-probability -inf.
    `width` is 0 at the last depth, for which there is no next pass and the result is None; else the same in all passes, and at
    most C. Rows that stand for no candidate have token 0, the score -inf, and the state and ancestors of a candidate of
    row 0.
    """
    kept = guesses.tokens.shape[2]
    assert width <= kept and (width == 0 or depth < guesses.tokens.shape[1] - 1), (
        "a beam is a candidate of a depth above"
    )
    return implementation("extend_beams", found)(guesses, depth, found, logprobs, states, beams, width)


def mask_bits(guesses: Guesses, width: int) -> int:
    """The own places of a request in a tree of that depth and width: bits of a row's mask."""
    return 1 + (guesses.tokens.shape[1] - 1) * width


def layout_reference(
    state: SlotState, slots: Tensor, page_table: Tensor, depth: int, width: int, page_size: int
) -> BeamLayout:
    ends, device, requests = state.end[slots], slots.device, len(slots)
    table = page_table[slots]
    context = ends - state.history_start[slots] - 1
    own = context[:, None] + torch.arange(1 + (depth - 1) * width, dtype=torch.int32, device=device)
    locations = table.gather(1, (own // page_size).long()).long() * page_size + own % page_size
    later = locations[:, 1:].view(requests, depth - 1, width).transpose(0, 1).flatten(1)
    after = context.long() + torch.arange(depth + 1, device=device)[:, None]
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
    return BeamLayout(
        roots=state.text[slots, ends.long() - 1].long(),
        page_table=table,
        context_lens=context,
        first_positions=after[:2].contiguous(),
        positions=after.repeat_interleave(width, 1),
        first_locations=locations[:, 0].contiguous(),
        locations=F.pad(later, (0, 0, 1, 0)),
        slots=slots.repeat_interleave(width),
        query_starts=torch.stack([starts, starts * width]),
    )


def reference(
    guesses: Guesses,
    depth: int,
    found: Tensor,
    logprobs: Tensor,
    states: Tensor | None,
    beams: Beams | None,
    width: int,
) -> Beams | None:
    assert guesses.parents is not None and guesses.chain is not None, "the guesses are a tree"
    requests, _, kept = guesses.tokens.shape
    rows, ranks = len(found) // requests, found.shape[1]
    above = logprobs.new_zeros(requests, 1) if beams is None else beams.scores
    scores = (above[:, :, None] + logprobs.view(requests, rows, ranks).clamp(max=0)).flatten(1)
    scores = torch.where(scores > -math.inf, scores, -math.inf)  # NaN is no candidate
    scores, order = F.pad(scores, (0, max(0, kept - rows * ranks)), value=-math.inf).sort(
        dim=1, descending=True, stable=True
    )
    scores, order = scores[:, :kept], order[:, :kept]
    exists = scores > -math.inf
    lane = torch.where(exists, order, 0)
    tokens = torch.where(exists, found.view(requests, -1).gather(1, lane), 0)
    guesses.tokens[:, depth] = tokens
    guesses.logprobs[:, depth] = torch.where(exists, logprobs.view(requests, -1).gather(1, lane), -math.inf)
    guesses.parents[:, depth] = lane // ranks
    on_chain = lane.new_zeros(requests) if beams is None else beams.chain.long()
    continues = exists & (lane == on_chain[:, None] * ranks)  # of an ended chain no lane: it would be negative
    chain = torch.where(continues.any(1), continues.int().argmax(1), -1).int()
    guesses.chain[:, depth] = chain
    if width == 0:
        return None
    following = Beams(
        tokens=tokens[:, :width].flatten(),
        scores=scores[:, :width].contiguous(),
        chain=torch.where(chain < width, chain, -1),
    )
    if states is None:
        return following
    first = torch.arange(requests, device=lane.device)[:, None] * rows
    source = (first + lane[:, :width] // ranks).flatten()
    bits = mask_bits(guesses, width)
    own = packed(torch.eye(bits, dtype=torch.bool, device=lane.device)[1 + depth * width : 1 + (depth + 1) * width])
    ancestors = own.new_zeros(requests * width, own.shape[1])
    if beams is None:
        ancestors[:, 0] = 1
    else:
        assert beams.mask is not None, "rows with states have a mask"
        ancestors = beams.mask[source]
    return replace(following, states=states[source], mask=ancestors | own.repeat(requests, 1))
