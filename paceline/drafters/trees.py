"""Which guesses of a trained drafter a draft of some length has, and the tree that they make, with copies or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from paceline.drafters.base import DraftBatch
from paceline.drafters.chooser import Guessed
from paceline.ops.copy_draft import CopyDraft, CopyState
from paceline.ops.join_drafts import MAX_NODES, Guesses, join_drafts

# The chance that a candidate beside the chain is right where the chain is wrong, over that of a token of the chain, by
# candidates at each depth of a chain and by beams. From the acceptance lengths of `python -m benchmarks.speculate --drafter
# joint:... --draft 7`, 11, 15, 23 and 31 with the 1.5B's EAGLE-3 drafter, whose chain is right 0.83 of the time. That of 4
# beams is extrapolated from those of 2 and 3.
BESIDE_CHAIN = {1: 0.0, 2: 0.40, 3: 0.48, 4: 0.52}
BESIDE_BEAMS = {2: 0.30, 3: 0.43, 4: 0.51}


class Shape(NamedTuple):
    """What the trained drafter gives for a draft of some length: guesses `depth` deep, `width` candidates at each depth, of
    which it continues the best `beams`. One beam is a chain, whose other candidates end.

    Passes of several beams need (depth - 1) * beams places, which must not be more than the length. A drafter of one pass
    needs `depth`.
    """

    depth: int
    width: int
    beams: int = 1


# Tokens beside the chain are cheap: a pass of the target takes an H200 1.38 ms with 8 rows and 1.42 ms with 24 (`python -m
# benchmarks.tools.step --polish 8`, `--polish 24`). `python -m benchmarks.tools.drafts` prints the steps of these lengths.
SHAPES = {
    2: Shape(2, 1),
    4: Shape(3, 2),
    7: Shape(5, 2),
    11: Shape(7, 2),
    15: Shape(8, 4, 2),
    23: Shape(8, 6, 3),
    31: Shape(10, 6, 3),
}
# Of a drafter of one pass, for which depth and beams cost no pass. Not tuned yet.
BLOCKS = {
    2: Shape(2, 1),
    4: Shape(4, 2),
    7: Shape(6, 2),
    11: Shape(8, 4, 2),
    15: Shape(10, 4, 3),
    23: Shape(12, 6, 4),
    31: Shape(12, 8, 4),
}


class Guessing(Protocol):
    """What a tree needs of a trained drafter; see TrainedDrafter."""

    one_pass: bool

    def guess(self, batch: DraftBatch, depth: int, width: int, beams: int = 1) -> Guesses: ...


class Trees:
    """The trees of one drafter. `shapes` are those of the lengths that are worth a choice."""

    def __init__(self, drafter: Guessing, most: int) -> None:
        """`most` is the depth that the drafter can guess."""
        self._drafter = drafter
        self._most = most
        every = BLOCKS if drafter.one_pass else SHAPES
        self.shapes = {length: shape._replace(depth=min(shape.depth, most)) for length, shape in every.items()}

    def shape(self, length: int) -> Shape:
        """That of `length`, or of the next smaller one where a draft is cut or its length fixed."""
        if length >= MAX_NODES:
            return Shape(0, 1)
        if length < 4:
            return Shape(min(length, self._most), 1)
        return next(self.shapes[each] for each in sorted(self.shapes, reverse=True) if each <= length)

    def guessed(self, length: int) -> Guessed:
        depth, width, beams = self.shape(length)
        return Guessed(depth, BESIDE_CHAIN[width]) if beams == 1 else Guessed(depth, BESIDE_BEAMS[beams], True)

    def propose(
        self, batch: DraftBatch, copied: CopyDraft, copy: CopyState, copied_lengths: Sequence[int] = ()
    ) -> CopyDraft:
        """A tree with as many rows as `copied`, of its tokens and of guesses. Drafts of `copied_lengths` have no guesses."""
        lengths = [batch.max_query - 1] if batch.is_uniform else (batch.query_starts.diff() - 1).tolist()
        shapes = [Shape(0, 1) if each in copied_lengths else self.shape(each) for each in lengths]
        most = Shape(*(max(column) for column in zip(*shapes, strict=True)))
        if most.depth == 0:
            return copied
        guesses = self._drafter.guess(batch, *most)
        if not batch.is_uniform:
            wide = most.beams > 1 and not self._drafter.one_pass  # passes of several rows, each with a place
            places = [length // most.beams + 1 if wide else length for length in lengths]
            depths = [min(shape.depth, place) for shape, place in zip(shapes, places, strict=True)]
            guesses = _limited(guesses, depths, shapes)
        return join_drafts(copied, copy, batch.slots, guesses, batch.query_starts, batch.max_query)


def _limited(guesses: Guesses, depths: Sequence[int], shapes: Sequence[Shape]) -> Guesses:
    """The guesses that each request has places and a shape for; others have no probability."""
    logprobs = guesses.logprobs.clone()
    for request, (depth, shape) in enumerate(zip(depths, shapes, strict=True)):
        logprobs[request, depth:] = -torch.inf
        logprobs[request, :, shape.width :] = -torch.inf
    return replace(guesses, logprobs=logprobs)
