"""The joint tree of a copied and a guessed draft: its shape by hand, and the kernel against the reference."""

from __future__ import annotations

import dataclasses
import math
import os
import random
from typing import Any

import pytest
import torch

from paceline.ops import join_drafts
from paceline.ops.copy_draft import CopyDraft, CopyState
from paceline.ops.draft import DRAFTED, FROM_MODEL, FROM_SOURCE, LENIENT
from paceline.ops.join_drafts import Guesses

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
COPIED = DRAFTED | FROM_SOURCE | LENIENT


def copied_draft(chains: list[list[list[int]]], room: int) -> tuple[CopyDraft, torch.Tensor]:
    """Of each request the chains that the copy drafter gives, origins 100 and up."""
    columns: list[list[int]] = [[] for _ in range(5)]
    for request in chains:
        rows = [(7, 0, 0, 0, -1)]
        for chain in request:
            first = len(rows)
            rows += [(token, depth, COPIED, first, 99 + first + depth) for depth, token in enumerate(chain, 1)]
        rows += [(0, 1, 0, padding, -1) for padding in range(len(rows), room + 1)]
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            column.extend(values)
    tokens, depths, marks, starts, origins = (torch.tensor(each, device=DEVICE) for each in columns)
    draft = CopyDraft(
        tokens,
        depths.int(),
        marks.int(),
        branch_starts=starts.int(),
        origins=origins.int(),
        guesses=torch.full((len(chains),), 100, dtype=torch.int32, device=DEVICE),
    )
    return draft, torch.arange(len(chains) + 1, dtype=torch.int32, device=DEVICE) * (room + 1)


def guesses_of(tokens: list[list[list[int]]], chances: list[list[list[float]]]) -> Guesses:
    return Guesses(torch.tensor(tokens, device=DEVICE), torch.tensor(chances, device=DEVICE).log())


def state_of(streaks: list[int]) -> tuple[CopyState, torch.Tensor]:
    state = CopyState.empty(len(streaks) + 1, DEVICE)
    state.streak[: len(streaks)] = torch.tensor(streaks, dtype=torch.int32)
    return state, torch.arange(len(streaks), device=DEVICE)


def test_both_drafts_share_what_they_agree_on() -> None:
    copied, bounds = copied_draft([[[1, 2, 9, 9]]], 7)
    state, slots = state_of([8])  # its tokens are accepted with 0.9, then 0.97 each
    guesses = guesses_of([[[1, 5], [2, 6], [3, 9]]], [[[0.8, 0.1], [0.7, 0.2], [0.6, 0.3]]])
    tree = join_drafts.reference(copied, state, slots, guesses, bounds, 8)
    # 1: 0.9, 2: 0.873, the copied 9 is the guess 9 at depth 3: 0.847, and the 9 after it 0.821; then 3: 0.8 * 0.7 * 0.6
    assert tree.tokens.tolist() == [7, 1, 2, 9, 9, 3, 6, 5]
    assert tree.parents is not None and tree.parents.tolist() == [0, 0, 1, 2, 3, 2, 1, 0]
    assert tree.depths.tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert tree.origins.tolist() == [-1, 101, 102, 103, 104, -1, -1, -1]
    chain = COPIED | FROM_MODEL
    assert tree.marks.tolist() == [0, chain, chain, COPIED, COPIED, DRAFTED | FROM_MODEL, DRAFTED, DRAFTED]


def test_a_sure_drafter_leaves_little_to_a_lost_copy() -> None:
    copied, bounds = copied_draft([[[4, 4, 4], [5, 5, 5]]], 6)
    state, slots = state_of([0])
    guesses = guesses_of([[[1], [2], [3], [3]]], [[[0.95], [0.9], [0.9], [0.9]]])
    tree = join_drafts.reference(copied, state, slots, guesses, bounds, 7)
    assert tree.tokens.tolist() == [7, 1, 2, 3, 3, 4, 4]
    assert tree.parents is not None and tree.parents.tolist() == [0, 0, 1, 2, 3, 0, 5]


def test_padding_comes_last() -> None:
    copied, bounds = copied_draft([[]], 5)
    state, slots = state_of([0])
    tree = join_drafts.reference(copied, state, slots, guesses_of([[[1], [2]]], [[[0.5], [0.5]]]), bounds, 6)
    assert tree.tokens.tolist() == [7, 1, 2, 0, 0, 0]
    assert tree.marks.tolist() == [0, DRAFTED | FROM_MODEL, DRAFTED | FROM_MODEL, 0, 0, 0]


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("room", [5, 12, 30])
def test_trees_are_well_formed_and_kernels_equal_the_reference(room: int, width: int) -> None:
    draw = torch.Generator().manual_seed(room * width)

    def token() -> int:
        return int(torch.randint(3, (1,), generator=draw))

    for _ in range(6):
        requests, depth = 3, 5
        chains, tokens = [], []
        for _request in range(requests):
            firsts = torch.randperm(3, generator=draw)[: int(torch.randint(0, 4, (1,), generator=draw))].tolist()
            share = room // max(1, len(firsts))
            chains.append([[first, *(token() for _ in range(share - 1))] for first in firsts])
            tokens.append([torch.randperm(3, generator=draw)[:width].tolist() for _ in range(depth)])
        shares = torch.rand(requests, depth, width, generator=draw).sort(-1, descending=True).values * 0.9 + 0.01
        copied, bounds = copied_draft(chains, room)
        state, slots = state_of([0, 5, 40])
        guesses = Guesses(torch.tensor(tokens, device=DEVICE), shares.log().to(DEVICE))
        tree = join_drafts.reference(copied, state, slots, guesses, bounds, room + 1)
        parents = tree.parents
        assert parents is not None
        for request in range(requests):
            first = request * (room + 1)
            paths = set()
            for row in range(1, room + 1):
                if tree.marks[first + row] & DRAFTED:
                    above = int(parents[first + row])
                    assert above < row and tree.depths[first + row] == tree.depths[first + above] + 1
                    paths.add((above, int(tree.tokens[first + row])))
            count = int((tree.marks[first : first + room + 1] & DRAFTED).count_nonzero())
            assert len(paths) == count, "a node occurs once"
        check_kernel(tree, copied, state, slots, guesses, bounds, room + 1)


Row = tuple[int, int, int, int, int]  # token, depth, marks, parent, origin


def random_guesses(draw: random.Random, depth: int, width: int, beams: int) -> list[list[tuple[int, float, int]]]:
    """Token, log-probability and parent of each candidate: siblings differ, and the parents are among the first `beams`.

    Log-probabilities are eighths, so that sums are exact and many are equal.
    """
    levels: list[list[tuple[int, float, int]]] = []
    for level in range(depth):
        parents = [draw.randrange(min(beams, width)) if level else draw.randrange(width) for _ in range(width)]
        used: dict[int, list[int]] = {}
        candidates = []
        for parent in parents:
            siblings = used.setdefault(parent if level else 0, [])
            siblings.append(draw.choice([token for token in range(width + 3) if token not in siblings]))
            logprob = -math.inf if draw.random() < 0.1 else draw.choice([0.25, 0.0, -0.125, -0.25, -0.5, -1.0, -2.0])
            candidates.append((siblings[-1], logprob, parent))
        levels.append(candidates)
    return levels


def defined(
    root: int,
    guesses: list[list[tuple[int, float, int]]],
    chain: list[int],
    chains: list[list[int]],
    survival: tuple[float, float],
    room: int,
) -> list[Row]:
    """The rows of a request's tree, a node being the tokens from the root to it."""
    scores: dict[tuple[int, ...], float] = {}
    marks: dict[tuple[int, ...], int] = {}
    origins: dict[tuple[int, ...], int] = {}
    above: list[tuple[int, ...] | None] = []
    for level, candidates in enumerate(guesses):
        paths: list[tuple[int, ...] | None] = []
        for number, (token, logprob, parent) in enumerate(candidates):
            before = above[parent] if level else ()
            if logprob == -math.inf or before is None:
                paths.append(None)
                continue
            path = (*before, token)
            paths.append(path)
            scores[path] = min(logprob, 0.0) + scores.get(before, 0.0)
            marks[path] = DRAFTED | (FROM_MODEL if chain[level] == number else 0)
        above = paths
    place = 1
    for branch, copied in enumerate(chains):
        for depth in range(1, len(copied) + 1):
            path = tuple(copied[:depth])
            score = math.log(survival[0]) + branch * math.log(0.5) + (depth - 1) * math.log(survival[1])
            scores[path] = max(score, scores.get(path, -math.inf))
            marks[path] = marks.get(path, 0) | COPIED
            origins[path] = 100 + place
            place += 1
    kept = sorted(scores, key=lambda path: -scores[path])[:room]
    rows = [(root, 0, 0, 0, -1)]
    for path in kept:
        parent = 0 if len(path) == 1 else kept.index(path[:-1]) + 1
        rows.append((path[-1], len(path), marks[path], parent, origins.get(path, -1)))
    return rows + [(0, 1, 0, 0, -1)] * (room - len(kept))


@pytest.mark.parametrize(
    ("depth", "width", "beams", "room"), [(1, 2, 1, 4), (4, 3, 2, 6), (8, 6, 3, 23), (11, 6, 3, 31), (10, 6, 6, 63)]
)
def test_guesses_that_branch_make_the_tree_of_the_definition(depth: int, width: int, beams: int, room: int) -> None:
    draw = random.Random(depth + room)
    for _ in range(6):
        streaks, expected, chains = [0, 5, 40, 9], [], []
        levels = [random_guesses(draw, depth, width, beams) for _ in streaks]
        firsts = [[draw.choice([-1, *range(width)]) for _ in range(depth)] for _ in streaks]
        for guesses, chain, streak in zip(levels, firsts, streaks, strict=True):
            chains.append(copies_of(draw, guesses, room))
            survival = join_drafts.SURVIVAL[sum(streak >= each for each in join_drafts.STREAKS)]
            expected += defined(7, guesses, chain, chains[-1], survival, room)
        copied, bounds = copied_draft(chains, room)
        state, slots = state_of(streaks)
        tokens, logprobs, parents = torch.tensor(levels, dtype=torch.float64, device=DEVICE).unbind(-1)
        branching = Guesses(tokens.long(), logprobs.float(), parents.int(), torch.tensor(firsts, device=DEVICE).int())
        tree = join_drafts.reference(copied, state, slots, branching, bounds, room + 1)
        assert tree.parents is not None
        columns = (tree.tokens, tree.depths, tree.marks, tree.parents, tree.origins)
        assert list(zip(*(each.tolist() for each in columns), strict=True)) == expected
        check_kernel(tree, copied, state, slots, branching, bounds, room + 1)


def copies_of(draw: random.Random, guesses: list[list[tuple[int, float, int]]], room: int) -> list[list[int]]:
    """Up to three chains with different first tokens, each along a random path of the guesses and then its own way."""
    chains: dict[int, list[int]] = {}
    number = draw.randrange(4)
    for _ in range(number):
        level = draw.randrange(len(guesses))
        at = draw.randrange(len(guesses[0]))
        path: list[int] = []
        for each in range(level, -1, -1):
            token, _, parent = guesses[each][at]
            path.insert(0, token)
            at = parent
        path += [draw.randrange(len(guesses[0]) + 3) for _ in range(draw.randrange(6))]
        chains.setdefault(path[0], path[: room // number])
    return list(chains.values())


def check_kernel(tree: CopyDraft, *arguments: Any) -> None:
    """Where there is a device or the interpreter: that the kernel gives `tree`."""
    if not (torch.cuda.is_available() or INTERPRETED):
        return
    pytest.importorskip("triton")
    from paceline.ops.triton import join_drafts as kernels

    found = kernels.join_drafts(*arguments)
    for each in dataclasses.fields(tree):
        mine, expected = getattr(found, each.name), getattr(tree, each.name)
        assert (mine is None) == (expected is None), each.name
        assert mine is None or torch.equal(mine.cpu().long(), expected.cpu().long()), each.name


def test_a_copy_follows_guesses_beside_the_chain() -> None:
    copied, bounds = copied_draft([[[5, 6, 8]]], 6)
    state, slots = state_of([8])
    guesses = guesses_of([[[1, 5], [2, 6], [3, 4]]], [[[0.8, 0.1], [0.7, 0.6], [0.5, 0.4]]])
    parents = torch.tensor([[[0, 0], [0, 1], [1, 0]]], device=DEVICE).int()
    chain = torch.tensor([[0, 0, 1]], device=DEVICE).int()
    guesses = dataclasses.replace(guesses, parents=parents, chain=chain)
    tree = join_drafts.reference(copied, state, slots, guesses, bounds, 7)
    # copied: 5, 6 and 8 (0.9, 0.873, 0.847); the chain 1, 2, 4 (0.8, 0.56, 0.224); 3 after the 6 (0.03) has no room
    assert tree.tokens.tolist() == [7, 5, 6, 8, 1, 2, 4]
    assert tree.parents is not None and tree.parents.tolist() == [0, 0, 1, 2, 0, 4, 5]
    assert tree.origins.tolist() == [-1, 101, 102, 103, -1, -1, -1]
    ours = DRAFTED | FROM_MODEL
    assert tree.marks.tolist() == [0, COPIED, COPIED, COPIED, ours, ours, ours]
    check_kernel(tree, copied, state, slots, guesses, bounds, 7)


def test_the_survival_table_falls_along_every_chain() -> None:
    for once, more in join_drafts.SURVIVAL:
        assert 0 < once < 1 and 0 < more < 1 and math.log(once) < 0


@pytest.mark.parametrize(("depth", "width"), [(5, 2), (10, 3)])
def test_no_child_comes_before_its_parent_however_sure_the_drafter_is(depth: int, width: int) -> None:
    """Chances next to 1, whose sums a parallel scan rounds differently at each depth."""
    draw = torch.Generator().manual_seed(depth)
    room, requests = 23, 16
    tokens = torch.stack([torch.randperm(50, generator=draw)[:width] for _ in range(requests * depth)])
    scale = 10.0 ** -torch.randint(0, 9, (requests, depth, width), generator=draw)
    logprobs = -torch.rand(requests, depth, width, generator=draw) * scale
    logprobs[0] = 0.0
    guesses = Guesses(tokens.view(requests, depth, width).to(DEVICE), logprobs.to(DEVICE))
    copied, bounds = copied_draft([[] for _ in range(requests)], room)
    state, slots = state_of([0] * requests)
    functions = [join_drafts.reference]
    if torch.cuda.is_available() or INTERPRETED:
        from paceline.ops.triton import join_drafts as kernels

        functions.append(kernels.join_drafts)
    for function in functions:
        tree = function(copied, state, slots, guesses, bounds, room + 1)
        assert tree.parents is not None
        parents = tree.parents.view(requests, room + 1)
        assert bool((parents[:, 1:] < torch.arange(1, room + 1, device=parents.device)).all())
        depths = tree.depths.view(requests, room + 1)
        drafted = tree.marks.view(requests, room + 1) & DRAFTED != 0
        assert bool((depths == depths.gather(1, parents.long()) + drafted.int())[drafted].all())
