"""One verification tree from a trained drafter's guesses and the copy drafter's chains, where there are any.

A node's score is the logarithm of the estimated chance that all tokens up to it are accepted. Scores fall along every
path, so the nodes with the best scores form a tree, and of its size it is the one with the most expected accepted tokens.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.copy_draft import CopyDraft, CopyState
from paceline.ops.dispatch import implementation
from paceline.ops.draft import DRAFTED, FROM_MODEL

MAX_NODES = 64  # rows of a tree of guesses, the root included; kernels hold all candidates of a request at once
# By the copy drafter's streak (none, below 8, below 32, more): the chances that a copied chain's first token is accepted, and
# each after an accepted one. The chooser begins with the same (drafters/chooser.py), where a command for them is named.
SURVIVAL = ((0.25, 0.8), (0.6, 0.9), (0.9, 0.97), (0.97, 0.995))
STREAKS = (1, 8, 32)  # where the second to fourth begin
NEXT_BRANCH = 0.5  # after a miss: the chance of a chain over that of the chain before it


@dataclass(frozen=True)
class Guesses:
    """A trained drafter's guesses: C candidates for each of the K tokens after the root. Without `parents` they are a chain:
    the first candidate at each depth continues it, the others end there.

    tokens [B, K, C] int64 of the target's vocabulary;
    logprobs [B, K, C] float32 of each candidate given those before it on its path; -inf: no candidate;
    parents [B, K, C] int32: which candidate of the depth above each follows, not read at the first depth; None: the first;
    chain [B, K] int32: which candidate at each depth is on the path of first choices, -1 after its end; None: the first.

    Where the first choice is drawn, the log-probabilities are still those of the likeliest tokens, in their order: a draw that
    the target shares is accepted more often than the token's own probability says.
    """

    tokens: Tensor
    logprobs: Tensor
    parents: Tensor | None = None
    chain: Tensor | None = None


def join_drafts(
    copied: CopyDraft, copy: CopyState, slots: Tensor, guesses: Guesses, query_starts: Tensor, max_query: int
) -> CopyDraft:
    """A tree with as many rows as `copied`: of each request the candidates of both drafts with the best scores.

    A guess scores the sum of the log-probabilities on its path, a copied token by the streak of its request. A token that
    both have at the same place is one node, with the better score and the marks of both. Nodes are in the order of their
    scores; of equals guesses come first, then lower depths. Guesses on the chain of first choices are marked FROM_MODEL.
    Guesses with the log-probability -inf are none, and so are those that follow them.
    `max_query`, at most MAX_NODES, is the most rows that a request has.
    """
    return implementation("join_drafts", copied.tokens)(copied, copy, slots, guesses, query_starts, max_query)


@dataclass
class _Node:
    token: int
    depth: int
    parent: _Node | None
    score: float
    marks: int
    origin: int = -1


def reference(
    copied: CopyDraft, copy: CopyState, slots: Tensor, guesses: Guesses, query_starts: Tensor, max_query: int
) -> CopyDraft:
    bounds = query_starts.tolist()
    streaks = copy.streak[slots].tolist()
    rows: list[tuple[int, int, int, int, int]] = []  # token, depth, marks, parent, origin
    for request, (first, last) in enumerate(itertools.pairwise(bounds)):
        nodes = _guessed(guesses, request)
        _add_copied(nodes, copied, first, last, streaks[request])
        nodes.sort(key=lambda node: -node.score)  # stable
        nodes = nodes[: last - first - 1]
        place = {id(node): index for index, node in enumerate(nodes, 1)}
        rows.append((int(copied.tokens[first]), 0, 0, 0, -1))
        for node in nodes:
            parent = 0 if node.parent is None else place[id(node.parent)]
            rows.append((node.token, node.depth, node.marks, parent, node.origin))
        rows += [(0, 1, 0, 0, -1)] * (last - first - 1 - len(nodes))
    tokens, depths, marks, parents, origins = (torch.tensor(each) for each in zip(*rows, strict=True))
    return CopyDraft(
        tokens, depths.int(), marks.int(), parents=parents.int(), origins=origins.int(), guesses=copied.guesses
    )


def _guessed(guesses: Guesses, request: int) -> list[_Node]:
    tokens, logprobs = guesses.tokens[request].tolist(), guesses.logprobs[request].tolist()
    depth, width = guesses.tokens.shape[1:]
    parents = [[0] * width] * depth if guesses.parents is None else guesses.parents[request].tolist()
    chain = [0] * depth if guesses.chain is None else guesses.chain[request].tolist()
    levels: list[list[_Node | None]] = []
    for level in range(depth):
        levels.append([])
        for number, (token, logprob) in enumerate(zip(tokens[level], logprobs[level], strict=True)):
            parent = levels[level - 1][parents[level][number]] if level else None
            node = None
            if logprob > -math.inf and (level == 0 or parent is not None):
                score = min(logprob, 0.0) + (0.0 if parent is None else parent.score)
                on_chain = number == chain[level]
                node = _Node(token, level + 1, parent, score, DRAFTED | (FROM_MODEL if on_chain else 0))
            levels[level].append(node)
    return [node for level in levels for node in level if node is not None]


def _add_copied(nodes: list[_Node], copied: CopyDraft, first: int, last: int, streak: int) -> None:
    """Adds copied tokens to the guesses, or to the guess that is the same token at the same place."""
    assert copied.branch_starts is not None
    state = sum(streak >= each for each in STREAKS)
    once, more = (math.log(chance) for chance in SURVIVAL[state])
    children: dict[tuple[int | None, int], _Node] = {}
    for node in nodes:
        children.setdefault((None if node.parent is None else id(node.parent), node.token), node)
    starts = copied.branch_starts[first:last].tolist()
    marks, tokens = copied.marks[first:last].tolist(), copied.tokens[first:last].tolist()
    origins = copied.origins[first:last].tolist()
    branch, before = -1, None
    for row in range(1, last - first):
        if not marks[row] & DRAFTED:
            break  # padding comes last
        if starts[row] == row:
            branch, before = branch + 1, None
        depth = 1 if before is None else before.depth + 1
        score = once + branch * math.log(NEXT_BRANCH) + (depth - 1) * more
        same = children.get((None if before is None else id(before), tokens[row]))
        if same is None:
            before = _Node(tokens[row], depth, before, score, marks[row], origins[row])
            nodes.append(before)
        else:
            same.score, same.origin = max(same.score, score), origins[row]
            same.marks |= marks[row]
            before = same
