"""The small work around a trained drafter's products: what it keeps in the cache, and an EAGLE-3 drafter's normalised input.

Row j of an EAGLE-3 drafter takes token j and the state of token j - 1 (drafters/eagle3.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.attention import AttentionBatch
from paceline.ops.dispatch import implementation
from paceline.ops.draft import Draft
from paceline.ops.layout import owners
from paceline.ops.linear import rms_norm
from paceline.ops.rope import rope_and_cache


@dataclass(frozen=True)
class InputWeights:
    """What makes a token and a state an input: embedding [V, H], the weights [H] of their RMS norms, and eps."""

    embedding: Tensor
    token_norm: Tensor
    state_norm: Tensor
    eps: float


def last_states(batch: AttentionBatch, plane: Tensor, page_size: int) -> Tensor:
    """The state [B, H] of each request's last committed token; zeros where it has none. plane [locations, H]."""
    return implementation("last_states", plane)(batch, plane, page_size)


def draft_input(tokens: Tensor, states: Tensor, weights: InputWeights) -> Tensor:
    """[T, 2 * H]: the RMS norms of the embeddings of tokens [T] and of states [T, H], side by side."""
    return implementation("draft_input", states)(tokens, states, weights)


def keep_states(
    batch: AttentionBatch,
    plane: Tensor,
    page_size: int,
    tokens: Tensor,
    states: Tensor,
    draft: Draft | None,
    weights: InputWeights,
) -> Tensor:
    """Writes the states [T, H] of a step's tokens [T] to the plane [locations, H]; the `draft_input` [T, 2 * H] of their rows.

    The tree of `draft` says which token comes before each; None where that is the row before. Before a request's first row
    comes its last committed token, whose state is in the plane. Rows after the last request's queries have zeros before them.
    """
    return implementation("keep_states", plane)(batch, plane, page_size, tokens, states, draft, weights)


def keep_layers(
    states: Tensor,
    table: Tensor,
    positions: Tensor,
    locations: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norms: tuple[Tensor, float] | None = None,
) -> None:
    """`rope_and_cache` of the keys and values of L layers, without queries.

    states [T, L * 2 * kv_heads * dim] hold each layer's keys, then its values; `keys` and `values` are the layers' planes
    [locations, kv_heads, dim], at equal distances in one tensor as those of a KVCache are. `norms` (weights [L, dim], eps)
    are those of the keys.
    """
    implementation("keep_layers", states)(states, table, positions, locations, keys, values, norms)


def last_reference(batch: AttentionBatch, plane: Tensor, page_size: int) -> Tensor:
    places = (batch.context_lens - 1).clamp(min=0)
    pages = batch.page_table.gather(1, (places // page_size).long()[:, None])[:, 0].long()
    states = plane[pages * page_size + places % page_size]
    return torch.where((batch.context_lens > 0)[:, None], states, 0.0)


def states_before(batch: AttentionBatch, plane: Tensor, page_size: int, states: Tensor, draft: Draft | None) -> Tensor:
    """The states [T, H] of the tokens before each of a step's; see `keep_states`."""
    if draft is None:
        before = states.roll(1, 0)
    else:
        owner = owners(batch.query_starts, len(states))
        before = states[draft.parent_rows(batch.query_starts[owner])]
    before[batch.query_starts[-1] :] = 0.0
    return before.index_copy_(0, batch.query_starts[:-1].long(), last_reference(batch, plane, page_size))


def keep_reference(
    batch: AttentionBatch,
    plane: Tensor,
    page_size: int,
    tokens: Tensor,
    states: Tensor,
    draft: Draft | None,
    weights: InputWeights,
) -> Tensor:
    before = states_before(batch, plane, page_size, states, draft)
    plane.index_copy_(0, batch.locations, states)
    return input_reference(tokens, before, weights)


def input_reference(tokens: Tensor, states: Tensor, weights: InputWeights) -> Tensor:
    embedded = torch.nn.functional.embedding(tokens, weights.embedding)
    parts = ((embedded, weights.token_norm), (states, weights.state_norm))
    return torch.cat([rms_norm(values, norm, weights.eps) for values, norm in parts], dim=-1)


def layers_reference(
    states: Tensor,
    table: Tensor,
    positions: Tensor,
    locations: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    norms: tuple[Tensor, float] | None = None,
) -> None:
    parts = states.chunk(len(keys), dim=1)
    for index, (part, key, value) in enumerate(zip(parts, keys, values, strict=True)):
        of_keys = None if norms is None else (norms[0][index], norms[0][index], norms[1])
        rope_and_cache(part.contiguous(), table, positions, locations, key, value, 0, of_keys)
