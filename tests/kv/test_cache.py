"""The tensors of the KV cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.kv.cache import KVCache

_STATUS = Path("/proc/self/statm")


@pytest.mark.skipif(not _STATUS.exists(), reason="no /proc here")
def test_memory_is_taken_as_the_cache_fills() -> None:
    before = _resident_pages()
    cache = KVCache(16, 4096, 16, 4, 64, torch.bfloat16, torch.device("cpu"))
    assert cache.data.nbytes == 1 << 30
    assert (_resident_pages() - before) * 4096 < 64 << 20
    keys, values = cache.layer(15)
    assert keys.shape == values.shape == (65536, 4, 64) and not values[-1].any()
    values[-1] = 1.5
    assert cache.data[15, 1, -1].eq(1.5).all() and not cache.data[15, 0, -1].any()


def _resident_pages() -> int:
    return int(_STATUS.read_text().split()[1])
