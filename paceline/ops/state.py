"""The state of every running request on the device, independent of the drafter.

Each request has a slot, a row of these tensors:

    text[slot] = | source 0 | -1 | source 1 | -1 | prompt ............ | output ... root | (room) |
                                                 ^ history_start                        ^ end

The root is the last token known; its keys and values are computed by the next step. Sources are texts that the output may
copy from, best first, each ended by -1. The last slot is spare: it pads a step to a captured shape and never changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SlotState:
    """text [S, W] int32; history_start and end [S] int32, indices into the slot's text."""

    text: Tensor
    history_start: Tensor
    end: Tensor

    @classmethod
    def empty(cls, num_slots: int, width: int, device: torch.device) -> SlotState:
        """Every slot holds the one token 0, which is its root."""
        text = torch.full((num_slots, width), -1, dtype=torch.int32, device=device)
        text[:, 0] = 0
        start = torch.zeros(num_slots, dtype=torch.int32, device=device)
        return cls(text, start, torch.ones_like(start))

    @property
    def spare(self) -> int:
        """The slot of padding."""
        return len(self.end) - 1
