"""A drafter of trees: each node's children are tokens that followed its token in the text."""

from __future__ import annotations

import torch

from paceline.drafters.base import DraftBatch, Drafter
from paceline.ops.draft import DRAFTED, Draft

_CHILDREN = 3


class TreeDrafter(Drafter):
    """Breadth first from the root, up to three children a node, the latest followers first."""

    lengths = (0, 8, 40)

    def propose(self, batch: DraftBatch) -> Draft:
        tokens, depths, marks, parents = [], [], [], []
        bounds = batch.query_starts.tolist()
        for slot, first, last in zip(batch.slots.tolist(), bounds, bounds[1:], strict=False):
            begin, end = int(batch.state.history_start[slot]), int(batch.state.end[slot])
            text = batch.state.text[slot, begin:end].tolist()
            own, depth, parent = [text[-1]], [0], [0]
            node = 0
            while node < len(own) < last - first:
                for token in followers(text, own[node])[: last - first - len(own)]:
                    own.append(token)
                    depth.append(depth[node] + 1)
                    parent.append(node)
                node += 1
            padding = last - first - len(own)
            tokens += own + [0] * padding
            depths += depth + [1] * padding
            marks += [0, *[DRAFTED] * (len(own) - 1), *[0] * padding]
            parents += parent + [0] * padding
        depths_, marks_, parents_ = (torch.tensor(each, dtype=torch.int32) for each in (depths, marks, parents))
        return Draft(torch.tensor(tokens), depths_, marks_, parents=parents_)


def followers(text: list[int], token: int) -> list[int]:
    """Distinct tokens that followed `token`, the latest first, at most _CHILDREN."""
    found = (text[place + 1] for place in range(len(text) - 2, -1, -1) if text[place] == token)
    return list(dict.fromkeys(found))[:_CHILDREN]
