"""A step's drafts: the tokens that one pass of the target verifies, and the tree that they form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

DRAFTED = 1  # a drafted token; neither a root nor padding
FROM_SOURCE = 2  # drafted from one of the request's explicit sources
LENIENT = 4  # a margin (docs/apply.md) may accept it though it is not the target's choice
FROM_MODEL = 8  # on the chain that a trained drafter finds likeliest
PER_REQUEST = {"rows": "requests"}  # metadata of a Draft's field that has a row per request; others have one per query


@dataclass
class Draft:
    """What a step feeds the model, flat over requests: T queries, each request's root first, then its drafted tokens.

    tokens [T] int64; depths [T] int32, the distance from the root; marks [T] int32, the sum of the flags above.
    The tree is in one of two forms, both in query indices within the request:
    branch_starts [T] int32: chains from the root, the first query of a token's chain; 0 for the root;
    parents [T] int32: any tree, a token's parent, which comes before it; 0 for the root.
    Padding comes last, unmarked, as a chain of its own or a child of the root.

    There are no draft probabilities: the target's choice is a function of seed, position and logits, and a drafted token is
    accepted when it equals that choice, which keeps the target's distribution for every drafter (engine/sampler.py).
    """

    tokens: Tensor
    depths: Tensor
    marks: Tensor
    branch_starts: Tensor | None = None
    parents: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.branch_starts is None) != (self.parents is None), "a draft has branch_starts or parents"

    def take(self, num_queries: int, num_requests: int) -> Self:
        """The part of a padded step's draft that belongs to its first requests. Views, no copies."""
        changes = {}
        for each in dataclasses.fields(self):
            if (value := getattr(self, each.name)) is not None:
                changes[each.name] = value[: num_requests if each.metadata == PER_REQUEST else num_queries]
        return dataclasses.replace(self, **changes)

    def parents_of(self, begin: int, end: int) -> Tensor:
        """[Q] for one request, whose queries are `begin:end`: the query index of each one's parent, the root's 0."""
        if self.parents is not None:
            return self.parents[begin:end]
        assert self.branch_starts is not None
        query = torch.arange(end - begin, device=self.tokens.device)
        return torch.where(query == self.branch_starts[begin:end], 0, query - 1)

    def parent_rows(self, first: Tensor) -> Tensor:
        """[T] int64: the row of each query's parent among the T, the root's its own. first [T] is the row of the root."""
        if self.parents is not None:
            return first.long() + self.parents
        row = torch.arange(len(self.tokens), device=self.tokens.device)
        assert self.branch_starts is not None
        return torch.where(row - first == self.branch_starts, first.long(), row - 1)

    def visible(self, begin: int, end: int) -> Tensor:
        """[Q, Q] bool for one request, whose queries are `begin:end`: which of them each query sees."""
        if self.parents is not None:
            return ancestors(self.parents[begin:end])
        assert self.branch_starts is not None
        return chains(self.branch_starts[begin:end])


def chains(branch_starts: Tensor) -> Tensor:
    """[Q, Q] bool: query i sees the root and the queries j with branch_starts[i] <= j <= i."""
    row = torch.arange(len(branch_starts), device=branch_starts.device)[:, None]
    column = row.T
    return (column <= row) & ((column == 0) | (column >= branch_starts[:, None]))


def ancestors(parents: Tensor) -> Tensor:
    """[Q, Q] bool: query i sees itself and its ancestors up to the root, query 0. parents [Q] int32."""
    count = len(parents)
    row = torch.arange(count, device=parents.device)
    reach = (row[:, None] == row) | (parents[:, None] == row)
    for _ in range((count - 1).bit_length()):  # each squaring doubles the distance that `reach` covers
        reach = (reach.float() @ reach.float()) > 0
    return reach


def packed(visible: Tensor) -> Tensor:
    """[Q, Q] bool -> [Q, W] int32, bit j % 32 of word j // 32 for query j."""
    count = visible.shape[1]
    bits = torch.nn.functional.pad(visible, (0, -count % 32)).view(len(visible), -1, 32).long()
    words = (bits << torch.arange(32, device=visible.device)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpacked(words: Tensor, count: int) -> Tensor:
    """The first `count` columns of what `packed` gave, [Q, count] bool."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(1)[:, :count].bool()
