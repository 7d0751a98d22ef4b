"""The native CPU kernels against the torch references, and how they are built."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.ops import argmax, attention, linear, native, rope
from paceline.ops.dispatch import deterministic
from paceline.ops.native import attention as native_attention
from paceline.ops.weight import Packed, packs, prepare
from tests.ops.test_reference import PAGE, TREES, block, first_hidden, paged, paths, tree

try:
    native.processor_flags()
    REASON = "" if native.library() is not None else "the native kernels do not build here"
except native.Unavailable as error:
    REASON = str(error)
needs_native = pytest.mark.skipif(bool(REASON), reason=REASON or "available")

SHAPES = [(1, 2), (2, 576), (63, 65), (64, 64), (65, 33), (130, 2100), (576, 577), (960, 576)]  # [rows, columns]
TOKENS = [1, 2, 3, 6, 7, 13, 17, 40, 130]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16()


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result.float(), expected.float(), rtol=2e-2, atol=2e-2)


@needs_native
@pytest.mark.parametrize("tokens", [13, 40, 200])
def test_any_number_of_threads_gives_the_same_bits(tokens: int) -> None:
    weight, x, alone = prepare(random(960, 576)), random(tokens, 576), torch.get_num_threads()
    expected = linear.linear(x, weight)
    try:
        for threads in (1, 7, 16, 64):
            torch.set_num_threads(threads)
            assert torch.equal(linear.linear(x, weight), expected)
    finally:
        torch.set_num_threads(alone)


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_products(shape: tuple[int, int], tokens: int) -> None:
    rows, columns = shape
    matrix, bias, norm = random(rows, columns, scale=columns**-0.5), random(rows), random(columns)
    x, residual = random(tokens, columns), random(tokens, rows)
    weight = prepare(matrix, bias)
    assert isinstance(weight, Packed) and weight.panels is not None and weight.reordered is None
    plain = F.linear(x.float(), matrix.float(), bias.float())
    normed = F.linear(linear.rms_norm(x, norm, 1e-6).float(), matrix.float(), bias.float())
    close(linear.linear(x, weight), plain)
    close(linear.linear(x, prepare(matrix)), plain - bias.float())
    close(linear.linear_add(x, weight, residual.clone(), norm, 1e-6)[0], residual + plain)
    close(linear.norm_linear(x, norm, 1e-6, weight), normed)
    if rows % 2 == 0:
        gate, up = normed.chunk(2, dim=-1)
        close(linear.norm_gated(x, norm, 1e-6, prepare(matrix, bias, gated=True)), F.silu(gate) * up)


@needs_native
def test_a_row_has_the_same_bits_in_any_company() -> None:
    x, norm, residual = random(130, 2100), random(2100), random(130, 576)
    weight, gated = prepare(random(576, 2100, scale=0.02)), prepare(random(576, 2100, scale=0.02), gated=True)
    sum_, _ = linear.linear_add(x, weight, residual.clone(), norm, 1e-6)
    active = linear.norm_gated(x, norm, 1e-6, gated)
    for first, count in [(0, 1), (5, 1), (3, 2), (40, 7), (100, 13), (9, 16), (60, 49), (1, 129)]:
        part = slice(first, first + count)
        assert torch.equal(linear.linear_add(x[part], weight, residual[part].clone(), norm, 1e-6)[0], sum_[part])
        assert torch.equal(linear.norm_gated(x[part], norm, 1e-6, gated), active[part])


@needs_native
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 1000])
def test_argmax_takes_the_lowest_of_equals(columns: int) -> None:
    logits = torch.cat([random(40, columns).round(), torch.full((1, columns), float("-inf")).bfloat16()])
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert argmax.argmax(logits).tolist() == expected


@needs_native
def test_silu_of_large_values() -> None:
    values = torch.tensor([-3e38, -200.0, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 3e38]).bfloat16()
    gate_up = torch.cat([values, torch.ones(10)]).bfloat16()[:, None]
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    result = linear.norm_gated(x, torch.ones(1, dtype=torch.bfloat16), 0.0, prepare(gate_up, gated=True))
    close(result[0], F.silu(values.float()))


@needs_native
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("heads", [6, 0])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (7, 128), (5, 24)])
def test_rope(norms: bool, heads: int, tokens: int, dim: int) -> None:
    kv_heads = 2
    qkv, table = random(tokens, (heads + 2 * kv_heads) * dim), torch.randn(50, dim)
    positions, locations = torch.randint(0, 50, (tokens,)), torch.randperm(20)[:tokens]
    given = (random(dim), random(dim), 1e-6) if norms else None
    caches = random(2, 20, kv_heads, dim)
    expected_caches = caches.clone()
    expected = rope.reference(qkv.clone(), table, positions, locations, *expected_caches, heads, given)
    close(rope.rope_and_cache(qkv, table, positions, locations, *caches, heads, given), expected)
    close(caches, expected_caches)


@needs_native
@pytest.mark.parametrize(("dim", "kv_heads", "heads"), [(64, 3, 9), (128, 2, 12), (32, 1, 1), (96, 2, 4), (256, 1, 8)])
@pytest.mark.parametrize("context", [0, 1, 63, 64, 200])
@pytest.mark.parametrize("branches", [[], [4], [3, 2], [130], [40, 1, 40]], ids=str)
def test_attention(dim: int, kv_heads: int, heads: int, context: int, branches: list[int]) -> None:
    batch, keys, values = paged(context, branches, kv_heads, dim)
    caches = keys.bfloat16(), values.bfloat16()
    query, scale = random(len(batch.locations), heads, dim), dim**-0.5
    result = attention.paged_attention(query, *caches, batch, PAGE, scale)
    expected = attention.reference(query.float(), *(each.float() for each in caches), batch, PAGE, scale)
    close(result, expected)


@needs_native
@pytest.mark.parametrize("context", [0, 50, 200])
@pytest.mark.parametrize("branches", [[70], [40, 1, 30], [1, 1, 1, 1]], ids=str)
def test_a_branch_has_the_bits_of_plain_decoding(context: int, branches: list[int]) -> None:
    """Under deterministic dispatch, each branch beside the others and alone, a query at a time."""
    batch, keys, values = paged(context, branches, 2, 64)
    caches = keys.bfloat16(), values.bfloat16()
    query = random(len(batch.locations), 6, 64)
    locations = batch.page_table[0].long()[:, None] * PAGE + torch.arange(PAGE)
    own = locations.flatten()[context : context + len(batch.locations)]
    with deterministic(True):
        together = attention.paged_attention(query, *caches, batch, PAGE, 0.125)
        first = 1
        for length in branches:
            alone, _, _ = paged(context, [length], 2, 64)
            alone.page_table = batch.page_table
            moved = [cache.clone() for cache in caches]
            for before, cache in zip(caches, moved, strict=True):
                cache[own[1 : 1 + length]] = before[own[first : first + length]]
            for place in {0, 1, length // 2, length}:
                one = dataclasses.replace(
                    alone,
                    context_lens=alone.context_lens + place,
                    query_starts=torch.tensor([0, 1], dtype=torch.int32),
                    branch_starts=torch.zeros(1, dtype=torch.int32),
                    branching=False,
                )
                row = first + place - 1 if place else 0
                result = attention.paged_attention(query[row : row + 1], *moved, one, PAGE, 0.125)
                assert torch.equal(result[0], together[row])
            first += length


@needs_native
@pytest.mark.parametrize("context", [0, 1, 31, 64, 200])
@pytest.mark.parametrize("parents", TREES, ids=("root", "mixed", "star", "chain", "braid"))
def test_attention_over_trees(context: int, parents: list[int]) -> None:
    """Also deterministic: each query then has the bits of plain decoding along its path."""
    batch, keys, values = tree(context, parents, 2, 64)
    caches = keys.bfloat16(), values.bfloat16()
    query = random(len(parents), 6, 64)
    expected = attention.reference(query.float(), *(each.float() for each in caches), batch, PAGE, 0.125)
    close(attention.paged_attention(query, *caches, batch, PAGE, 0.125), expected)
    batch.plan = None
    locations = (batch.page_table[0].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()
    with deterministic(True):
        together = attention.paged_attention(query, *caches, batch, PAGE, 0.125)
        for index, path in list(enumerate(paths(parents)))[::7]:
            own = torch.cat([locations[:context], locations[[context + each for each in path]]])
            one = dataclasses.replace(
                batch,
                page_table=(torch.arange(-(-len(own) // PAGE)) + 1)[None].int(),
                context_lens=torch.tensor([len(own) - 1], dtype=torch.int32),
                query_starts=torch.tensor([0, 1], dtype=torch.int32),
                branch_starts=torch.zeros(1, dtype=torch.int32),
                branching=False,
                tree_mask=None,
                plan=None,
            )
            plain = [torch.zeros(PAGE + (len(own) + PAGE), 2, 64, dtype=torch.bfloat16) for _ in caches]
            for before, cache in zip(caches, plain, strict=True):
                cache[PAGE : PAGE + len(own)] = before[own]
            result = attention.paged_attention(query[index : index + 1], *plain, one, PAGE, 0.125)
            assert torch.equal(result[0], together[index])


@needs_native
@pytest.mark.parametrize("context", [0, 50, 200])
@pytest.mark.parametrize("count", [2, 7, 40, 150])
@pytest.mark.parametrize("full", [True, False])
def test_attention_over_blocks(context: int, count: int, full: bool) -> None:
    """Queries see later ones, also those that another thread computes."""
    batch, keys, values, _ = block(context, count, 2, 64, full)
    caches = keys.bfloat16(), values.bfloat16()
    query, alone = random(count, 6, 64), torch.get_num_threads()
    expected = attention.reference(query.float(), *(each.float() for each in caches), batch, PAGE, 0.125)
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            close(attention.paged_attention(query, *caches, batch, PAGE, 0.125), expected)
        batch.plan = None
        with deterministic(True):
            close(attention.paged_attention(query, *caches, batch, PAGE, 0.125), expected)
    finally:
        torch.set_num_threads(alone)


@needs_native
def test_only_the_first_query_sees_a_hidden_first_key() -> None:
    for batch, keys, values in first_hidden():
        caches = keys.bfloat16(), values.bfloat16()
        query = random(batch.max_query, 6, 32)
        expected = attention.reference(query.float(), *(each.float() for each in caches), batch, PAGE, 0.2)
        for same_bits in (False, True):
            batch.plan = None
            with deterministic(same_bits):
                close(attention.paged_attention(query, *caches, batch, PAGE, 0.2), expected)


@needs_native
def test_what_lies_beyond_a_request_is_not_read() -> None:
    """Locations after the last token may hold anything, not-a-number included."""
    batch, keys, values = paged(5, [3], 1, 32)
    own = batch.page_table[0].long()[:, None] * PAGE + torch.arange(PAGE)
    used = own.flatten()[:9]
    keys, values = keys.bfloat16(), values.bfloat16()
    spoilt = torch.full_like(keys, float("nan")), torch.full_like(values, float("nan"))
    for clean, dirty in zip((keys, values), spoilt, strict=True):
        dirty[used] = clean[used]
    query = random(4, 2, 32)
    expected = native_attention.paged_attention(query, keys, values, batch, PAGE, 0.2)
    assert torch.equal(native_attention.paged_attention(query, *spoilt, batch, PAGE, 0.2), expected)


@needs_native
def test_torch_and_the_kernels_share_one_pool_of_threads() -> None:
    linear.linear(random(8, 64), prepare(random(64, 64)))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    assert len({path for path in mapped if "gomp" in path or "iomp" in path}) == 1


@needs_native
def test_without_a_compiler_torch_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            matrix, x = random(96, 64, scale=0.125), random(3, 64)
            weight = prepare(matrix, gated=True)
            assert isinstance(weight, Packed) == packs()
            if isinstance(weight, Packed):
                assert weight.panels is None and weight.reordered is not None
            close(linear.linear(x, weight), x.float() @ matrix.float().T)
            norm = random(64)
            gate, up = (linear.rms_norm(x, norm, 1e-6).float() @ matrix.float().T).chunk(2, dim=-1)
            close(linear.norm_gated(x, norm, 1e-6, weight), F.silu(gate) * up)
        assert [record.message for record in caplog.records].count(
            "no native CPU kernels, torch's serve instead: there is no C compiler (cc)"
        ) == 1
    finally:
        native.library.cache_clear()


@needs_native
def test_a_compiler_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho broken >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(native.Unavailable, match="broken"):
        native.build(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir()]


@needs_native
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from paceline.ops import native; print(native.build(Path(sys.argv[1])))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    built = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert built[0] == built[1] and [str(path) for path in tmp_path.iterdir()] == [built[0]]
