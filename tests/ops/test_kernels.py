"""The Triton kernels against the torch references, over workloads chosen to be awkward.

On a GPU as they run; without one under Triton's interpreter when TRITON_INTERPRET=1 is set; else skipped.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.values import DEVICE, INTERPRETED, error, random

if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from paceline.ops import argmax, attention, draw, layout, linear, rope
from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import packed
from paceline.ops.draw import Draws
from paceline.ops.triton import argmax as argmax_kernel
from paceline.ops.triton import attention as attention_kernel
from paceline.ops.triton import draw as draw_kernel
from paceline.ops.triton import layout as layout_kernel
from paceline.ops.triton import linear as linear_kernel
from paceline.ops.triton import norm as norm_kernel
from paceline.ops.triton import prefill_attention
from paceline.ops.triton import rope as rope_kernel
from paceline.ops.triton.tuning import Blas, Choice, Rows, Tiles
from paceline.ops.weight import Dense, Quantised

DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
TOKENS = [1, 2, 7, 16, 65, 257]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False


# ---------------------------------------------------------------------------------------------------- products

CHOICES: list[Choice | None] = [
    None,
    Blas(),
    Rows(4, 512, 4, 2),
    Rows(2, 1024, 4, 8),
    Tiles(64, 16, 64, 4, 3),
    Tiles(64, 64, 64, 4, 3, split=3),
    Tiles(128, 16, 128, 4, 3),
    Tiles(128, 64, 64, 4, 3, tail=16),
    Tiles(64, 32, 64, 4, 3, split=2, tail=16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_products(dtype: torch.dtype, tokens: int, choice: Choice | None) -> None:
    if isinstance(choice, Rows) and tokens > 1:
        pytest.skip("one token only")
    rows, columns = (200, 160) if INTERPRETED else (1536, 1536) if dtype == torch.bfloat16 else (1000, 576)
    x = random(tokens, columns, dtype=dtype, scale=3.0)
    norm = random(columns, dtype=dtype)
    residual = random(tokens, rows, dtype=dtype)
    matrix = random(rows, columns, dtype=dtype, scale=columns**-0.5)
    product = linear_kernel.Product
    for bias in (None, random(rows, dtype=dtype)) if choice is None else (random(rows, dtype=dtype),):
        weight = Dense(matrix, bias)
        wide = Dense(matrix.float(), None if bias is None else bias.float())
        normed = linear.rms_norm(x, norm, 1e-6).float()
        gate, up = linear.linear_reference(normed, wide).chunk(2, dim=-1)
        cases = {
            "plain": (product(x, weight), linear.linear_reference(x.float(), wide)),
            "norm": (product(x, weight, norm, 1e-6), linear.linear_reference(normed, wide)),
            "add": (
                product(x, weight, residual=residual.clone()),
                residual.float() + linear.linear_reference(x.float(), wide),
            ),
            "gated": (product(x, weight, norm, 1e-6, gate=True), torch.nn.functional.silu(gate) * up),
        }
        for name, (call, exact) in cases.items():
            assert error(linear_kernel.run(call, choice)[0], exact) < LIMIT[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [48, 200] if INTERPRETED else [576, 1536])
def test_a_split_product_gives_the_norm_of_its_sum(dtype: torch.dtype, rows: int) -> None:
    x, residual = random(5, 160, dtype=dtype), random(5, rows, dtype=dtype)
    norm = random(rows, dtype=dtype)
    weight = Dense(random(rows, 160, dtype=dtype, scale=160**-0.5))
    product = linear_kernel.Product(x, weight, eps=1e-6, residual=residual, next_norm=norm)
    total, normed = linear_kernel.run(product, Tiles(64, 16, 32, 4, 3, split=2))
    assert normed is not None
    assert error(normed, norm_kernel.rms_norm(total, norm, 1e-6)) < LIMIT[dtype]
    assert linear_kernel.run(product, Tiles(64, 16, 32, 4, 3))[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [48, 200] if INTERPRETED else [576, 1536, 3000])
def test_the_rest_of_a_product_whose_sum_came_from_elsewhere(dtype: torch.dtype, columns: int) -> None:
    for tokens in TOKENS:
        x, residual = random(tokens, columns, dtype=dtype), random(tokens, columns, dtype=dtype)
        norm = random(columns, dtype=dtype)
        expected = residual + x
        total, normed = norm_kernel.add_norm(x, residual, norm, 1e-6)
        assert torch.equal(total, expected)
        assert error(normed, linear.rms_norm(expected, norm, 1e-6)) < LIMIT[dtype]
        assert error(norm_kernel.norm(x, norm, 1e-6), linear.rms_norm(x, norm, 1e-6)) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_without_norm_and_of_stored_weights(dtype: torch.dtype) -> None:
    rows, columns = (64, 160) if INTERPRETED else (1024, 576)
    matrix = random(rows, columns, dtype=dtype, scale=columns**-0.5)
    stored = matrix.cpu().view(torch.uint8).view(rows, -1).to(DEVICE)
    for weight in (Dense(matrix), Quantised("F32" if dtype == torch.float32 else "BF16", stored)):
        for tokens in TOKENS:
            x = random(tokens, columns, dtype=dtype)
            product = x.float() @ matrix.float().T
            gate, up = product.chunk(2, dim=1)
            for kernels in (linear_kernel.linear, linear_kernel.linear_deterministic):
                assert error(kernels(x, weight), product) < LIMIT[dtype]
            for kernels in (linear_kernel.linear_gated, linear_kernel.linear_gated_deterministic):
                assert error(kernels(x, weight), torch.nn.functional.silu(gate) * up) < LIMIT[dtype]


@pytest.mark.skipif(INTERPRETED, reason="numpy's products depend on their shape")
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_products_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    rows, columns = (200, 160) if INTERPRETED else (1536, 8960)
    weight = Dense(random(rows, columns, dtype=dtype, scale=columns**-0.5))
    x, norm = random(320, columns, dtype=dtype), random(columns, dtype=dtype)
    residual, next_norm = random(320, rows, dtype=dtype), random(rows, dtype=dtype)
    whole = linear_kernel.norm_linear_deterministic(x, norm, 1e-6, weight)
    gated = linear_kernel.norm_gated_deterministic(x, norm, 1e-6, weight)
    added, _ = linear_kernel.linear_add_deterministic(x, weight, residual.clone(), next_norm, 1e-6)
    assert error(whole, linear.norm_linear_reference(x, norm, 1e-6, weight)) < LIMIT[dtype]
    for first, last in ((0, 1), (3, 5), (17, 24), (0, 16), (40, 105), (0, 257)):
        part = x[first:last]
        assert torch.equal(linear_kernel.norm_linear_deterministic(part, norm, 1e-6, weight), whole[first:last])
        assert torch.equal(linear_kernel.norm_gated_deterministic(part, norm, 1e-6, weight), gated[first:last])
        sums, _ = linear_kernel.linear_add_deterministic(part, weight, residual[first:last].clone(), next_norm, 1e-6)
        assert torch.equal(sums, added[first:last])


# --------------------------------------------------------------------------------------------------- attention


def batch_of(
    queries: list[int], contexts: list[int], *, page_size: int, branching: bool, spare: int = 0
) -> tuple[AttentionBatch, int]:
    """A step with its pages shuffled over the cache; `spare` columns of the page table beyond the longest request.

    Returns the batch and the number of locations that the caches need.
    """
    needed = [(context + count + page_size - 1) // page_size for context, count in zip(contexts, queries, strict=True)]
    width = max(needed) + spare
    total = sum(needed) + 3
    order = torch.randperm(total)
    table = torch.full((len(queries), width), int(order[-1]), dtype=torch.int32)
    locations, positions, branches, used = [], [], [], 0
    for index, (context, count) in enumerate(zip(contexts, queries, strict=True)):
        pages = order[used : used + needed[index]]
        used += needed[index]
        table[index, : needed[index]] = pages.int()
        place = torch.arange(context, context + count)
        locations.append(pages[place // page_size] * page_size + place % page_size)
        branch = torch.zeros(count, dtype=torch.int32)
        if branching and count > 2:
            cut = 1 + count // 3
            branch[1:cut] = 1
            branch[cut:] = cut
        branches.append(branch)
        positions.append(torch.arange(context, context + count) - torch.where(branch > 0, branch - 1, 0))
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    batch = AttentionBatch(
        positions=torch.cat(positions).to(DEVICE),
        locations=torch.cat(locations).to(DEVICE),
        page_table=table.to(DEVICE),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        query_starts=starts.to(DEVICE),
        branch_starts=torch.cat(branches).to(DEVICE),
        max_query=max(queries),
        max_context=max(contexts),
        branching=branching,
    )
    return batch, total * page_size


WORKLOADS = [
    ([1], [0]),
    ([1], [1]),
    ([1], [2000]),
    ([65], [500]),
    ([17], [0]),
    ([2, 7, 1, 16], [0, 63, 64, 300]),
    ([1, 0, 3], [33, 0, 1000]),
    ([65, 1, 17], [15, 700, 16]),
    ([257], [130]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(12, 2, 128), (9, 3, 64), (8, 8, 128), (8, 1, 96)])
@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("queries, contexts", WORKLOADS)
def test_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, branching: bool, queries: list[int], contexts: list[int]
) -> None:
    if (INTERPRETED and (max(queries) > 20 or dim == 96)) or (dtype == torch.float32 and kv_heads in (1, 8)):
        pytest.skip("slow to interpret or to compile, and like the others")
    batch, size = batch_of(queries, contexts, page_size=16, branching=branching, spare=5)
    query = random(sum(queries), heads, dim, dtype=dtype)
    keys, values = random(size, kv_heads, dim, dtype=dtype), random(size, kv_heads, dim, dtype=dtype)
    exact = attention.reference(query.float(), keys.float(), values.float(), batch, 16, dim**-0.5)
    for result in (
        attention_kernel.paged_attention(query, keys, values, batch, 16, dim**-0.5),
        attention_kernel.paged_attention_deterministic(query, keys, values, batch, 16, dim**-0.5),
        attention_kernel.attend(query, keys, values, batch, 16, dim**-0.5, programs=1),
    ):
        assert error(result, exact) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "queries, contexts", [([17], [0]), ([9, 1, 16], [0, 63, 300]), ([257], [130]), ([65, 65], [64, 5])]
)
def test_attention_over_trees(dtype: torch.dtype, queries: list[int], contexts: list[int]) -> None:
    if INTERPRETED and max(queries) > 20:
        pytest.skip("slow to interpret, and like the others")
    batch, size = batch_of(queries, contexts, page_size=16, branching=True, spare=5)
    parents = torch.cat([(torch.rand(count) * torch.arange(count)).int() for count in queries])
    starts = batch.query_starts.cpu()
    batch.tree_mask = layout.tree_mask(parents, starts, max(queries)).to(DEVICE)
    assert torch.equal(layout_kernel.tree_mask(parents.to(DEVICE), batch.query_starts, max(queries)), batch.tree_mask)
    query = random(sum(queries), 12, 128, dtype=dtype)
    keys, values = random(size, 2, 128, dtype=dtype), random(size, 2, 128, dtype=dtype)
    exact = attention.reference(query.float(), keys.float(), values.float(), batch, 16, 0.1)
    for result in (
        attention_kernel.paged_attention(query, keys, values, batch, 16, 0.1),
        attention_kernel.attend(query, keys, values, batch, 16, 0.1, programs=1),
    ):
        assert error(result, exact) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "queries, contexts", [([7], [0]), ([8, 8, 8], [0, 61, 300]), ([16, 1, 5], [5, 60, 249]), ([150], [130])]
)
@pytest.mark.parametrize("full", [True, False])
def test_attention_over_blocks(dtype: torch.dtype, queries: list[int], contexts: list[int], full: bool) -> None:
    """Queries that see later ones: all, or itself and a random half."""
    if INTERPRETED and max(queries) > 20:
        pytest.skip("slow to interpret, and like the others")
    batch, size = batch_of(queries, contexts, page_size=16, branching=True, spare=5)
    num_words = -(-max(queries) // 32)
    batch.tree_mask = torch.full((sum(queries), num_words), -1, dtype=torch.int32, device=DEVICE)
    if not full:
        seen = torch.rand(sum(queries), 32 * num_words, device=DEVICE) < 0.5
        own = torch.cat([torch.arange(count, device=DEVICE) for count in queries])
        batch.tree_mask = packed(seen.scatter_(1, own[:, None], True))
    query = random(sum(queries), 12, 128, dtype=dtype)
    keys, values = random(size, 2, 128, dtype=dtype), random(size, 2, 128, dtype=dtype)
    exact = attention.reference(query.float(), keys.float(), values.float(), batch, 16, 0.1)
    for result in (
        attention_kernel.paged_attention(query, keys, values, batch, 16, 0.1),
        attention_kernel.paged_attention_deterministic(query, keys, values, batch, 16, 0.1),
        attention_kernel.attend(query, keys, values, batch, 16, 0.1, programs=1),
        attention_kernel.attend(
            query, keys, values, batch, 16, 0.1, tile=(16, 32, 4, 2)
        ),  # rows of a request in several
    ):
        assert error(result, exact) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "branches", "trees"])
@pytest.mark.parametrize(
    "queries, contexts",
    [
        ([1, 1, 1, 1, 1], [0, 1, 2, 64, 700]),
        ([1], [2000]),
        ([2, 7, 1, 16], [0, 63, 64, 300]),
        ([1, 2, 3], [33, 0, 1]),
        ([65, 1, 70], [15, 700, 0]),
    ],
)
def test_attention_that_hides_the_first_key(
    dtype: torch.dtype, kind: str, queries: list[int], contexts: list[int]
) -> None:
    """The key at place 0, a committed one being not-a-number."""
    if INTERPRETED and max(queries) > 20:
        pytest.skip("slow to interpret, and like the others")
    batch, size = batch_of(queries, contexts, page_size=16, branching=kind != "plain", spare=5)
    batch.hides_first = True
    if kind == "trees":
        parents = torch.cat([(torch.rand(count) * torch.arange(count)).int() for count in queries])
        batch.tree_mask = layout.tree_mask(parents, batch.query_starts.cpu(), max(queries)).to(DEVICE)
    query = random(sum(queries), 6, 64, dtype=dtype)
    keys, values = random(size, 2, 64, dtype=dtype), random(size, 2, 64, dtype=dtype)
    exact = attention.reference(query.float(), keys.float(), values.float(), batch, 16, 0.125)
    hidden = batch.page_table[batch.context_lens > 0, 0].long() * 16
    keys[hidden] = values[hidden] = float("nan")
    for result in (
        attention_kernel.paged_attention(query, keys, values, batch, 16, 0.125),
        attention_kernel.paged_attention_deterministic(query, keys, values, batch, 16, 0.125),
        attention_kernel.attend(query, keys, values, batch, 16, 0.125, programs=1),
    ):
        assert error(result, exact) < LIMIT[dtype]


@pytest.mark.skipif(INTERPRETED, reason="numpy's products depend on their shape")
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_attention_does_not_depend_on_the_step(dtype: torch.dtype) -> None:
    """The last 9 tokens of 600: in one step, in steps of 3, and one by one, beside another request."""
    length, dim = 600, 64
    batch, size = batch_of([9, 5], [length - 9, 77], page_size=16, branching=False, spare=20)
    query = random(14, 6, dim, dtype=dtype)
    keys, values = random(size, 2, dim, dtype=dtype), random(size, 2, dim, dtype=dtype)
    call = attention_kernel.paged_attention_deterministic
    whole = call(query, keys, values, batch, 16, 0.1)[:9]
    for count in (1, 3):
        for first in range(0, 9, count):
            part = AttentionBatch(
                positions=batch.positions[first : first + count],
                locations=batch.locations[first : first + count],
                page_table=batch.page_table[:1].contiguous(),
                context_lens=batch.context_lens[:1] + first,
                query_starts=torch.tensor([0, count], dtype=torch.int32, device=DEVICE),
                branch_starts=batch.branch_starts[:count],
                max_query=count,
                max_context=length,
            )
            result = call(query[first : first + count], keys, values, part, 16, 0.1)
            assert torch.equal(result, whole[first : first + count])


@pytest.mark.skipif(INTERPRETED, reason="torch's fused attention on CUDA")
@pytest.mark.parametrize(
    "queries, contexts",
    [
        ([1000], [0]),
        ([700], [333]),
        ([300, 2, 600], [0, 50, 100]),
        ([300, 2, 0, 600, 41], [0, 0, 0, 0, 0]),
        ([300, 2, 0, 600, 41], [16, 700, 33, 0, 16]),
    ],
)
def test_prefill(queries: list[int], contexts: list[int]) -> None:
    batch, size = batch_of(queries, contexts, page_size=16, branching=False)
    query = random(sum(queries), 12, 128, dtype=torch.bfloat16)
    keys, values = (random(size, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    exact = attention.reference(query.float(), keys.float(), values.float(), batch, 16, 0.1)
    assert error(attention_kernel.paged_attention(query, keys, values, batch, 16, 0.1), exact) < 1e-2


@pytest.mark.skipif(INTERPRETED, reason="torch's fused attention on CUDA")
def test_requests_with_too_many_keys_to_copy_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, size = batch_of([300, 2, 0, 600], [16, 700, 33, 0], page_size=16, branching=False)
    query = random(902, 12, 128, dtype=torch.bfloat16)
    keys, values = (random(size, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    together = attention_kernel.paged_attention(query, keys, values, batch, 16, 0.1)
    monkeypatch.setattr(prefill_attention, "_MOST_KEYS", 1000)
    monkeypatch.setattr(prefill_attention, "_together", None)
    assert error(attention_kernel.paged_attention(query, keys, values, batch, 16, 0.1), together) < 1e-2


def test_the_keys_of_all_requests_are_found_in_their_pages() -> None:
    batch, _ = batch_of([3, 2, 0, 40], [16, 35, 5, 0], page_size=16, branching=False)
    places = prefill_attention._key_places(batch, prefill_attention._host(batch), 16)
    starts = places.starts.tolist()
    assert starts == [0, 19, 56, 61, 101] and places.most == 40
    for request, (first, last) in enumerate(itertools.pairwise(starts)):
        pages = batch.page_table[request].tolist()
        wanted = [pages[place // 16] * 16 + place % 16 for place in range(last - first)]
        assert places.locations[first:last].tolist() == wanted
        own = slice(*batch.query_starts[request : request + 2].tolist())
        count = own.stop - own.start
        assert places.locations[last - count : last].tolist() == batch.locations[own].tolist()


# ------------------------------------------------------------------------------------------------ rope and argmax


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(12, 2, 128), (9, 3, 64), (4, 4, 96), (0, 2, 128)])
@pytest.mark.parametrize("tokens", [1, 7, 65, 301])
@pytest.mark.parametrize("normed", [False, True])
def test_rope(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, tokens: int, normed: bool) -> None:
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = torch.rand(300, dim // 2) * 100
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).to(DEVICE)
    positions = torch.randint(0, 300, (tokens,)).to(DEVICE)
    locations = torch.randperm(400)[:tokens].to(DEVICE)
    norms = (random(dim, dtype=dtype), random(dim, dtype=dtype), 1e-6) if normed else None
    keys, values = random(400, kv_heads, dim, dtype=dtype), random(400, kv_heads, dim, dtype=dtype)
    key_copy, value_copy = keys.clone(), values.clone()
    expected = rope.reference(qkv, table, positions, locations, key_copy, value_copy, heads, norms)
    result = rope_kernel.rope_and_cache(qkv, table, positions, locations, keys, values, heads, norms)
    assert result.shape == expected.shape == (tokens, heads, dim)  # none where keys and values alone are computed
    assert not heads or error(result, expected) < LIMIT[dtype] / 2
    for cache, copy in ((keys, key_copy), (values, value_copy)):
        assert error(cache, copy) < LIMIT[dtype] / 2
        untouched = torch.ones(400, dtype=torch.bool, device=DEVICE).index_fill_(0, locations, False)
        assert torch.equal(cache[untouched], copy[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, vocabulary", [(1, 151_936), (3, 49_152), (65, 5_000), (2, 1), (1, 2_049)])
def test_argmax(dtype: torch.dtype, tokens: int, vocabulary: int) -> None:
    logits = random(tokens, vocabulary, dtype=dtype)
    values, indices = argmax_kernel.argmax_with_value(logits)
    assert torch.equal(values, logits.float().max(dim=-1).values)
    lowest = (logits == logits.max(dim=-1, keepdim=True).values).int().argmax(dim=-1)
    assert torch.equal(indices, lowest)


def test_argmax_takes_the_lowest_of_equals() -> None:
    logits = torch.full((4, 30_000), -float("inf"), device=DEVICE)
    logits[1, [29_999, 17, 2_048]] = 5.0
    logits[2, 5:] = -1.0
    logits[3] = 0.0
    assert argmax_kernel.argmax(logits).tolist() == [0, 17, 5, 0]
    assert argmax.reference(logits[1:]).tolist()[0] in (17, 2_048, 29_999)


# temperature, top-k, top-p, min-p
FILTERS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 1, 1.0, 0.0),
    (0.8, 20, 1.0, 0.0),
    (0.9, 0, 0.8, 0.0),
    (1.0, 20, 0.8, 0.0),
    (1.5, 0, 1.0, 0.05),
    (1.0, 50, 0.95, 0.01),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, vocabulary, spread", [(5, 9_000, 3.0), (2, 151_936, 4.0), (3, 100, 1.0), (3, 5_000, 0.1)]
)
def test_draw(dtype: torch.dtype, rows: int, vocabulary: int, spread: float) -> None:
    """The kernel keeps what the reference keeps, and draws its tokens."""
    count = rows * len(FILTERS)
    logits = random(rows, vocabulary, dtype=dtype, scale=spread).repeat(len(FILTERS), 1)
    logits[0, ::3] = -float("inf")
    best = logits.float().argmax(dim=-1)
    slots = torch.randperm(count).to(DEVICE)
    positions = torch.arange(count, device=DEVICE) * 1000
    filters = torch.empty(count, 4, device=DEVICE)
    filters[slots] = torch.tensor(FILTERS, device=DEVICE).repeat_interleave(rows, dim=0)
    draws = Draws(torch.randint(-(1 << 62), 1 << 62, (count,)).to(DEVICE), filters)
    drawn = draw_kernel.draw(logits, best, slots, positions, draws)
    assert torch.equal(drawn[:rows], best[:rows])
    logits, best, slots, positions, place = (each[rows:] for each in (logits, best, slots, positions, drawn[:, None]))
    kept = draw.weights(logits, best, filters[slots])
    assert bool((kept.gather(1, place) > 0).all())
    assert torch.equal(place[:, 0], draw.reference(logits, best, slots, positions, draws))
    tokens = torch.randperm(1 << 18)[:vocabulary].to(DEVICE)
    named = draw_kernel.draw(logits, best, slots, positions, draws, tokens)
    assert torch.equal(named, draw.reference(logits, best, slots, positions, draws, tokens))
