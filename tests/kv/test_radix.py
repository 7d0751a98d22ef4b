"""The radix tree and the page pool against a model that keeps every cached prefix in a dictionary."""

from __future__ import annotations

import random

import pytest

from paceline.errors import ConfigError
from paceline.kv.pages import PagePool
from paceline.kv.radix import Node, RadixTree

PAGE = 4


class Holder:
    """A request of the random test: its tokens, pages, how many of them the tree owns, and the node it locks."""

    def __init__(self, tokens: list[int], pages: list[int], shared: int, node: Node) -> None:
        self.tokens, self.pages, self.shared, self.node = tokens, pages, shared, node


def tree_pages(tree: RadixTree) -> list[int]:
    stack, pages = list(tree._roots.values()), []
    while stack:
        node = stack.pop()
        assert len(node.tokens) == len(node.pages) * PAGE
        pages += node.pages
        stack += node.children.values()
    return pages


def check(pool: PagePool, tree: RadixTree, holders: list[Holder], content: dict[int, tuple[int, ...]]) -> None:
    owned = tree_pages(tree)
    private = [page for holder in holders for page in holder.pages[holder.shared :]]
    everyone = owned + private + pool._free
    assert sorted(everyone) == list(range(1, pool.num_pages)), "a page is leaked, or has two owners"
    assert tree.num_pages == len(owned)
    for holder in holders:
        assert set(holder.pages[: holder.shared]) <= set(owned), "a page that a request reads was evicted"
        for index, page in enumerate(holder.pages[: holder.shared]):
            assert content[page] == tuple(holder.tokens[: (index + 1) * PAGE]), "a page holds another prefix"


@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_random_operations(seed: int) -> None:
    draw = random.Random(seed)
    pool = PagePool(60)
    tree = RadixTree(pool, PAGE)
    holders: list[Holder] = []
    content: dict[int, tuple[int, ...]] = {}
    hits = evictions = 0
    for _ in range(2500):
        action = draw.random()
        if action < 0.45 and len(holders) < 6:
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 40))]
            pages, place = tree.match(tokens)
            for index, page in enumerate(pages):
                assert content[page] == tuple(tokens[: (index + 1) * PAGE]), "matched a page of another prefix"
            hits += bool(pages)
            node = tree.lock(place)
            wanted = len(tokens) // PAGE - len(pages)
            lacking = wanted - pool.num_free
            if lacking > 0:
                freed = tree.evict(lacking) if lacking <= tree.num_evictable else 0
                evictions += freed
            if wanted > pool.num_free:
                tree.unlock(node)
                continue
            fresh = pool.allocate(wanted)
            whole = pages + fresh
            for index in range(len(pages), len(whole)):
                content[whole[index]] = tuple(tokens[: (index + 1) * PAGE])
            holders.append(Holder(tokens, whole, len(pages), node))
        elif action < 0.7 and holders:
            holder = draw.choice(holders)
            count = len(holder.tokens) // PAGE
            pages, place = tree.insert(holder.tokens[: count * PAGE], holder.pages, holder.shared)
            node = tree.lock(place)
            tree.unlock(holder.node)
            holder.pages, holder.shared, holder.node = pages, count, node
        elif action < 0.95 and holders:
            holder = holders.pop(draw.randrange(len(holders)))
            pool.free(holder.pages[holder.shared :])
            tree.unlock(holder.node)
        else:
            evictions += tree.evict(draw.randrange(1, 8))
        check(pool, tree, holders, content)
    for holder in holders:
        pool.free(holder.pages[holder.shared :])
        tree.unlock(holder.node)
    assert tree.num_locked == 0
    tree.evict(pool.num_pages)
    assert pool.num_free == pool.num_pages - 1 and tree.num_pages == 0
    assert hits > 100 and evictions > 100, "the operations did not reach what they are to test"


def test_least_recently_used_goes_first() -> None:
    pool = PagePool(10)
    tree = RadixTree(pool, PAGE)
    for start in (0, 100, 200):
        tree.insert(list(range(start, start + PAGE)), pool.allocate(1), 0)
    tree.unlock(tree.lock(tree.match(list(range(0, PAGE)))[1]))
    tree.evict(1)
    assert tree.match(list(range(100, 100 + PAGE)))[0] == []
    assert len(tree.match(list(range(0, PAGE)))[0]) == 1


def test_insertions_are_counted_also_of_runs_that_are_there() -> None:
    """A blocked request may need fewer pages after either: see `_Blocked` in the scheduler."""
    pool = PagePool(10)
    tree = RadixTree(pool, PAGE)
    tokens = list(range(2 * PAGE))
    for count in (1, 2):
        pages, _ = tree.insert(tokens, pool.allocate(2), 0)
        assert tree.num_inserts == count and tree.num_pages == 2 and len(pages) == 2
    assert pool.num_free == 7


def test_every_leaf_that_may_be_evicted_is_found() -> None:
    """Also after splits, partial evictions and a purge of entries that are out of date."""
    draw = random.Random(9)
    pool = PagePool(60)
    tree = RadixTree(pool, PAGE)
    locked: list[Node] = []
    for _ in range(2000):
        tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 8) * PAGE)]
        place = tree.match(tokens, draw.choice("ab"))[1]
        if draw.random() < 0.6:
            locked.append(tree.lock(place))
        if len(locked) > 4:
            tree.unlock(locked.pop(draw.randrange(5)))
        if draw.random() < 0.3:
            tree.evict(draw.randrange(1, 4))
        namespace, count = draw.choice("ab"), len(tokens) // PAGE
        if count <= pool.num_free:
            tree.insert(tokens, pool.allocate(count), 0, namespace)
        if draw.random() < 0.05:
            promised = tree.num_evictable
            assert tree.evict(pool.num_pages) == promised and tree.num_evictable == 0
    assert len(tree._leaves) <= 2 * tree._num_nodes + 64
    for node in locked:
        tree.unlock(node)
    tree.evict(pool.num_pages)
    assert pool.num_free == pool.num_pages - 1 and not tree._roots


def test_namespaces_share_nothing() -> None:
    pool = PagePool(10)
    tree = RadixTree(pool, PAGE)
    tokens = list(range(PAGE))
    tree.insert(tokens, pool.allocate(1), 0, "one")
    assert tree.match(tokens, "two")[0] == [] and len(tree.match(tokens, "one")[0]) == 1


def test_a_pool_without_room_is_refused() -> None:
    with pytest.raises(ConfigError):
        PagePool(1)


def test_freeing_twice_is_a_bug() -> None:
    pool = PagePool(4)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(AssertionError):
        pool.free(pages)
