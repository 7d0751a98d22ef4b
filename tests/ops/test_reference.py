"""The torch references against the plainest formula for each: they define what every kernel must equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.ops import argmax, attention, cpu, linear, rope
from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import ancestors, chains, packed, unpacked
from paceline.ops.weight import Dense, prepare

PAGE = 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def paged(context: int, branches: list[int], kv_heads: int, dim: int) -> tuple[AttentionBatch, Tensor, Tensor]:
    """One request with `context` committed tokens and a root with `branches` of those lengths, on shuffled pages."""
    starts = [0]
    for length in branches:
        starts += [len(starts)] * length
    count = len(starts)
    pages = -(-(context + count) // PAGE)
    order = torch.randperm(pages + 2)[:pages]
    place = torch.arange(context, context + count)
    batch = AttentionBatch(
        positions=place,
        locations=order[place // PAGE] * PAGE + place % PAGE,
        page_table=order[None].int(),
        context_lens=torch.tensor([context], dtype=torch.int32),
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        branch_starts=torch.tensor(starts, dtype=torch.int32),
        max_query=count,
        max_context=context,
        branching=len(branches) > 1,
    )
    caches = torch.randn(2, (pages + 2) * PAGE, kv_heads, dim)
    return batch, caches[0], caches[1]


def one_by_one(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of one query [heads, dim] over keys and values [n, kv_heads, dim], a head at a time."""
    group = query.shape[0] // keys.shape[1]
    rows = []
    for head in range(query.shape[0]):
        scores = keys[:, head // group] @ query[head] * scale
        rows.append(scores.softmax(0) @ values[:, head // group])
    return torch.stack(rows)


@pytest.mark.parametrize("context", [0, 1, 5, 13])
@pytest.mark.parametrize("branches", [[], [4], [3, 2], [1, 1, 4]])
def test_a_branch_sees_its_context_the_root_and_itself(context: int, branches: list[int]) -> None:
    """Every branch alone, as if the others had never been drafted, gives the same outputs."""
    batch, keys, values = paged(context, branches, kv_heads=2, dim=8)
    query = torch.randn(len(batch.locations), 4, 8)
    result = attention.reference(query, keys, values, batch, PAGE, 0.3)
    place = torch.arange(context + len(batch.locations))
    locations = batch.page_table[0].long()[place // PAGE] * PAGE + place % PAGE
    expected = [one_by_one(query[0], keys[locations[: context + 1]], values[locations[: context + 1]], 0.3)]
    first = 1
    for length in branches:
        for index in range(first, first + length):
            seen = torch.cat([locations[: context + 1], locations[context + first : context + index + 1]])
            expected.append(one_by_one(query[index], keys[seen], values[seen], 0.3))
        first += length
    torch.testing.assert_close(result, torch.stack(expected))


def test_without_branches_the_mask_is_causal() -> None:
    assert torch.equal(chains(torch.zeros(5, dtype=torch.int32)), torch.ones(5, 5).tril().bool())


def tree(context: int, parents: list[int], kv_heads: int, dim: int) -> tuple[AttentionBatch, Tensor, Tensor]:
    """As `paged`, but a root with a tree of drafts."""
    batch, keys, values = paged(context, [len(parents) - 1], kv_heads, dim)
    mask = packed(ancestors(torch.tensor(parents)))
    return replace(batch, branching=True, tree_mask=mask), keys, values


def paths(parents: list[int]) -> list[list[int]]:
    """Each query's ancestors from the root to itself."""
    found = [[0]]
    for query, parent in enumerate(parents[1:], 1):
        found.append([*found[parent], query])
    return found


TREES = ([0], [0, 0, 1, 1, 0, 4, 2, 5, 6, 3], [0, *[0] * 40], [0, *range(70)], [0, *[max(0, i - 3) for i in range(90)]])


@pytest.mark.parametrize("context", [0, 5, 61])
@pytest.mark.parametrize("parents", TREES, ids=("root", "mixed", "star", "chain", "braid"))
def test_a_query_of_a_tree_sees_its_context_and_its_ancestors(context: int, parents: list[int]) -> None:
    batch, keys, values = tree(context, parents, kv_heads=2, dim=8)
    query = torch.randn(len(parents), 4, 8)
    place = torch.arange(context + len(parents))
    locations = batch.page_table[0].long()[place // PAGE] * PAGE + place % PAGE
    expected = []
    for index, path in enumerate(paths(parents)):
        seen = torch.cat([locations[:context], locations[[context + each for each in path]]])
        expected.append(one_by_one(query[index], keys[seen], values[seen], 0.3))
    for implementation in (attention.reference, attention.reference_deterministic):
        torch.testing.assert_close(implementation(query, keys, values, batch, PAGE, 0.3), torch.stack(expected))


def block(
    context: int, count: int, kv_heads: int, dim: int, full: bool
) -> tuple[AttentionBatch, Tensor, Tensor, Tensor]:
    """As `paged`, but `count` queries that see later ones too: all, or itself and a random half. Last the mask [Q, Q]."""
    batch, keys, values = paged(context, [count - 1], kv_heads, dim)
    seen = torch.ones(count, count, dtype=torch.bool) if full else torch.rand(count, count) < 0.5
    seen.fill_diagonal_(True)
    words = torch.full((count, -(-count // 32)), -1, dtype=torch.int32) if full else packed(seen)
    return replace(batch, branching=True, tree_mask=words), keys, values, seen


@pytest.mark.parametrize("context", [0, 5, 61])
@pytest.mark.parametrize("count", [2, 7, 40, 150])
@pytest.mark.parametrize("full", [True, False])
def test_a_query_of_a_block_sees_later_queries(context: int, count: int, full: bool) -> None:
    batch, keys, values, seen = block(context, count, 2, 8, full)
    query = torch.randn(count, 4, 8)
    place = torch.arange(context + count)
    locations = batch.page_table[0].long()[place // PAGE] * PAGE + place % PAGE
    own = [torch.cat([locations[:context], locations[context:][row]]) for row in seen]
    expected = torch.stack(
        [one_by_one(each, keys[rows], values[rows], 0.3) for each, rows in zip(query, own, strict=True)]
    )
    for implementation in (attention.reference, attention.reference_deterministic):
        torch.testing.assert_close(implementation(query, keys, values, batch, PAGE, 0.3), expected)
    half = [each.bfloat16() for each in (query, keys, values)]
    exact = attention.reference(*(each.float() for each in half), batch, PAGE, 0.3)
    torch.testing.assert_close(cpu.paged_attention(*half, batch, PAGE, 0.3).float(), exact, rtol=2e-2, atol=2e-2)


def first_hidden() -> list[tuple[AttentionBatch, Tensor, Tensor]]:
    """Steps whose batch hides the first key: prompts, single queries, branches and trees, at and after place 0."""
    steps = [paged(context, branches, 2, 32) for context in (0, 1, 5, 70) for branches in ([], [4], [3, 2], [40, 1])]
    steps += [tree(context, parents, 2, 32) for context in (0, 1, 70) for parents in TREES]
    return [(replace(batch, hides_first=True), keys, values) for batch, keys, values in steps]


def seen_by(batch: AttentionBatch, query: int) -> Tensor:
    """The locations that a query of a batch of one request sees, the first not among them unless it is the query's own."""
    context = int(batch.context_lens)
    own = context + batch.visible(0, batch.max_query)[query].nonzero()[:, 0]
    place = torch.cat([torch.arange(context), own])
    place = place[(place > 0) | (context + query == 0)]
    return batch.page_table[0].long()[place // PAGE] * PAGE + place % PAGE


def test_only_the_first_query_sees_a_hidden_first_key() -> None:
    for batch, keys, values in first_hidden():
        query = torch.randn(batch.max_query, 4, 32)
        rows = [seen_by(batch, index) for index in range(batch.max_query)]
        expected = torch.stack(
            [one_by_one(each, keys[seen], values[seen], 0.3) for each, seen in zip(query, rows, strict=True)]
        )
        for implementation in (attention.reference, attention.reference_deterministic):
            torch.testing.assert_close(implementation(query, keys, values, batch, PAGE, 0.3), expected)
        half = [each.bfloat16() for each in (query, keys, values)]
        exact = attention.reference(*(each.float() for each in half), batch, PAGE, 0.3)
        torch.testing.assert_close(cpu.paged_attention(*half, batch, PAGE, 0.3).float(), exact, rtol=2e-2, atol=2e-2)
        if not batch.branching:
            last = torch.tensor([batch.max_query - 1])
            alone = attention.reference(query[last], keys, values, batch.only(last), PAGE, 0.3)
            torch.testing.assert_close(alone, expected[last])


def test_tree_masks_are_packed_and_unpacked() -> None:
    for parents in TREES:
        visible = ancestors(torch.tensor(parents))
        assert [row.nonzero()[:, 0].tolist() for row in visible] == paths(parents)
        words = packed(visible)
        assert words.dtype == torch.int32 and words.shape == (len(parents), -(-len(parents) // 32))
        assert torch.equal(unpacked(words, len(parents)), visible)


def test_requests_do_not_see_each_other() -> None:
    """Two requests in one step give what each gives alone."""
    first, keys, values = paged(6, [3], kv_heads=1, dim=8)
    second, more_keys, more_values = paged(2, [2, 2], kv_heads=1, dim=8)
    shift = len(keys)
    width = max(first.page_table.shape[1], second.page_table.shape[1])
    tables = [
        F.pad(table, (0, width - table.shape[1]))
        for table in (first.page_table, second.page_table + shift // PAGE)
    ]  # fmt: skip
    both = AttentionBatch(
        positions=torch.cat([first.positions, second.positions]),
        locations=torch.cat([first.locations, second.locations + shift]),
        page_table=torch.cat(tables),
        context_lens=torch.cat([first.context_lens, second.context_lens]),
        query_starts=torch.tensor([0, 4, 9], dtype=torch.int32),
        branch_starts=torch.cat([first.branch_starts, second.branch_starts]),
        max_query=5,
        max_context=6,
        branching=True,
    )
    query = torch.randn(9, 2, 8)
    result = attention.reference(query, torch.cat([keys, more_keys]), torch.cat([values, more_values]), both, PAGE, 1.0)
    torch.testing.assert_close(result[:4], attention.reference(query[:4], keys, values, first, PAGE, 1.0))
    torch.testing.assert_close(result[4:], attention.reference(query[4:], more_keys, more_values, second, PAGE, 1.0))


def test_rope_is_the_one_of_transformers() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    tokens, heads, kv_heads, dim = 7, 4, 2, 16
    angles = torch.arange(50)[:, None] * 1e4 ** -(torch.arange(0, dim, 2) / dim)[None, :]
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    positions, locations = torch.randint(0, 50, (tokens,)), torch.randperm(20)[:tokens]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    keys, values = torch.zeros(20, kv_heads, dim), torch.zeros(20, kv_heads, dim)
    result = rope.reference(qkv, table, positions, locations, keys, values, heads)

    query, key, value = torch.split(qkv.view(tokens, -1, dim), [heads, kv_heads, kv_heads], dim=1)
    full = torch.cat([angles, angles], dim=-1)[positions][None]
    query, key = llama.apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], full.cos(), full.sin()
    )
    torch.testing.assert_close(result, query[0].transpose(0, 1))
    torch.testing.assert_close(keys[locations], key[0].transpose(0, 1))
    assert torch.equal(values[locations], value)
    assert int((keys.abs().sum((1, 2)) > 0).sum()) == tokens  # nothing else was written


def test_rope_normalises_each_head_before_it_rotates() -> None:
    tokens, heads, kv_heads, dim = 3, 2, 1, 8
    table = torch.cat([torch.ones(4, dim // 2), torch.zeros(4, dim // 2)], dim=-1)  # no rotation
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    keys, values = torch.zeros(3, kv_heads, dim), torch.zeros(3, kv_heads, dim)
    query_norm, key_norm = torch.randn(dim), torch.randn(dim)
    place = torch.arange(tokens)
    result = rope.reference(qkv, table, place, place, keys, values, heads, (query_norm, key_norm, 1e-6))
    query, key, _ = torch.split(qkv.view(tokens, -1, dim), [heads, kv_heads, kv_heads], dim=1)
    torch.testing.assert_close(result, F.rms_norm(query, (dim,), query_norm, 1e-6))
    torch.testing.assert_close(keys, F.rms_norm(key, (dim,), key_norm, 1e-6))


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_weight_multiplies_as_a_plain_one(tokens: int, bias: bool) -> None:
    matrix = torch.randn(96, 64, dtype=torch.bfloat16) / 8
    offset = torch.randn(96, dtype=torch.bfloat16) if bias else None
    weight = prepare(matrix, offset)
    x = torch.randn(tokens, 64, dtype=torch.bfloat16)
    expected = F.linear(x.float(), matrix.float(), None if offset is None else offset.float())
    torch.testing.assert_close(linear.linear(x, weight).float(), expected, rtol=1e-2, atol=1e-2)
    assert (weight.rows, weight.columns) == (96, 64)


def test_the_fused_products_are_their_parts() -> None:
    x, norm, residual = torch.randn(5, 16), torch.randn(16), torch.randn(5, 12)
    weight = Dense(torch.randn(12, 16), torch.randn(12))
    normed = F.rms_norm(x, (16,), norm, 1e-6)
    product = F.linear(normed, weight.matrix, weight.bias)
    torch.testing.assert_close(linear.norm_linear_reference(x, norm, 1e-6, weight), product)
    plain = F.linear(x, weight.matrix, weight.bias)
    total, normed_total = linear.linear_add_reference(x, weight, residual, torch.ones(12), 1e-6)
    torch.testing.assert_close(total, residual + plain)
    assert normed_total is None
    given = linear.norm_linear_reference(x, norm, 1e-6, weight, normed)
    torch.testing.assert_close(given, product)
    gated = F.silu(product[:, :6]) * product[:, 6:]
    torch.testing.assert_close(linear.norm_gated_reference(x, norm, 1e-6, weight), gated)


def test_argmax_takes_the_lowest_of_equals() -> None:
    assert argmax.reference(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]
