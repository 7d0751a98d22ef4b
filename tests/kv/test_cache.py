"""Cache layouts, and the tensors made from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paceline.errors import ConfigError
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout, Plane

_STATUS = Path("/proc/self/statm")


CPU = torch.device("cpu")
DENSE = CacheLayout(16, (Plane("keys", 16, (4, 64), torch.bfloat16), Plane("values", 16, (4, 64), torch.bfloat16)))
MIXED = CacheLayout(  # latent attention's compressed KV, a drafter's keys and values, a scale a token, and a recurrent state
    4,
    (
        Plane("latent", 3, (9,), torch.bfloat16),
        Plane("draft.keys", 1, (2, 8), torch.float32),
        Plane("draft.values", 1, (2, 8), torch.float32),
        Plane("scale", 2, (), torch.float32),
    ),
    (Plane("recurrent", 2, (2, 5, 5), torch.float32),),
)


@pytest.mark.skipif(not _STATUS.exists(), reason="no /proc here")
def test_memory_is_taken_as_the_cache_fills() -> None:
    before = _resident_pages()
    cache = KVCache(DENSE, 4096, 1, CPU)
    assert DENSE.page_bytes * 4096 == 1 << 30
    assert (_resident_pages() - before) * 4096 < 64 << 20
    keys, values = cache.plane("keys", 15), cache.plane("values", 15)
    assert keys.shape == values.shape == (65536, 4, 64) and not values[-1].any()
    values[-1] = 1.5
    assert cache.plane("values", 15)[-1].eq(1.5).all() and not cache.plane("keys", 15)[-1].any()


def test_pages_are_written_as_they_were_read() -> None:
    one, other = KVCache(MIXED, 6, 3, CPU), KVCache(MIXED, 9, 3, CPU)
    for plane in MIXED.paged:
        for layer in range(plane.layers):
            one.plane(plane.name, layer).copy_(torch.randn(6 * 4, *plane.shape))
    data = one.read([4, 1])
    assert data.shape == (2, MIXED.page_bytes) and MIXED.page_bytes == 4 * (3 * 9 * 2 + 2 * 16 * 4 + 2 * 4)
    other.write([7, 2], data)
    for plane in MIXED.paged:
        for layer in range(plane.layers):
            mine, theirs = one.plane(plane.name, layer), other.plane(plane.name, layer)
            assert torch.equal(theirs[28:32], mine[16:20]) and torch.equal(theirs[8:12], mine[4:8])
            assert not theirs[12:28].any()
    assert torch.equal(other.read([7, 2]), data)
    assert other.plane("recurrent", 1).shape == (3, 2, 5, 5) and MIXED.request_bytes == 2 * 50 * 4


@pytest.mark.parametrize("shape", [(1, MIXED.page_bytes), (2, MIXED.page_bytes - 1)])
def test_pages_of_another_layout_are_refused(shape: tuple[int, int]) -> None:
    cache = KVCache(MIXED, 6, 1, CPU)
    with pytest.raises(ConfigError, match="pages of this cache"):
        cache.write([1, 2], torch.zeros(shape, dtype=torch.uint8))


def test_accepted_tokens_move_to_where_plain_decoding_puts_them() -> None:
    cache = KVCache(MIXED, 8, 1, CPU)
    for plane in MIXED.paged:
        for layer in range(plane.layers):
            cache.plane(plane.name, layer).copy_(torch.randn(8 * 4, *plane.shape))
    before = {plane.name: cache.plane(plane.name, 0).clone() for plane in MIXED.paged}
    table = torch.tensor([[5, 2, 7], [1, 3, 4]], dtype=torch.int32)
    path = torch.tensor([[2, 5, 6, 0], [1, 2, 0, 0]], dtype=torch.int32)
    cache.move(table, torch.tensor([3, 1], dtype=torch.int32), torch.tensor([4, 3], dtype=torch.int32), path)
    place = lambda index: int(table[0, index // 4]) * 4 + index % 4  # noqa: E731
    for plane in MIXED.paged:
        now = cache.plane(plane.name, 0)
        for target, source in ((4, 5), (5, 8), (6, 9)):  # context 3, so query q is at place 3 + q
            assert torch.equal(now[place(target)], before[plane.name][place(source)])
        assert torch.equal(now[4:8], before[plane.name][4:8]) and torch.equal(now[12:20], before[plane.name][12:20])


def test_a_digest_tells_layouts_apart() -> None:
    changes = (
        CacheLayout(8, DENSE.paged),
        CacheLayout(16, DENSE.paged[::-1]),
        CacheLayout(16, (replace(DENSE.paged[0], layers=15), DENSE.paged[1])),
        CacheLayout(16, (replace(DENSE.paged[0], shape=(2, 128)), DENSE.paged[1])),
        CacheLayout(16, (replace(DENSE.paged[0], dtype=torch.float16), DENSE.paged[1])),
        CacheLayout(16, (), DENSE.paged),
        DENSE.join(CacheLayout(16, (Plane("draft", 1, (4,), torch.float32),))),
    )
    assert len({each.digest() for each in (DENSE, *changes)}) == 1 + len(changes)
    assert DENSE.digest() == CacheLayout(16, tuple(replace(each) for each in DENSE.paged)).digest()


def test_layouts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="two planes"):
        DENSE.join(DENSE)
    with pytest.raises(ConfigError, match="page sizes"):
        DENSE.join(MIXED)


def _resident_pages() -> int:
    return int(_STATUS.read_text().split()[1])
