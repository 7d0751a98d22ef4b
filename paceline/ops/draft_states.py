"""The small work around an EAGLE-3 drafter's products: the states that it keeps in the cache, and its normalised input.

Row j of the drafter takes token j and the state of token j - 1 (drafters/eagle3.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops.attention import AttentionBatch
from paceline.ops.dispatch import implementation
from paceline.ops.draft import Draft
from paceline.ops.layout import owners
from paceline.ops.linear import rms_norm


def last_states(batch: AttentionBatch, plane: Tensor, page_size: int) -> Tensor:
    """The state [B, H] of each request's last committed token; zeros where it has none. plane [locations, H]."""
    return implementation("last_states", plane)(batch, plane, page_size)


def keep_states(batch: AttentionBatch, plane: Tensor, page_size: int, states: Tensor, draft: Draft | None) -> Tensor:
    """Writes the states [T, H] of a step's tokens to the plane [locations, H]; the states [T, H] of the tokens before them.

    The tree of `draft` says which token comes before each; None where that is the row before. Before a request's first row
    comes its last committed token, whose state is in the plane. Rows after the last request's queries give zeros.
    """
    return implementation("keep_states", plane)(batch, plane, page_size, states, draft)


def draft_input(
    tokens: Tensor, embedding: Tensor, states: Tensor, token_norm: Tensor, state_norm: Tensor, eps: float
) -> Tensor:
    """[T, 2 * H]: the RMS norms of the tokens' embeddings and of states [T, H], side by side. embedding [V, H]."""
    return implementation("draft_input", states)(tokens, embedding, states, token_norm, state_norm, eps)


def last_reference(batch: AttentionBatch, plane: Tensor, page_size: int) -> Tensor:
    places = (batch.context_lens - 1).clamp(min=0)
    pages = batch.page_table.gather(1, (places // page_size).long()[:, None])[:, 0].long()
    states = plane[pages * page_size + places % page_size]
    return torch.where((batch.context_lens > 0)[:, None], states, 0.0)


def keep_reference(batch: AttentionBatch, plane: Tensor, page_size: int, states: Tensor, draft: Draft | None) -> Tensor:
    if draft is None:
        before = states.roll(1, 0)
    else:
        owner = owners(batch.query_starts, len(states))
        before = states[draft.parent_rows(batch.query_starts[owner])]
    before[batch.query_starts[-1] :] = 0.0
    before.index_copy_(0, batch.query_starts[:-1].long(), last_reference(batch, plane, page_size))
    plane.index_copy_(0, batch.locations, states)
    return before


def input_reference(
    tokens: Tensor, embedding: Tensor, states: Tensor, token_norm: Tensor, state_norm: Tensor, eps: float
) -> Tensor:
    embedded = torch.nn.functional.embedding(tokens, embedding)
    return torch.cat([rms_norm(embedded, token_norm, eps), rms_norm(states, state_norm, eps)], dim=-1)
