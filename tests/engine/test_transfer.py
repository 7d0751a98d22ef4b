"""What goes to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch

from paceline.engine.transfer import together


def test_parts_are_whole_and_aligned() -> None:
    for dtype in (torch.int64, torch.int32):
        parts = [[1, 2, 3], np.arange(8), [], [7]]
        found = together(parts, dtype, torch.device("cpu"))
        assert [each.tolist() for each in found] == [list(part) for part in parts]
        assert all(each.dtype is dtype and each.data_ptr() % 16 == 0 for each in found)
