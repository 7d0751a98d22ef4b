"""A drafter in 30 lines, as an example of what one needs: prompt lookup decoding."""

from __future__ import annotations

import torch

from paceline.drafters.base import DraftBatch, Drafter
from paceline.ops.draft import DRAFTED, Draft

_SIZE = 2  # tokens that must agree


class NgramDrafter(Drafter):
    """Continues as the text did after the latest earlier occurrence of its last two tokens (Saxena 2023)."""

    lengths = (0, 4, 16)

    def propose(self, batch: DraftBatch) -> Draft:
        tokens, depths, marks, starts = [], [], [], []
        bounds = batch.query_starts.tolist()
        for slot, first, last in zip(batch.slots.tolist(), bounds, bounds[1:], strict=False):
            begin, end = int(batch.state.history_start[slot]), int(batch.state.end[slot])
            text = batch.state.text[slot, begin:end].tolist()
            drafted = continuation(text)[: last - first - 1]
            padding = last - first - 1 - len(drafted)
            tokens += [text[-1], *drafted, *[0] * padding]
            depths += [0, *range(1, len(drafted) + 1), *[1] * padding]
            marks += [0, *[DRAFTED] * len(drafted), *[0] * padding]
            starts += [0, *[1] * len(drafted), *range(len(drafted) + 1, last - first)]
        flat = (torch.tensor(each, dtype=torch.int32) for each in (depths, marks, starts))
        depths_, marks_, starts_ = flat
        return Draft(torch.tensor(tokens), depths_, marks_, branch_starts=starts_)


def continuation(text: list[int]) -> list[int]:
    """What followed the latest earlier occurrence of the last _SIZE tokens; empty where there is none."""
    for place in range(len(text) - 1, _SIZE - 1, -1):
        if text[place - _SIZE : place] == text[-_SIZE:]:
            return text[place:]
    return []
